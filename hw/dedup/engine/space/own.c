/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The region's own memory: mapped, filled, moved to its place; see own.h.
 */

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host/mutant.h"
#include "host/sys.h"
#include "space/own.h"
#include "space/punch.h"

/* How often to try to close a hole that the kernel left. */
#define HOLE_TRIES 100

void dedup_region_reapply(const DedupRegion *r, uint32_t page, uint32_t n)
{
    void *addr = dedup_region_addr(r, page);
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;

    if (DEDUP_MUTANT(NO_MADVISE)) {
        return;
    }
    /* they fail for want of maps only where they would split one */
    if (r->info.flags & DEDUP_REGION_DONTFORK) {
        sys_madvise(addr, len, MADV_DONTFORK);
    }
    if (r->info.flags & DEDUP_REGION_DONTDUMP) {
        sys_madvise(addr, len, MADV_DONTDUMP);
    }
}

bool dedup_region_map_own(DedupRegion *r, uint32_t page, uint32_t n)
{
    uint8_t *addr = dedup_region_addr(r, page);
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    int flags = MAP_FIXED |
                (r->info.flags & DEDUP_REGION_NORESERVE ? MAP_NORESERVE : 0);
    off_t offset = 0;

    switch (r->info.memory) {
    case DEDUP_MEMORY_SHARED:
        flags |= MAP_SHARED;
        offset = dedup_region_file_offset(r, page);
        break;
    case DEDUP_MEMORY_ANON:
        flags |= MAP_PRIVATE | MAP_ANONYMOUS;
        break;
    case DEDUP_MEMORY_PRIVATE_FILE:
        flags |= MAP_PRIVATE;
        offset = dedup_region_file_offset(r, page);
        break;
    }
    if (sys_mmap(addr, len, PROT_READ | PROT_WRITE, flags, r->info.fd,
                 offset) == MAP_FAILED) {
        return false;
    }
    if (r->info.flags & DEDUP_REGION_HUGEPAGE) {
        /* advice only; its lack costs speed and a mapping */
        for (uint32_t i = page, next; i < page + n; i = next) {
            bool nohuge = r->area[i / DEDUP_CHUNK_PAGES] & DEDUP_AREA_NOHUGE;

            next = MIN((i / DEDUP_CHUNK_PAGES + 1) * DEDUP_CHUNK_PAGES,
                       page + n);
            sys_madvise(dedup_region_addr(r, i),
                        (size_t)(next - i) << DEDUP_PAGE_SHIFT,
                        nohuge ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
        }
    }
    dedup_region_reapply(r, page, n);
    return true;
}

bool dedup_own_has_hole(const DedupRegion *r, uint32_t page, uint32_t n)
{
    unsigned char vec[DEDUP_WINDOW_PAGES];

    g_assert(n <= DEDUP_WINDOW_PAGES);
    return sys_mincore(dedup_region_addr(r, page),
                       (size_t)n << DEDUP_PAGE_SHIFT, vec) < 0 &&
           errno == ENOMEM;
}

bool dedup_own_write(DedupRegion *r, uint32_t page, uint32_t n,
                       const uint8_t *from)
{
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    off_t offset = dedup_region_file_offset(r, page);
    size_t done = 0;

    while (done < len) {
        ssize_t ret = sys_pwrite(r->info.fd, from + done, len - done,
                                 offset + done);

        if (ret < 0 && errno == EINTR) {
            continue;
        }
        if (ret <= 0) {
            r->lacks |= ret < 0 && errno == EFAULT ? DEDUP_LACK_POISON
                                                   : DEDUP_LACK_FILE;
            dedup_punch_replaced(r, page, n);
            return false;
        }
        done += ret;
    }
    return true;
}

bool dedup_own_map_whole(DedupRegion *r, uint32_t page, uint32_t n)
{
    bool ok = dedup_region_map_own(r, page, n);

    for (unsigned try = 0;
         !ok && try < HOLE_TRIES && dedup_own_has_hole(r, page, n); try++) {
        ok = dedup_region_map_own(r, page, n);
    }
    return ok;
}

bool dedup_own_map_back(DedupRegion *r, uint32_t page, uint32_t n)
{
    bool ok = dedup_own_map_whole(r, page, n);

    r->lacks |= ok ? 0 : DEDUP_LACK_MAPS;
    return ok;
}

uint8_t *dedup_own_staging(const DedupRegion *r, uint32_t page, size_t len)
{
    uint8_t *p = sys_mmap(NULL, len, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS |
                          (r->info.flags & DEDUP_REGION_NORESERVE ?
                           MAP_NORESERVE : 0), -1, 0);

    if (p == MAP_FAILED) {
        return NULL;
    }
    if (r->info.flags & DEDUP_REGION_DONTFORK) {
        sys_madvise(p, len, MADV_DONTFORK);
    }
    if (r->info.flags & DEDUP_REGION_DONTDUMP) {
        sys_madvise(p, len, MADV_DONTDUMP);
    }
    if (r->info.flags & DEDUP_REGION_HUGEPAGE) {
        bool nohuge = r->area[page / DEDUP_CHUNK_PAGES] & DEDUP_AREA_NOHUGE;

        sys_madvise(p, len, nohuge ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
    }
    return p;
}

bool dedup_own_move(DedupRegion *r, uint8_t *from, uint32_t page,
                     uint32_t n)
{
    uint8_t *to = dedup_region_addr(r, page);
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    unsigned try = 0;

    do {
        if (sys_mremap(from, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to) !=
            MAP_FAILED) {
            return true;
        }
    } while (dedup_own_has_hole(r, page, n) && ++try < HOLE_TRIES);
    return false;
}

static bool copy_pages(uint8_t *to, const uint8_t *from, uint32_t n)
{
    bool ok = true;

    for (uint32_t i = 0; ok && i < n; i++) {
        ok = dedup_page_copy(to + ((size_t)i << DEDUP_PAGE_SHIFT),
                             from + ((size_t)i << DEDUP_PAGE_SHIFT));
    }
    return ok;
}

bool dedup_fill_hole(DedupRegion *r, uint32_t page, uint32_t n,
                     const uint8_t *content)
{
    size_t len = (size_t)n << DEDUP_PAGE_SHIFT;
    uint8_t *staging;

    if (!dedup_own_has_hole(r, page, n)) {
        return false;
    }
    if (r->info.memory == DEDUP_MEMORY_SHARED) {
        /*
         * Without @content it is what the file has there.  If the hole stays
         * after all, the file has the only copy: that makes the pages own.
         */
        return (!content || dedup_own_write(r, page, n, content)) &&
               (dedup_own_map_back(r, page, n) ||
                dedup_own_has_hole(r, page, n));
    }
    /* one page more: or the kernel takes the hole itself for it, empty */
    staging = dedup_own_staging(r, page, len + DEDUP_PAGE_SIZE);
    if (!staging) {
        return false;
    }
    sys_munmap(staging + len, DEDUP_PAGE_SIZE);
    if ((content && !copy_pages(staging, content, n)) ||
        !dedup_own_move(r, staging, page, n)) {
        sys_munmap(staging, len);
        return false;
    }
    return true;
}
