/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Zero pages of shared RAM on a file system with a limit.
 *
 * Elsewhere a zero page is punched out of the RAM's file, and the guest's next
 * store to it takes a new page of the file.  On a tmpfs with a size somebody
 * else may have taken that place meanwhile: then the store is SIGBUS, and the
 * VM is lost.  So there a zero page is merged, like any other, to a segment:
 * a store gets private memory from the kernel, whatever the file system has
 * left.  The page is broken then, and gets its place in the file again when
 * there is room.  Every tmpfs that is mounted somewhere may get a limit at any
 * time; only the kernel's own mount, where memfds are, has none for good.
 *
 * The segment is sparse, so that it costs nothing but what guests read of it:
 * at most 2 MiB.  It is this process's alone: it has no name in the group, its
 * pages are not announced, and it is not among those that scan/ judges, as it
 * never has more pages than are mapped to it.  Nothing reads its view but who
 * has to put a page back after the kernel refused a mapping.
 *
 * A page of the region is mapped to the page of the segment that has its
 * number, modulo the segment's length: so a run of them is one mapping.
 */

#include <sys/stat.h>
#include <unistd.h>

#include "host/sys.h"
#include "space/holdings.h"
#include "space/space-internal.h"
#include "space/zeroes.h"

bool dedup_file_is_bounded(int fd, dev_t *dev)
{
    g_autoptr(GError) error = NULL;
    DedupSegment *memfd = dedup_segment_new_zeroes(&error);
    struct stat st = { 0 }, kernel; /* unknown ones count as one */
    bool bounded;

    bounded = sys_fstat(fd, &st) < 0 || !memfd ||
              sys_fstat(memfd->fd, &kernel) < 0 || st.st_dev != kernel.st_dev;
    *dev = st.st_dev;
    dedup_segment_free(memfd);
    return bounded;
}

bool dedup_space_zero_action(DedupRegion *r, uint32_t page,
                             DedupAction *action, unsigned *limits)
{
    DedupHolding **zeroes = &r->space->holdings.zeroes;
    g_autoptr(GError) error = NULL;

    action->page = page;
    action->holding = NULL;
    action->index = 0;
    if (!r->bounded) {
        return true;
    }
    if (!*zeroes) {
        DedupSegment *s = dedup_segment_new_zeroes(&error);

        if (!s) {
            *limits |= DEDUP_LIMIT_FDS;
            return false;
        }
        *zeroes = dedup_holding_add(r->space, s);
    }
    action->holding = *zeroes;
    action->index = page % DEDUP_SEGMENT_PAGES;
    return true;
}

void dedup_zeroes_drop_unused(DedupSpace *space)
{
    DedupHolding **zeroes = &space->holdings.zeroes;

    /* only the scanner, which is here, makes it rise from 0 */
    if (*zeroes && !__atomic_load_n(&(*zeroes)->refs, __ATOMIC_RELAXED)) {
        dedup_holding_drop(space, *zeroes);
        *zeroes = NULL;
    }
}

uint64_t dedup_zeroes_bytes(const DedupSpace *space)
{
    const DedupHolding *zeroes = space->holdings.zeroes;
    struct stat st;

    return zeroes && sys_fstat(zeroes->segment->fd, &st) == 0 ?
           (uint64_t)st.st_blocks * 512 + DEDUP_SEGMENT_SLAB : 0;
}
