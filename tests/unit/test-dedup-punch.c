/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of punch.c: replaced pages leave the RAM's file, all of them in the
 * end, and none while a reader holds it.
 *
 * A reader is a page in a pipe (vmsplice), with its counter raised as QEMU
 * does for a DMA mapping.  Where the file is made of huge pages the kernel
 * would zero a page under the reader's hands.
 */

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "host/mutant.h"
#include "space/punch.h"

#define PAGES 512               /* a huge page */
#define CHUNK 16                /* pages that one counter covers */
#define READER_CHUNK 3
#define READER_PAGE (READER_CHUNK * CHUNK + 2)
#define SEED(page) ((page) % 8 + 1)

/* One at a time. */
static struct {
    FxRam *ram;
    int pipe[2];
    int holds;                  /* atomic */
} reader;

static void count_reader(int by)
{
    __atomic_fetch_add(&reader.ram->readers[READER_CHUNK], by,
                       __ATOMIC_SEQ_CST);
}

static void reader_takes(uint32_t page)
{
    struct iovec iov = { fx_addr(reader.ram, page), FX_PAGE };

    count_reader(1);
    g_assert_cmpint(vmsplice(reader.pipe[1], &iov, 1, 0), ==, FX_PAGE);
}

/* What it holds is what it found, whatever became of the page. */
static void reader_looks(uint64_t seed)
{
    uint8_t have[FX_PAGE], want[FX_PAGE];
    size_t got = 0;

    fx_content(want, seed);
    while (got < FX_PAGE) {
        ssize_t n = read(reader.pipe[0], have + got, FX_PAGE - got);

        g_assert_cmpint(n, >, 0);
        got += n;
    }
    if (memcmp(have, want, FX_PAGE)) {
        fx_fail("foreign bytes", "in the pipe");
    }
}

/* M11: pages are judged already, and the map does not stand yet. */
static void reader_comes(int stage)
{
    if (stage == DEDUP_HOOK_JUDGED && !g_atomic_int_get(&reader.holds) &&
        !fx_is_merged(reader.ram, READER_PAGE)) {
        g_atomic_int_set(&reader.holds, 1);
        reader_takes(READER_PAGE);
    }
}

static bool reader_page_is_merged(void *opaque)
{
    return fx_is_merged(reader.ram, READER_PAGE);
}

static uint32_t pages_in_file(void)
{
    struct stat st;

    g_assert_cmpint(fstat(reader.ram->fd, &st), ==, 0);
    return st.st_blocks * 512 / FX_PAGE;
}

static bool file_is_empty(void *opaque)
{
    return pages_in_file() == 0;
}

/* RAM with 8 contents, or NULL: skipped. */
static FxRam *ram_new(FxKind kind)
{
    int fd = kind == FX_TMPFS ? fx_huge_tmpfs_file() : -1;

    if (kind == FX_TMPFS && fd < 0) {
        g_test_skip("no tmpfs with huge pages: not root, or no such kernel");
        return NULL;
    }
    reader.ram = kind == FX_TMPFS ? fx_ram_new_file(kind, PAGES, fd)
                                  : fx_ram_new(kind, PAGES);
    g_atomic_int_set(&reader.holds, 0);
    g_assert_cmpint(pipe(reader.pipe), ==, 0);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(reader.ram, i, SEED(i));
    }
    return reader.ram;
}

static FxEngine *engine_start(FxRam *ram)
{
    FxEngine *fe = fx_engine_new(NULL);

    fx_add(fe, ram);
    /* all of it in one window, however slow the machine */
    fe->e->space->bound.page_ns = 1;
    fx_engine_start(fe);
    return fe;
}

static void merge_with_reader(FxEngine **fe, FxRam *ram)
{
    dedup_mutant_hook = reader_comes;
    *fe = engine_start(ram);
    fx_wait_until(reader_page_is_merged, NULL, "not merged");
    fx_wait_settled(*fe);
    g_assert_true(g_atomic_int_get(&reader.holds));
}

static FxEngine *merge_and_stop(FxRam *ram)
{
    FxEngine *fe;

    merge_with_reader(&fe, ram);
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    return fe;
}

static void end(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    dedup_mutant_hook = NULL;
    dedup_sys_hook = NULL;
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
    close(reader.pipe[0]);
    close(reader.pipe[1]);
}

static void test_reader(gconstpointer data)
{
    FxRam *ram = ram_new(GPOINTER_TO_INT(data));
    FxEngine *fe;

    if (!ram) {
        return;
    }
    /* or the page is restored, and the reader sees what was written, too */
    fe = merge_and_stop(ram);
    fx_page(ram, READER_PAGE, 99);
    fx_assert_bytes(ram);
    reader_looks(SEED(READER_PAGE));
    fx_page(ram, READER_PAGE, SEED(READER_PAGE));
    g_assert_false(file_is_empty(NULL));
    fx_set_run(fe, true);
    /* it lets go: the memory goes, too */
    count_reader(-1);
    fx_wait_until(file_is_empty, NULL, "memory stays in the file");
    end(fe, ram);
}

/* A page that nobody wants to merge is held, and keeps the whole folio. */
static void test_neighbour(void)
{
    FxRam *ram = ram_new(FX_TMPFS);
    FxEngine *fe;
    uint32_t held;

    if (!ram) {
        return;
    }
    fx_page(ram, READER_PAGE, 12345);
    reader_takes(READER_PAGE);
    fe = engine_start(ram);
    fx_wait_settled(fe);
    g_assert_false(fx_is_merged(ram, READER_PAGE));
    held = pages_in_file();
    g_assert_cmpuint(held, >, CHUNK);
    reader_looks(12345);
    count_reader(-1);
    fx_wait_settled(fe);
    fx_wait_scans(fe, 3);
    /* its own memory, and no more */
    g_assert_cmpuint(pages_in_file(), ==, 1);
    end(fe, ram);
}

/* A pass that leaves a chunk in the middle: the next one does it. */
static void test_half_a_chunk(void)
{
    FxRam *ram = ram_new(FX_MEMFD);
    const uint32_t half = READER_PAGE - 10;
    FxEngine *fe;

    merge_with_reader(&fe, ram);
    fx_engine_stop(fe);
    reader_looks(SEED(READER_PAGE));
    g_assert_cmpuint(pages_in_file(), ==, CHUNK);
    count_reader(-1);
    dedup_space_lock(fe->e->space);
    dedup_punch_late(ram->region, 0, half);
    dedup_punch_late(ram->region, 0, half);
    g_assert_cmpuint(pages_in_file(), >, 0);
    dedup_punch_late(ram->region, half, PAGES - half);
    g_assert_cmpuint(pages_in_file(), ==, 0);
    g_assert_cmpuint(ram->region->area[0] &
                     (DEDUP_AREA_PUNCH | DEDUP_AREA_UNPUNCHED), ==, 0);
    dedup_space_unlock(fe->e->space);
    end(fe, ram);
}

/* Still in the file when the page is written, and found to be zero. */
static void test_zero_over_stale(void)
{
    FxRam *ram = ram_new(FX_MEMFD);
    FxEngine *fe;

    fe = merge_and_stop(ram);
    reader_looks(SEED(READER_PAGE));
    fx_page(ram, READER_PAGE, 0);
    count_reader(-1);
    /* the scan must not come by between: it would punch */
    dedup_space_lock(fe->e->space);
    ram->region->area[0] &= ~DEDUP_AREA_UNPUNCHED;
    dedup_space_unlock(fe->e->space);
    fx_set_run(fe, true);
    fx_wait_settled(fe);
    g_assert_false(fx_is_merged(ram, READER_PAGE));
    fx_assert_bytes(ram);
    end(fe, ram);
}

static uint32_t merged_in_file(void)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < PAGES; i++) {
        off_t at = (off_t)i * FX_PAGE;

        n += fx_is_merged(reader.ram, i) &&
             lseek(reader.ram->fd, at, SEEK_DATA) == at;
    }
    return n;
}

static bool only_own_in_file(void *opaque)
{
    return merged_in_file() == 0;
}

/* One page is restored, and the file gets a huge page for it. */
static void test_inflated(void)
{
    FxRam *ram = ram_new(FX_TMPFS);
    FxEngine *fe;

    if (!ram) {
        return;
    }
    fe = engine_start(ram);
    fx_wait_settled(fe);
    fx_wait_until(file_is_empty, NULL, "memory stays in the file");
    fx_page(ram, READER_PAGE, 777);
    g_assert_true(dedup_engine_restore_range(fe->e,
                                             fx_addr(ram, READER_PAGE),
                                             FX_PAGE, NULL));
    if (pages_in_file() == 1) {
        g_test_message("no huge page to be had");
    }
    fx_wait_until(only_own_in_file, NULL, "memory stays in the file");
    fx_wait_settled(fe);
    g_assert_cmpuint(pages_in_file(), ==, 1);
    end(fe, ram);
}

/* Writing to the RAM's file. */
static int fails_to_write(DedupSysCall *c)
{
    return fx_is_call(c, "pwrite") ? ENOSPC : 0;
}

/* Mapping it again. */
static int fails_to_map(DedupSysCall *c)
{
    return fx_is_call(c, "mmap") && (c->arg & MAP_TYPE) == MAP_SHARED &&
           (c->arg & MAP_FIXED) ? ENOMEM : 0;
}

/* Restoring fails: the file's page is the reader's still. */
static void test_failed_restore(gconstpointer data)
{
    g_autoptr(GError) error = NULL;
    FxRam *ram = ram_new(FX_TMPFS);
    FxEngine *fe;

    if (!ram) {
        return;
    }
    fe = merge_and_stop(ram);
    dedup_sys_hook = data ? fails_to_map : fails_to_write;
    g_assert_false(dedup_engine_restore_range(fe->e,
                                              fx_addr(ram, READER_PAGE),
                                              FX_PAGE, &error));
    dedup_sys_hook = NULL;
    g_assert_true(fx_is_merged(ram, READER_PAGE));
    fx_assert_bytes(ram);
    reader_looks(SEED(READER_PAGE));
    count_reader(-1);
    fx_unmerge(fe);
    end(fe, ram);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_data_func("/punch/reader/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_reader);
    g_test_add_data_func("/punch/reader/huge-tmpfs",
                         GINT_TO_POINTER(FX_TMPFS), test_reader);
    g_test_add_func("/punch/neighbour", test_neighbour);
    g_test_add_func("/punch/half-a-chunk", test_half_a_chunk);
    g_test_add_func("/punch/inflated", test_inflated);
    g_test_add_func("/punch/zero-over-stale", test_zero_over_stale);
    g_test_add_data_func("/punch/failed-restore/write",
                         GINT_TO_POINTER(false),
                         test_failed_restore);
    g_test_add_data_func("/punch/failed-restore/map",
                         GINT_TO_POINTER(true),
                         test_failed_restore);
    return g_test_run();
}
