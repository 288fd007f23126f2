/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How fast the scanner goes: what an advisor makes of what passes find, and
 * that what it may spend of a processor is what it spends.
 */

#include "engine-fixture.h"
#include "engine-internal.h"
#include "group-util.h"
#include "scan/pace.h"

#define CORE 1000
#define TARGET_S 200

static const DedupParams scan_time = {
    .run = true, .zero_pages = true, .huge_pages_split = true, .max_maps = 60,
    .pages_to_scan = 4096, .sleep_millisecs = 20,
    .advisor = DEDUP_ADVISOR_SCAN_TIME, .target_scan_s = TARGET_S,
};

/* A pace on its own. */
typedef struct Alone {
    DedupGroup *g;
    DedupHostMem *mem;
    DedupPace p;
} Alone;

static DedupPace *begin(Alone *a)
{
    g_autoptr(GError) error = NULL;

    a->g = dedup_group_new(NULL, &error);
    a->mem = dedup_hostmem_new("/proc");
    dedup_pace_init(&a->p, a->g, a->mem);
    return &a->p;
}

static void end(Alone *a)
{
    dedup_pace_clear(&a->p);
    dedup_hostmem_free(a->mem);
    dedup_group_free(a->g);
}

/* A pass over @pages that found so many. */
static void pass(DedupPace *p, uint64_t pages, uint64_t found)
{
    const DedupTally tally = {
        .found = found, .hashed = pages, .work = pages,
    };

    dedup_pace_pass(p, &scan_time, &tally);
}

/* As fast as may be at first, then slower, and faster where much is found. */
static void test_scan_time(void)
{
    Alone alone;
    DedupPace *p = begin(&alone);
    int64_t us = G_TIME_SPAN_SECOND;
    uint32_t pages;

    g_assert_cmpuint(dedup_pace_wants(p), ==, CORE);
    g_assert_cmpuint(dedup_pace_batch(p, &scan_time), >=, 4096);
    g_assert_cmpint(dedup_pace_rest(p, &scan_time), ==, 0);
    pass(p, 100000, 50000);
    for (unsigned i = 0; i < 12; i++) {
        g_assert_cmpint(p->wish_us, ==, us);
        us = MIN(2 * us, (int64_t)TARGET_S * G_TIME_SPAN_SECOND);
        pass(p, 100000, 100);
    }
    g_assert_cmpint(p->wish_us, ==, TARGET_S * G_TIME_SPAN_SECOND);
    g_assert_cmpint(p->scan_us, ==, p->wish_us);
    g_assert_cmpuint(dedup_pace_wants(p), <, 10);

    /* so many pages in such a time: 500 in a second */
    pages = dedup_pace_batch(p, &scan_time);
    g_assert_cmpuint(pages, ==, DEDUP_CHUNK_PAGES);
    g_assert_cmpint(dedup_pace_rest(p, &scan_time), ==,
                    pages * G_TIME_SPAN_SECOND / 500);

    pass(p, 100000, 5000);
    g_assert_cmpint(p->scan_us, ==, TARGET_S * G_TIME_SPAN_SECOND / 4);
    dedup_pace_hurry(p);
    dedup_pace_batch(p, &scan_time);
    g_assert_cmpint(p->scan_us, ==, 0);
    end(&alone);
}

/* A pass that takes longer than a second is slowed down all the same. */
static void test_large(void)
{
    Alone alone;
    DedupPace *p = begin(&alone);

    for (unsigned i = 0; i < 12; i++) {
        p->pass_start_ns -= 3 * INT64_C(1000000000); /* of CPU time */
        pass(p, 10 << 20, 0);
    }
    g_assert_cmpint(p->scan_us, ==, TARGET_S * G_TIME_SPAN_SECOND);
    g_assert_cmpuint(dedup_pace_wants(p), <, 20);
    end(&alone);
}

/* The guest has booted since the last pass, which saw next to nothing. */
static void test_grown(void)
{
    Alone alone;
    DedupPace *p = begin(&alone);
    int64_t us;

    for (unsigned i = 0; i < 5; i++) {
        pass(p, 20, 0);
    }
    us = p->wish_us;
    g_assert_cmpint(p->scan_us, ==, us);
    dedup_pace_grown(p, DEDUP_CHUNK_PAGES);
    g_assert_cmpint(p->scan_us, ==, us);
    dedup_pace_grown(p, DEDUP_CHUNK_PAGES + 60);
    g_assert_cmpint(p->scan_us, ==, 0);
    dedup_pace_batch(p, &scan_time);
    g_assert_cmpint(dedup_pace_rest(p, &scan_time), ==, 0);
    g_assert_cmpuint(dedup_pace_wants(p), ==, CORE);
    /* for this pass only */
    pass(p, 100000, 0);
    g_assert_cmpint(p->wish_us, ==, 2 * us);
    g_assert_cmpint(p->scan_us, ==, 2 * us);
    /* no more than twice as much: that is said by the next pass */
    dedup_pace_grown(p, 200000);
    g_assert_cmpint(p->scan_us, ==, 2 * us);
    end(&alone);
}

/* It was long since the last batch, or there was none: nothing is owed. */
static void test_long_ago(void)
{
    Alone alone;
    DedupPace *p = begin(&alone);
    DedupParams params = scan_time;

    params.max_cpu = 70;
    g_assert_cmpint(dedup_pace_rest(p, &params), <, 1000);
    p->wall_ns = 1;
    p->cpu_ns = 1;
    dedup_pace_rest(p, &params);
    p->wall_ns -= INT64_MAX / 2;
    g_assert_cmpint(dedup_pace_rest(p, &params), <, 1000);
    /* and what is owed is bounded, too */
    p->cpu_ns -= INT64_C(3600) * 1000000000;
    dedup_pace_rest(p, &params);
    g_assert_cmpint(p->credit_ns, >=, -INT64_C(5000000000));
    end(&alone);
}

/* No more and no fewer pages than this. */
static void test_limits(void)
{
    Alone alone;
    DedupPace *p = begin(&alone);
    DedupParams params = scan_time;

    for (unsigned i = 0; i < 12; i++) {
        pass(p, 100 << 20, 0);
    }
    params.max_pages = 2000;
    /* 2000 in 20 ms */
    g_assert_cmpuint(dedup_pace_batch(p, &params), ==, 2000);
    g_assert_cmpint(dedup_pace_rest(p, &params), ==, 20000);
    for (unsigned i = 0; i < 12; i++) {
        pass(p, 1000, 0);
    }
    params.min_pages = 1024;
    g_assert_cmpuint(dedup_pace_batch(p, &params), ==, 1024);
    g_assert_cmpint(dedup_pace_rest(p, &params), ==, 20000);
    end(&alone);
}

static void wants(TestMember *m, unsigned permille)
{
    DedupMemberInfo info = { .scanning = 1, .cpu_wanted = permille };

    dedup_group_tell(m->g, &info);
}

static uint32_t share_of(TestPair *f, uint32_t max_cpu, uint32_t max_cpu_vm)
{
    DedupHostMem *mem = dedup_hostmem_new("/proc");
    DedupParams params = scan_time;
    uint32_t share;
    DedupPace p;

    params.max_cpu = max_cpu;
    params.max_cpu_vm = max_cpu_vm;
    dedup_pace_init(&p, f->a->g, mem);
    dedup_pace_rest(&p, &params);
    share = p.share;
    dedup_pace_clear(&p);
    dedup_hostmem_free(mem);
    return share;
}

/* What a group may spend is shared by who wants it. */
static void test_share(TestPair *f, gconstpointer unused)
{
    TestMember *c = test_member_new(f->dir, 3);

    dedup_group_refresh(f->a->g);
    wants(f->a, CORE);
    wants(f->b, CORE);
    wants(c, CORE);
    g_assert_cmpuint(share_of(f, 30, 0), ==, 100);
    g_assert_cmpuint(share_of(f, 30, 5), ==, 50);
    g_assert_cmpuint(share_of(f, 0, 5), ==, 50);
    g_assert_cmpuint(share_of(f, 0, 0), ==, CORE);
    /* one is idle: two share what it leaves; then the other one is, too */
    wants(c, 10);
    g_assert_cmpuint(share_of(f, 30, 0), ==, 145);
    wants(f->b, 20);
    g_assert_cmpuint(share_of(f, 30, 0), ==, 270);
    /* lies do no harm */
    wants(c, 65535);
    g_assert_cmpuint(share_of(f, 30, 0), ==, 140);
    test_member_free(c);
}

#define PAGES 32768u
#define SECONDS 4

/* RAM in which there is always something to do. */
static FX_GUEST gpointer writer(gpointer opaque)
{
    FxRam *ram = opaque;
    FxWord *stop = (FxWord *)ram->shadow;

    for (uint64_t i = 1; !*stop; i++) {
        for (uint32_t k = 0; k < PAGES && !*stop; k += 64) {
            *(FxWord *)fx_addr(ram, k) = i;
        }
        g_usleep(1000);
    }
    return NULL;
}

static double cpu_share(uint32_t max_cpu)
{
    FxRam *ram = fx_ram_new(FX_ANON, PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    FxWord *stop = (FxWord *)ram->shadow;
    DedupParams params = scan_time;
    GThread *thread;
    DedupStats from, to;
    int64_t start;

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i + 1);
    }
    *stop = 0;
    thread = g_thread_new("writer", writer, ram);
    params.max_cpu = max_cpu;
    params.target_scan_s = 1;
    params.min_pages = 1u << 20; /* all the time */
    dedup_engine_set_params(fe->e, &params);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_scans(fe, 1);
    fx_stats(fe, &from);
    start = g_get_monotonic_time();
    /* how long is what is measured */
    g_usleep(SECONDS * G_USEC_PER_SEC);
    fx_stats(fe, &to);
    start = g_get_monotonic_time() - start;
    *stop = 1;
    g_thread_join(thread);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    return (to.cpu_time_ns - from.cpu_time_ns) / 10.0 / start;
}

/* It spends what it may: no more on any machine, no less on an idle one. */
static void test_max_cpu(void)
{
    double share = cpu_share(10);

    g_test_message("%.1f %%", share);
    g_assert_cmpfloat(share, <, 11);
    g_assert_cmpfloat(share, >, 3);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_func("/pace/scan-time", test_scan_time);
    g_test_add_func("/pace/large", test_large);
    g_test_add_func("/pace/grown", test_grown);
    g_test_add_func("/pace/long-ago", test_long_ago);
    g_test_add_func("/pace/limits", test_limits);
    g_test_add_func("/pace/max-cpu", test_max_cpu);
    test_pair_add("/pace/share", test_share);
    return g_test_run();
}
