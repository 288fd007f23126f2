/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sweeping the index: hints that lead nowhere any more are taken out.
 *
 * A hint that is found to be stale by a lookup is replaced there.  But when
 * a VM goes, so do its contents, and nobody looks them up again.  Candidates
 * give way when the table is full; published hints never do, so without a
 * sweep the table would fill up with those of segments that are gone.
 *
 * Threads: any, of any process.
 */

#include "index/index-table.h"

/*
 * The page at @cursor or the next one that a shard has in use; false: there
 * is none.
 */
static bool next_page(const DedupIndex *index, uint64_t cursor,
                      unsigned *shard, uint64_t *page)
{
    *shard = cursor / SHARD_PAGES % SHARDS;
    *page = cursor % SHARD_PAGES;
    /* once around: the first shard may have pages in use before the cursor */
    for (unsigned i = 0; i <= SHARDS; i++) {
        if (*page < shard_pages(index, *shard)) {
            return true;
        }
        *shard = (*shard + 1) % SHARDS;
        *page = 0;
    }
    return false;
}

unsigned dedup_index_sweep(DedupIndex *index, uint64_t *cursor,
                           unsigned pages,
                           bool (*is_stale)(void *opaque,
                                            const DedupHint *hint),
                           void *opaque)
{
    uint64_t in_use = dedup_index_bytes(index) / DEDUP_PAGE_SIZE;
    unsigned removed = 0, shard;
    uint64_t page;

    pages = MIN(pages, in_use);
    for (; pages && next_page(index, *cursor, &shard, &page); pages--) {
        uint64_t *entries = line_at(index, shard, page * PAGE_LINES);

        *cursor = (uint64_t)shard * SHARD_PAGES + page + 1;
        for (unsigned i = 0; entries && i < PAGE_ENTRIES; i++) {
            uint64_t entry = word(&entries[i]);
            DedupHint hint;

            if (entry == 0) {
                continue;
            }
            entry_decode(entry, &hint);
            /* what is not even a hint only takes a place */
            if ((hint.kind == DEDUP_HINT_NONE || is_stale(opaque, &hint)) &&
                change_word(&entries[i], entry, 0)) {
                shard_uncount(index, shard);
                removed++;
            }
        }
    }
    return removed;
}
