/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a window may spend of the process's mappings.  Remap lock held.
 */

#ifndef DEDUP_MAPS_H
#define DEDUP_MAPS_H

#include "space/space-internal.h"

/* How many more we may use. */
int64_t dedup_maps_left(DedupSpace *space);

/*
 * Which of a window's actions may be done with the maps that are left: takes
 * the others out of @actions, and sets bits of @limits.  False: none.
 */
bool dedup_maps_admit(const DedupRegion *r, DedupAction **actions,
                      unsigned *n, unsigned *limits);

#endif /* DEDUP_MAPS_H */
