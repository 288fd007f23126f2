/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Consistency of the ledger; see check.h.  Nothing but builds with mutants has
 * it.
 */

#include "space/check.h"
#include "space/holdings.h"
#include "space/ledger.h"

#ifdef CONFIG_DEDUP_MUTANTS

/* Regions of so many pages in all are looked at each time. */
#define SMALL_PAGES 1024
/* Larger ones once in so many times that there are pages, and of this. */
#define SHARE 2

typedef struct Sums {
    DedupRegionSums region;
    DedupSpaceSums space;
    uint32_t *refs;           /* by number of a holding */
    uint32_t *mapped;
    uint32_t *ends;
} Sums;

static void same(const char *what, uint64_t said, uint64_t is)
{
    if (said != is) {
        g_error("the ledger is wrong: %s is %" G_GUINT64_FORMAT ", not %"
                G_GUINT64_FORMAT, what, is, said);
    }
}

static void count_entry(const DedupSpace *space, Sums *s, uint32_t entry)
{
    const DedupHolding *h;

    if (entry == DEDUP_ZERO) {
        s->region.zero++;
    }
    if (!dedup_entry_is_segment(entry)) {
        return;
    }
    h = g_ptr_array_index(space->holdings.table, dedup_entry_no(entry));
    g_assert(h && dedup_entry_page(entry) < DEDUP_SEGMENT_PAGES);
    s->refs[h->no]++;
    if (entry & DEDUP_BROKEN) {
        s->region.broken++;
    } else if (h->zeroes) {
        s->region.zero_mapped++;
    } else {
        s->region.merged++;
        s->mapped[h->no]++;
    }
}

/* Two neighbours: what count_boundary() of the ledger says. */
static void count_between(const DedupRegion *r, Sums *s, uint32_t a,
                          uint32_t b)
{
    if (!dedup_ledger_is_boundary(r, a, b)) {
        return;
    }
    s->region.boundaries++;
    if (dedup_entry_is_segment(a)) {
        s->ends[dedup_entry_no(a)] += dedup_entry_is_segment(b) ? 1 : 2;
    }
    if (dedup_entry_is_segment(b)) {
        s->ends[dedup_entry_no(b)] += dedup_entry_is_segment(a) ? 1 : 2;
    }
}

static void check_region(DedupSpace *space, const DedupRegion *r, Sums *s)
{
    DedupRegionSums *sums = &s->region;

    *sums = (DedupRegionSums) { 0 };
    for (uint32_t c = 0; c < dedup_region_chunks(r); c++) {
        uint32_t first = c * DEDUP_CHUNK_PAGES;
        uint32_t end = MIN(first + DEDUP_CHUNK_PAGES, r->npages);
        unsigned taken = 0, mapped = 0;

        for (uint32_t p = first; r->chunk[c].taken && p < end; p++) {
            taken += r->entry[p] != DEDUP_OWN;
            mapped += dedup_entry_is_segment(r->entry[p]);
            count_entry(space, s, r->entry[p]);
            if (p > 0) {
                count_between(r, s, dedup_entry_at(r, p - 1), r->entry[p]);
            }
        }
        if (!r->chunk[c].taken && first) {
            /* all of it is own: where the one before ends */
            count_between(r, s, dedup_entry_at(r, first - 1), DEDUP_OWN);
        }
        same("taken of a chunk", r->chunk[c].taken, taken);
        same("mapped of a chunk", r->chunk[c].mapped, mapped);
        sums->own += r->chunk[c].own;
    }
    same("merged", r->sums.merged, sums->merged);
    same("broken", r->sums.broken, sums->broken);
    same("zero", r->sums.zero, sums->zero);
    same("zero_mapped", r->sums.zero_mapped, sums->zero_mapped);
    same("own", r->sums.own, sums->own);
    same("boundaries", r->sums.boundaries, sums->boundaries);
    if (!r->dead) {
        s->space.merged += sums->merged;
        s->space.broken += sums->broken;
        s->space.zero += sums->zero;
        s->space.zero_mapped += sums->zero_mapped;
        s->space.own += sums->own;
        s->space.total += r->npages;
    }
}

static void check_holdings(const DedupSpace *space, const Sums *s)
{
    for (unsigned i = 0; i < space->holdings.table->len; i++) {
        const DedupHolding *h = g_ptr_array_index(space->holdings.table, i);
        uint64_t use = 0;

        for (unsigned p = 0; h && p < DEDUP_SEGMENT_PAGES; p++) {
            use += h->use[p];
        }
        if (h) {
            same("refs of a holding", h->refs, s->refs[i]);
            same("mapped of a holding", h->mapped, s->mapped[i]);
            same("use of a holding", use, s->mapped[i]);
            same("ends of a holding", h->ends, s->ends[i]);
        }
    }
}

static void check_all(DedupSpace *space)
{
    unsigned n = space->holdings.table->len;
    Sums s = {
        .refs = g_new0(uint32_t, n + 1), .mapped = g_new0(uint32_t, n + 1),
        .ends = g_new0(uint32_t, n + 1),
    };

    for (unsigned i = 0; i < space->regions->len; i++) {
        check_region(space, g_ptr_array_index(space->regions, i), &s);
    }
    for (unsigned i = 0; i < space->dead->len; i++) {
        check_region(space, g_ptr_array_index(space->dead, i), &s);
    }
    check_holdings(space, &s);
    same("merged of all", space->sums.merged, s.space.merged);
    same("broken of all", space->sums.broken, s.space.broken);
    same("zero of all", space->sums.zero, s.space.zero);
    same("zero_mapped of all", space->sums.zero_mapped, s.space.zero_mapped);
    same("own of all", space->sums.own, s.space.own);
    same("total", space->sums.total, s.space.total);
    g_free(s.refs);
    g_free(s.mapped);
    g_free(s.ends);
}

void dedup_space_check(DedupSpace *space)
{
    uint64_t total = space->sums.total;

    if (total <= SMALL_PAGES || ++space->unchecked >= total / SHARE) {
        space->unchecked = 0;
        check_all(space);
    }
}

#endif /* CONFIG_DEDUP_MUTANTS */
