/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Members that are away from their group, because its files were deleted: what
 * others do with their names meanwhile, what they may be asked, and that
 * unmerging needs no group.
 *
 * The engines have their threads, and guests that merge.
 */

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "group-util.h"

#define PAGES 1024

static void run(const char *format, const char *dir)
{
    g_autofree char *command = g_strdup_printf(format, dir);

    g_assert_cmpint(system(command), ==, 0);
}

static void delete(const char *dir)
{
    run("rm -r %s/v1-4k", dir);
}

typedef struct Names {
    unsigned n;
    uint64_t mapped;
} Names;

static bool count_name(void *opaque, uint32_t gid, unsigned npages,
                       bool ours, const DedupSegmentUse *own,
                       const DedupSegmentUse *others)
{
    Names *names = opaque;

    names->n++;
    names->mapped += others->mapped;
    return false;
}

/* By a member that has nothing to do with them. */
static void look(TestMember *m, Names *names)
{
    *names = (Names) { 0 };
    dedup_group_refresh(m->g);
    g_assert_true(dedup_group_foreach_segment(m->g, count_name, names));
}

/* A guest that has each page twice, and starts. */
static FxRam *guest_new(FxEngine *fe, uint64_t seed)
{
    FxRam *ram = fx_ram_new(FX_MEMFD, PAGES);

    for (uint32_t k = 0; k < PAGES; k++) {
        fx_page(ram, k, seed + k % (PAGES / 2));
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    return ram;
}

static void guest_free(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

typedef struct Wanted {
    FxEngine *fe;
    TestMember *member;     /* NULL: nobody looks at the table */
    Names names;
    DedupStats stats;
} Wanted;

static bool is_merged(void *opaque)
{
    Wanted *w = opaque;

    fx_stats(w->fe, &w->stats);
    return w->stats.pages_merged_within == PAGES;
}

/* What the figures of all three are at rest. */
static bool is_settled(void *opaque)
{
    Wanted *w = opaque;

    fx_stats(w->fe, &w->stats);
    look(w->member, &w->names);
    return w->stats.pages_merged_within == PAGES &&
           w->stats.group.members == 3 &&
           w->stats.group.pages_shared == PAGES && w->names.n == 2 &&
           w->names.mapped == 2 * PAGES;
}

static bool is_restored(void *opaque)
{
    Wanted *w = opaque;
    DedupStats now;
    Names names;

    fx_stats(w->fe, &now);
    look(w->member, &names);
    return now.state != DEDUP_STATE_BLOCKED &&
           now.group.members == w->stats.group.members &&
           now.pages_merged_within == w->stats.pages_merged_within &&
           now.group.pages_shared == w->stats.group.pages_shared &&
           now.group.pages_sharing == w->stats.group.pages_sharing &&
           now.bytes_saved >= w->stats.bytes_saved - (1 << 20) &&
           now.bytes_saved <= w->stats.bytes_saved + (1 << 20) &&
           names.n == w->names.n && names.mapped == w->names.mapped;
}

/*
 * Two members have let go of files that were deleted; a third has not noticed
 * yet, takes them for dead, and releases what only they use.
 */
static void test_released(void)
{
    char *dir = fx_group_dir();
    Wanted wanted[2];
    FxRam *ram[2];
    TestMember *c;
    Names names;

    for (unsigned i = 0; i < 2; i++) {
        wanted[i].fe = fx_engine_new(dir);
        ram[i] = guest_new(wanted[i].fe, 1000 * (i + 1));
        fx_wait_until(is_merged, &wanted[i], "not merged");
    }
    c = test_member_new(dir, 0);
    for (unsigned i = 0; i < 2; i++) {
        wanted[i].member = c;
        fx_wait_until(is_settled, &wanted[i], "not settled");
    }
    delete(dir);
    for (unsigned i = 0; i < 2; i++) {
        fx_wait_state(wanted[i].fe, DEDUP_STATE_BLOCKED);
    }
    look(c, &names);
    look(c, &names);
    look(c, &names);
    g_test_message("%u names are left", names.n);
    dedup_group_detach(c->g);
    g_assert_true(dedup_group_join(c->g, test_ops(), c, NULL));
    dedup_group_enter(c->g);
    g_assert_true(dedup_group_resumed(c->g));
    for (unsigned i = 0; i < 2; i++) {
        fx_wait_until(is_restored, &wanted[i], "names and figures are lost");
        fx_assert_bytes(ram[i]);
    }
    for (unsigned i = 0; i < 2; i++) {
        fx_unmerge(wanted[i].fe);
        fx_assert_bytes(ram[i]);
        guest_free(wanted[i].fe, ram[i]);
    }
    test_member_free(c);
    fx_group_dir_free(dir);
}

/* There is no group any more: unmerge gives all memory back all the same. */
static void test_unmerge(void)
{
    char *dir = fx_group_dir();
    Wanted w = { .fe = fx_engine_new(dir) };
    FxRam *ram = guest_new(w.fe, 1000);
    FxSegments segments;

    fx_wait_until(is_merged, &w, "not merged");
    fx_segments(&segments);
    g_assert_cmpuint(segments.pages, >=, PAGES / 2);
    run("rm -r %1$s && touch %1$s", dir);
    fx_wait_state(w.fe, DEDUP_STATE_BLOCKED);
    fx_unmerge(w.fe);
    fx_assert_bytes(ram);
    fx_segments(&segments);
    g_assert_cmpuint(segments.files, ==, 0);
    g_assert_cmpuint(segments.pages, ==, 0);
    run("rm %1$s && mkdir -m 700 %1$s", dir);
    fx_set_run(w.fe, true);
    fx_wait_until(is_merged, &w, "not merged again");
    fx_unmerge(w.fe);
    fx_assert_bytes(ram);
    guest_free(w.fe, ram);
    fx_group_dir_free(dir);
}

/* A proof that we have the page of a segment: is the segment given for it? */
static bool is_given(TestMember *m, uint32_t gid, const void *content)
{
    DedupFetch item = { .gid = gid, .page = 0, .content = content };

    dedup_group_refresh(m->g);
    dedup_group_fetch(m->g, 0, &item, 1);
    if (item.fd >= 0) {
        close(item.fd);
    }
    return item.fd >= 0;
}

/* Who is asked while it joins another group does not know its names yet. */
static void test_asked(void)
{
    char *dir = fx_group_dir();
    Wanted w = { .fe = fx_engine_new(dir) };
    FxRam *ram = guest_new(w.fe, 1000);
    uint8_t content[DEDUP_PAGE_SIZE];
    DedupEngine *e = w.fe->e;
    const DedupSegment *s;
    TestMember *m;
    bool given;

    fx_wait_until(is_merged, &w, "not merged");
    fx_set_run(w.fe, false);
    fx_wait_state(w.fe, DEDUP_STATE_STOPPED);
    m = test_member_new(dir, 0);
    s = dedup_holding_get(e->space, 0)->segment;
    memcpy(content, dedup_segment_page(s, 0), sizeof(content));
    g_assert_true(is_given(m, s->gid, content));
    /* the scanner sees nothing of it */
    g_mutex_lock(&e->control.lock);
    __atomic_store_n(&e->group->joined, false, __ATOMIC_RELEASE);
    given = is_given(m, s->gid, content);
    __atomic_store_n(&e->group->joined, true, __ATOMIC_RELEASE);
    g_mutex_unlock(&e->control.lock);
    g_assert_false(given);
    g_assert_true(is_given(m, s->gid, content));
    test_member_free(m);
    fx_unmerge(w.fe);
    guest_free(w.fe, ram);
    fx_group_dir_free(dir);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_func("/away/released", test_released);
    g_test_add_func("/away/unmerge", test_unmerge);
    g_test_add_func("/away/asked", test_asked);
    return g_test_run();
}
