/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the engine itself costs, per page that it scans: measured from
 * outside.  At most 12 bytes: private memory (RssAnon), the blocks of the
 * group's shared file (the index), the slab of segments and of mappings.
 * The engine's own figure must agree.
 *
 * Threads, malloc() and what the engine has once cost the same in a small VM
 * as in a large one: two are measured, each in a process of its own, and the
 * difference is what pages cost.  It is of so many pages that no array hides
 * in the tolerance: one of 2 bytes a page would be more than twice as large.
 */

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "group/segment.h"

#define SMALL 32768             /* 128 MiB */
#define LARGE 163840            /* 640 MiB */
#define BYTES_PER_PAGE 12
/* A quarter merged, with the ledger and the kernel's mappings of that. */
#define BYTES_MERGED 18
/*
 * Of the difference: what is not a matter of pages, and moves all the same;
 * and the index, which grows in steps.
 */
#define TOLERANCE (96 << 10)

/* Blocks of all memfds that this process holds, but for the RAM. */
static uint64_t memfd_bytes(const FxRam *ram)
{
    DIR *dir = opendir("/proc/self/fd");
    uint64_t bytes = 0;
    struct dirent *d;

    g_assert_nonnull(dir);
    while ((d = readdir(dir))) {
        int seals = d->d_name[0] == '.' ? -1
                                        : fcntl(atoi(d->d_name), F_GET_SEALS);
        struct stat st;

        if (seals >= 0 && !(seals & F_SEAL_WRITE) &&
            atoi(d->d_name) != ram->fd &&
            fstatat(dirfd(dir), d->d_name, &st, 0) == 0 &&
            S_ISREG(st.st_mode)) {
            bytes += (uint64_t)st.st_blocks * 512;
        }
    }
    closedir(dir);
    return bytes;
}

/* Size of one kernel object by /proc/slabinfo; @fallback if not readable. */
static uint64_t slab_size(const char *name, uint64_t fallback)
{
    FILE *f = fopen("/proc/slabinfo", "re");
    uint64_t size = fallback;
    char line[512];

    while (f && fgets(line, sizeof(line), f)) {
        char cache[64];
        uint64_t objects;

        if (sscanf(line, "%63s %*u %*u %" SCNu64, cache, &objects) == 2 &&
            !strcmp(cache, name)) {
            size = objects;
        }
    }
    if (f) {
        fclose(f);
    }
    return size;
}

typedef struct Cost {
    uint32_t pages;           /* in: how large the RAM is */
    bool duplicates;          /* in: a quarter of them is there twice */
    uint64_t private;         /* bytes, from outside */
    uint64_t shared;
    uint64_t slab;
    uint64_t said;            /* metadata_bytes */
} Cost;

/* The shadow would be memory of our own, and is not needed. */
static uint64_t seed_of(const Cost *c, uint32_t page)
{
    /* a quarter: runs of 64 pages */
    bool twice = c->duplicates && page / 64 % 4 == 3;

    return twice ? page % (c->pages / 2) + 1 : 1000000 + page;
}

static void assert_all(const Cost *c, const FxRam *ram)
{
    uint8_t expected[FX_PAGE];

    for (uint32_t i = 0; i < c->pages; i++) {
        fx_content(expected, seed_of(c, i));
        fx_assert_page(ram, i, expected);
    }
}

static uint64_t slab(void)
{
    FxSegments segments;

    fx_segments(&segments);
    return segments.files * DEDUP_SEGMENT_SLAB +
           fx_maps() * slab_size("vm_area_struct", 256);
}

static void measure(void *opaque)
{
    Cost *c = opaque;
    FxRam *ram = fx_ram_new(FX_MEMFD, c->pages);
    uint64_t anon, memfds, slabs;
    uint64_t merged = c->duplicates ? c->pages / 4 : 0;
    DedupStats stats;
    FxEngine *fe;
    FxView view;

    for (uint32_t i = 0; i < c->pages; i++) {
        fx_content(fx_addr(ram, i), seed_of(c, i));
    }
    anon = fx_status("RssAnon");
    memfds = memfd_bytes(ram);
    slabs = slab();
    fe = fx_engine_new(NULL);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    /* a new state takes the figures anew */
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    c->private = fx_status("RssAnon") - anon;
    c->shared = memfd_bytes(ram) - memfds;
    c->slab = slab() - slabs;
    fx_stats(fe, &stats);
    c->said = stats.metadata_bytes;
    fx_view(ram, &view);
    /* the index may lose a hint now and then */
    g_assert_cmpuint(view.segment_pages, <=, merged);
    g_assert_cmpuint(view.segment_pages, >=, merged - merged / 256);
    g_assert_cmpuint(view.copied, ==, 0);
    g_assert_cmpuint(stats.pass.unshared, ==,
                     c->pages - view.segment_pages);
    assert_all(c, ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

static Cost *cost_of(uint32_t pages, bool duplicates)
{
    Cost *c = mmap(NULL, sizeof(*c), PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    g_assert_true(c != MAP_FAILED);
    c->pages = pages;
    c->duplicates = duplicates;
    fx_must_pass(measure, c, 2 * FX_DEADLINE);
    g_test_message("%u pages: private %" PRIu64 ", shared %" PRIu64 ", slab "
                   "%" PRIu64 "; metadata_bytes %" PRIu64, pages, c->private,
                   c->shared, c->slab, c->said);
    return c;
}

static void test_cost(gconstpointer data)
{
    bool duplicates = GPOINTER_TO_INT(data);
    int64_t memory, slabs, said;
    const Cost *small, *large;

    if (FX_SANITIZED) {
        g_test_skip("the sanitizer's own memory hides it");
        return;
    }
    small = cost_of(SMALL, duplicates);
    large = cost_of(LARGE, duplicates);
    memory = (large->private + large->shared) -
             (small->private + small->shared);
    slabs = large->slab - small->slab;
    said = large->said - small->said;
    g_test_message("%.2f bytes a page", (double)(memory + slabs) /
                   (LARGE - SMALL));
    g_assert_cmpint(memory + slabs, <=,
                    (duplicates ? BYTES_MERGED : BYTES_PER_PAGE) *
                    (LARGE - SMALL) + TOLERANCE);
    g_assert_cmpint(large->shared - small->shared, >, 0);

    /* slab is not in the figure; page tables of segments are, not in ours */
    g_assert_cmpint(said, >=, memory - TOLERANCE);
    g_assert_cmpint(said, <=, memory + slabs + TOLERANCE);
    munmap((void *)small, sizeof(*small));
    munmap((void *)large, sizeof(*large));
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_data_func("/metadata/unique", GINT_TO_POINTER(false),
                         test_cost);
    g_test_add_data_func("/metadata/quarter-merged", GINT_TO_POINTER(true),
                         test_cost);
    return g_test_run();
}
