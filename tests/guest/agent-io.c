/*
 * Guest agent: a disk or a file, written from and read into merged pages
 *
 * Each worker owns a part of the target and a pool of memory that holds few
 * contents again and again, so that a scanner merges it.  It writes from
 * random places of its pool and reads into random places of it, sizes from one
 * unit to 1 MiB, in no order.  What the target must hold is kept beside it: a
 * tag for each granule of 64 bytes, which says where in the pool it came
 * from.  So every byte that is read is compared, what lies around it in the
 * pool is compared, and the pages that were read into get their common content
 * back, to be merged again.
 *
 * A write that fails leaves unknown what it covered: that is not compared
 * until it has been written again.  A job that was stopped keeps what it knows
 * and goes on by "io-resume", at the same target or what took its place.
 *
 * Threads: a worker has its own part, pool, tags and descriptor; the figures
 * are atomics, the description of the first fault has a lock.  Commands run on
 * the main thread.
 *
 * Copyright (c) 2026 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"
#include "agent-pool.h"

#define MAX_JOBS 8
#define MAX_WORKERS 16
#define MAX_REQUEST (1u << 20)
#define TAG_ZERO 0xffff         /* never written: zeros */
#define TAG_UNKNOWN 0xfffe      /* a write to it failed */
/* A worker with a page cache empties it every so many requests. */
#define FORGET_EVERY 16

typedef struct Job Job;

typedef struct Worker {
    Job *job;
    pthread_t thread;
    int fd, direct, running;
    uint64_t random;
    Pool pool;
    uint64_t start, size;       /* its part of the target */
    uint16_t *tag;
} Worker;

struct Job {
    char id[16];
    char path[128];
    uint64_t unit, workers;
    int stop, running;
    Figures f;
    uint64_t reads, writes, bytes, slow_ms;
    Worker worker[MAX_WORKERS];
};

static Job *jobs[MAX_JOBS];

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

static void took(Job *job, uint64_t since)
{
    uint64_t ms = now_ms() - since;
    uint64_t old = __atomic_load_n(&job->slow_ms, __ATOMIC_RELAXED);

    do {
        if (ms <= old) {
            return;
        }
    } while (!__atomic_compare_exchange_n(&job->slow_ms, &old, ms, 1,
                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

/* Compare @size bytes at @mem with what the part holds at @pos. */
static void check_bytes(Worker *w, const uint8_t *mem, uint64_t pos,
                        uint64_t size)
{
    static const uint8_t zeros[POOL_GRANULE];

    for (uint64_t i = 0; i < size; i += POOL_GRANULE) {
        uint16_t tag = w->tag[(pos + i) / POOL_GRANULE];
        const uint8_t *want = tag == TAG_ZERO ? zeros : pool_granule(tag);

        if (tag != TAG_UNKNOWN && memcmp(mem + i, want, POOL_GRANULE)) {
            figures_bad(&w->job->f, mem + i, want, POOL_GRANULE,
                        w->direct ? "direct read" : "read",
                        w->start + pos + i);
        }
    }
}

static int failed(Worker *w, const char *what, ssize_t got, uint64_t pos)
{
    struct timespec pause = { 0, 10000000 };
    int error = errno;

    figures_error(&w->job->f, "%s at %llu of %s: %s", what,
                  (unsigned long long)(w->start + pos), w->job->path,
                  got < 0 ? strerror(error) : "short");
    /* A device that is gone fails at once, for ever. */
    nanosleep(&pause, NULL);
    return -1;
}

static int do_read(Worker *w, uint64_t mem, uint64_t pos, uint64_t size)
{
    uint64_t since = now_ms();
    ssize_t got = pread(w->fd, w->pool.mem + mem, size, w->start + pos);

    took(w->job, since);
    if (got == (ssize_t)size) {
        check_bytes(w, w->pool.mem + mem, pos, size);
        pool_check(&w->pool, mem / PG_SIZE * PG_SIZE, mem, &w->job->f);
        pool_check(&w->pool, mem + size,
                   (mem + size + PG_SIZE - 1) / PG_SIZE * PG_SIZE,
                   &w->job->f);
        __atomic_add_fetch(&w->job->reads, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(&w->job->bytes, size, __ATOMIC_RELAXED);
    }
    pool_fill(&w->pool, mem, size);
    return got == (ssize_t)size ? 0 : failed(w, "read", got, pos);
}

static void do_write(Worker *w, uint64_t mem, uint64_t pos, uint64_t size)
{
    uint64_t since = now_ms();
    ssize_t got = pwrite(w->fd, w->pool.mem + mem, size, w->start + pos);
    int good = got == (ssize_t)size;

    took(w->job, since);
    for (uint64_t i = 0; i < size; i += POOL_GRANULE) {
        w->tag[(pos + i) / POOL_GRANULE] =
            good ? pool_tag(mem + i) : TAG_UNKNOWN;
    }
    if (!good) {
        failed(w, "write", got, pos);
        return;
    }
    __atomic_add_fetch(&w->job->writes, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&w->job->bytes, size, __ATOMIC_RELAXED);
}

/* Have what is in the page cache written, and read anew. */
static void forget(Worker *w)
{
    if (fdatasync(w->fd)) {
        /* Which of the writes is lost is not said. */
        for (uint64_t i = 0; i < w->size / POOL_GRANULE; i++) {
            w->tag[i] = TAG_UNKNOWN;
        }
        failed(w, "fdatasync", -1, 0);
    }
    posix_fadvise(w->fd, w->start, w->size, POSIX_FADV_DONTNEED);
}

static void *worker_thread(void *opaque)
{
    Worker *w = opaque;
    Job *job = w->job;

    for (unsigned n = 1; !__atomic_load_n(&job->stop, __ATOMIC_RELAXED); n++) {
        /* All orders of magnitude, small ones more often. */
        unsigned a = agent_random(&w->random) % 15;
        unsigned b = agent_random(&w->random) % 15;
        uint64_t most = MAX_REQUEST >> (a > b ? a : b);
        uint64_t units = most < job->unit ? 1 : most / job->unit;
        uint64_t size = (1 + agent_random(&w->random) % units) * job->unit;
        uint64_t mem, pos;

        mem = agent_random(&w->random) %
            ((w->pool.size - size) / job->unit + 1) * job->unit;
        pos = agent_random(&w->random) %
            ((w->size - size) / job->unit + 1) * job->unit;
        if (agent_random(&w->random) & 1) {
            do_read(w, mem, pos, size);
        } else {
            do_write(w, mem, pos, size);
        }
        if (!w->direct && n % FORGET_EVERY == 0) {
            forget(w);
        }
    }
    return NULL;
}

static Job *job_find(const char *id)
{
    for (int i = 0; i < MAX_JOBS; i++) {
        if (jobs[i] && !strcmp(jobs[i]->id, id)) {
            return jobs[i];
        }
    }
    return NULL;
}

static int worker_open(Worker *w)
{
    if (w->fd < 0) {
        w->fd = open(w->job->path, O_RDWR | O_CLOEXEC |
                     (w->direct ? O_DIRECT : 0));
    }
    return w->fd < 0 ? -1 : 0;
}

static int job_run(Job *job, char *reply)
{
    job->stop = 0;
    job->running = 1;
    for (unsigned i = 0; i < job->workers; i++) {
        Worker *w = &job->worker[i];

        if (worker_open(w) ||
            pthread_create(&w->thread, NULL, worker_thread, w)) {
            snprintf(reply, AGENT_REPLY, "%s: %s", job->path,
                     strerror(errno));
            return -1;
        }
        w->running = 1;
    }
    return 0;
}

static int worker_init(Job *job, unsigned i, uint64_t pool_pages, uint64_t mib,
                       const char *mode, int known)
{
    Worker *w = &job->worker[i];
    uint64_t granules;

    w->job = job;
    w->fd = -1;
    w->direct = !strcmp(mode, "direct") || (!strcmp(mode, "both") && i % 2);
    w->random = pg_key(pg_key(job->id[0], i), agent_vm_id);
    w->size = (mib << 20) / job->workers / PG_SIZE * PG_SIZE;
    w->start = i * w->size;
    granules = w->size / POOL_GRANULE;
    w->tag = malloc(granules * sizeof(*w->tag));
    /* Odd ones: pages that do not lie beside each other. */
    if (!w->tag || pool_new(&w->pool, pool_pages, i & 1)) {
        return -1;
    }
    for (uint64_t n = 0; n < granules; n++) {
        w->tag[n] = known ? TAG_ZERO : TAG_UNKNOWN;
    }
    return 0;
}

/*
 * io-start ID PATH MIB UNIT MODE WORKERS POOL_PAGES STATE
 * MODE: direct, buffered, both.  STATE: zero, unknown.
 */
int io_start(int argc, char **argv, char *reply)
{
    uint64_t mib, pool_pages;
    int slot = 0, known;
    Job *job;

    while (slot < MAX_JOBS && jobs[slot]) {
        slot++;
    }
    if (argc != 9 || job_find(argv[1]) || slot == MAX_JOBS) {
        strcpy(reply, "usage: io-start ID PATH MIB UNIT MODE WORKERS "
               "POOL_PAGES STATE");
        return -1;
    }
    job = calloc(1, sizeof(*job));
    snprintf(job->id, sizeof(job->id), "%s", argv[1]);
    snprintf(job->path, sizeof(job->path), "%s", argv[2]);
    pthread_mutex_init(&job->f.lock, NULL);
    known = !strcmp(argv[8], "zero");
    if (agent_number(argv[3], &mib) || agent_number(argv[4], &job->unit) ||
        agent_number(argv[6], &job->workers) ||
        agent_number(argv[7], &pool_pages) ||
        job->workers < 1 || job->workers > MAX_WORKERS ||
        job->unit % POOL_GRANULE || !job->unit ||
        pool_pages * PG_SIZE < 2 * MAX_REQUEST ||
        (mib << 20) / job->workers < 2 * MAX_REQUEST) {
        strcpy(reply, "out of range");
        free(job);
        return -1;
    }
    jobs[slot] = job;
    for (unsigned i = 0; i < job->workers; i++) {
        if (worker_init(job, i, pool_pages, mib, argv[5], known)) {
            strcpy(reply, "out of memory");
            return -1;
        }
    }
    return job_run(job, reply);
}

static int report(Job *job, char *reply)
{
    int used = snprintf(reply, AGENT_REPLY,
                        "running=%d ops=%llu reads=%llu writes=%llu kib=%llu "
                        "slow=%llu ", job->running,
                        (unsigned long long)(job->reads + job->writes),
                        (unsigned long long)job->reads,
                        (unsigned long long)job->writes,
                        (unsigned long long)job->bytes >> 10,
                        (unsigned long long)job->slow_ms);

    figures_report(&job->f, reply + used, AGENT_REPLY - used);
    return 0;
}

static void job_join(Job *job)
{
    __atomic_store_n(&job->stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < job->workers; i++) {
        Worker *w = &job->worker[i];

        if (w->running) {
            pthread_join(w->thread, NULL);
            w->running = 0;
        }
    }
    job->running = 0;
}

/* The whole part and the whole pool. */
static void verify(Worker *w)
{
    if (!w->direct) {
        forget(w);
    }
    pool_check(&w->pool, 0, w->pool.size, &w->job->f);
    for (uint64_t pos = 0; pos < w->size; pos += MAX_REQUEST / 4) {
        uint64_t size = w->size - pos;

        size = size > MAX_REQUEST / 4 ? MAX_REQUEST / 4 : size;
        if (do_read(w, agent_random(&w->random) % 64 * PG_SIZE, pos, size)) {
            return;
        }
    }
}

static Job *job_arg(int argc, char **argv, char *reply)
{
    Job *job = argc >= 2 ? job_find(argv[1]) : NULL;

    if (!job) {
        strcpy(reply, "no such job");
    }
    return job;
}

/*
 * io-halt ID: end the threads and close the target, compare nothing; what the
 * page cache cannot write any more is unknown
 */
int io_halt(int argc, char **argv, char *reply)
{
    Job *job = job_arg(argc, argv, reply);

    if (!job) {
        return -1;
    }
    job_join(job);
    for (unsigned i = 0; i < job->workers; i++) {
        Worker *w = &job->worker[i];

        if (w->fd >= 0) {
            if (!w->direct) {
                forget(w);
            }
            close(w->fd);
            w->fd = -1;
        }
    }
    return report(job, reply);
}

/* io-resume ID [PATH]: after io-halt */
int io_resume(int argc, char **argv, char *reply)
{
    Job *job = job_arg(argc, argv, reply);

    if (!job || job->running) {
        strcpy(reply, "no such job, or it runs");
        return -1;
    }
    if (argc > 2) {
        snprintf(job->path, sizeof(job->path), "%s", argv[2]);
    }
    return job_run(job, reply);
}

int io_stat(int argc, char **argv, char *reply)
{
    Job *job = job_arg(argc, argv, reply);

    return job ? report(job, reply) : -1;
}

/* io-stop ID: end it if it runs, and compare everything */
int io_stop(int argc, char **argv, char *reply)
{
    Job *job = job_arg(argc, argv, reply);

    if (!job) {
        return -1;
    }
    job_join(job);
    for (unsigned i = 0; i < job->workers; i++) {
        Worker *w = &job->worker[i];

        if (worker_open(w)) {
            figures_error(&job->f, "%s: %s", job->path, strerror(errno));
        } else {
            verify(w);
            close(w->fd);
        }
        pool_free(&w->pool);
        free(w->tag);
    }
    report(job, reply);
    for (int i = 0; i < MAX_JOBS; i++) {
        if (jobs[i] == job) {
            jobs[i] = NULL;
        }
    }
    free(job);
    return 0;
}
