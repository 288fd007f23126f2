/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Need: the memory that restoring takes, and the blocks of file systems.
 */

#ifndef DEDUP_NEED_H
#define DEDUP_NEED_H

#include <sys/types.h>

#include "space/space.h"

/* File systems that one need can name; more are looked at as if one. */
#define DEDUP_NEED_FILES 4

typedef struct DedupNeed {
    uint64_t memory;          /* bytes */
    unsigned nfiles;
    struct {
        dev_t dev;
        uint64_t bytes;       /* to be written to its files */
        uint64_t free;        /* what it has, when it was looked at */
        char id[64];          /* of a region there, for messages */
    } files[DEDUP_NEED_FILES];
} DedupNeed;

/* What restoring [host, end) takes at most. */
void dedup_space_need(DedupSpace *space, const void *host, const void *end,
                      DedupNeed *need);
/* The same of @n regions, none of which goes meanwhile. */
void dedup_space_need_regions(DedupSpace *space, DedupRegion *const *regions,
                              unsigned n, DedupNeed *need);

/* Pages that KSM shares in this process, in bytes: owed to it. */
uint64_t dedup_space_ksm_bytes(DedupSpace *space);

#endif /* DEDUP_NEED_H */
