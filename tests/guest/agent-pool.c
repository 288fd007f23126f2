/*
 * Guest agent: memory that is worth merging, and figures of who checks it
 *
 * Copyright (c) 2026 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
#include "agent-pool.h"

#define POOL_SEED 0xb0a7ull
/* Touched in this step, neighbours lie apart in the guest's memory. */
#define STRIDE 17

static uint8_t contents[POOL_CONTENTS][PG_SIZE];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_contents(void)
{
    for (int i = 0; i < POOL_CONTENTS; i++) {
        pg_fill(contents[i], pg_key(POOL_SEED, i));
    }
}

const uint8_t *pool_bytes(uint64_t offset)
{
    return contents[offset / PG_SIZE % POOL_CONTENTS] + offset % PG_SIZE;
}

const uint8_t *pool_granule(uint16_t tag)
{
    return contents[tag / POOL_GRANULES] + tag % POOL_GRANULES * POOL_GRANULE;
}

void pool_fill(Pool *pool, uint64_t offset, uint64_t size)
{
    uint64_t end = offset + size;

    while (offset < end) {
        uint64_t n = PG_SIZE - offset % PG_SIZE;

        n = n > end - offset ? end - offset : n;
        memcpy(pool->mem + offset, pool_bytes(offset), n);
        offset += n;
    }
}

void pool_check(const Pool *pool, uint64_t start, uint64_t end, Figures *f)
{
    while (start < end) {
        uint64_t n = PG_SIZE - start % PG_SIZE;

        n = n > end - start ? end - start : n;
        if (memcmp(pool->mem + start, pool_bytes(start), n)) {
            figures_bad(f, pool->mem + start, pool_bytes(start), n, "pool",
                        start);
        }
        start += n;
    }
}

static int pool_map(Pool *pool, uint64_t pages, int scatter)
{
    pthread_once(&once, make_contents);
    pool->size = pages * PG_SIZE;
    pool->mem = mmap(NULL, pool->size, PROT_READ | PROT_WRITE,
                     pool->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED,
                     pool->fd, 0);
    if (pool->mem == MAP_FAILED) {
        return -1;
    }
    if (scatter) {
        madvise(pool->mem, pool->size, MADV_NOHUGEPAGE);
        for (uint64_t i = 0; i < STRIDE; i++) {
            for (uint64_t page = i; page < pages; page += STRIDE) {
                pool->mem[page * PG_SIZE] = 1;
            }
        }
    }
    pool_fill(pool, 0, pool->size);
    return 0;
}

int pool_new(Pool *pool, uint64_t pages, int scatter)
{
    pool->fd = -1;
    return pool_map(pool, pages, scatter);
}

int pool_new_file(Pool *pool, uint64_t pages)
{
    pool->fd = memfd_create("pool", MFD_CLOEXEC);
    if (pool->fd < 0 || ftruncate(pool->fd, pages * PG_SIZE)) {
        return -1;
    }
    return pool_map(pool, pages, 0);
}

void pool_free(Pool *pool)
{
    munmap(pool->mem, pool->size);
    if (pool->fd >= 0) {
        close(pool->fd);
    }
}

void figures_bad(Figures *f, const uint8_t *got, const uint8_t *want,
                 uint64_t size, const char *what, uint64_t where)
{
    uint64_t bad = 0, at = 0;

    for (uint64_t i = 0; i < size; i++) {
        if (got[i] != want[i] && bad++ == 0) {
            at = i;
        }
    }
    pthread_mutex_lock(&f->lock);
    if (!f->first[0]) {
        uint64_t have, need;

        memcpy(&have, got + at / 8 * 8, 8);
        memcpy(&need, want + at / 8 * 8, 8);
        snprintf(f->first, sizeof(f->first),
                 "%s: offset %llu: %016llx instead of %016llx, %llu bytes",
                 what, (unsigned long long)(where + at),
                 (unsigned long long)have, (unsigned long long)need,
                 (unsigned long long)bad);
    }
    f->bad += bad;
    pthread_mutex_unlock(&f->lock);
}

void figures_error(Figures *f, const char *format, ...)
{
    va_list ap;

    pthread_mutex_lock(&f->lock);
    if (!f->first[0]) {
        va_start(ap, format);
        vsnprintf(f->first, sizeof(f->first), format, ap);
        va_end(ap);
    }
    f->err++;
    pthread_mutex_unlock(&f->lock);
}

void figures_report(Figures *f, char *text, size_t size)
{
    pthread_mutex_lock(&f->lock);
    snprintf(text, size, "bad=%llu err=%llu %s", (unsigned long long)f->bad,
             (unsigned long long)f->err, f->first);
    pthread_mutex_unlock(&f->lock);
}
