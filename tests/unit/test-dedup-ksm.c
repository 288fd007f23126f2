/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * KSM, the kernel's own merging, beside the engine.
 *
 * When ksmd merges a page it maps its own page there, without the write
 * protection that the page may have had.  In the middle of a window that
 * lets a store pass, which is lost when the page is replaced.  And KSM's
 * savings must not be taken back before the engine has its own.
 *
 * Each test with ksmd runs in a process of its own, which has nothing else
 * that KSM may merge.
 */

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "space/space-internal.h"
#include "ksm-util.h"
#include "host/mutant.h"

#define PAGES 1024
#define STORED 7                /* a page that a writer stores to */

/* The region as its owner made it: KSM may merge it, said or not. */
static FxRam *ram_new(FxKind kind, uint32_t npages)
{
    FxRam *ram = fx_ram_new(kind, npages);

    g_assert_cmpint(madvise(ram->host, (size_t)npages * FX_PAGE,
                            MADV_MERGEABLE), ==, 0);
    return ram;
}

static void end(FxEngine *fe, FxRam *ram)
{
    dedup_mutant_hook = NULL;
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* Batches that end within a chunk: all of the chunk is taken all the same. */
static void test_flags(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    DedupParams params;

    if (!ksm_mergeable(ram->host, FX_PAGE)) {
        g_test_skip("no KSM here");
        fx_engine_free(fe);
        fx_ram_free(ram);
        return;
    }
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i % 3 ? i % 32 + 1 : 1000 + i);
    }
    dedup_engine_get_params(fe->e, &params);
    params.pages_to_scan = 100;
    dedup_engine_set_params(fe->e, &params);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 2);
    if (ksm_mergeable(ram->host, PAGES * FX_PAGE)) {
        fx_fail("KSM has RAM", "%" G_GUINT64_FORMAT " KiB may be merged",
                ksm_mergeable(ram->host, PAGES * FX_PAGE) / 1024);
    }
    fx_assert_bytes(ram);
    end(fe, ram);
}

/* ---- ksmd at work in a window ---- */

/* How KSM comes to have the pages. */
typedef enum Way {
    WAY_UNSAID,       /* they were mergeable, and nobody said so */
    WAY_AGAIN,        /* mergeable again after they had been taken */
    WAY_INSIDE,       /* made mergeable within the window */
    WAYS
} Way;

typedef struct Opened {
    FxKind kind;
    Way way;
    bool restore;               /* a restore, not a merge */
} Opened;

static struct {
    FxRam *ram;
    FxEngine *fe;
    const Opened *how;
    GThread *thread;
    uint8_t *twins;             /* what KSM has merged: contents 1 */
    int armed;                  /* atomic */
    int happened;               /* atomic: all of that */
    int done;                   /* atomic: the store has returned */
    int early;                  /* atomic: it did within the window */
} w;

#define TWINS 4

/* Made by the scanner's thread, with all signals blocked; QEMU's are not. */
FX_GUEST
static gpointer writer_main(gpointer opaque)
{
    sigset_t segv;

    sigemptyset(&segv);
    sigaddset(&segv, SIGSEGV);
    pthread_sigmask(SIG_UNBLOCK, &segv, NULL);
    *(FxByte *)(fx_addr(w.ram, STORED) + 100) = 0xee;
    __atomic_store_n(&w.done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void make_mergeable(void)
{
    g_assert_cmpint(madvise(w.ram->host, (size_t)w.ram->npages * FX_PAGE,
                            MADV_MERGEABLE), ==, 0);
}

/* In the window, its pages are compared or copied: KSM, then a store. */
static void ksm_comes(int stage)
{
    /* of the window that is open */
    const DedupFrozen frozen = { .freezer = &w.fe->e->space->freezer };

    if (stage != (w.how->restore ? DEDUP_HOOK_COPIED : DEDUP_HOOK_JUDGED) ||
        !__atomic_exchange_n(&w.armed, 0, __ATOMIC_SEQ_CST)) {
        return;
    }
    if (w.how->way == WAY_INSIDE) {
        make_mergeable();
    }
    ksm_run(true);
    ksm_wait_scans();
    ksm_run(false);
    w.thread = g_thread_new("writer", writer_main, NULL);
    /* it is done, or it waits in the frozen page */
    while (!__atomic_load_n(&w.done, __ATOMIC_SEQ_CST) &&
           !dedup_freeze_is_waited_for(&frozen)) {
        g_usleep(1000);
    }
    __atomic_store_n(&w.early, w.done, __ATOMIC_SEQ_CST);
    __atomic_store_n(&w.happened, 1, __ATOMIC_SEQ_CST);
}

static bool has_happened(void *opaque)
{
    return __atomic_load_n(&w.happened, __ATOMIC_SEQ_CST);
}

static void arm(void)
{
    if (w.how->way != WAY_INSIDE) {
        make_mergeable();
    }
    __atomic_store_n(&w.armed, 1, __ATOMIC_SEQ_CST);
}

/* The page is in KSM's tree: it merges others with it at first sight. */
static void make_twins(void)
{
    w.twins = mmap(NULL, TWINS * FX_PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    g_assert_true(w.twins != MAP_FAILED);
    madvise(w.twins, TWINS * FX_PAGE, MADV_NOHUGEPAGE);
    for (unsigned i = 0; i < TWINS; i++) {
        fx_content(w.twins + i * FX_PAGE, 1);
    }
    ksm_merge(w.twins, TWINS * FX_PAGE);
    g_assert_cmpuint(ksm_pages(), >=, TWINS - 1);
}

static void check_store(void)
{
    fx_wait_until(has_happened, NULL, "no window");
    g_thread_join(w.thread);
    w.ram->shadow[STORED * FX_PAGE + 100] = 0xee;
    fx_wait_settled(w.fe);
    if (memcmp(fx_addr(w.ram, STORED), w.ram->shadow + STORED * FX_PAGE,
               FX_PAGE)) {
        fx_fail("lost store", "%s, KSM came in the window",
                fx_kind_name(w.ram->kind));
    }
    if (w.how->way != WAY_INSIDE && w.early) {
        fx_fail("lost store", "%s, not lost, but let through by KSM",
                fx_kind_name(w.ram->kind));
    }
    fx_assert_bytes(w.ram);
}

/* A merge: own pages of private memory, or broken pages of shared memory. */
static void merge_opened(FxEngine *fe, FxRam *ram)
{
    bool broken = ram->kind == FX_MEMFD || w.how->way == WAY_AGAIN;

    dedup_mutant_hook = ksm_comes;
    if (!broken) {
        arm();
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    if (broken) {
        fx_wait_settled(fe);
        fx_set_run(fe, false);
        fx_wait_state(fe, DEDUP_STATE_STOPPED);
        for (uint32_t i = 0; i < 64; i++) {
            fx_page(ram, i, 1);
        }
        arm();
        fx_set_run(fe, true);
    }
    check_store();
}

/* A restore of pages that were written since they were merged. */
static void restore_opened(FxEngine *fe, FxRam *ram)
{
    g_autoptr(GError) error = NULL;

    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    for (uint32_t i = 0; i < 64; i++) {
        fx_page(ram, i, 1);
    }
    dedup_mutant_hook = ksm_comes;
    arm();
    dedup_engine_restore_range(fe->e, ram->host, 64 * FX_PAGE, &error);
    fx_set_run(fe, true);
    check_store();
}

static void opened_in_child(void *opaque)
{
    const Opened *how = opaque;
    FxRam *ram = fx_ram_new(how->kind, PAGES);
    FxEngine *fe;

    w.how = how;
    w.ram = ram;
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i < 64 ? 1 : i % 8 + 1);
    }
    make_twins();
    w.fe = fe = fx_engine_new(NULL);
    if (how->restore) {
        restore_opened(fe, ram);
    } else {
        merge_opened(fe, ram);
    }
    end(fe, ram);
}

static void test_opened(gconstpointer data)
{
    Opened how = *(const Opened *)data;

    if (!ksm_begin()) {
        return;
    }
    fx_must_pass(opened_in_child, &how, FX_DEADLINE);
}

/* ---- KSM's savings, in a memory cgroup; without a shadow, it is charged */

#define MIB (1u << 20)
#define MANY 32768              /* 128 MiB of RAM */
#define CONTENTS 9830           /* that KSM brings to 30 % */
#define SLACK (16 * MIB)        /* the engine's own memory, and what hurries */

typedef struct Savings {
    FxCgroup *cg;
    FxKind kind;
    uint64_t room;              /* between the usage and the limit */
    bool merges;                /* enough for the engine to merge all */
} Savings;

static FxCgroup *sampled;
static uint64_t highest;        /* the cgroup's usage; the scanner's */

/* When a window has its pages, taken from KSM and not merged yet. */
static void sample(int stage)
{
    if (stage == DEDUP_HOOK_JUDGED) {
        highest = MAX(highest, fx_cgroup_usage(sampled));
    }
}

static bool is_at_rest(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.full_scans > 6 && (stats.state == DEDUP_STATE_LIMITED ||
                                    stats.state == DEDUP_STATE_IDLE);
}

static void savings_in_cgroup(void *opaque)
{
    Savings *in = opaque;
    FxRam *ram = fx_ram_new(in->kind, MANY);
    uint64_t usage, after, by_ksm;
    uint8_t page[FX_PAGE];
    DedupStats stats;
    FxEngine *fe;

    g_assert_true(fx_cgroup_enter(in->cg));
    for (uint32_t i = 0; i < MANY; i++) {
        fx_content(fx_addr(ram, i), i % CONTENTS + 1);
    }
    make_twins(); /* ksmd counts no scans where it has nothing at all */
    ksm_merge(ram->host, (size_t)MANY * FX_PAGE);
    by_ksm = ksm_pages();
    g_assert_cmpuint(by_ksm, >=, MANY - CONTENTS);
    fe = fx_engine_new(NULL);
    usage = fx_cgroup_usage(in->cg);
    g_assert_true(fx_cgroup_limit(in->cg, usage + in->room));
    sampled = in->cg;
    dedup_mutant_hook = sample;
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_until(is_at_rest, fe, "neither limited nor idle");
    fx_stats(fe, &stats);
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    /* what it lost it notices when it comes by */
    ksm_run(true);
    ksm_wait_scans();
    ksm_run(false);
    after = fx_cgroup_usage(in->cg);
    g_test_message("%u MiB, at most %u MiB, then %u MiB; %u pages merged, "
                   "KSM has %u of %u, state %s", (unsigned)(usage / MIB),
                   (unsigned)(highest / MIB), (unsigned)(after / MIB),
                   (unsigned)stats.pages_merged, (unsigned)ksm_pages(),
                   (unsigned)by_ksm, dedup_state_str(stats.state));
    for (uint32_t i = 0; i < MANY; i++) {
        fx_content(page, i % CONTENTS + 1);
        fx_assert_page(ram, i, page);
    }
    /* a segment has a page while KSM has it, too, for those yet to come */
    if (highest > usage + CONTENTS * FX_PAGE + SLACK ||
        after > usage + SLACK) {
        fx_fail("KSM's savings lost", "%u MiB more, then %d",
                (unsigned)((highest - usage) / MIB),
                (int)((int64_t)(after - usage) / MIB));
    }
    if (in->merges) {
        g_assert_cmpuint(stats.limits, ==, 0);
        g_assert_cmpuint(stats.pages_merged, >=, MANY - CONTENTS);
        g_assert_cmpuint(ksm_pages(), <, by_ksm / 16);
    } else {
        g_assert_cmpuint(stats.limits, ==, DEDUP_LIMIT_MEMORY);
        g_assert_cmpuint(stats.pages_merged + ksm_pages(), >=,
                         by_ksm / 16 * 15);
    }
    dedup_mutant_hook = NULL;
    fx_engine_free(fe);
}

/* ---- restoring among pages that KSM shares with memory that is not ours */

#define EVERY 8                 /* of these pages one is merged by us */
#define UNIQUE 100000

static unsigned mixed_content(uint32_t i)
{
    return i % EVERY ? UNIQUE + i : i / EVERY % 16 + 1;
}

static void restore_beside(void *opaque)
{
    Savings *in = opaque;
    FxRam *ram = fx_ram_new(in->kind, MANY);
    uint8_t *others = mmap(NULL, (size_t)MANY * FX_PAGE,
                           PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    g_autoptr(GError) error = NULL;
    uint64_t usage, after, by_ksm;
    uint8_t page[FX_PAGE];
    DedupStats stats;
    FxEngine *fe;

    g_assert_true(fx_cgroup_enter(in->cg));
    g_assert_true(others != MAP_FAILED);
    madvise(others, (size_t)MANY * FX_PAGE, MADV_NOHUGEPAGE);
    for (uint32_t i = 0; i < MANY; i++) {
        fx_content(fx_addr(ram, i), mixed_content(i));
        if (i % EVERY) {
            fx_content(others + (size_t)i * FX_PAGE, mixed_content(i));
        }
    }
    make_twins();
    ksm_merge(ram->host, (size_t)MANY * FX_PAGE);
    ksm_merge(others, (size_t)MANY * FX_PAGE);
    fe = fx_engine_new(NULL);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    fx_stats(fe, &stats);
    by_ksm = ksm_pages();
    /* what we replaced, and what KSM saves: both are there */
    g_assert_cmpuint(stats.pages_merged, >=, MANY / EVERY / 16 * 15);
    g_assert_cmpuint(by_ksm, >=, MANY / 16 * 13);
    usage = fx_cgroup_usage(in->cg);
    g_assert_true(fx_cgroup_limit(in->cg, usage + in->room));
    if (!dedup_engine_restore_range(fe->e, ram->host,
                                    (uint64_t)MANY * FX_PAGE, &error)) {
        fx_fail("not restored", "%s", error->message);
    }
    after = fx_cgroup_usage(in->cg);
    g_test_message("%u pages were merged; %u MiB, then %u MiB; KSM had %u "
                   "pages, then %u", (unsigned)stats.pages_merged,
                   (unsigned)(usage / MIB), (unsigned)(after / MIB),
                   (unsigned)by_ksm, (unsigned)ksm_pages());
    if (after > usage + stats.pages_merged * FX_PAGE + SLACK) {
        fx_fail("KSM's savings lost", "%u MiB more",
                (unsigned)((after - usage) / MIB));
    }
    for (uint32_t i = 0; i < MANY; i++) {
        fx_content(page, mixed_content(i));
        fx_assert_page(ram, i, page);
    }
    fx_engine_free(fe);
}

static void in_cgroup(void (*body)(void *opaque), Savings in)
{
    int status;

    if (!ksm_begin()) {
        return;
    }
    in.cg = fx_cgroup_new();
    if (!in.cg) {
        return;
    }
    status = fx_in_child(body, &in, FX_DEADLINE);
    fx_cgroup_free(in.cg);
    if (status) {
        fx_fail("killed", "wait status 0x%x", status);
    }
}

static void test_savings(gconstpointer data)
{
    in_cgroup(savings_in_cgroup, *(const Savings *)data);
}

static void test_restore(gconstpointer data)
{
    in_cgroup(restore_beside, *(const Savings *)data);
}

static const Savings savings[] = {
    { NULL, FX_ANON, 40 * MIB, false },
    { NULL, FX_ANON, 400 * MIB, true },
    { NULL, FX_PRIVATE, 40 * MIB, false },
    { NULL, FX_PRIVATE, 400 * MIB, true },
};

/* room for what we merged, not for what KSM shares */
static const Savings beside[] = {
    { NULL, FX_ANON, (MANY / EVERY * FX_PAGE) + 24 * MIB, false },
    { NULL, FX_PRIVATE, (MANY / EVERY * FX_PAGE) + 24 * MIB, false },
};

static const Opened opened[] = {
    { FX_ANON, WAY_UNSAID, false },
    { FX_PRIVATE, WAY_UNSAID, false },
    { FX_ANON, WAY_AGAIN, false },
    { FX_MEMFD, WAY_AGAIN, false },
    { FX_ANON, WAY_INSIDE, false },
    { FX_MEMFD, WAY_INSIDE, false },
    { FX_ANON, WAY_AGAIN, true },
    { FX_MEMFD, WAY_AGAIN, true },
    { FX_ANON, WAY_INSIDE, true },
    { FX_MEMFD, WAY_INSIDE, true },
};

int main(int argc, char **argv)
{
    static const char *const ways[WAYS] = { "unsaid", "again", "inside" };

    fx_init(&argc, &argv);
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/ksm/flags/%s",
                                                fx_kind_name(kind));

        if (kind == FX_ANON || kind == FX_ANON_THP || kind == FX_PRIVATE) {
            g_test_add_data_func(path, GINT_TO_POINTER(kind), test_flags);
        }
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(opened); i++) {
        const Opened *o = &opened[i];
        g_autofree char *path = g_strdup_printf(
            "/ksm/%s/%s/%s", o->restore ? "restore" : "merge", ways[o->way],
            fx_kind_name(o->kind));

        g_test_add_data_func(path, o, test_opened);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(savings); i++) {
        g_autofree char *path = g_strdup_printf(
            "/ksm/savings/%s/%s", savings[i].merges ? "room" : "short",
            fx_kind_name(savings[i].kind));

        g_test_add_data_func(path, &savings[i], test_savings);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(beside); i++) {
        g_autofree char *path = g_strdup_printf(
            "/ksm/beside/%s", fx_kind_name(beside[i].kind));

        g_test_add_data_func(path, &beside[i], test_restore);
    }
    return g_test_run();
}
