/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What becomes of segments, looked at when a full pass ends (I8), but not
 * more often than the figures are taken (stats.c).
 *
 * A segment that no page of ours refers to any more is let go; when no
 * member maps it, its place in the group's table is free again.
 *
 * A segment that costs more memory than all its users together save by it
 * is "lean".  A young one is lean too: the others need a pass to find it.
 * So time is counted in ticks: one tick is over when every member that scans
 * has completed a pass.  After LEAN_TICKS ticks of being lean a segment is
 * left: its pages get their own memory back, and are published anew, in a
 * denser segment, where two still want them.  If another member has published
 * the same under a higher name, it is given some ticks more to leave first.
 *
 * Runs after the figures of the pass, which say how others use a segment.
 *
 * A hint may get lost when the index grows.  So whoever published a segment
 * announces its pages again after that.  And hints stay behind when a member
 * dies, or a segment goes whose publisher did: the index is swept of them, a
 * slice at a time.
 *
 * Also here: what a window may spend of the process's maps.
 */

#include <string.h>

#include "internal.h"
#include "rejoin.h"
#include "zeroes.h"

#define LEAN_TICKS 3
#define LEAN_TICKS_TWIN (3 * LEAN_TICKS)
/* Guests' RAM on a host is at most this many times the host's. */
#define RAM_MAX 4
/* How often to look whether the index may grow, and what it must leave. */
#define INDEX_ROOM_US (100 * G_TIME_SPAN_MILLISECOND)
#define INDEX_ROOM (32ULL << 20)
/* A member that hangs must not keep the others from leaving: 5 minutes. */
#define TICK_MAX_US (300 * G_TIME_SPAN_SECOND)
/* Forget after this many ticks that a segment was left or not to be had. */
#define FORGET_TICKS 16
/* Leave at most this many segments at a time: 64 MiB. */
#define LEAVE_MOST 32
#define SEGMENT_BYTES (DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE)
/* Announce the pages of at most this many segments again at a time. */
#define ANNOUNCE_MOST 64
/*
 * Sweep this share of the index at a time, but not less than SWEEP_LEAST
 * pages of it, and not more than SWEEP_MOST: half a million hints.
 */
#define SWEEP_SHARE 32
#define SWEEP_LEAST 16
#define SWEEP_MOST 1024

/*
 * Does the segment save more than it costs?  That is its pages, one more for
 * what describes it, and the mappings: scattered pages take two each, an
 * eighth of what they save.  The others' are taken to be like ours.
 */
static bool pays(const DedupSegment *s)
{
    uint64_t mapped = __atomic_load_n(&s->mapped, __ATOMIC_RELAXED);
    uint64_t maps = __atomic_load_n(&s->ends, __ATOMIC_RELAXED) / 2;
    uint64_t all = mapped + s->others;

    maps = mapped ? maps * all / mapped : maps;
    return all * DEDUP_PAGE_SIZE > (s->npages + 1) * DEDUP_PAGE_SIZE +
                                   maps * DEDUP_MAP_COST;
}

typedef struct Tick {
    DedupEngine *e;
    uint64_t pages;           /* of all members */
    bool all;                 /* others have made a pass */
    uint64_t scans[DEDUP_MAX_MEMBERS];
} Tick;

static void tick_member(void *opaque, unsigned member, bool self,
                        const DedupMemberInfo *info)
{
    Tick *t = opaque;

    t->pages += MIN(info->pages_total, 1ULL << DEDUP_MEMBER_PAGE_BITS);
    t->scans[member] = info->full_scans;
    if (!self && info->scanning) {
        /* "not equal": a slot may have got a new owner */
        t->all &= info->full_scans != t->e->tick_scans[member];
    }
}

/*
 * Has every member made a pass since the last tick?  The same look at the
 * members tells how large the index needs to be.
 */
static void tick(DedupEngine *e)
{
    int64_t now = g_get_monotonic_time();
    Tick t = { .e = e, .all = true };
    uint64_t pages;

    dedup_group_foreach_member(e->group, tick_member, &t);
    /*
     * Hints of what was there once fill the index; it need not grow on.  0
     * would stop it where no slot can be read yet; more than the host can
     * have is a lie.
     */
    pages = MIN(t.pages, RAM_MAX * (dedup_hostmem_total(e->hostmem) >>
                                  DEDUP_PAGE_SHIFT));
    e->index_limit = MAX(pages * 2, 1);
    if (!e->index_short) {
        dedup_index_set_limit(e->index, e->index_limit);
    }
    if (t.all || now - e->tick_us > TICK_MAX_US) {
        e->tick_us = now;
        e->generation++;
        memcpy(e->tick_scans, t.scans, sizeof(t.scans));
        if (e->generation % FORGET_TICKS == 0) {
            g_hash_table_remove_all(e->left_gids);
        }
    }
}

/* The segment goes: nobody shall look for it. */
static void withdraw(DedupEngine *e, const DedupSegment *s)
{
    for (uint32_t p = 0; p < s->npages; p++) {
        uint64_t hash = dedup_page_hash(dedup_segment_page(s, p), e->salt);
        DedupHint hint = {
            .kind = DEDUP_HINT_PUBLISHED, .where = s->gid, .page = p,
        };

        hint.raw = dedup_index_raw(hash, &hint);
        dedup_index_remove(e->index, hash, &hint);
    }
}

void dedup_policy_drop_unused(DedupEngine *e)
{
    /* else the group hears of it when we are back: walk_segment() */
    bool joined = dedup_group_is_joined(e->group);

    for (unsigned i = 0; i < e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(e->segments, i);
        DedupSegmentUse others;
        uint32_t gid;

        /* only the scanner, which is here, makes it rise from 0 */
        if (!s || s->zeroes || __atomic_load_n(&s->refs, __ATOMIC_RELAXED)) {
            continue;
        }
        gid = joined ? s->gid : 0;
        others.mapped = 0;
        if (gid) {
            dedup_group_clear_use(e->group, gid);
            dedup_group_others_use(e->group, gid, &others);
        }
        if (gid && !others.mapped) {
            withdraw(e, s);
        }
        dedup_lock(e);
        dedup_segments_drop(e, s);
        dedup_unlock(e);
        if (gid && !others.mapped) {
            dedup_group_segment_release(e->group, gid);
        }
    }
    dedup_zeroes_drop_unused(e);
}

/*
 * Members that share a segment and move to another group give it a name each
 * (rejoin.c), and none knows that others use it.  If all left it at a time it
 * would have to be published anew: so those with the higher names go first,
 * and find it under the lowest.
 */
static bool has_higher_twin(DedupEngine *e, const DedupSegment *s)
{
    uint64_t hash = dedup_page_hash(dedup_segment_page(s, 0), e->salt);
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(e->index, hash, hits);

    for (unsigned i = 0; s->gid && i < n; i++) {
        if (hits[i].kind == DEDUP_HINT_PUBLISHED && hits[i].page == 0 &&
            hits[i].where > s->gid) {
            return true;
        }
    }
    return false;
}

/* Has it been lean for long enough? */
static bool is_to_leave(DedupEngine *e, const DedupSegment *s)
{
    uint64_t ticks = e->generation - s->lean_since;

    return ticks >= LEAN_TICKS &&
           (ticks >= LEAN_TICKS_TWIN || !has_higher_twin(e, s));
}

/*
 * Leaving a segment takes memory before it gives any: one's share of its
 * pages, the segment itself only when all have left.  So few are left at a
 * time: what takes half of the room at most.  Returns the bytes that leaving
 * takes, 0 if there is none to be left.
 */
static uint64_t find_lean(DedupEngine *e)
{
    uint64_t most = MIN(LEAVE_MOST, dedup_restore_room(e) / 2 / SEGMENT_BYTES);
    uint64_t left = 0;

    for (unsigned i = 0; i < e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(e->segments, i);

        if (!s || s->zeroes) {
            continue;
        }
        if (s->leaving) {
            /* again: some of its pages were pinned, or we were blocked */
            left += s->refs > 0;
            continue;
        }
        if (pays(s)) {
            s->lean_since = 0;
        } else if (!s->lean_since) {
            s->lean_since = e->generation;
        } else if (left < most && is_to_leave(e, s)) {
            s->leaving = true;
            if (s->gid) {
                g_hash_table_add(e->left_gids, GUINT_TO_POINTER(s->gid));
            }
            left++;
        }
    }
    return MIN(left, most) * SEGMENT_BYTES;
}

static bool is_leaving(DedupEngine *e, uint32_t entry)
{
    return dedup_entry_is_segment(entry) &&
           dedup_entry_segment(e, entry)->leaving;
}

/*
 * May pages of the region get their own memory?  In a closed one nothing
 * would be published anew: that would take memory, and never give any.
 */
static bool may_leave(DedupEngine *e, DedupRegion *r)
{
    return !e->blocked && !r->closing && dedup_file_has_room(r);
}

/* Restore what is mapped to segments that we leave, window by window. */
static void leave_segments(DedupEngine *e)
{
    uint32_t at = 0;

    for (;;) {
        DedupRegion *r;
        uint32_t page, end;

        dedup_lock(e);
        r = dedup_region_next(e, at);
        if (!r) {
            dedup_unlock(e);
            return;
        }
        page = dedup_ledger_next(r, dedup_region_at(r, at), r->npages);
        end = MIN(page + DEDUP_WINDOW_PAGES, r->npages);
        for (uint32_t i = page, j; i < end && may_leave(e, r); i = j) {
            for (j = i; j < end && is_leaving(e, dedup_entry_at(r, j)); j++) {
                ;
            }
            if (j > i) {
                dedup_restore_locked(r, i, j - i);
            }
            j += j == i;
        }
        at = r->base + end;
        dedup_unlock(e);
    }
}

static bool is_announced(DedupEngine *e, uint64_t hash, uint32_t gid,
                         uint32_t page)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(e->index, hash, hits);

    for (unsigned i = 0; i < n; i++) {
        if (hits[i].kind == DEDUP_HINT_PUBLISHED && hits[i].where == gid &&
            hits[i].page == page) {
            return true;
        }
    }
    return false;
}

/* A slice of the segments at a time: to hash them all may take seconds. */
static void announce_again(DedupEngine *e)
{
    uint64_t growths = dedup_index_growths(e->index);
    unsigned end;

    if (growths != e->announced_growths) {
        e->announced_growths = growths;
        e->announce_left = e->segments->len;
    }
    e->announce_left = MIN(e->announce_left, e->segments->len);
    end = e->announce_left - MIN(e->announce_left, ANNOUNCE_MOST);
    for (; e->announce_left > end; e->announce_left--) {
        DedupSegment *s = g_ptr_array_index(e->segments,
                                            e->announce_left - 1);

        for (uint32_t p = 0; s && s->mine && !s->leaving && p < s->npages;
             p++) {
            uint64_t hash = dedup_page_hash(dedup_segment_page(s, p),
                                            e->salt);
            DedupHint hint = {
                .kind = DEDUP_HINT_PUBLISHED, .where = s->gid, .page = p,
            };

            if (!is_announced(e, hash, s->gid, p)) {
                dedup_index_insert(e->index, hash, &hint);
            }
        }
    }
}

typedef struct Sweep {
    DedupEngine *e;
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
    DedupGroup *g = s->e->group;
    gpointer gid = GUINT_TO_POINTER(hint->where);
    unsigned member, npages;

    if (hint->kind != DEDUP_HINT_PUBLISHED) {
        /* what of our own hints is right, the scan finds out */
        return hint->where != dedup_group_self(g) &&
               !dedup_group_alive(g, hint->where);
    }
    npages = GPOINTER_TO_UINT(g_hash_table_lookup(s->lengths, gid));
    if (!npages) {
        if (!dedup_group_segment_lookup(g, hint->where, &member, &npages)) {
            return true;
        }
        g_hash_table_insert(s->lengths, gid, GUINT_TO_POINTER(npages));
    }
    return hint->page >= npages;
}

/* In slices: something else may be asked of the scanner meanwhile. */
static void sweep(DedupEngine *e)
{
    uint64_t pages = dedup_index_bytes(e->index) / DEDUP_PAGE_SIZE;
    unsigned left = CLAMP(pages / SWEEP_SHARE, SWEEP_LEAST, SWEEP_MOST);
    Sweep s = { .e = e, .lengths = g_hash_table_new(NULL, NULL) };
    unsigned removed = 0;

    while (left && dedup_may_scan(e)) {
        unsigned n = MIN(left, SWEEP_LEAST);

        removed += dedup_index_sweep(e->index, &e->sweep_cursor, n, is_stale,
                                     &s);
        left -= n;
    }
    g_hash_table_destroy(s.lengths);
    if (removed && (e->stats.limits & DEDUP_LIMIT_INDEX)) {
        /* what found no room may find it now */
        e->announce_left = e->segments->len;
    }
}

/*
 * The index takes memory that is charged to us, and past the cgroup's limit
 * that is no error but somebody's end.  So it does not grow without room.
 */
void dedup_policy_index_room(DedupEngine *e)
{
    int64_t now = g_get_monotonic_time();
    bool is_short;

    if (now - e->index_room_us < INDEX_ROOM_US) {
        return;
    }
    e->index_room_us = now;
    is_short = dedup_restore_room(e) < INDEX_ROOM;
    if (is_short != e->index_short) {
        e->index_short = is_short;
        dedup_index_set_limit(e->index, is_short ? 0 : e->index_limit);
    }
}

void dedup_policy_pass_end(DedupEngine *e)
{
    DedupReservation reserved = { 0 };
    DedupNeed need = { 0 };

    dedup_group_refresh(e->group);
    g_hash_table_remove_all(e->failed_gids);
    tick(e);
    need.memory = find_lean(e);
    if (need.memory && dedup_reserve(e, &reserved, &need, false, NULL)) {
        leave_segments(e);
    }
    dedup_unreserve(e, &reserved);
    dedup_policy_drop_unused(e);
    dedup_name_segments(e);
    sweep(e);
    announce_again(e);
}

/*
 * Is there room for the maps?  The scarcer they are, the longer a run must
 * be: an isolated page costs two maps, a run of 64 costs two as well.
 */
bool dedup_policy_maps(const DedupRegion *r, DedupAction **actions,
                       unsigned *n, unsigned *limits)
{
    DedupEngine *e = r->engine;
    int64_t left = dedup_maps_left(e);
    int64_t limit = e->stats.maps_limit;
    unsigned least = left < limit / 10 ? 16 : left < limit / 4 ? 4 : 1;
    unsigned kept = 0, runs = 0;
    uint64_t needed = 4; /* the window's own registration splits maps */

    for (unsigned i = 0, j; i < *n; i = j) {
        DedupAction *a = actions[i];

        for (j = i + 1; j < *n &&
             actions[j]->page == a->page + (j - i) &&
             actions[j]->segment == a->segment &&
             (!a->segment || actions[j]->index == a->index + (j - i));
             j++) {
            ;
        }
        if (a->segment && j - i < least) {
            *limits |= DEDUP_LIMIT_MAPS;
            continue;
        }
        if (a->segment || r->memory == DEDUP_MEMORY_PRIVATE_FILE) {
            runs++;
        }
        memmove(&actions[kept], &actions[i],
                (j - i) * sizeof(actions[0]));
        kept += j - i;
    }
    *n = kept;
    needed += 2 * runs;
    if (runs && left < (int64_t)needed) {
        *limits |= DEDUP_LIMIT_MAPS;
        return false;
    }
    return kept > 0;
}
