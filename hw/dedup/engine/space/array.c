/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Lazily populated arrays; see array.h.
 */

#include <glib.h>
#include <sys/mman.h>

#include "host/page.h"
#include "host/sys.h"
#include "space/array.h"

void *dedup_array_new(size_t size)
{
    void *p = sys_mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (p == MAP_FAILED) {
        return NULL;
    }
    /* a huge page here would cost what we are about to save */
    sys_madvise(p, size, MADV_NOHUGEPAGE);
    sys_madvise(p, size, MADV_DONTDUMP);
    return p;
}

void dedup_array_free(void *array, size_t size)
{
    if (array) {
        sys_munmap(array, size);
    }
}

void dedup_array_forget(void *array, size_t size)
{
    sys_madvise(array, size, MADV_DONTNEED);
}

uint64_t dedup_array_resident(const void *array, size_t size)
{
    unsigned char vec[1024];
    uint64_t pages = 0;
    const uint8_t *p = array;

    for (size_t off = 0; off < size; ) {
        size_t len = MIN(size - off, sizeof(vec) << DEDUP_PAGE_SHIFT);

        if (sys_mincore((void *)(p + off), len, vec) < 0) {
            return size;
        }
        for (size_t i = 0; i < (len + DEDUP_PAGE_SIZE - 1) >>
             DEDUP_PAGE_SHIFT; i++) {
            pages += vec[i] & 1;
        }
        off += len;
    }
    return pages << DEDUP_PAGE_SHIFT;
}
