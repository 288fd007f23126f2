/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The table of the index: its layout, how its entries and lines are read and
 * written, and which of its pages have memory.  The terms are explained in
 * index.c.  Above it are index-shard.c (the size of a shard), index.c (the
 * hints) and index-sweep.c; nothing outside this folder includes this.
 *
 * Owner: a DedupIndex belongs to whoever made it by dedup_index_new(); the
 * header and the table are all members'.
 * Threads: any, of any process.  All shared words are accessed with atomics.
 */

#ifndef DEDUP_INDEX_TABLE_H
#define DEDUP_INDEX_TABLE_H

#include <glib.h>

#include "host/page.h"
#include "index/index.h"

#define SHARDS 16
#define LINE_ENTRIES 8
#define PAGE_LINES (DEDUP_PAGE_SIZE / (LINE_ENTRIES * sizeof(uint64_t)))
#define PAGE_ENTRIES (PAGE_LINES * LINE_ENTRIES)
#define SHARD_PAGES 65536u      /* at most: 256 MiB */

#define TAG_BITS 24
#define WHERE_BITS 38
#define TAG_MASK ((1u << TAG_BITS) - 1)
#define WHERE_MASK ((1ull << WHERE_BITS) - 1)

/*
 * A shard grows when more than this share of its entries is in use.  The
 * unit test measures what it costs: bytes per entry and hints lost.
 */
#define LOAD_NUM 57
#define LOAD_DEN 64

typedef struct Shard {
    uint64_t pages;             /* in use; grows only */
    uint64_t count;             /* entries, about */
    uint64_t growths;
    uint64_t spare[5];          /* a cache line each */
} Shard;

struct DedupIndexHeader {
    Shard shard[SHARDS];
};

/*
 * Pages of the table that this process knows to have memory: a bit each.  Set
 * late or twice costs a system call, nothing else.
 */
typedef struct Backed {
    uint64_t pages;             /* bits that are set */
    uint64_t bits[SHARDS * SHARD_PAGES / 64];
} Backed;

struct DedupIndex {
    DedupIndexHeader *header;
    uint64_t *table;
    int fd;
    uint64_t offset;
    uint64_t limit;             /* pages that a shard may grow to */
    Backed *backed;
};

static inline uint64_t word(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline bool change_word(uint64_t *p, uint64_t from, uint64_t to)
{
    return __atomic_compare_exchange_n(p, &from, to, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

static inline unsigned shard_of(uint64_t hash)
{
    return hash >> 60;
}

static inline uint32_t tag_of(uint64_t hash)
{
    return (hash >> 36) & TAG_MASK;
}

static inline DedupHintKind entry_kind(uint64_t entry)
{
    return entry >> 62;
}

static inline uint32_t entry_tag(uint64_t entry)
{
    return (entry >> WHERE_BITS) & TAG_MASK;
}

/* Candidates and claims name a member's page, published hints a segment's. */
static inline unsigned page_bits(DedupHintKind kind)
{
    return kind == DEDUP_HINT_PUBLISHED ? DEDUP_GID_PAGE_BITS
                                        : DEDUP_MEMBER_PAGE_BITS;
}

/* The hint that an entry stands for, with whatever numbers it has. */
static inline void entry_decode(uint64_t entry, DedupHint *hint)
{
    unsigned bits = page_bits(entry_kind(entry));
    uint64_t where = entry & WHERE_MASK;

    hint->kind = entry_kind(entry);
    hint->where = where >> bits;
    hint->page = where & ((1u << bits) - 1);
    hint->raw = entry;
}

/* A bijection on tags, so that the second line says nothing of the first. */
static inline uint32_t mix(uint32_t tag)
{
    tag ^= tag >> 11;
    tag = (tag * 0x9e3779b1u) & TAG_MASK;
    tag ^= tag >> 13;
    tag = (tag * 0x85ebca6bu) & TAG_MASK;
    return tag ^ tag >> 12;
}

static inline uint64_t first_line(uint32_t tag, uint64_t lines)
{
    return (tag * lines) >> TAG_BITS;
}

static inline uint64_t second_line(uint32_t tag, uint64_t lines)
{
    return (mix(tag) * lines) >> TAG_BITS;
}

static inline uint64_t shard_pages(const DedupIndex *index, unsigned shard)
{
    return MIN(word(&index->header->shard[shard].pages), SHARD_PAGES);
}

/* An entry less. */
static inline void shard_uncount(const DedupIndex *index, unsigned shard)
{
    uint64_t *count = &index->header->shard[shard].count;

    /* Never below 0: that would read as a full shard. */
    if ((int64_t)__atomic_sub_fetch(count, 1, __ATOMIC_RELAXED) < 0) {
        __atomic_store_n(count, 0, __ATOMIC_RELAXED);
    }
}

/* Pages of the table are numbered from the first one of the first shard. */
static inline uint64_t page_of(unsigned shard, uint64_t line)
{
    return (uint64_t)shard * SHARD_PAGES + line / PAGE_LINES;
}

static inline bool is_backed(const DedupIndex *index, uint64_t page)
{
    return word(&index->backed->bits[page / 64]) & 1ull << page % 64;
}

/*
 * Are there entries on a page that is not known to be backed?  Takes no
 * memory for it.
 */
bool dedup_table_look(const DedupIndex *index, uint64_t page);
/* Give memory to @n pages from @page on: those that a shard grows by. */
bool dedup_table_allocate(const DedupIndex *index, uint64_t page,
                          uint64_t n);
/*
 * Make sure that a page that is not known to be backed is.  False: there is
 * no memory for it, or we took as much as the limit lets us.
 */
bool dedup_table_take(const DedupIndex *index, uint64_t page);

static inline uint64_t *line_address(const DedupIndex *index, unsigned shard,
                                     uint64_t line)
{
    return index->table + ((uint64_t)shard * SHARD_PAGES * PAGE_LINES + line) *
                          LINE_ENTRIES;
}

/* Line @line of @shard, or NULL: there is nothing on all of its page. */
static inline uint64_t *line_at(const DedupIndex *index, unsigned shard,
                                uint64_t line)
{
    uint64_t page = page_of(shard, line);

    if (!is_backed(index, page) && !dedup_table_look(index, page)) {
        return NULL;
    }
    return line_address(index, shard, line);
}

/* The same for storing; NULL: there is and will be no memory for it. */
static inline uint64_t *line_for(const DedupIndex *index, unsigned shard,
                                 uint64_t line)
{
    uint64_t page = page_of(shard, line);

    if (!is_backed(index, page) && !dedup_table_take(index, page)) {
        return NULL;
    }
    return line_address(index, shard, line);
}

/* Free entries of a line, and whether @entry is there already. */
static inline unsigned line_free(const uint64_t *line, uint64_t entry,
                                 bool *found)
{
    unsigned n = 0;

    for (unsigned i = 0; i < LINE_ENTRIES; i++) {
        uint64_t e = word(&line[i]);

        n += e == 0;
        *found |= e == entry;
    }
    return n;
}

static inline bool line_add(uint64_t *line, uint64_t entry)
{
    for (unsigned i = 0; i < LINE_ENTRIES; i++) {
        if (word(&line[i]) == 0 && change_word(&line[i], 0, entry)) {
            return true;
        }
    }
    return false;
}

#endif /* DEDUP_INDEX_TABLE_H */
