/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A request to restore everything: dedup_engine_restore().
 *
 * It is a walk over all regions on the scanner's thread, one window per
 * taking of the remap lock (space/walk.c), so that nobody waits long.  It
 * reserves what it takes (scan/room.h), looks at the room as it goes and stops
 * when that runs short; it goes round again for pages that were pinned.
 *
 * The request, and what it has reserved, is guarded by the control lock: a
 * new one may take its place at any time.
 */

#include "unmerge.h"

/* Windows in one step, after which the scanner looks for other requests. */
#define STEP_WINDOWS 256
/* When to give up without progress. */
#define GIVE_UP_US (3 * G_TIME_SPAN_SECOND)

#define EVERYTHING ((const uint8_t *)UINTPTR_MAX)

void dedup_restore_error(uint64_t left, unsigned lacks, GError **error)
{
    static const struct {
        DedupLack lack;
        const char *text;
    } reasons[] = {
        { DEDUP_LACK_FILE, "the file system of the RAM's file is full" },
        { DEDUP_LACK_MAPS, "the process is at its limit of mappings "
                           "(vm.max_map_count)" },
        { DEDUP_LACK_UNPINNED, "a device writes to them" },
        { DEDUP_LACK_FREEZE, "a background snapshot or an incoming "
                             "migration works on the RAM, or vhost without a "
                             "userfaultfd, or vCPUs cannot be held" },
        { DEDUP_LACK_POISON, "their memory is broken (a memory error of the "
                             "host): reset the guest and try again" },
    };
    g_autoptr(GString) text = g_string_new(NULL);

    for (unsigned i = 0; i < G_N_ELEMENTS(reasons); i++) {
        if (lacks & reasons[i].lack) {
            g_string_append_printf(text, "%s%s", text->len ? ", or " : "",
                                   reasons[i].text);
        }
    }
    g_set_error(error, DEDUP_ERROR,
                lacks & DEDUP_LACK_FILE ? DEDUP_ERROR_MEMORY :
                lacks == DEDUP_LACK_UNPINNED ? DEDUP_ERROR_PINNED
                                             : DEDUP_ERROR_STATE,
                "%" G_GUINT64_FORMAT " pages cannot have their own memory "
                "now: %s", left,
                text->len ? text->str : "the kernel refused it");
}

bool dedup_unmerge_request(DedupUnmerge *u, bool off, bool force,
                           GError **error)
{
    DedupNeed need;
    bool ok;

    dedup_space_need(u->space, NULL, EVERYTHING, &need);
    g_mutex_lock(&u->control->lock);
    /* a request that is under way keeps what it reserved, if this fails */
    ok = dedup_reserve(u->room, &u->reserved, &need, force, error);
    if (ok) {
        if (off) {
            u->control->params.run = false;
        }
        u->control->restoring = true;
        u->fresh = true;
        u->force = force;
    }
    g_mutex_unlock(&u->control->lock);
    return ok;
}

void dedup_unmerge_cancel(DedupUnmerge *u)
{
    u->control->restoring = false;
    u->fresh = false;
    dedup_unreserve(u->room, &u->reserved);
}

/* A request that was not seen yet begins. */
static void take_over(DedupUnmerge *u)
{
    g_mutex_lock(&u->control->lock);
    if (u->fresh) {
        u->fresh = false;
        u->round = (DedupRestore) { .end = EVERYTHING };
        u->last = UINT64_MAX;
        u->moved_us = g_get_monotonic_time();
    }
    g_mutex_unlock(&u->control->lock);
}

/*
 * The request has ended, unless it was replaced by another one meanwhile (or
 * cancelled): then nothing of ours is left to end.
 */
static DedupUnmergeStep end(DedupUnmerge *u, GError **error)
{
    bool ours;

    g_mutex_lock(&u->control->lock);
    ours = u->control->restoring && !u->fresh;
    if (ours) {
        dedup_unmerge_cancel(u);
    }
    g_mutex_unlock(&u->control->lock);
    if (!ours) {
        g_clear_error(error);
    }
    return ours ? DEDUP_UNMERGE_ENDED : DEDUP_UNMERGE_GOES_ON;
}

/* One round is over. */
static DedupUnmergeStep end_round(DedupUnmerge *u, uint64_t *left,
                                  GError **error)
{
    int64_t now = g_get_monotonic_time();
    unsigned lacks = u->round.lacks;

    *left = dedup_space_mapped(u->space);
    u->round = (DedupRestore) { .end = EVERYTHING };
    if (!*left) {
        return end(u, error);
    }
    if (*left < u->last) {
        u->moved_us = now;
    }
    u->last = *left;
    if (now - u->moved_us < GIVE_UP_US) {
        return DEDUP_UNMERGE_WAITS;
    }
    dedup_restore_error(*left, lacks, error);
    return end(u, error);
}

/*
 * How much may be taken in this step?  0 and @error: there is no room any
 * more.
 */
static uint64_t look_at_room(DedupUnmerge *u, GError **error)
{
    uint64_t step = 1; /* of a request that was replaced: it begins anew */
    DedupNeed rest;

    dedup_space_need(u->space, NULL, EVERYTHING, &rest);
    g_mutex_lock(&u->control->lock);
    if (u->control->restoring && !u->fresh) {
        step = dedup_reserve_next(u->room, &u->reserved, &rest, u->force,
                                  error);
    }
    g_mutex_unlock(&u->control->lock);
    return step;
}

DedupUnmergeStep dedup_unmerge_step(DedupUnmerge *u, uint64_t *left,
                                    GError **error)
{
    uint64_t step;

    take_over(u);
    step = look_at_room(u, error);
    if (!step) {
        *left = dedup_space_mapped(u->space);
        if (!*left) {
            g_clear_error(error); /* the guest gave the rest away */
        }
        return end(u, error);
    }
    u->round.taken = 0;
    for (unsigned i = 0; i < STEP_WINDOWS && u->round.taken < step; i++) {
        if (!dedup_space_restore_next(u->space, &u->round)) {
            return end_round(u, left, error);
        }
    }
    return DEDUP_UNMERGE_GOES_ON;
}
