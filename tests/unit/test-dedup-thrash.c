/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest that writes round and round to equal pages, as the boot block of
 * QEMU's migration test does: pages that are equal whenever they are looked at,
 * and written some milliseconds later.  It is disturbed once, and then left
 * alone (C25); and when it stops, all of it is merged after all.
 */

#include "engine-fixture.h"
#include "host/mutant.h"

#define PAGES 8192u
#define ROUND_US 5000
/* It is left alone: breaks in a second, over so many... */
#define CALM_S 5
#define BREAKS_MOST 50
/* ...at once, or on a busy host after some of these times. */
#define TIMES_MOST 12

typedef struct Guest {
    FxRam *ram;
    int stop;                 /* atomic */
    uint8_t value;
} Guest;

static FX_GUEST gpointer guest(gpointer opaque)
{
    Guest *g = opaque;

    while (!g_atomic_int_get(&g->stop)) {
        g->value++;
        for (uint32_t i = 0; i < PAGES; i++) {
            *(FxByte *)fx_addr(g->ram, i) = g->value;
        }
        g_usleep(ROUND_US);
    }
    return NULL;
}

static bool is_merged(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.pages_merged >= PAGES / 2;
}

static uint64_t breaks(FxEngine *fe)
{
    DedupStats stats;

    /* what was written is noticed by a pass */
    fx_wait_scans(fe, 2);
    fx_stats(fe, &stats);
    return stats.cow_breaks;
}

static void test_round(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    Guest g = { .ram = ram };
    uint64_t before = 0, after;
    GThread *thread;

    dedup_never_rests = false;
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 7);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    /* as if it had rested for long: all of it is merged */
    fx_wait_until(is_merged, fe, "not merged");
    thread = g_thread_new("guest", guest, &g);
    after = 0;
    for (unsigned i = 0; i < TIMES_MOST; i++) {
        before = after;
        /* how long is what is promised */
        g_usleep(CALM_S * G_USEC_PER_SEC);
        after = breaks(fe);
        g_test_message("%" G_GUINT64_FORMAT " breaks in %d s", after - before,
                       CALM_S);
        if (after > PAGES / 4 && after - before <= BREAKS_MOST * CALM_S) {
            break;
        }
    }
    if (after - before > BREAKS_MOST * CALM_S) {
        fx_fail("merged again and again", "%" G_GUINT64_FORMAT
                " breaks in %d s", after - before, CALM_S);
    }
    g_atomic_int_set(&g.stop, 1);
    g_thread_join(thread);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_byte(ram, i, 0, g.value);
    }
    fx_wait_until(is_merged, fe, "never merged again");
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    dedup_never_rests = true;
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_data_func("/thrash/round/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_round);
    g_test_add_data_func("/thrash/round/anon", GINT_TO_POINTER(FX_ANON_THP),
                         test_round);
    return g_test_run();
}
