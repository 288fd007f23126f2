/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the scanner sees of a region: which pages are there, which were
 * written, what is in them.
 *
 * A look goes over part of a chunk under one taking of the remap lock.  The
 * ledger learns what the kernel did since the last one: which merged pages were
 * written (broken), which dropped ones are back.  Then whoever looks sees each
 * page that may be merged.  When a chunk is come to, all of it is asked for, so
 * that its sums are right even if the look ends within it.
 */

#include "space/holdings.h"
#include "space/ksm.h"
#include "space/ledger.h"
#include "space/poison.h"
#include "space/presence.h"
#include "space/punch.h"

void dedup_space_begin_batch(DedupSpace *space, bool split_huge,
                             bool take_ksm)
{
    dedup_forget_looks(&space->looks);
    space->ksm.take_chunks = take_ksm;
    __atomic_store_n(&space->split_huge, split_huge, __ATOMIC_RELAXED);
}

bool dedup_space_go_on(DedupSpace *space, DedupPlace *p, uint32_t at,
                       int64_t most)
{
    bool more = true;

    p->n = 0;
    p->skipped = 0;
    dedup_space_lock(space);
    p->region = dedup_region_next(space, at);
    if (p->region) {
        DedupRegion *r = p->region;

        p->first = dedup_region_at(r, at);
        if (!p->first || !r->prepared) {
            dedup_presence_prepare(r);
            p->is_void = true;
        }
        if (p->is_void && p->first % DEDUP_CHUNK_PAGES == 0) {
            uint32_t chunk = p->first / DEDUP_CHUNK_PAGES;

            more = dedup_skip_void(r, &p->first);
            p->skipped = (p->first + DEDUP_CHUNK_PAGES - 1) /
                         DEDUP_CHUNK_PAGES - chunk;
        }
        if (more) {
            p->n = MIN(DEDUP_CHUNK_PAGES - p->first % DEDUP_CHUNK_PAGES,
                       r->npages - p->first);
            /* a batch smaller than a chunk is honoured, by the page */
            p->n = MIN(p->n, MAX(most, 1));
        }
    }
    dedup_space_unlock(space);
    return p->region;
}

/* Beside what dedup_presence() says of a page that was merged or dropped: */
#define BREAKS (1 << 7)        /* that it was written is seen only now */
#define KEPT (1 << 6)          /* it still is */

/* What presence says about a page that is not the owner's own any more. */
static uint8_t sync_entry(DedupRegion *r, uint32_t page, uint8_t flags)
{
    uint32_t entry = dedup_entry_at(r, page);
    bool memory = flags & (DEDUP_PRESENT | DEDUP_SWAPPED);

    if (entry == DEDUP_OWN || !memory) {
        return flags | (entry == DEDUP_OWN ? 0 : KEPT);
    }
    if (entry == DEDUP_ZERO) {
        dedup_ledger_set(r, page, DEDUP_OWN);
        if (r->info.memory == DEDUP_MEMORY_SHARED) {
            dedup_punch_around(r, page, 1);
        }
        return flags | BREAKS;
    } else if (!(entry & DEDUP_BROKEN)) {
        dedup_ledger_set(r, page, entry | DEDUP_BROKEN);
        __atomic_fetch_add(&r->space->sums.cow_breaks, 1, __ATOMIC_RELAXED);
        return flags | BREAKS;
    }
    return flags;
}

/* The ledger learns what the kernel says. */
static bool sync_entries(DedupRegion *r, uint32_t first, uint32_t n,
                         uint8_t *flags)
{
    if (!dedup_presence(r, first, n, flags)) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        flags[i] = sync_entry(r, first + i, flags[i]);
    }
    return true;
}

static bool enter_chunk(DedupPlace *p, DedupSeen *seen, uint8_t *flags)
{
    DedupRegion *r = p->region;
    uint32_t n = MIN(DEDUP_CHUNK_PAGES, r->npages - p->first);
    uint32_t chunk = p->first / DEDUP_CHUNK_PAGES;
    uint32_t own = 0;
    uint8_t any = 0;

    if (!sync_entries(r, p->first, n, flags)) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        any |= flags[i];
        own += !!(flags[i] & DEDUP_PRESENT);
    }
    dedup_keep_look(&r->space->looks, r, p->first, flags);
    dedup_ledger_own(r, chunk, own);
    p->is_void = !(any & (DEDUP_PRESENT | DEDUP_SWAPPED)) &&
                 !r->chunk[chunk].mapped;
    if (p->is_void) {
        p->n = n; /* all of it was seen */
    }
    seen->is_empty = !own;
    r->area[chunk] &= ~DEDUP_AREA_SPLIT;
    if (r->space->ksm.take_chunks) {
        dedup_ksm_take_chunk(r, p->first);
    }
    return true;
}

static void see_pages(DedupPlace *p, const uint8_t *flags, DedupSeen *seen,
                      DedupSeeFn see, void *opaque)
{
    DedupRegion *r = p->region;
    bool split = __atomic_load_n(&r->space->split_huge, __ATOMIC_RELAXED);

    for (uint32_t i = 0; i < p->n; i++) {
        uint32_t page = p->first + i;

        seen->swapped += !!(flags[i] & DEDUP_SWAPPED);
        seen->kept += !!(flags[i] & KEPT);
        if (!(flags[i] & DEDUP_PRESENT)) {
            continue;
        }
        if (dedup_poison_has(r, page)) {
            seen->poisoned++;
        } else if (dedup_region_pinned(r, page)) {
            seen->pinned++;
        } else if ((flags[i] & DEDUP_HUGE) && !split) {
            seen->huge_kept++;
        } else if (!see(opaque, page, dedup_region_addr(r, page),
                        dedup_entry_at(r, page) != DEDUP_OWN,
                        flags[i] & BREAKS)) {
            dedup_poison_add(r, page);
            seen->poisoned++;
        }
    }
}

bool dedup_space_look(DedupSpace *space, DedupPlace *p, DedupSeen *seen,
                      DedupSeeFn see, void *opaque)
{
    DedupRegion *r = p->region;
    uint8_t flags[DEDUP_CHUNK_PAGES];
    bool ok;

    *seen = (DedupSeen) { 0 };
    dedup_space_lock(space);
    ok = !r->dead && !space->closed &&
         (p->first % DEDUP_CHUNK_PAGES == 0 ?
          enter_chunk(p, seen, flags) : sync_entries(r, p->first, p->n, flags));
    if (ok) {
        dedup_punch_late(r, p->first, p->n);
        see_pages(p, flags, seen, see, opaque);
    }
    dedup_space_unlock(space);
    return ok;
}

/* May a page be read, and is it worth merging? */
static bool is_readable(DedupRegion *r, uint32_t page)
{
    return !r->dead && dedup_entry_is_private(dedup_entry_at(r, page)) &&
           dedup_is_present(&r->space->looks, r, page);
}

bool dedup_space_equals(DedupRegion *r, uint32_t page, const void *content)
{
    bool equal;

    dedup_space_lock(r->space);
    equal = is_readable(r, page) &&
            dedup_page_equal(dedup_region_addr(r, page), content);
    dedup_space_unlock(r->space);
    return equal;
}

bool dedup_space_copy(DedupRegion *r, uint32_t page, void *copy)
{
    bool ok;

    dedup_space_lock(r->space);
    ok = is_readable(r, page) &&
         dedup_page_copy(copy, dedup_region_addr(r, page));
    dedup_space_unlock(r->space);
    return ok;
}

static DedupRelation relate(DedupRegion *r, uint32_t page, DedupRegion *r2,
                            uint32_t page2, void *copy, uint64_t salt,
                            uint64_t *hash)
{
    const uint8_t *other = dedup_region_addr(r2, page2);

    if (!is_readable(r, page) || !is_readable(r2, page2) ||
        !dedup_page_copy(copy, dedup_region_addr(r, page))) {
        return DEDUP_PAGES_GONE;
    }
    if (dedup_page_equal(copy, other)) {
        return DEDUP_PAGES_SAME;
    }
    *hash = dedup_page_hash(other, salt);
    return *hash != DEDUP_UNREADABLE ? DEDUP_PAGES_DIFFER : DEDUP_PAGES_GONE;
}

DedupRelation dedup_space_relate(DedupRegion *r, uint32_t page,
                                 DedupRegion *r2, uint32_t page2,
                                 void *copy, uint64_t salt, uint64_t *hash,
                                 DedupHolding **holding, uint16_t *index)
{
    DedupRelation relation;
    uint32_t entry;

    dedup_space_lock(r->space);
    entry = r2->dead ? DEDUP_OWN : dedup_entry_at(r2, page2);
    if (dedup_entry_is_segment(entry) && !dedup_entry_is_broken(entry)) {
        *holding = dedup_entry_holding(r->space, entry);
        *index = dedup_entry_page(entry);
        relation = DEDUP_PAGES_MERGED;
    } else {
        relation = relate(r, page, r2, page2, copy, salt, hash);
    }
    dedup_space_unlock(r->space);
    return relation;
}
