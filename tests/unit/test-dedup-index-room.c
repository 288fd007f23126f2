/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of the room in the index: what takes memory for the table, and what
 * does not, whatever an enemy writes to its header.
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

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    index_add("/index-room/lookup-takes-none", test_lookup_takes_none);
    index_add("/index-room/insert-in-bounds", test_insert_in_bounds);
    index_add("/index-room/all-of-limit", test_all_of_limit);
    index_add("/index-room/no-more", test_no_more);
    index_add("/index-room/no-memory", test_no_memory);
    return g_test_run();
}
