/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The table of a group's segments, and who uses which.
 *
 * An entry of the table is changed only under the table's lock, a byte lock
 * that dies with its holder.  It is held for microseconds; when somebody was
 * stopped just then, nobody publishes until it goes on or dies, and nobody
 * waits for it either.  Entries are read without the lock and may be torn:
 * a wrong length or publisher is noticed when the segment is fetched and
 * checked.
 *
 * Each member has a row of use records, which only it writes; the numbers
 * serve policy and figures and are not trusted for anything else.  How far
 * the table and each row were ever written is kept beside them, so that
 * nobody reads the empty rest.
 *
 * Thread: the scanner's.
 */

#include <stddef.h>
#include <string.h>

#include "group/group-internal.h"

#define CHUNK DEDUP_WALK_ENTRIES

#define GENERATIONS (1u << (DEDUP_GID_BITS - 18))

G_STATIC_ASSERT(DEDUP_MAX_SEGMENTS == 1u << 18);

static bool is_alive(const DedupGroup *g, unsigned member)
{
    return __atomic_load_n(&g->alive[member], __ATOMIC_RELAXED);
}

static uint64_t table_offset(uint32_t slot)
{
    return DEDUP_FILE_TABLE + (uint64_t)slot * sizeof(DedupTableEntry);
}

static uint64_t use_offset(unsigned member, uint32_t slot)
{
    return DEDUP_FILE_USE + member * DEDUP_FILE_ROW +
           (uint64_t)slot * sizeof(DedupSegmentUse);
}

/* How many entries of the table were ever used. */
static uint32_t table_extent(const DedupGroup *g)
{
    uint32_t n = __atomic_load_n(&g->file.header->segments,
                                 __ATOMIC_RELAXED);

    return MIN(n, DEDUP_MAX_SEGMENTS);
}

static bool entry_valid(const DedupTableEntry *e, uint32_t slot)
{
    return e->npages > 0 && e->npages <= DEDUP_SEGMENT_PAGES &&
           e->gid < 1u << DEDUP_GID_BITS && DEDUP_GID_SLOT(e->gid) == slot;
}

/* Has the publisher died or left? */
static bool publisher_gone(DedupGroup *g, const DedupTableEntry *e)
{
    DedupSlot slot;

    return !dedup_group_alive(g, e->member) ||
           (dedup_group_slot_read(g, e->member, &slot) &&
            slot.incarnation != e->incarnation);
}

/* The next generation of @gid; never 0, so that no gid is 0. */
static uint32_t next_gid(uint32_t gid, uint32_t slot)
{
    uint32_t generation = (gid / DEDUP_MAX_SEGMENTS + 1) % GENERATIONS;

    return (generation ? generation : 1) * DEDUP_MAX_SEGMENTS + slot;
}

/* Makes the free entry @e ours; the table is locked. */
static uint32_t entry_take(DedupGroup *g, DedupTableEntry *e, uint32_t slot,
                           unsigned npages)
{
    *e = (DedupTableEntry) {
        .gid = next_gid(e->gid, slot),
        .npages = npages,
        .member = g->self,
        .incarnation = g->incarnation,
    };
    if (!dedup_group_file_write(&g->file, e, sizeof(*e),
                                table_offset(slot))) {
        return 0;
    }
    g->free_hint = slot;
    if (table_extent(g) <= slot) {
        __atomic_store_n(&g->file.header->segments, slot + 1,
                         __ATOMIC_RELAXED);
    }
    return e->gid;
}

uint32_t dedup_group_segment_alloc(DedupGroup *g, unsigned npages)
{
    DedupTableEntry entries[256];
    uint32_t gid = 0;

    dedup_group_assert_scanner(g);
    g_assert(npages > 0 && npages <= DEDUP_SEGMENT_PAGES);
    if (!dedup_group_table_lock(g)) {
        return 0;
    }
    /* Once around, from where one was found last. */
    for (uint32_t n = 0; n < DEDUP_MAX_SEGMENTS && !gid;
         n += G_N_ELEMENTS(entries)) {
        uint32_t base = (g->free_hint / G_N_ELEMENTS(entries) *
                         G_N_ELEMENTS(entries) + n) % DEDUP_MAX_SEGMENTS;

        if (!dedup_group_file_read(&g->file, entries, sizeof(entries),
                                   table_offset(base))) {
            break;
        }
        for (uint32_t i = 0; i < G_N_ELEMENTS(entries); i++) {
            DedupTableEntry *e = &entries[i];

            if (!entry_valid(e, base + i)) {
                gid = entry_take(g, e, base + i, npages);
                break;
            }
        }
    }
    dedup_group_table_unlock(g);
    return gid;
}

static DedupLookup entry_read(const DedupGroup *g, uint32_t gid,
                              DedupTableEntry *e)
{
    if (gid == 0 || gid >= 1u << DEDUP_GID_BITS) {
        return DEDUP_LOOKUP_GONE;
    }
    if (!dedup_group_file_read(&g->file, e, sizeof(*e),
                               table_offset(DEDUP_GID_SLOT(gid)))) {
        return DEDUP_LOOKUP_FAILED;
    }
    return entry_valid(e, DEDUP_GID_SLOT(gid)) && e->gid == gid ?
           DEDUP_LOOKUP_FOUND : DEDUP_LOOKUP_GONE;
}

DedupLookup dedup_group_segment_lookup(DedupGroup *g, uint32_t gid,
                                       unsigned *member, unsigned *npages)
{
    DedupTableEntry e;
    DedupLookup found;

    dedup_group_assert_scanner(g);
    found = entry_read(g, gid, &e);
    if (found == DEDUP_LOOKUP_FOUND) {
        *member = e.member;
        *npages = e.npages;
    }
    return found;
}

void dedup_group_segment_release(DedupGroup *g, uint32_t gid)
{
    DedupTableEntry e;
    uint32_t slot = DEDUP_GID_SLOT(gid);

    dedup_group_assert_scanner(g);
    /* if the lock cannot be had the entry stays for the next walk */
    if (!dedup_group_table_lock(g)) {
        return;
    }
    if (entry_read(g, gid, &e) == DEDUP_LOOKUP_FOUND &&
        ((e.member == g->self && e.incarnation == g->incarnation) ||
         publisher_gone(g, &e))) {
        e.npages = 0;
        e.incarnation = 0;
        dedup_group_file_write(&g->file, &e, sizeof(e), table_offset(slot));
        g->free_hint = MIN(g->free_hint, slot);
    }
    dedup_group_table_unlock(g);
}

/* Say that our row has @rows entries now. */
static bool lengthen_row(DedupGroup *g, uint32_t rows)
{
    bool ok;

    /* who writes the slot as a whole writes this number, too */
    g_mutex_lock(&g->lock);
    ok = dedup_group_file_write(&g->file, &rows, sizeof(rows),
                                DEDUP_FILE_SLOTS +
                                g->self * sizeof(DedupSlot) +
                                offsetof(DedupSlot, rows));
    if (ok) {
        g->rows = rows;
    }
    g_mutex_unlock(&g->lock);
    return ok;
}

bool dedup_group_tell_use(DedupGroup *g, const DedupSegmentUse *use)
{
    uint32_t slot = DEDUP_GID_SLOT(use->gid);

    dedup_group_assert_scanner(g);
    g_assert(use->gid != 0 && use->gid < 1u << DEDUP_GID_BITS);
    return (slot < g->rows || lengthen_row(g, slot + 1)) &&
           dedup_group_file_write(&g->file, use, sizeof(*use),
                                  use_offset(g->self, slot));
}

bool dedup_group_clear_use(DedupGroup *g, uint32_t gid)
{
    static const DedupSegmentUse none;
    uint32_t slot = DEDUP_GID_SLOT(gid);

    dedup_group_assert_scanner(g);
    /* the place may have been taken by another segment since */
    return slot >= g->rows || !dedup_group_uses(g, g->self, gid) ||
           dedup_group_file_write(&g->file, &none, sizeof(none),
                                  use_offset(g->self, slot));
}

bool dedup_group_uses(const DedupGroup *g, unsigned member, uint32_t gid)
{
    uint32_t used;

    return dedup_group_file_read(&g->file, &used, sizeof(used),
                                 use_offset(member, DEDUP_GID_SLOT(gid)) +
                                 offsetof(DedupSegmentUse, gid)) &&
           used == gid;
}

static void use_add(DedupSegmentUse *sum, const DedupSegmentUse *use)
{
    sum->mapped += MIN(use->mapped, UINT32_MAX - sum->mapped);
    for (unsigned i = 0; i < G_N_ELEMENTS(sum->pages); i++) {
        sum->pages[i] |= use->pages[i];
    }
}

void dedup_group_others_use(DedupGroup *g, uint32_t gid,
                            DedupSegmentUse *use)
{
    DedupSegmentUse one;

    dedup_group_assert_scanner(g);
    memset(use, 0, sizeof(*use));
    use->gid = gid;
    if (dedup_group_members(g) < 2) {
        return;
    }
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        if (k != g->self && is_alive(g, k) &&
            dedup_group_file_read(&g->file, &one, sizeof(one),
                                  use_offset(k, DEDUP_GID_SLOT(gid))) &&
            one.gid == gid) {
            use_add(use, &one);
        }
    }
}

/*
 * In two walks: somebody may just have fetched it.
 */
static void release_orphans(DedupGroup *g, GArray *now)
{
    GArray *before = g->walk->orphans;
    guint i = 0, j = 0;

    while (i < before->len && j < now->len) {
        uint32_t a = g_array_index(before, uint32_t, i);
        uint32_t b = g_array_index(now, uint32_t, j);

        if (a == b) {
            dedup_group_segment_release(g, a);
        }
        /* In the order of their slots, as they were found. */
        i += DEDUP_GID_SLOT(a) <= DEDUP_GID_SLOT(b);
        j += DEDUP_GID_SLOT(b) <= DEDUP_GID_SLOT(a);
    }
    g_array_unref(before);
    g->walk->orphans = now;
}

bool dedup_group_foreach_segment(DedupGroup *g, DedupSegmentFn fn,
                                 void *opaque)
{
    uint32_t extent = table_extent(g);
    DedupTableEntry *entries = g->walk->entries;
    DedupSegmentUse *row = g->walk->row;
    DedupSegmentUse *sum = g->walk->sum;
    DedupSegmentUse *own = g->walk->own;
    DedupSlot *slots = g->walk->slots;
    GArray *orphans = g_array_new(false, false, sizeof(uint32_t));
    bool complete = true;

    dedup_group_assert_scanner(g);
    memset(g->walk->slots, 0, sizeof(g->walk->slots));
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        if (is_alive(g, k) && !dedup_group_slot_read(g, k, &slots[k])) {
            slots[k].rows = 0;
            complete = false;
        }
    }
    for (uint32_t base = 0; base < extent; base += CHUNK) {
        uint32_t n = MIN(CHUNK, extent - base);

        if (g->walk->is_stopping && g->walk->is_stopping(g->walk->opaque)) {
            complete = false;
            break;
        }
        if (!dedup_group_file_read(&g->file, entries, n * sizeof(*entries),
                                   table_offset(base))) {
            complete = false;
            continue;
        }
        memset(sum, 0, n * sizeof(*sum));
        memset(own, 0, n * sizeof(*own));
        for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
            uint32_t rows = is_alive(g, k) ? slots[k].rows : 0;
            DedupSegmentUse *into = k == g->self ? own : sum;

            rows = rows > base ? MIN(rows - base, n) : 0;
            if (rows == 0) {
                continue;
            }
            if (!dedup_group_file_read(&g->file, row, rows * sizeof(*row),
                                       use_offset(k, base))) {
                complete = false;
                continue;
            }
            for (uint32_t i = 0; i < rows; i++) {
                if (row[i].gid && row[i].gid == entries[i].gid) {
                    use_add(&into[i], &row[i]);
                }
            }
        }
        for (uint32_t i = 0; i < n; i++) {
            DedupTableEntry *e = &entries[i];
            bool gone, ours, held;

            if (!entry_valid(e, base + i)) {
                continue;
            }
            sum[i].gid = e->gid;
            own[i].gid = e->gid;
            gone = !is_alive(g, e->member) ||
                   slots[e->member].incarnation != e->incarnation;
            ours = e->member == g->self && e->incarnation == g->incarnation;
            held = fn(opaque, e->gid, e->npages, ours, &own[i], &sum[i]);
            if (sum[i].mapped == 0 && own[i].mapped == 0 &&
                (gone || (e->member == g->self && !held))) {
                g_array_append_val(orphans, e->gid);
            }
        }
    }
    if (!complete) {
        /* who uses them may be what could not be read */
        g_array_set_size(orphans, 0);
    }
    release_orphans(g, orphans);
    return complete;
}
