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
 */

#ifdef DEDUP_XXHASH_DISPATCH
/* the same hash by the widest vectors that the processor has */
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "host/mutant.h"
#include "host/page.h"
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

DEDUP_UNINSTRUMENTED
uint64_t dedup_page_hash(const void *page, uint64_t salt)
{
    uint64_t hash = XXH3_64bits_withSeed(page, DEDUP_PAGE_SIZE, salt);

#ifdef CONFIG_DEDUP_MUTANTS
    hash &= dedup_hash_mask;
#endif
    return hash;
}

DEDUP_UNINSTRUMENTED
DedupHash128 dedup_page_keyed_hash(const void *page, const uint8_t *secret)
{
    XXH128_hash_t hash = XXH3_128bits_withSecret(page, DEDUP_PAGE_SIZE,
                                                 secret, DEDUP_SECRET_SIZE);

    return (DedupHash128) { .low = hash.low64, .high = hash.high64 };
}

DEDUP_UNINSTRUMENTED
bool dedup_page_equal(const void *a, const void *b)
{
    const uint64_t *x = a;
    const uint64_t *y = b;

    for (size_t i = 0; i < PAGE_WORDS; i += BLOCK_WORDS) {
        uint64_t diff = 0;

        for (size_t j = 0; j < BLOCK_WORDS; j++) {
            diff |= x[i + j] ^ y[i + j];
        }
        if (diff) {
            return false;
        }
    }
    return true;
}

DEDUP_UNINSTRUMENTED
bool dedup_page_similar(const void *a, const void *b)
{
    const uint64_t *x = a;
    const uint64_t *y = b;
    uint64_t diff = 0;

    for (size_t i = 0; i < BLOCK_WORDS; i++) {
        diff |= x[i] ^ y[i];
    }
    return !diff;
}

DEDUP_UNINSTRUMENTED
bool dedup_page_is_zero(const void *page)
{
    const uint64_t *x = page;

    for (size_t i = 0; i < PAGE_WORDS; i += BLOCK_WORDS) {
        uint64_t any = 0;

        for (size_t j = 0; j < BLOCK_WORDS; j++) {
            any |= x[i + j];
        }
        if (any) {
            return false;
        }
    }
    return true;
}

DEDUP_UNINSTRUMENTED
void dedup_page_copy(void *to, const void *from)
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
void dedup_page_touch(const void *page)
{
    /* volatile: the read is wanted, its value is not */
    (void)*(const volatile uint8_t *)page;
}
