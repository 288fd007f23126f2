/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The ledger: what this process has merged.
 *
 * One 32-bit entry per page says which segment page is mapped there (see
 * internal.h).  All sums that the figures and the budget need follow from
 * changes of entries and are kept here, in one function, so that no path can
 * forget one: pages per state, users per segment and per segment page, and
 * the number of mappings.
 *
 * A segment is dropped only when no entry refers to it; entries leave the
 * segment only after its mapping is gone.  So whatever number is read from
 * an entry is a segment that exists.
 *
 * Everything here needs the remap lock; the sums of regions and segments are
 * written atomically because figures and policy read them without it.
 */

#include <sys/mman.h>

#include "internal.h"

static void add(uint64_t *sum, int64_t delta)
{
    __atomic_fetch_add(sum, delta, __ATOMIC_RELAXED);
}

/* Sums of the engine: those of a region that is gone were taken off at once. */
static void add_all(const DedupRegion *r, uint64_t *sum, int64_t delta)
{
    if (!r->dead) {
        add(sum, delta);
    }
}

static void add32(uint32_t *sum, int delta)
{
    __atomic_fetch_add(sum, delta, __ATOMIC_RELAXED);
}

/*
 * Does a mapping end between two neighbours?  Own pages share the region's
 * mapping, and so do dropped pages, unless the region is a private file:
 * there they are anonymous memory.  Segment pages share one where they
 * follow each other.
 */
static bool is_boundary(const DedupRegion *r, uint32_t a, uint32_t b)
{
    bool a_segment = dedup_entry_is_segment(a);
    bool b_segment = dedup_entry_is_segment(b);

    if (a_segment != b_segment) {
        return true;
    }
    if (a_segment) {
        return (a & ~DEDUP_BROKEN) + 1 != (b & ~DEDUP_BROKEN) ||
               dedup_entry_no(a) != dedup_entry_no(b);
    }
    return a != b && r->memory == DEDUP_MEMORY_PRIVATE_FILE;
}

/*
 * Two neighbours, and the boundary that may be between them.  It is an end of
 * a map of a segment: of both, or twice of the one that there is.
 */
static void count_boundary(DedupRegion *r, uint32_t a, uint32_t b, int sign)
{
    bool a_segment = dedup_entry_is_segment(a);
    bool b_segment = dedup_entry_is_segment(b);

    if (!is_boundary(r, a, b)) {
        return;
    }
    add(&r->boundaries, sign);
    if (a_segment) {
        add32(&dedup_entry_segment(r->engine, a)->ends,
              b_segment ? sign : 2 * sign);
    }
    if (b_segment) {
        add32(&dedup_entry_segment(r->engine, b)->ends,
              a_segment ? sign : 2 * sign);
    }
}

/* The boundaries around a page that is, or is to be, in that state. */
static void count_boundaries(DedupRegion *r, uint32_t page, uint32_t entry,
                             int sign)
{
    if (page > 0) {
        count_boundary(r, dedup_entry_at(r, page - 1), entry, sign);
    }
    if (page + 1 < r->npages) {
        count_boundary(r, entry, dedup_entry_at(r, page + 1), sign);
    }
}

static void account(DedupRegion *r, uint32_t entry, int sign)
{
    DedupSegment *s;

    if (entry == DEDUP_OWN) {
        return;
    }
    if (entry == DEDUP_ZERO) {
        add(&r->zero, sign);
        add_all(r, &r->engine->zero, sign);
        return;
    }
    s = dedup_entry_segment(r->engine, entry);
    add32(&s->refs, sign);
    if (entry & DEDUP_BROKEN) {
        add(&r->broken, sign);
        add_all(r, &r->engine->broken, sign);
        return;
    }
    if (s->zeroes) {
        add(&r->zero_mapped, sign);
        add_all(r, &r->engine->zero_mapped, sign);
        return;
    }
    add(&r->merged, sign);
    add_all(r, &r->engine->merged, sign);
    __atomic_store_n(&s->dirty, true, __ATOMIC_RELAXED);
    add32(&s->mapped, sign);
    add32(&s->use[dedup_entry_page(entry)], sign);
}

/*
 * Does a page in this state have memory of its own?  An own page may be a
 * hole: whoever makes one own says which (dedup_ledger_absent()), and who
 * takes one (a window) has seen that it is there.
 */
static bool has_memory(uint32_t entry)
{
    return entry == DEDUP_OWN ||
           (dedup_entry_is_segment(entry) && (entry & DEDUP_BROKEN));
}

/* Nothing is in the ledger around a chunk any more: nor is there memory. */
static void give_back(DedupRegion *r, uint32_t chunk)
{
    const uint32_t per_page = DEDUP_PAGE_SIZE / sizeof(r->entry[0]);
    const uint32_t chunks = per_page / DEDUP_CHUNK_PAGES;
    uint32_t first = chunk - chunk % chunks;
    uint32_t end = MIN(first + chunks, dedup_region_chunks(r));

    for (uint32_t c = first; c < end; c++) {
        if (r->sums[c].taken) {
            return;
        }
    }
    /* all of it is zero: if it stays, it stays right */
    madvise(r->entry + (size_t)first * DEDUP_CHUNK_PAGES, DEDUP_PAGE_SIZE,
            MADV_DONTNEED);
}

static void store(DedupRegion *r, uint32_t page, uint32_t entry)
{
    uint32_t chunk = page / DEDUP_CHUNK_PAGES;
    uint32_t before = r->entry[page];

    r->entry[page] = entry;
    r->sums[chunk].taken += (entry != DEDUP_OWN) - (before != DEDUP_OWN);
    r->sums[chunk].mapped += dedup_entry_is_segment(entry) -
                             dedup_entry_is_segment(before);
    if (!r->sums[chunk].taken) {
        give_back(r, chunk);
    }
}

/*
 * The guest may have made a page present, or lost one, since its chunk was
 * looked at: the count is never less than nothing.
 */
static void add_own(DedupRegion *r, uint32_t chunk, int delta)
{
    int own = r->sums[chunk].own;

    delta = CLAMP(own + delta, 0, DEDUP_CHUNK_PAGES) - own;
    if (delta) {
        r->sums[chunk].own = own + delta;
        add(&r->own, delta);
        add_all(r, &r->engine->own_present, delta);
    }
}

void dedup_ledger_own(DedupRegion *r, uint32_t chunk, uint32_t own)
{
    add_own(r, chunk, (int)own - r->sums[chunk].own);
}

static void change(DedupRegion *r, uint32_t page, uint32_t entry,
                   uint32_t old)
{
    if (old == entry) {
        return;
    }
    count_boundaries(r, page, old, -1);
    count_boundaries(r, page, entry, 1);
    /* in this order: the users of a segment that stays never are 0 */
    account(r, entry, 1);
    account(r, old, -1);
    store(r, page, entry);
}

void dedup_ledger_set(DedupRegion *r, uint32_t page, uint32_t entry)
{
    uint32_t old = dedup_entry_at(r, page);

    add_own(r, page / DEDUP_CHUNK_PAGES, has_memory(entry) - has_memory(old));
    change(r, page, entry, old);
}

void dedup_ledger_absent(DedupRegion *r, uint32_t page)
{
    uint32_t old = dedup_entry_at(r, page);

    add_own(r, page / DEDUP_CHUNK_PAGES, -has_memory(old));
    change(r, page, DEDUP_OWN, old);
}

uint32_t dedup_ledger_next(const DedupRegion *r, uint32_t page, uint32_t end)
{
    if (!(r->merged + r->broken + r->zero + r->zero_mapped)) {
        return end;
    }
    while (page < end && dedup_entry_at(r, page) == DEDUP_OWN) {
        page += r->sums[page / DEDUP_CHUNK_PAGES].taken ? 1 :
                DEDUP_CHUNK_PAGES - page % DEDUP_CHUNK_PAGES;
    }
    return MIN(page, end);
}

uint64_t dedup_ledger_maps(DedupEngine *e)
{
    uint64_t n = e->segments_held;

    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        n += r->boundaries;
    }
    return n;
}

void dedup_segments_add(DedupEngine *e, DedupSegment *s)
{
    unsigned no;

    for (no = e->segment_hint; no < e->segments->len; no++) {
        if (!g_ptr_array_index(e->segments, no)) {
            break;
        }
    }
    if (no == e->segments->len) {
        g_ptr_array_add(e->segments, s);
    } else {
        g_ptr_array_index(e->segments, no) = s;
    }
    s->no = no;
    e->segment_hint = no + 1;
    e->segments_held += !s->zeroes;
    if (s->gid) {
        g_hash_table_insert(e->by_gid, GUINT_TO_POINTER(s->gid), s);
    }
}

void dedup_segments_drop(DedupEngine *e, DedupSegment *s)
{
    g_assert(s->refs == 0);
    g_ptr_array_index(e->segments, s->no) = NULL;
    e->segment_hint = MIN(e->segment_hint, s->no);
    e->segments_held -= !s->zeroes;
    g_hash_table_remove(e->by_gid, GUINT_TO_POINTER(s->gid));
    dedup_segment_free(s);
}

DedupSegment *dedup_segments_find(DedupEngine *e, uint32_t gid)
{
    return g_hash_table_lookup(e->by_gid, GUINT_TO_POINTER(gid));
}

DedupSegment *dedup_entry_segment(DedupEngine *e, uint32_t entry)
{
    return g_ptr_array_index(e->segments, dedup_entry_no(entry));
}
