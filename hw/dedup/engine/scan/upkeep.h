/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Upkeep of the index: its size, and hints that are missing or stale; see
 * upkeep.c.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_UPKEEP_H
#define DEDUP_UPKEEP_H

#include "scan/scan-internal.h"

void dedup_upkeep_init(DedupScan *scan);

/*
 * The members have so many pages: hints of what was there once fill the index,
 * it need not grow on.  0 would stop it while no slot can be read yet; more
 * than the host can have is a lie.
 */
void dedup_upkeep_set_index_limit(DedupScan *scan, uint64_t pages);

/* May the index grow?  Looks now and then. */
void dedup_upkeep_index_room(DedupScan *scan);

/* All that we published is to be announced again, a slice at a time. */
void dedup_upkeep_announce_all(DedupScan *scan);

/* A slice of the holdings: to hash them all may take seconds. */
void dedup_upkeep_announce(DedupScan *scan);

/* Remove stale hints, in slices: something else may be asked meanwhile. */
void dedup_upkeep_sweep(DedupScan *scan);

/* Another group has another index. */
void dedup_upkeep_forget_group(DedupScan *scan);

#endif /* DEDUP_UPKEEP_H */
