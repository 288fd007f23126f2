/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel's KSM, measured: how much of ksmd's time a merge or a scan takes.
 *
 * KSM is one for the whole machine.  Its knobs are saved, set for the
 * measurement, and put back however the benchmark ends: a child process does
 * that when its pipe from us closes, be it by bench_ksm_end(), a signal or a
 * crash.
 */

#ifndef BENCH_KSM_H
#define BENCH_KSM_H

#include <stdbool.h>
#include <stdint.h>

#include "bench-ram.h"

/* What a measurement came to. */
typedef struct BenchCost {
    double pages;             /* saved by merging, or scanned */
    double cpu_ns;            /* of the thread that worked */
    double wall_ns;
} BenchCost;

/*
 * Save and set the knobs.  Call before there is a second thread.  Returns
 * NULL, or why KSM cannot be measured here.
 */
const char *bench_ksm_begin(void);
void bench_ksm_end(void);

/*
 * KSM also works on what other processes gave it: wait until there is no
 * such process, for two minutes in all.
 */
bool bench_ksm_wait(void);

/*
 * Merge all equal pages of @ram, to save all but one of each.  False: others'
 * memory was scanned as well, or it did not come to an end: the figure is of
 * no use.
 */
bool bench_ksm_merge(BenchRam *ram, BenchCost *cost);

/* Scan @ram, which has no equal pages, some times over. */
bool bench_ksm_scan(BenchRam *ram, BenchCost *cost);

/* For who gives memory to KSM himself: run it or stop it. */
void bench_ksm_run(bool on);
/* All that it has merged has its own memory again, and it knows no page. */
void bench_ksm_forget(void);
/* CPU time of ksmd, in ns. */
uint64_t bench_ksm_cpu_ns(void);

#endif /* BENCH_KSM_H */
