/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The scan: what shall happen to which page.  It can cost time or savings, but
 * no guest a byte: that is the space's.  A review has to see to it that
 * nothing here stores to a DedupHolding or a DedupSegment, and that a holding
 * is dropped only when nothing refers to it and no DedupAction has it.
 *
 * Thread: the scanner's, unless a comment says otherwise.
 */

#ifndef DEDUP_SCAN_H
#define DEDUP_SCAN_H

#include "group/group.h"
#include "scan/control.h"
#include "scan/memo.h"
#include "scan/room.h"
#include "space/holdings.h"

typedef struct DedupScan DedupScan;

/* Takes nothing: all of it outlives the scan.  NULL and @error: no memory. */
DedupScan *dedup_scan_new(DedupSpace *space, DedupGroup *group,
                          DedupControl *control, DedupRoom *room,
                          GError **error);
/* After dedup_scan_abandon(), and when the group is gone. */
void dedup_scan_free(DedupScan *scan);

/*
 * Join the group, or join it again.  False and @error: the scan has no index
 * then, and may not be run.
 */
bool dedup_scan_join(DedupScan *scan, const DedupGroupOps *ops, void *opaque,
                     GError **error);
/* Look, now and then, whether the group's files are there.  True: no more. */
bool dedup_scan_has_lost_group(DedupScan *scan);

/*
 * Scan about @pages.  True: that was the end of a pass; then
 * dedup_scan_end_pass() is due.
 */
bool dedup_scan_batch(DedupScan *scan, const DedupParams *params,
                      uint32_t pages);

/* What a pass has counted. */
typedef struct DedupTally {
    DedupCounts counts;
    DedupEstimate estimate;
    uint64_t found;           /* pages merged or dropped */
    uint64_t hashed;
    uint64_t work;            /* what it was, in pages hashed */
    unsigned limits;          /* DedupLimit bits */
    int64_t us;               /* how long it took */
} DedupTally;

/* What the pass that is under way has had, in pages hashed. */
uint64_t dedup_scan_work(const DedupScan *scan);
/* The pass is over, and another one begins. */
void dedup_scan_end_pass(DedupScan *scan, DedupTally *tally);

/* DedupLimit bits of the pass that is under way. */
unsigned dedup_scan_limits(const DedupScan *scan);

/* Forget what was found, but not done yet. */
void dedup_scan_abandon(DedupScan *scan);

/*
 * Another member publishes what is in that page of ours, of which this is the
 * hash: it can be merged soon.  Any thread.
 */
void dedup_scan_tell(DedupScan *scan, uint32_t member_page, uint64_t hash);
/*
 * In how many us something is to be done that was found, or told; INT64_MAX:
 * there is nothing.  Then dedup_scan_merge() is due, however slow the pace.
 */
int64_t dedup_scan_waits_us(const DedupScan *scan);
/*
 * Do what can be done.  What is claimed, but not published yet, stays for the
 * next time, until two passes have ended.
 */
void dedup_scan_merge(DedupScan *scan);
/* What other members call a page's hash; any thread, while joined. */
uint64_t dedup_scan_salt(const DedupScan *scan);

/*
 * What is to be done when the costly figures are new: leave holdings that cost
 * more than they save (I8), mend the index.
 */
void dedup_scan_upkeep(DedupScan *scan);
/* Let go of holdings that nothing refers to. */
void dedup_scan_drop_unused(DedupScan *scan);

/* So many pages of others' are merged to the holding's segment. */
void dedup_scan_note_others(DedupScan *scan, const DedupHolding *h,
                            uint32_t mapped);
/*
 * All of the group's table was walked: a name that was not met, by
 * dedup_scan_note_others(), is not ours any more.  Others release the names of
 * a member that they take for dead.  True: there are such holdings, and
 * dedup_scan_name_holdings() is due, when the nameless ones were counted.
 */
bool dedup_scan_forget_lost_names(DedupScan *scan);
/*
 * Give names to the holdings that have none, as many as can be had now: the
 * group's table may be full, or locked by somebody who was stopped.
 */
void dedup_scan_name_holdings(DedupScan *scan);

/* Where the pass is, as a member page number; any thread. */
uint32_t dedup_scan_at(const DedupScan *scan);
/* Pages hashed since the start; any thread. */
uint64_t dedup_scan_pages(const DedupScan *scan);
/* Memory of the layer's own, in bytes. */
uint64_t dedup_scan_bytes(DedupScan *scan);

#endif /* DEDUP_SCAN_H */
