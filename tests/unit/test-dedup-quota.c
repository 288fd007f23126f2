/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of when ranges may be frozen under a CPU quota, on files of our own,
 * with a clock of our own; and that no window begins when they may not be.
 *
 * A case is a /proc with "self/cgroup" and "self/mountinfo", and the files of
 * the cgroups that they name.
 */

#include <glib/gstdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "group-util.h"
#include "host/quota.h"
#include "space/space-internal.h"

#define MS INT64_C(1000000)
/* A time at which nothing is remembered of the times before. */
#define LATER (3600000 * MS)

typedef struct Host {
    char *dir;
    const char *cgroup;       /* where its files are */
    bool v2;
    DedupQuota quota;
    int64_t now;              /* ns */
} Host;

static void put(Host *h, const char *dir, const char *name, const char *text)
{
    g_autofree char *path = g_build_filename(h->dir, dir, name, NULL);
    g_autofree char *parent = g_path_get_dirname(path);

    g_assert_cmpint(g_mkdir_with_parents(parent, 0700), ==, 0);
    g_assert_true(g_file_set_contents(path, text, -1, NULL));
}

static void put_quota(Host *h, int64_t quota_us, int64_t period_us)
{
    g_autofree char *max = quota_us < 0 ?
        g_strdup_printf("max %d\n", (int)period_us) :
        g_strdup_printf("%d %d\n", (int)quota_us, (int)period_us);
    g_autofree char *quota = g_strdup_printf("%d\n", (int)quota_us);
    g_autofree char *period = g_strdup_printf("%d\n", (int)period_us);

    if (h->v2) {
        put(h, h->cgroup, "cpu.max", max);
    } else {
        put(h, h->cgroup, "cpu.cfs_quota_us", quota);
        put(h, h->cgroup, "cpu.cfs_period_us", period);
    }
}

static void put_stat(Host *h, unsigned periods, unsigned throttled)
{
    g_autofree char *text = g_strdup_printf(
        "usage_usec 1\nnr_periods %u\nnr_throttled %u\nthrottled_usec 5\n",
        periods, throttled);

    put(h, h->cgroup, "cpu.stat", text);
}

static void begin(Host *h, bool v2)
{
    g_autofree char *mounts = NULL;

    *h = (Host) { .dir = test_dir_new(), .v2 = v2, .now = LATER };
    h->cgroup = v2 ? "cg/vm/emulator" : "cpu/vm/emulator";
    mounts = g_strdup_printf(
        "29 23 0:25 / %s/cg rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
        "%s31 23 0:27 / %s/cpu rw shared:11 - cgroup cgroup rw,%s\n",
        h->dir, v2 ? "" : "30 23 0:26 / /x rw - cgroup cgroup rw,memory\n",
        h->dir, v2 ? "freezer" : "cpu,cpuacct");
    put(h, "self", "cgroup", v2 ? "3:freezer:/\n0::/vm/emulator\n" :
        "4:memory:/other\n2:cpu,cpuacct:/vm/emulator\n0::/elsewhere\n");
    put(h, "self", "mountinfo", mounts);
    put_quota(h, 20000, 100000);
    put_stat(h, 10, 0);
    dedup_quota_init(&h->quota, h->dir);
}

static void end(Host *h)
{
    dedup_quota_clear(&h->quota);
    test_dir_free(h->dir);
}

static int64_t wait_us(Host *h, int64_t after_ns)
{
    h->now += after_ns;
    return dedup_quota_wait_us(&h->quota, h->now);
}

/* It is throttled, and then a period is seen to begin. */
static void meet_period(Host *h)
{
    g_assert_cmpint(wait_us(h, 0), ==, 0);
    put_stat(h, 20, 3);
    g_assert_cmpint(wait_us(h, 200 * MS), >, 0);
    g_assert_cmpint(wait_us(h, 1 * MS), >, 0);
    put_stat(h, 21, 3);
    g_assert_cmpint(wait_us(h, 1 * MS), ==, 0);
}

static void check_quota(bool v2)
{
    Host h;

    begin(&h, v2);
    meet_period(&h);
    /* only its first part, and that of the next ones */
    g_assert_cmpint(wait_us(&h, 1 * MS), ==, 0);
    g_assert_cmpint(wait_us(&h, 4 * MS), >=, 94000);
    g_assert_cmpint(wait_us(&h, 10 * MS), <=, 86000);
    g_assert_cmpint(wait_us(&h, 85500 * MS / 1000), ==, 0);
    g_assert_cmpint(wait_us(&h, 100 * MS), ==, 0);
    g_assert_cmpint(wait_us(&h, 50 * MS), >=, 49000);
    /* for as long as it is throttled now and then */
    for (unsigned i = 0; i < 10; i++) {
        put_stat(&h, 100 + i, 4 + i);
        g_assert_cmpint(wait_us(&h, 3000 * MS), >, 0);
    }
    g_assert_cmpint(wait_us(&h, 4000 * MS), >, 0);
    g_assert_cmpint(wait_us(&h, 4000 * MS), ==, 0);
    g_assert_cmpint(wait_us(&h, 30 * MS), ==, 0);
    end(&h);
}

/* Who is always woken too late waits, but not for ever. */
static void test_late(void)
{
    unsigned allowed = 0;
    Host h;

    begin(&h, true);
    g_assert_cmpint(wait_us(&h, 0), ==, 0);
    for (unsigned i = 0; i < 100; i++) {
        put_stat(&h, 20 + 10 * i, 3 + i);
        /* what has changed since the last look may have done so long ago */
        allowed += wait_us(&h, 130 * MS) == 0;
    }
    g_assert_cmpuint(allowed, >=, 4);
    g_assert_cmpuint(allowed, <=, 8);
    end(&h);
}

/* Nor is what was wrong about the grid believed for ever. */
static void test_wrong(void)
{
    Host h;

    begin(&h, false);
    meet_period(&h);
    for (unsigned i = 0; i < 6; i++) {
        put_stat(&h, 30 + i, 4 + i);
        g_assert_cmpint(wait_us(&h, i ? 100 * MS : 50 * MS), >, 0);
    }
    /* it watches again */
    put_stat(&h, 50, 20);
    g_assert_cmpint(wait_us(&h, 1 * MS), ==, 0);
    end(&h);
}

/* Two are throttled: one of them is followed. */
static void test_two(void)
{
    Host h;

    begin(&h, true);
    h.cgroup = "cg/vm";
    put_quota(&h, 50000, 70000);
    put_stat(&h, 1, 1);
    h.cgroup = "cg/vm/emulator";
    meet_period(&h);
    h.cgroup = "cg/vm";
    put_stat(&h, 2, 2);
    h.cgroup = "cg/vm/emulator";
    put_stat(&h, 22, 4);
    g_assert_cmpint(wait_us(&h, 101 * MS), ==, 0);
    g_assert_cmpint(wait_us(&h, 50 * MS), >=, 48000);
    end(&h);
}

static void test_v1(void)
{
    check_quota(false);
}

static void test_v2(void)
{
    check_quota(true);
}

/* A quota that is never used up, and none. */
static void test_none(void)
{
    Host h;

    begin(&h, true);
    for (unsigned i = 0; i < 20; i++) {
        put_stat(&h, 10 + i, 7);
        g_assert_cmpint(wait_us(&h, 130 * MS), ==, 0);
    }
    put_quota(&h, -1, 100000);
    put_stat(&h, 50, 9);
    g_assert_cmpint(wait_us(&h, 130 * MS), ==, 0);
    end(&h);
}

/* It is above ours, and we are moved to where none is. */
static void test_moved(void)
{
    Host h;

    begin(&h, true);
    put_quota(&h, -1, 100000);
    h.cgroup = "cg/vm";
    put_quota(&h, 50000, 50000);
    put_stat(&h, 1, 1);
    meet_period(&h);
    g_assert_cmpint(wait_us(&h, 20 * MS), <=, 30001);
    put(&h, "cg/free", "cpu.max", "max 100000\n");
    put(&h, "self", "cgroup", "0::/free\n");
    /* what it was is not forgotten at once; then there is nothing to ask */
    wait_us(&h, 200 * MS);
    g_assert_cmpint(wait_us(&h, 6000 * MS), ==, 0);
    end(&h);
}

/* No cgroup, no /proc: there is none. */
static void test_nothing(void)
{
    DedupQuota q;

    dedup_quota_init(&q, "/nonexistent");
    g_assert_cmpint(dedup_quota_wait_us(&q, LATER), ==, 0);
    g_assert_cmpint(dedup_quota_wait_us(&q, 2 * LATER), ==, 0);
    dedup_quota_clear(&q);
}

/* ---- windows ---- */

#define PAGES 64

typedef struct Scanner {
    DedupSpace *space;
    Host *host;
    unsigned pauses;
    unsigned most;            /* pauses until it is asked for something */
    unsigned periods;         /* so many have been; 0: time stands still */
} Scanner;

static bool pause_scanner(void *owner, int64_t us)
{
    Scanner *s = owner;

    g_assert_cmpint(us, >, 0);
    if (s->periods) {
        g_usleep(us);
        put_stat(s->host, ++s->periods, 3);
    }
    return ++s->pauses < s->most;
}

/* No window begins while there is no quota; a scanner that is asked returns. */
static void test_windows(void)
{
    Host h;
    Scanner s = { .host = &h, .most = 3 };
    DedupRegionInfo info = {
        .id = "ram", .size = PAGES << DEDUP_PAGE_SHIFT,
        .memory = DEDUP_MEMORY_ANON, .fd = -1,
    };
    DedupAction actions[PAGES] = { 0 };
    unsigned limits = 0;
    DedupRegion *r;

    s.space = dedup_space_new(&s, false, DEDUP_FREEZE_USERFAULTFD, NULL);
    if (!s.space) {
        g_test_skip("no userfaultfd");
        return;
    }
    dedup_space_set_scanner(s.space, pause_scanner);
    info.host = mmap(NULL, info.size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    g_assert_true(info.host != MAP_FAILED);
    memset(info.host, 0, info.size);
    r = dedup_space_add(s.space, &info, NULL, NULL, NULL);
    g_assert_nonnull(r);
    for (unsigned i = 0; i < PAGES; i++) {
        actions[i].page = i;
    }

    begin(&h, true);
    h.now = g_get_monotonic_time() * 1000 - 300 * MS;
    g_assert_cmpint(wait_us(&h, 0), ==, 0);
    put_stat(&h, 20, 3);
    dedup_quota_clear(&s.space->quota);
    s.space->quota = h.quota;
    g_assert_cmpuint(dedup_space_windows(r, actions, PAGES, &limits), ==, 0);
    g_assert_cmpuint(s.pauses, ==, 3);
    /* until a period begins, or was waited for long enough */
    s.periods = 20;
    s.most = UINT_MAX;
    if (s.space->freezer.zero_anon) {
        g_assert_cmpuint(dedup_space_windows(r, actions, PAGES, &limits), ==,
                         PAGES);
    }
    for (unsigned i = 0; i < info.size; i++) {
        g_assert_cmpint(((uint8_t *)info.host)[i], ==, 0);
    }
    dedup_space_remove(r);
    dedup_space_reap(s.space);
    dedup_space_free(s.space);
    munmap(info.host, info.size);
    test_dir_free(h.dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/quota/v1", test_v1);
    g_test_add_func("/quota/v2", test_v2);
    g_test_add_func("/quota/late", test_late);
    g_test_add_func("/quota/wrong", test_wrong);
    g_test_add_func("/quota/two", test_two);
    g_test_add_func("/quota/none", test_none);
    g_test_add_func("/quota/moved", test_moved);
    g_test_add_func("/quota/nothing", test_nothing);
    g_test_add_func("/quota/windows", test_windows);
    return g_test_run();
}
