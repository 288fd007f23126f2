/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Restoring on somebody's behalf: a range for its owner, what has settled,
 * what is mapped to holdings that are left.  Each takes the remap lock for one
 * window at a time, so that nobody waits long.
 */

#include "host/slice.h"
#include "space/holdings.h"
#include "space/ledger.h"
#include "space/need.h"
#include "space/presence.h"
#include "space/restore.h"
#include "space/window.h"

/*
 * A private page that is restored gets a mapping of its own, so settling
 * frees maps only if many go at once.
 */
#define SETTLE_PRIVATE 16
/* How often vCPUs may not come out of the guest, before a restore ends. */
#define RESTORE_TRIES 50

/*
 * The first region with a part in [host, end) that may not be its own; NULL:
 * none.
 */
static DedupRegion *next_region(DedupSpace *space, const DedupRestore *w,
                                uint32_t *first, uint32_t *n)
{
    DedupRegion *next = NULL;
    uint32_t f, k;

    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);

        if (dedup_region_mapped(r) + r->sums.zero &&
            dedup_region_intersect(r, w->at, w->end, &f, &k) &&
            (!next || r->host < next->host)) {
            next = r;
            *first = f;
            *n = k;
        }
    }
    return next;
}

/* What one window of a restore is to do. */
typedef struct Job {
    DedupSpace *space;
    DedupRestore *w;
    DedupRegion *r;           /* out: that it was in; NULL: nothing is left */
} Job;

/* Where the walk is.  Remap lock held. */
static DedupRegion *find_next(Job *job, uint32_t *first, uint32_t *n)
{
    DedupRestore *w = job->w;
    DedupRegion *r = next_region(job->space, w, first, n);

    if (r && w->for_owner && r->abandoned) {
        w->abandoned = true;
        r = NULL;
    }
    return r;
}

/* Remap lock held. */
static void restore_next(void *opaque)
{
    Job *job = opaque;
    DedupRestore *w = job->w;
    uint32_t first, n;
    DedupRegion *r = find_next(job, &first, &n);

    job->r = r;
    if (r) {
        uint64_t before = dedup_region_mapped(r);
        uint32_t end = first + n;

        first = dedup_ledger_next(r, first, end);
        n = MIN(end - first, DEDUP_RESTORE_PAGES);
        w->left += dedup_restore_locked(r, first, n);
        w->taken += (before - dedup_region_mapped(r)) << DEDUP_PAGE_SHIFT;
        w->lacks |= r->lacks;
        r->lacks = 0;
        w->at = dedup_region_addr(r, first + n);
    }
}

/* vCPUs did not come out: is it still wanted? */
static bool is_wanted(Job *job)
{
    uint32_t first, n;
    bool wanted;

    dedup_space_lock(job->space);
    wanted = find_next(job, &first, &n);
    dedup_space_unlock(job->space);
    return wanted;
}

bool dedup_space_restore_next(DedupSpace *space, DedupRestore *w)
{
    Job job = { .space = space, .w = w };

    for (unsigned i = 0; i < RESTORE_TRIES; i++) {
        if (dedup_space_exclusively(space, restore_next, &job)) {
            return job.r;
        }
        if (!is_wanted(&job)) {
            return false;
        }
    }
    /* all that is left, of which one page is enough to say so */
    w->left++;
    w->lacks |= DEDUP_LACK_FREEZE;
    return false;
}

typedef struct Settled {
    DedupRegion *r;
    uint32_t first;
    uint32_t n;
} Settled;

static void settle(void *opaque)
{
    Settled *s = opaque;
    DedupRegion *r = s->r;
    bool broken;

    if (!r->dead && !r->space->closed && dedup_file_has_room(r) &&
        dedup_ledger_run(r, s->first, s->first + s->n, dedup_entry_is_broken,
                         &broken) == s->n && broken) {
        dedup_restore_locked(r, s->first, s->n);
    }
}

void dedup_space_settle(DedupRegion *r, uint32_t first, uint32_t n)
{
    Settled s = { .r = r, .first = first, .n = n };

    if (r->info.memory != DEDUP_MEMORY_SHARED && n < SETTLE_PRIVATE) {
        return;
    }
    dedup_slice_renew();
    /* or the next pass does it */
    if (!r->space->exclusive.fn || dedup_window_turn(r->space)) {
        dedup_space_exclusively(r->space, settle, &s);
    }
}

/*
 * May pages of the region get their own memory?  In a closed one nothing
 * would be published anew: that would take memory, and never give any.
 */
static bool may_leave(DedupSpace *space, DedupRegion *r)
{
    return !space->closed && !r->closing && dedup_file_has_room(r);
}

/* Where a walk over what is to be left is. */
typedef struct Leaving {
    DedupSpace *space;
    uint32_t at;              /* member page number */
    DedupLeaveFn is_leaving;
    void *opaque;
    DedupRegion *r;           /* out: pages of it that are to be left */
    uint32_t first;
    uint32_t n;               /* 0: none yet; go on */
} Leaving;

/* How many pages from the first on are mapped to holdings that are left? */
static uint32_t count_leaving(const Leaving *l, uint32_t first, uint32_t end)
{
    uint32_t i = first;

    while (i < end) {
        uint32_t entry = dedup_entry_at(l->r, i);

        if (!dedup_entry_is_segment(entry) ||
            !l->is_leaving(l->opaque, dedup_entry_holding(l->space, entry))) {
            break;
        }
        i++;
    }
    return i - first;
}

/* Look at some pages.  False: there are no more.  Takes the remap lock. */
static bool find_leaving(Leaving *l)
{
    uint32_t page, end;

    l->n = 0;
    dedup_space_lock(l->space);
    l->r = dedup_region_next(l->space, l->at);
    if (l->r) {
        page = dedup_ledger_next(l->r, dedup_region_at(l->r, l->at),
                                 l->r->npages);
        end = MIN(page + DEDUP_RESTORE_PAGES, l->r->npages);
        if (may_leave(l->space, l->r)) {
            for (; page < end && !l->n; page += MAX(l->n, 1)) {
                l->first = page;
                l->n = count_leaving(l, page, end);
            }
        } else {
            page = l->r->npages;
        }
        l->at = l->r->base + page;
    }
    dedup_space_unlock(l->space);
    return l->r;
}

/* Once more: the lock was not held. */
static void leave_some(void *opaque)
{
    Leaving *l = opaque;

    if (!l->r->dead && may_leave(l->space, l->r)) {
        dedup_restore_locked(l->r, l->first,
                             count_leaving(l, l->first, l->first + l->n));
    }
}

void dedup_space_leave(DedupSpace *space, DedupLeaveFn is_leaving,
                       void *opaque)
{
    Leaving l = {
        .space = space, .is_leaving = is_leaving, .opaque = opaque,
    };

    while (find_leaving(&l)) {
        if (!l.n) {
            continue;
        }
        dedup_slice_renew();
        if ((space->exclusive.fn && !dedup_window_turn(space)) ||
            !dedup_space_exclusively(space, leave_some, &l)) {
            break; /* the next pass goes on */
        }
    }
}
