/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Restoring on somebody's behalf: a range for its owner, what has settled,
 * what is mapped to holdings that are left.  Each takes the remap lock for one
 * window at a time, so that nobody waits long.
 */

#include "host/slice.h"
#include "space/holdings.h"
#include "space/ledger.h"
#include "space/need.h"
#include "space/presence.h"
#include "space/restore.h"

/*
 * A private page that is restored gets a mapping of its own, so settling
 * frees maps only if many go at once.
 */
#define SETTLE_PRIVATE 16

/*
 * The first region with a part in [host, end) that may not be its own; NULL:
 * none.
 */
static DedupRegion *next_region(DedupSpace *space, const DedupRestore *w,
                                uint32_t *first, uint32_t *n)
{
    DedupRegion *next = NULL;
    uint32_t f, k;

    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);

        if (dedup_region_mapped(r) + r->sums.zero &&
            dedup_region_intersect(r, w->at, w->end, &f, &k) &&
            (!next || r->host < next->host)) {
            next = r;
            *first = f;
            *n = k;
        }
    }
    return next;
}

bool dedup_space_restore_next(DedupSpace *space, DedupRestore *w)
{
    DedupRegion *r;
    uint32_t first, n;

    dedup_space_lock(space);
    r = next_region(space, w, &first, &n);
    if (r && w->for_owner && r->abandoned) {
        w->abandoned = true;
        r = NULL;
    }
    if (r) {
        uint64_t before = dedup_region_mapped(r);
        uint32_t end = first + n;

        first = dedup_ledger_next(r, first, end);
        n = MIN(end - first, DEDUP_RESTORE_PAGES);
        w->left += dedup_restore_locked(r, first, n);
        w->taken += (before - dedup_region_mapped(r)) << DEDUP_PAGE_SHIFT;
        w->lacks |= r->lacks;
        r->lacks = 0;
        w->at = dedup_region_addr(r, first + n);
    }
    dedup_space_unlock(space);
    return r != NULL;
}

void dedup_space_settle(DedupRegion *r, uint32_t first, uint32_t n)
{
    DedupSpace *space = r->space;
    bool broken;

    if (r->info.memory != DEDUP_MEMORY_SHARED && n < SETTLE_PRIVATE) {
        return;
    }
    dedup_slice_renew();
    dedup_space_lock(space);
    if (!r->dead && !space->closed && dedup_file_has_room(r)) {
        if (dedup_ledger_run(r, first, first + n, dedup_entry_is_broken,
                             &broken) == n && broken) {
            dedup_restore_locked(r, first, n);
        }
    }
    dedup_space_unlock(space);
}

/*
 * May pages of the region get their own memory?  In a closed one nothing
 * would be published anew: that would take memory, and never give any.
 */
static bool may_leave(DedupSpace *space, DedupRegion *r)
{
    return !space->closed && !r->closing && dedup_file_has_room(r);
}

void dedup_space_leave(DedupSpace *space, DedupLeaveFn is_leaving,
                       void *opaque)
{
    DedupRegion *r;
    uint32_t at = 0;

    do {
        uint32_t page, end;

        dedup_slice_renew();
        dedup_space_lock(space);
        r = dedup_region_next(space, at);
        page = r ? dedup_ledger_next(r, dedup_region_at(r, at), r->npages) : 0;
        end = r ? MIN(page + DEDUP_RESTORE_PAGES, r->npages) : 0;
        for (uint32_t i = page, j; i < end && may_leave(space, r); i = j) {
            for (j = i; j < end; j++) {
                uint32_t entry = dedup_entry_at(r, j);

                if (!dedup_entry_is_segment(entry) ||
                    !is_leaving(opaque, dedup_entry_holding(space, entry))) {
                    break;
                }
            }
            if (j > i) {
                dedup_restore_locked(r, i, j - i);
            }
            j += j == i;
        }
        at = r ? r->base + end : 0;
        dedup_space_unlock(space);
    } while (r);
}
