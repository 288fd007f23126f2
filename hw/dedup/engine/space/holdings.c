/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The table of holdings; see holdings.h.
 */

#include <fcntl.h>

#include "host/sys.h"
#include "space/holdings.h"
#include "space/space-internal.h"

DedupHolding *dedup_holding_add(DedupSpace *space, DedupSegment *segment)
{
    DedupHoldings *all = &space->holdings;
    DedupHolding *h = g_new0(DedupHolding, 1);
    unsigned no;

    h->segment = segment;
    h->zeroes = segment->zeroes;
    dedup_space_lock(space);
    for (no = all->hint; no < all->table->len; no++) {
        if (!g_ptr_array_index(all->table, no)) {
            break;
        }
    }
    if (no == all->table->len) {
        g_ptr_array_add(all->table, h);
    } else {
        g_ptr_array_index(all->table, no) = h;
    }
    h->no = no;
    all->hint = no + 1;
    all->held += !h->zeroes;
    if (segment->gid) {
        g_hash_table_insert(all->by_gid, GUINT_TO_POINTER(segment->gid), h);
    }
    dedup_space_unlock(space);
    return h;
}

void dedup_holding_drop(DedupSpace *space, DedupHolding *h)
{
    DedupHoldings *all = &space->holdings;

    dedup_space_lock(space);
    g_assert(h->refs == 0);
    g_ptr_array_index(all->table, h->no) = NULL;
    all->hint = MIN(all->hint, h->no);
    all->held -= !h->zeroes;
    g_hash_table_remove(all->by_gid, GUINT_TO_POINTER(h->segment->gid));
    dedup_space_unlock(space);
    dedup_segment_free(h->segment);
    g_free(h);
}

DedupHolding *dedup_holding_find(DedupSpace *space, uint32_t gid)
{
    return g_hash_table_lookup(space->holdings.by_gid, GUINT_TO_POINTER(gid));
}

void dedup_holding_rename(DedupSpace *space, DedupHolding *h, uint32_t gid)
{
    GHashTable *by_gid = space->holdings.by_gid;

    dedup_space_lock(space);
    if (h->segment->gid) {
        g_hash_table_remove(by_gid, GUINT_TO_POINTER(h->segment->gid));
    }
    h->segment->gid = gid;
    h->segment->mine = gid != 0;
    if (gid) {
        g_hash_table_insert(by_gid, GUINT_TO_POINTER(gid), h);
        __atomic_store_n(&h->dirty, true, __ATOMIC_RELAXED);
    }
    dedup_space_unlock(space);
}

unsigned dedup_holding_count(DedupSpace *space)
{
    return space->holdings.table->len;
}

DedupHolding *dedup_holding_get(DedupSpace *space, unsigned no)
{
    return g_ptr_array_index(space->holdings.table, no);
}

unsigned dedup_holdings_held(DedupSpace *space)
{
    return space->holdings.held;
}

DedupSegmentUse dedup_holding_use(DedupSpace *space, const DedupHolding *h)
{
    DedupSegmentUse use = { .gid = h->segment->gid };

    dedup_space_lock(space);
    use.mapped = h->mapped;
    for (unsigned p = 0; p < h->segment->npages; p++) {
        use.pages[p / 64] |= (uint64_t)!!h->use[p] << (p % 64);
    }
    dedup_space_unlock(space);
    return use;
}

int dedup_holding_fd(DedupSpace *space, uint32_t gid, uint32_t page,
                     const uint8_t *secret, DedupHash128 *hash)
{
    DedupHolding *h;
    int fd = -1;

    dedup_space_lock_to_read(space);
    h = dedup_holding_find(space, gid);
    if (h && page < h->segment->npages &&
        dedup_page_keyed_hash(dedup_segment_page(h->segment, page), secret,
                              hash)) {
        fd = sys_fcntl(h->segment->fd, F_DUPFD_CLOEXEC, 0);
    }
    dedup_space_unlock(space);
    return fd;
}
