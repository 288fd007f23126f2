/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The memo: what the scanner remembers of a region's pages between two passes,
 * and what a pass counts in it.
 *
 * A fingerprint is 16 bits of the content hash: 0 is "never seen", 1 is "all
 * zero".  A false match makes a volatile page look stable, no more.  The
 * array is populated by the kernel as it is touched, and given back where
 * nothing is there any more.
 *
 * Thread: the scanner's, once the region is added.  Owner: the region, which
 * frees it.
 */

#ifndef DEDUP_MEMO_H
#define DEDUP_MEMO_H

#include "space/space.h"

typedef struct DedupMemo {
    uint16_t *fingerprint;    /* one per page */
    bool *taken;              /* one per chunk: fingerprints are there */
    uint32_t npages;
    uint32_t ntaken;          /* chunks that have some */
    DedupCounts counting;     /* of the pass under way */
} DedupMemo;

/* For a region of so many pages; NULL: there is no memory. */
DedupMemo *dedup_memo_new(uint32_t npages);
/* A GDestroyNotify. */
void dedup_memo_free(gpointer memo);

/*
 * A page was seen; @hash is 0 if it is all zero.  True: it has not changed
 * since the pass before.  It is counted as unshared or as volatile; who merges
 * it takes that off again.
 */
bool dedup_memo_see(DedupMemo *m, uint32_t page, uint64_t hash);

/* Nothing is in @n chunks from @chunk on. */
void dedup_memo_forget(DedupMemo *m, uint32_t chunk, uint32_t n);

/* The end of a pass: what it counted, to which @sum is added. */
void dedup_memo_take_counts(DedupMemo *m, DedupCounts *sum);

/* Memory that it has, in bytes. */
uint64_t dedup_memo_bytes(const DedupMemo *m);

#endif /* DEDUP_MEMO_H */
