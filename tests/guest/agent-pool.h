/*
 * Guest agent: memory that is worth merging, and figures of who checks it
 *
 * A pool is memory whose page i holds content i % POOL_CONTENTS, one of few
 * that are the same in every pool of every guest.  Who has read something into
 * it puts that back.
 *
 * Copyright (c) 2026 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_GUEST_AGENT_POOL_H
#define TESTS_GUEST_AGENT_POOL_H

#include <pthread.h>
#include <stdint.h>
#include "pagegen.h"

#define POOL_CONTENTS 32
/* The unit in which a place of a pool can be named by a tag. */
#define POOL_GRANULE 64
#define POOL_GRANULES (PG_SIZE / POOL_GRANULE)

typedef struct Pool {
    uint8_t *mem;
    uint64_t size;
    int fd;                     /* of the file that it is, or -1 */
} Pool;

/* What a job has found; any thread. */
typedef struct Figures {
    pthread_mutex_t lock;
    uint64_t bad;               /* wrong bytes */
    uint64_t err;               /* calls that failed */
    char first[300];            /* the first of either */
} Figures;

/* A new pool; @scatter: of pages that need not lie beside each other. */
int pool_new(Pool *pool, uint64_t pages, int scatter);
/* One that is a file, to be sent from. */
int pool_new_file(Pool *pool, uint64_t pages);
void pool_free(Pool *pool);

/* Put back what each page of the range holds. */
void pool_fill(Pool *pool, uint64_t offset, uint64_t size);
/* Every byte from @start to @end (multiples of a granule) is right. */
void pool_check(const Pool *pool, uint64_t start, uint64_t end, Figures *f);
/* Byte @offset of any pool; valid to the end of its page. */
const uint8_t *pool_bytes(uint64_t offset);

static inline uint16_t pool_tag(uint64_t offset)
{
    return offset / PG_SIZE % POOL_CONTENTS * POOL_GRANULES +
        offset % PG_SIZE / POOL_GRANULE;
}

/* The granule that a tag names. */
const uint8_t *pool_granule(uint16_t tag);

/* Count the bytes in which @got differs from @want. */
void figures_bad(Figures *f, const uint8_t *got, const uint8_t *want,
                 uint64_t size, const char *what, uint64_t where);
void figures_error(Figures *f, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void figures_report(Figures *f, char *text, size_t size);

#endif
