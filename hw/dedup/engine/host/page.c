/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Reading the bytes of a page; see page.h.
 *
 * The guest's vCPUs may write to a page while it is read here, outside a
 * window on purpose.  To the C language that is a data race, to the machine
 * it is a read of some mix of old and new bytes: a hint that is wrong.  So
 * these functions, and only these, are compiled without sanitizers, call
 * XXH3 in its shared library (which is not instrumented) and have loops of
 * their own instead of memcmp() and memcpy(), whose interceptors would
 * complain.
 *
 * Each may come upon memory that is broken (reader.h), and says so.
 */

#ifdef DEDUP_XXHASH_DISPATCH
/* the same hash by the widest vectors that the processor has */
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "host/mutant.h"
#include "host/page.h"
#include "host/reader.h"
#include "host/sys.h"

#define PAGE_WORDS (DEDUP_PAGE_SIZE / sizeof(uint64_t))
#define BLOCK_WORDS 16

#ifdef CONFIG_DEDUP_MUTANTS
int dedup_mutant;
uint64_t dedup_hash_mask = UINT64_MAX;
bool dedup_never_rests;
unsigned dedup_mutant_delay_us;
void (*dedup_mutant_hook)(int stage);
int (*dedup_sys_hook)(DedupSysCall *call);
#endif

#define DEDUP_UNINSTRUMENTED \
    __attribute__((no_sanitize("thread", "address", "undefined"), noinline))
/* The part of such a function that reads. */
#define DEDUP_READS \
    __attribute__((no_sanitize("thread", "address", "undefined")))

DEDUP_UNINSTRUMENTED
uint64_t dedup_page_hash(const void *page, uint64_t salt)
{
    uint64_t hash;

    if (DEDUP_READ_FAILS()) {
        dedup_read_close();
        return DEDUP_UNREADABLE;
    }
    hash = XXH3_64bits_withSeed(page, DEDUP_PAGE_SIZE, salt);
    dedup_read_close();
#ifdef CONFIG_DEDUP_MUTANTS
    hash &= dedup_hash_mask;
#endif
    return hash != DEDUP_UNREADABLE ? hash : DEDUP_UNREADABLE + 1;
}

DEDUP_UNINSTRUMENTED
bool dedup_page_keyed_hash(const void *page, const uint8_t *secret,
                           DedupHash128 *hash)
{
    XXH128_hash_t h;

    if (DEDUP_READ_FAILS()) {
        dedup_read_close();
        return false;
    }
    h = XXH3_128bits_withSecret(page, DEDUP_PAGE_SIZE, secret,
                                DEDUP_SECRET_SIZE);
    dedup_read_close();
    *hash = (DedupHash128) { .low = h.low64, .high = h.high64 };
    return true;
}

DEDUP_READS
static bool differ(const uint64_t *x, const uint64_t *y)
{
    for (size_t i = 0; i < PAGE_WORDS; i += BLOCK_WORDS) {
        uint64_t diff = 0;

        for (size_t j = 0; j < BLOCK_WORDS; j++) {
            diff |= x[i + j] ^ y[i + j];
        }
        if (diff) {
            return true;
        }
    }
    return false;
}

DEDUP_UNINSTRUMENTED
bool dedup_page_equal(const void *a, const void *b)
{
    bool equal;

    if (DEDUP_READ_FAILS()) {
        dedup_read_close();
        return false;
    }
    equal = !differ(a, b);
    dedup_read_close();
    return equal;
}

DEDUP_READS
static bool has_any(const uint64_t *x)
{
    for (size_t i = 0; i < PAGE_WORDS; i += BLOCK_WORDS) {
        uint64_t any = 0;

        for (size_t j = 0; j < BLOCK_WORDS; j++) {
            any |= x[i + j];
        }
        if (any) {
            return true;
        }
    }
    return false;
}

DEDUP_UNINSTRUMENTED
bool dedup_page_is_zero(const void *page)
{
    bool zero;

    if (DEDUP_READ_FAILS()) {
        dedup_read_close();
        return false;
    }
    zero = !has_any(page);
    dedup_read_close();
    return zero;
}

DEDUP_READS
static void copy_words(void *to, const void *from)
{
    /* volatile: the compiler must not make a memcpy() of the loop */
    volatile uint64_t *x = to;
    /* volatile: likewise */
    const volatile uint64_t *y = from;

    for (size_t i = 0; i < PAGE_WORDS; i++) {
        x[i] = y[i];
    }
}

DEDUP_UNINSTRUMENTED
bool dedup_page_copy(void *to, const void *from)
{
    if (DEDUP_READ_FAILS()) {
        dedup_read_close();
        return false;
    }
    copy_words(to, from);
    dedup_read_close();
    return true;
}

DEDUP_UNINSTRUMENTED
bool dedup_page_touch(const void *page)
{
    if (DEDUP_READ_FAILS()) {
        dedup_read_close();
        return false;
    }
    /* volatile: the read is wanted, its value is not */
    (void)*(const volatile uint8_t *)page;
    dedup_read_close();
    return true;
}
