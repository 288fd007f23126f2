/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Punching: how the memory of replaced pages leaves a shared region's file.
 *
 * Where the file's memory is in large folios, the kernel does not take a
 * page out of one while somebody holds the folio: it zeroes the page in
 * place.  A device that reads the page through a DMA mapping of before would
 * read zeroes.  So pages that are held stay in the file until they are not,
 * and are punched when the scan comes by again.
 *
 * Nobody can come to hold the file's page anew once the private mapping of
 * the segment stands: who raises a counter after we looked at it finds the
 * segment's page.  So it is looked at here, after the mapping (I4).
 *
 * A file on huge pages gets a whole one where one page is written to a hole:
 * then the merged pages around it are punched again.
 *
 * Runs under the remap lock.
 */

#include <fcntl.h>
#include <unistd.h>

#include "host/mutant.h"
#include "host/sys.h"
#include "space/ledger.h"
#include "space/punch.h"

bool dedup_punch(const DedupRegion *r, uint32_t page, uint32_t n)
{
    return sys_fallocate(r->info.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                         dedup_region_file_offset(r, page),
                         (off_t)n << DEDUP_PAGE_SHIFT) == 0;
}

/* Has the file memory there? */
static bool has_memory(const DedupRegion *r, uint32_t page, uint32_t n)
{
    off_t start = dedup_region_file_offset(r, page);
    off_t data = sys_lseek(r->info.fd, start, SEEK_DATA);

    return data >= 0 && data < start + ((off_t)n << DEDUP_PAGE_SHIFT);
}

void dedup_punch_replaced(DedupRegion *r, uint32_t page, uint32_t n)
{
    for (uint32_t i = 0, j; i < n; i = j) {
        bool held = dedup_region_held(r, page + i) &&
                    !DEDUP_MUTANT(PUNCH_HELD);

        for (j = i + 1; !held && j < n && !dedup_region_held(r, page + j);
             j++) {
            ;
        }
        /*
         * The folio stays whole while anybody holds any page of it, if only
         * the kernel for a moment.
         */
        if (held || !dedup_punch(r, page + i, j - i) ||
            has_memory(r, page + i, j - i)) {
            for (uint32_t k = i; k < j; k++) {
                r->area[(page + k) / DEDUP_CHUNK_PAGES] |=
                    DEDUP_AREA_UNPUNCHED;
            }
        }
    }
}

/* Chunks are counted from the region's start, folios from the file's. */
void dedup_punch_around(DedupRegion *r, uint32_t page, uint32_t n)
{
    uint32_t first = page - MIN(page, DEDUP_CHUNK_PAGES - 1);
    uint32_t last = MIN(page + n + DEDUP_CHUNK_PAGES - 2, r->npages - 1);

    for (uint32_t c = first / DEDUP_CHUNK_PAGES;
         c <= last / DEDUP_CHUNK_PAGES; c++) {
        r->area[c] |= DEDUP_AREA_UNPUNCHED;
    }
}

void dedup_punch_late(DedupRegion *r, uint32_t first, uint32_t n)
{
    uint8_t *area = &r->area[first / DEDUP_CHUNK_PAGES];
    uint32_t end = first + n;

    if (first % DEDUP_CHUNK_PAGES == 0 && (*area & DEDUP_AREA_UNPUNCHED)) {
        /* what is held still sets the first bit again */
        *area &= ~DEDUP_AREA_UNPUNCHED;
        *area |= DEDUP_AREA_PUNCH;
    }
    if (!(*area & DEDUP_AREA_PUNCH)) {
        return;
    }
    for (uint32_t page = first, run; page < end; page += run) {
        bool merged;

        run = dedup_ledger_run(r, page, end, dedup_entry_is_segment, &merged);
        if (merged && has_memory(r, page, run)) {
            dedup_punch_replaced(r, page, run);
        }
    }
    if (end % DEDUP_CHUNK_PAGES == 0 || end == r->npages) {
        /* not before: a pass may leave a chunk in the middle */
        *area &= ~DEDUP_AREA_PUNCH;
    }
}
