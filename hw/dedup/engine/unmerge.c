/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A request to restore everything: dedup_engine_restore().
 *
 * It is a walk over all regions on the scanner's thread, one window
 * (restore.c) per taking of the remap lock, so that nobody waits long.  It
 * reserves what it takes (room.h), looks at the room as it goes and stops when
 * that runs short; it goes round again for pages that were pinned.
 *
 * The request, and what it has reserved, is guarded by the control lock: a
 * new one may take its place at any time.
 */

#include "internal.h"

/* Windows in one step, after which the scanner looks for other requests. */
#define STEP_WINDOWS 256
/* Pause after a round that left pages, and when to give up without progress. */
#define ROUND_US 20000
#define GIVE_UP_US (3 * G_TIME_SPAN_SECOND)

/* What restoring all that is merged takes. */
static void need_all(DedupEngine *e, DedupNeed *need)
{
    *need = (DedupNeed) { 0 };
    dedup_lock(e);
    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        dedup_need_add(need, r, r->npages);
    }
    dedup_unlock(e);
}

bool dedup_engine_restore(DedupEngine *e, bool unmerge, bool force,
                          GError **error)
{
    DedupNeed need;
    bool ok;

    need_all(e, &need);
    g_mutex_lock(&e->control);
    /* a request that is under way keeps what it reserved, if this fails */
    ok = dedup_reserve(e, &e->restore_reserved, &need, force, error);
    if (ok) {
        if (unmerge) {
            e->params.run = false;
        }
        e->restoring = true;
        e->restore_fresh = true;
        e->restore_force = force;
    }
    g_mutex_unlock(&e->control);
    if (ok) {
        dedup_kick(e);
    }
    return ok;
}

/* The region at or behind the cursor, or NULL; remap lock held. */
static DedupRegion *region_at(DedupEngine *e, uint64_t at)
{
    DedupRegion *next = NULL;

    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        if (at < (uint64_t)r->base + r->npages &&
            r->merged + r->broken + r->zero + r->zero_mapped &&
            (!next || r->base < next->base)) {
            next = r;
        }
    }
    return next;
}

/*
 * Restore up to one window from the cursor on.  *@taken: bytes that this took.
 * False: end of all regions.
 */
static bool restore_next(DedupEngine *e, uint64_t *taken)
{
    DedupRegion *r;

    dedup_lock(e);
    r = region_at(e, e->restore_at);
    if (r) {
        uint32_t page = dedup_ledger_next(r, dedup_region_at(r, e->restore_at),
                                          r->npages);
        unsigned n = MIN(DEDUP_WINDOW_PAGES, r->npages - page);
        uint64_t before = dedup_region_mapped(r);

        dedup_restore_locked(r, page, n);
        *taken = (before - dedup_region_mapped(r)) << DEDUP_PAGE_SHIFT;
        e->restore_lacks |= r->lacks;
        r->lacks = 0;
        e->restore_at = (uint64_t)r->base + page + n;
    }
    dedup_unlock(e);
    return r != NULL;
}

/*
 * The request has ended, unless it was replaced by another one meanwhile (or
 * cancelled): then nothing of ours is left to end.
 */
static void restore_end(DedupEngine *e, uint64_t left, GError *error)
{
    bool ours;

    g_mutex_lock(&e->control);
    ours = e->restoring && !e->restore_fresh;
    if (ours) {
        e->restoring = false;
        dedup_unreserve(e, &e->restore_reserved);
    }
    g_mutex_unlock(&e->control);
    if (ours) {
        dedup_policy_drop_unused(e); /* no pass will come by */
        dedup_update_state(e);
        if (e->callbacks.restored) {
            /* it may have run short when the guest gave the rest away */
            e->callbacks.restored(e->opaque, left, left ? error : NULL);
        }
    }
    g_clear_error(&error);
}

/* Pages whose mappings are not the region's own, by the ledger. */
static uint64_t pages_left(DedupEngine *e)
{
    return __atomic_load_n(&e->merged, __ATOMIC_RELAXED) +
           __atomic_load_n(&e->broken, __ATOMIC_RELAXED) +
           __atomic_load_n(&e->zero_mapped, __ATOMIC_RELAXED);
}

/* One round is over.  Returns false when the request has ended. */
static bool round_end(DedupEngine *e)
{
    int64_t now = g_get_monotonic_time();
    uint64_t left = pages_left(e);
    unsigned lacks = e->restore_lacks;
    GError *error = NULL;

    e->restore_at = 0;
    e->restore_lacks = 0;
    if (!left) {
        restore_end(e, 0, NULL);
        return false;
    }
    if (left < e->restore_last) {
        e->restore_moved_us = now;
    }
    e->restore_last = left;
    if (now - e->restore_moved_us < GIVE_UP_US) {
        /* pins go when their I/O ends; nobody tells us */
        dedup_wait(e, ROUND_US);
        return true;
    }
    dedup_restore_error(left, lacks, &error);
    restore_end(e, left, error);
    return false;
}

/*
 * How much may be taken in this step?  0 and @error: there is no room any
 * more.
 */
static uint64_t look_at_room(DedupEngine *e, GError **error)
{
    uint64_t step = 1; /* of a request that was replaced: it begins anew */
    DedupNeed rest;

    need_all(e, &rest);
    g_mutex_lock(&e->control);
    if (e->restoring && !e->restore_fresh) {
        step = dedup_reserve_next(e, &e->restore_reserved, &rest,
                                  e->restore_force, error);
    }
    g_mutex_unlock(&e->control);
    return step;
}

bool dedup_restore_step(DedupEngine *e)
{
    GError *error = NULL;
    uint64_t step = look_at_room(e, &error);
    uint64_t all = 0, taken = 0;

    if (!step) {
        restore_end(e, pages_left(e), error);
        return false;
    }
    for (unsigned i = 0; i < STEP_WINDOWS && all < step; i++) {
        if (!restore_next(e, &taken)) {
            return round_end(e);
        }
        all += taken;
    }
    dedup_stats_batch(e);
    return true;
}
