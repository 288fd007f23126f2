/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What merging could save among images: the offline count.
 */

#ifndef REPLAY_IMAGES_H
#define REPLAY_IMAGES_H

#include <stdint.h>

/*
 * A run is of pages that follow each other both here and where their contents
 * were met first.
 */
typedef struct ReplayCount {
    uint64_t present;         /* pages with memory */
    uint64_t zero;            /* of them, of zeros only */
    uint64_t distinct;        /* contents among the others */
    uint64_t saveable;        /* all but one of each content, and no zero */
    uint64_t runs;            /* mappings that it takes, at least */
} ReplayCount;

/* Reads them all, so that they are in the page cache. */
void replay_images_count(const char *const *images, unsigned n,
                         ReplayCount *count);

#endif /* REPLAY_IMAGES_H */
