/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A request to restore everything: dedup_engine_restore().
 *
 * It is a walk over all regions on the scanner's thread, one window
 * (restore.c) per taking of the remap lock, so that nobody waits long.  It
 * looks at the host's memory as it goes and stops when that runs short; it
 * goes round again for pages that were pinned.
 *
 * Members of a group reserve what they are about to use, each in its slot of
 * the group's file, so that no two count on the same memory.
 */

#include "internal.h"

/* Windows between two looks at the host's memory: 64 MiB. */
#define WINDOWS_PER_CHECK 256
#define STEP_BYTES \
    ((uint64_t)WINDOWS_PER_CHECK * DEDUP_WINDOW_PAGES * DEDUP_PAGE_SIZE)
/* Pause after a round that left pages, and when to give up without progress. */
#define ROUND_US 20000
#define GIVE_UP_US (3 * G_TIME_SPAN_SECOND)

/* Bytes that restoring all would add: broken pages have their memory. */
static uint64_t bytes_needed(DedupEngine *e)
{
    uint64_t pages = 0;

    dedup_lock(e);
    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        pages += r->merged;
    }
    dedup_unlock(e);
    return pages << DEDUP_PAGE_SHIFT;
}

static void reserve(DedupEngine *e, uint64_t bytes)
{
    __atomic_store_n(&e->reserved_bytes, bytes, __ATOMIC_RELAXED);
    dedup_stats_publish(e);
}

static void set_memory_error(GError **error, uint64_t needed,
                             uint64_t available)
{
    g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY,
                "giving every merged page its own memory takes %"
                G_GUINT64_FORMAT " MiB, but the host or the memory cgroup "
                "has only %" G_GUINT64_FORMAT " MiB to spare",
                (needed + (1 << 20) - 1) >> 20, available >> 20);
}

bool dedup_restore_begin(DedupEngine *e, bool force, GError **error)
{
    uint64_t before = __atomic_load_n(&e->reserved_bytes, __ATOMIC_RELAXED);
    uint64_t needed = bytes_needed(e);
    uint64_t available;

    /* reserve first, then look: two members that ask at once see each other */
    reserve(e, needed);
    available = dedup_restore_room(e);
    if (!force && needed > available) {
        /* a request that is under way keeps what it reserved */
        g_mutex_lock(&e->control);
        __atomic_store_n(&e->reserved_bytes, e->restoring ? before : 0,
                         __ATOMIC_RELAXED);
        g_mutex_unlock(&e->control);
        dedup_stats_publish(e);
        set_memory_error(error, needed, available);
        return false;
    }
    return true;
}

/* Restore up to one window from the cursor on; false: end of all regions. */
static bool restore_next(DedupEngine *e)
{
    bool more = false;

    dedup_lock(e);
    while (e->restore_region < e->regions->len) {
        DedupRegion *r = g_ptr_array_index(e->regions, e->restore_region);
        uint32_t page = e->restore_page;
        unsigned n;

        if (!(r->merged + r->broken + r->zero) || page >= r->npages) {
            e->restore_region++;
            e->restore_page = 0;
            continue;
        }
        n = MIN(DEDUP_WINDOW_PAGES, r->npages - page);
        dedup_restore_locked(r, page, n);
        e->restore_page = page + n;
        more = true;
        break;
    }
    dedup_unlock(e);
    return more;
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
        __atomic_store_n(&e->reserved_bytes, 0, __ATOMIC_RELAXED);
    }
    g_mutex_unlock(&e->control);
    if (ours) {
        if (__atomic_load_n(&e->joined, __ATOMIC_ACQUIRE)) {
            dedup_policy_drop_unused(e); /* no pass will come by */
        }
        dedup_update_state(e);
        if (e->callbacks.restored) {
            e->callbacks.restored(e->opaque, left, error);
        }
    }
    g_clear_error(&error);
}

/* Pages whose mappings are not the region's own, by the ledger. */
static uint64_t pages_left(DedupEngine *e)
{
    return __atomic_load_n(&e->merged, __ATOMIC_RELAXED) +
           __atomic_load_n(&e->broken, __ATOMIC_RELAXED);
}

/* One round is over.  Returns false when the request has ended. */
static bool round_end(DedupEngine *e)
{
    int64_t now = g_get_monotonic_time();
    uint64_t left = pages_left(e);
    GError *error = NULL;

    e->restore_region = 0;
    e->restore_page = 0;
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
    g_set_error(&error, DEDUP_ERROR, DEDUP_ERROR_STATE,
                "%" G_GUINT64_FORMAT " pages cannot be restored: a device "
                "writes to them, or the process is at its limit of mappings",
                left);
    restore_end(e, left, error);
    return false;
}

bool dedup_restore_step(DedupEngine *e)
{
    GError *error = NULL;
    uint64_t needed, available;

    for (unsigned i = 0; i < WINDOWS_PER_CHECK; i++) {
        if (!restore_next(e)) {
            return round_end(e);
        }
    }

    needed = bytes_needed(e);
    g_mutex_lock(&e->control);
    if (e->restoring && !e->restore_fresh) {
        __atomic_store_n(&e->reserved_bytes, needed, __ATOMIC_RELAXED);
    }
    g_mutex_unlock(&e->control);
    available = dedup_restore_room(e);
    /* what the next step may take must be there: nobody looks during it */
    if (!e->restore_force && available < MIN(needed, STEP_BYTES)) {
        set_memory_error(&error, needed, available);
        restore_end(e, needed >> DEDUP_PAGE_SHIFT, error);
        return false;
    }
    dedup_stats_batch(e);
    return true;
}
