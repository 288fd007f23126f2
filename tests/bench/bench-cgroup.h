/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A cgroup for the processes of a measurement, below our own; version 1 or 2.
 * One of memory: what it is charged is what a user sees freed.  Or one of CPU
 * time, with a quota.
 */

#ifndef BENCH_CGROUP_H
#define BENCH_CGROUP_H

#include <stdint.h>
#include <sys/types.h>

typedef struct BenchCgroup BenchCgroup;

/* NULL: none may be made here. */
BenchCgroup *bench_cgroup_new(void);
/* With so many percent of a processor, in periods of 100 ms. */
BenchCgroup *bench_cgroup_new_cpu(unsigned percent);
/* Processes that are in it must have ended. */
void bench_cgroup_free(BenchCgroup *c);
/* The calling process goes there. */
void bench_cgroup_enter(BenchCgroup *c);
/* Bytes charged to one of memory. */
uint64_t bench_cgroup_usage(BenchCgroup *c);

#endif /* BENCH_CGROUP_H */
