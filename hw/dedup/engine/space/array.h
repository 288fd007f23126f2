/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Arrays that the kernel populates as they are touched: most of them stay
 * without memory.  Any thread.
 */

#ifndef DEDUP_ARRAY_H
#define DEDUP_ARRAY_H

#include <stddef.h>
#include <stdint.h>

/* @size bytes of zeros; NULL: there is no address space for them. */
void *dedup_array_new(size_t size);
/* NULL is allowed. */
void dedup_array_free(void *array, size_t size);
/* All zeros again, without memory. */
void dedup_array_forget(void *array, size_t size);
/* Bytes of it that have memory. */
uint64_t dedup_array_resident(const void *array, size_t size);

#endif /* DEDUP_ARRAY_H */
