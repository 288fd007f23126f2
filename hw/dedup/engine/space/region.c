/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A region: the RAM that the engine's owner handed over, as it is described
 * here.
 *
 * It has arrays that are populated by the kernel as they are touched: the
 * ledger (4 bytes a page, touched only around merged pages, see
 * dedup_entry_at()), and sums and flags per 2 MiB.  What the scanner remembers
 * of its pages is the scanner's own.
 */

#include <errno.h>
#include <sys/mman.h>

#include "host/mutant.h"
#include "space/array.h"
#include "space/poison.h"
#include "space/space-internal.h"
#include "space/zeroes.h"

DedupRegion *dedup_region_new(DedupSpace *space, const DedupRegionInfo *info,
                              void *memo, GDestroyNotify memo_free)
{
    DedupRegion *r = g_new0(DedupRegion, 1);

    r->space = space;
    r->memo = memo;
    r->memo_free = memo_free;
    r->info = *info;
    r->info.id = g_strdup(info->id);
    r->host = info->host;
    r->npages = info->size >> DEDUP_PAGE_SHIFT;
    r->bounded = info->memory == DEDUP_MEMORY_SHARED &&
                 dedup_file_is_bounded(info->fd, &r->dev) &&
                 !DEDUP_MUTANT(PUNCH_ZEROES);
    r->entry = dedup_array_new((size_t)r->npages * sizeof(r->entry[0]));
    r->chunk = dedup_array_new(dedup_region_chunks(r) * sizeof(r->chunk[0]));
    r->area = dedup_array_new(dedup_region_chunks(r));
    if (!r->entry || !r->chunk || !r->area) {
        dedup_region_free(r);
        return NULL;
    }
    return r;
}

void dedup_region_free(DedupRegion *r)
{
    dedup_poison_clear(r);
    dedup_array_free(r->entry, (size_t)r->npages * sizeof(r->entry[0]));
    dedup_array_free(r->chunk, dedup_region_chunks(r) * sizeof(r->chunk[0]));
    dedup_array_free(r->area, dedup_region_chunks(r));
    if (r->memo) {
        r->memo_free(r->memo);
    }
    g_free((char *)r->info.id);
    g_free(r);
}

void *dedup_region_memo(const DedupRegion *r)
{
    return r->memo;
}

uint32_t dedup_region_npages(const DedupRegion *r)
{
    return r->npages;
}

void *dedup_region_host(const DedupRegion *r)
{
    return r->host;
}

uint32_t dedup_region_base(const DedupRegion *r)
{
    return r->base;
}

int dedup_region_compare(const DedupRegion *a, const DedupRegion *b)
{
    if (a->base != b->base) {
        return a->base < b->base ? -1 : 1;
    }
    /* one that is gone, and who came to its place */
    return a->serial < b->serial ? -1 : a->serial > b->serial;
}

bool dedup_region_intersect(const DedupRegion *r, const uint8_t *host,
                            const uint8_t *end, uint32_t *first, uint32_t *n)
{
    const uint8_t *start = MAX(host, r->host);
    const uint8_t *stop = MIN(end, dedup_region_addr(r, r->npages));

    if (start >= stop) {
        return false;
    }
    *first = (start - r->host) >> DEDUP_PAGE_SHIFT;
    *n = ((stop - r->host + DEDUP_PAGE_SIZE - 1) >> DEDUP_PAGE_SHIFT) -
         *first;
    return true;
}

static bool is_raised(const uint16_t *counters, uint32_t page)
{
    uint16_t *c = (uint16_t *)counters;
    uint32_t chunk = page >> (DEDUP_PIN_SHIFT - DEDUP_PAGE_SHIFT);

    /* pairs with the raise in ram_guard_dma_map() */
    return c && __atomic_fetch_or(&c[chunk], 0, __ATOMIC_SEQ_CST);
}

bool dedup_region_pinned(const DedupRegion *r, uint32_t page)
{
    return is_raised(r->info.pins, page);
}

bool dedup_region_held(const DedupRegion *r, uint32_t page)
{
    return is_raised(r->info.pins, page) ||
           (r->info.memory == DEDUP_MEMORY_SHARED &&
            is_raised(r->info.readers, page));
}

uint32_t dedup_region_freezable(const DedupRegion *r, uint32_t first,
                                uint32_t n)
{
    const uint32_t step = 1 << (DEDUP_PIN_SHIFT - DEDUP_PAGE_SHIFT);
    uint32_t end = first + n;

    /* of a dead one the counters are gone, and nothing is frozen */
    if (!dedup_freezer_fails_in_kernel(&r->space->freezer) || r->dead ||
        DEDUP_MUTANT(FREEZE_PINNED)) {
        return n;
    }
    for (uint32_t i = first; i < end; i = (i / step + 1) * step) {
        if (dedup_region_pinned(r, i)) {
            return i - first;
        }
    }
    return n;
}

bool dedup_region_freeze(DedupRegion *r, uint32_t first, uint32_t n,
                         bool missing, DedupFrozen *z)
{
    DedupFreezer *f = &r->space->freezer;

    dedup_freeze_announce(z, f, dedup_region_addr(r, first),
                          (size_t)n << DEDUP_PAGE_SHIFT);
    if (dedup_region_freezable(r, first, n) < n) {
        dedup_freeze_withdraw(z);
        errno = EBUSY;
        return false;
    }
    return dedup_freeze_begin(z, missing);
}

DedupRegion *dedup_region_next(DedupSpace *space, uint32_t at)
{
    DedupRegion *next = NULL;

    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);

        if (r->base + r->npages > at && (!next || r->base < next->base)) {
            next = r;
        }
    }
    return next;
}

bool dedup_region_find(DedupSpace *space, uint32_t member_page,
                       DedupRegion **region, uint32_t *page)
{
    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);

        if (member_page >= r->base && member_page - r->base < r->npages) {
            *region = r;
            *page = member_page - r->base;
            return true;
        }
    }
    return false;
}
