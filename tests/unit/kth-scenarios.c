/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What engines do while a call fails, and what must be true then; see kth.h.
 *
 * The scanner is the thread of the test, step by step, so that calls come in
 * much the same order each time.  Beside it a guest stores to a page.
 */

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#include "engine-internal.h"
#include "kth.h"
#include "space/space-internal.h"

#define PAGES 64
#define HUGE_PAGES 512          /* where huge pages are wanted */
#define HOT_WORD 100
/* How often a step is tried until all is as it was. */
#define STEPS 400

/* ---- RAM, and a guest ---- */

/* What page @i has: runs, isolated pages, zeros, others. */
static uint64_t seed_of(uint32_t i)
{
    return i < 32 ? i % 16 + 1 :
           i < 48 ? (i % 2 ? 1000 + i : 40 + i / 4) :
           i < KTH_HOT ? 0 :
           i < KTH_HOT + 2 ? 77 :
           i < PAGES ? 2000 + i : 5000 + i % 32;
}

/* Of two members, each page is there once in each. */
static uint64_t seed_between(uint32_t i)
{
    return i >= 48 && i < KTH_HOT ? 0 : 3000 + i;
}

static FxRam *ram_new(FxKind kind, uint64_t (*seed)(uint32_t i))
{
    FxRam *ram = fx_ram_new(kind, kind == FX_ANON_THP ? HUGE_PAGES : PAGES);

    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_page(ram, i, seed(i));
    }
    return ram;
}

struct KthWriter {
    FxRam *ram;
    GThread *thread;
    int stop;               /* atomic */
};

FX_GUEST
static gpointer store(gpointer opaque)
{
    struct KthWriter *w = opaque;
    size_t at = (size_t)KTH_HOT * FX_PAGE / sizeof(FxWord) + HOT_WORD;
    FxWord *word = (FxWord *)w->ram->host + at;
    FxWord *shadow = (FxWord *)w->ram->shadow + at;
    uint64_t usual = *word, value = usual;

    while (!g_atomic_int_get(&w->stop)) {
        if (*word != value) {
            fx_fail("lost store", "page %u", KTH_HOT);
        }
        value = value == usual ? ~usual : usual;
        *word = value;
        g_usleep(20);
    }
    *shadow = value;
    return NULL;
}

static void writer_start(KthRun *run)
{
    run->writer = g_new0(struct KthWriter, 1);
    run->writer->ram = run->ram[0];
    kth_keep_mapped(fx_addr(run->ram[0], KTH_HOT));
    run->writer->thread = g_thread_new("guest", store, run->writer);
}

static void writer_stop(KthRun *run)
{
    if (run->writer) {
        g_atomic_int_set(&run->writer->stop, true);
        g_thread_join(run->writer->thread);
        g_free(run->writer);
        run->writer = NULL;
    }
}

/* ---- what must be true ---- */

static void check(KthRun *run)
{
    for (unsigned m = 0; m < 2; m++) {
        if (run->ram[m]) {
            kth_check_bytes(run->ram[m]);
            kth_check_ledger(run->ram[m]);
        }
    }
}

static void check_whole(const FxRam *ram)
{
    g_autofree bool *merged = g_new(bool, ram->npages);

    fx_merged(ram, merged);
    for (uint32_t i = 0; i < ram->npages; i++) {
        if (merged[i]) {
            fx_fail("not restored", "%s page %u", fx_kind_name(ram->kind), i);
        }
    }
    kth_check_bytes(ram);
    kth_check_file(ram);
}

/* ---- engines ---- */

static void step(FxEngine *fe)
{
    dedup_control_kick(&fe->e->control);
    dedup_engine_step(fe->e);
}

static void step_all(KthRun *run)
{
    for (unsigned m = 0; m < 2; m++) {
        if (run->fe[m]) {
            step(run->fe[m]);
        }
    }
}

/* The more often, the longer in between. */
static void pause_before(unsigned i)
{
    if (i > 20) {
        g_usleep(MIN(i * 100, 20000));
    }
}

static bool add(KthRun *run, unsigned m)
{
    return run->ram[m]->region ||
           fx_try_add(run->fe[m], run->ram[m], fx_flags(run->ram[m]), NULL);
}

/* A member without its RAM.  False: there is none, for want of something. */
static bool start(KthRun *run, unsigned m)
{
    g_autoptr(GError) error = NULL;

    run->fe[m] = fx_engine_try(run->dir, DEDUP_MODE_FULL, &error);
    if (!run->fe[m]) {
        if (!error) {
            fx_fail("no error", "an engine is not there, and nobody says why");
        }
        return false;
    }
    /* windows as large as may be, however slow the machine */
    run->fe[m]->e->space->bound.page_ns = 1;
    dedup_engine_begin(run->fe[m]->e);
    return true;
}

static void stop(KthRun *run, unsigned m)
{
    if (run->fe[m]) {
        dedup_engine_end(run->fe[m]->e);
        fx_engine_free(g_steal_pointer(&run->fe[m]));
        run->ram[m]->region = NULL;
    }
}

/* Is the content of this page there once more, in whosever RAM? */
static bool is_double(KthRun *run, unsigned m, uint32_t page)
{
    const uint8_t *content = run->ram[m]->shadow + (size_t)page * FX_PAGE;

    for (unsigned k = 0; k < 2; k++) {
        for (uint32_t i = 0; run->ram[k] && i < run->ram[k]->npages; i++) {
            if ((k != m || i != page) && i != KTH_HOT && i != KTH_HOT + 1 &&
                memcmp(run->ram[k]->shadow + (size_t)i * FX_PAGE, content,
                       sizeof(uint64_t)) == 0) {
                return true;
            }
        }
    }
    return false;
}

static uint32_t count_doubles(KthRun *run, unsigned m)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < run->ram[m]->npages; i++) {
        uint64_t word;

        memcpy(&word, run->ram[m]->shadow + (size_t)i * FX_PAGE, sizeof(word));
        n += word && i != KTH_HOT && i != KTH_HOT + 1 && is_double(run, m, i);
    }
    return n;
}

static bool is_merged(KthRun *run, unsigned m)
{
    return !run->fe[m] || dedup_region_pages_merged(run->ram[m]->region) >=
           count_doubles(run, m);
}

/* Step until everything that is there twice is merged. */
static void merge(KthRun *run)
{
    for (unsigned i = 0; !is_merged(run, 0) || !is_merged(run, 1); i++) {
        if (i == STEPS) {
            unsigned m = is_merged(run, 0);

            fx_fail("does not go on", "%u pages of %u merged in member %u",
                    (unsigned)dedup_region_pages_merged(run->ram[m]->region),
                    count_doubles(run, m), m);
        }
        pause_before(i);
        step_all(run);
    }
}

/* Merge all again. */
static void go_on(KthRun *run)
{
    for (unsigned m = 0; m < 2; m++) {
        if (run->ram[m] && !run->fe[m] && !start(run, m)) {
            fx_fail("does not go on", "no engine");
        }
        if (run->ram[m] && !add(run, m)) {
            fx_fail("does not go on", "region refused");
        }
    }
    merge(run);
}

static bool ask_unmerge(FxEngine *fe)
{
    fe->restored = false;
    return dedup_engine_restore(fe->e, true, false, NULL);
}

static void unmerge(KthRun *run, unsigned m)
{
    FxEngine *fe = run->fe[m];

    for (unsigned i = 0; !ask_unmerge(fe) && i < STEPS; i++) {
        pause_before(i);
        step(fe);
    }
    for (unsigned i = 0; !fe->restored && i < STEPS; i++) {
        pause_before(i);
        step(fe);
    }
    if (!fe->restored || fe->left) {
        fx_fail("not restored", "%s",
                fe->restored ? fe->message : "it does not end");
    }
    check_whole(run->ram[m]);
}

/* ---- merge; rewrite ---- */

static void prepare_alone(KthRun *run)
{
    run->ram[0] = ram_new(run->kind, seed_of);
    writer_start(run);
    start(run, 0);
}

static void act_merge(KthRun *run)
{
    if (add(run, 0)) {
        for (unsigned i = 0; i < 4; i++) {
            step(run->fe[0]);
        }
    }
}

static void recover_merge(KthRun *run)
{
    go_on(run);
    check(run);
    unmerge(run, 0);
}

static void prepare_merged(KthRun *run)
{
    prepare_alone(run);
    go_on(run);
}

/* Broken pages: some are equal to others again, some zero, some neither. */
static void act_rewrite(KthRun *run)
{
    for (uint32_t i = 4; i < 40; i += 2) {
        fx_page(run->ram[0], i, i % 3 == 0 ? 0 : i % 3 == 1 ? 9000 + i : 50);
    }
    for (unsigned i = 0; i < 4; i++) {
        step(run->fe[0]);
    }
}

/* ---- restore, discard, unmerge ---- */

static bool restore(KthRun *run)
{
    FxRam *ram = run->ram[0];

    return dedup_engine_restore_range(run->fe[0]->e, ram->host,
                                      (uint64_t)ram->npages * FX_PAGE, NULL);
}

static void act_restore(KthRun *run)
{
    if (restore(run)) {
        check_whole(run->ram[0]);
    }
}

static void recover_restore(KthRun *run)
{
    fx_set_run(run->fe[0], false);
    step(run->fe[0]); /* a userfaultfd that was lost */
    step(run->fe[0]);
    if (!restore(run)) {
        fx_fail("not restored", "though the fault has ended");
    }
    check_whole(run->ram[0]);
    fx_set_run(run->fe[0], true);
    go_on(run);
}

#define DISCARD_FIRST 8
#define DISCARD_PAGES 36

static bool discard(KthRun *run)
{
    FxRam *ram = run->ram[0];
    uint8_t *addr = fx_addr(ram, DISCARD_FIRST);
    size_t size = (size_t)DISCARD_PAGES * FX_PAGE;

    if (!dedup_engine_discard_begin(run->fe[0]->e, addr, size)) {
        return false;
    }
    if (ram->kind == FX_MEMFD || ram->kind == FX_TMPFS) {
        g_assert_cmpint(fallocate(ram->fd, FALLOC_FL_PUNCH_HOLE |
                                  FALLOC_FL_KEEP_SIZE,
                                  (off_t)DISCARD_FIRST * FX_PAGE, size), ==,
                        0);
    } else {
        g_assert_cmpint(madvise(addr, size, MADV_DONTNEED), ==, 0);
    }
    dedup_engine_discard_end(run->fe[0]->e);
    for (uint32_t i = 0; i < DISCARD_PAGES; i++) {
        fx_shadow_page(ram, DISCARD_FIRST + i, 0);
    }
    return true;
}

/* What was to be thrown away may be gone, or there; nothing else is. */
static void act_discard(KthRun *run)
{
    static const uint8_t zeroes[FX_PAGE];
    FxRam *ram = run->ram[0];

    if (!discard(run)) {
        for (uint32_t i = 0; i < DISCARD_PAGES; i++) {
            if (memcmp(fx_addr(ram, DISCARD_FIRST + i), zeroes,
                       FX_PAGE) == 0) {
                fx_shadow_page(ram, DISCARD_FIRST + i, 0);
            }
        }
    }
}

static void recover_discard(KthRun *run)
{
    if (!discard(run)) {
        fx_fail("not discarded", "though the fault has ended");
    }
    check(run);
    for (uint32_t i = 0; i < DISCARD_PAGES; i++) {
        fx_page(run->ram[0], DISCARD_FIRST + i, seed_of(DISCARD_FIRST + i));
    }
    recover_merge(run);
}

static void act_unmerge(KthRun *run)
{
    if (ask_unmerge(run->fe[0])) {
        for (unsigned i = 0; i < 4 && !run->fe[0]->restored; i++) {
            step(run->fe[0]);
        }
    }
}

static void recover_unmerge(KthRun *run)
{
    unmerge(run, 0);
    fx_set_run(run->fe[0], true);
    recover_merge(run);
}

/* ---- with another member ---- */

/* The other one knows its pages, each of which is there once. */
static void prepare_publish(KthRun *run)
{
    for (unsigned m = 0; m < 2; m++) {
        run->ram[m] = ram_new(run->kind, seed_between);
        start(run, m);
    }
    writer_start(run);
    add(run, 1);
    for (unsigned i = 0; i < 3; i++) {
        step_all(run);
    }
}

static void act_both(KthRun *run)
{
    if (add(run, 0)) {
        for (unsigned i = 0; i < 4; i++) {
            step_all(run);
        }
    }
}

static void recover_both(KthRun *run)
{
    go_on(run);
    check(run);
    unmerge(run, 0);
    unmerge(run, 1);
}

/* The other one has merged, within itself. */
static void prepare_fetch(KthRun *run)
{
    run->ram[1] = ram_new(run->kind, seed_of);
    go_on(run);
    run->ram[0] = ram_new(run->kind, seed_of);
    start(run, 0);
    writer_start(run);
}

static void prepare_join(KthRun *run)
{
    for (unsigned m = 0; m < 2; m++) {
        run->ram[m] = ram_new(run->kind, seed_of);
    }
    writer_start(run);
    start(run, 1);
    add(run, 1);
    for (unsigned i = 0; i < 3; i++) {
        step_all(run);
    }
}

static void act_join(KthRun *run)
{
    if (start(run, 0)) {
        if (dedup_engine_has_pagemap(run->fe[0]->e)) {
            act_both(run);
        } else {
            stop(run, 0); /* its owner merges nothing with it */
        }
    }
}

static void prepare_leave(KthRun *run)
{
    prepare_fetch(run);
    go_on(run);
}

static void act_leave(KthRun *run)
{
    FxRam *ram = run->ram[1];

    if (dedup_region_remove(ram->region, true, NULL)) {
        ram->region = NULL;
        check_whole(ram);
    }
    stop(run, 1);
    for (unsigned i = 0; i < 2; i++) {
        step(run->fe[0]);
    }
}

/* What it may have left merged is somebody else's matter now. */
static void recover_leave(KthRun *run)
{
    fx_ram_free(run->ram[1]);
    run->ram[1] = ram_new(run->kind, seed_of);
    recover_both(run);
}

const KthScenario kth_scenarios[] = {
    { "merge", prepare_alone, act_merge, recover_merge },
    { "rewrite", prepare_merged, act_rewrite, recover_merge },
    { "restore", prepare_merged, act_restore, recover_restore },
    { "discard", prepare_merged, act_discard, recover_discard },
    { "unmerge", prepare_merged, act_unmerge, recover_unmerge },
    { "publish", prepare_publish, act_both, recover_both, true },
    { "fetch", prepare_fetch, act_both, recover_both, true },
    { "join", prepare_join, act_join, recover_both, true },
    { "leave", prepare_leave, act_leave, recover_leave, true },
};

const unsigned kth_nscenarios = G_N_ELEMENTS(kth_scenarios);

unsigned kth_try(const KthScenario *s, FxKind kind, const KthFault *fault)
{
    KthRun run = { .kind = kind };
    unsigned calls;

    run.dir = s->in_group ? fx_group_dir() : NULL;
    s->prepare(&run);
    kth_begin(fault);
    s->act(&run);
    calls = kth_end();
    check(&run);
    s->recover(&run);
    writer_stop(&run);
    check(&run);
    fx_assert_page(run.ram[0], KTH_HOT, run.ram[0]->shadow +
                   (size_t)KTH_HOT * FX_PAGE);
    for (unsigned m = 0; m < 2; m++) {
        stop(&run, m);
    }
    for (unsigned m = 0; m < 2; m++) {
        if (run.ram[m]) {
            kth_check_bytes(run.ram[m]);
            fx_ram_free(run.ram[m]);
        }
    }
    if (run.dir) {
        fx_group_dir_free(run.dir);
    }
    return calls;
}
