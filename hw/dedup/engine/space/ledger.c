/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The ledger: what this process has merged.
 *
 * One 32-bit entry per page says which segment page is mapped there (see
 * ledger.h).  All sums that the figures and the budget need follow from
 * changes of entries and are kept here, in one function, so that no path can
 * forget one: pages per state, users per segment and per segment page, and
 * the number of mappings.
 *
 * Everything here needs the remap lock; the sums of regions and holdings are
 * written atomically because figures and scan/ read them without it.
 */

#include <sys/mman.h>

#include "host/mutant.h"
#include "host/sys.h"
#include "space/holdings.h"
#include "space/ledger.h"

static void add(uint64_t *sum, int64_t delta)
{
    __atomic_fetch_add(sum, delta, __ATOMIC_RELAXED);
}

/* Sums of the space: those of a region that is gone were taken off at once. */
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

bool dedup_ledger_is_boundary(const DedupRegion *r, uint32_t a, uint32_t b)
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
    return a != b && r->info.memory == DEDUP_MEMORY_PRIVATE_FILE;
}

DedupHolding *dedup_entry_holding(DedupSpace *space, uint32_t entry)
{
    return g_ptr_array_index(space->holdings.table, dedup_entry_no(entry));
}

static DedupHolding *holding_of(const DedupRegion *r, uint32_t entry)
{
    return dedup_entry_holding(r->space, entry);
}

/*
 * Two neighbours, and the boundary that may be between them.  It is an end of
 * a map of a segment: of both, or twice of the one that there is.
 */
static void count_boundary(DedupRegion *r, uint32_t a, uint32_t b, int sign)
{
    bool a_segment = dedup_entry_is_segment(a);
    bool b_segment = dedup_entry_is_segment(b);

    if (!dedup_ledger_is_boundary(r, a, b)) {
        return;
    }
    add(&r->sums.boundaries, sign);
    if (a_segment) {
        add32(&holding_of(r, a)->ends,
              b_segment ? sign : 2 * sign);
    }
    if (b_segment) {
        add32(&holding_of(r, b)->ends,
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
    DedupHolding *h;

    if (entry == DEDUP_OWN) {
        return;
    }
    if (entry == DEDUP_ZERO) {
        add(&r->sums.zero, sign);
        add_all(r, &r->space->sums.zero, sign);
        return;
    }
    h = holding_of(r, entry);
    add32(&h->refs, sign);
    if (entry & DEDUP_BROKEN) {
        add(&r->sums.broken, DEDUP_MUTANT(SUM_OFF) && sign < 0 ? 0 : sign);
        add_all(r, &r->space->sums.broken, sign);
        return;
    }
    if (h->zeroes) {
        add(&r->sums.zero_mapped, sign);
        add_all(r, &r->space->sums.zero_mapped, sign);
        return;
    }
    add(&r->sums.merged, sign);
    add_all(r, &r->space->sums.merged, sign);
    __atomic_store_n(&h->dirty, true, __ATOMIC_RELAXED);
    add32(&h->mapped, sign);
    add32(&h->use[dedup_entry_page(entry)], sign);
}

/* Nothing is in the ledger around a chunk any more: nor is there memory. */
static void give_back(DedupRegion *r, uint32_t chunk)
{
    const uint32_t per_page = DEDUP_PAGE_SIZE / sizeof(r->entry[0]);
    const uint32_t chunks = per_page / DEDUP_CHUNK_PAGES;
    uint32_t first = chunk - chunk % chunks;
    uint32_t end = MIN(first + chunks, dedup_region_chunks(r));

    for (uint32_t c = first; c < end; c++) {
        if (r->chunk[c].taken) {
            return;
        }
    }
    /* all of it is zero: if it stays, it stays right */
    sys_madvise(r->entry + (size_t)first * DEDUP_CHUNK_PAGES, DEDUP_PAGE_SIZE,
                MADV_DONTNEED);
}

static void store(DedupRegion *r, uint32_t page, uint32_t entry)
{
    uint32_t chunk = page / DEDUP_CHUNK_PAGES;
    uint32_t before = r->entry[page];

    r->entry[page] = entry;
    r->chunk[chunk].taken += (entry != DEDUP_OWN) - (before != DEDUP_OWN);
    r->chunk[chunk].mapped += dedup_entry_is_segment(entry) -
                             dedup_entry_is_segment(before);
    if (!r->chunk[chunk].taken) {
        give_back(r, chunk);
    }
}

/*
 * The guest may have made a page present, or lost one, since its chunk was
 * looked at: the count is never less than nothing.
 */
static void add_own(DedupRegion *r, uint32_t chunk, int delta)
{
    int own = r->chunk[chunk].own;

    delta = CLAMP(own + delta, 0, DEDUP_CHUNK_PAGES) - own;
    if (delta) {
        r->chunk[chunk].own = own + delta;
        add(&r->sums.own, delta);
        add_all(r, &r->space->sums.own, delta);
    }
}

void dedup_ledger_own(DedupRegion *r, uint32_t chunk, uint32_t own)
{
    add_own(r, chunk, (int)own - r->chunk[chunk].own);
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

/*
 * An own page may be a hole: whoever makes one own says which
 * (dedup_ledger_absent()), and who takes one (a window) has seen that it is
 * there.
 */
void dedup_ledger_set(DedupRegion *r, uint32_t page, uint32_t entry)
{
    uint32_t old = dedup_entry_at(r, page);

    dedup_space_assert_locked(r->space);
    add_own(r, page / DEDUP_CHUNK_PAGES,
            dedup_entry_is_private(entry) - dedup_entry_is_private(old));
    change(r, page, entry, old);
}

void dedup_ledger_absent(DedupRegion *r, uint32_t page)
{
    uint32_t old = dedup_entry_at(r, page);

    dedup_space_assert_locked(r->space);
    add_own(r, page / DEDUP_CHUNK_PAGES, -dedup_entry_is_private(old));
    change(r, page, DEDUP_OWN, old);
    /* what is known of it, from when it was there, counts no more */
    r->space->lock.strangers++;
}

uint32_t dedup_ledger_next(const DedupRegion *r, uint32_t page, uint32_t end)
{
    if (!(dedup_region_mapped(r) + r->sums.zero)) {
        return end;
    }
    while (page < end && dedup_entry_at(r, page) == DEDUP_OWN) {
        page += r->chunk[page / DEDUP_CHUNK_PAGES].taken ? 1 :
                DEDUP_CHUNK_PAGES - page % DEDUP_CHUNK_PAGES;
    }
    return MIN(page, end);
}

uint32_t dedup_ledger_run(const DedupRegion *r, uint32_t page, uint32_t end,
                          bool (*is)(uint32_t entry), bool *answer)
{
    uint32_t next = page + 1;

    *answer = is(dedup_entry_at(r, page));
    while (next < end && is(dedup_entry_at(r, next)) == *answer) {
        next++;
    }
    return next - page;
}

uint64_t dedup_ledger_maps(DedupSpace *space)
{
    uint64_t n = space->holdings.held;

    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);

        n += r->sums.boundaries;
    }
    return n;
}
