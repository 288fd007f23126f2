/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Pages that could not be read; see poison.h.
 */

#include "space/poison.h"

void dedup_poison_add(DedupRegion *r, uint32_t page)
{
    if (!r->poisoned) {
        r->poisoned = g_hash_table_new(NULL, NULL);
    }
    g_hash_table_add(r->poisoned, GUINT_TO_POINTER(page));
}

typedef struct Range {
    uint32_t first;
    uint32_t n;
} Range;

static gboolean is_in(gpointer key, gpointer value, gpointer opaque)
{
    const Range *range = opaque;

    return GPOINTER_TO_UINT(key) - range->first < range->n;
}

void dedup_poison_forget(DedupRegion *r, uint32_t first, uint32_t n)
{
    Range range = { .first = first, .n = n };

    if (!r->poisoned) {
        return;
    }
    g_hash_table_foreach_remove(r->poisoned, is_in, &range);
    if (!g_hash_table_size(r->poisoned)) {
        dedup_poison_clear(r);
    }
}

void dedup_poison_clear(DedupRegion *r)
{
    g_clear_pointer(&r->poisoned, g_hash_table_destroy);
}
