/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A memory cgroup for the processes of a measurement, below our own; version 1
 * or 2.  What it is charged is what a user sees freed.
 */

#ifndef BENCH_CGROUP_H
#define BENCH_CGROUP_H

#include <stdint.h>
#include <sys/types.h>

typedef struct BenchCgroup BenchCgroup;

/* NULL: none may be made here. */
BenchCgroup *bench_cgroup_new(void);
/* Processes that are in it must have ended. */
void bench_cgroup_free(BenchCgroup *c);
/* The calling process goes there. */
void bench_cgroup_enter(BenchCgroup *c);
/* Bytes charged. */
uint64_t bench_cgroup_usage(BenchCgroup *c);

#endif /* BENCH_CGROUP_H */
