/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Running out of mappings, case C17: at the budget (max-maps) and at the
 * kernel's own limit (vm.max_map_count) merging stops, says so, and every
 * page is intact; unmerging still works.
 */

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine-fixture.h"

#define PAGES 4096

static bool is_shared(const FxRam *ram)
{
    return ram->kind == FX_MEMFD || ram->kind == FX_TMPFS;
}

/* Every second page has equals elsewhere, but not its neighbours. */
static void fill_isolated(FxRam *ram)
{
    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_page(ram, i, i % 2 ? 20000 + i : i / 2 % 512 * 7 + 1);
    }
}

static void set_max_maps(FxEngine *fe, uint32_t percent)
{
    DedupParams params;

    dedup_engine_get_params(fe->e, &params);
    params.max_maps = percent;
    dedup_engine_set_params(fe->e, &params);
}

static bool maps_limited(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.state == DEDUP_STATE_LIMITED &&
           (stats.limits & DEDUP_LIMIT_MAPS);
}

static void test_budget(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    uint64_t limit = fx_max_maps() / 100;
    DedupStats stats;
    FxView view;

    fill_isolated(ram);
    set_max_maps(fe, 1);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_until(maps_limited, fe, "not limited");
    fx_wait_scans(fe, 4);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.state, ==, DEDUP_STATE_LIMITED);
    g_assert_cmpuint(stats.maps_limit, ==, limit);
    /* some were merged, within the budget; seen from outside */
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, >=, 32);
    g_assert_cmpuint(fx_maps(), <=, limit);
    fx_assert_bytes(ram);

    /* writes go on, and what they free is used again */
    for (uint32_t i = 0; i < PAGES; i += 3) {
        fx_byte(ram, i, 5, i);
    }
    fx_wait_scans(fe, 4);
    g_assert_cmpuint(fx_maps(), <=, limit);
    fx_assert_bytes(ram);

    /* long runs come first: they still have a place when it is short */
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i % 1024 + 1);
    }
    fx_wait_scans(fe, 6);
    fx_assert_bytes(ram);

    /* a larger budget takes the limit away */
    set_max_maps(fe, 60);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, PAGES);
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* Mappings that nobody merges: pages of alternating protection. */
typedef struct Ballast {
    uint8_t *p;
    size_t size;
} Ballast;

static void ballast_new(Ballast *b)
{
    size_t n = fx_max_maps() + 16;

    b->size = n * FX_PAGE;
    b->p = mmap(NULL, b->size, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g_assert_true(b->p != MAP_FAILED);
}

/* Until the kernel refuses; @spare maps are given back. */
static void ballast_fill(Ballast *b, unsigned spare)
{
    size_t i;

    for (i = 1; i * FX_PAGE < b->size; i += 2) {
        if (mprotect(b->p + i * FX_PAGE, FX_PAGE, PROT_READ) < 0) {
            g_assert_cmpint(errno, ==, ENOMEM);
            break;
        }
    }
    g_assert_cmpuint(i * FX_PAGE, <, b->size);
    for (unsigned k = 0; k < spare; k += 2) {
        i -= 2;
        mprotect(b->p + i * FX_PAGE, FX_PAGE, PROT_NONE);
    }
}

static void ballast_free(Ballast *b)
{
    munmap(b->p, b->size);
}

/* In a process of its own: GLib aborts where malloc() gets no mapping. */
static void at_limit(void *opaque)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(opaque), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;
    Ballast ballast;
    FxView view;

    ballast_new(&ballast);
    fill_isolated(ram);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, PAGES / 2);

    /* the process takes all that is left, behind the engine's back */
    ballast_fill(&ballast, 0);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i / 3 % 300 + 1);
    }
    fx_wait_until(maps_limited, fe, "not limited");
    fx_wait_scans(fe, 3);
    fx_assert_bytes(ram);
    fx_byte(ram, 8, 1, 2);
    fx_byte(ram, 9, 1, 2);
    fx_assert_bytes(ram);

    /* what can be done without a mapping is done */
    fx_restore_begin(fe, true, false);
    fx_wait_restored(fe);
    fx_view(ram, &view);
    g_test_message("%s: %" G_GUINT64_FORMAT " left, %" G_GUINT64_FORMAT
                   " without memory of their own", fx_kind_name(ram->kind),
                   fe->left, view.segment_pages - view.copied);
    if (!is_shared(ram)) {
        g_assert_cmpuint(view.segment_pages - view.copied, ==, 0);
    }
    fx_assert_bytes(ram);

    /* the rest when there is room */
    ballast_free(&ballast);
    fx_unmerge(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    fx_assert_bytes(ram);
    fx_set_run(fe, true);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.limits, ==, 0);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
}

static void test_limit(gconstpointer data)
{
    if (FX_SANITIZED) {
        g_test_skip("the sanitizer dies where it gets no mapping");
        return;
    }
    fx_must_pass(at_limit, (void *)data, FX_DEADLINE);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/maps/%s/%s", name,
                                                fx_kind_name(kind));

        if (test == test_limit && kind != FX_MEMFD && kind != FX_ANON) {
            continue; /* slow, and nothing new */
        }
        g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("budget", test_budget);
    add_tests("limit", test_limit);
    return g_test_run();
}
