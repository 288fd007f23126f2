/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine, measured: its windows alone, and its thread from end to end.
 *
 * Thread: the benchmark's main thread calls; the windows run on it, all else
 * on a scanner thread that lives for one measurement.
 */

#ifndef BENCH_ENGINE_H
#define BENCH_ENGINE_H

#include "bench-ksm.h"

/* What follows from a merge, in nanoseconds a page. */
typedef struct BenchAfter {
    double first_read_ns;
    double first_write_ns;
} BenchAfter;

/*
 * Merge all equal pages of @ram into segments that are there already, by
 * windows alone: each saves a page.  @after: also what the first access to a
 * merged page costs; may be NULL.  @longest_ns: the longest window.
 */
void bench_engine_windows(BenchRam *ram, BenchCost *cost, BenchAfter *after,
                          double *longest_ns);

/*
 * Scan, publish and merge, until all equal pages are merged, to save all but
 * one of each; then restore them.
 */
void bench_engine_merge(BenchRam *ram, BenchCost *cost,
                        BenchCost *restore_cost);

/* Scan @ram, which has no equal pages, some times over. */
void bench_engine_scan(BenchRam *ram, BenchCost *cost);

/* Lookups in an index of @entries: one that hits, one that misses. */
void bench_engine_index(uint64_t entries, double *hit_ns, double *miss_ns);

#endif /* BENCH_ENGINE_H */
