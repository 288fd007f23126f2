/*
 * Guest agent: O_DIRECT reads into pages that are worth merging
 *
 * The device writes into guest pages without a page fault of the guest, and
 * often without one of the host (the host's own read has pinned the page).  A
 * merge that replaces a page while such a read is in flight loses what was
 * read.  To give that the best chance to happen and to be seen:
 *
 * - each worker fills its buffers with one common content, of which there are
 *   other copies, so that they are candidates for a merge at once;
 * - it then reads disk blocks into them in random order.  A buffer waits, with
 *   the common content, while reads into its neighbours are in flight; and
 *   while its own read is in flight it still holds the common content;
 * - now and then it waits a little before a round, so that rounds and the
 *   passes of the scanner do not fall into step;
 * - after a round every byte of every buffer is compared with what the disk
 *   is known to hold (pg_disk_key()); a lost read shows as common content.
 *
 * Threads: one per worker, which owns its buffers; figures are atomics.
 *
 * Copyright (c) 2025 The qemu-dedup developers
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
#include "pagegen.h"

#define MAX_WORKERS 16
#define COMMON_SEED 0xc0ffeeull
/* Different contents in a row within the common content. */
#define COMMON_PAGES 4

typedef struct Worker {
    pthread_t thread;
    uint64_t random;
    uint8_t *mem;
    uint64_t *block;            /* first disk block in each buffer */
    uint32_t *order;
} Worker;

static struct {
    int fd;
    uint64_t seed, distinct, blocks;
    uint64_t workers, buffers, pages;
    int running, stop;
    uint64_t reads, rounds, errors, lost;
    pthread_mutex_t lock;       /* of first */
    char first[160];
    Worker worker[MAX_WORKERS];
} dio = { .fd = -1, .lock = PTHREAD_MUTEX_INITIALIZER };

static uint64_t common_key(uint64_t page)
{
    return pg_key(COMMON_SEED, page % COMMON_PAGES);
}

static void report(const char *what, uint64_t block, long offset, int lost)
{
    pthread_mutex_lock(&dio.lock);
    if (dio.errors == 0) {
        snprintf(dio.first, sizeof(dio.first), "%s block=%llu offset=%ld%s",
                 what, (unsigned long long)block, offset,
                 lost ? " holds-common" : "");
    }
    __atomic_add_fetch(&dio.errors, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&dio.lost, lost, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&dio.lock);
}

static uint8_t *buffer_of(Worker *w, uint64_t b)
{
    return w->mem + b * dio.pages * PG_SIZE;
}

static void fill_common(Worker *w)
{
    for (uint64_t i = 0; i < dio.buffers * dio.pages; i++) {
        pg_fill(w->mem + i * PG_SIZE, common_key(i));
    }
}

static void shuffle(Worker *w)
{
    for (uint32_t i = dio.buffers - 1; i > 0; i--) {
        uint32_t j = agent_random(&w->random) % (i + 1);
        uint32_t t = w->order[i];

        w->order[i] = w->order[j];
        w->order[j] = t;
    }
}

static void read_all(Worker *w)
{
    size_t size = dio.pages * PG_SIZE;

    for (uint32_t i = 0; i < dio.buffers; i++) {
        uint32_t b = w->order[i];
        ssize_t got;

        w->block[b] = agent_random(&w->random) % (dio.blocks - dio.pages + 1);
        got = pread(dio.fd, buffer_of(w, b), size, w->block[b] * PG_SIZE);
        if (got != (ssize_t)size) {
            report(got < 0 ? strerror(errno) : "short read", w->block[b], got,
                   0);
        }
        __atomic_add_fetch(&dio.reads, 1, __ATOMIC_RELAXED);
    }
}

static void check_all(Worker *w)
{
    for (uint64_t b = 0; b < dio.buffers; b++) {
        for (uint64_t i = 0; i < dio.pages; i++) {
            uint8_t *page = buffer_of(w, b) + i * PG_SIZE;
            uint64_t block = w->block[b] + i;
            long bad = pg_check(page, pg_disk_key(dio.seed, block,
                                                  dio.distinct));

            if (bad >= 0) {
                uint64_t common = common_key(b * dio.pages + i);

                report("wrong", block, bad, pg_check(page, common) < 0);
            }
        }
    }
}

static void *worker_thread(void *opaque)
{
    Worker *w = opaque;

    while (!__atomic_load_n(&dio.stop, __ATOMIC_RELAXED)) {
        struct timespec pause = { 0, 0 };

        fill_common(w);
        shuffle(w);
        pause.tv_nsec = agent_random(&w->random) % 4 * 3000000;
        nanosleep(&pause, NULL);
        read_all(w);
        check_all(w);
        __atomic_add_fetch(&dio.rounds, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static int worker_start(Worker *w, unsigned i)
{
    size_t size = dio.buffers * dio.pages * PG_SIZE;

    w->random = pg_key(i, agent_vm_id);
    w->block = calloc(dio.buffers, sizeof(*w->block));
    w->order = calloc(dio.buffers, sizeof(*w->order));
    w->mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!w->block || !w->order || w->mem == MAP_FAILED) {
        return -1;
    }
    for (uint32_t b = 0; b < dio.buffers; b++) {
        w->order[b] = b;
    }
    return pthread_create(&w->thread, NULL, worker_thread, w) ? -1 : 0;
}

/* dio-start PATH SEED DISTINCT BLOCKS WORKERS BUFFERS PAGES */
int dio_start(int argc, char **argv, char *reply)
{
    uint64_t *const number[] = {
        &dio.seed, &dio.distinct, &dio.blocks, &dio.workers, &dio.buffers,
        &dio.pages,
    };

    if (argc != 8 || dio.running) {
        strcpy(reply, "usage: dio-start PATH SEED DISTINCT BLOCKS WORKERS "
               "BUFFERS PAGES, once");
        return -1;
    }
    for (int i = 0; i < 6; i++) {
        if (agent_number(argv[i + 2], number[i]) || !*number[i]) {
            snprintf(reply, AGENT_REPLY, "bad number %s", argv[i + 2]);
            return -1;
        }
    }
    if (dio.workers > MAX_WORKERS || dio.blocks < dio.pages) {
        strcpy(reply, "out of range");
        return -1;
    }
    dio.fd = open(argv[1], O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (dio.fd < 0) {
        snprintf(reply, AGENT_REPLY, "%s: %s", argv[1], strerror(errno));
        return -1;
    }
    dio.stop = 0;
    for (unsigned i = 0; i < dio.workers; i++) {
        if (worker_start(&dio.worker[i], i)) {
            /* Those that run go on until "dio-stop"; there are none beyond. */
            dio.workers = i;
            dio.running = 1;
            strcpy(reply, "out of memory");
            return -1;
        }
    }
    dio.running = 1;
    return 0;
}

int dio_stat(int argc, char **argv, char *reply)
{
    pthread_mutex_lock(&dio.lock);
    snprintf(reply, AGENT_REPLY,
             "running=%d rounds=%llu reads=%llu errors=%llu lost=%llu %s",
             dio.running,
             (unsigned long long)__atomic_load_n(&dio.rounds,
                                                 __ATOMIC_RELAXED),
             (unsigned long long)__atomic_load_n(&dio.reads, __ATOMIC_RELAXED),
             (unsigned long long)dio.errors, (unsigned long long)dio.lost,
             dio.first);
    pthread_mutex_unlock(&dio.lock);
    return 0;
}

int dio_stop(int argc, char **argv, char *reply)
{
    if (dio.running) {
        __atomic_store_n(&dio.stop, 1, __ATOMIC_RELAXED);
        for (unsigned i = 0; i < dio.workers; i++) {
            Worker *w = &dio.worker[i];

            pthread_join(w->thread, NULL);
            munmap(w->mem, dio.buffers * dio.pages * PG_SIZE);
            free(w->block);
            free(w->order);
        }
        close(dio.fd);
        dio.running = 0;
    }
    return dio_stat(argc, argv, reply);
}
