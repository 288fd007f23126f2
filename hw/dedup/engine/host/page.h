/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Reading the bytes of a page.
 *
 * The only functions of the engine that read guest memory.  Outside a window
 * the guest may write while they read: the result is then merely a wrong
 * hint.  They are free of sanitizer instrumentation for that reason, and
 * call no function of libc on guest memory.
 *
 * A page whose memory is broken cannot be read (reader.h): it is equal to none,
 * and no page of zeros.
 */

#ifndef DEDUP_PAGE_H
#define DEDUP_PAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DEDUP_PAGE_SHIFT 12
#define DEDUP_PAGE_SIZE ((size_t)1 << DEDUP_PAGE_SHIFT)

/* Length of the secret of a keyed hash: XXH3's default secret size. */
#define DEDUP_SECRET_SIZE 192

typedef struct DedupHash128 {
    uint64_t low;
    uint64_t high;
} DedupHash128;

/* No page has this hash. */
#define DEDUP_UNREADABLE 0

/* The content hash: salted XXH3, 64 bits. */
uint64_t dedup_page_hash(const void *page, uint64_t salt);

/* The hash with which a member proves that it has a page (I10). */
bool dedup_page_keyed_hash(const void *page, const uint8_t *secret,
                           DedupHash128 *hash);

bool dedup_page_equal(const void *a, const void *b);
bool dedup_page_is_zero(const void *page);

/* Copies a page that may change meanwhile.  False: a part of it, maybe. */
bool dedup_page_copy(void *to, const void *from);

/* Reads one byte, so that the page is resident and mapped. */
bool dedup_page_touch(const void *page);

#endif /* DEDUP_PAGE_H */
