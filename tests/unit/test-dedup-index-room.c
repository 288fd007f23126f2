/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of the room in the index: what takes memory for the table, and what
 * does not, whatever an enemy writes to its header.
 */

#include <fcntl.h>
#include <unistd.h>

#include "index-util.h"

/* An enemy says that the table has its full size. */
static void claim_full_size(const Fixture *f)
{
    uint64_t *header = f->header;
    size_t words = dedup_index_header_size() / sizeof(uint64_t);

    /* The first of the eight words of each shard is its number of pages. */
    for (size_t i = 0; i < words; i += 8) {
        header[i] = 65536;
    }
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
    index_add("/index-room/no-memory", test_no_memory);
    return g_test_run();
}
