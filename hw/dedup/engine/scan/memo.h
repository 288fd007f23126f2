/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The memo: what the scanner remembers of a region's pages between two passes,
 * and what a pass counts in it.
 *
 * A page has 16 bits:
 *   fingerprint  11 bits of the content hash: 0 is "never seen", 1 is "all
 *                zero".  A false match makes a volatile page look stable, no
 *                more.
 *   patience     4 bits: how often it was merged and then written.  One with
 *                patience p is looked at once in 2^p seconds, and has to be
 *                what it was at the look before.  So a page that is written
 *                again and again is merged less and less often.
 *   doubt        a hint to a segment was wrong: the segment's page has other
 *                contents, of which the index sees the same bits
 * The array is populated by the kernel as it is touched, and given back where
 * nothing is there any more.
 *
 * A chunk rests when a good part of what was merged in it was written since:
 * nothing in it is looked at.  Then a few of its pages are tried, and more, as
 * long as they are not written.  So a guest that writes round and round to
 * equal pages is disturbed once, and then less and less often.
 *
 * Thread: the scanner's, once the region is added.  Owner: the region, which
 * frees it.
 */

#ifndef DEDUP_MEMO_H
#define DEDUP_MEMO_H

#include "space/space.h"

typedef struct DedupRest {
    uint32_t until;           /* s, of the scan's clock */
    uint32_t since;           /* when @tries changed, likewise */
    uint32_t counting;        /* since when @broke counts, likewise */
    uint16_t broke;           /* pages found written since then */
    uint16_t tries;           /* pages that may be merged in a pass */
    uint8_t level;            /* the more, the longer; 0: all is well */
} DedupRest;

typedef struct DedupMemo {
    uint16_t *pages;          /* one per page */
    DedupRest *rest;          /* one per chunk */
    bool *taken;              /* one per chunk: pages were seen there */
    uint32_t npages;
    uint32_t ntaken;          /* chunks that have some */
    uint32_t nrests;          /* chunks of which the level is not 0 */
    unsigned begun;           /* passes that came to this region */
    DedupCounts counting;     /* of the pass under way */
} DedupMemo;

/* When a pass began, and the one before, in s; some time is long ago. */
typedef struct DedupMemoClock {
    uint32_t before;
    uint32_t now;
} DedupMemoClock;

/* For a region of so many pages; NULL: there is no memory. */
DedupMemo *dedup_memo_new(uint32_t npages);
/* A GDestroyNotify. */
void dedup_memo_free(gpointer memo);

/*
 * Shall the page be looked at in this pass?  If not it is counted as volatile.
 */
bool dedup_memo_is_due(DedupMemo *m, uint32_t page,
                       const DedupMemoClock *clock);

/*
 * A page was seen; @hash is 0 if it is all zero.  True: it has not changed
 * since it was last seen, or this is the first pass over the region: most of
 * what is there has been for long.  It is counted as unshared or as volatile;
 * who merges it takes that off again, by dedup_memo_merged().
 */
bool dedup_memo_see(DedupMemo *m, uint32_t page, uint64_t hash);
void dedup_memo_merged(DedupMemo *m, bool stable);

/* It was merged, and has been written since it was last looked at. */
void dedup_memo_broke(DedupMemo *m, uint32_t page);

/* Hints to segments are to be compared by the whole hash. */
bool dedup_memo_doubts(const DedupMemo *m, uint32_t page);
void dedup_memo_doubt(DedupMemo *m, uint32_t page);

/* Nothing of the chunk is to be looked at now. */
bool dedup_memo_rests(const DedupMemo *m, uint32_t chunk, uint32_t now);
/*
 * A chunk was looked at: of those that had been merged @broke pages were found
 * written, and @kept were not.  While it rests that changes nothing.
 */
void dedup_memo_judge(DedupMemo *m, uint32_t chunk, uint32_t now,
                      unsigned kept, unsigned broke);
/* How many pages of the chunk may be merged in this pass. */
unsigned dedup_memo_may_merge(const DedupMemo *m, uint32_t chunk);

/* Nothing is in @n chunks from @chunk on. */
void dedup_memo_forget(DedupMemo *m, uint32_t chunk, uint32_t n);

/* The end of a pass: what it counted, to which @sum is added. */
void dedup_memo_take_counts(DedupMemo *m, DedupCounts *sum);

/* Memory that it has, in bytes. */
uint64_t dedup_memo_bytes(const DedupMemo *m);

#endif /* DEDUP_MEMO_H */
