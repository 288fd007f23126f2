/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Who keeps the index of a group clean: a member that scans removes the
 * hints of members that died and of segments that are gone, which nobody
 * ever looks up again, and no others.
 *
 * The engine's group has more members: groups that the test joins by itself.
 */

#include "engine-fixture.h"
#include "group/group.h"

#define PAGES 256
#define SEED(i) (0x5eed0000u + (i) / 2 * 1000)
/* Members that nobody ever was, and a gid that was never given. */
#define NOBODY 200
#define NEVER 12345

#define N 64u                   /* hints of each kind */
#define HASH(what, i) (((what) * N + (i) + 1) * 0x9e3779b97f4a7c15ull)

static void no_hashes(void *opaque, DedupOwnPage *pages, unsigned n,
                      const uint8_t *secret)
{
}

static int no_segment(void *opaque, uint32_t gid, uint32_t page,
                      const uint8_t *secret, DedupHash128 *hash)
{
    return -1;
}

static DedupGroup *join(const char *dir)
{
    static const DedupGroupOps ops = {
        .keyed_hashes = no_hashes, .segment_fd = no_segment,
    };
    g_autoptr(GError) error = NULL;
    DedupGroup *g = dedup_group_new(dir, &error);

    g_assert_no_error(error);
    dedup_group_join(g, &ops, NULL, &error);
    g_assert_no_error(error);
    return g;
}

/* @N hints; a member's, or of the pages of a segment from @page on. */
static void leave_hints(DedupGroup *g, unsigned what, DedupHintKind kind,
                        uint32_t where, uint32_t page)
{
    for (unsigned i = 0; i < N; i++) {
        DedupHint hint = { .kind = kind, .where = where, .page = page + i };

        g_assert_true(dedup_index_insert(dedup_group_index(g), HASH(what, i),
                                         &hint));
    }
}

static unsigned hints_left(DedupGroup *g, unsigned what)
{
    unsigned n = 0;

    for (unsigned i = 0; i < N; i++) {
        DedupHint hits[DEDUP_INDEX_HITS];

        n += dedup_index_lookup(dedup_group_index(g), HASH(what, i), hits);
    }
    return n;
}

enum { DEAD, CLAIMS, GONE, BEYOND, STALE, ALIVE = STALE, SEGMENT, LEAVER };

static bool stale_gone(void *g)
{
    unsigned left = 0;

    for (unsigned what = 0; what < STALE; what++) {
        left += hints_left(g, what);
    }
    return !left;
}

static bool leaver_gone(void *g)
{
    return !hints_left(g, LEAVER);
}

/* Do the hints say where the contents are that the engine published? */
static unsigned published(DedupGroup *g)
{
    uint8_t page[FX_PAGE];
    unsigned n = 0;

    for (unsigned i = 0; i < PAGES; i += 2) {
        DedupHint hits[DEDUP_INDEX_HITS];

        fx_content(page, SEED(i));
        n += dedup_index_lookup(dedup_group_index(g),
                                dedup_page_hash(page, dedup_group_salt(g)),
                                hits) &&
             hits[0].kind == DEDUP_HINT_PUBLISHED;
    }
    return n;
}

static void test_sweep(gconstpointer data)
{
    char *dir = fx_group_dir();
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(dir);
    DedupGroup *g, *leaver;
    uint32_t gid;

    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, SEED(i));
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    g = join(dir);
    leaver = join(dir);
    g_assert_cmpuint(published(g), >=, PAGES / 2 - 1);

    gid = dedup_group_segment_alloc(g, N);
    g_assert_cmpuint(gid, !=, 0);
    leave_hints(g, ALIVE, DEDUP_HINT_CANDIDATE, dedup_group_self(g), 0);
    leave_hints(g, LEAVER, DEDUP_HINT_CANDIDATE, dedup_group_self(leaver),
                0);
    leave_hints(g, SEGMENT, DEDUP_HINT_PUBLISHED, gid, 0);
    leave_hints(g, BEYOND, DEDUP_HINT_PUBLISHED, gid, N);
    leave_hints(g, GONE, DEDUP_HINT_PUBLISHED, NEVER, 0);
    leave_hints(g, DEAD, DEDUP_HINT_CANDIDATE, NOBODY, 0);
    leave_hints(g, CLAIMS, DEDUP_HINT_CLAIMED, NOBODY + 1, 0);

    fx_wait_until(stale_gone, g, "stale hints stay");
    g_assert_cmpuint(hints_left(g, ALIVE), ==, N);
    g_assert_cmpuint(hints_left(g, LEAVER), ==, N);
    g_assert_cmpuint(hints_left(g, SEGMENT), ==, N);
    g_assert_cmpuint(published(g), >=, PAGES / 2 - 1);

    dedup_group_free(leaver);
    fx_wait_until(leaver_gone, g, "stale hints stay");
    g_assert_cmpuint(hints_left(g, ALIVE), ==, N);
    g_assert_cmpuint(hints_left(g, SEGMENT), ==, N);

    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    dedup_group_free(g);
    fx_group_dir_free(dir);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_data_func("/sweep/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_sweep);
    return g_test_run();
}
