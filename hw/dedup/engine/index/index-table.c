/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The memory of the index: which pages of the table have some, and who takes
 * it.  The table is a sparse file, mapped as a whole; a page that is touched
 * without having memory gets it, or the process a SIGBUS.
 *
 * Only storing takes memory.  How large a shard is, is in the header, where
 * any member can write what it likes: if a lookup took memory for the pages
 * that it is sent to, a single wrong number would make everybody else fill
 * the table's 4 GiB with zeros.
 *
 * So whoever looks reads a page that is not known to be backed once with
 * pread(): that costs no memory, a hole reads as zeros, and a page of zeros
 * holds no hint, whether it is a hole or not.  SEEK_DATA would say as much.
 * But it takes the inode's lock, and that of the file position, which all
 * members share with the open file; and if somebody has allocated pages
 * without touching them, it walks over all of these to the next one that was.
 *
 * Whoever stores takes memory for no more pages than the limit lets it grow
 * to, twice: the wrong number in the header is where it stores to, not how
 * much that may cost.
 *
 * Threads: any, of any process.
 */

#include <fcntl.h>
#include <unistd.h>

#include "host/sys.h"
#include "index/index-table.h"

static uint64_t page_offset(const DedupIndex *index, uint64_t page)
{
    return index->offset + page * DEDUP_PAGE_SIZE;
}

static void set_backed(const DedupIndex *index, uint64_t page)
{
    uint64_t bit = 1ull << page % 64;

    if (!(__atomic_fetch_or(&index->backed->bits[page / 64], bit,
                            __ATOMIC_RELAXED) & bit)) {
        __atomic_fetch_add(&index->backed->pages, 1, __ATOMIC_RELAXED);
    }
}

bool dedup_table_look(const DedupIndex *index, uint64_t page)
{
    uint64_t entries[PAGE_ENTRIES];

    if (sys_pread(index->fd, entries, sizeof(entries),
                  page_offset(index, page)) != sizeof(entries) ||
        dedup_page_is_zero(entries)) {
        return false;
    }
    set_backed(index, page);
    return true;
}

bool dedup_table_allocate(const DedupIndex *index, uint64_t page, uint64_t n)
{
    if (sys_fallocate(index->fd, 0, page_offset(index, page),
                      n * DEDUP_PAGE_SIZE) < 0) {
        return false;
    }
    for (uint64_t i = 0; i < n; i++) {
        set_backed(index, page + i);
    }
    return true;
}

bool dedup_table_take(const DedupIndex *index, uint64_t page)
{
    /* twice: others may know a higher limit, and grew by it */
    uint64_t most = 2 * SHARDS * word(&index->limit);

    if (word(&index->backed->pages) >= most) {
        return dedup_table_look(index, page);
    }
    return dedup_table_allocate(index, page, 1);
}
