/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Huge pages of private memory, of which pages are replaced.
 *
 * Runs under the remap lock.
 */

#include <sys/mman.h>

#include "host/sys.h"
#include "space/ledger.h"
#include "space/presence.h"
#include "space/split.h"

/* A huge page of x86-64: 2 MiB. */
#define HUGE_SHIFT 21

void dedup_huge_range(const DedupRegion *r, uint32_t page, uint32_t *first,
                      uint32_t *last)
{
    uintptr_t host = (uintptr_t)r->host;
    uintptr_t huge = (uintptr_t)dedup_region_addr(r, page) >> HUGE_SHIFT;
    uintptr_t start = MAX(huge << HUGE_SHIFT, host);
    uint64_t end = MIN((((huge + 1) << HUGE_SHIFT) - host) >>
                       DEDUP_PAGE_SHIFT, r->npages);

    *first = (start - host) >> DEDUP_PAGE_SHIFT;
    *last = end - 1;
}

/*
 * Splitting a huge page, Linux (6.12) finds its zero pages and maps its own
 * zero page there: they are dropped, and we did it.
 */
static void enter_split_zeroes(DedupRegion *r, uint32_t first, uint32_t last)
{
    uint8_t flags[DEDUP_CHUNK_PAGES];

    if (!dedup_presence(r, first, last - first + 1, flags)) {
        return;
    }
    for (uint32_t page = first; page <= last; page++) {
        if ((flags[page - first] & DEDUP_ZERO_MAPPED) &&
            dedup_entry_at(r, page) == DEDUP_OWN) {
            dedup_ledger_set(r, page, DEDUP_ZERO);
        }
    }
}

void dedup_forbid_huge(DedupRegion *r, DedupAction *const *actions,
                       unsigned n)
{
    if (r->info.memory != DEDUP_MEMORY_ANON ||
        !(r->info.flags & DEDUP_REGION_HUGEPAGE)) {
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        uint32_t chunk = actions[i]->page / DEDUP_CHUNK_PAGES;
        uint32_t first = chunk * DEDUP_CHUNK_PAGES;
        uint32_t len = MIN(DEDUP_CHUNK_PAGES, r->npages - first);

        if (!actions[i]->holding && !(r->area[chunk] & DEDUP_AREA_NOHUGE) &&
            sys_madvise(dedup_region_addr(r, first),
                        (size_t)len << DEDUP_PAGE_SHIFT,
                        MADV_NOHUGEPAGE) == 0) {
            r->area[chunk] |= DEDUP_AREA_NOHUGE;
        }
    }
}

/* MADV_COLD on one page of a huge page splits it, if all of it is not meant. */
static void split_at(DedupRegion *r, uint32_t page)
{
    sys_madvise(dedup_region_addr(r, page), DEDUP_PAGE_SIZE, MADV_COLD);
    r->area[page / DEDUP_CHUNK_PAGES] |= DEDUP_AREA_SPLIT;
}

void dedup_split_mapped(DedupRegion *r, uint32_t page)
{
    if (r->info.memory != DEDUP_MEMORY_SHARED && /* the punch splits those */
        !(r->area[page / DEDUP_CHUNK_PAGES] & DEDUP_AREA_SPLIT)) {
        split_at(r, page);
    }
}

void dedup_split_huge(DedupRegion *r, uint32_t page)
{
    uint32_t first, last, at;

    dedup_huge_range(r, page, &first, &last);
    for (at = first; at <= last && dedup_entry_at(r, at) != DEDUP_OWN; at++) {
        ;
    }
    if (at <= last) { /* else nothing is left */
        split_at(r, at);
        enter_split_zeroes(r, first, last);
    }
}
