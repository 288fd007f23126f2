/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Clocks for what lasts less than a microsecond.  Any thread.
 */

#ifndef DEDUP_CLOCK_H
#define DEDUP_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t dedup_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* CPU time of the calling thread. */
static inline int64_t dedup_thread_cpu_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

#endif /* DEDUP_CLOCK_H */
