/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How much a window may do at a time.
 *
 * Each window has costs of its own, so the fewer the cheaper; but a writer that
 * meets one waits until its end.  Where writers were met lately, a window ends
 * in about DEDUP_BOUND_NS; where there were none for long, as in a guest that
 * is stopped, windows grow until they are as large as a huge page.
 *
 * Thread: the scanner's, with the remap lock held.
 */

#ifndef DEDUP_BOUND_H
#define DEDUP_BOUND_H

#include <stdbool.h>
#include <stdint.h>

#define DEDUP_BOUND_NS 200000

/* All zero at first. */
typedef struct DedupBound {
    int64_t page_ns;          /* what a page took lately, all included */
    int64_t may_take_ns;      /* a window */
    int64_t met_ns;           /* when a writer was met last; 0: never */
    int64_t longest_ns;       /* atomic: since somebody has asked */
} DedupBound;

/* How many pages the next window may replace. */
unsigned dedup_bound_pages(const DedupBound *b);

/*
 * A window that was open from @start on, at @now, has replaced so many pages;
 * @met: a writer waited for its end.
 */
void dedup_bound_note(DedupBound *b, unsigned pages, int64_t start_ns,
                      int64_t now_ns, bool met);

/* One was open, or vCPUs were kept out for it, for so long.  Any thread. */
void dedup_bound_took(DedupBound *b, int64_t ns);

#endif /* DEDUP_BOUND_H */
