/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Merging: tasks (todo.h) become windows, chunk by chunk.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_MERGE_H
#define DEDUP_MERGE_H

#include "scan/scan-internal.h"

/*
 * Is that page of the holding what the hint said?  The index compares only a
 * part of the hash, which is enough most often: the window finds out.  Where it
 * has found that it was not, all bytes are compared here.
 */
bool dedup_merge_is_right(DedupRegion *r, uint32_t page,
                          const DedupHolding *h, uint32_t index);

#endif /* DEDUP_MERGE_H */
