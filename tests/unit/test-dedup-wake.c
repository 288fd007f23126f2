/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Whoever was made to wait is woken, on every path (I3), case C12: the page
 * is replaced, the window is aborted, the range is mapped anew, the freeze
 * fails half-way, the descriptor closes; and with the whole engine: the
 * region goes, the scanner stops, is blocked, switched off.
 *
 * That a thread waits is known from the userfaultfd: it is readable while a
 * fault is queued that nobody has read.
 */

#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "host/freeze.h"
#include "space/spare.h"

#define PAGES 64

/* How the waiter meets the frozen page. */
typedef enum Access {
    STORE,          /* an instruction */
    READ_CALL,      /* read(2) into it: a fault of the kernel's */
    ACCESSES
} Access;

typedef struct Waiter {
    GThread *thread;
    FxRam *ram;
    uint32_t page;
    Access access;
    int pipe[2];
    int done;       /* atomic */
} Waiter;

FX_GUEST
static gpointer waiter_main(gpointer opaque)
{
    Waiter *w = opaque;
    uint8_t *p = fx_addr(w->ram, w->page) + 100;

    if (w->access == STORE) {
        *(FxByte *)p = 0xee;
    } else {
        ssize_t n;

        if (fx_freeze == DEDUP_FREEZE_MPROTECT) {
            fx_pin(w->ram, w->page);
        }
        n = read(w->pipe[0], p, 1);
        if (fx_freeze == DEDUP_FREEZE_MPROTECT) {
            fx_unpin(w->ram, w->page);
        }
        if (n != 1) {
            return NULL;        /* not done */
        }
    }
    __atomic_store_n(&w->done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void waiter_start(Waiter *w, FxRam *ram, uint32_t page, Access access)
{
    const uint8_t byte = 0xee;

    memset(w, 0, sizeof(*w));
    w->ram = ram;
    w->page = page;
    w->access = access;
    g_assert_cmpint(pipe(w->pipe), ==, 0);
    g_assert_cmpint(write(w->pipe[1], &byte, 1), ==, 1);
    w->thread = g_thread_new("waiter", waiter_main, w);
}

static bool is_waited_for(void *opaque)
{
    return dedup_freeze_is_waited_for(opaque);
}

static void await_waiting(DedupFrozen *z, Waiter *w)
{
    fx_wait_until(is_waited_for, z, "nobody waits");
    g_assert_cmpint(__atomic_load_n(&w->done, __ATOMIC_SEQ_CST), ==, 0);
}

static bool is_done(void *opaque)
{
    Waiter *w = opaque;

    return __atomic_load_n(&w->done, __ATOMIC_SEQ_CST);
}

static void await_woken(Waiter *w)
{
    gint64 end = g_get_monotonic_time() + fx_hang_us();

    while (!is_done(w)) {
        if (g_get_monotonic_time() > end) {
            fx_fail("writer hangs", "%s page %u, access %d",
                    fx_kind_name(w->ram->kind), w->page, w->access);
        }
        g_usleep(500);
    }
    g_thread_join(w->thread);
    close(w->pipe[0]);
    close(w->pipe[1]);
    w->ram->shadow[(size_t)w->page * FX_PAGE + 100] = 0xee;
    fx_assert_bytes(w->ram);
}

static FxRam *ram_with_contents(FxKind kind)
{
    FxRam *ram = fx_ram_new(kind, PAGES);

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i + 1);
    }
    return ram;
}

static void open_freezer(DedupFreezer *f)
{
    g_autoptr(GError) error = NULL;

    dedup_freezer_open(f, fx_freeze, -1, &error);
    g_assert_no_error(error);
}

static bool freeze(DedupFrozen *z, DedupFreezer *f, void *addr, size_t len,
                   bool missing)
{
    dedup_freeze_announce(z, f, addr, len);
    return dedup_freeze_begin(z, missing);
}

/* A file with the contents of pages 8 to 24: a segment's stand-in. */
static int make_copy(FxRam *ram)
{
    int fd = memfd_create("test-copy", MFD_CLOEXEC);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(write(fd, ram->shadow + 8 * FX_PAGE, 16 * FX_PAGE), ==,
                    16 * FX_PAGE);
    return fd;
}

typedef enum Path { REPLACED, ABORTED, CLOSED, PATHS } Path;

static void test_freeze(gconstpointer data)
{
    FxRam *ram = ram_with_contents(GPOINTER_TO_INT(data));

    for (Path path = 0; path < PATHS; path++) {
        if (path == CLOSED && fx_freeze == DEDUP_FREEZE_MPROTECT) {
            continue; /* nothing but the end of the window thaws */
        }
        for (Access access = 0; access < ACCESSES; access++) {
            uint32_t page = 8 + path * ACCESSES + access;
            uint8_t *addr = fx_addr(ram, 8);
            size_t len = 16 * FX_PAGE;
            int fd = make_copy(ram);
            DedupFreezer f;
            DedupFrozen z;
            Waiter w;

            open_freezer(&f);
            g_assert_true(freeze(&z, &f, addr, len, false));
            waiter_start(&w, ram, page, access);
            await_waiting(&z, &w);
            /* a reader passes */
            fx_assert_page(ram, 10, ram->shadow + 10 * FX_PAGE);
            switch (path) {
            case REPLACED:
                g_assert_true(mmap(addr, len, PROT_READ | PROT_WRITE,
                                   MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE,
                                   fd, 0) == addr);
                dedup_freeze_end(&z);
                break;
            case ABORTED:
                dedup_freeze_end(&z);
                break;
            default:
                break;
            }
            if (path == CLOSED) {
                dedup_freezer_close(&f);
            }
            await_woken(&w);
            dedup_freezer_close(&f);
            close(fd);
        }
    }
    fx_ram_free(ram);
}

static void assert_all_pass(FxRam *ram, uint32_t first, uint32_t last)
{
    for (uint32_t page = first; page <= last; page++) {
        Waiter w;

        waiter_start(&w, ram, page, STORE);
        await_woken(&w);
    }
}

/* A freeze that cannot be had, or only of a part, leaves nothing frozen. */
static void test_failed_freeze(gconstpointer data)
{
    FxRam *ram = ram_with_contents(GPOINTER_TO_INT(data));
    DedupFreezer f, other;
    DedupFrozen z, theirs;

    open_freezer(&f);
    open_freezer(&other);
    if (fx_freeze == DEDUP_FREEZE_USERFAULTFD) {
        /* somebody else's userfaultfd on the last pages of the range */
        g_assert_true(freeze(&theirs, &other, fx_addr(ram, 12), 4 * FX_PAGE,
                             false));
        g_assert_false(freeze(&z, &f, fx_addr(ram, 8), 8 * FX_PAGE, false));
        g_assert_cmpint(errno, ==, EBUSY);
        assert_all_pass(ram, 8, 11);
        dedup_freeze_end(&theirs);
        assert_all_pass(ram, 12, 15);
    }

    /* a hole in the address space at its end */
    munmap(ram->host + PAGES * FX_PAGE, FX_PAGE);
    if (freeze(&z, &f, fx_addr(ram, PAGES - 4), 5 * FX_PAGE, false)) {
        dedup_freeze_end(&z);
    } else {
        g_assert_true(fx_freeze == DEDUP_FREEZE_USERFAULTFD ||
                      errno == ENOMEM);
    }
    assert_all_pass(ram, PAGES - 4, PAGES - 1);
    dedup_freezer_close(&f);
    dedup_freezer_close(&other);
    fx_ram_free(ram);
}

typedef struct Reader {
    FxRam *ram;
    uint32_t page;
    uint64_t seen;
    int done;
} Reader;

FX_GUEST
static gpointer reader_main(gpointer opaque)
{
    Reader *r = opaque;

    r->seen = *(FxWord *)fx_addr(r->ram, r->page);
    __atomic_store_n(&r->done, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* Anonymous memory: a reader of a dropped page waits, and sees the refill. */
static void test_missing(void)
{
    FxRam *ram = ram_with_contents(FX_ANON);
    uint8_t *addr = fx_addr(ram, 4);
    Reader r = { .ram = ram, .page = 5 };
    DedupSpare spare = { NULL };
    DedupFreezer f;
    DedupFrozen z;
    gint64 end;
    GThread *t;

    open_freezer(&f);
    if (!dedup_freezer_drops(&f)) {
        g_test_skip("it drops nothing");
        dedup_freezer_close(&f);
        fx_ram_free(ram);
        return;
    }
    g_assert_true(dedup_spare_ready(&spare));
    g_assert_true(freeze(&z, &f, addr, 4 * FX_PAGE, true));
    g_assert_cmpint(madvise(addr, 4 * FX_PAGE, MADV_DONTNEED), ==, 0);
    t = g_thread_new("reader", reader_main, &r);
    fx_wait_until(is_waited_for, &z, "nobody waits");
    g_assert_cmpint(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), ==, 0);
    for (uint32_t i = 4; i < 8; i++) {
        g_assert_true(dedup_freeze_refill(&z, fx_addr(ram, i),
                                          ram->shadow + i * FX_PAGE,
                                          dedup_spare_take(&spare, i)));
    }
    dedup_freeze_end(&z);
    end = g_get_monotonic_time() + fx_hang_us();
    while (!__atomic_load_n(&r.done, __ATOMIC_SEQ_CST)) {
        if (g_get_monotonic_time() > end) {
            fx_fail("reader hangs", "in a page that was refilled");
        }
        g_usleep(500);
    }
    g_thread_join(t);
    g_assert_cmpuint(r.seen, ==, *(uint64_t *)(ram->shadow + 5 * FX_PAGE));
    fx_assert_bytes(ram);
    dedup_spare_free(&spare);
    dedup_freezer_close(&f);
    fx_ram_free(ram);
}

/* ---- the engine ---- */

typedef struct Hammer {
    GThread *thread;
    FxRam *ram;
    uint32_t first, n;
    int stop;
    uint64_t stores;
} Hammer;

static gpointer hammer_main(gpointer opaque)
{
    Hammer *h = opaque;
    uint64_t i = 0;

    while (!__atomic_load_n(&h->stop, __ATOMIC_RELAXED)) {
        uint32_t page = h->first + i % h->n;

        /* contents come back after a round: merged at first sight */
        fx_page(h->ram, page, i / h->n % 3 + 1);
        i++;
        __atomic_store_n(&h->stores, i, __ATOMIC_RELAXED);
        if (i % h->n == 0) {
            g_usleep(200);
        }
    }
    return NULL;
}

static void await_stores(Hammer *h, unsigned n, const char *after)
{
    gint64 end = g_get_monotonic_time() + fx_hang_us();

    for (unsigned i = 0; i < n; i++) {
        uint64_t from = __atomic_load_n(&h[i].stores, __ATOMIC_RELAXED);

        /* each page twice */
        while (__atomic_load_n(&h[i].stores, __ATOMIC_RELAXED) <
               from + 2 * h[i].n) {
            if (g_get_monotonic_time() > end) {
                fx_fail("writer hangs", "after %s", after);
            }
            g_usleep(200);
        }
    }
}

#define ENGINE_PAGES 256
#define ROUNDS 12

static void test_engine(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), ENGINE_PAGES);
    Hammer h[2] = {
        { .ram = ram, .first = 0, .n = 128 },
        { .ram = ram, .first = 128, .n = 128 },
    };
    uint64_t merged = 0;

    for (unsigned i = 0; i < 2; i++) {
        h[i].thread = g_thread_new("writer", hammer_main, &h[i]);
    }
    for (unsigned round = 0; round < ROUNDS; round++) {
        FxEngine *fe = fx_engine_new(NULL);
        DedupParams params;
        DedupStats stats;

        dedup_engine_get_params(fe->e, &params);
        params.sleep_millisecs = 0;
        dedup_engine_set_params(fe->e, &params);
        fx_add(fe, ram);
        fx_engine_start(fe);
        fx_wait_scans(fe, 20);
        switch (round % 4) {
        case 0:
            fx_remove(ram, true);
            await_stores(h, 2, "the region went");
            fx_engine_stop(fe);
            break;
        case 1:
            fx_engine_stop(fe);
            await_stores(h, 2, "the scanner stopped");
            fx_remove(ram, true);
            break;
        case 2:
            dedup_engine_block(fe->e, true, round % 8 == 2);
            await_stores(h, 2, "the engine was blocked");
            dedup_engine_block(fe->e, false, false);
            fx_wait_scans(fe, 2);
            fx_remove(ram, true);
            break;
        default:
            fx_set_run(fe, false);
            await_stores(h, 2, "the scanner was switched off");
            fx_unmerge(fe);
            await_stores(h, 2, "an unmerge");
            fx_remove(ram, true);
            break;
        }
        await_stores(h, 2, "all");
        fx_stats(fe, &stats);
        merged += stats.cow_breaks;
        fx_engine_free(fe);
    }
    /* it was not for nothing */
    g_assert_cmpuint(merged, >, 100);
    for (unsigned i = 0; i < 2; i++) {
        __atomic_store_n(&h[i].stop, 1, __ATOMIC_RELAXED);
        g_thread_join(h[i].thread);
    }
    fx_assert_bytes(ram);
    fx_ram_free(ram);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/wake/%s/%s", name,
                                                fx_kind_name(kind));

        if (kind != FX_ANON_THP) {
            g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
        }
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("freeze", test_freeze);
    add_tests("failed-freeze", test_failed_freeze);
    g_test_add_func("/wake/missing", test_missing);
    add_tests("engine", test_engine);
    return g_test_run();
}
