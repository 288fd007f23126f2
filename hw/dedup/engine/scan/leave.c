/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What becomes of holdings, looked at when a full pass ends (I8), but not
 * more often than the figures are taken, which say how others use a segment.
 *
 * A holding that no page of ours refers to any more is let go; when no
 * member maps its segment, the place in the group's table is free again.
 *
 * A segment that costs more memory than all its users together save by it
 * is "lean".  A young one is lean too: the others need a pass to find it.
 * So time is counted in ticks: one tick is over when every member that scans
 * has completed a pass.  After LEAN_TICKS ticks of being lean a segment is
 * left: its pages get their own memory back, and are published anew, in a
 * denser segment, where two still want them.  If another member has published
 * the same under a higher name, it is given some ticks more to leave first.
 */

#include <string.h>

#include "scan/leave.h"

#define LEAN_TICKS 3
#define LEAN_TICKS_TWIN (3 * LEAN_TICKS)
/* A member that hangs must not keep the others from leaving: 5 minutes. */
#define TICK_MAX_US (300 * G_TIME_SPAN_SECOND)
/* Forget after this many ticks that a segment was left. */
#define FORGET_TICKS 16
/* Leave at most this many segments at a time: 64 MiB. */
#define LEAVE_MOST 32
#define SEGMENT_BYTES (DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE)

/* ---- notes ---- */

DedupNote *dedup_leave_note(DedupScan *scan, const DedupHolding *h)
{
    GArray *notes = scan->leave.notes;

    if (h->no >= notes->len) {
        g_array_set_size(notes, h->no + 1); /* zeros */
    }
    return &g_array_index(notes, DedupNote, h->no);
}

void dedup_scan_note_others(DedupScan *scan, const DedupHolding *h,
                            uint32_t mapped)
{
    DedupNote *note = dedup_leave_note(scan, h);

    note->others = mapped;
    note->met = true;
}

/* ---- ticks ---- */

typedef struct Tick {
    const DedupLeave *leave;
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
    if (!self && info->scanning && !info->estimates) {
        /* "not equal": a slot may have got a new owner */
        t->all &= info->full_scans != t->leave->scans[member];
    }
}

uint64_t dedup_leave_tick(DedupScan *scan)
{
    DedupLeave *l = &scan->leave;
    int64_t now = g_get_monotonic_time();
    Tick t = { .leave = l, .all = true };

    dedup_group_foreach_member(scan->group, tick_member, &t);
    if (t.all || now - l->tick_us > TICK_MAX_US) {
        l->tick_us = now;
        l->tick++;
        memcpy(l->scans, t.scans, sizeof(t.scans));
        if (l->tick % FORGET_TICKS == 0) {
            g_hash_table_remove_all(l->avoided);
        }
    }
    return t.pages;
}

/* ---- lean segments ---- */

/*
 * Does the segment save more than it costs?  That is its pages, one more for
 * what describes it, and the mappings: scattered pages take two each, an
 * eighth of what they save.  The others' are taken to be like ours.
 */
static bool pays(const DedupHolding *h, const DedupNote *note)
{
    uint64_t mapped = __atomic_load_n(&h->mapped, __ATOMIC_RELAXED);
    uint64_t maps = __atomic_load_n(&h->ends, __ATOMIC_RELAXED) / 2;
    uint64_t all = mapped + note->others;

    maps = mapped ? maps * all / mapped : maps;
    return all * DEDUP_PAGE_SIZE >
           (h->segment->npages + 1) * DEDUP_PAGE_SIZE + maps * DEDUP_MAP_COST;
}

/*
 * Members that share a segment and move to another group give it a name each
 * (names.c), and none knows that others use it.  If all left it at a time it
 * would have to be published anew: so those with the higher names go first,
 * and find it under the lowest.
 */
static bool has_higher_twin(DedupScan *scan, const DedupSegment *s)
{
    uint64_t hash = dedup_page_hash(dedup_segment_page(s, 0), scan->salt);
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(scan->index, hash, hits);

    for (unsigned i = 0; s->gid && i < n; i++) {
        if (hits[i].kind == DEDUP_HINT_PUBLISHED && hits[i].page == 0 &&
            hits[i].where > s->gid) {
            return true;
        }
    }
    return false;
}

/* Has it been lean for long enough? */
static bool is_to_leave(DedupScan *scan, const DedupHolding *h,
                        const DedupNote *note)
{
    uint64_t ticks = scan->leave.tick - note->lean_since;

    return ticks >= LEAN_TICKS &&
           (ticks >= LEAN_TICKS_TWIN || !has_higher_twin(scan, h->segment));
}

/*
 * It could not be left: its pages are pinned, or in a region that is closed.
 * It may be merged to again, and be lean for a while: others may be left.
 */
static void stay(DedupScan *scan, const DedupHolding *h, DedupNote *note)
{
    note->leaving = false;
    note->lean_since = scan->leave.tick;
    g_hash_table_remove(scan->leave.avoided,
                        GUINT_TO_POINTER(h->segment->gid));
}

/*
 * Leaving a segment takes memory before it gives any: one's share of its
 * pages, the segment itself only when all have left.  So few are left at a
 * time: what takes half of the room at most.  Returns the bytes that leaving
 * takes, 0 if there is none to be left.
 */
static uint64_t find_lean(DedupScan *scan)
{
    uint64_t most = MIN(LEAVE_MOST, dedup_restore_room(scan->room) / 2 /
                                    SEGMENT_BYTES);
    uint64_t left = 0;

    for (unsigned i = 0; i < dedup_holding_count(scan->space); i++) {
        DedupHolding *h = dedup_holding_get(scan->space, i);
        DedupNote *note = h ? dedup_leave_note(scan, h) : NULL;
        uint32_t refs = h ? __atomic_load_n(&h->refs, __ATOMIC_RELAXED) : 0;

        if (!h || h->zeroes) {
            continue;
        }
        if (note->leaving && refs && refs == note->refs) {
            stay(scan, h, note);
            continue;
        }
        if (note->leaving) {
            /* again: some of its pages were pinned */
            note->refs = refs;
            left += refs > 0;
            continue;
        }
        if (pays(h, note)) {
            note->lean_since = 0;
        } else if (!note->lean_since) {
            note->lean_since = scan->leave.tick;
        } else if (left < most && is_to_leave(scan, h, note)) {
            note->leaving = true;
            note->refs = refs;
            if (h->segment->gid) {
                g_hash_table_add(scan->leave.avoided,
                                 GUINT_TO_POINTER(h->segment->gid));
            }
            left++;
        }
    }
    return MIN(left, most) * SEGMENT_BYTES;
}

static bool is_leaving(void *opaque, const DedupHolding *h)
{
    return dedup_leave_note(opaque, h)->leaving;
}

void dedup_leave_lean(DedupScan *scan)
{
    DedupNeed need = { .memory = find_lean(scan) };
    DedupReservation reserved = { 0 };

    if (need.memory && dedup_reserve(scan->room, &reserved, &need, false,
                                     NULL)) {
        dedup_space_leave(scan->space, is_leaving, scan);
    }
    dedup_unreserve(scan->room, &reserved);
}

/* ---- what nothing refers to ---- */

/* The segment goes: nobody shall look for it. */
static void withdraw(DedupScan *scan, const DedupSegment *s)
{
    for (uint32_t p = 0; p < s->npages; p++) {
        uint64_t hash = dedup_page_hash(dedup_segment_page(s, p), scan->salt);
        DedupHint hint = dedup_scan_published(s, p);

        hint.raw = dedup_index_raw(hash, &hint);
        dedup_index_remove(scan->index, hash, &hint);
    }
}

/* True: nobody else uses the segment of that name; it may be released. */
static bool leave_group(DedupScan *scan, const DedupSegment *s)
{
    DedupSegmentUse others = { 0 };

    dedup_group_clear_use(scan->group, s->gid);
    dedup_group_others_use(scan->group, s->gid, &others);
    if (others.mapped) {
        return false;
    }
    withdraw(scan, s);
    return true;
}

void dedup_scan_drop_unused(DedupScan *scan)
{
    /* else the group hears of it when we are back: the figures' walk */
    bool joined = dedup_group_is_joined(scan->group);

    for (unsigned i = 0; i < dedup_holding_count(scan->space); i++) {
        DedupHolding *h = dedup_holding_get(scan->space, i);
        uint32_t gid;
        bool release;

        /* only the scanner, which is here, makes it rise from 0 */
        if (!h || h->zeroes || __atomic_load_n(&h->refs, __ATOMIC_RELAXED)) {
            continue;
        }
        gid = joined ? h->segment->gid : 0;
        release = gid && leave_group(scan, h->segment);
        *dedup_leave_note(scan, h) = (DedupNote) { 0 };
        dedup_holding_drop(scan->space, h);
        if (release) {
            dedup_group_segment_release(scan->group, gid);
        }
    }
    dedup_zeroes_drop_unused(scan->space);
}

/* ---- life ---- */

void dedup_leave_init(DedupScan *scan)
{
    scan->leave = (DedupLeave) {
        .notes = g_array_new(false, true, sizeof(DedupNote)),
        .avoided = g_hash_table_new(NULL, NULL),
        .scans = g_new0(uint64_t, DEDUP_MAX_MEMBERS),
        .tick = 1,
        .tick_us = g_get_monotonic_time(),
    };
}

void dedup_leave_clear(DedupScan *scan)
{
    g_array_free(scan->leave.notes, true);
    g_hash_table_destroy(scan->leave.avoided);
    g_free(scan->leave.scans);
}

void dedup_leave_forget_group(DedupScan *scan)
{
    g_hash_table_remove_all(scan->leave.avoided);
    memset(scan->leave.scans, 0,
           DEDUP_MAX_MEMBERS * sizeof(scan->leave.scans[0]));
}
