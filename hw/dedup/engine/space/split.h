/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Huge pages of private memory, of which pages are replaced.  Replacing part of
 * one frees nothing before it is split.  Remap lock held.
 */

#ifndef DEDUP_SPLIT_H
#define DEDUP_SPLIT_H

#include "space/space-internal.h"

/* The pages of @r, [*first, *last], that may be in one huge page with @page. */
void dedup_huge_range(const DedupRegion *r, uint32_t page, uint32_t *first,
                      uint32_t *last);

/*
 * Before a window: pages that are about to be dropped must not be brought back
 * by khugepaged.
 */
void dedup_forbid_huge(DedupRegion *r, DedupAction *const *actions,
                       unsigned n);

/*
 * Split what may be a huge page that is mapped page by page, at a page that is
 * there; once a pass.
 */
void dedup_split_mapped(DedupRegion *r, uint32_t page);

/* After a window that froze a huge page: split what is left of it. */
void dedup_split_huge(DedupRegion *r, uint32_t page);

#endif /* DEDUP_SPLIT_H */
