/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Presence: which pages of a region have memory, without touching one (I7).
 *
 * Own pages of a shared region are asked for with mincore(), which looks at
 * the file: pagemap would call a page absent that is in the file but not in
 * our page table, as every restored page is at first.  Everything else, own
 * pages of private regions and the private mappings of segments, is read
 * from pagemap, because there the question is another one: is there a copy
 * of this process's own (anonymous) behind the page?
 *
 * mincore() calls everything present in a file that we neither own nor may
 * write by its mode, as after "-run-with user=".  There SEEK_DATA is asked,
 * which cannot tell a page on swap from one in memory.
 *
 * PAGEMAP_SCAN (Linux 6.7) tells the kernel's zero page from memory; where
 * it is missing /proc/self/pagemap is read, and a read zero page counts as
 * present: it is found to be zero and dropped, which changes nothing.  Huge
 * pages are not told apart there either, so that they cannot be kept.
 *
 * Runs under the remap lock, so nothing of ours changes meanwhile; what the
 * guest or the kernel changes only makes the answer stale.
 */

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host/pagemap.h"
#include "host/sys.h"
#include "space/ledger.h"
#include "space/presence.h"

/*
 * How far the kernel is asked at a time for the next page that is there.  Its
 * walk takes no time where there are no page tables; where there are it takes
 * about as long as a window.
 */
#define REACH_CHUNKS 512                /* 1 GiB */

/* One pagemap category as our flags; memory of a file is nobody's own. */
static uint8_t own_flags(uint64_t categories)
{
    /* before "swapped": a page that is being migrated looks like that */
    if (categories & PAGE_IS_FILE) {
        return 0;
    }
    if (categories & PAGE_IS_SWAPPED) {
        return DEDUP_SWAPPED;
    }
    if (!(categories & PAGE_IS_PRESENT)) {
        return 0;
    }
    if (categories & PAGE_IS_PFNZERO) {
        return DEDUP_ZERO_MAPPED;
    }
    return DEDUP_PRESENT | (categories & PAGE_IS_HUGE ? DEDUP_HUGE : 0);
}

/*
 * @mixed: a file's memory may be mapped there, too.  To tell that the kernel
 * has to look at each page's descriptor, which doubles the cost.
 */
static bool pagemap_scan(DedupSpace *space, uint8_t *addr, uint32_t n,
                         bool mixed, uint8_t *flags)
{
    struct page_region vec[DEDUP_CHUNK_PAGES];
    uint64_t start = (uintptr_t)addr;
    uint64_t end = start + ((uint64_t)n << DEDUP_PAGE_SHIFT);

    memset(flags, 0, n);
    while (start < end) {
        struct pm_scan_arg arg = {
            .size = sizeof(arg),
            .start = start,
            .end = end,
            .vec = (uintptr_t)vec,
            .vec_len = G_N_ELEMENTS(vec),
            .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            .return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED |
                           PAGE_IS_PFNZERO | PAGE_IS_HUGE |
                           (mixed ? PAGE_IS_FILE : 0),
        };
        int found = sys_ioctl(space->process.pagemap_fd, PAGEMAP_SCAN, &arg);

        if (found < 0) {
            return false;
        }
        for (int i = 0; i < found; i++) {
            uint64_t first = (vec[i].start - (uintptr_t)addr) >>
                             DEDUP_PAGE_SHIFT;
            uint64_t last = (vec[i].end - (uintptr_t)addr) >>
                            DEDUP_PAGE_SHIFT;

            memset(flags + first, own_flags(vec[i].categories),
                   last - first);
        }
        if (arg.walk_end <= start) {
            return false;
        }
        start = arg.walk_end;
    }
    return true;
}

static bool pagemap_read(DedupSpace *space, uint8_t *addr, uint32_t n,
                         uint8_t *flags)
{
    uint64_t entries[DEDUP_CHUNK_PAGES];
    uint64_t offset = ((uintptr_t)addr >> DEDUP_PAGE_SHIFT) *
                      sizeof(entries[0]);
    ssize_t len = sys_pread(space->process.pagemap_fd, entries,
                            n * sizeof(entries[0]), offset);

    if (len != (ssize_t)(n * sizeof(entries[0]))) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint64_t categories = 0;

        categories |= entries[i] & PM_PRESENT ? PAGE_IS_PRESENT : 0;
        categories |= entries[i] & PM_SWAPPED ? PAGE_IS_SWAPPED : 0;
        categories |= entries[i] & PM_FILE ? PAGE_IS_FILE : 0;
        flags[i] = own_flags(categories);
    }
    return true;
}

static bool private_presence(DedupSpace *space, uint8_t *addr, uint32_t n,
                             bool mixed, uint8_t *flags)
{
    if (space->process.has_pagemap_scan) {
        if (pagemap_scan(space, addr, n, mixed, flags)) {
            return true;
        }
        if (errno != ENOTTY && errno != EINVAL) {
            return false;
        }
        space->process.has_pagemap_scan = false;
    }
    return pagemap_read(space, addr, n, flags);
}

void dedup_presence_prepare(DedupRegion *r)
{
    g_autofree char *path = NULL;
    struct stat st;

    r->prepared = true;
    if (r->info.memory != DEDUP_MEMORY_SHARED) {
        return;
    }
    path = g_strdup_printf("/proc/self/fd/%d", r->info.fd);
    r->blind = (sys_fstat(r->info.fd, &st) < 0 || st.st_uid != geteuid()) &&
               sys_faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) < 0;
}

/* Which pages of a range of the region's file have data; holes have none. */
static bool file_data(const DedupRegion *r, uint32_t first, uint32_t n,
                      unsigned char *resident)
{
    off_t start = dedup_region_file_offset(r, first);
    off_t end = start + ((off_t)n << DEDUP_PAGE_SHIFT);
    off_t data, hole;

    memset(resident, 0, n);
    for (off_t at = start; at < end; at = hole) {
        data = sys_lseek(r->info.fd, at, SEEK_DATA);
        if (data < 0) {
            return errno == ENXIO; /* no data behind */
        }
        if (data >= end) {
            return true;
        }
        hole = sys_lseek(r->info.fd, data, SEEK_HOLE);
        if (hole < 0) {
            return false;
        }
        memset(resident + ((data - start) >> DEDUP_PAGE_SHIFT), 1,
               (MIN(hole, end) - data) >> DEDUP_PAGE_SHIFT);
    }
    return true;
}

bool dedup_presence(DedupRegion *r, uint32_t first, uint32_t n,
                    uint8_t *flags)
{
    uint8_t *addr = dedup_region_addr(r, first);
    unsigned char resident[DEDUP_CHUNK_PAGES];
    uint32_t segments_first = n;
    uint32_t segments_last = 0;

    g_assert(n <= DEDUP_CHUNK_PAGES);
    for (uint32_t i = 0; i < n; i++) {
        if (dedup_entry_is_segment(dedup_entry_at(r, first + i))) {
            segments_first = MIN(segments_first, i);
            segments_last = i;
        }
    }
    if (r->info.memory != DEDUP_MEMORY_SHARED) {
        return private_presence(r->space, addr, n,
                                r->info.memory != DEDUP_MEMORY_ANON ||
                                segments_first <= segments_last, flags);
    }
    if (segments_first <= segments_last &&
        !private_presence(r->space,
                          addr + ((size_t)segments_first <<
                                  DEDUP_PAGE_SHIFT),
                          segments_last - segments_first + 1, true,
                          flags + segments_first)) {
        return false;
    }
    if (r->blind ? !file_data(r, first, n, resident)
                 : sys_mincore(addr, (size_t)n << DEDUP_PAGE_SHIFT,
                               resident) < 0) {
        return false;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (!dedup_entry_is_segment(dedup_entry_at(r, first + i))) {
            flags[i] = resident[i] & 1 ? DEDUP_PRESENT : 0;
        }
    }
    return true;
}

/* The next page of the file that has data, or is on swap; @end: none. */
static uint32_t next_in_file(const DedupRegion *r, uint32_t page,
                             uint32_t end)
{
    off_t start = dedup_region_file_offset(r, page);
    off_t data = sys_lseek(r->info.fd, start, SEEK_DATA);

    if (data < 0) {
        return errno == ENXIO ? end : page;
    }
    return MIN((uint64_t)page + ((data - start) >> DEDUP_PAGE_SHIFT), end);
}

/*
 * The next page before @end with memory of this process's own, or on swap; no
 * segment is mapped there.
 */
static uint32_t next_private(const DedupRegion *r, uint32_t page,
                             uint32_t end)
{
    bool mixed = r->info.memory != DEDUP_MEMORY_ANON;
    struct page_region found;
    struct pm_scan_arg arg = {
        .size = sizeof(arg),
        .start = (uintptr_t)dedup_region_addr(r, page),
        .end = (uintptr_t)dedup_region_addr(r, end),
        .vec = (uintptr_t)&found,
        .vec_len = 1,
        .max_pages = 1,
        .category_inverted = PAGE_IS_PFNZERO | PAGE_IS_FILE,
        .category_mask = PAGE_IS_PFNZERO | (mixed ? PAGE_IS_FILE : 0),
        .category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        .return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
    };
    int n = r->space->process.has_pagemap_scan ?
            sys_ioctl(r->space->process.pagemap_fd, PAGEMAP_SCAN, &arg) : -1;

    if (n < 0) {
        return page; /* dedup_presence() finds another way */
    }
    return n ? page + ((found.start - arg.start) >> DEDUP_PAGE_SHIFT) : end;
}

/* The chunks from @first on, before @last, have no memory of their own now. */
static void forget(DedupRegion *r, uint32_t first, uint32_t last)
{
    for (uint32_t c = first; r->sums.own && c < last; c++) {
        dedup_ledger_own(r, c, 0);
    }
}

/* The first chunk from @first on, before @last, with a segment mapped in it. */
static uint32_t next_mapped(const DedupRegion *r, uint32_t first,
                            uint32_t last)
{
    if (!dedup_region_mapped(r)) {
        return last;
    }
    while (first < last && !r->chunk[first].mapped) {
        first++;
    }
    return first;
}

bool dedup_skip_void(DedupRegion *r, uint32_t *page)
{
    bool shared = r->info.memory == DEDUP_MEMORY_SHARED;
    uint32_t chunks = dedup_region_chunks(r);
    uint32_t first = *page / DEDUP_CHUNK_PAGES;
    uint32_t reach = shared ? chunks : MIN(first + REACH_CHUNKS, chunks);
    /* a private copy of a segment's page is in no file */
    uint32_t last = next_mapped(r, first, reach);
    uint32_t end = MIN(last * DEDUP_CHUNK_PAGES, r->npages);
    uint32_t next = end;

    if (first < last) {
        next = shared ? next_in_file(r, *page, end)
                      : next_private(r, *page, end);
    }
    if (next < end) {
        last = next / DEDUP_CHUNK_PAGES;
    }
    forget(r, first, last);
    *page = MIN(last * DEDUP_CHUNK_PAGES, r->npages);
    return last < reach || reach == chunks;
}

static DedupLook *oldest_look(DedupLooks *looks, DedupRegion *r,
                              uint32_t first)
{
    DedupLook *look;

    looks->last = (looks->last + 1) % G_N_ELEMENTS(looks->cached);
    look = &looks->cached[looks->last];
    look->region = r;
    look->first = first;
    look->strangers = r->space->lock.strangers;
    return look;
}

/* What is known of the page's chunk; NULL: nothing. */
static DedupLook *find_look(DedupLooks *looks, const DedupRegion *r,
                            uint32_t page)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(looks->cached); i++) {
        DedupLook *look = &looks->cached[i];

        if (look->region == r && page - look->first < DEDUP_CHUNK_PAGES &&
            look->strangers == r->space->lock.strangers) {
            looks->last = i;
            return look;
        }
    }
    return NULL;
}

bool dedup_is_present(DedupLooks *looks, DedupRegion *r, uint32_t page)
{
    DedupLook *look = find_look(looks, r, page);

    if (!look) {
        look = oldest_look(looks, r, page - page % DEDUP_CHUNK_PAGES);
        if (!dedup_presence(r, look->first,
                            MIN(DEDUP_CHUNK_PAGES, r->npages - look->first),
                            look->flags)) {
            look->region = NULL;
            return false;
        }
    }
    return look->flags[page - look->first] & DEDUP_PRESENT;
}

void dedup_keep_look(DedupLooks *looks, DedupRegion *r, uint32_t first,
                     const uint8_t *flags)
{
    DedupLook *look = find_look(looks, r, first);

    look = look ? look : oldest_look(looks, r, first);
    memcpy(look->flags, flags, MIN(DEDUP_CHUNK_PAGES, r->npages - first));
}

void dedup_forget_looks(DedupLooks *looks)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(looks->cached); i++) {
        looks->cached[i].region = NULL;
    }
}

/* Lock held: the owner closes the file when the region is gone. */
static uint64_t swapped_in_file(const DedupRegion *r, uint64_t copies)
{
    uint64_t copied = r->sums.broken - MIN(copies, r->sums.broken);
    struct stat st;
    uint64_t blocks;

    if (r->dead || r->info.memory != DEDUP_MEMORY_SHARED ||
        sys_fstat(r->info.fd, &st) < 0) {
        return 0;
    }
    /* what the file has and mincore() did not see resident */
    blocks = (uint64_t)st.st_blocks * 512 >> DEDUP_PAGE_SHIFT;
    return blocks - MIN(blocks, r->sums.own - MIN(copied, r->sums.own));
}

uint64_t dedup_region_swapped(DedupRegion *r, uint64_t copies)
{
    uint64_t pages;

    dedup_space_lock(r->space);
    pages = swapped_in_file(r, copies);
    dedup_space_unlock(r->space);
    return pages;
}
