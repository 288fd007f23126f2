/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The segment of zeros: what zero pages are merged to where a hole in the
 * RAM's file is not safe; see zeroes.c.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_ZEROES_H
#define DEDUP_ZEROES_H

#include "internal.h"

/* May the file system of the file run full?  Any thread. */
bool dedup_file_is_bounded(int fd, dev_t *dev);

/*
 * What to do with the zero page @page of @r: sets @action's segment and index;
 * no segment: drop it.  False: it cannot be merged now.
 */
bool dedup_zeroes_action(DedupRegion *r, uint32_t page, DedupAction *action);

/* Let it go if no page refers to it. */
void dedup_zeroes_drop_unused(DedupEngine *e);

/* Memory of its own: pages of it that guests have read. */
uint64_t dedup_zeroes_bytes(const DedupEngine *e);

#endif /* DEDUP_ZEROES_H */
