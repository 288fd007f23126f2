/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Merging within one process: what becomes equal memory, what must not, and
 * what the host gets back, seen from outside.  Cases C1, C2, C4 and C21 of
 * docs/devel/dedup-hazards.rst, for RAM of each kind.
 */

#include <stdio.h>
#include <string.h>

#include "engine-fixture.h"
#include "host/mutant.h"

#define PAGES 1024

/* The engine goes, what it merged stays: with its bytes. */
static void fx_end(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* C1: N equal pages: one segment page, N - 1 pages given back. */
static void test_equal_pages(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    FxView before, after;
    FxSegments segments;
    DedupStats stats;

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 7);
    }
    fx_view(ram, &before);
    g_assert_cmpuint(before.own_pages, ==, PAGES);
    g_assert_cmpuint(before.segment_pages, ==, 0);

    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &after);
    fx_segments(&segments);
    g_assert_cmpuint(after.segment_pages, ==, PAGES);
    g_assert_cmpuint(after.distinct, ==, 1);
    g_assert_cmpuint(after.copied, ==, 0);
    g_assert_cmpuint(segments.files, ==, 1);
    g_assert_cmpuint(segments.pages, ==, 1);
    g_assert_cmpuint(before.own_pages - after.own_pages - segments.pages,
                     ==, PAGES - 1);
    fx_assert_bytes(ram);

    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==, PAGES);
    g_assert_cmpuint(stats.pages_merged_within, ==, PAGES);
    g_assert_cmpuint(stats.pages_merged_between, ==, 0);
    g_assert_cmpuint(stats.pass.unshared, ==, 0);
    g_assert_cmpuint(stats.pages_present, ==, PAGES);
    g_assert_cmpuint(stats.zero_pages, ==, 0);
    fx_remove(ram, true);
    fx_assert_bytes(ram);
    fx_end(fe, ram);
}

/* Copies of a run of pages: equal pages in a row need a map each. */
#define CGROUP_PAGES 16384
#define CGROUP_RUN 1024

typedef struct InCgroup {
    FxCgroup *cg;
    FxKind kind;
} InCgroup;

/* C1 by the judge that pays the bill: the memory cgroup. */
static void equal_in_cgroup(void *opaque)
{
    InCgroup *in = opaque;
    uint64_t saved = (uint64_t)(CGROUP_PAGES - CGROUP_RUN) * FX_PAGE;
    uint64_t before, after;
    FxEngine *fe;
    FxRam *ram;

    g_assert_true(fx_cgroup_enter(in->cg));
    ram = fx_ram_new(in->kind, CGROUP_PAGES);
    fe = fx_engine_new(NULL);
    for (uint32_t i = 0; i < CGROUP_PAGES; i++) {
        fx_page(ram, i, i % CGROUP_RUN + 1);
    }
    before = fx_cgroup_usage(in->cg);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    after = fx_cgroup_usage(in->cg);
    /* 5 %: metadata, stacks, page tables, the kernel's per-CPU batches */
    g_assert_cmpuint(before - MIN(before, after), >=, saved / 100 * 95);
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    /* and it costs again what it cost */
    g_assert_cmpuint(fx_cgroup_usage(in->cg), >=,
                     after + saved / 100 * 95);
    fx_assert_bytes(ram);
    fx_end(fe, ram);
}

static void test_cgroup(gconstpointer data)
{
    InCgroup in = {
        .cg = fx_cgroup_new(), .kind = GPOINTER_TO_INT(data),
    };

    if (!in.cg) {
        return;
    }
    fx_must_pass(equal_in_cgroup, &in, FX_DEADLINE);
    fx_cgroup_free(in.cg);
}

/* C2: a 1-byte write is seen by its writer only. */
static void test_one_byte(gconstpointer data)
{
    FxRam *a = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxRam *b = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;
    FxView view;

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(a, i, i % 100 + 1);
        fx_page(b, i, i % 100 + 1);
    }
    fx_add(fe, a);
    fx_add(fe, b);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(a, &view);
    g_assert_cmpuint(view.segment_pages, ==, PAGES);
    g_assert_cmpuint(view.distinct, ==, 100);
    fx_view(b, &view);
    g_assert_cmpuint(view.segment_pages, ==, PAGES);

    /* first, last and middle bytes of some pages; read back at once */
    for (uint32_t i = 0; i < 32; i++) {
        fx_byte(a, i * 31, i % 3 == 0 ? 0 : i % 3 == 1 ? FX_PAGE - 1 : 2000,
                0x55 + i);
    }
    fx_assert_bytes(a);
    fx_assert_bytes(b);
    fx_view(b, &view);
    g_assert_cmpuint(view.copied, ==, 0);

    fx_wait_settled(fe);
    fx_assert_bytes(a);
    fx_assert_bytes(b);
    fx_stats(fe, &stats);
    /* more if the scanner came between the kernel's copy and the store */
    g_assert_cmpuint(stats.cow_breaks, >=, 32);
    g_assert_cmpuint(stats.cow_breaks, <=, 40);
    g_assert_cmpuint(stats.pages_merged, ==, 2 * PAGES - 32);
    fx_engine_free(fe);
    /* the engine is gone, what it merged stays */
    fx_assert_bytes(a);
    fx_byte(b, 0, 0, 1);
    fx_assert_bytes(b);
    fx_assert_bytes(a);
    a->region = b->region = NULL;
    fx_ram_free(a);
    fx_ram_free(b);
}

typedef struct ZeroTarget {
    FxEngine *fe;
    uint64_t zero;
} ZeroTarget;

static bool zero_reached(void *opaque)
{
    ZeroTarget *t = opaque;
    DedupStats stats;

    fx_stats(t->fe, &stats);
    return stats.zero_pages == t->zero;
}

static void wait_zero(FxEngine *fe, uint64_t zero)
{
    ZeroTarget t = { .fe = fe, .zero = zero };

    fx_wait_until(zero_reached, &t, "zero pages not counted");
}

/* C4: zero pages are a class of their own: N, N/2, 0. */
static void test_zero_pages(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    FxSegments segments;
    FxView view;

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 1);     /* memory first, then zeros in it */
        fx_page(ram, i, 0);
    }
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, PAGES);
    fx_add(fe, ram);
    fx_engine_start(fe);
    wait_zero(fe, PAGES);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, 0);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    fx_segments(&segments);
    g_assert_cmpuint(segments.files, ==, 0);

    /* every second page is written: unique contents */
    for (uint32_t i = 0; i < PAGES; i += 2) {
        fx_page(ram, i, 1000 + i);
    }
    wait_zero(fe, PAGES / 2);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, PAGES / 2);

    for (uint32_t i = 1; i < PAGES; i += 2) {
        fx_byte(ram, i, i % FX_PAGE, 9);
        fx_byte(ram, i, 8 + i % 4000, 1 + i % 200);
        fx_byte(ram, i, 4095, 1 + i / 200);
    }
    wait_zero(fe, 0);
    fx_wait_settled(fe); /* a copy and the file may both have a page before */
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages + view.segment_pages - view.copied, ==,
                     PAGES);
    fx_assert_bytes(ram);

    /* and back to zero, which unmerges nothing */
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 0);
    }
    wait_zero(fe, PAGES);
    fx_wait_settled(fe); /* the file is punched after they are counted */
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, 0);
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_end(fe, ram);
}

/* zero_pages off: they are left alone. */
static void test_zero_off(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 64);
    FxEngine *fe = fx_engine_new(NULL);
    DedupParams params;
    DedupStats stats;
    FxView view;

    dedup_engine_get_params(fe->e, &params);
    params.zero_pages = false;
    dedup_engine_set_params(fe->e, &params);
    for (uint32_t i = 0; i < 64; i++) {
        fx_page(ram, i, 1);
        fx_page(ram, i, 0);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.zero_pages, ==, 0);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, 64);
    fx_assert_bytes(ram);
    fx_end(fe, ram);
}

/*
 * C21: all pages have the same hash, and different contents.  The equal ones
 * in front are merged, so that all others meet their segment page; and so are
 * those with the second content, whose hint is among the few that are tried.
 */
static void test_collision(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 256);
    FxEngine *fe;
    FxView view;

    dedup_hash_mask = 0;
    fe = fx_engine_new(NULL);
    for (uint32_t i = 0; i < 256; i++) {
        fx_page(ram, i, i < 64 ? 1 : i % 2 ? 2 : 100 + i);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 6);
    fx_assert_bytes(ram);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 64 + 96);
    g_assert_cmpuint(view.distinct, ==, 2);
    for (uint32_t i = 0; i < 256; i += 5) {
        fx_byte(ram, i, 77, i);
    }
    fx_wait_scans(fe, 6);
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_end(fe, ram);
    dedup_hash_mask = UINT64_MAX;
}

/*
 * Hashes that the index cannot tell apart, as it keeps a part of them only:
 * contents that alternate find their own kind all the same.
 */
static void test_same_tag(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 64);
    FxEngine *fe;
    FxView view;

    dedup_hash_mask = (1ull << 36) - 1;
    fe = fx_engine_new(NULL);
    for (uint32_t i = 60; i < 64; i++) {
        fx_page(ram, i, i % 2 + 1);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 4);
    g_assert_cmpuint(view.distinct, ==, 2);
    fx_assert_bytes(ram);
    fx_end(fe, ram);
    dedup_hash_mask = UINT64_MAX;
}

/* Contents that come and go: merged, broken, merged again, other contents. */
static void test_rewrites(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);

    fx_add(fe, ram);
    fx_engine_start(fe);
    for (unsigned round = 0; round < 4; round++) {
        FxView view;

        for (uint32_t i = 0; i < PAGES; i++) {
            uint32_t kind = (i * 2654435761u >> 13) + round;

            fx_page(ram, i, kind % 4 == 0 ? 0 :
                            kind % 4 == 1 ? 5000 + i :
                            kind % 4 == 2 ? i % 32 + 1 :
                            round * 100 + i / 64 + 1);
        }
        fx_wait_settled(fe);
        fx_view(ram, &view);
        /* unique ones, and classes that are alone */
        g_assert_cmpuint(view.own_pages, <, PAGES / 2);
        g_assert_cmpuint(view.segment_pages, >, PAGES / 4);
        fx_assert_bytes(ram);
    }
    fx_end(fe, ram);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/merge/%s/%s", name,
                                                fx_kind_name(kind));

        if (test == test_cgroup && kind != FX_MEMFD && kind != FX_ANON &&
            kind != FX_PRIVATE) {
            continue; /* slow, and nothing new */
        }
        g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("equal-pages", test_equal_pages);
    add_tests("cgroup", test_cgroup);
    add_tests("one-byte", test_one_byte);
    add_tests("zero-pages", test_zero_pages);
    add_tests("zero-off", test_zero_off);
    add_tests("collision", test_collision);
    add_tests("same-tag", test_same_tag);
    add_tests("rewrites", test_rewrites);
    return g_test_run();
}
