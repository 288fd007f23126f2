/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The merge window: the one place where guest pages are replaced by segment
 * pages, or dropped because they are zero.
 *
 * A window covers at most DEDUP_WINDOW_PAGES pages of one region and goes
 * through these stages; the remap lock is held from the first to the last:
 *
 *   admit     own or broken? present? not pinned?  is there room for the maps?
 *             Takes pages from KSM (ksm.c).  Touches the segment's pages, so
 *             that they are mapped.
 *   freeze    from here on no store can pass; a writer waits.
 *   judge     pins again (a pin taken before the freeze bypasses it), then
 *             the byte compare: the only judge (I1).  Are they protected
 *             still, in spite of KSM?
 *   flush     one call takes all the pages to be replaced out of the page
 *             table, so that one TLB flush serves the window.
 *   map       private mappings of the segment, whole runs at a time; zero
 *             pages are dropped; madvise() flags re-applied.
 *   thaw      always, and everybody is woken (I3).
 *   enter     the ledger.
 *   punch     the replaced pages leave the region's own file (I4), but for
 *             those that a reader has come to hold (punch.c).
 *
 *   split     what is left of a huge page, so that what was taken out of it
 *             goes back to the host.
 *
 * A huge page is frozen as a whole, and judged before anything is taken out of
 * it: until then it is one entry of the page table.  How many pages a window
 * replaces depends on how long writers may wait (bound.h); if there are more,
 * the next one sees small pages.
 *
 * From the freeze on it is frozen.c's.
 */

#include <string.h>
#include <sys/mman.h>

#include "host/mutant.h"
#include "host/slice.h"
#include "space/holdings.h"
#include "space/ksm.h"
#include "space/maps.h"
#include "space/presence.h"
#include "space/split.h"
#include "space/window.h"

/* May this action still be done?  Touches the segment's page if so. */
static bool admit(const DedupRegion *r, DedupAction *a, uint8_t flags)
{
    uint32_t entry = dedup_entry_at(r, a->page);

    if (!a->holding && entry == DEDUP_ZERO) {
        a->done = true; /* when its huge page was split */
    }
    if (!dedup_entry_is_private(entry)) {
        return false;
    }
    if (!(flags & DEDUP_PRESENT)) {
        return false; /* went away since it was hashed */
    }
    if (!a->holding && r->info.memory == DEDUP_MEMORY_ANON &&
        !r->space->freezer.zero_anon) {
        return false; /* a store might get past the freeze */
    }
    if ((flags & DEDUP_HUGE) && !r->space->split_huge) {
        return false;
    }
    if (dedup_region_held(r, a->page)) {
        return false;
    }
    if (a->holding && !a->holding->zeroes &&
        !dedup_page_touch(dedup_segment_page(a->holding->segment,
                                             a->index))) {
        a->differs = true; /* it is broken, and equal to none */
        return false;
    }
    return true;
}

/* What a window is made of. */
typedef struct Plan {
    uint32_t first;           /* page of the first action */
    uint32_t span;
    uint8_t flags[DEDUP_WINDOW_PAGES];  /* presence, from @first on */
    bool is_huge;             /* part of a huge page is to be replaced */
} Plan;

static void admit_all(DedupWindow *w, const Plan *p, DedupAction *actions,
                      unsigned n)
{
    w->nadmitted = 0;
    for (unsigned i = 0; i < n; i++) {
        if (admit(w->r, &actions[i], p->flags[actions[i].page - p->first])) {
            w->admitted[w->nadmitted++] = &actions[i];
        }
    }
}

/*
 * Freeze what there is between the first action and the last one; and of a huge
 * page all, or the kernel would split it first.
 */
static void choose_range(DedupWindow *w, Plan *p)
{
    uint32_t last = w->admitted[w->nadmitted - 1]->page;

    w->first = w->admitted[0]->page;
    for (unsigned i = 0; i < w->nadmitted; i++) {
        p->is_huge |= p->flags[w->admitted[i]->page - p->first] & DEDUP_HUGE;
    }
    if (p->is_huge) {
        dedup_huge_range(w->r, w->first, &w->first, &last);
    }
    w->span = last - w->first + 1;
}

/*
 * How many of the actions the next window is to do: what lies within one huge
 * page, whether it is huge or not, takes no longer than it may, and has nothing
 * in between that cannot be frozen.
 */
static unsigned choose_actions(const DedupRegion *r,
                               const DedupAction *actions, unsigned n)
{
    unsigned most = MIN(n, dedup_bound_pages(&r->space->bound));
    uint32_t first, last;
    unsigned i = 1;

    dedup_huge_range(r, actions[0].page, &first, &last);
    last = MIN(last, actions[0].page - 1 +
               MAX(dedup_region_freezable(r, actions[0].page,
                                          last + 1 - actions[0].page), 1));
    while (i < most && actions[i].page <= last) {
        i++;
    }
    return i;
}

/* One window, and what has to be done before and after it. */
static void do_window(DedupRegion *r, DedupAction *actions, unsigned n,
                      unsigned *limits)
{
    Plan p = { .first = actions[0].page };
    DedupWindow w = { .r = r };

    p.span = actions[n - 1].page - p.first + 1;
    g_assert(p.span <= DEDUP_WINDOW_PAGES);
    g_assert(actions[n - 1].page < r->npages);
    if (!dedup_presence(r, p.first, p.span, p.flags)) {
        return;
    }
    admit_all(&w, &p, actions, n);
    if (!w.nadmitted ||
        !dedup_maps_admit(r, w.admitted, &w.nadmitted, limits)) {
        return;
    }
    /* the kernel's KSM must not open what is frozen: ksm.c */
    w.nadmitted = dedup_ksm_take_pages(r, w.admitted, w.nadmitted, limits);
    if (w.nadmitted) {
        dedup_forbid_huge(r, w.admitted, w.nadmitted);
        choose_range(&w, &p);
        if (!p.is_huge) {
            dedup_split_mapped(r, w.admitted[0]->page);
        }
        dedup_window_run(&w, limits);
        dedup_ksm_replaced(r, actions, n);
        if (p.is_huge && w.nruns) {
            dedup_split_huge(r, w.admitted[0]->page);
        }
    }
}

bool dedup_window_turn(DedupSpace *space)
{
    int64_t wait_us, now;

    for (;;) {
        now = dedup_slice_renew();
        wait_us = MAX(dedup_quota_wait_us(&space->quota, now),
                      dedup_exclusive_wait_us(&space->exclusive, now));
        if (!wait_us) {
            return true;
        }
        if (!space->lock.pause || !space->lock.pause(space->owner, wait_us)) {
            return false;
        }
        /* what was known may have changed meanwhile */
        dedup_forget_looks(&space->looks);
    }
}

/* What is to be done, of which a window does the first part. */
typedef struct Job {
    DedupRegion *r;
    DedupAction *actions;
    unsigned n;
    unsigned *limits;
} Job;

/* Sets @n to how many were tried.  Remap lock held. */
static void next_window(void *opaque)
{
    Job *job = opaque;
    DedupRegion *r = job->r;
    DedupSpace *space = r->space;

    job->n = choose_actions(r, job->actions, job->n);
    for (unsigned k = 0; k < job->n; k++) {
        job->actions[k].tried = true;
    }
    if (!r->dead && !dedup_file_has_room(r)) {
        *job->limits |= DEDUP_LIMIT_FILE;
    } else if (!r->dead && !r->closing && !space->closed &&
               !dedup_freezer_is_lost(&space->freezer)) {
        space->is_tidy = false;
        do_window(r, job->actions, job->n, job->limits);
    }
}

unsigned dedup_space_windows(DedupRegion *r, DedupAction *actions, unsigned n,
                             unsigned *limits)
{
    DedupSpace *space = r->space;
    unsigned done = 0;

    for (unsigned i = 0; i < n; i++) {
        actions[i].done = actions[i].differs = actions[i].tried = false;
    }
    for (unsigned i = 0; i < n && dedup_window_turn(space); ) {
        Job job = {
            .r = r, .actions = actions + i, .n = n - i, .limits = limits,
        };

        if (!dedup_space_exclusively(space, next_window, &job)) {
            break; /* what is left is tried another time */
        }
        i += job.n;
    }
    for (unsigned i = 0; i < n; i++) {
        done += actions[i].done;
    }
    return done;
}
