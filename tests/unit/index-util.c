/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the tests of the index share; see index-util.h. */

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "index-util.h"

static void setup(Fixture *f, gconstpointer data)
{
    size_t size = HEADER_SIZE + dedup_index_table_size();

    g_assert_cmpuint(dedup_index_header_size(), <=, HEADER_SIZE);
    f->fd = memfd_create("test-index", MFD_CLOEXEC);
    g_assert_cmpint(f->fd, >=, 0);
    g_assert_cmpint(ftruncate(f->fd, size), ==, 0);
    f->header = mmap(NULL, HEADER_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                     f->fd, 0);
    f->table = mmap(NULL, dedup_index_table_size(), PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_NORESERVE, f->fd, HEADER_SIZE);
    g_assert_true(f->header != MAP_FAILED && f->table != MAP_FAILED);
    f->index = dedup_index_new(f->header, f->table, f->fd, HEADER_SIZE);
}

static void teardown(Fixture *f, gconstpointer data)
{
    dedup_index_free(f->index);
    munmap(f->table, dedup_index_table_size());
    munmap(f->header, HEADER_SIZE);
    close(f->fd);
}

uint64_t file_bytes(const Fixture *f)
{
    struct stat st;

    g_assert_cmpint(fstat(f->fd, &st), ==, 0);
    return (uint64_t)st.st_blocks * 512;
}

/* Number @i of a sequence of hashes: splitmix64. */
uint64_t hash_of(uint64_t i)
{
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

DedupHint candidate(uint32_t member, uint32_t page)
{
    return (DedupHint) {
        .kind = DEDUP_HINT_CANDIDATE, .where = member, .page = page
    };
}

DedupHint published(uint32_t gid, uint32_t page)
{
    return (DedupHint) {
        .kind = DEDUP_HINT_PUBLISHED, .where = gid, .page = page
    };
}

bool same(const DedupHint *a, const DedupHint *b)
{
    return a->kind == b->kind && a->where == b->where && a->page == b->page;
}

bool find(DedupIndex *index, uint64_t hash, const DedupHint *hint,
          DedupHint *found)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(index, hash, hits);

    for (unsigned i = 0; i < n; i++) {
        if (same(&hits[i], hint)) {
            if (found) {
                *found = hits[i];
            }
            return true;
        }
    }
    return false;
}

void index_add(const char *name, void (*fn)(Fixture *, gconstpointer))
{
    g_test_add(name, Fixture, NULL, setup, fn, teardown);
}
