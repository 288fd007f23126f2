/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel takes pages out of use that have shown errors: it moves their
 * contents to another page (soft_offline_page), whoever maps them, at any
 * time.  Nobody sees that, and what is merged stays so.
 *
 * The machine has less memory for good then.  So this is for a guest that is
 * thrown away: $DEDUP_TEST_BREAK_HOST, which tests/kernels sets.
 */

#include <errno.h>
#include <sys/mman.h>

#include "engine-fixture.h"

/* glibc does not name it. */
#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE 101
#endif

#define PAGES 64
#define ROUNDS 2

/* Move every page; returns how many were. */
static unsigned move_all(FxRam *ram)
{
    unsigned moved = 0;

    for (uint32_t i = 0; i < PAGES; i++) {
        if (madvise(fx_addr(ram, i), FX_PAGE, MADV_SOFT_OFFLINE) == 0) {
            moved++;
        } else if (errno == EINVAL || errno == EPERM) {
            return 0;
        }
        /* EBUSY, EIO: somebody held it, and it stays */
    }
    return moved;
}

static void test_soft(gconstpointer data)
{
    FxRam *ram;
    FxEngine *fe;
    DedupStats stats;
    unsigned own = 0, merged;

    if (!g_getenv("DEDUP_TEST_BREAK_HOST")) {
        g_test_skip("takes memory from the machine: tests/kernels");
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    fe = fx_engine_new(NULL);
    fx_add(fe, ram);
    fx_engine_start(fe);
    for (unsigned round = 0; round < ROUNDS; round++) {
        /* four of each, and some that are like no other */
        for (uint32_t i = 0; i < PAGES; i++) {
            fx_page(ram, i, i % 4 ? 1 + round * PAGES + i % 16
                                  : 10000 + round * PAGES + i);
        }
        own += move_all(ram);
        fx_assert_bytes(ram);
        fx_wait_settled(fe);
        fx_stats(fe, &stats);
        g_assert_cmpuint(stats.pages_merged, ==, PAGES * 3 / 4);
        merged = move_all(ram);
        fx_assert_bytes(ram);
        fx_wait_scans(fe, 2);
        fx_stats(fe, &stats);
        g_assert_cmpuint(stats.pages_merged, ==, PAGES * 3 / 4);
        fx_byte(ram, round + 1, 7, 0xa5);
        fx_assert_bytes(ram);
        g_test_message("%u own so far, %u of all after merging", own,
                       merged);
    }
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_engine_stop(fe);
    fx_remove(ram, true);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    fx_ram_free(ram);
    if (!own || !merged) {
        g_test_skip("this kernel takes no page out of use");
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/offline/soft/%s",
                                                fx_kind_name(kind));

        g_test_add_data_func(path, GINT_TO_POINTER(kind), test_soft);
    }
    return g_test_run();
}
