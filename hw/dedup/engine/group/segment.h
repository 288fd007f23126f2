/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Segments: sealed memfds, each with up to DEDUP_SEGMENT_PAGES pages that
 * can never change again (I2).
 *
 * A builder is a segment that is being filled: nobody but this process can
 * see it.  dedup_builder_finish() cuts it to length, seals it and makes it a
 * segment.  A segment that came from another member is checked by
 * dedup_segment_accept() before its first byte is looked at: the seals, the
 * size, the kind of file system.
 *
 * Owner: whoever made or accepted it.  Thread: the scanner's, but that the peer
 * thread may read a page and duplicate @fd, under the lock of whoever keeps
 * the segments of this process (the engine's remap lock).
 */

#ifndef DEDUP_SEGMENT_H
#define DEDUP_SEGMENT_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "host/page.h"

#define DEDUP_SEGMENT_PAGES 512

/*
 * Kernel memory of one memfd (inode, dentry, file), in bytes: what slabinfo
 * gives on Linux 6.18.
 */
#define DEDUP_SEGMENT_SLAB 1280

/*
 * Only its name may change, when the group does (scan/names.c).  How it is used
 * here is the holding's (space/holdings.h).
 */
typedef struct DedupSegment {
    uint32_t gid;         /* name in the group, see group.h; 0: none */
    uint16_t npages;
    bool mine;            /* this process published it */
    bool zeroes;          /* sparse, all zero, without a gid: zeroes.c */
    int fd;
    const uint8_t *map;   /* read-only mapping of all pages */
} DedupSegment;

static inline const uint8_t *dedup_segment_page(const DedupSegment *s,
                                                unsigned page)
{
    return s->map + ((size_t)page << DEDUP_PAGE_SHIFT);
}

typedef struct DedupBuilder DedupBuilder;

/* NULL and @error if no memfd can be made; see dedup_error_errno(). */
DedupBuilder *dedup_builder_new(GError **error);

/*
 * Copies @page, which nobody changes meanwhile, to the end.  Returns its
 * number, or -1 and errno: ENOSPC when full, or when memory is short.  Pages
 * are written some at a time: then the last few that were appended may be lost
 * with it, and dedup_builder_count() says what is left.
 */
int dedup_builder_append(DedupBuilder *b, const void *page);
unsigned dedup_builder_count(const DedupBuilder *b);
/* Writes what was not yet.  Returns how many pages there are now. */
unsigned dedup_builder_flush(DedupBuilder *b);

/* After _flush().  Frees @b in any case.  NULL and @error on failure. */
DedupSegment *dedup_builder_finish(DedupBuilder *b, uint32_t gid,
                                   GError **error);
void dedup_builder_free(DedupBuilder *b);

/*
 * Check a received fd and map it.  Takes @fd in any case.  @npages is what
 * the group's table says.  Returns NULL and @error if it is not sealed
 * against every change, not of that size, or not on shmem.
 */
DedupSegment *dedup_segment_accept(int fd, uint32_t gid, unsigned npages,
                                   GError **error);

/*
 * A segment of zeros without memory: what is read of it takes some.  NULL and
 * @error if no memfd can be made.
 */
DedupSegment *dedup_segment_new_zeroes(GError **error);

/* What was read of it here leaves the page table, and that goes. */
void dedup_segment_tidy(const DedupSegment *s);
/* Unmaps, closes, frees.  Guest mappings keep the pages alive. */
void dedup_segment_free(DedupSegment *s);

#endif /* DEDUP_SEGMENT_H */
