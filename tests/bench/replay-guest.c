/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A process with the RAM of a guest; see replay-guest.h.
 */

#include <fcntl.h>
#include <glib.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "replay-guest.h"

#define PAGE ((size_t)4096)
#define ALIGN ((size_t)2 << 20)
/* One page in so many is written to, through the merge, before all is read. */
#define WRITE_EVERY 7
/* The writer's pages: runs of 16, one in so many; and its pause. */
#define HOT_EVERY 320
#define HOT_RUN 16
#define HOT_PAUSE_US 50
#define HOT_BURST 64
#define ROUND_PAUSE_US 5000

static void die(const char *what)
{
    perror(what);
    exit(2);
}

/* ---- in the process ---- */

typedef struct Ram {
    uint8_t *host;
    uint8_t *image;           /* what should be there */
    size_t size;
    int fd;                   /* of the RAM; -1: anonymous */
    int image_fd;
    uint64_t present;
} Ram;

/* Data of the image from @at on, [*start, *end); false: there is no more. */
static bool next_data(const Ram *ram, off_t at, off_t *start, off_t *end)
{
    *start = lseek(ram->image_fd, at, SEEK_DATA);
    if (*start < 0) {
        return false;
    }
    *end = lseek(ram->image_fd, *start, SEEK_HOLE);
    return true;
}

static void load(Ram *ram, const ReplayConfig *config)
{
    struct stat st;
    uint8_t *place;

    ram->image_fd = open(config->image, O_RDONLY | O_CLOEXEC);
    if (ram->image_fd < 0 || fstat(ram->image_fd, &st) < 0) {
        die(config->image);
    }
    ram->size = st.st_size;
    ram->fd = -1;
    if (config->memory == REPLAY_MEMFD) {
        ram->fd = memfd_create("replay-ram", MFD_CLOEXEC);
        if (ram->fd < 0 || ftruncate(ram->fd, ram->size) < 0) {
            die("memfd");
        }
    }
    place = mmap(NULL, ram->size + ALIGN, PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ram->host = mmap((uint8_t *)(((uintptr_t)place + ALIGN - 1) & -ALIGN),
                     ram->size, PROT_READ | PROT_WRITE, MAP_FIXED |
                     (ram->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED),
                     ram->fd, 0);
    ram->image = mmap(NULL, ram->size, PROT_READ, MAP_SHARED, ram->image_fd,
                      0);
    if (ram->host == MAP_FAILED || ram->image == MAP_FAILED) {
        die("mmap");
    }
    madvise(ram->host, ram->size, MADV_HUGEPAGE);
    madvise(ram->host, ram->size, MADV_DONTFORK);
    for (off_t start, end = 0; next_data(ram, end, &start, &end);) {
        for (off_t at = start; at < end;) {
            ssize_t n = pread(ram->image_fd, ram->host + at, end - at, at);

            if (n <= 0) {
                die("reading the image");
            }
            at += n;
        }
        ram->present += (end - start) / PAGE;
    }
}

static uint64_t compare(const Ram *ram, const bool *flipped)
{
    uint64_t bad = 0;

    for (off_t start, end = 0; next_data(ram, end, &start, &end);) {
        for (off_t at = start; at < end; at += PAGE) {
            const uint8_t *host = ram->host + at;
            const uint8_t *image = ram->image + at;

            if (flipped[at / PAGE]) {
                bad += host[0] != (image[0] ^ 0xff);
                bad += memcmp(host + 1, image + 1, PAGE - 1) != 0;
            } else {
                bad += memcmp(host, image, PAGE) != 0;
            }
        }
    }
    return bad;
}

/* All bytes as they are; then some are written to, and all looked at again. */
static uint64_t verify(const Ram *ram)
{
    g_autofree bool *flipped = g_new0(bool, ram->size / PAGE);
    uint64_t bad = compare(ram, flipped);

    for (off_t start, end = 0; next_data(ram, end, &start, &end);) {
        for (off_t at = start; at < end; at += WRITE_EVERY * PAGE) {
            ram->host[at] ^= 0xff;
            flipped[at / PAGE] = true;
        }
    }
    return bad + compare(ram, flipped);
}

/*
 * ---- a thread that stores ----
 *
 * It stores what is there already: no byte changes, but whoever replaces the
 * page has to cope with a store.
 */

/* Stores by how long they took: a bucket for each us. */
#define BUCKETS 100000

typedef struct Writer {
    Ram *ram;
    ReplayWrites writes;
    uint64_t counts_from_ns;
    GThread *thread;
    int stop;                 /* atomic */
    uint64_t stores;
    uint64_t most_ns;
    uint32_t bucket[BUCKETS];
} Writer;

static uint64_t clock_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

static void store(Writer *w, off_t at)
{
    /* volatile: the store is the point */
    volatile uint8_t *byte = w->ram->host + at;
    uint8_t value = *byte;
    uint64_t start = clock_ns(), ns;

    *byte = value;
    ns = clock_ns() - start;
    if (start < w->counts_from_ns) {
        return;
    }
    w->bucket[MIN(ns / 1000, BUCKETS - 1)]++;
    w->most_ns = MAX(w->most_ns, ns);
    w->stores++;
}

static gpointer writer_run(gpointer opaque)
{
    Writer *w = opaque;
    uint64_t n = 0;

    while (!g_atomic_int_get(&w->stop)) {
        for (off_t start, end = 0; next_data(w->ram, end, &start, &end);) {
            for (off_t at = start; at < end; at += PAGE) {
                if (w->writes != REPLAY_ROUNDS &&
                    at / PAGE % HOT_EVERY >= HOT_RUN) {
                    continue;
                }
                store(w, at);
                if (w->writes == REPLAY_BURSTS && ++n % HOT_BURST == 0) {
                    g_usleep(HOT_PAUSE_US);
                }
            }
        }
        if (w->writes == REPLAY_ROUNDS) {
            g_usleep(ROUND_PAUSE_US);
        }
    }
    return NULL;
}

/* All but one store of @of take less, in ns. */
static uint64_t most_of(const Writer *w, uint64_t of)
{
    uint64_t above = 0;
    unsigned i = BUCKETS;

    while (i > 0 && above * of <= w->stores) {
        above += w->bucket[--i];
    }
    return (i + 1) * 1000ULL;
}

static void writer_end(Writer *w, ReplayResult *result)
{
    g_atomic_int_set(&w->stop, 1);
    g_thread_join(w->thread);
    result->p99_ns = most_of(w, 100);
    result->p999_ns = most_of(w, 1000);
    result->stores = w->stores;
    result->most_ns = w->most_ns;
}

typedef struct Scanner {
    DedupEngine *e;
    GThread *thread;
} Scanner;

static gpointer scanner_run(gpointer opaque)
{
    dedup_engine_run(opaque);
    return NULL;
}

/* It has the part [start, end) of the RAM. */
static void scanner_start(Scanner *s, const Ram *ram, size_t start, size_t end,
                          const ReplayConfig *config)
{
    g_autoptr(GError) error = NULL;
    DedupConfig engine = {
        .page_size = PAGE,
        .group_dir = config->group,
        .freeze = config->by_mprotect ? DEDUP_FREEZE_MPROTECT
                                      : DEDUP_FREEZE_USERFAULTFD,
        .params = {
            .run = true, .zero_pages = true, .huge_pages_split = true,
            .max_maps = 90,
            .advisor = DEDUP_ADVISOR_SCAN_TIME, .target_scan_s = 200,
            .max_cpu = config->max_cpu ? config->max_cpu
                       : config->defaults ? 70 : 0,
            .max_pages = 30000,
            .pages_to_scan = 4096, .sleep_millisecs = 20,
        },
    };
    DedupRegionInfo info = {
        .id = "ram", .host = ram->host + start, .size = end - start,
        .fd = ram->fd, .fd_offset = start,
        .memory = ram->fd < 0 ? DEDUP_MEMORY_ANON : DEDUP_MEMORY_SHARED,
        .flags = DEDUP_REGION_DONTFORK | DEDUP_REGION_HUGEPAGE,
    };

    s->e = dedup_engine_new(&engine, &error);
    if (!s->e || !dedup_region_add(s->e, &info, &error)) {
        fprintf(stderr, "bench-replay: %s\n", error->message);
        exit(2);
    }
    s->thread = g_thread_new("scanner", scanner_run, s->e);
}

static void scanner_end(Scanner *s, ReplayResult *result)
{
    DedupStats stats;

    dedup_engine_stop(s->e);
    g_thread_join(s->thread);
    dedup_engine_get_stats(s->e, &stats, false);
    result->scanned += stats.pages_scanned;
    result->scans += stats.full_scans;
    result->merged += stats.pages_merged;
    result->zero += stats.zero_pages;
    result->breaks += stats.cow_breaks;
    result->maps = MAX(result->maps, stats.maps_used);
    result->metadata += stats.metadata_bytes;
    result->window_max_ns = MAX(result->window_max_ns, stats.window_max_ns);
}

/* Where the part of engine @i of @n begins. */
static size_t part(const Ram *ram, unsigned i, unsigned n)
{
    return i == n ? ram->size : ram->size / n * i & -ALIGN;
}

static void wait_for(int fd)
{
    char byte;

    if (read(fd, &byte, 1) != 1) {
        exit(2); /* the parent is gone */
    }
}

static void say(int fd, const void *data, size_t size)
{
    if (write(fd, data, size) != (ssize_t)size) {
        exit(2);
    }
}

static void run(const ReplayConfig *config, int control, int answers)
{
    ReplayResult result = { 0 };
    g_autofree Writer *writer = g_new0(Writer, 1);
    Scanner scanner[REPLAY_MAX_ENGINES] = { 0 };
    unsigned engines = config->who == REPLAY_ENGINE ? MAX(config->engines, 1)
                                                    : 0;
    Ram ram = { 0 };

    if (config->cgroup) {
        bench_cgroup_enter(config->cgroup);
    }
    load(&ram, config);
    result.present = ram.present;
    say(answers, "", 1);
    wait_for(control);
    if (config->who == REPLAY_KSM) {
        madvise(ram.host, ram.size, MADV_MERGEABLE);
    }
    for (unsigned i = 0; i < engines; i++) {
        scanner_start(&scanner[i], &ram, part(&ram, i, engines),
                      part(&ram, i + 1, engines), config);
    }
    if (config->writes) {
        writer->ram = &ram;
        writer->writes = config->writes;
        writer->counts_from_ns = clock_ns() +
                                 config->after_s * 1000000000ULL;
        writer->thread = g_thread_new("writer", writer_run, writer);
    }
    say(answers, "", 1);
    wait_for(control);
    if (config->writes) {
        writer_end(writer, &result);
    }
    if (config->who == REPLAY_KSM) {
        madvise(ram.host, ram.size, MADV_UNMERGEABLE);
    }
    for (unsigned i = 0; i < engines; i++) {
        scanner_end(&scanner[i], &result);
    }
    result.bad = verify(&ram);
    say(answers, &result, sizeof(result));
}

/* ---- its parent ---- */

static void hear(ReplayGuest *g, void *data, size_t size)
{
    if (read(g->answers, data, size) != (ssize_t)size) {
        fprintf(stderr, "bench-replay: a process has failed\n");
        exit(2);
    }
}

void replay_guest_start(ReplayGuest *g, const ReplayConfig *config)
{
    int control[2], answers[2];
    char byte;

    if (pipe2(control, O_CLOEXEC) < 0 || pipe2(answers, O_CLOEXEC) < 0) {
        die("pipe");
    }
    fflush(NULL);
    g->pid = fork();
    if (g->pid < 0) {
        die("fork");
    }
    if (!g->pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(control[1]);
        close(answers[0]);
        run(config, control[0], answers[1]);
        _exit(0);
    }
    close(control[0]);
    close(answers[1]);
    g->control = control[1];
    g->answers = answers[0];
    clock_getcpuclockid(g->pid, &g->clock);
    hear(g, &byte, 1);
    bench_counters_open(&g->counters, g->pid);
}

void replay_guest_go(ReplayGuest *g)
{
    char byte;

    bench_counters_start(&g->counters);
    say(g->control, "", 1);
    hear(g, &byte, 1);
}

uint64_t replay_guest_cpu_ns(const ReplayGuest *g)
{
    struct timespec ts;

    clock_gettime(g->clock, &ts);
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

void replay_guest_end(ReplayGuest *g, ReplayResult *result)
{
    say(g->control, "", 1);
    hear(g, result, sizeof(*result));
    waitpid(g->pid, NULL, 0);
    close(g->control);
    close(g->answers);
    bench_counters_close(&g->counters);
}
