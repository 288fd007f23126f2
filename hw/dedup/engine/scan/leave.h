/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Leaving: which holdings cost more than they save (I8); see leave.c.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_LEAVE_H
#define DEDUP_LEAVE_H

#include "scan/scan-internal.h"

/* Part of a scan's life. */
void dedup_leave_init(DedupScan *scan);
void dedup_leave_clear(DedupScan *scan);

/* What is known of a holding.  Valid until one is added. */
DedupNote *dedup_leave_note(DedupScan *scan, const DedupHolding *h);

/*
 * Has every member that scans made a pass since the last tick?  Then this is
 * one more.  Returns the pages of all members.
 */
uint64_t dedup_leave_tick(DedupScan *scan);

/* Leave what has been lean for long enough. */
void dedup_leave_lean(DedupScan *scan);

/* Another group: what is known by names, and of members, is void. */
void dedup_leave_forget_group(DedupScan *scan);

#endif /* DEDUP_LEAVE_H */
