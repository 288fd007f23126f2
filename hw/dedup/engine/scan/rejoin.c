/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Joining a group, once or again.
 *
 * The files of a group's directory may be deleted or replaced under live
 * members (group-dir.c).  Who notices lets go of them, says so, and joins
 * anew.  Nothing that is merged is touched: segments are held by what is
 * mapped, not by names.  Two cases:
 *
 *   resumed   nobody has begun another group meanwhile, or who did has taken
 *             our shared file: names stay as they were, but for what those
 *             who took us for dead have released
 *   moved     there is another group by now: each segment that we hold gets a
 *             name in its table, as if we had published it, and its pages are
 *             announced in its index, a slice with each pass (policy.c).  One
 *             that finds no room in the table stays nameless, until a later
 *             pass: what is mapped to it stays merged, and nobody else finds
 *             it.
 */

#include <string.h>

#include "rejoin.h"

#define WATCH_US G_TIME_SPAN_SECOND

/* Nobody finds it, or can ask for it.  Remap lock held. */
static void forget_name(DedupEngine *e, DedupSegment *s)
{
    g_hash_table_remove(e->by_gid, GUINT_TO_POINTER(s->gid));
    s->gid = 0;
    s->mine = false;
    s->others = 0;
    s->lean_since = 0;
}

/* A name in the group that we are in now; false: none can be had. */
static bool give_name(DedupEngine *e, DedupSegment *s)
{
    /* without the remap lock: the table's may be waited for */
    uint32_t gid = dedup_group_segment_alloc(e->group, s->npages);

    if (!gid) {
        return false;
    }
    dedup_lock(e);
    s->gid = gid;
    s->mine = true;
    __atomic_store_n(&s->dirty, true, __ATOMIC_RELAXED);
    g_hash_table_insert(e->by_gid, GUINT_TO_POINTER(gid), s);
    dedup_unlock(e);
    return true;
}

void dedup_name_segments(DedupEngine *e)
{
    bool more = true;

    for (unsigned i = 0; more && i < e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(e->segments, i);

        if (s && !s->zeroes && !s->gid) {
            /* the next one would wait as long, and in vain */
            more = give_name(e, s);
            if (more) {
                e->announce_left = e->segments->len;
            }
        }
    }
}

bool dedup_forget_lost_names(DedupEngine *e)
{
    bool any = false;

    for (unsigned i = 0; i < e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(e->segments, i);

        if (s && s->gid && !s->met) {
            dedup_lock(e);
            forget_name(e, s);
            dedup_unlock(e);
            any = true;
        }
        if (s) {
            s->met = false;
        }
    }
    return any;
}

/* Everything that is known by a name, or by the old index, is forgotten. */
static void move(DedupEngine *e)
{
    dedup_lock(e);
    for (unsigned i = 0; i < e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(e->segments, i);

        if (s && !s->zeroes) {
            forget_name(e, s);
        }
    }
    dedup_unlock(e);
    g_hash_table_remove_all(e->left_gids);
    g_hash_table_remove_all(e->failed_gids);
    memset(e->tick_scans, 0, DEDUP_MAX_MEMBERS * sizeof(e->tick_scans[0]));
    e->sweep_cursor = 0;
    e->index_short = false;
    e->announced_growths = dedup_index_growths(e->index);
    dedup_name_segments(e);
}

void dedup_join(DedupEngine *e, const DedupGroupOps *ops)
{
    g_autoptr(GError) error = NULL;
    bool ok = dedup_group_join(e->group, ops, e, &error);

    g_mutex_lock(&e->control);
    g_free(e->group_error);
    e->group_error = ok ? NULL : g_strdup(error->message);
    g_mutex_unlock(&e->control);
    if (!ok) {
        return;
    }
    e->index = dedup_group_index(e->group);
    e->salt = dedup_group_salt(e->group);
    if (!dedup_group_resumed(e->group)) {
        move(e);
    }
    dedup_group_enter(e->group);
}

void dedup_watch_group(DedupEngine *e)
{
    int64_t now = g_get_monotonic_time();

    if (!dedup_group_is_joined(e->group) || now - e->watched_us < WATCH_US) {
        return;
    }
    e->watched_us = now;
    if (dedup_group_is_current(e->group)) {
        return;
    }
    /* while the index is there: what we claimed is not published */
    dedup_publish_abandon(e);
    dedup_group_detach(e->group);
    e->index = NULL;            /* if joining fails it is unmapped */
    g_mutex_lock(&e->control);
    g_free(e->group_error);
    e->group_error = g_strdup_printf("its files were deleted or replaced while"
                                     " they were in use; joining it again");
    g_mutex_unlock(&e->control);
}
