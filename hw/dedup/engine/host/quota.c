/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * When not to freeze, for want of quota; see quota.h.
 *
 * When a period begins is not said by the kernel.  The count of periods is, and
 * they all begin on one grid, even if some are left out while nothing runs; so
 * it is watched until one begins.  Who was woken too late to see that watches
 * again; and who was wrong about it, and finds no time at all that is allowed,
 * goes on all the same after some periods.
 */

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "host/quota.h"

#define MS INT64_C(1000000)
/* How often to look whether we are throttled; and how long that counts. */
#define LOOK_NS (100 * MS)
#define CAREFUL_NS (5000 * MS)
/* How closely the beginning of a period is watched for. */
#define WATCH_US 1000
/* It was seen to begin if the look before was no longer ago. */
#define WATCHED_NS (3 * MS)
/* The part of a period that is used: most of it is not taken by others yet. */
#define FRESH_LEAST_NS (MS / 2)
#define FRESH_MOST_NS (2 * MS)
/*
 * Without a time that is allowed: when to look for the grid again, and when to
 * go on without.  In periods.
 */
#define WAITS_LOOK 4
#define WAITS_MOST 16

static bool read_level(const DedupCgroups *c, unsigned level,
                       int64_t *quota_us, int64_t *period_us)
{
    int fd = c->level_fd[level];
    g_autofree char *quota = dedup_cgroup_read(fd, c->v2 ? "cpu.max" :
                                               "cpu.cfs_quota_us");
    g_autofree char *period = NULL;
    const char *rest;

    if (!quota || !g_ascii_isdigit(*quota)) {
        return false; /* the root, "max", or -1 */
    }
    *quota_us = g_ascii_strtoll(quota, (char **)&rest, 10);
    if (c->v2) {
        *period_us = g_ascii_strtoll(rest, NULL, 10);
    } else {
        period = dedup_cgroup_read(fd, "cpu.cfs_period_us");
        *period_us = period ? g_ascii_strtoll(period, NULL, 10) : 0;
    }
    return *period_us > 0;
}

static bool read_stat(const DedupCgroups *c, unsigned level,
                      const char *name, uint64_t *value)
{
    g_autofree char *stat = dedup_cgroup_read(c->level_fd[level], "cpu.stat");

    return stat && dedup_find_number(stat, name, value);
}

/* This one has been throttled since the last look. */
static void be_careful(DedupQuota *q, unsigned level, int64_t now,
                       int64_t quota_us, int64_t period_us)
{
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t id = q->cgroups.level_id[level];

    if (q->id != id || q->period_ns != period_us * 1000 ||
        now > q->careful_ns) {
        q->phase_ns = 0;
        q->periods = 0;
    }
    q->id = id;
    q->period_ns = period_us * 1000;
    /* all processors may take of it at once */
    q->fresh_ns = CLAMP(quota_us * 1000 / MAX(processors, 1) / 2,
                        FRESH_LEAST_NS, FRESH_MOST_NS);
    q->careful_ns = now + CAREFUL_NS;
}

/* Of those that are throttled: the one that was, if it still is. */
static void look(DedupQuota *q, int64_t now)
{
    DedupCgroups *c = &q->cgroups;
    int64_t quota_us = 0, period_us = 0;
    int chosen = -1;

    q->looked_ns = now;
    dedup_cgroups_refresh(c);
    for (unsigned i = 0; i < DEDUP_CGROUP_LEVELS; i++) {
        uint64_t id = i < c->nlevels ? c->level_id[i] : 0;
        int64_t quota = 0, period = 0;
        uint64_t throttled = 0;

        if (id && read_level(c, i, &quota, &period)) {
            read_stat(c, i, "nr_throttled", &throttled);
        }
        if (q->ids[i] == id && throttled > q->throttled[i] &&
            (chosen < 0 || id == q->id)) {
            chosen = i;
            quota_us = quota;
            period_us = period;
        }
        q->ids[i] = id;
        q->throttled[i] = throttled;
    }
    if (chosen >= 0) {
        be_careful(q, chosen, now, quota_us, period_us);
    }
}

/* How many periods the one that is throttled has had. */
static bool count_periods(const DedupQuota *q, uint64_t *periods)
{
    for (unsigned i = 0; i < q->cgroups.nlevels; i++) {
        if (q->cgroups.level_id[i] == q->id) {
            return read_stat(&q->cgroups, i, "nr_periods", periods);
        }
    }
    return false;
}

/* Find out when periods begin.  False: not yet. */
static bool find_phase(DedupQuota *q, int64_t now)
{
    int64_t before = q->watched_ns;
    uint64_t periods;

    if (!count_periods(q, &periods)) {
        q->careful_ns = 0; /* it is gone, or says nothing */
        return false;
    }
    q->watched_ns = now;
    if (q->periods && periods != q->periods && now - before < WATCHED_NS) {
        q->phase_ns = now;
    }
    q->periods = periods;
    return q->phase_ns;
}

int64_t dedup_quota_wait_us(DedupQuota *q, int64_t now_ns)
{
    int64_t at, waits;

    if (now_ns - q->looked_ns > LOOK_NS || !q->looked_ns) {
        look(q, now_ns);
    }
    if (now_ns > q->careful_ns) {
        return 0;
    }
    if (!q->waits_ns || now_ns - q->asked_ns > WAITS_LOOK * q->period_ns) {
        q->waits_ns = now_ns;
    }
    q->asked_ns = now_ns;
    waits = now_ns - q->waits_ns;
    if (waits > WAITS_MOST * q->period_ns) {
        q->waits_ns = 0;
        return 0;
    }
    if (waits > WAITS_LOOK * q->period_ns && q->phase_ns &&
        q->phase_ns < q->waits_ns) {
        q->phase_ns = 0;
    }
    if (!q->phase_ns && !find_phase(q, now_ns)) {
        return q->careful_ns ? WATCH_US : 0;
    }
    at = (now_ns - q->phase_ns) % q->period_ns;
    if (at < q->fresh_ns) {
        q->waits_ns = 0;
        return 0;
    }
    return (q->period_ns - at) / 1000 + 1;
}

void dedup_quota_init(DedupQuota *q, const char *proc)
{
    *q = (DedupQuota) { 0 };
    dedup_cgroups_init(&q->cgroups, proc, "cpu");
}

void dedup_quota_clear(DedupQuota *q)
{
    dedup_cgroups_clear(&q->cgroups);
}
