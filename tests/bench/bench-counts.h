/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a process does that does not depend on how fast the machine is: system
 * calls, page faults, TLB flushes, context switches.
 *
 * They are perf events, which need root (or perf_event_paranoid of -1) and
 * tracefs; what the host does not grant is left out.
 */

#ifndef BENCH_COUNTS_H
#define BENCH_COUNTS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

typedef enum BenchCount {
    BENCH_SYSCALLS,
    BENCH_FAULTS,
    BENCH_TLB_FLUSHES,
    BENCH_SWITCHES,
    BENCH_COUNTS
} BenchCount;

extern const char *const bench_count_names[BENCH_COUNTS];

typedef struct BenchCounters {
    int fd[BENCH_COUNTS];     /* -1: not granted */
} BenchCounters;

/*
 * Count in @pid, which has one thread yet, and in the threads that it will
 * make.  Nothing is counted before bench_counters_start().
 */
void bench_counters_open(BenchCounters *c, pid_t pid);
void bench_counters_start(BenchCounters *c);
/* Adds to @values; false: @which is not granted. */
bool bench_counters_read(const BenchCounters *c, BenchCount which,
                         uint64_t *value);
void bench_counters_close(BenchCounters *c);

#endif /* BENCH_COUNTS_H */
