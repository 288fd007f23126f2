/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Holdings: the segments that this process has, and how it uses them.
 *
 * A holding is dropped only when no entry of the ledger refers to it; entries
 * leave it only after its mapping is gone.  So whatever number is read from an
 * entry is one that exists.
 *
 * Thread: the scanner adds, drops and renames; it may walk them without the
 * remap lock.  Counts are atomic.
 */

#ifndef DEDUP_HOLDINGS_H
#define DEDUP_HOLDINGS_H

#include "group/group.h"
#include "space/space.h"

struct DedupHolding {
    DedupSegment *segment;
    uint32_t no;              /* in this process's table */
    bool zeroes;              /* sparse, all zero, without a name: zeroes.c */
    bool dirty;               /* @mapped or @use changed since it was told */
    uint32_t refs;            /* guest pages merged or broken: maps hold it */
    uint32_t mapped;          /* guest pages merged */
    uint32_t ends;            /* ends of our maps of it, two of each */
    uint32_t use[DEDUP_SEGMENT_PAGES]; /* guest pages merged to each page */
};

/* Takes @segment. */
DedupHolding *dedup_holding_add(DedupSpace *space, DedupSegment *segment);
/* Frees it with its segment: nothing refers to it. */
void dedup_holding_drop(DedupSpace *space, DedupHolding *h);

/* By its name in the group; NULL: we have none. */
DedupHolding *dedup_holding_find(DedupSpace *space, uint32_t gid);
/* It has another name, and was published by us; 0: it has none. */
void dedup_holding_rename(DedupSpace *space, DedupHolding *h, uint32_t gid);

/* All of them by number, from 0 to below _count(); NULL where there is none. */
unsigned dedup_holding_count(DedupSpace *space);
DedupHolding *dedup_holding_get(DedupSpace *space, unsigned no);
/* How many there are, but for that of zeros. */
unsigned dedup_holdings_held(DedupSpace *space);

/* What of it is used, as it is told to the group. */
DedupSegmentUse dedup_holding_use(DedupSpace *space, const DedupHolding *h);

/*
 * A descriptor of the segment with that name, and the keyed hash of one of its
 * pages; -1: we have none.  Any thread; the caller closes it.
 */
int dedup_holding_fd(DedupSpace *space, uint32_t gid, uint32_t page,
                     const uint8_t *secret, DedupHash128 *hash);

/* Let that of zeros go if no page refers to it.  Scanner's. */
void dedup_zeroes_drop_unused(DedupSpace *space);

#endif /* DEDUP_HOLDINGS_H */
