/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The space: its life, its regions, its sums.
 *
 * A removed region is dead at once: nobody reads or maps its memory after
 * dedup_space_remove() returns, and it is in no sum any more.  Its struct
 * lives on until the scanner, which may remember it between two takings of
 * the remap lock, has let go, and has let its pages go of their holdings: who
 * removes it need not wait for that.  At the end of the process nobody does.
 */

#include <sys/mman.h>
#include <unistd.h>

#include "host/mutant.h"
#include "host/sys.h"
#include "index/index.h"
#include "space/array.h"
#include "space/holdings.h"
#include "space/ksm.h"
#include "space/ledger.h"
#include "space/zeroes.h"

/* Pages that are let go of under one taking of the lock. */
#define FORGET_PAGES 4096

/* ---- life ---- */

DedupSpace *dedup_space_new(void *owner, bool reads_only, DedupFreezeHow how,
                            GError **error)
{
    DedupSpace *space = g_new0(DedupSpace, 1);

    space->owner = owner;
    space->reads_only = reads_only;
    dedup_process_open(&space->process);
    if (!reads_only &&
        !dedup_freezer_open(&space->freezer, how, space->process.pagemap_fd,
                            error)) {
        dedup_process_close(&space->process);
        g_free(space);
        return NULL;
    }
    g_mutex_init(&space->lock.turn);
    g_mutex_init(&space->lock.mutex);
    if (!reads_only) {
        dedup_ksm_open(space);
        dedup_quota_init(&space->quota, "/proc");
    }
    dedup_answers_init(&space->answers);
    space->regions = g_ptr_array_new();
    space->dead = g_ptr_array_new();
    space->holdings.table = g_ptr_array_new();
    space->holdings.by_gid = g_hash_table_new(NULL, NULL);
    return space;
}

void *dedup_region_owner(const DedupRegion *r)
{
    return r->space->owner;
}

static void free_regions(GPtrArray *regions)
{
    for (unsigned i = 0; i < regions->len; i++) {
        dedup_region_free(g_ptr_array_index(regions, i));
    }
    g_ptr_array_free(regions, true);
}

static void free_holdings(DedupHoldings *all)
{
    for (unsigned i = 0; i < all->table->len; i++) {
        DedupHolding *h = g_ptr_array_index(all->table, i);

        if (h) {
            dedup_segment_free(h->segment);
            g_free(h);
        }
    }
    g_ptr_array_free(all->table, true);
    g_hash_table_destroy(all->by_gid);
}

void dedup_space_free(DedupSpace *space)
{
    free_regions(space->regions);
    free_regions(space->dead);
    free_holdings(&space->holdings);
    dedup_spare_free(&space->spare);
    dedup_answers_clear(&space->answers);
    if (!space->reads_only) {
        dedup_quota_clear(&space->quota);
        dedup_ksm_close(space);
    }
    dedup_process_close(&space->process);
    dedup_freezer_close(&space->freezer);
    g_mutex_clear(&space->lock.mutex);
    g_mutex_clear(&space->lock.turn);
    g_free(space);
}

void dedup_space_tidy(DedupSpace *space)
{
    if (space->is_tidy) {
        return;
    }
    dedup_spare_free(&space->spare);
    for (unsigned i = 0; i < dedup_holding_count(space); i++) {
        const DedupHolding *h = dedup_holding_get(space, i);

        if (h) {
            dedup_segment_tidy(h->segment);
        }
    }
    space->is_tidy = true;
}

void dedup_space_set_scanner(DedupSpace *space, DedupSpacePause *pause)
{
    dedup_space_lock(space);
    space->lock.pause = pause;
    __atomic_store_n(&space->lock.scanner, g_thread_self(), __ATOMIC_RELAXED);
    dedup_space_unlock(space);
}

void dedup_space_set_exclusive(DedupSpace *space, DedupExclusiveFn *fn)
{
    space->exclusive.fn = fn;
}

bool dedup_space_holds_long(const DedupSpace *space)
{
    return dedup_exclusive_is_long(&space->exclusive);
}

void dedup_space_close(DedupSpace *space, bool closed, bool sealed)
{
    /* taking the lock waits for the window that may be open */
    dedup_space_lock(space);
    space->closed = closed;
    space->sealed = sealed;
    dedup_space_unlock(space);
}

bool dedup_space_is_closed(DedupSpace *space, bool *sealed)
{
    bool closed;

    dedup_space_lock(space);
    closed = space->closed || dedup_freezer_is_lost(&space->freezer);
    *sealed = space->sealed;
    dedup_space_unlock(space);
    return closed;
}

void dedup_space_reopen(DedupSpace *space)
{
    dedup_space_lock(space);
    dedup_freezer_reopen(&space->freezer);
    dedup_space_unlock(space);
}

bool dedup_space_lost_freezer(DedupSpace *space)
{
    return dedup_freezer_is_lost(&space->freezer);
}

bool dedup_space_has_pagemap(const DedupSpace *space)
{
    return space->process.pagemap_fd >= 0;
}

/* ---- regions ---- */

/* The lowest free range of member page numbers; UINT32_MAX if none. */
static uint32_t find_base(DedupSpace *space, uint32_t npages)
{
    uint64_t base = 0;

    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);

        if (base + npages > r->base &&
            base < (uint64_t)r->base + r->npages) {
            base = (uint64_t)r->base + r->npages;
            i = -1; /* look at all of them again */
        }
    }
    return base + npages <= 1ULL << DEDUP_MEMBER_PAGE_BITS ? base
                                                           : UINT32_MAX;
}

static bool is_valid(const DedupRegionInfo *info)
{
    return info->size &&
           !(((uintptr_t)info->host | info->size | info->fd_offset) &
             (DEDUP_PAGE_SIZE - 1)) &&
           info->size >> DEDUP_PAGE_SHIFT < 1ULL << DEDUP_MEMBER_PAGE_BITS;
}

DedupRegion *dedup_space_add(DedupSpace *space, const DedupRegionInfo *info,
                             void *memo, GDestroyNotify memo_free,
                             GError **error)
{
    DedupRegion *r;

    if (!is_valid(info)) {
        if (memo) {
            memo_free(memo);
        }
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "region '%s' is empty, not aligned or too large",
                    info->id);
        return NULL;
    }
    r = dedup_region_new(space, info, memo, memo_free);
    if (!r) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "no memory to describe region '%s'", info->id);
        return NULL;
    }
    dedup_space_lock(space);
    r->base = find_base(space, r->npages);
    if (r->base == UINT32_MAX) {
        dedup_space_unlock(space);
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "region '%s' is beyond the 4 TiB that one process can "
                    "have scanned", info->id);
        dedup_region_free(r);
        return NULL;
    }
    r->serial = space->regions_made++;
    g_ptr_array_add(space->regions, r);
    __atomic_fetch_add(&space->sums.total, r->npages, __ATOMIC_RELAXED);
    dedup_space_unlock(space);
    return r;
}

void dedup_space_close_region(DedupRegion *r, bool closed)
{
    dedup_space_lock(r->space);
    r->closing = closed;
    if (!closed) {
        r->abandoned = false;
    }
    dedup_space_unlock(r->space);
}

void dedup_space_abandon(DedupSpace *space, void *host)
{
    dedup_space_lock(space);
    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);

        r->abandoned |= r->host == host;
    }
    dedup_space_unlock(space);
}

/* Where huge pages were forbidden, on behalf of zero pages, they may be. */
static void allow_huge(DedupRegion *r)
{
    for (uint32_t i = 0; i < dedup_region_chunks(r); i++) {
        uint32_t page = i * DEDUP_CHUNK_PAGES;

        if (r->area[i] & DEDUP_AREA_NOHUGE) {
            sys_madvise(dedup_region_addr(r, page),
                        (size_t)MIN(DEDUP_CHUNK_PAGES, r->npages - page) <<
                        DEDUP_PAGE_SHIFT, MADV_HUGEPAGE);
        }
    }
}

static void take_off(uint64_t *sum, uint64_t n)
{
    __atomic_fetch_sub(sum, n, __ATOMIC_RELAXED);
}

void dedup_space_remove(DedupRegion *r)
{
    DedupSpace *space = r->space;

    dedup_space_lock(space);
    r->dead = true;
    allow_huge(r);
    g_ptr_array_remove(space->regions, r);
    take_off(&space->sums.total, r->npages);
    take_off(&space->sums.own, r->sums.own);
    take_off(&space->sums.merged, r->sums.merged);
    take_off(&space->sums.broken, r->sums.broken);
    take_off(&space->sums.zero, r->sums.zero);
    take_off(&space->sums.zero_mapped, r->sums.zero_mapped);
    g_ptr_array_add(space->dead, r);
    dedup_space_unlock(space);
}

/*
 * The pages of a region that is gone let go of their segments, a slice at a
 * time.  False: that was all.
 */
static bool forget_some(DedupRegion *r)
{
    uint32_t page = 0;

    for (unsigned n = 0; n < FORGET_PAGES; n++, page++) {
        page = dedup_ledger_next(r, page, r->npages);
        if (page == r->npages) {
            return false;
        }
        dedup_ledger_set(r, page, DEDUP_OWN);
    }
    return true;
}

/* A slice of what is dead; the lock is given up in between. */
static bool reap_some(DedupSpace *space)
{
    bool more;

    dedup_space_lock(space);
    more = space->dead->len > 0;
    if (more) {
        DedupRegion *r = g_ptr_array_index(space->dead, 0);

        if (!forget_some(r)) {
            g_ptr_array_remove_index_fast(space->dead, 0);
            dedup_region_free(r);
        }
    }
    dedup_space_unlock(space);
    return more;
}

bool dedup_space_reap(DedupSpace *space)
{
    bool any = false;

    while (reap_some(space)) {
        any = true;
    }
    return any;
}

DedupRegion *dedup_space_next(DedupSpace *space, uint32_t at)
{
    DedupRegion *r;

    dedup_space_lock(space);
    r = dedup_region_next(space, at);
    dedup_space_unlock(space);
    return r;
}

bool dedup_space_find(DedupSpace *space, uint32_t member_page,
                      DedupRegion **region, uint32_t *page)
{
    bool found;

    dedup_space_lock(space);
    found = dedup_region_find(space, member_page, region, page);
    dedup_space_unlock(space);
    return found;
}

/* ---- sums ---- */

static uint64_t live(const uint64_t *sum)
{
    return __atomic_load_n(sum, __ATOMIC_RELAXED);
}

void dedup_space_sums(DedupSpace *space, DedupSpaceSums *sums)
{
    const DedupSpaceSums *s = &space->sums;

    *sums = (DedupSpaceSums) {
        .total = live(&s->total),
        .own = live(&s->own),
        .merged = live(&s->merged),
        .broken = live(&s->broken),
        .zero = live(&s->zero),
        .zero_mapped = live(&s->zero_mapped),
        .cow_breaks = live(&s->cow_breaks),
    };
}

uint64_t dedup_space_mapped(DedupSpace *space)
{
    return live(&space->sums.merged) + live(&space->sums.broken) +
           live(&space->sums.zero_mapped);
}

uint64_t dedup_region_merged(const DedupRegion *r)
{
    return live(&r->sums.merged);
}

uint64_t dedup_space_window_max_ns(DedupSpace *space, bool reset)
{
    return reset ? __atomic_exchange_n(&space->bound.longest_ns, 0,
                                       __ATOMIC_RELAXED)
                 : __atomic_load_n(&space->bound.longest_ns, __ATOMIC_RELAXED);
}

uint64_t dedup_space_bytes(DedupSpace *space)
{
    uint64_t bytes = sizeof(*space) + dedup_zeroes_bytes(space) +
                     dedup_spare_size(&space->spare) +
                     dedup_answers_bytes(&space->answers);
    DedupRegion *r;
    uint32_t at = 0;

    while ((r = dedup_space_next(space, at))) {
        uint32_t chunks = dedup_region_chunks(r);

        /* without the lock: nobody but us, the scanner, frees a region */
        bytes += sizeof(*r) + dedup_array_resident(r->area, chunks) +
                 dedup_array_resident(r->chunk, chunks * sizeof(r->chunk[0])) +
                 dedup_array_resident(r->entry,
                                      r->npages * sizeof(r->entry[0]));
        at = r->base + r->npages;
    }
    /* a segment's struct, and the page table that its view has at times */
    return bytes + space->holdings.held *
           (sizeof(DedupHolding) + sizeof(DedupSegment) + DEDUP_PAGE_SIZE);
}
