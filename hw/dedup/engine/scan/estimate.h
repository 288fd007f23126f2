/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The estimate: what would be saved if this process merged its pages.
 *
 * Who only estimates leaves hints in the index as others do, so that other
 * members find them that estimate too.  Members that merge ignore them: nobody
 * there would publish or fetch anything.  Of pages with one content, in
 * whatever processes, all but one are counted, by the process that has them;
 * where members merge it, all of them.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_ESTIMATE_H
#define DEDUP_ESTIMATE_H

#include "scan/ask.h"

/*
 * Count a page that did not change.  True: only another member knows whether it
 * has the same, and *@remote is to be asked, with others.
 */
bool dedup_estimate_page(DedupScan *scan, DedupRegion *r, uint32_t page,
                         uint64_t hash, DedupRemote *remote);
/* Ask, and count those that they prove to have; at most DEDUP_PROOF_PAGES. */
void dedup_estimate_remotes(DedupScan *scan, const DedupRemote *remotes,
                            unsigned n);

#endif /* DEDUP_ESTIMATE_H */
