/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The index: a table of hints in memory that many processes write at once
 * without a lock.
 *
 * Terms:
 *   entry   8 bytes: kind (2 bits), tag (24 bits), where (38 bits); 0: free
 *   tag     24 bits of the hash; the position of an entry follows from its
 *           tag alone, so a shard can be rehashed without knowing the hashes
 *   line    8 entries, one cache line; each tag has two lines where it may
 *           be, and a new entry goes into the emptier one
 *   shard   one of 16 tables, chosen by 4 other bits of the hash; grows on
 *           its own, by an eighth
 *
 * Lines are numbered by (tag * lines) >> 24, with the tag as it is for the
 * first choice and mixed for the second.  Both are monotone in the number of
 * lines: when a shard grows, an entry moves up or stays.  So the rehash goes
 * from the top down, moves each entry once, and keeps to the choice that
 * the entry was stored by; it reads and writes memory in order.
 * As the other line of any entry is known, a full line makes room by moving
 * one of its entries there; so nothing is lost at a load of nine tenths.
 *
 * What may go wrong, and why it harms nobody:
 *   - An insert that read the number of lines before it changed stores its
 *     entry where nobody looks for it.  A lookup while a shard is rehashed
 *     misses entries that were not moved yet.  A rehash that is cut short by
 *     SIGKILL leaves entries at old places.  In each case a hint is lost: a
 *     page is merged a pass later.  The next rehash picks such entries up:
 *     it moves whatever it finds to where it belongs.
 *   - Two processes insert the same hint at once: it is there twice, which
 *     costs 8 bytes.
 *   - The count of entries drifts (a process dies between storing and
 *     counting; an enemy writes to it).  Each rehash counts anew; before a
 *     shard grows, and when an insert finds no room, it is sampled.
 *   - Garbage in the header: the number of pages is clamped to the size of
 *     the mapping.  Table pages are allocated with fallocate() by whoever
 *     stores to them first, so a lack of memory is an error and no SIGBUS;
 *     a lookup allocates none, and storing no more than the limit allows
 *     (index-table.c).
 *
 * Threads: any, of any process.  All shared words are accessed with atomics.
 */

#include "index/index-shard.h"
#include "index/index-table.h"

/* Attempts of an insert before it gives in to the others. */
#define ATTEMPTS 16

size_t dedup_index_header_size(void)
{
    return sizeof(DedupIndexHeader);
}

size_t dedup_index_table_size(void)
{
    return (size_t)SHARDS * SHARD_PAGES * DEDUP_PAGE_SIZE;
}

DedupIndex *dedup_index_new(DedupIndexHeader *header, void *table, int fd,
                            uint64_t table_offset)
{
    DedupIndex *index = g_new0(DedupIndex, 1);

    index->header = header;
    index->table = table;
    index->fd = fd;
    index->offset = table_offset;
    index->limit = SHARD_PAGES;
    index->backed = g_new0(Backed, 1);
    return index;
}

void dedup_index_free(DedupIndex *index)
{
    if (index) {
        g_free(index->backed);
        g_free(index);
    }
}

void dedup_index_set_limit(DedupIndex *index, uint64_t entries)
{
    uint64_t pages = entries / SHARDS * LOAD_DEN / LOAD_NUM / PAGE_ENTRIES;

    /* For shards that are fuller than the others. */
    pages += entries ? pages / 8 + 1 : 0;
    __atomic_store_n(&index->limit, MIN(pages, SHARD_PAGES),
                     __ATOMIC_RELAXED);
}

static uint64_t entry_encode(uint64_t hash, const DedupHint *hint)
{
    unsigned bits = page_bits(hint->kind);
    uint64_t where = (uint64_t)hint->where << bits | hint->page;

    g_assert(hint->kind != DEDUP_HINT_NONE);
    g_assert(where <= WHERE_MASK && hint->page < 1u << bits);
    return (uint64_t)hint->kind << 62 | (uint64_t)tag_of(hash) << WHERE_BITS |
           where;
}

/* The count says that it is time to grow. */
static void grow_if_overloaded(const DedupIndex *index, unsigned shard,
                               uint64_t pages, uint32_t tag)
{
    if (pages) {
        dedup_shard_check_count(index, shard, pages, tag);
    }
    if (dedup_shard_overloaded(index, shard, pages)) {
        dedup_shard_grow(index, shard, pages);
    }
}

bool dedup_index_insert(DedupIndex *index, uint64_t hash,
                        const DedupHint *hint)
{
    uint64_t entry = entry_encode(hash, hint);
    unsigned shard = shard_of(hash);
    uint32_t tag = tag_of(hash);

    for (unsigned i = 0; i < ATTEMPTS; i++) {
        uint64_t pages = shard_pages(index, shard);
        uint64_t at, bt, lines, *a, *b;
        unsigned free_a, free_b;
        bool found = false;

        if (dedup_shard_overloaded(index, shard, pages)) {
            grow_if_overloaded(index, shard, pages, tag);
            pages = shard_pages(index, shard);
        }
        if (pages == 0) {
            return false;
        }
        lines = pages * PAGE_LINES;
        at = first_line(tag, lines);
        bt = second_line(tag, lines);
        a = line_for(index, shard, at);
        b = line_for(index, shard, bt);
        if (!a || !b) {
            return false;
        }
        free_a = line_free(a, entry, &found);
        free_b = line_free(b, entry, &found);
        if (found) {
            return true;
        }
        if (line_add(free_b > free_a ? b : a, entry) ||
            dedup_line_displace(index, shard, at, lines, entry) ||
            dedup_line_displace(index, shard, bt, lines, entry)) {
            __atomic_fetch_add(&index->header->shard[shard].count, 1,
                               __ATOMIC_RELAXED);
            return true;
        }
        if (pages < word(&index->limit)) {
            dedup_shard_check_count(index, shard, pages, tag);
            if (dedup_shard_overloaded(index, shard, pages) &&
                dedup_shard_grow(index, shard, pages)) {
                continue;
            }
        }
        /* The bits of the hash below the tag choose the victim. */
        if (dedup_line_replace(hash & 8 ? a : b, entry, hash) ||
            dedup_line_replace(hash & 8 ? b : a, entry, hash)) {
            return true;
        }
        if (!dedup_shard_grow(index, shard, pages)) {
            return false;
        }
    }
    return true;                /* lost to the others, as any hint may be */
}

void dedup_index_prefetch(const DedupIndex *index, uint64_t hash)
{
    unsigned shard = shard_of(hash);
    uint64_t lines = shard_pages(index, shard) * PAGE_LINES;
    uint64_t *table = index->table +
                      (uint64_t)shard * SHARD_PAGES * PAGE_ENTRIES;

    /* A prefetch of what is not there does nothing. */
    __builtin_prefetch(table +
                       first_line(tag_of(hash), lines) * LINE_ENTRIES);
    __builtin_prefetch(table +
                       second_line(tag_of(hash), lines) * LINE_ENTRIES);
}

/* The lines of @hash where anything may be: 0, 1 or 2. */
static unsigned lines_of(const DedupIndex *index, uint64_t hash,
                         uint64_t *line[2])
{
    unsigned shard = shard_of(hash);
    uint64_t lines = shard_pages(index, shard) * PAGE_LINES;
    uint64_t a = first_line(tag_of(hash), lines);
    uint64_t b = second_line(tag_of(hash), lines);
    unsigned n = 0;

    if (lines == 0) {
        return 0;
    }
    line[n] = line_at(index, shard, a);
    n += line[n] != NULL;
    if (b != a) {
        line[n] = line_at(index, shard, b);
        n += line[n] != NULL;
    }
    return n;
}

bool dedup_index_collides(uint64_t a, uint64_t b)
{
    return shard_of(a) == shard_of(b) && tag_of(a) == tag_of(b);
}

uint64_t dedup_index_raw(uint64_t hash, const DedupHint *hint)
{
    return entry_encode(hash, hint);
}

/* Which of two entries of the same tag everybody prefers. */
static uint64_t preference(uint64_t entry)
{
    static const uint64_t rank[] = {
        [DEDUP_HINT_PUBLISHED] = 0,
        [DEDUP_HINT_CLAIMED] = 1,
        [DEDUP_HINT_CANDIDATE] = 2,
    };

    return rank[entry_kind(entry)] << 62 | (entry & WHERE_MASK);
}

unsigned dedup_index_lookup(const DedupIndex *index, uint64_t hash,
                            DedupHint hits[DEDUP_INDEX_HITS])
{
    uint64_t *line[2];
    unsigned lines = lines_of(index, hash, line);
    uint64_t best[DEDUP_INDEX_HITS + 1];
    unsigned n = 0;

    for (unsigned i = 0; i < lines * LINE_ENTRIES; i++) {
        uint64_t e = word(&line[i / LINE_ENTRIES][i % LINE_ENTRIES]);

        unsigned at = n;

        if (entry_tag(e) != tag_of(hash) ||
            entry_kind(e) == DEDUP_HINT_NONE) {
            continue;
        }
        while (at > 0 && preference(e) < preference(best[at - 1])) {
            best[at] = best[at - 1];
            at--;
        }
        best[at] = e;
        n = MIN(n + 1, DEDUP_INDEX_HITS);
    }
    for (unsigned i = 0; i < n; i++) {
        entry_decode(best[i], &hits[i]);
    }
    return n;
}

static bool change(const DedupIndex *index, uint64_t hash, uint64_t from,
                   uint64_t to)
{
    uint64_t *line[2];
    unsigned lines = lines_of(index, hash, line);

    for (unsigned i = 0; i < lines * LINE_ENTRIES; i++) {
        uint64_t *p = &line[i / LINE_ENTRIES][i % LINE_ENTRIES];

        if (word(p) == from && change_word(p, from, to)) {
            return true;
        }
    }
    return false;
}

bool dedup_index_replace(DedupIndex *index, uint64_t hash,
                         const DedupHint *old, const DedupHint *hint)
{
    return change(index, hash, old->raw, entry_encode(hash, hint));
}

bool dedup_index_remove(DedupIndex *index, uint64_t hash,
                        const DedupHint *old)
{
    if (!change(index, hash, old->raw, 0)) {
        return false;
    }
    shard_uncount(index, shard_of(hash));
    return true;
}

uint64_t dedup_index_bytes(const DedupIndex *index)
{
    uint64_t pages = 0;

    for (unsigned i = 0; i < SHARDS; i++) {
        pages += shard_pages(index, i);
    }
    return pages * DEDUP_PAGE_SIZE;
}

uint64_t dedup_index_growths(const DedupIndex *index)
{
    uint64_t growths = 0;

    for (unsigned i = 0; i < SHARDS; i++) {
        growths += word(&index->header->shard[i].growths);
    }
    return growths;
}
