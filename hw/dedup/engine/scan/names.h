/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Names of holdings in the group, when it is joined, and joined again; see
 * names.c.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_NAMES_H
#define DEDUP_NAMES_H

#include "scan/scan-internal.h"

/*
 * Give names to the holdings that have none, as many as can be had now: the
 * group's table may be full, or locked by somebody who was stopped.
 */
void dedup_names_give(DedupScan *scan);

#endif /* DEDUP_NAMES_H */
