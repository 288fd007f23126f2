/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Running short of descriptors and of memory: merging stops and says so,
 * unmerging is refused with the figures and changes nothing, and nobody is
 * killed for what was published.  A group that cannot be joined is tried
 * again.
 *
 * Tests with a memory cgroup run in a process of their own inside it.
 */

#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "scan/scan-internal.h"

#define MIB (1u << 20)

static bool is_limited(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.state == DEDUP_STATE_LIMITED && stats.limits;
}

/* No descriptor left for one more segment. */
static void test_descriptors(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), 1024);
    FxEngine *fe = fx_engine_new(NULL);
    struct rlimit old, low;
    DedupStats stats;
    FxView view;

    for (uint32_t i = 0; i < 512; i++) {
        fx_page(ram, i, i % 64 + 1);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 512);

    g_assert_cmpint(getrlimit(RLIMIT_NOFILE, &old), ==, 0);
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    /* there is one segment, and half of the descriptors may be for such */
    low = (struct rlimit) { 2, old.rlim_max };
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &low), ==, 0);
    for (uint32_t i = 512; i < 1024; i++) {
        fx_page(ram, i, i % 64 + 1001);
    }
    fx_set_run(fe, true);
    fx_wait_until(is_limited, fe, "not limited");
    fx_wait_scans(fe, 3);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.limits, ==, DEDUP_LIMIT_FDS);
    g_assert_cmpuint(stats.pages_merged, ==, 512);
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &old), ==, 0);
    fx_assert_bytes(ram);

    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.limits, ==, 0);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 1024);
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* ---- in a memory cgroup: RAM without a shadow, it would be charged ---- */

typedef struct InCgroup {
    FxCgroup *cg;
    FxKind kind;
} InCgroup;

static void check_seeds(FxRam *ram, uint64_t base, uint32_t modulus)
{
    uint8_t page[FX_PAGE];

    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_content(page, base + i % modulus);
        fx_assert_page(ram, i, page);
    }
}

static void store_seeds(FxRam *ram, uint64_t base, uint32_t modulus)
{
    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_content(fx_addr(ram, i), base + i % modulus);
    }
}

static bool limited_or_idle(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.full_scans > 5 && (stats.state == DEDUP_STATE_LIMITED ||
                                    stats.state == DEDUP_STATE_IDLE);
}

#define PUBLISH_PAGES 32768     /* 128 MiB, every page there twice */

/*
 * Publishing stops while the cgroup could still bear all RAM: then the guest
 * rewrites everything, while the segments are still held.
 */
static void publish_in_cgroup(void *opaque)
{
    InCgroup *in = opaque;
    FxRam *ram = fx_ram_new(in->kind, PUBLISH_PAGES);
    DedupStats stats;
    FxEngine *fe;

    g_assert_true(fx_cgroup_enter(in->cg));
    fe = fx_engine_new(NULL);
    store_seeds(ram, 1, PUBLISH_PAGES / 2);
    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  44 * MIB));
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_until(limited_or_idle, fe, "neither limited nor idle");
    fx_stats(fe, &stats);
    g_test_message("%" G_GUINT64_FORMAT " of %u pages merged, state %s",
                   stats.pages_merged, PUBLISH_PAGES,
                   dedup_state_str(stats.state));
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    store_seeds(ram, 1000000, PUBLISH_PAGES);   /* may be the end of us */
    check_seeds(ram, 1000000, PUBLISH_PAGES);
    g_assert_cmpuint(stats.limits & DEDUP_LIMIT_MEMORY, !=, 0);
    g_assert_cmpuint(stats.pages_merged, >, 0);
    g_assert_cmpuint(stats.pages_merged, <, PUBLISH_PAGES / 2);
    fx_engine_free(fe);
}

#define MERGED_PAGES 49152      /* 192 MiB of 4 MiB of contents */
#define CONTENTS 1024

static FxEngine *merged_in_cgroup(InCgroup *in, FxRam *ram)
{
    FxEngine *fe;
    FxView view;

    g_assert_true(fx_cgroup_enter(in->cg));
    fe = fx_engine_new(NULL);
    store_seeds(ram, 1, CONTENTS);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, MERGED_PAGES);
    return fe;
}

/* Unmerging that the cgroup cannot bear: refused, or forced. */
static void refuse_in_cgroup(void *opaque)
{
    InCgroup *in = opaque;
    FxRam *ram = fx_ram_new(in->kind, MERGED_PAGES);
    FxEngine *fe = merged_in_cgroup(in, ram);
    g_autoptr(GError) error = NULL;
    FxView before, after;
    DedupParams params;

    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  50 * MIB));
    fx_view(ram, &before);
    g_assert_false(dedup_engine_restore(fe->e, true, false, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY);
    g_test_message("%s", error->message);
    g_assert_nonnull(strstr(error->message, "192 MiB"));
    dedup_engine_get_params(fe->e, &params);
    g_assert_true(params.run);
    fx_wait_scans(fe, 2);
    fx_view(ram, &after);
    g_assert_cmpuint(after.segment_pages, ==, before.segment_pages);
    g_assert_cmpuint(after.copied, ==, before.copied);
    g_assert_cmpuint(after.own_pages, ==, before.own_pages);

    /* forced, while nothing can happen yet; then the memory comes */
    dedup_engine_block(fe->e, true, true);
    fx_restore_begin(fe, true, true);
    g_assert_true(fx_cgroup_limit(in->cg, 1024 * MIB));
    dedup_engine_block(fe->e, false, false);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, 0);
    fx_view(ram, &after);
    g_assert_cmpuint(after.segment_pages, ==, 0);
    check_seeds(ram, 1, CONTENTS);
    fx_engine_free(fe);
}

/* Memory runs short half-way: it stops, and says how much is left. */
static void half_way_in_cgroup(void *opaque)
{
    InCgroup *in = opaque;
    FxRam *ram = fx_ram_new(in->kind, MERGED_PAGES);
    FxEngine *fe = merged_in_cgroup(in, ram);
    FxView view;

    dedup_engine_block(fe->e, true, true);
    fx_restore_begin(fe, true, false);
    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  100 * MIB));
    dedup_engine_block(fe->e, false, false);
    fx_wait_restored(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(fe->left, >, 0);
    g_assert_cmpuint(fe->left, <, MERGED_PAGES);
    g_assert_cmpuint(fe->left, ==, view.segment_pages);
    g_assert_nonnull(fe->message);
    g_test_message("%s", fe->message);
    check_seeds(ram, 1, CONTENTS);

    g_assert_true(fx_cgroup_limit(in->cg, 1024 * MIB));
    fx_unmerge(fe);
    check_seeds(ram, 1, CONTENTS);
    fx_engine_free(fe);
}

static void run_in_cgroup(void (*body)(void *opaque), FxKind kind)
{
    InCgroup in = { .cg = fx_cgroup_new(), .kind = kind };
    int status;

    if (!in.cg) {
        return;
    }
    status = fx_in_child(body, &in, FX_DEADLINE);
    fx_cgroup_free(in.cg);
    if (status == 9) {
        fx_fail("killed", "at the limit of its memory cgroup");
    }
    if (status) {
        fx_fail("process failed", "wait status 0x%x", status);
    }
}

static void test_publish(gconstpointer data)
{
    run_in_cgroup(publish_in_cgroup, GPOINTER_TO_INT(data));
}

static void test_refused(gconstpointer data)
{
    run_in_cgroup(refuse_in_cgroup, GPOINTER_TO_INT(data));
}

static void test_half_way(gconstpointer data)
{
    run_in_cgroup(half_way_in_cgroup, GPOINTER_TO_INT(data));
}

static bool is_idle(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.state == DEDUP_STATE_IDLE;
}

/* Unique pages fill the index, which takes memory: not without room. */
static void index_in_cgroup(void *opaque)
{
    InCgroup *in = opaque;
    FxRam *ram = fx_ram_new(in->kind, PUBLISH_PAGES);
    FxEngine *fe;
    DedupStats stats;

    g_assert_true(fx_cgroup_enter(in->cg));
    fe = fx_engine_new(NULL);
    store_seeds(ram, 1, PUBLISH_PAGES);
    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  24 * MIB));
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_until(is_limited, fe, "not limited");
    fx_wait_scans(fe, 2);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.limits, ==, DEDUP_LIMIT_MEMORY);
    g_assert_cmpuint(dedup_index_bytes(fe->e->scan->index), ==, 0);
    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  200 * MIB));
    fx_wait_until(is_idle, fe, "not idle");
    g_assert_cmpuint(dedup_index_bytes(fe->e->scan->index), >=,
                     PUBLISH_PAGES * sizeof(uint64_t));
    fx_engine_free(fe);
}

static void test_index(gconstpointer data)
{
    run_in_cgroup(index_in_cgroup, GPOINTER_TO_INT(data));
}

/* A group that cannot be joined is joined when its directory was mended. */
static void test_join_again(void)
{
    char *dir = fx_group_dir();
    FxRam *ram = fx_ram_new(FX_MEMFD, 128);
    FxEngine *fe;
    char *why;

    for (uint32_t i = 0; i < 128; i++) {
        fx_page(ram, i, i % 4 + 1);
    }
    g_assert_cmpint(chmod(dir, 0777), ==, 0);
    fe = fx_engine_new(dir);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_state(fe, DEDUP_STATE_BLOCKED);
    why = dedup_engine_group_error(fe->e);
    g_assert_nonnull(why);
    g_free(why);
    g_assert_cmpint(chmod(dir, 0700), ==, 0);
    fx_wait_settled(fe);
    why = dedup_engine_group_error(fe->e);
    g_assert_null(why);
    g_assert_true(fx_is_merged(ram, 127));
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    fx_group_dir_free(dir);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/failures/%s/%s", name,
                                                fx_kind_name(kind));

        if (kind == (test == test_refused ? FX_ANON : FX_MEMFD) ||
            (test == test_publish && kind == FX_ANON)) {
            g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
        }
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("descriptors", test_descriptors);
    add_tests("publish", test_publish);
    add_tests("index", test_index);
    add_tests("refused", test_refused);
    add_tests("half-way", test_half_way);
    g_test_add_func("/failures/join-again", test_join_again);
    return g_test_run();
}
