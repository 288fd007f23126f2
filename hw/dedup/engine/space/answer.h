/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the thread that answers other members knows of this one's pages.
 *
 * Others ask for pages in the order of their own memory, so page after page is
 * of another chunk.  Which pages of a chunk are there is asked of the kernel
 * once, and kept for a while: as long as nobody had the remap lock who might
 * have discarded something.
 *
 * Thread: any, with the remap lock held; the functions that others call for
 * this are in space.h, and take it.
 */

#ifndef DEDUP_ANSWER_H
#define DEDUP_ANSWER_H

#include <stdint.h>

#include "space/space.h"

/* What the kernel said about a chunk. */
typedef struct DedupKnownChunk {
    DedupRegion *region;      /* NULL: nothing; else not to be followed */
    uint32_t chunk;           /* of the region */
    uint64_t strangers;       /* DedupSpaceLock.strangers at that time */
    int64_t since_us;
    uint64_t present[DEDUP_CHUNK_PAGES / 64];  /* a bit for each page */
} DedupKnownChunk;

typedef struct DedupAnswers {
    DedupKnownChunk *known;   /* NULL: no address space; then all is absent */
} DedupAnswers;

/* Takes no memory before somebody asks. */
void dedup_answers_init(DedupAnswers *a);
/* Bytes of memory; needs no lock. */
uint64_t dedup_answers_bytes(const DedupAnswers *a);
void dedup_answers_clear(DedupAnswers *a);

#endif /* DEDUP_ANSWER_H */
