/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The merge window: the one place where guest pages are replaced by segment
 * pages, or dropped because they are zero.
 *
 * A window covers at most DEDUP_WINDOW_PAGES pages of one region and goes
 * through these stages; the remap lock is held from the first to the last:
 *
 *   admit     own or broken? present? not pinned? equal at a first look? is
 *             there room for the maps?  Splits huge pages, takes pages
 *             from KSM (ksm.c).  Touches the guest's and the segment's pages,
 *             so that they are resident.
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
 * Between freeze and thaw nothing is allocated, locked or called that could
 * wait for a thread of this process (I11): such a thread may itself wait in
 * the frozen range.
 *
 * What the flush does depends on the memory.  A shared page stays in its
 * file: until the new map stands, a reader finds it there again (and a
 * writer finds the write protection, which survives in the page table).  An
 * anonymous page is gone: so there the range is first registered for missing
 * faults too, and a reader waits as well.  If then the mapping fails, the page
 * is filled again from the segment, which has the same bytes (spare.h).
 */

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "host/clock.h"
#include "host/mutant.h"
#include "space/holdings.h"
#include "space/ksm.h"
#include "space/ledger.h"
#include "space/maps.h"
#include "space/own.h"
#include "space/presence.h"
#include "space/punch.h"
#include "space/split.h"

/* Pages that follow each other here and in the segment. */
typedef struct Run {
    uint32_t page;
    uint32_t n;
    DedupHolding *holding;    /* NULL: zero pages */
    uint16_t index;
    bool own;                 /* the pages were own, not broken */
    bool mapped;              /* out: the replacement stands */
    bool refilled;            /* out: it does not, own memory does */
} Run;

typedef struct Window {
    DedupRegion *r;
    uint32_t first;
    uint32_t span;
    uint8_t flags[DEDUP_WINDOW_PAGES];
    DedupAction *admitted[DEDUP_WINDOW_PAGES];
    unsigned nadmitted;
    Run runs[DEDUP_WINDOW_PAGES];
    unsigned nruns;
    bool may_drop;            /* pages: there is memory to put them back */
} Window;

static bool is_broken(const DedupRegion *r, uint32_t page)
{
    return dedup_entry_is_broken(dedup_entry_at(r, page));
}

static const void *segment_page(const DedupAction *a)
{
    return dedup_segment_page(a->holding->segment, a->index);
}

static bool content_fits(const DedupRegion *r, const DedupAction *a)
{
    const void *page = dedup_region_addr(r, a->page);

    /* the segment of zeros gets memory where it is read */
    return a->holding && !a->holding->zeroes ?
           dedup_page_equal(page, segment_page(a)) : dedup_page_is_zero(page);
}

/* May this action still be done?  Touches both pages if so. */
static bool admit(const Window *w, DedupAction *a)
{
    const DedupRegion *r = w->r;
    uint32_t entry = dedup_entry_at(r, a->page);
    uint8_t flags = w->flags[a->page - w->first];

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
    if (DEDUP_MUTANT(TRUST_HASH)) {
        dedup_page_touch(dedup_region_addr(r, a->page));
        return true;
    }
    /*
     * A first look: saves windows that would come to nothing.  All bytes
     * would cost as much as the judge, who looks at them anyway.
     */
    return a->holding && !a->holding->zeroes ?
           dedup_page_similar(dedup_region_addr(r, a->page),
                              segment_page(a)) : content_fits(r, a);
}

static bool continues(const Run *run, const DedupRegion *r,
                      const DedupAction *a)
{
    return run->page + run->n == a->page && run->holding == a->holding &&
           (!a->holding || run->index + run->n == a->index) &&
           run->own == !is_broken(r, a->page);
}

static void add_to_runs(Window *w, const DedupAction *a)
{
    Run *run = w->nruns ? &w->runs[w->nruns - 1] : NULL;

    if (run && continues(run, w->r, a)) {
        run->n++;
        return;
    }
    w->runs[w->nruns++] = (Run) {
        .page = a->page,
        .n = 1,
        .holding = a->holding,
        .index = a->index,
        .own = !is_broken(w->r, a->page),
    };
}

/* Split huge pages; what is to be done is then admitted anew. */
static bool split_huge(Window *w)
{
    unsigned kept;

    if (!dedup_split_huge(w->r, w->admitted, w->nadmitted, w->first,
                          w->flags)) {
        return true;
    }
    if (!dedup_presence(w->r, w->first, w->span, w->flags)) {
        return false;
    }
    kept = 0;
    for (unsigned i = 0; i < w->nadmitted; i++) {
        DedupAction *a = w->admitted[i];

        /* one that is pinned or locked stays huge: in another pass maybe */
        if (!(w->flags[a->page - w->first] & DEDUP_HUGE) && admit(w, a)) {
            w->admitted[kept++] = a;
        }
    }
    w->nadmitted = kept;
    return kept > 0;
}

/* The kernel's KSM must not open what is frozen: ksm.c. */
static bool take_from_ksm(Window *w, unsigned *limits)
{
    w->nadmitted = dedup_ksm_take_pages(w->r, w->admitted, w->nadmitted,
                                        limits);
    return w->nadmitted > 0;
}

/* ---- inside the frozen range: see (I11) above ---- */

/*
 * Nobody has stored to a page that was compared.  Otherwise KSM is at work
 * here, and nothing is done this time.
 */
static bool is_still_frozen(const Window *w)
{
    bool which[DEDUP_WINDOW_PAGES] = { false };
    bool any = false;

    for (unsigned i = 0; i < w->nruns; i++) {
        const Run *run = &w->runs[i];

        if (w->r->info.memory == DEDUP_MEMORY_SHARED && run->own) {
            continue; /* the file's: not for KSM */
        }
        memset(which + run->page - w->first, true, run->n);
        any = true;
    }
    return !any || dedup_ksm_kept_out(w->r, w->first, w->span, which);
}

static void judge(Window *w)
{
    DedupRegion *r = w->r;

    w->nruns = 0;
    for (unsigned i = 0; i < w->nadmitted; i++) {
        DedupAction *a = w->admitted[i];

        if (!DEDUP_MUTANT(NO_PIN_RECHECK) &&
            dedup_region_held(r, a->page)) {
            continue;
        }
        if (!DEDUP_MUTANT(TRUST_HASH) && !content_fits(r, a)) {
            continue;
        }
        a->done = true;
        add_to_runs(w, a);
    }
    if (DEDUP_MUTANT(NO_FREEZE) || DEDUP_MUTANT(NO_PIN_RECHECK)) {
        DEDUP_MUTANT_DELAY();
    }
    DEDUP_MUTANT_HOOK(JUDGED);
    if (w->nruns && !is_still_frozen(w)) {
        w->nruns = 0;
        for (unsigned i = 0; i < w->nadmitted; i++) {
            w->admitted[i]->done = false;
        }
    }
}

/*
 * Own pages of shared memory: drop the maps of the whole window.  Not if a
 * segment is mapped in it: a broken page would lose its contents.
 */
static void flush_shared(Window *w)
{
    DedupRegion *r = w->r;

    for (uint32_t i = 0; i < w->span; i++) {
        if (dedup_entry_is_segment(dedup_entry_at(r, w->first + i))) {
            return;
        }
    }
    madvise(dedup_region_addr(r, w->first),
            (size_t)w->span << DEDUP_PAGE_SHIFT, MADV_DONTNEED_LOCKED);
}

/* What a flush took out of the page table, and out of memory with it. */
typedef enum Flushed {
    FLUSHED_NONE,
    FLUSHED_SOME,             /* or maybe nothing */
    FLUSHED_ALL,              /* all runs of own pages */
} Flushed;

/*
 * Own pages of anonymous memory: drop what is to be replaced, no more.  When
 * all of it is gone, who wants it waits because it is missing, and what stays
 * need not be protected any longer.
 */
static Flushed flush_anon(Window *w)
{
    DedupRegion *r = w->r;
    DedupSpace *space = r->space;
    uint8_t *addr = dedup_region_addr(r, w->first);
    size_t len = (size_t)w->span << DEDUP_PAGE_SHIFT;
    struct iovec iov[DEDUP_WINDOW_PAGES];
    size_t wanted = 0;
    unsigned n = 0;
    long dropped;

    if (!w->may_drop || !dedup_freeze_readers(space->freezer.uffd, addr, len)) {
        return FLUSHED_NONE;
    }
    for (unsigned i = 0; i < w->nruns; i++) {
        if (w->runs[i].own) {
            iov[n].iov_base = dedup_region_addr(r, w->runs[i].page);
            iov[n].iov_len = (size_t)w->runs[i].n << DEDUP_PAGE_SHIFT;
            wanted += iov[n++].iov_len;
        }
    }
    if (!n) {
        return FLUSHED_NONE;
    }
    n -= DEDUP_FAIL(DROP) ? n / 2 : 0;
    dropped = syscall(SYS_process_madvise, space->process.self_pidfd, iov, n,
                      MADV_DONTNEED_LOCKED, 0);
    if (dropped < 0) {
        /* an older kernel never does it; a part of the first run may be gone */
        space->process.has_madvise_vector = errno == ENOMEM || errno == EINTR;
    }
    if (dropped < 0 || (size_t)dropped != wanted) {
        return FLUSHED_SOME;
    }
    if (n == w->nruns) {
        dedup_freeze_unprotect(space->freezer.uffd, addr, len);
    }
    return FLUSHED_ALL;
}

/*
 * Take the pages of all runs out of the page table with one TLB flush.  Of
 * anonymous memory, they come back by being replaced or refilled.
 */
static Flushed flush_runs(Window *w)
{
    if (w->nruns < 2) {
        return FLUSHED_NONE; /* its mmap() flushes as well */
    }
    if (w->r->info.memory == DEDUP_MEMORY_SHARED) {
        flush_shared(w);
    }
    return w->r->info.memory == DEDUP_MEMORY_ANON ? flush_anon(w)
                                                  : FLUSHED_NONE;
}

static bool map_segment(Window *w, const Run *run)
{
    uint8_t *addr = dedup_region_addr(w->r, run->page);
    size_t len = (size_t)run->n << DEDUP_PAGE_SHIFT;

    if (DEDUP_FAIL(MAP) || (DEDUP_FAIL(MAP_HOLE) && munmap(addr, len) == 0)) {
        return false;
    }
    return mmap(addr, len, PROT_READ | PROT_WRITE,
                MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE,
                run->holding->segment->fd,
                (off_t)run->index << DEDUP_PAGE_SHIFT) != MAP_FAILED;
}

/* Drop zero pages; the frozen range keeps everybody from storing to them. */
static bool drop_zero(Window *w, const Run *run)
{
    DedupRegion *r = w->r;

    if (r->info.memory == DEDUP_MEMORY_PRIVATE_FILE) {
        /* the file below may hold anything: put anonymous memory over it */
        return mmap(dedup_region_addr(r, run->page),
                    (size_t)run->n << DEDUP_PAGE_SHIFT,
                    PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE |
                    MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED;
    }
    if (!run->own) {
        /*
         * Broken: below is fresh memory, or a hole of the file; which is
         * made sure of, as the punch of the merge may not have been yet.
         */
        if (r->info.memory == DEDUP_MEMORY_SHARED &&
            !dedup_punch(r, run->page, run->n)) {
            return false;
        }
        return dedup_region_map_own(r, run->page, run->n);
    }
    if (r->info.memory == DEDUP_MEMORY_SHARED) {
        return dedup_punch(r, run->page, run->n);
    }
    return madvise(dedup_region_addr(r, run->page),
                   (size_t)run->n << DEDUP_PAGE_SHIFT,
                   MADV_DONTNEED_LOCKED) == 0;
}

/*
 * The replacement could not be mapped: what was taken away comes back.  Own
 * pages of shared memory are in their file; all else is in the segment, which
 * has the same bytes.  If not even that can be done, the page is lost, and who
 * touches it hears of it (dedup_freeze_refill()); there is nobody else to tell.
 */
static void put_back(Window *w, Run *run, Flushed flushed)
{
    DedupSpace *space = w->r->space;
    bool in_file = w->r->info.memory == DEDUP_MEMORY_SHARED && run->own;
    const uint8_t *content = run->holding && !in_file ?
        dedup_segment_page(run->holding->segment, run->index) : NULL;

    run->refilled = dedup_fill_hole(w->r, run->page, run->n, content);
    if (run->refilled || !content || !flushed || !run->own) {
        return;
    }
    for (uint32_t i = 0; i < run->n; i++) {
        uint32_t page = run->page + i;

        dedup_freeze_refill(space->freezer.uffd,
                            dedup_region_addr(w->r, page),
                            content + ((size_t)i << DEDUP_PAGE_SHIFT),
                            dedup_spare_take(&space->spare,
                                             page - w->first));
    }
}

static void replace(Window *w, unsigned *limits)
{
    Flushed flushed = flush_runs(w);

    for (unsigned i = 0; i < w->nruns; i++) {
        Run *run = &w->runs[i];

        if (!run->holding) {
            run->mapped = (flushed == FLUSHED_ALL && run->own) ||
                          drop_zero(w, run);
        } else {
            if (DEDUP_MUTANT(PUNCH_FIRST) &&
                w->r->info.memory == DEDUP_MEMORY_SHARED) {
                dedup_punch(w->r, run->page, run->n);
                DEDUP_MUTANT_DELAY();
            }
            run->mapped = map_segment(w, run);
        }
        if (!run->mapped) {
            put_back(w, run, flushed);
            *limits |= DEDUP_LIMIT_MAPS;
        }
    }
    dedup_region_reapply(w->r, w->first, w->span);
}

/* ---- thawed again ---- */

/* Give the replaced pages back, neighbouring runs in one call. */
static void punch_runs(Window *w)
{
    for (unsigned i = 0, j; i < w->nruns; i = j) {
        uint32_t end = w->runs[i].page + w->runs[i].n;

        j = i + 1;
        if (!w->runs[i].mapped || !w->runs[i].holding || !w->runs[i].own) {
            continue;
        }
        while (j < w->nruns && w->runs[j].mapped && w->runs[j].holding &&
               w->runs[j].own && w->runs[j].page == end) {
            end += w->runs[j++].n;
        }
        dedup_punch_replaced(w->r, w->runs[i].page,
                             end - w->runs[i].page);
    }
}

static void enter(Window *w)
{
    for (unsigned i = 0; i < w->nruns; i++) {
        const Run *run = &w->runs[i];

        for (uint32_t k = 0; run->mapped && k < run->n; k++) {
            dedup_ledger_set(w->r, run->page + k, run->holding ?
                             dedup_entry(run->holding->no, run->index + k) :
                             DEDUP_ZERO);
        }
        for (uint32_t k = 0; run->refilled && k < run->n; k++) {
            /* no mapping of a segment is left, if there was one */
            dedup_ledger_set(w->r, run->page + k, DEDUP_OWN);
        }
    }
}

/* An action whose run could not be mapped was not done. */
static void mark_done(Window *w)
{
    unsigned run = 0;

    for (unsigned i = 0; i < w->nadmitted; i++) {
        DedupAction *a = w->admitted[i];

        if (!a->done) {
            continue;
        }
        while (a->page >= w->runs[run].page + w->runs[run].n) {
            run++;
        }
        a->done = w->runs[run].mapped;
    }
}

static void note_duration(DedupSpace *space, int64_t ns)
{
    int64_t max = __atomic_load_n(&space->window_max_ns, __ATOMIC_RELAXED);

    while (ns > max &&
           !__atomic_compare_exchange_n(&space->window_max_ns, &max, ns, true,
                                        __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
        ;
    }
}

static void window_locked(Window *w, unsigned *limits)
{
    DedupRegion *r = w->r;
    DedupSpace *space = r->space;
    uint8_t *addr = dedup_region_addr(r, w->first);
    size_t len = (size_t)w->span << DEDUP_PAGE_SHIFT;
    int64_t start;

    if (DEDUP_MUTANT(NO_PIN_RECHECK)) {
        DEDUP_MUTANT_DELAY();
    }
    DEDUP_MUTANT_HOOK(ADMITTED);
    w->may_drop = r->info.memory == DEDUP_MEMORY_ANON &&
                  space->process.has_madvise_vector &&
                  dedup_spare_ready(&space->spare);
    start = dedup_now_ns();
    if (!dedup_freeze_begin(&space->freezer.uffd, addr, len, false)) {
        /* ENOMEM: no map left to split off; EBUSY: somebody else's */
        *limits |= errno == ENOMEM ? DEDUP_LIMIT_MAPS : 0;
        return;
    }
    judge(w);
    if (w->nruns) {
        replace(w, limits);
    }
    dedup_freeze_end(&space->freezer.uffd, addr, len);
    note_duration(space, dedup_now_ns() - start);

    enter(w);
    if (DEDUP_MUTANT(NO_LOCK)) {
        dedup_space_unlock(space);
        DEDUP_MUTANT_DELAY();
    }
    if (r->info.memory == DEDUP_MEMORY_SHARED && !DEDUP_MUTANT(PUNCH_FIRST)) {
        punch_runs(w);
    }
    if (DEDUP_MUTANT(NO_LOCK)) {
        dedup_space_lock(space);
    }
    mark_done(w);
}

/*
 * One window: merge or drop @n pages of @r that lie within
 * DEDUP_WINDOW_PAGES of each other.
 */
static unsigned do_window(DedupRegion *r, DedupAction *actions, unsigned n,
                          unsigned *limits)
{
    DedupSpace *space = r->space;
    Window w = { .r = r, .first = actions[0].page };
    unsigned done = 0;

    w.span = actions[n - 1].page - w.first + 1;
    g_assert(w.span <= DEDUP_WINDOW_PAGES);
    g_assert(actions[n - 1].page < r->npages);

    dedup_space_lock(space);
    if (!r->dead && !dedup_file_has_room(r)) {
        *limits |= DEDUP_LIMIT_FILE;
    } else if (!r->dead && !r->closing && !space->closed &&
               space->freezer.uffd >= 0 &&
               dedup_presence(r, w.first, w.span, w.flags)) {
        for (unsigned i = 0; i < n; i++) {
            actions[i].done = false;
            if (admit(&w, &actions[i])) {
                w.admitted[w.nadmitted++] = &actions[i];
            }
        }
        if (w.nadmitted &&
            dedup_maps_admit(r, w.admitted, &w.nadmitted, limits) &&
            split_huge(&w) && take_from_ksm(&w, limits)) {
            window_locked(&w, limits);
            dedup_ksm_replaced(r, actions, n);
        }
        for (unsigned i = 0; i < n; i++) {
            done += actions[i].done;
        }
    }
    dedup_space_unlock(space);
    return done;
}

unsigned dedup_space_windows(DedupRegion *r, DedupAction *actions, unsigned n,
                             unsigned *limits)
{
    unsigned done = 0;

    for (unsigned i = 0, j; i < n; i = j) {
        for (j = i + 1; j < n && actions[j].page - actions[i].page <
             DEDUP_WINDOW_PAGES; j++) {
            ;
        }
        done += do_window(r, &actions[i], j - i, limits);
    }
    return done;
}
