/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Who is left when the other members of a group are gone: what was shared
 * with them saves nothing any more, so its segments are left (I8), also by
 * one that finds nothing new to merge.  And what saves within the one that is
 * left stays.  Only a region that is closed is left alone.
 *
 * The other member is a child that is killed.
 */

#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"

#define PAGES 4096
#define SECOND 1000000          /* contents of the second region begin here */

typedef struct Scene {
    FxKind kind;
    bool isolated;            /* between any two is a page of its own */
    unsigned nth;             /* each n-th is there once more; 0: none */
    bool two;                 /* regions */
} Scene;

static uint64_t seed_of(const Scene *s, uint32_t page, unsigned member)
{
    return s->isolated && page % 2 ? (uint64_t)(member + 1) << 32 | page
                                   : page + 1;
}

static unsigned shared_pages(const Scene *s)
{
    return s->isolated ? PAGES / 2 : PAGES;
}

/* In the place of an own page, once all is shared; returns how many. */
static unsigned add_copies(const Scene *s, FxRam *ram)
{
    unsigned n = 0;

    for (uint32_t i = 1; s->nth && i < PAGES; i += 2 * s->nth) {
        fx_page(ram, i, seed_of(s, i - 1, 0));
        n++;
    }
    return n;
}

/* As much again, with other contents. */
static FxRam *add_second(FxEngine *fe, const Scene *s)
{
    FxRam *ram = fx_ram_new(s->kind, PAGES);

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, SECOND + i);
    }
    fx_add(fe, ram);
    return ram;
}

static FxEngine *start(const Scene *s, const char *dir, unsigned member,
                       FxRam **ram)
{
    FxEngine *fe;

    *ram = fx_ram_new(s->kind, PAGES);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(*ram, i, seed_of(s, i, member));
    }
    fe = fx_engine_new(dir);
    fx_add(fe, *ram);
    fx_engine_start(fe);
    return fe;
}

static pid_t start_other(const Scene *s, const char *dir)
{
    FxEngine *fe;
    pid_t pid;
    FxRam *ram;

    fflush(stdout);
    pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        fe = start(s, dir, 1, &ram);
        if (s->two) {
            add_second(fe, s);
        }
        for (;;) {
            pause();
        }
    }
    return pid;
}

typedef struct Survivor {
    FxEngine *fe;
    FxRam *ram;
    unsigned shared;          /* pages merged that the other has, too */
    unsigned copies;          /* of them, that it has once */
} Survivor;

static bool all_shared(void *opaque)
{
    Survivor *s = opaque;
    DedupStats stats;

    fx_stats(s->fe, &stats);
    return stats.pages_merged_between == s->shared;
}

/* What saves nothing is left, and what is merged saves more than it costs. */
static bool is_worth_it(void *opaque)
{
    Survivor *s = opaque;
    FxSegments segments;
    DedupStats stats;

    fx_stats(s->fe, &stats);
    fx_segments(&segments);
    return stats.pages_merged == 2 * s->copies &&
           segments.pages == s->copies &&
           stats.bytes_saved >= -(int64_t)stats.metadata_bytes &&
           stats.state == DEDUP_STATE_IDLE;
}

static void test_survivor(gconstpointer data)
{
    const Scene *scene = data;
    char *dir = fx_group_dir();
    pid_t other = start_other(scene, dir);
    Survivor s = { .shared = shared_pages(scene) };
    DedupStats stats;
    FxView view;

    s.fe = start(scene, dir, 0, &s.ram);
    fx_wait_until(all_shared, &s, "not merged");
    s.copies = add_copies(scene, s.ram);
    s.shared += s.copies;
    fx_wait_until(all_shared, &s, "not merged");
    fx_stats(s.fe, &stats);
    g_assert_cmpint(stats.bytes_saved, >, 0);
    kill(other, SIGKILL);
    g_assert_cmpint(waitpid(other, NULL, 0), ==, other);
    fx_wait_until(is_worth_it, &s, "what saves nothing stays");

    /* and that is all that there is to it, from outside */
    fx_view(s.ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 2 * s.copies);
    g_assert_cmpuint(view.own_pages, ==, PAGES - view.segment_pages);
    g_assert_cmpuint(view.copied, ==, 0);
    fx_assert_bytes(s.ram);
    fx_engine_free(s.fe);
    fx_assert_bytes(s.ram);
    s.ram->region = NULL;
    fx_ram_free(s.ram);
    fx_group_dir_free(dir);
}

static bool second_left(void *opaque)
{
    FxView view;

    fx_view(opaque, &view);
    return !view.segment_pages;
}

/*
 * A region that its owner wants back, and that could not be restored: there
 * nothing is published anew, so to leave its segments would take memory only.
 * A second one, which is open, tells when they would have been left.
 */
static void test_closed(gconstpointer data)
{
    const Scene *scene = data;
    char *dir = fx_group_dir();
    pid_t other = start_other(scene, dir);
    Survivor s = { .shared = 2 * PAGES };
    g_autoptr(GError) error = NULL;
    FxRam *second;
    FxView view;

    s.fe = start(scene, dir, 0, &s.ram);
    second = add_second(s.fe, scene);
    fx_wait_until(all_shared, &s, "not merged");
    dedup_engine_cancel_restore(s.fe->e, s.ram->host);
    g_assert_false(dedup_region_remove(s.ram->region, true, &error));
    g_assert_nonnull(error);
    kill(other, SIGKILL);
    g_assert_cmpint(waitpid(other, NULL, 0), ==, other);
    fx_wait_until(second_left, second, "what saves nothing stays");
    fx_view(s.ram, &view);
    if (view.segment_pages != PAGES) {
        fx_fail("left", "%u of %u pages are merged",
                (unsigned)view.segment_pages, PAGES);
    }
    dedup_region_open(s.ram->region);
    fx_wait_until(is_worth_it, &s, "what saves nothing stays");
    fx_assert_bytes(s.ram);
    fx_assert_bytes(second);
    fx_engine_free(s.fe);
    s.ram->region = second->region = NULL;
    fx_ram_free(s.ram);
    fx_ram_free(second);
    fx_group_dir_free(dir);
}

int main(int argc, char **argv)
{
    static const Scene scenes[] = {
        { .kind = FX_ANON },
        { .kind = FX_MEMFD, .isolated = true },
        /* too few to pay for the mappings of all */
        { .kind = FX_MEMFD, .isolated = true, .nth = 20 },
        { .kind = FX_ANON, .isolated = true, .nth = 20 },
        { .kind = FX_ANON, .two = true },
        { .kind = FX_MEMFD, .two = true },
    };

    fx_init(&argc, &argv);
    g_test_add_data_func("/survivor/runs", &scenes[0], test_survivor);
    g_test_add_data_func("/survivor/isolated", &scenes[1], test_survivor);
    g_test_add_data_func("/survivor/few-within/memfd", &scenes[2],
                         test_survivor);
    g_test_add_data_func("/survivor/few-within/anon", &scenes[3],
                         test_survivor);
    g_test_add_data_func("/survivor/closed/anon", &scenes[4], test_closed);
    g_test_add_data_func("/survivor/closed/memfd", &scenes[5], test_closed);
    return g_test_run();
}
