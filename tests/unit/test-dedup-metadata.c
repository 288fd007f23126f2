/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the engine itself costs, per page that it scans: measured from
 * outside.  At most 16 bytes: private memory (RssAnon), the blocks of the
 * group's shared file (the index), the slab of segments and of mappings.
 * The engine's own figure must agree.
 */

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "segment.h"

#define PAGES 65536             /* 256 MiB */
#define BYTES_PER_PAGE 16
/* A quarter merged, with the ledger and the kernel's mappings of that. */
#define BYTES_MERGED 20

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
    uint64_t anon;
    uint64_t memfds;
    uint64_t maps;
    uint64_t segments;
} Cost;

static void measure(const FxRam *ram, Cost *c)
{
    FxSegments segments;

    fx_segments(&segments);
    c->anon = fx_status("RssAnon");
    c->memfds = memfd_bytes(ram);
    c->maps = fx_maps();
    c->segments = segments.files;
}

static void test_cost(gconstpointer data)
{
    bool duplicates = GPOINTER_TO_INT(data);
    FxRam *ram = fx_ram_new(FX_MEMFD, PAGES);
    uint64_t private, shared, slab, per_page;
    uint64_t copied = 0;
    Cost before, after;
    DedupStats stats;
    FxEngine *fe;
    FxView view;

    if (FX_SANITIZED) {
        g_test_skip("the sanitizer's own memory hides it");
        fx_ram_free(ram);
        return;
    }
    for (uint32_t i = 0; i < PAGES; i++) {
        /* a quarter: runs of 64 pages that are there twice */
        bool twice = duplicates && i / 64 % 4 == 3;

        fx_page(ram, i, twice ? i % (PAGES / 2) + 1 : 1000000 + i);
    }
    measure(ram, &before);
    fe = fx_engine_new(NULL);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    measure(ram, &after);
    fx_view(ram, &view);
    fx_stats(fe, &stats);
    copied = view.copied * FX_PAGE;
    /* the index may lose a hint now and then */
    g_assert_cmpuint(view.segment_pages, <=, duplicates ? PAGES / 4 : 0);
    g_assert_cmpuint(view.segment_pages, >=, duplicates ? PAGES / 4 - 64 : 0);
    g_assert_cmpuint(stats.pages_unshared, ==, PAGES - view.segment_pages);

    private = after.anon - copied - before.anon;
    shared = after.memfds - before.memfds;
    slab = (after.segments - before.segments) * DEDUP_SEGMENT_SLAB +
           (after.maps - before.maps) * slab_size("vm_area_struct", 256);
    per_page = (private + shared + slab + PAGES - 1) / PAGES;
    g_test_message("private %" PRIu64 ", shared %" PRIu64 ", slab %" PRIu64
                   " bytes: %.1f a page; metadata_bytes %" PRIu64, private,
                   shared, slab, (double)(private + shared + slab) / PAGES,
                   stats.metadata_bytes);
    g_assert_cmpuint(per_page, <=, duplicates ? BYTES_MERGED
                                              : BYTES_PER_PAGE);
    g_assert_cmpuint(shared, >, 0);

    /* slab is not in the figure; page tables of segments are, not in ours */
    g_assert_cmpuint(stats.metadata_bytes, >=, (private + shared) / 4 * 3);
    g_assert_cmpuint(stats.metadata_bytes, <=, (private + shared + slab) /
                     4 * 5 + (256 << 10));
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
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
