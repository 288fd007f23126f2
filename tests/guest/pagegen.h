/*
 * Page contents that both sides of a guest test can compute
 *
 * A page's contents are a function of one 64-bit number, its key: the guest
 * agent fills and checks its memory with it, and the host writes disk images
 * with it.  Key 0 is the zero page.  Every byte of a page takes part, so that
 * a check sees a wrong byte anywhere.
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_GUEST_PAGEGEN_H
#define TESTS_GUEST_PAGEGEN_H

#include <stdint.h>
#include <stddef.h>
#include <string.h>

#define PG_SIZE 4096
#define PG_WORDS (PG_SIZE / sizeof(uint64_t))

/* volatile: a page may change behind the compiler's back, and is compared. */
typedef volatile uint64_t PgWord;

/* Mix two numbers into a key; never 0, which stands for the zero page. */
static inline uint64_t pg_key(uint64_t a, uint64_t b)
{
    uint64_t x = a * 0x9e3779b97f4a7c15ull + b + 0x632be59bd9b4e019ull;

    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    x ^= x >> 31;
    return x ? x : 1;
}

static inline uint64_t pg_next(uint64_t x)
{
    return x * 6364136223846793005ull + 1442695040888963407ull;
}

/* Fill one page with the contents of @key. */
static inline void pg_fill(void *page, uint64_t key)
{
    PgWord *w = page;
    uint64_t x = key;
    size_t i;

    for (i = 0; i < PG_WORDS; i++) {
        w[i] = x;
        x = key ? pg_next(x) : 0;
    }
}

/* Return the offset of the first wrong word of a page, or -1. */
static inline long pg_check(const void *page, uint64_t key)
{
    const PgWord *w = page;
    uint64_t x = key;
    size_t i;

    for (i = 0; i < PG_WORDS; i++) {
        if (w[i] != x) {
            return i * sizeof(uint64_t);
        }
        x = key ? pg_next(x) : 0;
    }
    return -1;
}

/* Key of block @b of a test disk that has @distinct different blocks. */
static inline uint64_t pg_disk_key(uint64_t seed, uint64_t b,
                                   uint64_t distinct)
{
    return pg_key(seed ^ 0xd15cull, b % distinct);
}

#endif
