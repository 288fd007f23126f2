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
 *           its own, by a quarter
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
 *     counting; an enemy writes to it).  Each rehash counts anew, and an
 *     insert that finds both its lines full samples the shard.
 *   - Garbage in the header: the number of pages is clamped to the size of
 *     the mapping, and table pages are allocated with fallocate() by whoever
 *     touches them first, so a lack of memory is an error and no SIGBUS.
 *
 * Threads: any, of any process.  All shared words are accessed with atomics.
 */

#include <fcntl.h>
#include <glib.h>

#include "index.h"
#include "page.h"

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

/*
 * A shard grows by a quarter: by an eighth each entry would be rehashed
 * twice as often, and that is most of what an insert costs.  A small shard
 * grows by a page at a time.  Then the shards take different steps, so that
 * later on they grow at different times, and the table as a whole by little.
 */
#define SMALL_PAGES 16

/* Attempts of an insert before it gives in to the others. */
#define ATTEMPTS 16

typedef struct Shard {
    uint64_t pages;             /* in use; grows only */
    uint64_t count;             /* entries, about */
    uint64_t growths;
    uint64_t spare[5];          /* a cache line each */
} Shard;

struct DedupIndexHeader {
    Shard shard[SHARDS];
};

struct DedupIndex {
    DedupIndexHeader *header;
    uint64_t *table;
    int fd;
    uint64_t offset;
    uint64_t limit;             /* pages that a shard may grow to */
    /*
     * One bit per page of the table: this process knows that it is
     * allocated.  Set late or twice costs a system call, nothing else.
     */
    uint64_t *backed;
};

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
    index->backed = g_new0(uint64_t, SHARDS * SHARD_PAGES / 64);
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
    pages += pages / 8 + 1;
    __atomic_store_n(&index->limit, MIN(pages, SHARD_PAGES),
                     __ATOMIC_RELAXED);
}

static uint64_t word(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static bool change_word(uint64_t *p, uint64_t from, uint64_t to)
{
    return __atomic_compare_exchange_n(p, &from, to, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

static unsigned shard_of(uint64_t hash)
{
    return hash >> 60;
}

static uint32_t tag_of(uint64_t hash)
{
    return (hash >> 36) & TAG_MASK;
}

static DedupHintKind entry_kind(uint64_t entry)
{
    return entry >> 62;
}

static uint32_t entry_tag(uint64_t entry)
{
    return (entry >> WHERE_BITS) & TAG_MASK;
}

/* Candidates and claims name a member's page, published hints a segment's. */
static unsigned page_bits(DedupHintKind kind)
{
    return kind == DEDUP_HINT_PUBLISHED ? DEDUP_GID_PAGE_BITS
                                        : DEDUP_MEMBER_PAGE_BITS;
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

static void entry_decode(uint64_t entry, DedupHint *hint)
{
    unsigned bits = page_bits(entry_kind(entry));
    uint64_t where = entry & WHERE_MASK;

    hint->kind = entry_kind(entry);
    hint->where = where >> bits;
    hint->page = where & ((1u << bits) - 1);
    hint->raw = entry;
}

/* A bijection on tags, so that the second line says nothing of the first. */
static uint32_t mix(uint32_t tag)
{
    tag ^= tag >> 11;
    tag = (tag * 0x9e3779b1u) & TAG_MASK;
    tag ^= tag >> 13;
    tag = (tag * 0x85ebca6bu) & TAG_MASK;
    return tag ^ tag >> 12;
}

static uint64_t first_line(uint32_t tag, uint64_t lines)
{
    return (tag * lines) >> TAG_BITS;
}

static uint64_t second_line(uint32_t tag, uint64_t lines)
{
    return (mix(tag) * lines) >> TAG_BITS;
}

static uint64_t shard_pages(const DedupIndex *index, unsigned shard)
{
    return MIN(word(&index->header->shard[shard].pages), SHARD_PAGES);
}

static bool allocate(const DedupIndex *index, uint64_t page, uint64_t n)
{
    uint64_t at = index->offset + page * DEDUP_PAGE_SIZE;

    return fallocate(index->fd, 0, at, n * DEDUP_PAGE_SIZE) == 0;
}

/* Line @line of @shard, or NULL if there is no memory for it. */
static uint64_t *line_at(const DedupIndex *index, unsigned shard,
                         uint64_t line)
{
    uint64_t page = (uint64_t)shard * SHARD_PAGES + line / PAGE_LINES;
    uint64_t *bits = &index->backed[page / 64];
    uint64_t bit = 1ull << page % 64;

    if (!(word(bits) & bit)) {
        if (!allocate(index, page, 1)) {
            return NULL;
        }
        __atomic_fetch_or(bits, bit, __ATOMIC_RELAXED);
    }
    return index->table + ((uint64_t)shard * SHARD_PAGES * PAGE_LINES + line) *
                          LINE_ENTRIES;
}

/* Free entries of a line, and whether @entry is there already. */
static unsigned line_free(const uint64_t *line, uint64_t entry, bool *found)
{
    unsigned n = 0;

    for (unsigned i = 0; i < LINE_ENTRIES; i++) {
        uint64_t e = word(&line[i]);

        n += e == 0;
        *found |= e == entry;
    }
    return n;
}

static bool line_add(uint64_t *line, uint64_t entry)
{
    for (unsigned i = 0; i < LINE_ENTRIES; i++) {
        if (word(&line[i]) == 0 && change_word(&line[i], 0, entry)) {
            return true;
        }
    }
    return false;
}

/*
 * Put @entry in the place of one that is no published hint, beginning at a
 * place that @seed chooses.
 */
static bool line_replace(uint64_t *line, uint64_t entry, unsigned seed)
{
    for (unsigned i = 0; i < LINE_ENTRIES; i++) {
        uint64_t *p = &line[(seed + i) % LINE_ENTRIES];
        uint64_t e = word(p);

        if (entry_kind(e) != DEDUP_HINT_PUBLISHED && change_word(p, e, entry)) {
            return true;
        }
    }
    return false;
}

/*
 * Makes room in line @at, which is full: one of its entries moves to the
 * other line where it may be, if there is room.  The entry is there twice
 * for a moment, and for good if somebody changes the old one just then.
 */
static bool line_displace(const DedupIndex *index, unsigned shard,
                          uint64_t at, uint64_t lines, uint64_t entry)
{
    uint64_t *line = line_at(index, shard, at);

    for (unsigned i = 0; line && i < LINE_ENTRIES; i++) {
        uint64_t e = word(&line[i]);
        uint64_t a = first_line(entry_tag(e), lines);
        uint64_t b = second_line(entry_tag(e), lines);
        uint64_t *to = line_at(index, shard, a == at ? b : a);

        if (to && to != line && line_add(to, e) &&
            change_word(&line[i], e, entry)) {
            return true;
        }
    }
    return false;
}

/* The line that @tag goes to if it was found in line @at of @old_lines. */
static uint64_t rehash_line(uint32_t tag, uint64_t at, uint64_t old_lines,
                            uint64_t lines, uint64_t *other)
{
    uint64_t a = first_line(tag, lines), b = second_line(tag, lines);
    bool first = first_line(tag, old_lines) == at;

    *other = first ? b : a;
    return first ? a : b;
}

static bool rehash_store(const DedupIndex *index, unsigned shard,
                         uint64_t entry, uint64_t line, uint64_t other,
                         uint64_t lines)
{
    uint64_t *a = line_at(index, shard, line);
    uint64_t *b;

    if (a && line_add(a, entry)) {
        return true;
    }
    b = line_at(index, shard, other);
    if (b && line_add(b, entry)) {
        return true;
    }
    if (line_displace(index, shard, line, lines, entry) ||
        line_displace(index, shard, other, lines, entry)) {
        return true;
    }
    if (entry_kind(entry) != DEDUP_HINT_PUBLISHED) {
        return false;
    }
    return (a && line_replace(a, entry, 0)) ||
           (b && line_replace(b, entry, 0));
}

/*
 * Move every entry to where it belongs now that @shard has @pages pages.
 * Called by the one that changed the number from @old_pages.  When somebody
 * changes it again meanwhile, that one's rehash does all of the work.
 */
static void rehash(const DedupIndex *index, unsigned shard,
                   uint64_t old_pages, uint64_t pages)
{
    Shard *s = &index->header->shard[shard];
    uint64_t old_lines = old_pages * PAGE_LINES;
    uint64_t lines = pages * PAGE_LINES;
    uint64_t counted = word(&s->count);
    uint64_t seen = 0;

    for (uint64_t at = old_lines; at-- > 0;) {
        uint64_t *line = line_at(index, shard, at);

        if (at % PAGE_LINES == 0 && word(&s->pages) != pages) {
            return;
        }
        if (!line) {
            continue;
        }
        for (unsigned i = 0; i < LINE_ENTRIES; i++) {
            uint64_t entry = word(&line[i]);
            uint64_t to, other;

            if (entry == 0) {
                continue;
            }
            to = rehash_line(entry_tag(entry), at, old_lines, lines, &other);
            if (to == at) {
                seen++;
                continue;
            }
            /* Somebody may have changed it since it was read. */
            entry = __atomic_exchange_n(&line[i], 0, __ATOMIC_SEQ_CST);
            if (entry_kind(entry) == DEDUP_HINT_NONE) {
                continue;
            }
            to = rehash_line(entry_tag(entry), at, old_lines, lines, &other);
            seen += rehash_store(index, shard, entry, to, other, lines);
        }
    }
    /* What the others added since is in the difference. */
    __atomic_fetch_add(&s->count, seen - counted, __ATOMIC_SEQ_CST);
}

/* Returns false if @shard has no more than @pages pages and cannot grow. */
static bool grow(const DedupIndex *index, unsigned shard, uint64_t pages)
{
    Shard *s = &index->header->shard[shard];
    uint64_t base = (uint64_t)shard * SHARD_PAGES;
    uint64_t want;

    if (pages < SMALL_PAGES) {
        want = pages + 1;
    } else if (pages == SMALL_PAGES) {
        want = pages + 1 + shard % 4;
    } else {
        want = pages + pages / 4;
    }
    want = MIN(want, word(&index->limit));
    if (want <= pages || !allocate(index, base + pages, want - pages)) {
        return shard_pages(index, shard) > pages;
    }
    if (__atomic_compare_exchange_n(&s->pages, &pages, want, false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_add(&s->growths, 1, __ATOMIC_RELAXED);
        rehash(index, shard, pages, want);
    }
    return true;
}

/* Should it grow, and may it? */
static bool overloaded(const DedupIndex *index, unsigned shard,
                       uint64_t pages)
{
    uint64_t count = word(&index->header->shard[shard].count);

    return count >= pages * PAGE_ENTRIES * LOAD_NUM / LOAD_DEN &&
           pages < word(&index->limit);
}

/*
 * Look whether the count is right, by a sample of the lines: before a shard
 * grows, and when there is no room for an entry, which is rare below the
 * load at which a shard grows.
 */
static void check_count(const DedupIndex *index, unsigned shard,
                        uint64_t pages, uint32_t tag)
{
    enum { SAMPLE = 32 };
    uint64_t *count = &index->header->shard[shard].count;
    uint64_t lines = pages * PAGE_LINES;
    uint64_t used = 0, estimate;

    for (unsigned i = 0; i < SAMPLE; i++) {
        uint32_t t = mix(tag + i * (TAG_MASK / SAMPLE));
        uint64_t *line = line_at(index, shard, first_line(t, lines));
        bool found = false;

        used += line ? LINE_ENTRIES - line_free(line, 0, &found) : 0;
    }
    estimate = used * pages * PAGE_ENTRIES / (SAMPLE * LINE_ENTRIES);
    /* A sample is rough: believe it only if it says something new. */
    if (estimate > word(count) / 4 * 5 || estimate < word(count) / 4 * 3) {
        __atomic_store_n(count, estimate, __ATOMIC_SEQ_CST);
    }
}

/* The count says that it is time to grow. */
static void grow_if_overloaded(const DedupIndex *index, unsigned shard,
                               uint64_t pages, uint32_t tag)
{
    if (pages) {
        check_count(index, shard, pages, tag);
    }
    if (overloaded(index, shard, pages)) {
        grow(index, shard, pages);
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

        if (overloaded(index, shard, pages)) {
            grow_if_overloaded(index, shard, pages, tag);
            pages = shard_pages(index, shard);
        }
        if (pages == 0) {
            return false;
        }
        lines = pages * PAGE_LINES;
        at = first_line(tag, lines);
        bt = second_line(tag, lines);
        a = line_at(index, shard, at);
        b = line_at(index, shard, bt);
        if (!a || !b) {
            return false;
        }
        free_a = line_free(a, entry, &found);
        free_b = line_free(b, entry, &found);
        if (found) {
            return true;
        }
        if (line_add(free_b > free_a ? b : a, entry) ||
            line_displace(index, shard, at, lines, entry) ||
            line_displace(index, shard, bt, lines, entry)) {
            __atomic_fetch_add(&index->header->shard[shard].count, 1,
                               __ATOMIC_RELAXED);
            return true;
        }
        if (pages < word(&index->limit)) {
            check_count(index, shard, pages, tag);
            if (overloaded(index, shard, pages) &&
                grow(index, shard, pages)) {
                continue;
            }
        }
        /* The bits of the hash below the tag choose the victim. */
        if (line_replace(hash & 8 ? a : b, entry, hash) ||
            line_replace(hash & 8 ? b : a, entry, hash)) {
            return true;
        }
        if (!grow(index, shard, pages)) {
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

/* The lines of @hash: 0, 1 or 2. */
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
    Shard *s = &index->header->shard[shard_of(hash)];

    if (!change(index, hash, old->raw, 0)) {
        return false;
    }
    /* Never below 0: that would read as a full shard. */
    if ((int64_t)__atomic_sub_fetch(&s->count, 1, __ATOMIC_RELAXED) < 0) {
        __atomic_store_n(&s->count, 0, __ATOMIC_RELAXED);
    }
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
