/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Joining a group, once or again, and the names that holdings have there.
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
 *             announced in its index, a slice with each pass (upkeep.c).  One
 *             that finds no room in the table stays nameless, until a later
 *             pass: what is mapped to it stays merged, and nobody else finds
 *             it.
 */

#include "scan/leave.h"
#include "scan/upkeep.h"

#define WATCH_US G_TIME_SPAN_SECOND

/* Nobody finds it, or can ask for it. */
static void forget_name(DedupScan *scan, DedupHolding *h)
{
    DedupNote *note = dedup_leave_note(scan, h);

    dedup_holding_rename(scan->space, h, 0);
    note->others = 0;
    note->lean_since = 0;
}

void dedup_scan_name_holdings(DedupScan *scan)
{
    bool more = true;

    for (unsigned i = 0; more && i < dedup_holding_count(scan->space); i++) {
        DedupHolding *h = dedup_holding_get(scan->space, i);
        uint32_t gid;

        if (!h || h->zeroes || h->segment->gid) {
            continue;
        }
        /* without the remap lock: the table's may be waited for */
        gid = dedup_group_segment_alloc(scan->group, h->segment->npages);
        /* if there is none the next one would wait as long, and in vain */
        more = gid;
        if (gid) {
            dedup_holding_rename(scan->space, h, gid);
            dedup_upkeep_announce_all(scan);
        }
    }
}

bool dedup_scan_forget_lost_names(DedupScan *scan)
{
    bool any = false;

    for (unsigned i = 0; i < dedup_holding_count(scan->space); i++) {
        DedupHolding *h = dedup_holding_get(scan->space, i);
        DedupNote *note = h ? dedup_leave_note(scan, h) : NULL;

        if (h && h->segment->gid && !note->met) {
            forget_name(scan, h);
            any = true;
        }
        if (h) {
            note->met = false;
        }
    }
    return any;
}

/* Everything that is known by a name, or by the old index, is forgotten. */
static void move(DedupScan *scan)
{
    for (unsigned i = 0; i < dedup_holding_count(scan->space); i++) {
        DedupHolding *h = dedup_holding_get(scan->space, i);

        if (h && !h->zeroes) {
            forget_name(scan, h);
        }
    }
    dedup_leave_forget_group(scan);
    g_hash_table_remove_all(scan->publisher.failed);
    dedup_upkeep_forget_group(scan);
    dedup_scan_name_holdings(scan);
}

bool dedup_scan_join(DedupScan *scan, const DedupGroupOps *ops, void *opaque,
                     GError **error)
{
    if (!dedup_group_join(scan->group, ops, opaque, error)) {
        return false;
    }
    if (!scan->start_us) {
        scan->start_us = g_get_monotonic_time();
    }
    scan->index = dedup_group_index(scan->group);
    __atomic_store_n(&scan->salt, dedup_group_salt(scan->group),
                     __ATOMIC_RELAXED);
    if (!dedup_group_resumed(scan->group)) {
        move(scan);
    }
    dedup_group_enter(scan->group);
    return true;
}

bool dedup_scan_has_lost_group(DedupScan *scan)
{
    int64_t now = g_get_monotonic_time();

    if (!dedup_group_is_joined(scan->group) ||
        now - scan->watched_us < WATCH_US) {
        return false;
    }
    scan->watched_us = now;
    if (dedup_group_is_current(scan->group)) {
        return false;
    }
    /* while the index is there: what we claimed is not published */
    dedup_scan_abandon(scan);
    dedup_group_detach(scan->group);
    scan->index = NULL;         /* if joining fails it is unmapped */
    return true;
}
