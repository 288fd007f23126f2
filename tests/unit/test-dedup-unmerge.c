/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The way back: unmerging whole and half, discarding, regions that come and
 * go, and what a fork's child sees.  Cases C5, C7 and C8 of
 * docs/devel/dedup-hazards.rst, for RAM of each kind.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "scan/scan-internal.h"
#include "host/freeze.h"
#include "host/mutant.h"

#define PAGES 1024

static bool is_shared(const FxRam *ram)
{
    return ram->kind == FX_MEMFD || ram->kind == FX_TMPFS;
}

/*
 * Merged, broken, dropped and own pages, in runs and isolated: of eight, one
 * is zero and one is unique.
 */
static void fill(FxRam *ram)
{
    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_page(ram, i, 1);
        fx_page(ram, i, i % 8 == 3 ? 0 : i % 8 == 6 ? 7000 + i :
                        i % 128 + 1);
    }
}

static void start_mixed(FxEngine *fe, FxRam *ram)
{
    FxView view;

    fill(ram);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, ram->npages / 8 * 6);
    /* stopped: what is broken now stays so */
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    for (uint32_t i = 0; i < ram->npages; i += 13) {
        fx_byte(ram, i, i, i * 3 + 1);
    }
    fx_assert_bytes(ram);
}

static void end(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

static void assert_whole(FxEngine *fe, FxRam *ram)
{
    FxView view;

    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    g_assert_true(dedup_engine_is_whole(fe->e));
    g_assert_cmpuint(dedup_region_pages_merged(ram->region), ==, 0);
    if (is_shared(ram)) {
        /* the file's mapping is one again */
        g_assert_cmpuint(view.maps, ==, 1);
    }
}

static bool no_segments(void *opaque)
{
    FxSegments segments;

    fx_segments(&segments);
    return segments.files == 0;
}

static void test_whole(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    DedupParams params;
    FxView view;

    start_mixed(fe, ram);
    g_assert_false(dedup_engine_is_whole(fe->e));
    fx_unmerge(fe);
    assert_whole(fe, ram);
    g_assert_true(no_segments(NULL));
    fx_view(ram, &view);
    /* all but what was dropped as zero and not written since */
    g_assert_cmpuint(view.own_pages, >=, PAGES / 8 * 7);
    fx_assert_bytes(ram);
    dedup_engine_get_params(fe->e, &params);
    g_assert_false(params.run);

    /* once more from the start */
    fx_set_run(fe, true);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, >, PAGES / 2);
    fx_assert_bytes(ram);
    /* a restore that is no unmerge goes on scanning */
    fx_restore_begin(fe, false, false);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, 0);
    dedup_engine_get_params(fe->e, &params);
    g_assert_true(params.run);
    /* unused segments are let go at the end of a pass, too */
    fx_wait_settled(fe);
    g_assert_false(no_segments(NULL));
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 100000 + i);
    }
    fx_wait_until(no_segments, NULL, "segments stay");
    fx_unmerge(fe);
    assert_whole(fe, ram);
    end(fe, ram);
}

/* The last region goes: its metadata and segments go at once, run or not. */
static void test_removed(gconstpointer data)
{
    for (int run = 0; run < 2; run++) {
        FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
        FxEngine *fe = fx_engine_new(NULL);

        start_mixed(fe, ram);
        g_assert_false(no_segments(NULL));
        if (!run) {
            fx_set_run(fe, false);
            fx_wait_state(fe, DEDUP_STATE_STOPPED);
        }
        g_assert_true(dedup_region_remove(ram->region, true, NULL));
        ram->region = NULL;
        fx_wait_until(no_segments, NULL, run ? "segments stay, scanning"
                                             : "segments stay, at rest");
        fx_assert_bytes(ram);
        fx_engine_free(fe);
        fx_ram_free(ram);
    }
}

static void test_half(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autoptr(GError) error = NULL;
    FxView before, after;

    start_mixed(fe, ram);
    fx_view(ram, &before);
    g_assert_true(dedup_engine_restore_range(fe->e, ram->host,
                                             PAGES / 2 * FX_PAGE, &error));
    g_assert_no_error(error);
    fx_view(ram, &after);
    g_assert_cmpuint(after.segment_pages, ==, before.segment_pages / 2);
    for (uint32_t i = 0; i < PAGES / 2; i += 17) {
        g_assert_false(fx_is_merged(ram, i));
    }
    fx_assert_bytes(ram);
    /* odd edges, and a range over the end of the region */
    g_assert_true(dedup_engine_restore_range(fe->e, fx_addr(ram, 600),
                                             3 * FX_PAGE, &error));
    g_assert_true(dedup_engine_restore_range(fe->e, fx_addr(ram, 1000),
                                             PAGES * FX_PAGE, &error));
    g_assert_false(fx_is_merged(ram, 601));
    g_assert_false(fx_is_merged(ram, PAGES - 1));
    g_assert_true(fx_is_merged(ram, 604));
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    assert_whole(fe, ram);
    end(fe, ram);
}

/* As ram_block_discard_range() does after its hook. */
static void discard(FxEngine *fe, FxRam *ram, uint32_t first, uint32_t n)
{
    size_t len = (size_t)n * FX_PAGE;

    g_assert_true(dedup_engine_discard_begin(fe->e, fx_addr(ram, first),
                                             len));
    if (ram->fd >= 0) {
        g_assert_cmpint(fallocate(ram->fd, FALLOC_FL_PUNCH_HOLE |
                                  FALLOC_FL_KEEP_SIZE,
                                  (off_t)first * FX_PAGE, len), ==, 0);
    }
    if (!is_shared(ram)) {
        g_assert_cmpint(madvise(fx_addr(ram, first), len, MADV_DONTNEED),
                        ==, 0);
    }
    dedup_engine_discard_end(fe->e);
    for (uint32_t i = first; i < first + n; i++) {
        fx_shadow_page(ram, i, 0);
    }
}

static void test_discard(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autofree uint8_t *resident = g_malloc0(PAGES);

    start_mixed(fe, ram);
    discard(fe, ram, 0, 1);
    discard(fe, ram, 13, 1);
    discard(fe, ram, 100, 300);
    discard(fe, ram, PAGES - 5, 5);
    fx_resident(ram, resident);
    for (uint32_t i = 100; i < 400; i++) {
        g_assert_cmpuint(resident[i], ==, 0);
        g_assert_false(i % 50 == 0 && fx_is_merged(ram, i));
    }
    fx_assert_bytes(ram);
    fx_page(ram, 200, 5);
    fx_unmerge(fe);
    assert_whole(fe, ram);
    fx_assert_bytes(ram);

    /* while the scanner runs */
    fx_set_run(fe, true);
    for (unsigned round = 0; round < 50; round++) {
        uint32_t first = round * 37 % (PAGES - 64);

        discard(fe, ram, first, 1 + round % 64);
        for (uint32_t i = first; i < first + 32; i++) {
            fx_page(ram, i, i % 128 + 1);
        }
        fx_assert_bytes(ram);
    }
    fx_wait_settled(fe);
    fx_assert_bytes(ram);
    end(fe, ram);
}

/*
 * Somebody else's userfaultfd holds the range: nothing can be frozen, so
 * pages stay as they are, with their bytes, and the caller is told.
 */
static void test_foreign_uffd(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autoptr(GError) error = NULL;
    DedupFreezer f;
    struct uffdio_register reg = {
        .range = { .start = (uintptr_t)fx_addr(ram, 256),
                   .len = 256 * FX_PAGE },
        .mode = UFFDIO_REGISTER_MODE_WP,
    };
    struct uffdio_range range;
    FxView before, after;

    if (fx_freeze == DEDUP_FREEZE_MPROTECT) {
        g_test_skip("it needs no userfaultfd");
        end(fe, ram);
        return;
    }
    dedup_freezer_open(&f, DEDUP_FREEZE_USERFAULTFD, -1, &error);
    g_assert_no_error(error);
    start_mixed(fe, ram);
    fx_view(ram, &before);
    g_assert_cmpint(ioctl(f.uffd, UFFDIO_REGISTER, &reg), ==, 0);

    fx_restore_begin(fe, true, false);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, >=, 256 / 8 * 6);
    g_assert_nonnull(fe->message);
    fx_assert_bytes(ram);
    g_assert_false(dedup_engine_restore_range(fe->e, fx_addr(ram, 256),
                                              64 * FX_PAGE, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_STATE);
    fx_view(ram, &after);
    g_assert_cmpuint(after.segment_pages, ==, before.segment_pages / 4);
    /* it merges around it, and leaves it alone */
    fx_set_run(fe, true);
    fx_wait_scans(fe, 4);
    fx_assert_bytes(ram);

    range = reg.range;
    g_assert_cmpint(ioctl(f.uffd, UFFDIO_UNREGISTER, &range), ==, 0);
    dedup_freezer_close(&f);
    fx_unmerge(fe);
    assert_whole(fe, ram);
    end(fe, ram);
}

/* C7: regions come and go while the scanner runs. */
static void test_regions(gconstpointer data)
{
    FxKind kind = GPOINTER_TO_INT(data);
    FxRam *a = fx_ram_new(kind, PAGES);
    FxRam *b = fx_ram_new((kind + 1) % FX_KINDS, PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;
    FxView view;

    fill(a);
    fill(b);
    fx_engine_start(fe);
    fx_wait_state(fe, DEDUP_STATE_SCANNING);
    fx_add(fe, a);
    fx_wait_settled(fe);
    fx_add(fe, b);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_total, ==, 2 * PAGES);
    fx_view(b, &view);
    g_assert_cmpuint(view.segment_pages, >=, PAGES / 8 * 6);

    /* taken away with its contents: the other keeps its own */
    fx_remove(a, true);
    fx_view(a, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    fx_assert_bytes(a);
    fx_assert_bytes(b);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_total, ==, PAGES);

    /* again and again, in the middle of passes; unmapped while it merges */
    for (unsigned i = 0; i < 20; i++) {
        FxRam *c = fx_ram_new(kind, 256);

        fill(c);
        fx_add(fe, c);
        fx_wait_scans(fe, i % 3);
        fx_assert_bytes(c);
        fx_remove(c, i % 2);
        fx_assert_bytes(c);
        fx_ram_free(c);
    }
    fx_add(fe, a);
    fx_wait_settled(fe);
    fx_view(a, &view);
    g_assert_cmpuint(view.segment_pages, >=, PAGES / 8 * 6);
    fx_assert_bytes(a);
    fx_assert_bytes(b);
    fx_remove(b, false);
    fx_ram_free(b);
    end(fe, a);
}

/* Pages of the range that a fork's child can see. */
static unsigned seen_by_child(const FxRam *ram)
{
    int status;
    pid_t pid = fork();

    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        unsigned seen = 0;
        unsigned char vec;

        for (uint32_t i = 0; i < ram->npages; i++) {
            /* ENOMEM: not mapped */
            seen += mincore(fx_addr(ram, i), FX_PAGE, &vec) == 0;
        }
        _exit(MIN(seen, 255));
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* C8: DONTFORK holds for merged, broken, dropped and restored pages. */
static void test_fork(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    const char *when = "merged";
    unsigned seen;

    g_assert_cmpuint(seen_by_child(ram), ==, 0);
    start_mixed(fe, ram);
    seen = seen_by_child(ram);
    if (!seen) {
        when = "half restored";
        g_assert_true(dedup_engine_restore_range(fe->e, ram->host,
                                                 PAGES / 2 * FX_PAGE,
                                                 NULL));
        discard(fe, ram, 300, 500);
        seen = seen_by_child(ram);
    }
    if (!seen) {
        when = "restored";
        fx_unmerge(fe);
        seen = seen_by_child(ram);
    }
    if (seen) {
        fx_fail("child sees the range", "%u pages or more, %s", seen, when);
    }
    end(fe, ram);
}

static bool note_claim(void *opaque, const DedupHint *hint)
{
    *(unsigned *)opaque += hint->kind == DEDUP_HINT_CLAIMED;
    return false;
}

static unsigned claims(FxEngine *fe)
{
    uint64_t cursor = 0;
    unsigned n = 0;

    if (dedup_group_is_joined(fe->e->group)) {
        dedup_index_sweep(fe->e->scan->index, &cursor, UINT32_MAX, note_claim,
                          &n);
    }
    return n;
}

static bool has_claims(void *opaque)
{
    return claims(opaque) > 0;
}

/* What is claimed when the scan is stopped is not published: no claim stays. */
static void test_claims(void)
{
    FxRam *ram = fx_ram_new(FX_MEMFD, 1024);
    FxEngine *fe = fx_engine_new(NULL);
    DedupParams params;

    for (uint32_t i = 0; i < 1024; i++) {
        fx_page(ram, i, i / 2 + 1);
    }
    dedup_engine_get_params(fe->e, &params);
    params.pages_to_scan = 32;
    params.sleep_millisecs = 10;
    dedup_engine_set_params(fe->e, &params);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_until(has_claims, fe, "nothing is claimed");
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    g_assert_cmpuint(claims(fe), ==, 0);
    fx_set_run(fe, true);
    fx_wait_settled(fe);
    g_assert_true(fx_is_merged(ram, 1023));
    fx_unmerge(fe);
    end(fe, ram);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        if (test == test_foreign_uffd && kind != FX_ANON) {
            continue; /* slow, and nothing new */
        }
        g_autofree char *path = g_strdup_printf("/unmerge/%s/%s", name,
                                                fx_kind_name(kind));

        g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("whole", test_whole);
    add_tests("removed", test_removed);
    add_tests("half", test_half);
    add_tests("discard", test_discard);
    add_tests("foreign-uffd", test_foreign_uffd);
    add_tests("regions", test_regions);
    add_tests("fork", test_fork);
    g_test_add_func("/unmerge/claims", test_claims);
    return g_test_run();
}
