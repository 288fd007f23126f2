/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the tests of the index share: an index in a file of its own. */

#ifndef INDEX_UTIL_H
#define INDEX_UTIL_H

#include <glib.h>

#include "host/page.h"
#include "index/index.h"

#define HEADER_SIZE DEDUP_PAGE_SIZE

/* Less of everything where every access is checked. */
#ifdef CONFIG_FX_SANITIZED
#define SCALE 8
#else
#define SCALE 1
#endif

typedef struct Fixture {
    int fd;
    void *header;
    void *table;
    DedupIndex *index;
} Fixture;

/* g_test_add() of a test that gets an empty index. */
void index_add(const char *name, void (*fn)(Fixture *, gconstpointer));

/* Memory that the file has. */
uint64_t file_bytes(const Fixture *f);

/* Number @i of a sequence of hashes. */
uint64_t hash_of(uint64_t i);

DedupHint candidate(uint32_t member, uint32_t page);
DedupHint published(uint32_t gid, uint32_t page);
bool same(const DedupHint *a, const DedupHint *b);

/* Does a lookup of @hash find @hint?  As it was read into @found, or NULL. */
bool find(DedupIndex *index, uint64_t hash, const DedupHint *hint,
          DedupHint *found);

#endif /* INDEX_UTIL_H */
