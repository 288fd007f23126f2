/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Restoring a window of pages; see restore.c.
 */

#ifndef DEDUP_RESTORE_H
#define DEDUP_RESTORE_H

#include "space/space-internal.h"

/*
 * Give pages [first, first + n) their own memory back, contents and all; at
 * most DEDUP_RESTORE_PAGES.  Remap lock held.  Returns how many pages are
 * still not own: pinned, or the kernel refused, see DedupRegion.lacks.
 */
unsigned dedup_restore_locked(DedupRegion *r, uint32_t first, unsigned n);

#endif /* DEDUP_RESTORE_H */
