/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Spare memory for a window that has to put pages back; see spare.h.
 */

#include <sys/mman.h>

#include "host/page.h"
#include "host/sys.h"
#include "host/types.h"
#include "space/spare.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define SPARE_BYTES (DEDUP_SPARE_PAGES * DEDUP_PAGE_SIZE)

bool dedup_spare_ready(DedupSpare *s)
{
    if (s->whole) {
        return true;
    }
    if (!s->pages) {
        void *p = sys_mmap(NULL, SPARE_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

        if (p == MAP_FAILED) {
            return false;
        }
        s->pages = p;
        /* a page that a child or KSM has, too, cannot be moved */
        sys_madvise(p, SPARE_BYTES, MADV_DONTFORK);
        sys_madvise(p, SPARE_BYTES, MADV_UNMERGEABLE);
        sys_madvise(p, SPARE_BYTES, MADV_NOHUGEPAGE);
        sys_madvise(p, SPARE_BYTES, MADV_DONTDUMP);
    }
    s->whole = sys_madvise(s->pages, SPARE_BYTES, MADV_POPULATE_WRITE) == 0;
    return s->whole;
}

uint8_t *dedup_spare_take(DedupSpare *s, unsigned i)
{
    s->whole = false;
    return s->pages + i * DEDUP_PAGE_SIZE;
}

size_t dedup_spare_size(const DedupSpare *s)
{
    return s->pages ? SPARE_BYTES : 0;
}

void dedup_spare_free(DedupSpare *s)
{
    if (s->pages) {
        sys_munmap(s->pages, SPARE_BYTES);
    }
    *s = (DedupSpare) { 0 };
}
