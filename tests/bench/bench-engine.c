/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine, measured; see bench-engine.h.
 *
 * After each measurement every byte of the RAM is verified: a fast merge of
 * wrong pages is none.
 */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "bench-engine.h"
#include "engine-internal.h"
#include "space/space-internal.h"

#define POLL_US 500
#define MAX_POLLS 60000
#define SCANS_BEFORE 2
#define SCANS 6
#define BATCH 4096

static void die(const char *what)
{
    fprintf(stderr, "bench-dedup: %s\n", what);
    exit(2);
}

static double clock_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return ts.tv_sec * 1e9 + ts.tv_nsec;
}

/* ---- an engine with one region ---- */

typedef struct Scanner {
    DedupEngine *e;
    DedupRegion *r;
    GThread *thread;
    GMutex lock;
    GCond cond;
    bool restored;
} Scanner;

static void restored(void *opaque, uint64_t left, const GError *error)
{
    Scanner *s = opaque;

    if (error) {
        die(error->message);
    }
    g_mutex_lock(&s->lock);
    s->restored = true;
    g_cond_signal(&s->cond);
    g_mutex_unlock(&s->lock);
}

static Scanner *scanner_new(BenchRam *ram)
{
    g_autoptr(GError) error = NULL;
    Scanner *s = g_new0(Scanner, 1);
    DedupConfig config = {
        .page_size = BENCH_PAGE,
        .params = {
            .run = true, .pages_to_scan = BATCH, .zero_pages = true,
            .huge_pages_split = true, .max_maps = 90,
        },
        .callbacks.restored = restored,
        .opaque = s,
    };
    DedupRegionInfo info = {
        .id = "bench",
        .host = ram->host,
        .size = ram->pages * BENCH_PAGE,
        .memory = ram->fd < 0 ? DEDUP_MEMORY_ANON : DEDUP_MEMORY_SHARED,
        .fd = ram->fd,
        .flags = DEDUP_REGION_DONTFORK,
    };

    g_mutex_init(&s->lock);
    g_cond_init(&s->cond);
    s->e = dedup_engine_new(&config, &error);
    if (s->e) {
        dedup_space_begin_batch(s->e->space, true, true);
        s->r = dedup_region_add(s->e, &info, &error);
    }
    if (!s->r) {
        die(error->message);
    }
    return s;
}

static gpointer scanner_run(gpointer opaque)
{
    Scanner *s = opaque;

    dedup_engine_run(s->e);
    return NULL;
}

static void scanner_start(Scanner *s)
{
    s->thread = g_thread_new("scanner", scanner_run, s);
}

static void scanner_free(Scanner *s)
{
    if (s->thread) {
        dedup_engine_stop(s->e);
        g_thread_join(s->thread);
    }
    dedup_engine_free(s->e);
    g_cond_clear(&s->cond);
    g_mutex_clear(&s->lock);
    g_free(s);
}

static void snapshot(Scanner *s, DedupStats *stats, double *wall)
{
    dedup_engine_get_stats(s->e, stats, false);
    *wall = clock_ns(CLOCK_MONOTONIC);
}

static void take(BenchCost *cost, double pages, const DedupStats *from,
                 const DedupStats *to, double wall_from, double wall_to)
{
    cost->pages = pages;
    cost->cpu_ns = to->cpu_time_ns - from->cpu_time_ns;
    cost->wall_ns = wall_to - wall_from;
}

/* ---- the windows alone ---- */

/* Segments with the contents of one copy, and the actions to merge all. */
static DedupAction *prepare(Scanner *s, BenchRam *ram, size_t *nactions)
{
    size_t equals = bench_ram_equals(ram);
    DedupAction *actions = g_new0(DedupAction, equals);
    uint64_t content[BENCH_PAGE / sizeof(uint64_t)];
    DedupBuilder *b = NULL;
    DedupHolding **holding_of;
    unsigned gid = 1, number = 0;
    size_t n = 0;

    holding_of = g_new0(DedupHolding *, equals / DEDUP_SEGMENT_PAGES + 1);
    for (size_t i = 0; i < ram->copy_pages; i++) {
        if (bench_ram_is_equal(ram, i)) {
            b = b ? b : dedup_builder_new(NULL);
            bench_ram_content(ram, i, content);
            if (dedup_builder_append(b, content) < 0) {
                die("no memory for a segment");
            }
        }
        if (b && (dedup_builder_count(b) == DEDUP_SEGMENT_PAGES ||
                  i + 1 == ram->copy_pages)) {
            DedupSegment *segment;

            dedup_builder_flush(b);
            segment = dedup_builder_finish(b, gid++, NULL);
            holding_of[number++] = dedup_holding_add(s->e->space, segment);
            b = NULL;
        }
    }
    for (unsigned c = 0; c < ram->copies; c++) {
        size_t k = 0;

        for (size_t i = 0; i < ram->copy_pages; i++) {
            size_t page = c * ram->copy_pages + i;

            if (bench_ram_is_equal(ram, page)) {
                actions[n++] = (DedupAction) {
                    .page = page,
                    .holding = holding_of[k / DEDUP_SEGMENT_PAGES],
                    .index = k % DEDUP_SEGMENT_PAGES,
                };
                k++;
            }
        }
    }
    g_free(holding_of);
    *nactions = n;
    return actions;
}

/* The first half of the merged pages is read, the other half written to. */
static void first_access(BenchRam *ram, BenchAfter *after)
{
    volatile uint8_t *host = ram->host; /* each access is the point */
    size_t half = ram->copy_pages * ram->copies / 2, n = 0;
    double start = clock_ns(CLOCK_THREAD_CPUTIME_ID);

    for (size_t i = 0; i < half; i++) {
        if (bench_ram_is_equal(ram, i)) {
            (void)host[i * BENCH_PAGE];
            n++;
        }
    }
    after->first_read_ns = (clock_ns(CLOCK_THREAD_CPUTIME_ID) - start) / n;
    start = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    n = 0;
    for (size_t i = half; i < ram->pages; i++) {
        if (bench_ram_is_equal(ram, i)) {
            host[i * BENCH_PAGE] ^= 1;
            n++;
        }
    }
    after->first_write_ns = (clock_ns(CLOCK_THREAD_CPUTIME_ID) - start) / n;
    for (size_t i = half; i < ram->pages; i++) {
        if (bench_ram_is_equal(ram, i)) {
            host[i * BENCH_PAGE] ^= 1;
        }
    }
}

void bench_engine_windows(BenchRam *ram, BenchCost *cost, BenchAfter *after,
                          double *longest_ns)
{
    Scanner *s = scanner_new(ram);
    unsigned limits = 0;
    size_t n, done = 0;
    uint64_t hashes = 0;
    DedupAction *actions = prepare(s, ram, &n);
    DedupStats stats;

    memset(cost, 0, sizeof(*cost));
    /*
     * As the scanner does: what one chunk found, when it has just been
     * hashed.  Hashing is not counted here; it is part of the scan.
     */
    for (size_t i = 0, j; i < n; i = j) {
        uint32_t chunk = actions[i].page / DEDUP_CHUNK_PAGES;
        double cpu, wall;

        for (j = i; j < n && actions[j].page / DEDUP_CHUNK_PAGES == chunk;
             j++) {
            hashes ^= dedup_page_hash(dedup_region_addr(s->r,
                                                        actions[j].page), 0);
        }
        cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
        wall = clock_ns(CLOCK_MONOTONIC);
        done += dedup_space_windows(s->r, actions + i, j - i, &limits);
        cost->cpu_ns += clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;
        cost->wall_ns += clock_ns(CLOCK_MONOTONIC) - wall;
    }
    cost->pages = done;
    if (done != n || hashes == 1 /* keeps the loop */) {
        die("not every page was merged");
    }
    dedup_engine_get_stats(s->e, &stats, true);
    *longest_ns = stats.window_max_ns;
    if (after) {
        first_access(ram, after);
    }
    if (!bench_ram_verify(ram)) {
        die("wrong bytes after a merge");
    }
    g_free(actions);
    scanner_free(s);
}

/* ---- from end to end ---- */

void bench_engine_merge(BenchRam *ram, BenchCost *cost,
                        BenchCost *restore_cost)
{
    g_autoptr(GError) error = NULL;
    Scanner *s = scanner_new(ram);
    size_t goal = bench_ram_goal(ram);
    DedupStats from = { 0 }, to;
    double wall_from, wall_to;

    wall_from = clock_ns(CLOCK_MONOTONIC);
    scanner_start(s);
    for (unsigned i = 0; i < MAX_POLLS; i++) {
        g_usleep(POLL_US);
        snapshot(s, &to, &wall_to);
        if (to.pages_merged >= goal) {
            break;
        }
    }
    if (to.pages_merged < goal) {
        fprintf(stderr, "%" G_GUINT64_FORMAT " of %zu pages, limits %u\n",
                to.pages_merged, goal, to.limits);
        die("not every page was merged");
    }
    /* the copies in segments are not saved */
    take(cost, (double)to.pages_merged * (ram->copies - 1) / ram->copies,
         &from, &to, wall_from, wall_to);
    if (!bench_ram_verify(ram)) {
        die("wrong bytes after a merge");
    }

    snapshot(s, &from, &wall_from);
    if (!dedup_engine_restore(s->e, true, true, &error)) {
        die(error->message);
    }
    g_mutex_lock(&s->lock);
    while (!s->restored) {
        g_cond_wait(&s->cond, &s->lock);
    }
    g_mutex_unlock(&s->lock);
    snapshot(s, &to, &wall_to);
    take(restore_cost, from.pages_merged, &from, &to, wall_from, wall_to);
    if (!dedup_engine_is_whole(s->e) || !bench_ram_verify(ram)) {
        die("wrong bytes after restoring");
    }
    scanner_free(s);
}

void bench_engine_scan(BenchRam *ram, BenchCost *cost)
{
    Scanner *s = scanner_new(ram);
    DedupStats from = { 0 }, to;
    double wall_from = 0, wall_to;

    scanner_start(s);
    for (unsigned i = 0; i < MAX_POLLS; i++) {
        g_usleep(POLL_US);
        snapshot(s, &to, &wall_to);
        if (!from.full_scans && to.full_scans >= SCANS_BEFORE) {
            from = to;
            wall_from = wall_to;
        }
        if (from.full_scans && to.full_scans >= from.full_scans + SCANS) {
            break;
        }
    }
    if (to.full_scans < from.full_scans + SCANS) {
        die("the scan did not come to an end");
    }
    take(cost, to.pages_scanned - from.pages_scanned, &from, &to, wall_from,
         wall_to);
    scanner_free(s);
}

/* ---- the index ---- */

/* Number @i of a sequence of hashes: splitmix64. */
static uint64_t hash_of(uint64_t i)
{
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ULL;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return z ^ z >> 31;
}

/* Look up hashes [first, first + n) in an order that the cache dislikes. */
static double lookups(DedupIndex *index, uint64_t first, uint64_t n,
                      uint64_t *found)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    double start = clock_ns(CLOCK_THREAD_CPUTIME_ID);

    *found = 0;
    for (uint64_t i = 0; i < n; i++) {
        *found += dedup_index_lookup(index, hash_of(first + i), hits) > 0;
    }
    return (clock_ns(CLOCK_THREAD_CPUTIME_ID) - start) / n;
}

void bench_engine_index(uint64_t entries, double *hit_ns, double *miss_ns)
{
    size_t size = BENCH_PAGE + dedup_index_table_size();
    int fd = memfd_create("bench-index", MFD_CLOEXEC);
    uint64_t found;
    DedupIndex *index;
    uint8_t *map;

    if (fd < 0 || ftruncate(fd, size) < 0) {
        die("no memory for an index");
    }
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
               fd, 0);
    if (map == MAP_FAILED) {
        die("no memory for an index");
    }
    index = dedup_index_new((void *)map, map + BENCH_PAGE, fd, BENCH_PAGE);
    for (uint64_t i = 0; i < entries; i++) {
        DedupHint hint = {
            .kind = DEDUP_HINT_CANDIDATE, .where = 1, .page = i,
        };

        dedup_index_insert(index, hash_of(i), &hint);
    }
    *hit_ns = lookups(index, 0, entries, &found);
    if (found < entries / 10 * 9) {
        die("the index lost what was entered");
    }
    *miss_ns = lookups(index, entries, entries, &found);
    dedup_index_free(index);
    munmap(map, size);
    close(fd);
}
