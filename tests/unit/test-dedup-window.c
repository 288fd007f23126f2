/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the kernel may refuse in the middle of a window, case C18: every page
 * has the bytes that it had, the ledger says what is mapped, nobody waits for
 * ever.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "host/freeze-ops.h"
#include "engine-internal.h"
#include "space/holdings.h"
#include "space/ledger.h"
#include "host/mutant.h"

#define PAGES 600

static unsigned calls;          /* the scanner's */

/* Mapping a segment fails, and what was there is unmapped. */
static int leaves_holes(DedupSysCall *c)
{
    return fx_maps_segment(c) && calls++ % 3 == 0 && fx_leave_hole(c) ? ENOMEM
                                                                      : 0;
}

static int ram_fd;              /* nothing can be written there */

/* And then nothing can be written to the file either. */
static int leaves_holes_and_no_memory(DedupSysCall *c)
{
    return fx_is_call(c, "pwrite") && c->fd == ram_fd ? ENOSPC
                                                      : leaves_holes(c);
}

/* The end of a window fails once, so that the userfaultfd has to be closed. */
static int loses_userfaultfd(DedupSysCall *c)
{
    return fx_is_ioctl(c, UFFDIO_UNREGISTER) && calls++ == 3 ? ENOMEM : 0;
}

/* Mapping a segment fails, and then there is no memory to fill the page. */
static int has_no_page(DedupSysCall *c)
{
    return fx_is_ioctl(c, UFFDIO_COPY) ||
           (fx_maps_segment(c) && calls++ % 3 == 0) ? ENOMEM : 0;
}

/* Nor can the engine's own be moved there; once. */
static int loses_page(DedupSysCall *c)
{
    return fx_is_ioctl(c, UFFDIO_COPY) || fx_is_ioctl(c, FX_UFFDIO_MOVE) ||
           (fx_maps_segment(c) && calls++ == 5) ? ENOMEM : 0;
}

/* For a while it cannot even be marked. */
static int has_nothing_yet(DedupSysCall *c)
{
    static unsigned fills;

    if (fx_is_ioctl(c, UFFDIO_COPY) || fx_is_ioctl(c, FX_UFFDIO_MOVE) ||
        fx_is_ioctl(c, FX_UFFDIO_POISON)) {
        return fills++ % 200 < 150 ? ENOMEM : 0;
    }
    return fx_maps_segment(c) && calls++ % 3 == 0 ? ENOMEM : 0;
}

static FxRam *ram_new(FxKind kind)
{
    FxRam *ram = fx_ram_new(kind, PAGES);

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i % 7 == 6 ? 1000 + i : i % 20 + 1);
    }
    return ram;
}

static void stop(FxEngine *fe)
{
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
}

static void assert_ledger(const FxRam *ram)
{
    for (uint32_t i = 0; i < PAGES; i++) {
        uint32_t entry = dedup_entry_at(ram->region, i);
        bool merged = dedup_entry_is_segment(entry) &&
                      !dedup_entry_holding(ram->region->space,
                                           entry)->zeroes;

        g_assert_true(merged == fx_is_merged(ram, i));
    }
    fx_assert_bytes(ram);
}

static void end(FxEngine *fe, FxRam *ram)
{
    dedup_sys_hook = NULL;
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* Nobody looks at the pages meanwhile, as that would be the end. */
static FxEngine *merge_failing(FxRam *ram, int (*fails)(DedupSysCall *c))
{
    FxEngine *fe = fx_engine_new(NULL);

    dedup_sys_hook = fails;
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 4);
    stop(fe);
    assert_ledger(ram);
    return fe;
}

static void test_holes(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data));
    FxEngine *fe = merge_failing(ram, leaves_holes);

    /* broken pages, merged again or found to be zero */
    for (uint32_t i = 0; i < PAGES; i += 3) {
        fx_page(ram, i, i % 5);
    }
    fx_set_run(fe, true);
    fx_wait_scans(fe, 4);
    stop(fe);
    assert_ledger(ram);
    end(fe, ram);
}

/* Own pages of shared memory are in their file, which need not be written. */
static void test_no_memory(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data));

    ram_fd = ram->fd;
    end(merge_failing(ram, leaves_holes_and_no_memory), ram);
}

/* All mappings fail at first, then only those that would be for a hole. */
static int leaves_long_hole(DedupSysCall *c)
{
    if (!fx_maps_segment(c) || calls++ >= 8) {
        return 0;
    }
    return calls <= 4 || fx_leave_hole(c) ? ENOMEM : 0;
}

/* Runs as long as a window: they are not flushed, and put back as a whole. */
static void test_long(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 3 * DEDUP_WINDOW_PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    FxView view;

    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_page(ram, i, i % DEDUP_WINDOW_PAGES + 1);
    }
    calls = 0;
    dedup_sys_hook = leaves_long_hole;
    fx_add(fe, ram);
    /* all of it in one window, however slow the machine */
    fe->e->space->bound.page_ns = 1;
    fx_engine_start(fe);
    fx_wait_settled(fe);
    g_assert_cmpuint(calls, >=, 8);
    stop(fe);
    fx_assert_bytes(ram);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, ram->npages);
    end(fe, ram);
}

/*
 * A store to a page of the last batch, when the first is gone: the page was
 * compared already, and is replaced after it.
 */
static struct {
    FxRam *ram;
    GThread *thread;
    int stored;               /* atomic */
} late;

#define LATE_PAGE (DEDUP_WINDOW_PAGES - 2)
#define LATE_VALUE 0x5a
#define LATE_POLLS 100

static FX_GUEST gpointer store_late(gpointer opaque)
{
    *(FxByte *)fx_addr(late.ram, LATE_PAGE) = LATE_VALUE;
    g_atomic_int_set(&late.stored, 1);
    return NULL;
}

/* Whether it gets through is what is asked: so it is given some time. */
static void stores_late(int stage)
{
    if (stage != DEDUP_HOOK_FLUSHED || late.thread ||
        fx_is_merged(late.ram, LATE_PAGE)) {
        return;
    }
    late.thread = g_thread_new("late", store_late, NULL);
    for (unsigned i = 0; i < LATE_POLLS && !g_atomic_int_get(&late.stored);
         i++) {
        g_usleep(1000);
    }
}

/* A window of isolated pages, more than can be put back: several batches. */
static void test_batches(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 2 * DEDUP_WINDOW_PAGES);
    FxEngine *fe = fx_engine_new(NULL);

    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_page(ram, i, i % 2 ? 5000 + i : i % DEDUP_WINDOW_PAGES + 1);
    }
    late.ram = ram;
    late.thread = NULL;
    late.stored = 0;
    dedup_mutant_hook = stores_late;
    fx_add(fe, ram);
    fe->e->space->bound.page_ns = 1;
    fx_engine_start(fe);
    fx_wait_settled(fe);
    stop(fe);
    dedup_mutant_hook = NULL;
    if (!late.thread) {
        g_test_skip("this kernel has no process_madvise() that drops pages");
    } else {
        g_thread_join(late.thread);
        if (*fx_addr(ram, LATE_PAGE) != LATE_VALUE) {
            fx_fail("lost store", "page %u", (unsigned)LATE_PAGE);
        }
        ram->shadow[LATE_PAGE * FX_PAGE] = LATE_VALUE;
    }
    fx_assert_bytes(ram);
    end(fe, ram);
}

/* Does this kernel drop a window's pages before they are replaced? */
static bool has_flush(FxEngine *fe)
{
    if (!dedup_freezer_drops(&fe->e->space->freezer)) {
        g_test_skip("no page is dropped before its replacement is mapped");
        return false;
    }
    if (!fe->e->space->process.has_madvise_vector) {
        g_test_skip("this kernel has no process_madvise() that drops pages");
    }
    return fe->e->space->process.has_madvise_vector;
}

/* Pages that were dropped come back, without a page from the kernel. */
static void refill(FxKind kind, int (*fails)(DedupSysCall *c))
{
    FxRam *ram = ram_new(kind);
    FxEngine *fe;

    calls = 0;
    fe = merge_failing(ram, fails);
    if (has_flush(fe)) {
        g_assert_cmpuint(calls, >, 3);
    }
    fx_assert_bytes(ram);
    fx_set_run(fe, true);
    fx_wait_scans(fe, 4);
    stop(fe);
    assert_ledger(ram);
    end(fe, ram);
}

/* May a page be read?  Asked of the kernel, as a read would be the end. */
static bool is_lost(const FxRam *ram, uint32_t page, int fd)
{
    ssize_t ret = pwrite(fd, fx_addr(ram, page), FX_PAGE, 0);

    g_assert_true(ret == FX_PAGE || (ret < 0 && (errno == EFAULT ||
                                                 errno == EHWPOISON)));
    return ret < 0;
}

static void test_refill(gconstpointer data)
{
    refill(GPOINTER_TO_INT(data), has_no_page);
}

static void test_refill_later(gconstpointer data)
{
    refill(GPOINTER_TO_INT(data), has_nothing_yet);
}

/*
 * Where all fails, nobody sees other bytes: who touches the page is told by
 * the kernel that the memory is lost, as of a broken one.
 */
static void test_lost(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data));
    int fd = memfd_create("test-file", MFD_CLOEXEC);
    unsigned lost = 0;
    FxEngine *fe;

    fe = fx_engine_new(NULL);
    calls = 0;
    dedup_sys_hook = loses_page;
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 6);
    stop(fe);
    dedup_sys_hook = NULL;
    for (uint32_t i = 0; i < PAGES; i++) {
        if (is_lost(ram, i, fd)) {
            lost++;
            g_assert_false(fx_is_merged(ram, i));
            g_assert_cmpint(madvise(fx_addr(ram, i), FX_PAGE, MADV_DONTNEED),
                            ==, 0);
            fx_page(ram, i, 5000 + i);
        }
    }
    if (has_flush(fe)) {
        g_assert_cmpuint(lost, >=, 1);
        g_assert_cmpuint(lost, <=, DEDUP_WINDOW_PAGES);
    }
    assert_ledger(ram);
    close(fd);
    end(fe, ram);
}

static bool is_merged(void *opaque)
{
    return fx_is_merged(opaque, PAGES - 1);
}

/* It is closed, which thaws and wakes; another one is opened. */
static void test_userfaultfd(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data));
    FxEngine *fe = fx_engine_new(NULL);

    if (fx_freeze == DEDUP_FREEZE_MPROTECT) {
        g_test_skip("there is no userfaultfd");
        fx_engine_free(fe);
        fx_ram_free(ram);
        return;
    }
    fx_page(ram, PAGES - 1, 1);
    calls = 0;
    dedup_sys_hook = loses_userfaultfd;
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_state(fe, DEDUP_STATE_BLOCKED);
    g_assert_true(dedup_engine_lost_userfaultfd(fe->e));
    for (uint32_t i = 0; i < PAGES; i += 3) {
        fx_page(ram, i, i % 20 + 1);
    }
    fx_wait_until(is_merged, ram, "not merged");
    g_assert_false(dedup_engine_lost_userfaultfd(fe->e));
    fx_wait_settled(fe);
    stop(fe);
    assert_ledger(ram);
    end(fe, ram);
}

/* As with -overcommit mem-lock=on-fault. */
static void test_locked(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data));
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;

    for (uint32_t i = 0; i < PAGES; i += 5) {
        fx_page(ram, i, 0);
    }
    if (mlock2(ram->host, (size_t)PAGES * FX_PAGE, MLOCK_ONFAULT) < 0) {
        g_test_skip("memory may not be locked here");
    } else {
        fx_add(fe, ram);
        fx_engine_start(fe);
        fx_wait_settled(fe);
        fx_stats(fe, &stats);
        g_assert_cmpuint(stats.limits, ==, 0);
        g_assert_cmpuint(stats.zero_pages, ==, PAGES / 5);
        g_assert_cmpuint(stats.pages_merged, >, PAGES / 2);
        stop(fe);
        assert_ledger(ram);
    }
    end(fe, ram);
}

/* Zero pages of anonymous memory, where the kernel cannot freeze them. */
static void test_zeroes(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data));
    bool anon = ram->fd < 0 && fx_freeze == DEDUP_FREEZE_USERFAULTFD;
    DedupStats stats;
    FxEngine *fe;

    for (uint32_t i = 0; i < PAGES; i += 2) {
        fx_page(ram, i, 0);
    }
    fe = fx_engine_new(NULL);
    fe->e->space->freezer.zero_anon = !anon;
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.zero_pages, ==, anon ? 0 : PAGES / 2);
    g_assert_cmpuint(stats.pages_merged, >, PAGES / 3);
    stop(fe);
    assert_ledger(ram);
    end(fe, ram);
}

/* From Linux 6.12 a huge page that is split maps the page of zeros. */
static bool splits_into_zeroes(void)
{
    struct utsname name;
    unsigned major, minor;

    g_assert_cmpint(uname(&name), ==, 0);
    g_assert_cmpint(sscanf(name.release, "%u.%u", &major, &minor), ==, 2);
    return major > 6 || (major == 6 && minor >= 12);
}

/* This kernel is none of these, and trying it out says so. */
static void test_probe(void)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    DedupFreezer f;
    FxRam *ram = fx_ram_new(FX_ANON_THP, 512);
    FxView view;

    g_assert_true(dedup_freezer_open(&f, DEDUP_FREEZE_USERFAULTFD, pagemap,
                                     NULL));
    fx_page(ram, 0, 1);
    fx_view(ram, &view);
    if (!splits_into_zeroes()) {
        g_test_skip("no page of zeros comes of a split before Linux 6.12");
    } else if (!view.huge_pages) {
        g_test_skip("no huge page to be had");
    } else {
        g_assert_cmpint(dedup_uffd_probe_split(f.uffd, pagemap), ==,
                        f.zero_anon);
    }
    close(pagemap);
    dedup_freezer_close(&f);
    fx_ram_free(ram);
}

static void add_tests(const char *name, GTestDataFunc test, unsigned kinds)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/window/%s/%s", name,
                                                fx_kind_name(kind));

        if (kinds & 1 << kind) {
            g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
        }
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("holes", test_holes, ~0);
    add_tests("long", test_long, ~0);
    add_tests("batches", test_batches, 1 << FX_ANON | 1 << FX_MEMFD);
    add_tests("no-memory", test_no_memory, 1 << FX_MEMFD | 1 << FX_TMPFS);
    add_tests("refill", test_refill, 1 << FX_ANON | 1 << FX_ANON_THP);
    add_tests("refill-later", test_refill_later, 1 << FX_ANON);
    add_tests("lost", test_lost, 1 << FX_ANON);
    add_tests("locked", test_locked, 1 << FX_MEMFD | 1 << FX_ANON);
    add_tests("zeroes", test_zeroes, 1 << FX_MEMFD | 1 << FX_ANON);
    g_test_add_func("/window/probe", test_probe);
    add_tests("userfaultfd", test_userfaultfd, 1 << FX_MEMFD | 1 << FX_ANON);
    return g_test_run();
}
