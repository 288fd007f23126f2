/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What restoring takes; see need.h.  Whether it is there, scan/room.c says.
 */

#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "host/sys.h"
#include "space/ledger.h"
#include "space/need.h"

/* What the file system of an open file has left; tmpfs without a size: all. */
static uint64_t file_room(int fd)
{
    struct statfs sfs;

    if (sys_fstatfs(fd, &sfs) < 0) {
        return 0;
    }
    return sfs.f_blocks ? (uint64_t)sfs.f_bavail * sfs.f_bsize : UINT64_MAX;
}

/* What restoring at most @pages pages of @r takes. */
static void need_add(DedupNeed *need, DedupRegion *r, uint64_t pages)
{
    /* none of them has memory in the file */
    uint64_t bytes = MIN(pages, dedup_region_mapped(r)) << DEDUP_PAGE_SHIFT;
    uint64_t broken = MIN(r->sums.broken, dedup_space_ksm_bytes(r->space) >>
                                     DEDUP_PAGE_SHIFT);
    unsigned i;

    /* broken pages have their memory already, unless KSM shares it */
    need->memory += MIN(pages, r->sums.merged + r->sums.zero_mapped + broken) <<
                    DEDUP_PAGE_SHIFT;
    if (!r->bounded || !bytes) {
        return;
    }
    for (i = 0; i < need->nfiles && need->files[i].dev != r->dev; i++) {
        ;
    }
    if (i == DEDUP_NEED_FILES) {
        i--; /* the free space of one for the needs of two: the safe side */
    } else if (i == need->nfiles) {
        need->nfiles++;
        need->files[i].dev = r->dev;
        need->files[i].bytes = 0;
        need->files[i].free = UINT64_MAX;
    }
    need->files[i].bytes += bytes;
    need->files[i].free = MIN(need->files[i].free, file_room(r->info.fd));
    g_strlcpy(need->files[i].id, r->info.id, sizeof(need->files[i].id));
}

void dedup_space_need(DedupSpace *space, const void *host, const void *end,
                      DedupNeed *need)
{
    *need = (DedupNeed) { 0 };
    dedup_space_lock(space);
    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);
        uint32_t first, n;

        if (dedup_region_intersect(r, host, end, &first, &n)) {
            need_add(need, r, n);
        }
    }
    dedup_space_unlock(space);
}

void dedup_space_need_regions(DedupSpace *space, DedupRegion *const *regions,
                              unsigned n, DedupNeed *need)
{
    *need = (DedupNeed) { 0 };
    dedup_space_lock(space);
    for (unsigned i = 0; i < n; i++) {
        need_add(need, regions[i], regions[i]->npages);
    }
    dedup_space_unlock(space);
}

bool dedup_file_has_room(DedupRegion *r)
{
    GPtrArray *regions = r->space->regions;
    uint64_t owed = 0;

    if (!r->bounded) {
        return true;
    }
    for (unsigned i = 0; i < regions->len; i++) {
        const DedupRegion *other = g_ptr_array_index(regions, i);

        if (other->bounded && other->dev == r->dev) {
            owed += dedup_region_mapped(other);
        }
    }
    return file_room(r->info.fd) >= owed << DEDUP_PAGE_SHIFT;
}
