/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What scanning does to memory that it does not merge: nothing (C14, (I7));
 * and transparent huge pages, which must be split or merging a part of one
 * frees nothing (C15).
 */

#include <string.h>
#include <sys/mman.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "space/ledger.h"
#include "space/presence.h"

#define PAGES 4096
#define CHUNK 512

static void end(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* Holes stay holes, and what is there stays there. */
static void test_holes(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autofree uint8_t *before = g_malloc(PAGES);
    g_autofree uint8_t *after = g_malloc(PAGES);
    FxView view_before, view_after;
    uint32_t populated = 0;
    DedupStats stats;

    if (ram->kind == FX_ANON_THP) {
        /* a huge page has no holes: whole ones, and whole holes */
        for (uint32_t i = 0; i < PAGES; i++) {
            if (i / CHUNK % 3 == 0) {
                fx_page(ram, i, 1000 + i);
                populated++;
            }
        }
    } else {
        for (uint32_t i = 0; i < PAGES; i++) {
            if (i % 5 == 0 || (i > 1000 && i < 1200)) {
                fx_page(ram, i, 1000 + i);
                populated++;
            }
        }
    }
    fx_resident(ram, before);
    fx_view(ram, &view_before);
    g_assert_cmpuint(view_before.own_pages, ==, populated);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 5);
    fx_resident(ram, after);
    for (uint32_t i = 0; i < PAGES; i++) {
        if (before[i] != after[i]) {
            fx_fail("hole populated", "page %u: %u, was %u", i, after[i],
                    before[i]);
        }
    }
    fx_view(ram, &view_after);
    g_assert_cmpuint(view_after.own_pages, ==, view_before.own_pages);
    g_assert_cmpuint(view_after.huge_pages, ==, view_before.huge_pages);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_present, ==, populated);
    g_assert_cmpuint(stats.pass.unshared, ==, populated);
    g_assert_cmpuint(stats.pages_merged, ==, 0);
    g_assert_cmpuint(stats.zero_pages, ==, 0);
    end(fe, ram);
}

/* Holes between pages that are merged and restored. */
static void test_holes_merged(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autofree uint8_t *after = g_malloc(PAGES);
    uint32_t populated = 0;
    FxView view;

    for (uint32_t i = 0; i < PAGES; i++) {
        if (i / 64 % 2) {
            fx_page(ram, i, i % 256 + 1);
            populated++;
        }
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, populated);
    g_assert_cmpuint(view.own_pages, ==, 0);
    fx_unmerge(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, populated);
    fx_resident(ram, after);
    for (uint32_t i = 0; i < PAGES; i++) {
        if (!!after[i] != (i / 64 % 2)) {
            fx_fail("hole populated", "page %u", i);
        }
    }
    end(fe, ram);
}

/*
 * The kernel's zero page, mapped by a read, is no memory.  Where there is none
 * a read takes memory: zero pages like others, to be dropped.
 */
static void test_zero_mapped(void)
{
    uint32_t zeroes = fx_has_zero_page() ? 0 : PAGES - 1;
    FxRam *ram = fx_ram_new(FX_ANON, PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;
    FxView view;

    fx_assert_bytes(ram);           /* reads all of it */
    fx_page(ram, 7, 77);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 4);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, 1);
    g_assert_cmpuint(view.maps, ==, 1);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.zero_pages, ==, zeroes);
    g_assert_cmpuint(stats.pages_present, ==, 1);
    end(fe, ram);
}

#define HUGE_PAGES 32

/* The first half of each huge page is the same in all, the second unique. */
static void fill_huge(FxRam *ram)
{
    for (uint32_t i = 0; i < HUGE_PAGES * CHUNK; i++) {
        fx_page(ram, i, i % CHUNK < CHUNK / 2 ? i % CHUNK + 1 : 10000 + i);
    }
}

static bool has_huge_pages(const FxRam *ram)
{
    FxView view;

    fx_view(ram, &view);
    if (view.huge_pages < HUGE_PAGES * 3 / 4) {
        g_test_skip("the host gives no transparent huge pages");
        return false;
    }
    return true;
}

static void huge_in_cgroup(void *opaque)
{
    FxCgroup *cg = opaque;
    uint64_t saved = (HUGE_PAGES - 1) * CHUNK / 2 * FX_PAGE;
    uint64_t before, after;
    FxEngine *fe;
    FxRam *ram;
    FxView view;

    g_assert_true(fx_cgroup_enter(cg));
    ram = fx_ram_new(FX_ANON_THP, HUGE_PAGES * CHUNK);
    fe = fx_engine_new(NULL);
    fill_huge(ram);
    before = fx_cgroup_usage(cg);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, HUGE_PAGES * CHUNK / 2);
    g_assert_cmpuint(view.distinct, ==, CHUNK / 2);
    g_assert_cmpuint(view.own_pages, ==, HUGE_PAGES * CHUNK / 2);
    /* the judge: AnonPages falls even if the huge page is not freed */
    after = fx_cgroup_usage(cg);
    if (before - MIN(before, after) < saved / 100 * 93) {
        fx_fail("memory does not come back", "%" G_GUINT64_FORMAT " of %"
                G_GUINT64_FORMAT " KiB", (before - after) >> 10,
                saved >> 10);
    }
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
}

static void test_huge_cgroup(void)
{
    FxCgroup *cg;
    FxRam *ram = fx_ram_new(FX_ANON_THP, HUGE_PAGES * CHUNK);
    bool huge;

    fill_huge(ram);
    huge = has_huge_pages(ram);
    fx_ram_free(ram);
    if (!huge) {
        return;
    }
    cg = fx_cgroup_new();
    if (!cg) {
        return;
    }
    fx_must_pass(huge_in_cgroup, cg, FX_DEADLINE);
    fx_cgroup_free(cg);
}

/* huge-pages=keep: they are counted and left alone. */
static void test_huge_keep(void)
{
    FxRam *ram = fx_ram_new(FX_ANON_THP, HUGE_PAGES * CHUNK);
    FxEngine *fe = fx_engine_new(NULL);
    FxView before, after;
    DedupParams params;
    DedupStats stats;

    fill_huge(ram);
    if (has_huge_pages(ram)) {
        dedup_engine_get_params(fe->e, &params);
        params.huge_pages_split = false;
        dedup_engine_set_params(fe->e, &params);
        fx_view(ram, &before);
        fx_add(fe, ram);
        fx_engine_start(fe);
        fx_wait_scans(fe, 4);
        fx_view(ram, &after);
        g_assert_cmpuint(after.huge_pages, ==, before.huge_pages);
        fx_stats(fe, &stats);
        g_assert_cmpuint(stats.pass.huge_kept, ==,
                         before.huge_pages * CHUNK);
        fx_assert_bytes(ram);
        /* and taken when they may be */
        params.huge_pages_split = true;
        dedup_engine_set_params(fe->e, &params);
        fx_wait_settled(fe);
        fx_view(ram, &after);
        g_assert_cmpuint(after.huge_pages, ==, 0);
        g_assert_cmpuint(after.segment_pages, ==, HUGE_PAGES * CHUNK / 2);
        fx_stats(fe, &stats);
        g_assert_cmpuint(stats.pass.huge_kept, ==, 0);
    }
    end(fe, ram);
}

/* What a balloon does: on another thread than the scanner's. */
static gpointer discard(gpointer opaque)
{
    FxRam *ram = opaque;
    DedupEngine *e = dedup_region_owner(ram->region);
    bool shared = ram->kind == FX_MEMFD || ram->kind == FX_TMPFS;
    void *from = fx_addr(ram, 3);

    g_assert_true(dedup_engine_discard_begin(e, from, FX_PAGE));
    g_assert_cmpint(madvise(from, FX_PAGE, shared ? MADV_REMOVE
                                                  : MADV_DONTNEED), ==, 0);
    dedup_engine_discard_end(e);
    return NULL;
}

static bool is_present(FxRam *ram, uint32_t page)
{
    return dedup_is_present(&ram->region->space->looks, ram->region, page);
}

/* The scanner remembers what is there, until somebody may have changed it. */
static void test_discarded(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 200);
    FxEngine *fe = fx_engine_new(NULL);
    DedupSpace *space = fe->e->space;
    bool there[200];

    for (uint32_t i = 0; i < 200; i++) {
        if (i % 5) {
            fx_page(ram, i, i);
        }
    }
    fx_add(fe, ram);
    dedup_space_set_scanner(space, NULL);
    dedup_space_lock(space);
    for (unsigned k = 0; k < 3; k++) {
        for (uint32_t i = 0; i < 200; i++) {
            there[i] = is_present(ram, i);
            there[199 - i] = is_present(ram, 199 - i);
        }
        for (uint32_t i = 0; i < 200; i++) {
            g_assert_cmpint(there[i], ==, i % 5 != 0);
        }
    }
    /* two places at a time, as a pair is looked at */
    g_assert_true(is_present(ram, 3));
    g_assert_true(is_present(ram, 199));
    dedup_space_unlock(space);
    g_thread_join(g_thread_new("balloon", discard, ram));
    fx_shadow_page(ram, 3, 0);
    dedup_space_lock(space);
    g_assert_false(is_present(ram, 3));
    g_assert_true(is_present(ram, 199));
    dedup_space_unlock(space);
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* Does the thread that answers others see these pages? */
static void assert_answers(FxRam *ram, const uint32_t *pages, unsigned n,
                           bool there)
{
    const uint8_t secret[DEDUP_SECRET_SIZE] = { 1 };
    DedupOwnPage asked[16] = { 0 };

    for (unsigned i = 0; i < n; i++) {
        asked[i].page = dedup_region_base(ram->region) + pages[i];
    }
    dedup_space_keyed_hashes(ram->region->space, asked, n, secret);
    for (unsigned i = 0; i < n; i++) {
        g_assert_cmpint(asked[i].is_there, ==, there);
    }
}

/* As a window drops a page that is zero, and a restore takes note of it. */
static void drop(FxRam *ram, uint32_t page)
{
    DedupSpace *space = ram->region->space;

    dedup_space_lock(space);
    g_assert_cmpint(madvise(fx_addr(ram, page), FX_PAGE, ram->fd < 0 ||
                            ram->kind == FX_PRIVATE ? MADV_DONTNEED
                                                    : MADV_REMOVE), ==, 0);
    dedup_ledger_set(ram->region, page, DEDUP_ZERO);
    dedup_ledger_absent(ram->region, page);
    dedup_space_unlock(space);
    fx_shadow_page(ram, page, 0);
}

/*
 * Others ask for pages of all chunks in turn.  What is known of a chunk is
 * kept, but not if somebody may have discarded something, nor for ever.
 */
static void test_answered(gconstpointer data)
{
    const uint32_t there[] = { 3, CHUNK + 3, 2 * CHUNK + 3, 3 * CHUNK + 3 };
    const uint32_t holes[] = { CHUNK + 5, 2 * CHUNK + 5, 3 * CHUNK + 5 };
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 4 * CHUNK);
    FxEngine *fe = fx_engine_new(NULL);
    DedupSpace *space;
    uint8_t before[4 * CHUNK], after[4 * CHUNK];

    for (uint32_t i = 0; i < 4 * CHUNK; i += CHUNK) {
        fx_page(ram, i + 3, 1 + i);
    }
    fx_add(fe, ram);
    space = fe->e->space;
    dedup_space_set_scanner(space, NULL);
    fx_resident(ram, before);
    for (unsigned k = 0; k < 3; k++) {
        assert_answers(ram, there, G_N_ELEMENTS(there), true);
        if (ram->kind != FX_ANON_THP) {
            assert_answers(ram, holes, G_N_ELEMENTS(holes), false);
        }
    }
    fx_resident(ram, after);
    g_assert_true(memcmp(before, after, sizeof(after)) == 0);

    /* page after page comes of it: this is known without a look */
    g_assert_cmpuint(space->answers.known[2].region == ram->region, ==, true);
    memset(space->answers.known[2].present, 0,
           sizeof(space->answers.known[2].present));
    space->answers.known[2].since_us = g_get_monotonic_time() +
                                       G_TIME_SPAN_SECOND;
    assert_answers(ram, there + 2, 1, false);
    /* and looked for again soon, as it may have come */
    space->answers.known[2].since_us -= 2 * G_TIME_SPAN_SECOND;
    assert_answers(ram, there + 2, 1, true);

    g_thread_join(g_thread_new("balloon", discard, ram));
    fx_shadow_page(ram, 3, 0);
    if (ram->kind != FX_ANON_THP) {
        assert_answers(ram, there, 1, false);
    }
    assert_answers(ram, there + 1, 3, true);

    /* the scanner dropped it, and its ledger forgets that */
    drop(ram, there[3]);
    assert_answers(ram, there + 3, 1, false);
    assert_answers(ram, there + 1, 2, true);
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/presence/%s/%s", name,
                                                fx_kind_name(kind));

        if (kind == FX_ANON_THP && test == test_holes_merged) {
            continue;
        }
        g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("holes", test_holes);
    add_tests("holes-merged", test_holes_merged);
    add_tests("discarded", test_discarded);
    add_tests("answered", test_answered);
    g_test_add_func("/presence/zero-mapped", test_zero_mapped);
    g_test_add_func("/presence/huge/cgroup", test_huge_cgroup);
    g_test_add_func("/presence/huge/keep", test_huge_keep);
    return g_test_run();
}
