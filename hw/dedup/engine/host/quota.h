/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The CPU quota of our cgroup, or of one above it.
 *
 * A process that has used up its quota is throttled until the next period
 * begins.  Who is throttled while a range is frozen has all its writers wait
 * for up to a period.  So while that happens, merge windows begin only at the
 * beginning of a period, when there is some quota again.
 *
 * Terms: throttled, period and quota are those of cpu.max and cpu.stat, of
 * version 1 or 2.
 *
 * Thread: one at a time.
 */

#ifndef DEDUP_QUOTA_H
#define DEDUP_QUOTA_H

#include "host/cgroup.h"

typedef struct DedupQuota {
    DedupCgroups cgroups;     /* of CPU time */
    int64_t looked_ns;        /* when it was last asked who is throttled */
    uint64_t ids[DEDUP_CGROUP_LEVELS];       /* the cgroups, at that time */
    uint64_t throttled[DEDUP_CGROUP_LEVELS]; /* how often each was, till then */
    int64_t careful_ns;       /* one was: be careful until then */
    uint64_t id;              /* that one */
    int64_t period_ns;        /* its periods */
    int64_t fresh_ns;         /* the first part of each, which may be used */
    int64_t phase_ns;         /* one began then; 0: not known yet */
    uint64_t periods;         /* how many had when that was last asked, */
    int64_t watched_ns;       /* and when that was */
    int64_t asked_ns;         /* when a range was to be frozen last */
    int64_t waits_ns;         /* it might not be since then; 0: it might */
} DedupQuota;

/* @proc: where the kernel's files are: "/proc", but for tests. */
void dedup_quota_init(DedupQuota *q, const char *proc);
void dedup_quota_clear(DedupQuota *q);

/*
 * It is @now_ns: in how many us, at most, may a range be frozen?  0: now.  Ask
 * again when that time has passed.
 */
int64_t dedup_quota_wait_us(DedupQuota *q, int64_t now_ns);

#endif /* DEDUP_QUOTA_H */
