/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Figures that stay right while others work: pages with memory of their own
 * while threads restore and discard; a pass that misses no region when
 * regions go; and what figures may not do: keep others from the remap lock
 * while they look at the engine's own memory.
 */

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "space/space-internal.h"

#define PAGES 4096

/* ---- the engine's own memory is looked at without the lock ---- */

static FxEngine *watched;
static uint64_t looks, locked_looks;

/* Who asks about something else than RAM? */
static int watch(DedupSysCall *call)
{
    FxEngine *fe = watched;

    if (fx_is_call(call, "mincore") && g_thread_self() == fe->thread) {
        GMutex *lock = &fe->e->space->lock.mutex;
        bool is_free = g_mutex_trylock(lock);

        if (is_free) {
            g_mutex_unlock(lock);
        }
        __atomic_fetch_add(&looks, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&locked_looks, !is_free, __ATOMIC_RELAXED);
    }
    return 0;
}

static bool has_looked(void *opaque)
{
    return __atomic_load_n(&looks, __ATOMIC_RELAXED) > 20;
}

/* Anonymous RAM: nobody asks mincore() about that, and no other thread runs. */
static void test_lock(void)
{
    FxRam *ram = fx_ram_new(FX_ANON, PAGES);
    FxEngine *fe = fx_engine_new(NULL);

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i % 100 + 1);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    watched = fe;
    __atomic_store_n(&dedup_sys_hook, watch, __ATOMIC_RELEASE);
    fx_wait_until(has_looked, NULL, "no figures");
    __atomic_store_n(&dedup_sys_hook, NULL, __ATOMIC_RELEASE);
    g_assert_cmpuint(__atomic_load_n(&locked_looks, __ATOMIC_RELAXED), ==,
                     0);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* ---- a region goes in the middle of a pass ---- */

#define SMALL 128

typedef struct Scanned {
    FxEngine *fe;
    uint64_t target;
} Scanned;

static bool has_scanned(void *opaque)
{
    Scanned *s = opaque;
    DedupStats stats;

    fx_stats(s->fe, &stats);
    return stats.pages_scanned >= s->target;
}

/* A kick ends the pause between two batches: so this is one batch. */
static void step(FxEngine *fe)
{
    DedupParams params;

    dedup_engine_get_params(fe->e, &params);
    dedup_engine_set_params(fe->e, &params);
}

static bool pass_ended(void *opaque)
{
    DedupStats stats;

    step(opaque);
    fx_stats(opaque, &stats);
    return stats.full_scans > 0;
}

static void test_region_goes(void)
{
    FxEngine *fe = fx_engine_new(NULL);
    Scanned s = { .fe = fe, .target = 2 * SMALL };
    DedupParams params;
    DedupStats stats;
    FxRam *ram[4];

    dedup_engine_get_params(fe->e, &params);
    params.pages_to_scan = SMALL;
    params.sleep_millisecs = 1000 * 1000;
    dedup_engine_set_params(fe->e, &params);
    for (unsigned k = 0; k < G_N_ELEMENTS(ram); k++) {
        ram[k] = fx_ram_new(FX_ANON, SMALL);
        for (uint32_t i = 0; i < SMALL; i++) {
            fx_page(ram[k], i, 1000 * k + i + 1);
        }
        fx_add(fe, ram[k]);
    }
    fx_engine_start(fe);
    /* one batch, and one more, as something was asked before the first */
    fx_wait_until(has_scanned, &s, "no batch");
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_scanned, ==, s.target);
    fx_remove(ram[0], false);
    fx_wait_until(pass_ended, fe, "no end of the pass");
    fx_stats(fe, &stats);
    /* all of the three others: in the first pass nothing counts as changed */
    g_assert_cmpuint(stats.pass.unshared, ==, 3 * SMALL);
    g_assert_cmpuint(stats.pages_present, ==, 3 * SMALL);
    fx_engine_free(fe);
    for (unsigned k = 0; k < G_N_ELEMENTS(ram); k++) {
        fx_assert_bytes(ram[k]);
        ram[k]->region = NULL;
        fx_ram_free(ram[k]);
    }
}

/* ---- threads that restore and discard ---- */

#define ROUNDS 400

typedef struct Worker {
    FxEngine *fe;
    FxRam *ram;
    uint32_t seed;
    bool discards;
} Worker;

static gpointer work(gpointer opaque)
{
    Worker *w = opaque;
    bool shared = w->ram->kind == FX_MEMFD;
    GRand *rand = g_rand_new_with_seed(w->seed);

    for (unsigned i = 0; i < ROUNDS; i++) {
        uint32_t n = g_rand_int_range(rand, 1, 80);
        /* each has a half of the RAM: the shadow is not locked */
        uint32_t first = g_rand_int_range(rand, 0, PAGES / 2 - 80) +
                         (w->discards ? PAGES / 2 : 0);
        void *at = fx_addr(w->ram, first);
        size_t len = (size_t)n * FX_PAGE;

        if (!w->discards) {
            dedup_engine_restore_range(w->fe->e, at, len, NULL);
            continue;
        }
        g_assert_true(dedup_engine_discard_begin(w->fe->e, at, len));
        g_assert_cmpint(madvise(at, len, shared ? MADV_REMOVE
                                                : MADV_DONTNEED), ==, 0);
        dedup_engine_discard_end(w->fe->e);
        for (uint32_t k = 0; k < n; k++) {
            fx_shadow_page(w->ram, first + k, 0);
        }
    }
    g_rand_free(rand);
    return NULL;
}

/* What has memory, from outside; where nobody changes anything. */
static void assert_present(FxEngine *fe, const FxRam *ram)
{
    DedupStats stats;
    FxView view;

    fx_view(ram, &view);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==,
                     view.segment_pages - view.copied);
    g_assert_cmpuint(stats.pages_present, ==,
                     view.own_pages + view.segment_pages - view.copied);
}

static void block(FxEngine *fe)
{
    dedup_engine_block(fe->e, true, false);
    fx_wait_state(fe, DEDUP_STATE_BLOCKED);
}

static void test_present(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    Worker workers[2] = {
        { .fe = fe, .ram = ram, .seed = 1 },
        { .fe = fe, .ram = ram, .seed = 2, .discards = true },
    };

    fx_add(fe, ram);
    fx_engine_start(fe);
    for (unsigned round = 0; round < 6; round++) {
        GThread *threads[2];

        /* unique, equal and zero pages, and holes after the first round */
        for (uint32_t i = 0; i < PAGES; i++) {
            if (!round || i % 3 == 0) {
                fx_page(ram, i, i % 5 == 0 ? 0 : i % 5 == 1 ? 9000 + i
                                               : i % 60 + 1);
            }
        }
        fx_wait_settled(fe);
        if (round % 2) {
            /* and no look at a chunk either, now */
            block(fe);
            assert_present(fe, ram);
        }
        for (unsigned k = 0; k < G_N_ELEMENTS(threads); k++) {
            workers[k].seed += 2;
            threads[k] = g_thread_new("worker", work, &workers[k]);
        }
        for (unsigned k = 0; k < G_N_ELEMENTS(threads); k++) {
            g_thread_join(threads[k]);
        }
        /* no pass ends from here on, which could mend it */
        block(fe);
        assert_present(fe, ram);
        dedup_engine_block(fe->e, false, false);
        fx_wait_scans(fe, 1);
        fx_assert_bytes(ram);
    }
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_func("/figures/lock", test_lock);
    g_test_add_func("/figures/region-goes", test_region_goes);
    g_test_add_data_func("/figures/present/memfd",
                         GINT_TO_POINTER(FX_MEMFD), test_present);
    g_test_add_data_func("/figures/present/anon",
                         GINT_TO_POINTER(FX_ANON), test_present);
    g_test_add_data_func("/figures/present/private-memfd",
                         GINT_TO_POINTER(FX_PRIVATE), test_present);
    return g_test_run();
}
