/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Upkeep of the index, when a pass has ended.
 *
 * A hint may get lost when the index grows.  So whoever published a segment
 * announces its pages again after that.  And hints stay behind when a member
 * dies, or a segment goes whose publisher did: the index is swept of them, a
 * slice at a time.
 *
 * The index takes memory that is charged to us, and past the cgroup's limit
 * that is no error but somebody's end.  So it does not grow without room.
 */

#include "scan/leave.h"
#include "scan/upkeep.h"

/* Guests' RAM on a host is at most this many times the host's. */
#define RAM_MAX 4
/* How often to look whether the index may grow, and what it must leave. */
#define INDEX_ROOM_US (100 * G_TIME_SPAN_MILLISECOND)
#define INDEX_ROOM (32ULL << 20)
/* Announce the pages of at most this many segments again at a time. */
#define ANNOUNCE_MOST 64
/*
 * Sweep this share of the index at a time, but not less than SWEEP_LEAST
 * pages of it, and not more than SWEEP_MOST: half a million hints.
 */
#define SWEEP_SHARE 32
#define SWEEP_LEAST 16
#define SWEEP_MOST 1024

void dedup_upkeep_init(DedupScan *scan)
{
    /* until the first tick */
    scan->upkeep.index_limit = 1ULL << DEDUP_MEMBER_PAGE_BITS;
}

/* ---- size ---- */

void dedup_upkeep_set_index_limit(DedupScan *scan, uint64_t pages)
{
    DedupUpkeep *u = &scan->upkeep;
    uint64_t host = dedup_hostmem_total(scan->room->hostmem) >>
                    DEDUP_PAGE_SHIFT;

    u->index_limit = MAX(MIN(pages, RAM_MAX * host) * 2, 1);
    if (!u->index_short) {
        dedup_index_set_limit(scan->index, u->index_limit);
    }
}

void dedup_upkeep_index_room(DedupScan *scan)
{
    DedupUpkeep *u = &scan->upkeep;
    int64_t now = g_get_monotonic_time();
    bool is_short;

    if (now - u->index_room_us < INDEX_ROOM_US) {
        return;
    }
    u->index_room_us = now;
    is_short = dedup_restore_room(scan->room) < INDEX_ROOM;
    if (is_short != u->index_short) {
        u->index_short = is_short;
        dedup_index_set_limit(scan->index, is_short ? 0 : u->index_limit);
    }
}

/* ---- hints that are missing ---- */

static bool is_announced(DedupScan *scan, uint64_t hash, uint32_t gid,
                         uint32_t page)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(scan->index, hash, hits);

    for (unsigned i = 0; i < n; i++) {
        if (hits[i].kind == DEDUP_HINT_PUBLISHED && hits[i].where == gid &&
            hits[i].page == page) {
            return true;
        }
    }
    return false;
}

static void announce(DedupScan *scan, const DedupSegment *s)
{
    for (uint32_t p = 0; p < s->npages; p++) {
        uint64_t hash = dedup_page_hash(dedup_segment_page(s, p), scan->salt);
        DedupHint hint = dedup_scan_published(s, p);

        if (hash != DEDUP_UNREADABLE &&
            !is_announced(scan, hash, s->gid, p)) {
            dedup_index_insert(scan->index, hash, &hint);
        }
    }
}

void dedup_upkeep_announce_all(DedupScan *scan)
{
    scan->upkeep.announce_left = dedup_holding_count(scan->space);
}

void dedup_upkeep_announce(DedupScan *scan)
{
    DedupUpkeep *u = &scan->upkeep;
    uint64_t growths = dedup_index_growths(scan->index);
    unsigned end;

    if (growths != u->growths) {
        u->growths = growths;
        dedup_upkeep_announce_all(scan);
    }
    u->announce_left = MIN(u->announce_left,
                           dedup_holding_count(scan->space));
    end = u->announce_left - MIN(u->announce_left, ANNOUNCE_MOST);
    for (; u->announce_left > end; u->announce_left--) {
        DedupHolding *h = dedup_holding_get(scan->space,
                                            u->announce_left - 1);

        if (h && h->segment->mine && !dedup_leave_note(scan, h)->leaving) {
            announce(scan, h->segment);
        }
    }
}

/* ---- hints that are stale ---- */

typedef struct Sweep {
    DedupGroup *group;
    GHashTable *lengths;      /* gid -> pages, of segments that exist */
} Sweep;

/*
 * Does the hint lead nowhere?  The numbers in it may be an enemy's.
 *
 * Only that something exists is remembered during a sweep.  That it does not
 * is found out anew for each hint, after that was read: a segment is in the
 * group's table before a hint names it (publish.c), so a live one is never
 * taken for one that is gone.  That costs a system call for each hint that
 * goes, once in its life.
 */
static bool is_stale(void *opaque, const DedupHint *hint)
{
    Sweep *s = opaque;
    gpointer gid = GUINT_TO_POINTER(hint->where);
    unsigned member, npages;
    DedupLookup found;

    if (hint->kind != DEDUP_HINT_PUBLISHED) {
        /* whether our own hints are right is for the scan to find out */
        return hint->where != dedup_group_self(s->group) &&
               !dedup_group_alive(s->group, hint->where);
    }
    npages = GPOINTER_TO_UINT(g_hash_table_lookup(s->lengths, gid));
    if (!npages) {
        found = dedup_group_segment_lookup(s->group, hint->where, &member,
                                           &npages);
        if (found != DEDUP_LOOKUP_FOUND) {
            return found == DEDUP_LOOKUP_GONE;
        }
        g_hash_table_insert(s->lengths, gid, GUINT_TO_POINTER(npages));
    }
    return hint->page >= npages;
}

void dedup_upkeep_sweep(DedupScan *scan)
{
    uint64_t pages = dedup_index_bytes(scan->index) / DEDUP_PAGE_SIZE;
    unsigned left = CLAMP(pages / SWEEP_SHARE, SWEEP_LEAST, SWEEP_MOST);
    Sweep s = {
        .group = scan->group, .lengths = g_hash_table_new(NULL, NULL),
    };
    unsigned removed = 0;

    while (left && dedup_scan_may_go_on(scan)) {
        unsigned n = MIN(left, SWEEP_LEAST);

        removed += dedup_index_sweep(scan->index, &scan->upkeep.sweep_cursor,
                                     n, is_stale, &s);
        left -= n;
    }
    g_hash_table_destroy(s.lengths);
    if (removed && scan->upkeep.was_full) {
        /* what found no room may find it now */
        dedup_upkeep_announce_all(scan);
    }
}

void dedup_upkeep_forget_group(DedupScan *scan)
{
    scan->upkeep.sweep_cursor = 0;
    scan->upkeep.index_short = false;
    scan->upkeep.growths = dedup_index_growths(scan->index);
}
