/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The frozen half of the merge window: see window.c for its stages.
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
 * is filled again from the segment, which has the same bytes, at the worst in
 * memory that was prepared for it (spare.h).  So no more pages are dropped at a
 * time than there are spare ones.
 */

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "host/clock.h"
#include "host/mutant.h"
#include "host/sys.h"
#include "space/holdings.h"
#include "space/ksm.h"
#include "space/own.h"
#include "space/punch.h"
#include "space/window.h"

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

static bool continues(const DedupRun *run, const DedupRegion *r,
                      const DedupAction *a)
{
    return run->page + run->n == a->page && run->holding == a->holding &&
           (!a->holding || run->index + run->n == a->index) &&
           run->own == !dedup_window_is_broken(r, a->page);
}

static void add_to_runs(DedupWindow *w, const DedupAction *a)
{
    DedupRun *run = w->nruns ? &w->runs[w->nruns - 1] : NULL;

    if (run && continues(run, w->r, a)) {
        run->n++;
        return;
    }
    w->runs[w->nruns++] = (DedupRun) {
        .page = a->page,
        .n = 1,
        .holding = a->holding,
        .index = a->index,
        .own = !dedup_window_is_broken(w->r, a->page),
    };
}

/*
 * Nobody has stored to a page that was compared.  Otherwise KSM is at work
 * here, and nothing is done this time.
 */
static bool is_still_frozen(const DedupWindow *w)
{
    bool which[DEDUP_WINDOW_PAGES] = { false };
    bool any = false;

    for (unsigned i = 0; i < w->nruns; i++) {
        const DedupRun *run = &w->runs[i];

        if (w->r->info.memory == DEDUP_MEMORY_SHARED && run->own) {
            continue; /* the file's: not for KSM */
        }
        memset(which + run->page - w->first, true, run->n);
        any = true;
    }
    return !any || dedup_ksm_kept_out(w->r, w->first, w->span, which);
}

static void judge(DedupWindow *w)
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
            a->differs = true;
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

/* ---- the flush ---- */

/* What a flush took out of the page table; of anonymous memory, for good. */
typedef enum Flushed {
    FLUSHED_NONE,
    FLUSHED_SOME,             /* or maybe nothing */
    FLUSHED_ALL,
} Flushed;

/*
 * Kernels that drop no list of ranges: the maps of the whole window.  Not if a
 * segment is mapped in it: a broken page would lose its contents.
 */
static void flush_whole(DedupWindow *w)
{
    for (uint32_t i = 0; i < w->span; i++) {
        if (dedup_entry_is_segment(dedup_entry_at(w->r, w->first + i))) {
            return;
        }
    }
    sys_madvise(dedup_region_addr(w->r, w->first),
                (size_t)w->span << DEDUP_PAGE_SHIFT, MADV_DONTNEED_LOCKED);
}

/*
 * Have who wants a page that is gone wait, if some are to be dropped, and
 * choose which: own pages, where several mappings would flush the TLB each.
 */
static void choose_flushed(DedupWindow *w)
{
    DedupRegion *r = w->r;
    bool shared = r->info.memory == DEDUP_MEMORY_SHARED;

    for (unsigned i = 0; i < w->nruns; i++) {
        DedupRun *run = &w->runs[i];

        /* the contents of a long one could not be put back */
        run->flush = w->may_drop && w->nruns > 1 && run->own &&
                     (shared || !run->holding || run->n <= DEDUP_SPARE_PAGES);
        w->nflush += run->flush;
    }
    if (w->nflush && !dedup_freeze_readers(&w->frozen, shared)) {
        w->nflush = 0;
    }
    if (!w->nflush) {
        for (unsigned i = 0; i < w->nruns; i++) {
            w->runs[i].flush = false;
        }
        if (shared && w->nruns > 1) {
            flush_whole(w);
        }
    }
}

/* The end of a batch of runs that may be dropped together. */
static unsigned batch_end(const DedupWindow *w, unsigned from)
{
    bool shared = w->r->info.memory == DEDUP_MEMORY_SHARED;
    unsigned pages = 0, i;

    for (i = from; i < w->nruns; i++) {
        const DedupRun *run = &w->runs[i];

        pages += run->flush && run->holding && !shared ? run->n : 0;
        if (pages > DEDUP_SPARE_PAGES) {
            break;
        }
    }
    return i;
}

/*
 * What is to be replaced between the first of these runs and what follows the
 * last is gone, or replaced already: what stays there need not be protected any
 * longer, as who wants a page that is gone waits for that.  This is still one
 * mapping, so it costs one TLB flush.
 */
static void unprotect(DedupWindow *w, unsigned from, unsigned to)
{
    uint32_t first = from ? w->runs[from].page : w->first;
    uint32_t end = to < w->nruns ? w->runs[to].page : w->first + w->span;

    if (DEDUP_MUTANT(UNPROTECT_ALL)) {
        end = w->first + w->span;
    }
    dedup_freeze_unprotect(&w->frozen, dedup_region_addr(w->r, first),
                           (size_t)(end - first) << DEDUP_PAGE_SHIFT);
}

/* Is none of these pages in a mapping of a segment's? */
static bool is_all_own(const DedupRegion *r, uint32_t page, uint32_t end)
{
    while (page < end && !dedup_entry_is_segment(dedup_entry_at(r, page))) {
        page++;
    }
    return page == end;
}

/*
 * The ranges that are dropped for runs [from, to).  Of shared memory a few
 * pages in between, too, where nothing is lost by it: the kernel flushes the
 * TLB for each range, which costs more than the faults on those pages.
 */
#define GAP_PAGES 3

static unsigned find_ranges(const DedupWindow *w, unsigned from, unsigned to,
                            struct iovec *iov)
{
    bool shared = w->r->info.memory == DEDUP_MEMORY_SHARED;
    uint32_t end = 0;
    unsigned n = 0;

    for (unsigned i = from; i < to; i++) {
        const DedupRun *run = &w->runs[i];
        uint8_t *addr = dedup_region_addr(w->r, run->page);
        size_t len = (size_t)run->n << DEDUP_PAGE_SHIFT;

        if (!run->flush) {
            continue;
        }
        if (n && shared && run->page - end <= GAP_PAGES &&
            is_all_own(w->r, end, run->page)) {
            iov[n - 1].iov_len = addr + len - (uint8_t *)iov[n - 1].iov_base;
        } else {
            iov[n++] = (struct iovec) { .iov_base = addr, .iov_len = len };
        }
        end = run->page + run->n;
    }
    return n;
}

/* Take the pages of runs [from, to) out of the page table. */
static Flushed flush(DedupWindow *w, unsigned from, unsigned to)
{
    DedupSpace *space = w->r->space;
    struct iovec iov[DEDUP_WINDOW_PAGES];
    unsigned n = find_ranges(w, from, to, iov);
    size_t wanted = 0;
    long dropped;

    if (!n || !w->may_drop) {
        return FLUSHED_NONE;
    }
    for (unsigned i = 0; i < n; i++) {
        wanted += iov[i].iov_len;
    }
    dropped = sys_process_madvise(space->process.self_pidfd, iov, n,
                                  MADV_DONTNEED_LOCKED);
    if (dropped < 0) {
        /* an older kernel never does it; a part of the first run may be gone */
        space->process.has_madvise_vector = errno == ENOMEM || errno == EINTR;
        w->may_drop = space->process.has_madvise_vector;
    }
    if (dropped < 0 || (size_t)dropped != wanted) {
        return FLUSHED_SOME;
    }
    unprotect(w, from, to);
    DEDUP_MUTANT_HOOK(FLUSHED);
    return FLUSHED_ALL;
}

/* ---- the replacement ---- */

static bool map_segment(DedupWindow *w, const DedupRun *run)
{
    return sys_mmap(dedup_region_addr(w->r, run->page),
                    (size_t)run->n << DEDUP_PAGE_SHIFT,
                    PROT_READ | PROT_WRITE,
                    MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE,
                    run->holding->segment->fd,
                    (off_t)run->index << DEDUP_PAGE_SHIFT) != MAP_FAILED;
}

/* Drop zero pages; the frozen range keeps everybody from storing to them. */
static bool drop_zero(DedupWindow *w, const DedupRun *run)
{
    DedupRegion *r = w->r;

    if (r->info.memory == DEDUP_MEMORY_PRIVATE_FILE) {
        /* the file below may hold anything: put anonymous memory over it */
        return sys_mmap(dedup_region_addr(r, run->page),
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
    return sys_madvise(dedup_region_addr(r, run->page),
                       (size_t)run->n << DEDUP_PAGE_SHIFT,
                       MADV_DONTNEED_LOCKED) == 0;
}

/*
 * The replacement could not be mapped: what was taken away comes back.  Own
 * pages of shared memory are in their file; all else is in the segment, which
 * has the same bytes.  If not even that can be done, the page is lost, and who
 * touches it hears of it (dedup_freeze_refill()); there is nobody else to tell.
 */
static void put_back(DedupWindow *w, DedupRun *run, Flushed flushed)
{
    DedupSpace *space = w->r->space;
    bool in_file = w->r->info.memory == DEDUP_MEMORY_SHARED && run->own;
    const uint8_t *content = run->holding && !in_file ?
        dedup_segment_page(run->holding->segment, run->index) : NULL;

    if (DEDUP_MUTANT(NO_PUT_BACK)) {
        return;
    }
    run->refilled = dedup_fill_hole(w->r, run->page, run->n, content);
    if (run->refilled || !content || !flushed || !run->own) {
        return;
    }
    for (uint32_t i = 0; i < run->n; i++) {
        dedup_freeze_refill(&w->frozen,
                            dedup_region_addr(w->r, run->page + i),
                            content + ((size_t)i << DEDUP_PAGE_SHIFT),
                            dedup_spare_take(&space->spare, w->nspared++));
    }
    /* the spare ones may be gone: nothing more is dropped */
    w->may_drop = false;
}

static void replace_run(DedupWindow *w, DedupRun *run, Flushed flushed,
                        unsigned *limits)
{
    if (!run->holding) {
        run->mapped = (flushed == FLUSHED_ALL &&
                       w->r->info.memory == DEDUP_MEMORY_ANON) ||
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

/* First what is not flushed, so that a flush can end the protection. */
static void replace(DedupWindow *w, unsigned *limits)
{
    choose_flushed(w);
    for (unsigned i = 0; i < w->nruns; i++) {
        if (!w->runs[i].flush) {
            replace_run(w, &w->runs[i], FLUSHED_NONE, limits);
        }
    }
    for (unsigned i = 0, j; w->nflush && i < w->nruns; i = j) {
        Flushed flushed;

        j = batch_end(w, i);
        flushed = flush(w, i, j);
        for (unsigned k = i; k < j; k++) {
            if (w->runs[k].flush) {
                replace_run(w, &w->runs[k], flushed, limits);
            }
        }
    }
    dedup_region_reapply(w->r, w->first, w->span);
}

/* ---- thawed again ---- */

/* Give the replaced pages back, neighbouring runs in one call. */
static void punch_runs(DedupWindow *w)
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

static void enter(DedupWindow *w)
{
    for (unsigned i = 0; i < w->nruns; i++) {
        const DedupRun *run = &w->runs[i];

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
static void mark_done(DedupWindow *w)
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

static unsigned count_replaced(const DedupWindow *w)
{
    unsigned n = 0;

    for (unsigned i = 0; i < w->nruns; i++) {
        n += w->runs[i].mapped ? w->runs[i].n : 0;
    }
    return n;
}

void dedup_window_run(DedupWindow *w, unsigned *limits)
{
    DedupRegion *r = w->r;
    DedupSpace *space = r->space;
    int64_t start, end;
    bool met;

    if (DEDUP_MUTANT(NO_PIN_RECHECK)) {
        DEDUP_MUTANT_DELAY();
    }
    DEDUP_MUTANT_HOOK(ADMITTED);
    w->nflush = w->nspared = 0;
    w->may_drop = r->info.memory != DEDUP_MEMORY_PRIVATE_FILE &&
                  dedup_freezer_drops(&space->freezer) &&
                  space->process.has_madvise_vector &&
                  (r->info.memory == DEDUP_MEMORY_SHARED ||
                   dedup_spare_ready(&space->spare));
    start = dedup_now_ns();
    if (!dedup_region_freeze(r, w->first, w->span, false, &w->frozen)) {
        /* ENOMEM: no map left to split off; EBUSY: somebody else's, pinned */
        *limits |= errno == ENOMEM ? DEDUP_LIMIT_MAPS : 0;
        return;
    }
    judge(w);
    if (w->nruns) {
        replace(w, limits);
    }
    met = dedup_freeze_is_waited_for(&w->frozen) ||
          __atomic_load_n(&space->exclusive.held, __ATOMIC_RELAXED);
    dedup_freeze_end(&w->frozen);
    end = dedup_now_ns();
    dedup_bound_took(&space->bound, end - start);
    dedup_bound_note(&space->bound, count_replaced(w), start, end, met);

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
