/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Memory that breaks (C26): a page that the guest does not use must not be the
 * end of the VM because the scanner reads it; a broken page of a segment harms
 * those alone who touch it; and what is not ours goes on to the handler that
 * was there before.
 */

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "host/mutant.h"
#include "host/reader.h"
#include "poison-util.h"
#include "space/holdings.h"
#include "space/ledger.h"

#define PAGES 1024
/* Pages with these numbers break. */
#define EACH 64

static bool breaks(uint32_t page)
{
    return page % EACH == 5;
}

/* In place of the C library's: how often this thread has called it. */
static __thread unsigned masks;

int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
{
    masks++;
    return syscall(SYS_rt_sigprocmask, how, set, old, NSIG / 8) < 0 ? errno
                                                                    : 0;
}

/* Every thread of QEMU's that reads guest RAM blocks it. */
static void block_signal(int how)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(how, &set, NULL);
}

static void assert_others(const FxRam *ram, bool (*broken)(uint32_t page))
{
    for (uint32_t i = 0; i < ram->npages; i++) {
        if (!broken(i)) {
            fx_assert_page(ram, i, ram->shadow + (size_t)i * FX_PAGE);
        }
    }
}

static void end(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* As ram_block_discard_range() does it. */
static void discard(FxEngine *fe, FxRam *ram, uint32_t page)
{
    void *addr = fx_addr(ram, page);

    g_assert_true(dedup_engine_discard_begin(fe->e, addr, FX_PAGE));
    if (ram->fd >= 0 && ram->kind != FX_PRIVATE) {
        g_assert_no_errno(fallocate(ram->fd, FALLOC_FL_PUNCH_HOLE |
                                    FALLOC_FL_KEEP_SIZE,
                                    (off_t)page * FX_PAGE, FX_PAGE));
    }
    g_assert_no_errno(madvise(addr, FX_PAGE, MADV_DONTNEED));
    dedup_engine_discard_end(fe->e);
    fx_shadow_page(ram, page, 0);
}

/* ---- own pages ---- */

/* Pairs of equal pages, of which some break. */
static FxRam *broken_ram(FxKind kind)
{
    FxRam *ram = fx_ram_new(kind, PAGES);

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 100 + i / 2);
    }
    for (uint32_t i = 0; i < PAGES; i++) {
        if (breaks(i)) {
            g_assert_true(poison_pages(fx_addr(ram, i), 1));
        }
    }
    return ram;
}

/* What was thrown away is as good as any other page. */
static void heal(FxEngine *fe, FxRam *ram)
{
    for (uint32_t i = 0; i < PAGES; i++) {
        if (breaks(i)) {
            discard(fe, ram, i);
            fx_page(ram, i, 100 + i / 2);
        }
    }
}

static uint64_t count_poisoned(FxEngine *fe)
{
    DedupStats stats;

    fx_stats(fe, &stats);
    return stats.pass.poisoned;
}

static void test_own(gconstpointer data)
{
    FxEngine *fe;
    DedupStats stats;
    FxRam *ram;

    if (!poison_is_there()) {
        return;
    }
    ram = broken_ram(GPOINTER_TO_INT(data));
    fe = fx_engine_new(NULL);
    block_signal(SIG_BLOCK);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    assert_others(ram, breaks);
    fx_stats(fe, &stats);
    /* the kernel says of private memory that it is on swap */
    g_assert_cmpuint(stats.pass.poisoned + stats.pass.swapped, ==,
                     PAGES / EACH);
    g_assert_cmpuint(stats.pages_merged, ==, PAGES - 2 * PAGES / EACH);
    if (ram->kind == FX_MEMFD) {
        g_assert_cmpuint(stats.pass.poisoned, ==, PAGES / EACH);
        /* nobody looks whether they can be read again */
        for (uint32_t i = 0; i < PAGES; i++) {
            if (breaks(i)) {
                madvise(fx_addr(ram, i), FX_PAGE, MADV_DONTNEED);
            }
        }
        fx_wait_scans(fe, 2);
        g_assert_cmpuint(count_poisoned(fe), ==, PAGES / EACH);
    }
    heal(fe, ram);
    fx_wait_settled(fe);
    fx_assert_bytes(ram);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pass.poisoned, ==, 0);
    g_assert_cmpuint(stats.pages_merged, ==, PAGES);
    block_signal(SIG_UNBLOCK);
    end(fe, ram);
}

/* In the other modes, too. */
static void test_mode(gconstpointer data)
{
    DedupMode mode = GPOINTER_TO_INT(data);
    FxEngine *fe;
    FxRam *ram;

    if (!poison_is_there()) {
        return;
    }
    ram = broken_ram(FX_MEMFD);
    fe = fx_engine_new_mode(NULL, mode);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 3);
    g_assert_cmpuint(count_poisoned(fe), ==, PAGES / EACH);
    assert_others(ram, breaks);
    end(fe, ram);
}

/* ---- at the worst moment ---- */

static struct {
    FxRam *ram;
    int stage;
    unsigned broken;
} late;

/* In a window, when its pages were chosen because they are there. */
static void break_late(int stage)
{
    if (stage != late.stage || late.broken) {
        return;
    }
    for (uint32_t i = 0; i < PAGES; i++) {
        if (breaks(i)) {
            g_assert_true(poison_pages(fx_addr(late.ram, i), 1));
            late.broken++;
        }
    }
}

static void test_late(gconstpointer data)
{
    FxEngine *fe;
    FxRam *ram;

    if (!poison_is_there()) {
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 100 + i / 2);
    }
    fe = fx_engine_new(NULL);
    late.ram = ram;
    late.stage = DEDUP_HOOK_ADMITTED;
    late.broken = 0;
    dedup_mutant_hook = break_late;
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    g_assert_cmpuint(late.broken, ==, PAGES / EACH);
    assert_others(ram, breaks);
    dedup_mutant_hook = NULL;
    heal(fe, ram);
    fx_wait_settled(fe);
    fx_assert_bytes(ram);
    end(fe, ram);
}

/* ---- what is merged ---- */

/* Everything is equal in pairs, and merged. */
static FxEngine *merge_all(FxRam *ram)
{
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 100 + i / 2);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==, PAGES);
    return fe;
}

/*
 * What they are merged to breaks.  All other pages get their own memory, those
 * stay, and it is said why; when they are thrown away nothing stays.
 */
static void test_restore(gconstpointer data)
{
    FxEngine *fe;
    FxRam *ram;

    if (!poison_is_there()) {
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    fe = merge_all(ram);
    for (uint32_t i = 0; i < PAGES; i++) {
        if (breaks(i)) {
            g_assert_true(poison_pages(fx_addr(ram, i), 1));
        }
    }
    fx_restore_begin(fe, true, false);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, PAGES / EACH);
    g_assert_nonnull(strstr(fe->message, "memory is broken"));
    assert_others(ram, breaks);
    for (uint32_t i = 0; i < PAGES; i++) {
        g_assert_true(fx_is_merged(ram, i) == breaks(i));
    }
    heal(fe, ram);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    end(fe, ram);
}

/* The same for who takes a region back, on a thread that blocks the signal. */
static void test_remove(gconstpointer data)
{
    g_autoptr(GError) error = NULL;
    FxEngine *fe;
    FxRam *ram;

    if (!poison_is_there()) {
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    fe = merge_all(ram);
    g_assert_true(poison_pages(fx_addr(ram, 7), 1));
    block_signal(SIG_BLOCK);
    masks = 0;
    g_assert_false(dedup_region_remove(ram->region, true, &error));
    /* the BQL may be held: not for each page */
    g_assert_cmpuint(masks, >, 0);
    g_assert_cmpuint(masks, <, PAGES / 8);
    block_signal(SIG_UNBLOCK);
    g_assert_nonnull(strstr(error->message, "memory is broken"));
    discard(fe, ram, 7);
    fx_remove(ram, true);
    fx_assert_bytes(ram);
    end(fe, ram);
}

static struct {
    DedupEngine *e;
    bool ends;                /* atomic */
} breaker;

/* The views of segments are let go of when a pass ends: again and again. */
static void *break_segments(void *opaque)
{
    DedupSpace *space = breaker.e->space;

    while (!__atomic_load_n(&breaker.ends, __ATOMIC_RELAXED)) {
        for (unsigned i = 0; i < *(unsigned *)opaque; i++) {
            DedupHolding *h = dedup_holding_get(space, i);

            if (h && h->segment->npages > 3) {
                poison_pages((void *)dedup_segment_page(h->segment, 3), 1);
            }
        }
        g_usleep(500);
    }
    return NULL;
}

/*
 * A page of a segment breaks: who comes with the same contents is merged to
 * another one.
 */
static void test_segment(void)
{
    GThread *thread;
    FxEngine *fe;
    DedupStats stats;
    FxRam *ram, *other;
    unsigned holdings;

    if (!poison_is_there()) {
        return;
    }
    ram = fx_ram_new(FX_MEMFD, PAGES);
    other = fx_ram_new(FX_MEMFD, PAGES);
    fe = merge_all(ram);
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    breaker.e = fe->e;
    breaker.ends = false;
    holdings = dedup_holding_count(fe->e->space);
    g_assert_cmpuint(holdings, >, 0);
    thread = g_thread_new("breaker", break_segments, &holdings);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(other, i, 100 + i / 2);
    }
    fx_add(fe, other);
    fx_set_run(fe, true);
    fx_wait_settled(fe);
    fx_assert_bytes(ram);
    fx_assert_bytes(other);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==, 2 * PAGES);
    __atomic_store_n(&breaker.ends, true, __ATOMIC_RELAXED);
    g_thread_join(thread);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_assert_bytes(other);
    fx_remove(other, false);
    fx_ram_free(other);
    end(fe, ram);
}

/* ---- whose the signal is ---- */

static sigjmp_buf back;
/* volatile: written by a handler */
static volatile unsigned met;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    met++;
    siglongjmp(back, 1);
}

static void note_sigbus(int number, siginfo_t *info, void *context)
{
    met++;
}

/* Who had the signal before us has it still, but for our own reads. */
static void run_before(void *opaque)
{
    struct sigaction action = {
        .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO,
    };
    FxRam *ram, *other;
    FxEngine *fe;

    g_assert_no_errno(sigaction(SIGBUS, &action, NULL));
    ram = broken_ram(FX_MEMFD);
    other = broken_ram(FX_ANON);
    fe = fx_engine_new(NULL);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    g_assert_cmpuint(met, ==, 0);
    g_assert_cmpuint(count_poisoned(fe), ==, PAGES / EACH);
    if (!sigsetjmp(back, 1)) {
        fx_byte(other, 5, 0, 1);
        g_assert_not_reached();
    }
    g_assert_cmpuint(met, ==, 1);
    end(fe, ram);
    fx_ram_free(other);
}

static void test_before(void)
{
    if (poison_is_there()) {
        fx_must_pass(run_before, NULL, FX_DEADLINE);
    }
}

/* Where there was no handler it is the end, as without us. */
static void run_default(void *opaque)
{
    FxRam *ram;

    signal(SIGBUS, SIG_DFL);
    g_assert_true(dedup_reader_install(NULL));
    ram = broken_ram(FX_ANON);
    fx_byte(ram, 5, 0, 1);
}

static void test_default(void)
{
    int status;

    if (poison_is_there()) {
        status = fx_in_child(run_default, NULL, FX_DEADLINE);
        g_assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    }
}

/*
 * One that tells of an error elsewhere, and meets a thread that has it for a
 * signalfd, and reads just now: it stays for that.
 */
static void run_told(void *opaque)
{
    struct sigaction action = {
        .sa_sigaction = note_sigbus, .sa_flags = SA_SIGINFO,
    };
    const struct timespec none = { 0 };
    siginfo_t info;
    sigset_t set;

    g_assert_no_errno(sigaction(SIGBUS, &action, NULL));
    g_assert_true(dedup_reader_install(NULL));
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    dedup_read_open();
    g_assert_cmpint(pthread_kill(pthread_self(), SIGBUS), ==, 0);
    dedup_read_close();
    g_assert_cmpuint(met, ==, 0);
    g_assert_cmpint(sigtimedwait(&set, &info, &none), ==, SIGBUS);
    g_assert_cmpint(info.si_pid, ==, getpid());
    /* and so while it reads many */
    dedup_reader_enter();
    g_assert_cmpint(pthread_kill(pthread_self(), SIGBUS), ==, 0);
    g_assert_cmpint(sigtimedwait(&set, &info, &none), ==, SIGBUS);
    dedup_read_open();
    dedup_read_close();
    dedup_reader_leave();
    g_assert_cmpuint(met, ==, 0);
    /* who takes it anyway has it at once */
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    dedup_read_open();
    g_assert_cmpint(pthread_kill(pthread_self(), SIGBUS), ==, 0);
    dedup_read_close();
    g_assert_cmpuint(met, ==, 1);
}

static void test_told(void)
{
    fx_must_pass(run_told, NULL, FX_DEADLINE);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*fn)(gconstpointer data);
    } tests[] = {
        { "own", test_own }, { "late", test_late },
        { "restore", test_restore }, { "remove", test_remove },
    };
    static const FxKind kinds[] = { FX_MEMFD, FX_ANON, FX_PRIVATE };

    fx_init(&argc, &argv);
    g_test_add_func("/poison/before", test_before);
    g_test_add_func("/poison/default", test_default);
    g_test_add_func("/poison/told", test_told);
    for (unsigned i = 0; i < G_N_ELEMENTS(tests); i++) {
        for (unsigned k = 0; k < G_N_ELEMENTS(kinds); k++) {
            g_autofree char *path = g_strdup_printf(
                "/poison/%s/%s", tests[i].name, fx_kind_name(kinds[k]));

            g_test_add_data_func(path, GINT_TO_POINTER(kinds[k]),
                                 tests[i].fn);
        }
    }
    g_test_add_data_func("/poison/mode/zero", GINT_TO_POINTER(DEDUP_MODE_ZERO),
                         test_mode);
    g_test_add_data_func("/poison/mode/estimate",
                         GINT_TO_POINTER(DEDUP_MODE_ESTIMATE), test_mode);
    g_test_add_func("/poison/segment", test_segment);
    return g_test_run();
}
