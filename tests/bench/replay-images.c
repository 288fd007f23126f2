/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The offline count; see replay-images.h.
 *
 * Contents count as equal if their 128-bit XXH3 is equal.
 */

#include <fcntl.h>
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#include "replay-images.h"

#define PAGE 4096

typedef struct Content {
    XXH128_hash_t hash;       /* first: the key */
    uint64_t where;           /* number of the page that had it first */
} Content;

static guint content_hash(gconstpointer key)
{
    return ((const Content *)key)->hash.low64;
}

static gboolean content_equal(gconstpointer a, gconstpointer b)
{
    return XXH128_isEqual(((const Content *)a)->hash,
                          ((const Content *)b)->hash);
}

typedef struct Counting {
    ReplayCount *count;
    GHashTable *contents;     /* of Content, by itself */
    uint64_t place;           /* number of the page that is looked at */
    uint64_t last_place;      /* of the last page that can be merged... */
    uint64_t last_where;      /* ...and where its content was first */
} Counting;

static void count_page(Counting *c, const uint8_t *page)
{
    static const uint8_t zeroes[PAGE];
    Content key = { .where = c->place };
    Content *known;

    c->count->present++;
    if (memcmp(page, zeroes, PAGE) == 0) {
        c->count->zero++;
        return;
    }
    key.hash = XXH3_128bits(page, PAGE);
    known = g_hash_table_lookup(c->contents, &key);
    if (!known) {
        known = g_memdup2(&key, sizeof(key));
        g_hash_table_add(c->contents, known);
        c->count->distinct++;
        return;
    }
    c->count->runs += c->place != c->last_place + 1 ||
                      known->where != c->last_where + 1;
    c->last_place = c->place;
    c->last_where = known->where;
}

static void count_image(Counting *c, const char *image, uint64_t base)
{
    uint8_t page[PAGE];
    int fd = open(image, O_RDONLY | O_CLOEXEC);
    off_t hole = 0;

    if (fd < 0) {
        perror(image);
        exit(2);
    }
    for (off_t at; (at = lseek(fd, hole, SEEK_DATA)) >= 0;) {
        hole = lseek(fd, at, SEEK_HOLE);
        for (; at < hole && pread(fd, page, PAGE, at) == PAGE; at += PAGE) {
            c->place = base + at / PAGE;
            count_page(c, page);
        }
    }
    close(fd);
}

void replay_images_count(const char *const *images, unsigned n,
                         ReplayCount *count)
{
    Counting c = {
        .count = count,
        .contents = g_hash_table_new_full(content_hash, content_equal, g_free,
                                          NULL),
    };

    memset(count, 0, sizeof(*count));
    for (unsigned i = 0; i < n; i++) {
        count_image(&c, images[i], (uint64_t)i << 32);
    }
    count->saveable = count->present - count->distinct;
    g_hash_table_destroy(c.contents);
}
