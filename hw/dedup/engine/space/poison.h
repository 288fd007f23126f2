/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Pages of a region's own that could not be read: their memory is broken.
 *
 * They are not shown to the scan again until their owner has thrown them away.
 * (The kernel says of anonymous memory that it is on swap, so there only who
 * comes at the same moment meets one.)  Remap lock held.
 */

#ifndef DEDUP_POISON_H
#define DEDUP_POISON_H

#include "space/space-internal.h"

void dedup_poison_add(DedupRegion *r, uint32_t page);
/* They are thrown away: what comes in their place is whole. */
void dedup_poison_forget(DedupRegion *r, uint32_t first, uint32_t n);
void dedup_poison_clear(DedupRegion *r);

static inline bool dedup_poison_has(const DedupRegion *r, uint32_t page)
{
    return G_UNLIKELY(r->poisoned) &&
           g_hash_table_contains(r->poisoned, GUINT_TO_POINTER(page));
}

#endif /* DEDUP_POISON_H */
