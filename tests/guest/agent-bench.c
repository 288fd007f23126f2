/*
 * Guest agent: requests as fast as they go, nothing is compared
 *
 * For benchmarks; what is right is checked by agent-io.c.
 *
 * Threads: one for each request that is under way; the main thread waits.
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"
#include "agent-pool.h"

#define MAX_DEPTH 64

static struct {
    int fd, write, failed;
    uint64_t size, blocks;
    int64_t left;
} bench;

typedef struct Runner {
    pthread_t thread;
    uint64_t random;
    uint8_t *mem;
} Runner;

static void *run_thread(void *opaque)
{
    Runner *r = opaque;

    while (__atomic_fetch_sub(&bench.left, 1, __ATOMIC_RELAXED) > 0) {
        off_t at = agent_random(&r->random) % bench.blocks * bench.size;
        ssize_t n = bench.write ? pwrite(bench.fd, r->mem, bench.size, at) :
            pread(bench.fd, r->mem, bench.size, at);

        if (n != (ssize_t)bench.size) {
            __atomic_store_n(&bench.failed, 1, __ATOMIC_RELAXED);
            break;
        }
    }
    return NULL;
}

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

/* bench PATH read|write SIZE DEPTH COUNT MIB: within the first MIB of PATH */
int bench_run(int argc, char **argv, char *reply)
{
    static Runner runner[MAX_DEPTH];
    uint64_t depth, count, mib, start;

    if (argc != 7 || agent_number(argv[3], &bench.size) || !bench.size ||
        agent_number(argv[4], &depth) || depth < 1 || depth > MAX_DEPTH ||
        agent_number(argv[5], &count) || agent_number(argv[6], &mib)) {
        strcpy(reply, "usage: bench PATH read|write SIZE DEPTH COUNT MIB");
        return -1;
    }
    bench.write = !strcmp(argv[2], "write");
    bench.blocks = (mib << 20) / bench.size;
    bench.left = count;
    bench.failed = 0;
    bench.fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (bench.fd < 0 || !bench.blocks) {
        snprintf(reply, AGENT_REPLY, "%s: %s", argv[1], strerror(errno));
        return -1;
    }
    for (unsigned i = 0; i < depth; i++) {
        if (!runner[i].mem) {
            runner[i].mem = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
                                 -1, 0);
            runner[i].random = pg_key(i, 1);
        }
    }
    start = now_us();
    for (unsigned i = 0; i < depth; i++) {
        if (pthread_create(&runner[i].thread, NULL, run_thread,
                           &runner[i])) {
            strcpy(reply, "no thread");
            return -1;
        }
    }
    for (unsigned i = 0; i < depth; i++) {
        pthread_join(runner[i].thread, NULL);
    }
    snprintf(reply, AGENT_REPLY, "us=%llu ops=%llu failed=%d",
             (unsigned long long)(now_us() - start),
             (unsigned long long)count, bench.failed);
    close(bench.fd);
    return 0;
}

/* bench-meta DIR COUNT: that many files are made, asked about and removed */
int bench_meta(int argc, char **argv, char *reply)
{
    uint64_t count, start = now_us();
    struct stat st;
    char path[256];
    int failed = 0;

    if (argc != 3 || agent_number(argv[2], &count)) {
        strcpy(reply, "usage: bench-meta DIR COUNT");
        return -1;
    }
    for (uint64_t i = 0; i < count; i++) {
        int fd;

        snprintf(path, sizeof(path), "%.200s/bench%llu", argv[1],
                 (unsigned long long)i);
        fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
        failed |= fd < 0;
        close(fd);
        failed |= stat(path, &st);
        failed |= unlink(path);
    }
    snprintf(reply, AGENT_REPLY, "us=%llu ops=%llu failed=%d",
             (unsigned long long)(now_us() - start),
             (unsigned long long)count * 3, !!failed);
    return 0;
}
