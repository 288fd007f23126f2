/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How much a window may do at a time; see bound.h.
 */

#include <glib.h>

#include "host/types.h"
#include "space/bound.h"

/* Nothing is known yet of what a page takes. */
#define PAGE_NS 4000
/* A window of all of a huge page, on a slow machine. */
#define MOST_NS (20 * DEDUP_BOUND_NS)
#define LEAST_PAGES 8
/* A new figure counts as one of so many. */
#define WEIGHT 8
/* Windows stay short for so long after a writer was met. */
#define CAREFUL_NS (10 * INT64_C(1000000000))
/* Then each may be longer than the one before by one part in so many. */
#define GROWTH 4

unsigned dedup_bound_pages(const DedupBound *b)
{
    int64_t may_take = MAX(b->may_take_ns, DEDUP_BOUND_NS);
    int64_t page = b->page_ns ? b->page_ns : PAGE_NS;

    return CLAMP(may_take / page, LEAST_PAGES, DEDUP_WINDOW_PAGES);
}

void dedup_bound_note(DedupBound *b, unsigned pages, int64_t start_ns,
                      int64_t now_ns, bool met)
{
    int64_t took = now_ns - start_ns;

    if (pages) {
        int64_t page = MAX(took / pages, 1);

        /* what was preempted says little: a page takes no longer for that */
        page = b->page_ns ? MIN(page, 4 * b->page_ns) : page;
        b->page_ns += b->page_ns ? (page - b->page_ns) / WEIGHT : page;
    }
    if (met) {
        b->met_ns = now_ns;
        b->may_take_ns = DEDUP_BOUND_NS;
    } else if (!b->met_ns || now_ns - b->met_ns > CAREFUL_NS) {
        b->may_take_ns = MAX(b->may_take_ns, DEDUP_BOUND_NS);
        b->may_take_ns = MIN(b->may_take_ns + b->may_take_ns / GROWTH,
                             MOST_NS);
    }
}

void dedup_bound_took(DedupBound *b, int64_t ns)
{
    int64_t max = __atomic_load_n(&b->longest_ns, __ATOMIC_RELAXED);

    while (ns > max &&
           !__atomic_compare_exchange_n(&b->longest_ns, &max, ns, true,
                                        __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
        ;
    }
}
