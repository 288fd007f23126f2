/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of the room in the index: what takes memory for the table, and what
 * does not, whatever an enemy writes to its header; and the sweep, which
 * makes room.
 */

#include <fcntl.h>
#include <unistd.h>

#include "index-util.h"

/* An enemy says how many pages each shard has. */
static void set_pages(const Fixture *f, uint64_t pages)
{
    uint64_t *header = f->header;
    size_t words = dedup_index_header_size() / sizeof(uint64_t);

    /* The first of the eight words of each shard is its number of pages. */
    for (size_t i = 0; i < words; i += 8) {
        header[i] = pages;
    }
}

static void claim_full_size(const Fixture *f)
{
    set_pages(f, 65536);
}

/* Whatever the header says: who only looks takes no memory. */
static void test_lookup_takes_none(Fixture *f, gconstpointer data)
{
    DedupIndex *other = dedup_index_new(f->header, f->table, f->fd,
                                        HEADER_SIZE);
    DedupHint hint, found;
    uint64_t before;

    /* What one process stored, another one finds. */
    for (unsigned i = 0; i < 1000; i++) {
        hint = candidate(1, i);
        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
    }
    before = file_bytes(f);
    for (unsigned i = 0; i < 1000; i++) {
        hint = candidate(1, i);
        g_assert_true(find(other, hash_of(i), &hint, &found));
    }
    claim_full_size(f);
    for (unsigned i = 0; i < 50000 / SCALE; i++) {
        DedupHint to = candidate(2, i);

        hint = candidate(1, i);
        hint.raw = dedup_index_raw(hash_of(i), &hint);
        find(other, hash_of(i), &hint, NULL);
        dedup_index_replace(other, hash_of(i), &hint, &to);
        dedup_index_remove(other, hash_of(i), &hint);
    }
    g_assert_cmpuint(file_bytes(f), ==, before);
    dedup_index_free(other);
}

/* Entries, and pages of a shard that this lets it grow to. */
#define LIMIT (128 * 1024)
#define LIMIT_PAGES 20

/* Inserting takes memory in bounds, whatever the header says. */
static void test_insert_in_bounds(Fixture *f, gconstpointer data)
{
    unsigned inserted = 0;

    dedup_index_set_limit(f->index, LIMIT);
    claim_full_size(f);
    for (unsigned i = 0; i < 50000 / SCALE; i++) {
        DedupHint hint = candidate(1, i);

        inserted += dedup_index_insert(f->index, hash_of(i), &hint);
    }
    g_assert_cmpuint(inserted, >, 0);
    g_assert_cmpuint(file_bytes(f), <=,
                     HEADER_SIZE + 2 * 16 * LIMIT_PAGES * DEDUP_PAGE_SIZE);

    /* The shards grow from whatever size is said, not beyond the limit. */
    for (unsigned round = 0; round < 40; round++) {
        set_pages(f, round % LIMIT_PAGES);
        for (unsigned i = 0; i < 10000 / SCALE; i++) {
            DedupHint hint = candidate(1, i);

            dedup_index_insert(f->index, hash_of(round * 10000 + i), &hint);
        }
    }
    g_assert_cmpuint(dedup_index_bytes(f->index), <=,
                     16 * LIMIT_PAGES * DEDUP_PAGE_SIZE);
    g_assert_cmpuint(file_bytes(f), <=,
                     HEADER_SIZE + 3 * 16 * LIMIT_PAGES * DEDUP_PAGE_SIZE);
}

/* Each shard grows to the limit, of which all is of use, and no further. */
static void test_all_of_limit(Fixture *f, gconstpointer data)
{
    dedup_index_set_limit(f->index, LIMIT);
    for (unsigned i = 0; i < 2 * LIMIT; i++) {
        DedupHint hint = candidate(1, i);

        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
    }
    g_assert_cmpuint(dedup_index_bytes(f->index), ==,
                     16 * LIMIT_PAGES * DEDUP_PAGE_SIZE);
}

/* A limit of 0: nothing is allocated, what is there goes on working. */
static void test_no_more(Fixture *f, gconstpointer data)
{
    DedupIndex *other = dedup_index_new(f->header, f->table, f->fd,
                                        HEADER_SIZE);
    DedupHint hint = candidate(1, 0);
    uint64_t before;

    dedup_index_set_limit(other, 0);
    g_assert_false(dedup_index_insert(other, hash_of(0), &hint));
    g_assert_cmpuint(file_bytes(f), <=, HEADER_SIZE);

    for (unsigned i = 0; i < 20000; i++) {
        hint = candidate(1, i);
        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
    }
    before = file_bytes(f);
    for (unsigned i = 0; i < 100000 / SCALE; i++) {
        hint = candidate(2, i);
        g_assert_true(dedup_index_insert(other, hash_of(20000 + i), &hint));
        g_assert_true(i % 16 || find(other, hash_of(20000 + i), &hint, NULL));
    }
    g_assert_cmpuint(file_bytes(f), ==, before);
    g_assert_cmpuint(dedup_index_bytes(f->index), <=, before);
    claim_full_size(f);
    for (unsigned i = 0; i < 20000 / SCALE; i++) {
        hint = candidate(3, i);
        dedup_index_insert(other, hash_of(i), &hint);
    }
    g_assert_cmpuint(file_bytes(f), ==, before);

    /* It is said again that it may grow. */
    set_pages(f, 1);
    dedup_index_set_limit(other, 1 << 20);
    for (unsigned i = 0; i < 100000; i++) {
        hint = candidate(4, i);
        g_assert_true(dedup_index_insert(other, hash_of(i), &hint));
    }
    g_assert_cmpuint(file_bytes(f), >, before);
    dedup_index_free(other);
}

/* Without memory for the table an insert says so, and nothing crashes. */
static void test_no_memory(Fixture *f, gconstpointer data)
{
    DedupHint hint = candidate(0, 0), hits[DEDUP_INDEX_HITS];
    /* fallocate() fails on a descriptor that cannot be written to. */
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", f->fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    DedupIndex *index;

    g_assert_cmpint(fd, >=, 0);
    index = dedup_index_new(f->header, f->table, fd, HEADER_SIZE);
    g_assert_false(dedup_index_insert(index, hash_of(0), &hint));
    g_assert_cmpuint(dedup_index_lookup(index, hash_of(0), hits), ==, 0);
    /* What another process had memory for is found. */
    g_assert_true(dedup_index_insert(f->index, hash_of(0), &hint));
    g_assert_cmpuint(dedup_index_lookup(index, hash_of(0), hits), ==, 1);
    dedup_index_free(index);
    close(fd);
}

/* Segments with a gid below this are gone. */
#define GONE 1000

typedef struct Judge {
    unsigned asked;
    unsigned stale;
} Judge;

static bool is_gone(void *opaque, const DedupHint *hint)
{
    Judge *judge = opaque;
    bool gone = hint->kind == DEDUP_HINT_PUBLISHED && hint->where < GONE;

    g_assert_cmpint(hint->kind, !=, DEDUP_HINT_NONE);
    judge->asked++;
    judge->stale += gone;
    return gone;
}

static uint64_t table_pages(const Fixture *f)
{
    return dedup_index_bytes(f->index) / DEDUP_PAGE_SIZE;
}

/* Each page once, then from the beginning again. */
static void test_sweep_around(Fixture *f, gconstpointer data)
{
    const unsigned n = 100000 / SCALE;
    DedupIndex *other = dedup_index_new(f->header, f->table, f->fd,
                                        HEADER_SIZE);
    uint64_t cursor = 0, pages;
    Judge judge;

    for (unsigned i = 0; i < n; i++) {
        DedupHint hint = candidate(1, i);

        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
    }
    pages = table_pages(f);
    for (unsigned step = 1; step <= 7; step += 2) {
        judge = (Judge) { 0 };
        for (uint64_t left = pages; left; left -= MIN(left, step)) {
            dedup_index_sweep(step == 3 ? other : f->index, &cursor,
                              MIN(left, step), is_gone, &judge);
        }
        /* a hint or two may be there twice, or lost */
        g_assert_cmpuint(judge.asked, >, n - n / 1000);
        g_assert_cmpuint(judge.asked, <, n + n / 1000);
    }
    /* All that there is, however much is asked for. */
    judge = (Judge) { 0 };
    dedup_index_sweep(f->index, &cursor, 10 * pages, is_gone, &judge);
    g_assert_cmpuint(judge.asked, >, n - n / 1000);
    g_assert_cmpuint(judge.asked, <, n + n / 1000);
    dedup_index_free(other);
}

static DedupHint segment_page(uint32_t first_gid, unsigned i)
{
    return published(first_gid + i % GONE, i % 512);
}

/*
 * VMs have come and gone: the table is full of published hints, which no
 * insert replaces.  After a sweep it takes new ones, and has lost no other.
 */
static void test_sweep_makes_room(Fixture *f, gconstpointer data)
{
    const unsigned live = 2000, fresh = 20000;
    unsigned full = 0, refused = 0, found = 0, i;
    uint64_t cursor = 0, pages;
    Judge judge = { 0 };
    DedupHint hint;

    dedup_index_set_limit(f->index, LIMIT / 2);
    for (i = 0; i < live; i++) {
        hint = segment_page(GONE, i);
        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
    }
    for (; full < 1000; i++) {
        hint = segment_page(0, i);
        full += !dedup_index_insert(f->index, hash_of(i), &hint);
    }
    for (unsigned j = i; j < i + fresh; j++) {
        hint = segment_page(2 * GONE, j);
        refused += !dedup_index_insert(f->index, hash_of(j), &hint);
    }
    g_test_message("%u of %u hints refused", refused, fresh);
    g_assert_cmpuint(refused, >, fresh / 10);

    pages = table_pages(f);
    for (uint64_t swept = 0; swept < pages; swept += 16) {
        unsigned before = judge.stale;
        unsigned removed = dedup_index_sweep(f->index, &cursor, 16, is_gone,
                                             &judge);

        g_assert_cmpuint(removed, ==, judge.stale - before);
    }
    g_assert_cmpuint(judge.stale, >, LIMIT / 4);
    for (unsigned j = i; j < i + fresh; j++) {
        hint = segment_page(2 * GONE, j);
        g_assert_true(dedup_index_insert(f->index, hash_of(j), &hint));
        found += find(f->index, hash_of(j), &hint, NULL);
    }
    g_assert_cmpuint(found, ==, fresh);
    found = 0;
    for (unsigned j = 0; j < live; j++) {
        hint = segment_page(GONE, j);
        found += find(f->index, hash_of(j), &hint, NULL);
    }
    g_assert_cmpuint(found, >, live - live / 100);
}

/* Header, cursor and table are nonsense: bounded work, and no memory. */
static void test_sweep_garbage(Fixture *f, gconstpointer data)
{
    static const uint64_t no_hints[] = { 1, UINT64_MAX >> 2 };
    static const uint64_t sizes[] = {
        0, 1, 70, 65536, 1ull << 40, UINT64_MAX
    };
    uint64_t cursor = 0, before;
    Judge judge = { 0 };

    for (unsigned i = 0; i < 5000; i++) {
        DedupHint hint = candidate(1, i);

        g_assert_true(dedup_index_insert(f->index, hash_of(i), &hint));
    }
    before = file_bytes(f);
    for (unsigned i = 0; i < G_N_ELEMENTS(sizes); i++) {
        set_pages(f, sizes[i]);
        for (unsigned j = 0; j < 64; j++) {
            judge = (Judge) { 0 };
            cursor = j % 2 ? cursor : hash_of(j);
            dedup_index_sweep(f->index, &cursor, 20, is_gone, &judge);
            g_assert_cmpuint(judge.asked, <=, 20 * 512);
            g_assert_true(sizes[i] || !judge.asked);
        }
    }
    g_assert_cmpuint(file_bytes(f), ==, before);

    /* What is no hint and not free either goes unasked. */
    set_pages(f, 1);
    cursor = 0;
    g_assert_cmpint(pwrite(f->fd, no_hints, sizeof(no_hints), HEADER_SIZE),
                    ==, sizeof(no_hints));
    g_assert_cmpuint(dedup_index_sweep(f->index, &cursor, 1, is_gone,
                                       &judge), ==, G_N_ELEMENTS(no_hints));
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    index_add("/index-room/lookup-takes-none", test_lookup_takes_none);
    index_add("/index-room/insert-in-bounds", test_insert_in_bounds);
    index_add("/index-room/all-of-limit", test_all_of_limit);
    index_add("/index-room/no-more", test_no_more);
    index_add("/index-room/no-memory", test_no_memory);
    index_add("/index-room/sweep-around", test_sweep_around);
    index_add("/index-room/sweep-makes-room", test_sweep_makes_room);
    index_add("/index-room/sweep-garbage", test_sweep_garbage);
    return g_test_run();
}
