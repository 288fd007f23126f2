/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the owner asks of regions and ranges, on his own thread; a request for
 * everything is unmerge.c's.
 *
 * What restoring takes is reserved first (scan/room.h), so that an owner who
 * asks for too much gets an error and nothing has changed.  Then it goes
 * window by window, one taking of the remap lock each, and looks at the room
 * on the way: if that runs short, what was restored by then stays restored.
 */

#include "engine-internal.h"

/* ---- ranges ---- */

bool dedup_engine_restore_range(DedupEngine *e, void *host, uint64_t size,
                                GError **error)
{
    DedupRestore w = {
        .at = host, .end = (const uint8_t *)host + size, .for_owner = true,
    };
    DedupReservation reserved = { 0 };
    uint64_t step = 0;
    DedupNeed need;
    bool ok;

    dedup_space_need(e->space, w.at, w.end, &need);
    ok = dedup_reserve(&e->room, &reserved, &need, false, error);
    while (ok) {
        if (w.taken >= step) {
            dedup_space_need(e->space, w.at, w.end, &need);
            step = dedup_reserve_next(&e->room, &reserved, &need, false,
                                      error);
            w.taken = 0;
            ok = step > 0;
        }
        if (ok && !dedup_space_restore_next(e->space, &w)) {
            break;
        }
    }
    dedup_unreserve(&e->room, &reserved);
    if (ok && w.abandoned) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_STATE,
                    "the restore was cancelled");
    } else if (ok && w.left) {
        dedup_restore_error(w.left, w.lacks, error);
    }
    return ok && !w.abandoned && !w.left;
}

bool dedup_engine_check_room(DedupEngine *e, DedupRegion *const *regions,
                             unsigned n, GError **error)
{
    DedupReservation reserved = { 0 };
    DedupNeed need;
    bool ok;

    dedup_space_need_regions(e->space, regions, n, &need);
    ok = dedup_reserve(&e->room, &reserved, &need, false, error);
    dedup_unreserve(&e->room, &reserved);
    return ok;
}

bool dedup_engine_discard_begin(DedupEngine *e, void *host, uint64_t size)
{
    return dedup_space_discard_begin(e->space, host, size);
}

void dedup_engine_discard_end(DedupEngine *e)
{
    dedup_space_discard_end(e->space);
}

/* ---- regions ---- */

DedupRegion *dedup_region_add(DedupEngine *e, const DedupRegionInfo *info,
                              GError **error)
{
    uint64_t npages = info->size >> DEDUP_PAGE_SHIFT;
    DedupMemo *memo = NULL;
    DedupRegion *r;

    /* what has none, or too many to count, the space refuses */
    if (npages && npages <= UINT32_MAX) {
        memo = dedup_memo_new(npages);
        if (!memo) {
            g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                        "no memory to describe region '%s'", info->id);
            return NULL;
        }
    }
    r = dedup_space_add(e->space, info, memo, dedup_memo_free, error);
    if (r) {
        dedup_pace_hurry(&e->pace);
        dedup_control_kick(&e->control);
    }
    return r;
}

bool dedup_region_remove(DedupRegion *r, bool keep_contents, GError **error)
{
    DedupEngine *e = dedup_region_owner(r);

    /* or the scanner merges behind the restore's back */
    dedup_space_close_region(r, true);
    if (keep_contents &&
        !dedup_engine_restore_range(e, dedup_region_host(r),
                                    (uint64_t)dedup_region_npages(r) <<
                                    DEDUP_PAGE_SHIFT, error)) {
        return false; /* and stays closed: its owner wants it back */
    }
    dedup_space_remove(r);
    dedup_control_kick(&e->control); /* who is at rest frees it, too */
    return true;
}

void dedup_region_open(DedupRegion *r)
{
    DedupEngine *e = dedup_region_owner(r);

    dedup_space_close_region(r, false);
    dedup_control_kick(&e->control);
}

void dedup_engine_cancel_restore(DedupEngine *e, void *host)
{
    dedup_space_abandon(e->space, host);
}

uint64_t dedup_region_pages_merged(DedupRegion *r)
{
    return dedup_region_merged(r);
}
