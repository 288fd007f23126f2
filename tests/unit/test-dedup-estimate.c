/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of the modes: what an estimate counts, beside what is then merged; that
 * it changes nothing and disturbs nobody; pages of zeros alone.
 */

#include <dirent.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine-fixture.h"

/* Of a RAM: so many zero, then equal to a page before, then unique. */
#define ZERO 100
#define TWINS 300
#define PAGES 2048
/* What the RAMs have in common, once each; the other members' are alike. */
#define COMMON 500

/* Contents of a RAM of member @m: seeds. */
static uint64_t seed_of(unsigned m, uint32_t page)
{
    if (page < ZERO) {
        return 0;
    }
    if (page < ZERO + TWINS) {
        return (m + 1) * 100000 + page + TWINS; /* as the page TWINS on */
    }
    return page >= PAGES - COMMON ? page : (m + 1) * 100000 + page;
}

static FxRam *ram_of(unsigned m, FxKind kind)
{
    FxRam *ram = fx_ram_new(kind, PAGES);

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, seed_of(m, i));
    }
    return ram;
}

/* Descriptors of this process that are userfaultfds. */
static unsigned count_userfaultfds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *d;
    unsigned n = 0;

    while ((d = readdir(dir))) {
        g_autofree char *path = g_build_filename("/proc/self/fd", d->d_name,
                                                 NULL);
        g_autofree char *target = g_file_read_link(path, NULL);

        n += target && strstr(target, "userfaultfd") != NULL;
    }
    closedir(dir);
    return n;
}

static void assert_untouched(FxEngine *fe, FxRam *ram, const FxView *before)
{
    DedupStats stats;
    FxView view;

    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==, 0);
    g_assert_cmpuint(stats.zero_pages, ==, 0);
    g_assert_cmpuint(stats.cow_breaks, ==, 0);
    g_assert_true(dedup_engine_is_whole(fe->e));
    fx_view(ram, &view);
    g_assert_cmpuint(view.maps, ==, before->maps);
    g_assert_cmpuint(view.own_pages, ==, before->own_pages);
    g_assert_cmpuint(view.huge_pages, ==, before->huge_pages);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    fx_assert_bytes(ram);
}

static void check_alone(FxKind kind)
{
    unsigned before = count_userfaultfds();
    FxRam *ram = ram_of(0, kind);
    FxEngine *fe = fx_engine_new_mode(NULL, DEDUP_MODE_ESTIMATE);
    DedupStats stats;
    FxView view;

    fx_view(ram, &view);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 3);
    g_assert_cmpuint(count_userfaultfds(), ==, before);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.estimate.zero, ==, ZERO);
    g_assert_cmpuint(stats.estimate.within, ==, TWINS);
    g_assert_cmpuint(stats.estimate.between, ==, 0);
    assert_untouched(fe, ram, &view);

    /* it follows what changes: of a pair, whichever of the two */
    for (uint32_t i = 0; i < 50; i++) {
        fx_page(ram, ZERO + i, 900000 + i);
        fx_page(ram, ZERO + TWINS + 50 + i, 900100 + i);
    }
    fx_page(ram, 0, 1);
    fx_wait_scans(fe, 3);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.estimate.zero, ==, ZERO - 1);
    g_assert_cmpuint(stats.estimate.within, ==, TWINS - 100);

    /* nobody has to ask it to give anything back */
    fx_restore_begin(fe, true, false);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, 0);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

static void test_anon(void)
{
    check_alone(FX_ANON_THP);
}

static void test_memfd(void)
{
    check_alone(FX_MEMFD);
}

/* ---- in a group ---- */

#define MEMBERS 3

typedef struct Group {
    char *dir;
    FxRam *ram[MEMBERS];
    FxEngine *fe[MEMBERS];
    FxView view[MEMBERS];
} Group;

static void group_begin(Group *g)
{
    g->dir = fx_group_dir();
    for (unsigned m = 0; m < MEMBERS; m++) {
        g->ram[m] = ram_of(m, m % 2 ? FX_MEMFD : FX_ANON);
        fx_view(g->ram[m], &g->view[m]);
    }
}

static void group_add(Group *g, unsigned m, DedupMode mode)
{
    g->fe[m] = fx_engine_new_mode(g->dir, mode);
    fx_add(g->fe[m], g->ram[m]);
    fx_engine_start(g->fe[m]);
}

static void group_end(Group *g)
{
    for (unsigned m = 0; m < MEMBERS; m++) {
        fx_assert_bytes(g->ram[m]);
        fx_engine_free(g->fe[m]);
        g->ram[m]->region = NULL;
        fx_ram_free(g->ram[m]);
    }
    fx_group_dir_free(g->dir);
}

static uint64_t between(Group *g, unsigned m)
{
    DedupStats stats;

    fx_stats(g->fe[m], &stats);
    return stats.estimate.between;
}

/* All but one of each content are counted, whoever has it. */
static void test_group(void)
{
    Group g;

    group_begin(&g);
    for (unsigned m = 0; m < MEMBERS; m++) {
        group_add(&g, m, DEDUP_MODE_ESTIMATE);
    }
    for (unsigned i = 0; i < 3; i++) {
        for (unsigned m = 0; m < MEMBERS; m++) {
            fx_wait_scans(g.fe[m], 1);
        }
    }
    g_assert_cmpuint(between(&g, 0) + between(&g, 1) + between(&g, 2), ==,
                     (MEMBERS - 1) * COMMON);
    for (unsigned m = 0; m < MEMBERS; m++) {
        DedupStats stats;

        fx_stats(g.fe[m], &stats);
        g_assert_cmpuint(stats.estimate.zero, ==, ZERO);
        g_assert_cmpuint(stats.estimate.within, ==, TWINS);
        assert_untouched(g.fe[m], g.ram[m], &g.view[m]);
    }
    group_end(&g);
}

/* The figure is a sampled one. */
static bool shares_all(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.pages_merged_between == COMMON;
}

/* A member may take its time to answer: then the next pass counts it. */
static bool counts_common(void *opaque)
{
    return between(opaque, 0) == COMMON;
}

/*
 * Beside members that merge: they merge among themselves what they would
 * without it, and it counts what it would merge with them.
 */
static void test_beside(void)
{
    DedupStats stats;
    FxSegments segments;
    Group g;

    group_begin(&g);
    group_add(&g, 0, DEDUP_MODE_ESTIMATE);
    fx_wait_scans(g.fe[0], 2);
    g_assert_cmpuint(between(&g, 0), ==, 0);

    /* one that merges: it has nobody to merge with */
    group_add(&g, 1, DEDUP_MODE_FULL);
    fx_wait_settled(g.fe[1]);
    fx_stats(g.fe[1], &stats);
    g_assert_cmpuint(stats.pages_merged, ==, 2 * TWINS);
    fx_segments(&segments);
    g_assert_cmpuint(segments.pages, ==, TWINS);
    fx_wait_until(counts_common, &g, "what is common is not counted");

    /* another: what is common is published now, and still counted once */
    group_add(&g, 2, DEDUP_MODE_FULL);
    fx_wait_settled(g.fe[1]);
    fx_wait_settled(g.fe[2]);
    fx_wait_until(shares_all, g.fe[2], "what is common is not merged");
    fx_stats(g.fe[2], &stats);
    g_assert_cmpuint(stats.pages_merged, ==, 2 * TWINS + COMMON);
    fx_wait_scans(g.fe[0], 2);
    g_assert_cmpuint(between(&g, 0), ==, COMMON);
    assert_untouched(g.fe[0], g.ram[0], &g.view[0]);
    group_end(&g);
}

/* ---- zeros ---- */

static void test_zero(void)
{
    FxRam *ram = ram_of(0, FX_MEMFD);
    FxEngine *fe = fx_engine_new_mode(NULL, DEDUP_MODE_ZERO);
    DedupParams params;
    DedupStats stats;
    FxView view;

    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.zero_pages, ==, ZERO);
    g_assert_cmpuint(stats.pages_merged, ==, 0);
    g_assert_cmpuint(stats.pages_present, ==, PAGES - ZERO);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, PAGES - ZERO);
    fx_assert_bytes(ram);

    /* one that becomes zero, and one that does not stay */
    fx_page(ram, ZERO, 0);
    fx_page(ram, 0, 77);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.zero_pages, ==, ZERO);
    fx_assert_bytes(ram);

    dedup_engine_get_params(fe->e, &params);
    params.mode = DEDUP_MODE_FULL;
    dedup_engine_set_params(fe->e, &params);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==, 2 * (TWINS - 1));

    /* and back: what is merged stays, nothing is added */
    params.mode = DEDUP_MODE_ZERO;
    dedup_engine_set_params(fe->e, &params);
    fx_wait_scans(fe, 2);
    fx_page(ram, ZERO + TWINS - 1, 5); /* they were merged */
    fx_page(ram, PAGES - 1, 4711);
    fx_page(ram, PAGES - 2, 4711);
    fx_wait_scans(fe, 4);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==, 2 * (TWINS - 1) - 1);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_func("/estimate/anon", test_anon);
    g_test_add_func("/estimate/memfd", test_memfd);
    g_test_add_func("/estimate/group", test_group);
    g_test_add_func("/estimate/beside", test_beside);
    g_test_add_func("/zero", test_zero);
    return g_test_run();
}
