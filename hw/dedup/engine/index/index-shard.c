/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Making room in the index: moving an entry to its other line, replacing a
 * candidate, and letting a shard grow; see index-shard.h.
 *
 * Threads: any, of any process.
 */

#include "index/index-shard.h"
#include "index/index-table.h"

/*
 * A shard grows by an eighth: by a quarter it would be emptier by a tenth in
 * the mean, and cost a byte more for each page.  The price is that an entry is
 * rehashed twice as often, once in the life of a page.  A small shard
 * grows by a page at a time.  Then the shards take different steps, so that
 * later on they grow at different times, and the table as a whole by little.
 */
#define SMALL_PAGES 16

bool dedup_line_replace(uint64_t *line, uint64_t entry, unsigned seed)
{
    for (unsigned i = 0; i < LINE_ENTRIES; i++) {
        uint64_t *p = &line[(seed + i) % LINE_ENTRIES];
        uint64_t e = word(p);

        if (entry_kind(e) != DEDUP_HINT_PUBLISHED &&
            change_word(p, e, entry)) {
            return true;
        }
    }
    return false;
}

/*
 * The entry that moves is there twice for a moment, and for good if somebody
 * changes the old one just then.
 */
bool dedup_line_displace(const DedupIndex *index, unsigned shard,
                         uint64_t at, uint64_t lines, uint64_t entry)
{
    uint64_t *line = line_at(index, shard, at);

    for (unsigned i = 0; line && i < LINE_ENTRIES; i++) {
        uint64_t e = word(&line[i]);
        uint64_t a = first_line(entry_tag(e), lines);
        uint64_t b = second_line(entry_tag(e), lines);
        uint64_t *to = line_for(index, shard, a == at ? b : a);

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
    uint64_t *a = line_for(index, shard, line);
    uint64_t *b;

    if (a && line_add(a, entry)) {
        return true;
    }
    b = line_for(index, shard, other);
    if (b && line_add(b, entry)) {
        return true;
    }
    if (dedup_line_displace(index, shard, line, lines, entry) ||
        dedup_line_displace(index, shard, other, lines, entry)) {
        return true;
    }
    if (entry_kind(entry) != DEDUP_HINT_PUBLISHED) {
        return false;
    }
    return (a && dedup_line_replace(a, entry, 0)) ||
           (b && dedup_line_replace(b, entry, 0));
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

        if (!line) {
            at -= at % PAGE_LINES; /* nor is there on the rest of its page */
        }
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

bool dedup_shard_grow(const DedupIndex *index, unsigned shard, uint64_t pages)
{
    Shard *s = &index->header->shard[shard];
    uint64_t base = (uint64_t)shard * SHARD_PAGES;
    uint64_t want;

    if (pages < SMALL_PAGES) {
        want = pages + 1;
    } else if (pages == SMALL_PAGES) {
        want = pages + 1 + shard % 4;
    } else {
        want = pages + pages / 8;
    }
    want = MIN(want, word(&index->limit));
    if (want <= pages ||
        !dedup_table_allocate(index, base + pages, want - pages)) {
        return shard_pages(index, shard) > pages;
    }
    if (__atomic_compare_exchange_n(&s->pages, &pages, want, false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_add(&s->growths, 1, __ATOMIC_RELAXED);
        rehash(index, shard, pages, want);
    }
    return true;
}

bool dedup_shard_overloaded(const DedupIndex *index, unsigned shard,
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
void dedup_shard_check_count(const DedupIndex *index, unsigned shard,
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
