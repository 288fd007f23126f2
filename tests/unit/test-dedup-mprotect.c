/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The handler of SIGSEGV that makes writers wait where pages are frozen by
 * mprotect(): it waits, for no longer than it must; and what is not ours goes
 * on to whoever had it before.
 *
 * What ends a process is tried in a program of its own, this one with an
 * argument: there nobody has installed the handler yet.
 */

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "host/freeze.h"
#include "host/mutant.h"

#define PAGES 64
/* A window that stays open for so long. */
#define OPEN_US 200000
/* Windows of the race at their ends. */
#define ROUNDS 20000
#define WRITERS 2
/* Runs a case that may end the process. */
#define CHILD "--child"
#define CHILD_S 20

static void open_freezer(DedupFreezer *f)
{
    g_autoptr(GError) error = NULL;

    dedup_freezer_open(f, DEDUP_FREEZE_MPROTECT, -1, &error);
    g_assert_no_error(error);
}

static void freeze(DedupFrozen *z, DedupFreezer *f, FxRam *ram, uint32_t page,
                   uint32_t n)
{
    dedup_freeze_announce(z, f, fx_addr(ram, page), n * FX_PAGE);
    g_assert_true(dedup_freeze_begin(z, false));
}

static FxRam *ram_with_contents(FxKind kind)
{
    FxRam *ram = fx_ram_new(kind, PAGES);

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i + 1);
    }
    return ram;
}

/* ---- who waits, sleeps ---- */

typedef struct Store {
    FxRam *ram;
    uint32_t page;
    int done;                 /* atomic */
    uint64_t cpu_ns;          /* what it took */
} Store;

static uint64_t thread_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

FX_GUEST
static gpointer store_main(gpointer opaque)
{
    Store *s = opaque;
    uint64_t before = thread_ns();

    *(FxByte *)(fx_addr(s->ram, s->page) + 100) = 0xee;
    s->cpu_ns = thread_ns() - before;
    __atomic_store_n(&s->done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void test_waits(void)
{
    FxRam *ram = ram_with_contents(FX_ANON);
    Store s = { .ram = ram, .page = 5 };
    DedupFreezer f;
    DedupFrozen z;
    GThread *t;

    open_freezer(&f);
    freeze(&z, &f, ram, 4, 4);
    t = g_thread_new("store", store_main, &s);
    /* how long a window is open is what is tried: there is no event */
    g_usleep(OPEN_US);
    g_assert_cmpint(__atomic_load_n(&s.done, __ATOMIC_SEQ_CST), ==, 0);
    if (!DEDUP_MUTANT(NO_WAIT)) {
        g_assert_true(dedup_freeze_is_waited_for(&z));
    }
    dedup_freeze_end(&z);
    g_thread_join(t);
    if (s.cpu_ns > OPEN_US * 1000 / 10) {
        fx_fail("does not wait", "%" G_GUINT64_FORMAT " us of CPU time",
                s.cpu_ns / 1000);
    }
    ram->shadow[5 * FX_PAGE + 100] = 0xee;
    fx_assert_bytes(ram);
    dedup_freezer_close(&f);
    fx_ram_free(ram);
}

/* ---- who comes late, when the window has ended ---- */

typedef struct Racer {
    FxRam *ram;
    uint32_t page;
    int *stop;                /* atomic */
    uint64_t stores;          /* atomic */
} Racer;

FX_GUEST
static gpointer racer_main(gpointer opaque)
{
    Racer *r = opaque;
    FxWord *word = (FxWord *)(fx_addr(r->ram, r->page) + 8);

    while (!__atomic_load_n(r->stop, __ATOMIC_RELAXED)) {
        uint64_t n = __atomic_load_n(&r->stores, __ATOMIC_RELAXED);

        if (*word != n) {
            fx_fail("lost store", "page %u", r->page);
        }
        *word = n + 1;
        __atomic_store_n(&r->stores, n + 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void test_late(gconstpointer data)
{
    FxRam *ram = ram_with_contents(GPOINTER_TO_INT(data));
    Racer racer[WRITERS];
    GThread *thread[WRITERS];
    DedupFreezer f;
    DedupFrozen z;
    uint64_t stores = 0;
    int stop = 0;

    open_freezer(&f);
    for (unsigned i = 0; i < WRITERS; i++) {
        racer[i] = (Racer) { .ram = ram, .page = 8 + i, .stop = &stop };
        memset(fx_addr(ram, 8 + i) + 8, 0, 8);
        thread[i] = g_thread_new("racer", racer_main, &racer[i]);
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        freeze(&z, &f, ram, 8, 1 + i % 3);
        dedup_freeze_end(&z);
        /* the other thread gets to run between two of them */
        if (i % 16 == 0) {
            g_thread_yield();
        }
    }
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < WRITERS; i++) {
        uint64_t *word = (uint64_t *)(ram->shadow + (8 + i) * FX_PAGE + 8);

        g_thread_join(thread[i]);
        g_assert_cmpuint(racer[i].stores, >, 0);
        stores += racer[i].stores;
        *word = racer[i].stores;
    }
    g_test_message("%" G_GUINT64_FORMAT " stores beside %u windows", stores,
                   ROUNDS);
    fx_assert_bytes(ram);
    dedup_freezer_close(&f);
    fx_ram_free(ram);
}

/* ---- what is not ours ---- */

/* So much has been frozen, that the handler looks at everything. */
static void use_freezer(void)
{
    void *page = mmap(NULL, FX_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    static DedupFreezer f;
    DedupFrozen z;

    if (page == MAP_FAILED ||
        !dedup_freezer_open(&f, DEDUP_FREEZE_MPROTECT, -1, NULL)) {
        _exit(3);
    }
    dedup_freeze_announce(&z, &f, page, FX_PAGE);
    if (!dedup_freeze_begin(&z, false)) {
        _exit(3);
    }
    dedup_freeze_end(&z);
}

FX_GUEST
static void store_to(void *addr)
{
    *(FxByte *)addr = 1;
}

static void *read_only_page(void)
{
    return mmap(NULL, FX_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void no_handler(void)
{
    const struct sigaction action = { .sa_handler = SIG_DFL };

    sigaction(SIGSEGV, &action, NULL);
}

/* The default: it ends the process, as if there were no handler. */
static void die_of_null(void)
{
    no_handler();
    use_freezer();
    store_to((void *)8);
}

static void die_of_read_only(void)
{
    no_handler();
    use_freezer();
    store_to(read_only_page());
}

/* A load never meets a window of ours. */
static void die_of_load(void)
{
    void *page = mmap(NULL, FX_PAGE, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    no_handler();
    use_freezer();
    _exit(*(FxByte *)page ? 4 : 5);
}

/* Nor does who jumps to data: a store would pass there, and help nobody. */
static void die_of_jump(void)
{
    void *page = mmap(NULL, FX_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void (*jump)(void);

    no_handler();
    use_freezer();
    memcpy(&jump, &page, sizeof(jump));
    jump();
}

/* Who has frozen it must not wait for himself. */
static void die_of_own_window(void)
{
    void *page = mmap(NULL, FX_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    DedupFreezer f;
    DedupFrozen z;

    no_handler();
    if (!dedup_freezer_open(&f, DEDUP_FREEZE_MPROTECT, -1, NULL)) {
        _exit(3);
    }
    dedup_freeze_announce(&z, &f, page, FX_PAGE);
    dedup_freeze_begin(&z, false);
    store_to(page);
}

/* Somebody has sent it. */
static void die_of_kill(void)
{
    no_handler();
    use_freezer();
    kill(getpid(), SIGSEGV);
    pause();
}

static sigjmp_buf back;
static void *seen;

static void other_handler(int number, siginfo_t *info, void *context)
{
    seen = info->si_addr;
    siglongjmp(back, 1);
}

static void plain_handler(int number)
{
    siglongjmp(back, 1);
}

/* Who was there before gets it, with what the kernel says. */
static void go_on_after(void (*install)(void))
{
    uint8_t *page = read_only_page();

    install();
    use_freezer();
    for (unsigned i = 0; i < 3; i++) {
        if (sigsetjmp(back, 1) == 0) {
            store_to(page + i);
            _exit(4);
        }
        if (seen && seen != page + i) {
            _exit(5);
        }
    }
    _exit(42);
}

static void install_other(void)
{
    const struct sigaction action = {
        .sa_sigaction = other_handler, .sa_flags = SA_SIGINFO,
    };

    sigaction(SIGSEGV, &action, NULL);
}

static void install_plain(void)
{
    const struct sigaction action = { .sa_handler = plain_handler };

    sigaction(SIGSEGV, &action, NULL);
}

static void with_other(void)
{
    go_on_after(install_other);
}

static void with_plain(void)
{
    go_on_after(install_plain);
}

static const struct {
    const char *name;
    void (*what)(void);
    int status;               /* the signal; or 42, its own */
} deaths[] = {
    { "null", die_of_null, SIGSEGV },
    { "read-only", die_of_read_only, SIGSEGV },
    { "load", die_of_load, SIGSEGV },
    { "jump", die_of_jump, SIGSEGV },
    { "own-window", die_of_own_window, SIGSEGV },
    { "kill", die_of_kill, SIGSEGV },
    { "other-handler", with_other, 42 },
    { "plain-handler", with_plain, 42 },
};

/* This program, with the argument. */
static int run_child(const char *name)
{
    const struct rlimit none = { 0, 0 };

    setrlimit(RLIMIT_CORE, &none);
    alarm(CHILD_S); /* it hangs: SIGALRM is not what is wanted */
    for (unsigned i = 0; i < G_N_ELEMENTS(deaths); i++) {
        if (strcmp(deaths[i].name, name) == 0) {
            deaths[i].what();
        }
    }
    return 0;
}

static void test_not_ours(gconstpointer data)
{
    unsigned i = GPOINTER_TO_UINT(data);
    int status;
    pid_t pid = fork();

    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        execl("/proc/self/exe", "test-dedup-mprotect", CHILD, deaths[i].name,
              NULL);
        _exit(6);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    if (deaths[i].status == 42) {
        g_assert_true(WIFEXITED(status));
        g_assert_cmpint(WEXITSTATUS(status), ==, 42);
    } else {
        g_assert_true(WIFSIGNALED(status));
        g_assert_cmpint(WTERMSIG(status), ==, deaths[i].status);
    }
}

/* ---- who has the kernel write ---- */

static gpointer wait_main(gpointer opaque)
{
    Store *s = opaque;

    dedup_freeze_wait(fx_addr(s->ram, s->page), FX_PAGE);
    __atomic_store_n(&s->done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static bool is_waited_for(void *opaque)
{
    return dedup_freeze_is_waited_for(opaque);
}

static void test_kernel_writer(void)
{
    FxRam *ram = ram_with_contents(FX_MEMFD);
    Store s = { .ram = ram, .page = 7 }, beside = { .ram = ram, .page = 8 };
    DedupFreezer f;
    DedupFrozen z;
    GThread *t;

    open_freezer(&f);
    g_assert_cmpuint(*dedup_freeze_windows(), ==, 0);
    dedup_freeze_announce(&z, &f, fx_addr(ram, 4), 4 * FX_PAGE);
    g_assert_cmpuint(*dedup_freeze_windows(), ==, 1);
    /* from the announcement on, not from the freeze on; and only there */
    t = g_thread_new("wait", wait_main, &s);
    wait_main(&beside);
    fx_wait_until(is_waited_for, &z, "nobody waits");
    g_assert_true(dedup_freeze_begin(&z, false));
    g_assert_cmpint(__atomic_load_n(&s.done, __ATOMIC_SEQ_CST), ==, 0);
    dedup_freeze_end(&z);
    g_thread_join(t);
    g_assert_cmpuint(*dedup_freeze_windows(), ==, 0);

    dedup_freeze_announce(&z, &f, fx_addr(ram, 4), 4 * FX_PAGE);
    t = g_thread_new("wait", wait_main, &s);
    fx_wait_until(is_waited_for, &z, "nobody waits");
    dedup_freeze_withdraw(&z);
    g_thread_join(t);
    g_assert_cmpuint(*dedup_freeze_windows(), ==, 0);
    fx_assert_bytes(ram);
    dedup_freezer_close(&f);
    fx_ram_free(ram);
}

/* ---- an engine, and a page that a device writes to all the time ---- */

#define MANY 512
#define DEVICE 200

static struct {
    FxRam *ram;
    int file;
    unsigned windows;         /* scanner's; read when it has ended */
} device;

/* In the middle of each window: the page must not be part of it. */
static void device_writes(int stage)
{
    ssize_t n;

    if (stage != DEDUP_HOOK_JUDGED && stage != DEDUP_HOOK_COPIED) {
        return;
    }
    device.windows++;
    n = pread(device.file, fx_addr(device.ram, DEVICE), FX_PAGE, 0);
    if (n != FX_PAGE) {
        fx_fail("read failed", "%zd, %s", n, g_strerror(errno));
    }
}

static void test_pinned(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), MANY);
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;

    for (uint32_t i = 0; i < MANY; i++) {
        fx_page(ram, i, i % 8);
    }
    device.ram = ram;
    device.windows = 0;
    device.file = memfd_create("test-device", MFD_CLOEXEC);
    g_assert_cmpint(write(device.file, ram->shadow + DEVICE * FX_PAGE,
                          FX_PAGE), ==, FX_PAGE);
    fx_pin(ram, DEVICE);
    dedup_mutant_hook = device_writes;
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    /* all but the 64 KiB around it */
    g_assert_cmpuint(stats.pages_merged + stats.zero_pages, ==, MANY - 16);
    fx_restore_begin(fe, true, false);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, 0);
    fx_engine_free(fe);
    dedup_mutant_hook = NULL;
    g_assert_cmpuint(device.windows, >=, 4);
    fx_unpin(ram, DEVICE);
    fx_assert_bytes(ram);
    close(device.file);
    ram->region = NULL;
    fx_ram_free(ram);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], CHILD) == 0) {
        return run_child(argv[2]);
    }
    g_setenv("DEDUP_TEST_FREEZE", "mprotect", TRUE);
    fx_init(&argc, &argv);
    dedup_mutants_init();
    g_test_add_func("/mprotect/waits", test_waits);
    g_test_add_data_func("/mprotect/late/anon", GINT_TO_POINTER(FX_ANON),
                         test_late);
    g_test_add_data_func("/mprotect/late/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_late);
    for (unsigned i = 0; i < G_N_ELEMENTS(deaths); i++) {
        g_autofree char *path = g_strdup_printf("/mprotect/not-ours/%s",
                                                deaths[i].name);

        g_test_add_data_func(path, GUINT_TO_POINTER(i), test_not_ours);
    }
    g_test_add_func("/mprotect/kernel-writer", test_kernel_writer);
    g_test_add_data_func("/mprotect/pinned/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_pinned);
    g_test_add_data_func("/mprotect/pinned/anon", GINT_TO_POINTER(FX_ANON),
                         test_pinned);
    return g_test_run();
}
