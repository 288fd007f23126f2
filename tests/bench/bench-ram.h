/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * RAM with a known share of equal pages, for benchmarks.
 *
 * Terms:
 *   run    pages with equals elsewhere that follow each other, here and there
 *   gap    a page between two runs that has no equal anywhere
 *   copy   the RAM consists of some copies of the same runs; so each page of
 *          a run is there that many times, each gap once
 *
 * Owner: the benchmark's main thread.  Nobody writes to the RAM meanwhile but
 * the benchmark itself.
 */

#ifndef BENCH_RAM_H
#define BENCH_RAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BENCH_PAGE ((size_t)4096)

typedef struct BenchRam {
    uint8_t *host;
    size_t pages;
    int fd;                 /* -1: anonymous */
    unsigned run;           /* 0: no page has an equal */
    unsigned copies;
    size_t copy_pages;      /* length of a copy, gaps included */
} BenchRam;

/*
 * New RAM, every page filled.  @run 0: no page has an equal.  The flags are
 * those of guest RAM (MADV_DONTFORK), without huge pages: KSM and the engine
 * are to be compared page by page.
 */
BenchRam *bench_ram_new(size_t pages, unsigned run, unsigned copies,
                        bool shared);
void bench_ram_free(BenchRam *ram);

/* Is page @i one that has equals? */
bool bench_ram_is_equal(const BenchRam *ram, size_t i);

/* How many pages have equals, counting each of them. */
size_t bench_ram_equals(const BenchRam *ram);

/*
 * So many merged pages end a measurement, on both sides.  The last few of a
 * pass may find themselves in a segment that does not pay.
 */
size_t bench_ram_goal(const BenchRam *ram);

/* Every byte as it was filled in? */
bool bench_ram_verify(const BenchRam *ram);

/* What page @i holds. */
void bench_ram_content(const BenchRam *ram, size_t i, uint64_t *words);

#endif /* BENCH_RAM_H */
