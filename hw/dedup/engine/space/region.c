/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Regions: the RAM that the engine's owner handed over, and what may happen
 * to it from outside while the scanner works: removal and discards.
 *
 * A removed region is dead at once: nobody reads or maps its memory after
 * dedup_region_remove() returns, and it is in no sum any more.  Its struct
 * lives on until the scanner, which may remember it between two takings of
 * the remap lock, has let go, and has let its pages go of their segments: who
 * removes it need not wait for that.  At the end of the process nobody does.
 *
 * Each region has arrays that are populated by the kernel as they are touched:
 * the ledger (4 bytes a page, touched only around merged pages, see
 * dedup_entry_at()), the fingerprints (2 bytes a page), and sums and flags per
 * 2 MiB.
 */

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "internal.h"
#include "zeroes.h"

/* Pages that are let go of under one taking of the lock. */
#define FORGET_PAGES 4096

static void *array_new(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED) {
        return NULL;
    }
    /* a huge page here would cost what we are about to save */
    madvise(p, size, MADV_NOHUGEPAGE);
    madvise(p, size, MADV_DONTDUMP);
    return p;
}

static void region_free(DedupRegion *r)
{
    if (r->entry) {
        munmap(r->entry, (size_t)r->npages * sizeof(r->entry[0]));
    }
    if (r->sums) {
        munmap(r->sums, dedup_region_chunks(r) * sizeof(r->sums[0]));
    }
    if (r->fingerprint) {
        munmap(r->fingerprint, (size_t)r->npages * sizeof(r->fingerprint[0]));
    }
    if (r->area) {
        munmap(r->area, dedup_region_chunks(r));
    }
    g_free(r->id);
    g_free(r);
}

/* The lowest free range of member page numbers; UINT32_MAX if none. */
static uint32_t find_base(DedupEngine *e, uint32_t npages)
{
    uint64_t base = 0;

    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        if (base + npages > r->base &&
            base < (uint64_t)r->base + r->npages) {
            base = (uint64_t)r->base + r->npages;
            i = -1; /* look at all of them again */
        }
    }
    return base + npages <= 1ULL << DEDUP_MEMBER_PAGE_BITS ? base
                                                           : UINT32_MAX;
}

DedupRegion *dedup_region_add(DedupEngine *e, const DedupRegionInfo *info,
                              GError **error)
{
    DedupRegion *r;

    if (!info->size || ((uintptr_t)info->host | info->size |
                        info->fd_offset) & (DEDUP_PAGE_SIZE - 1) ||
        info->size >> DEDUP_PAGE_SHIFT >= 1ULL << DEDUP_MEMBER_PAGE_BITS) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "region '%s' is empty, not aligned or too large",
                    info->id);
        return NULL;
    }
    r = g_new0(DedupRegion, 1);
    r->engine = e;
    r->id = g_strdup(info->id);
    r->host = info->host;
    r->npages = info->size >> DEDUP_PAGE_SHIFT;
    r->memory = info->memory;
    r->fd = info->fd;
    r->fd_offset = info->fd_offset;
    r->pins = info->pins;
    r->readers = info->readers;
    r->flags = info->flags;
    r->bounded = r->memory == DEDUP_MEMORY_SHARED &&
                 dedup_file_is_bounded(r->fd, &r->dev) &&
                 !DEDUP_MUTANT(PUNCH_ZEROES);
    r->entry = array_new((size_t)r->npages * sizeof(r->entry[0]));
    r->sums = array_new(dedup_region_chunks(r) * sizeof(r->sums[0]));
    r->fingerprint = array_new((size_t)r->npages *
                               sizeof(r->fingerprint[0]));
    r->area = array_new(dedup_region_chunks(r));
    if (!r->entry || !r->sums || !r->fingerprint || !r->area) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "no memory to describe region '%s'", info->id);
        region_free(r);
        return NULL;
    }

    dedup_lock(e);
    r->base = find_base(e, r->npages);
    if (r->base == UINT32_MAX) {
        dedup_unlock(e);
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "region '%s' is beyond the 4 TiB that one process can "
                    "have scanned", info->id);
        region_free(r);
        return NULL;
    }
    r->serial = e->regions_made++;
    g_ptr_array_add(e->regions, r);
    __atomic_fetch_add(&e->pages_total, r->npages, __ATOMIC_RELAXED);
    dedup_unlock(e);
    dedup_kick(e);
    return r;
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

/* Where huge pages were forbidden, on behalf of zero pages, they may be. */
static void allow_huge(DedupRegion *r)
{
    for (uint32_t i = 0; i < dedup_region_chunks(r); i++) {
        uint32_t page = i * DEDUP_CHUNK_PAGES;

        if (r->area[i] & DEDUP_AREA_NOHUGE) {
            madvise(dedup_region_addr(r, page),
                    (size_t)MIN(DEDUP_CHUNK_PAGES, r->npages - page) <<
                    DEDUP_PAGE_SHIFT, MADV_HUGEPAGE);
        }
    }
}

bool dedup_region_remove(DedupRegion *r, bool keep_contents, GError **error)
{
    DedupEngine *e = r->engine;
    size_t size = (size_t)r->npages << DEDUP_PAGE_SHIFT;

    dedup_lock(e);
    r->closing = true; /* or the scanner merges behind the restore's back */
    dedup_unlock(e);
    if (keep_contents &&
        !dedup_engine_restore_range(e, r->host, size, error)) {
        return false; /* and stays closed: its owner wants it back */
    }
    dedup_lock(e);
    r->dead = true;
    allow_huge(r);
    g_ptr_array_remove(e->regions, r);
    __atomic_fetch_sub(&e->pages_total, r->npages, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&e->own_present, r->own, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&e->merged, r->merged, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&e->broken, r->broken, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&e->zero, r->zero, __ATOMIC_RELAXED);
    __atomic_fetch_sub(&e->zero_mapped, r->zero_mapped, __ATOMIC_RELAXED);
    g_ptr_array_add(e->dead, r);
    dedup_unlock(e);
    dedup_kick(e); /* who is at rest frees it, too */
    return true;
}

void dedup_region_open(DedupRegion *r)
{
    dedup_lock(r->engine);
    r->closing = false;
    r->abandoned = false;
    dedup_unlock(r->engine);
    dedup_kick(r->engine);
}

/* Nothing has its own memory around a chunk: no fingerprint is needed. */
static void forget_prints(DedupRegion *r, uint32_t chunk)
{
    const uint32_t per_page = DEDUP_PAGE_SIZE / sizeof(r->fingerprint[0]);
    const uint32_t chunks = per_page / DEDUP_CHUNK_PAGES;
    uint32_t first = chunk - chunk % chunks;
    uint32_t end = MIN(first + chunks, dedup_region_chunks(r));

    for (uint32_t c = first; c < end; c++) {
        if (r->sums[c].own) {
            return;
        }
    }
    for (uint32_t c = first; c < end; c++) {
        r->prints -= !!(r->area[c] & DEDUP_AREA_PRINTS);
        r->area[c] &= ~DEDUP_AREA_PRINTS;
    }
    /* a stale one makes a page look stable, no more */
    madvise(r->fingerprint + (size_t)first * DEDUP_CHUNK_PAGES,
            DEDUP_PAGE_SIZE, MADV_DONTNEED);
}

void dedup_region_forget(DedupRegion *r, uint32_t first, uint32_t last)
{
    for (uint32_t c = first; (r->own || r->prints) && c < last; c++) {
        dedup_ledger_own(r, c, 0);
        if (r->area[c] & DEDUP_AREA_PRINTS) {
            forget_prints(r, c);
        }
    }
}

/* A slice of what is dead; the lock is given up in between. */
static bool reap_some(DedupEngine *e)
{
    bool more;

    dedup_lock(e);
    more = e->dead->len > 0;
    if (more) {
        DedupRegion *r = g_ptr_array_index(e->dead, 0);

        if (!forget_some(r)) {
            g_ptr_array_remove_index_fast(e->dead, 0);
            region_free(r);
        }
    }
    dedup_unlock(e);
    return more;
}

bool dedup_regions_reap(DedupEngine *e)
{
    bool any = false;

    while (reap_some(e)) {
        any = true;
    }
    return any;
}

static void free_all(GPtrArray *regions)
{
    for (unsigned i = 0; i < regions->len; i++) {
        region_free(g_ptr_array_index(regions, i));
    }
    g_ptr_array_free(regions, true);
}

void dedup_regions_free(DedupEngine *e)
{
    free_all(e->regions);
    free_all(e->dead);
}

void dedup_engine_cancel_restore(DedupEngine *e, void *host)
{
    dedup_lock(e);
    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        r->abandoned |= r->host == host;
    }
    dedup_unlock(e);
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
    return is_raised(r->pins, page);
}

bool dedup_region_held(const DedupRegion *r, uint32_t page)
{
    return is_raised(r->pins, page) ||
           (r->memory == DEDUP_MEMORY_SHARED && is_raised(r->readers, page));
}

bool dedup_region_find(DedupEngine *e, uint32_t member_page,
                       DedupRegion **region, uint32_t *page)
{
    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        if (member_page >= r->base && member_page - r->base < r->npages) {
            *region = r;
            *page = member_page - r->base;
            return true;
        }
    }
    return false;
}

DedupRegion *dedup_region_next(DedupEngine *e, uint32_t at)
{
    DedupRegion *next = NULL;

    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        if (r->base + r->npages > at && (!next || r->base < next->base)) {
            next = r;
        }
    }
    return next;
}

void dedup_region_reapply(const DedupRegion *r, uint32_t page, uint32_t n)
{
    void *addr = dedup_region_addr(r, page);
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;

    if (DEDUP_MUTANT(NO_MADVISE)) {
        return;
    }
    /* they fail for want of maps only where they would split one */
    if (r->flags & DEDUP_REGION_DONTFORK) {
        madvise(addr, len, MADV_DONTFORK);
    }
    if (r->flags & DEDUP_REGION_DONTDUMP) {
        madvise(addr, len, MADV_DONTDUMP);
    }
}

bool dedup_region_map_own(DedupRegion *r, uint32_t page, uint32_t n)
{
    uint8_t *addr = dedup_region_addr(r, page);
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    int flags = MAP_FIXED |
                (r->flags & DEDUP_REGION_NORESERVE ? MAP_NORESERVE : 0);
    off_t offset = 0;

    switch (r->memory) {
    case DEDUP_MEMORY_SHARED:
        flags |= MAP_SHARED;
        offset = dedup_region_file_offset(r, page);
        break;
    case DEDUP_MEMORY_ANON:
        flags |= MAP_PRIVATE | MAP_ANONYMOUS;
        break;
    case DEDUP_MEMORY_PRIVATE_FILE:
        flags |= MAP_PRIVATE;
        offset = dedup_region_file_offset(r, page);
        break;
    }
    if (mmap(addr, len, PROT_READ | PROT_WRITE, flags, r->fd, offset) ==
        MAP_FAILED) {
        return false;
    }
    if (r->flags & DEDUP_REGION_HUGEPAGE) {
        /* advice only; its lack costs speed and a mapping */
        for (uint32_t i = page, next; i < page + n; i = next) {
            bool nohuge = r->area[i / DEDUP_CHUNK_PAGES] & DEDUP_AREA_NOHUGE;

            next = MIN((i / DEDUP_CHUNK_PAGES + 1) * DEDUP_CHUNK_PAGES,
                       page + n);
            madvise(dedup_region_addr(r, i),
                    (size_t)(next - i) << DEDUP_PAGE_SHIFT,
                    nohuge ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
        }
    }
    dedup_region_reapply(r, page, n);
    return true;
}

/* The part of a region that lies in [host, host + size). */
static bool intersect(const DedupRegion *r, const uint8_t *host,
                      uint64_t size, uint32_t *first, uint32_t *n)
{
    const uint8_t *start = MAX(host, r->host);
    const uint8_t *end = MIN(host + size, r->host + ((uint64_t)r->npages <<
                                                     DEDUP_PAGE_SHIFT));

    if (start >= end) {
        return false;
    }
    *first = (start - r->host) >> DEDUP_PAGE_SHIFT;
    *n = ((end - r->host + DEDUP_PAGE_SIZE - 1) >> DEDUP_PAGE_SHIFT) - *first;
    return true;
}

static bool discard_locked(DedupRegion *r, uint32_t first, uint32_t n)
{
    uint32_t end = first + n;

    for (uint32_t i = dedup_ledger_next(r, first, end), j; i < end;
         i = dedup_ledger_next(r, j, end)) {
        uint32_t entry = dedup_entry_at(r, i);
        bool mapped = dedup_entry_is_segment(entry) ||
                      (entry == DEDUP_ZERO &&
                       r->memory == DEDUP_MEMORY_PRIVATE_FILE);

        j = i + 1;
        if (entry == DEDUP_ZERO && !mapped) {
            dedup_ledger_absent(r, i);
        }
        if (!mapped) {
            continue;
        }
        while (j < end && dedup_entry_is_segment(dedup_entry_at(r, j))) {
            j++;
        }
        if (!dedup_region_map_own(r, i, j - i)) {
            return false;
        }
        for (uint32_t k = i; k < j; k++) {
            dedup_ledger_absent(r, k);
        }
    }
    return true;
}

/* Own pages lose what they have: from now on it is owed to the guest. */
static void forget_own(DedupRegion *r, uint32_t first, uint32_t end)
{
    uint8_t flags[DEDUP_CHUNK_PAGES];
    uint32_t n;

    for (; first < end; first += n) {
        bool known;

        n = 0;
        if (end - first >= DEDUP_CHUNK_PAGES &&
            first % DEDUP_CHUNK_PAGES == 0 && !dedup_skip_void(r, &first)) {
            continue;
        }
        if (first >= end) {
            break;
        }
        n = MIN(end - first, DEDUP_CHUNK_PAGES - first % DEDUP_CHUNK_PAGES);
        known = dedup_presence(r, first, n, flags);
        for (uint32_t i = 0; i < n; i++) {
            if ((!known || (flags[i] & DEDUP_PRESENT)) &&
                dedup_entry_at(r, first + i) == DEDUP_OWN) {
                dedup_ledger_absent(r, first + i);
            }
        }
    }
}

bool dedup_engine_discard_begin(DedupEngine *e, void *host, uint64_t size)
{
    bool ok = true;

    dedup_lock(e);
    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);
        uint32_t first, n;

        if (intersect(r, host, size, &first, &n)) {
            forget_own(r, first, first + n);
            ok &= discard_locked(r, first, n);
        }
    }
    if (!ok) {
        dedup_unlock(e);
    }
    return ok;
}

void dedup_engine_discard_end(DedupEngine *e)
{
    dedup_unlock(e);
}

uint64_t dedup_region_pages_merged(DedupRegion *r)
{
    return __atomic_load_n(&r->merged, __ATOMIC_RELAXED);
}
