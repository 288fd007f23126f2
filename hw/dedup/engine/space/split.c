/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Huge pages of private memory, split before pages of them are replaced.
 *
 * Runs under the remap lock.
 */

#include <sys/mman.h>

#include "space/ledger.h"
#include "space/presence.h"
#include "space/split.h"

/* A huge page of x86-64: 2 MiB. */
#define HUGE_SHIFT 21

/*
 * Splitting a huge page, Linux (6.12) finds its zero pages and maps its own
 * zero page there: they are dropped, and we did it.
 */
static void enter_split_zeroes(DedupRegion *r, uintptr_t huge)
{
    uintptr_t host = (uintptr_t)r->host;
    uintptr_t start = MAX(huge << HUGE_SHIFT, host);
    uint64_t first = (start - host) >> DEDUP_PAGE_SHIFT;
    uint64_t end = MIN((((huge + 1) << HUGE_SHIFT) - host) >>
                       DEDUP_PAGE_SHIFT, r->npages);
    uint8_t flags[DEDUP_CHUNK_PAGES];

    if (!dedup_presence(r, first, end - first, flags)) {
        return;
    }
    for (uint32_t i = 0; i < end - first; i++) {
        if ((flags[i] & DEDUP_ZERO_MAPPED) &&
            dedup_entry_at(r, first + i) == DEDUP_OWN) {
            dedup_ledger_set(r, first + i, DEDUP_ZERO);
        }
    }
}

/*
 * Replacing part of a huge page frees nothing.  MADV_COLD on one page of it
 * splits it.  Own pages that were dropped must not be brought back by
 * khugepaged either.
 */
bool dedup_split_huge(DedupRegion *r, DedupAction *const *actions, unsigned n,
                      uint32_t first, const uint8_t *flags)
{
    uintptr_t last = 0;

    if (r->info.memory == DEDUP_MEMORY_SHARED) {
        return false; /* the punch splits those */
    }
    for (unsigned i = 0; i < n; i++) {
        const DedupAction *a = actions[i];
        uint8_t *area = &r->area[a->page / DEDUP_CHUNK_PAGES];
        uint8_t *addr = dedup_region_addr(r, a->page);
        bool is_huge = flags[a->page - first] & DEDUP_HUGE;

        if ((is_huge && (uintptr_t)addr >> HUGE_SHIFT != last) ||
            !(*area & DEDUP_AREA_SPLIT)) {
            /* also reaches a huge page that is mapped page by page */
            madvise(addr, DEDUP_PAGE_SIZE, MADV_COLD);
            *area |= DEDUP_AREA_SPLIT;
            if (is_huge) {
                enter_split_zeroes(r, (uintptr_t)addr >> HUGE_SHIFT);
            }
        }
        if (is_huge) {
            last = (uintptr_t)addr >> HUGE_SHIFT;
        }
        if (!a->holding && r->info.memory == DEDUP_MEMORY_ANON &&
            (r->info.flags & DEDUP_REGION_HUGEPAGE) &&
            !(*area & DEDUP_AREA_NOHUGE)) {
            uint32_t chunk = a->page / DEDUP_CHUNK_PAGES * DEDUP_CHUNK_PAGES;
            uint32_t len = MIN(DEDUP_CHUNK_PAGES, r->npages - chunk);

            if (madvise(dedup_region_addr(r, chunk),
                        (size_t)len << DEDUP_PAGE_SHIFT,
                        MADV_NOHUGEPAGE) == 0) {
                *area |= DEDUP_AREA_NOHUGE;
            }
        }
    }
    return last;
}
