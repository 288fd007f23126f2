/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is to be done: pages of which it is known what they shall be merged
 * with, or soon will be.
 *
 * A pass finds what can be merged in scan order, but segments are ready later:
 * when a draft is full, when the pass ends, when another member publishes what
 * it claimed.  So tasks are collected, and done chunk by chunk: what a chunk
 * costs (freezing it, splitting its huge page) is paid once, and no page is
 * hashed again only to find out that it was published meanwhile.
 *
 * A task names a page and the hash that it had.  Both may be wrong by the time
 * it is done (merge.h); the window compares bytes.
 *
 * Thread: the scanner's, but for dedup_todo_tell().
 */

#ifndef DEDUP_TODO_H
#define DEDUP_TODO_H

#include "scan/scan-internal.h"

typedef struct DedupTask {
    uint64_t hash;
    uint32_t page;            /* member page number */
    bool zero;                /* the page is: it has no hash */
    bool stable;
    bool told;                /* by another member */
    uint8_t pass;             /* in which it was found */
} DedupTask;

/* Part of a scan's life.  False and @error: no memory, and nothing is there. */
bool dedup_todo_init(DedupScan *scan, GError **error);
void dedup_todo_clear(DedupScan *scan);
/* Memory of its own, in bytes. */
uint64_t dedup_todo_bytes(const DedupScan *scan);

/*
 * The page shall be merged with whatever is published under the hash.
 * @stable: as it was counted in this pass.
 */
void dedup_todo_add(DedupScan *scan, const DedupRegion *r, uint32_t page,
                    uint64_t hash, bool stable);
/* The page is zero, and shall be dropped. */
void dedup_todo_add_zero(DedupScan *scan, const DedupRegion *r,
                         uint32_t page);

/*
 * All of them, by page; what was told by others, too.  They stay where they
 * are: dedup_todo_keep() is due, when those that cannot be done yet have been
 * moved to the front.
 */
DedupTask *dedup_todo_take(DedupScan *scan, unsigned *n);
void dedup_todo_keep(DedupScan *scan, unsigned n);
void dedup_todo_forget(DedupScan *scan);
/* What others have said is about another group. */
void dedup_todo_forget_told(DedupScan *scan);

#endif /* DEDUP_TODO_H */
