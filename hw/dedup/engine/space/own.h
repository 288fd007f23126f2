/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The region's own memory, put back in the place of something else; at most
 * DEDUP_WINDOW_PAGES at a time, but for dedup_region_map_own().  Remap lock
 * held.
 */

#ifndef DEDUP_OWN_H
#define DEDUP_OWN_H

#include "space/space-internal.h"

/* Re-apply the region's madvise() state to new mappings. */
void dedup_region_reapply(const DedupRegion *r, uint32_t page, uint32_t n);

/* Map the region's own memory there, without contents. */
bool dedup_region_map_own(DedupRegion *r, uint32_t page, uint32_t n);

/* The same, without leaving a hole if trying again helps. */
bool dedup_own_map_whole(DedupRegion *r, uint32_t page, uint32_t n);

/*
 * Did the kernel unmap a place, and could not map there what was wanted?  That
 * takes a lack of its own memory at the worst moment.
 */
bool dedup_own_has_hole(const DedupRegion *r, uint32_t page, uint32_t n);

/*
 * Shared regions: write contents to the file; on failure they leave it again,
 * and DedupRegion.lacks says why.
 */
bool dedup_own_write(DedupRegion *r, uint32_t page, uint32_t n,
                     const uint8_t *from);

/*
 * What is in the file is mapped again.  False: it is not, and nothing has
 * changed, or a hole stayed: ask dedup_own_has_hole().
 */
bool dedup_own_map_back(DedupRegion *r, uint32_t page, uint32_t n);

/* Private regions: fresh memory with the region's attributes; NULL: none. */
uint8_t *dedup_own_staging(const DedupRegion *r, uint32_t page, size_t len);

/*
 * Move a run of staging memory to its place, at one stroke.  False: it is not
 * there.  If the kernel had unmapped the place already there is a hole then,
 * if trying again does not help: who touches it stops, which is better than
 * going on with other bytes.
 */
bool dedup_own_move(DedupRegion *r, uint8_t *from, uint32_t page, uint32_t n);

/*
 * Mapping something over pages has failed, and the kernel had unmapped them:
 * put own memory there with @content; NULL: with what the file of a shared
 * region has there, or zeros.  True: the pages are own; in a shared region even
 * if the hole stays, as the file has the only copy then.  False: there was no
 * hole, or the contents are not there.
 */
bool dedup_fill_hole(DedupRegion *r, uint32_t page, uint32_t n,
                     const uint8_t *content);

#endif /* DEDUP_OWN_H */
