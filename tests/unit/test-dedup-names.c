/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Names of segments in a group's table: what if they get lost, or cannot be
 * had.
 *
 * The tests have an engine without its thread, and do what the thread would.
 */

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "group-util.h"
#include "engine-internal.h"
#include "scan/leave.h"
#include "space/ledger.h"

#define SEGMENTS 200
#define COPIES 3                /* so many pay for their segment */
/* Of the table of segments; group-locks.c has it. */
#define TABLE_BYTE 4096

/* ---- an engine without its thread ---- */

typedef struct Engine {
    char *dir;
    FxEngine *fe;
    DedupEngine *e;
    FxRam *ram;
    unsigned copies;        /* pages of it that are merged to each segment */
    TestMember *other;      /* NULL: none yet */
} Engine;

static void no_hashes(void *opaque, DedupOwnPage *pages, unsigned n,
                      const uint8_t *secret)
{
}

static int no_fd(void *opaque, uint32_t gid, uint32_t page,
                 const uint8_t *secret, DedupHash128 *hash)
{
    return -1;
}

static const DedupGroupOps ops = {
    .keyed_hashes = no_hashes,
    .segment_fd = no_fd,
};

static void join(Engine *t)
{
    g_autoptr(GError) error = NULL;

    dedup_scan_join(t->e->scan, &ops, t->e, &error);
    g_assert_no_error(error);
    g_assert_true(dedup_group_is_joined(t->e->group));
}

/* As published by this engine, with pages mapped to it. */
static void add_segment(Engine *t, unsigned no)
{
    unsigned first = no * t->copies;
    DedupHolding *h;
    g_autoptr(GError) error = NULL;
    DedupBuilder *b = dedup_builder_new(&error);
    unsigned limits = 0;
    DedupSegment *s;

    g_assert_no_error(error);
    g_assert_cmpint(dedup_builder_append(b, fx_addr(t->ram, first)), ==, 0);
    dedup_builder_flush(b);
    s = dedup_builder_finish(b, dedup_group_segment_alloc(t->e->group, 1),
                             &error);
    g_assert_no_error(error);
    g_assert_cmpuint(s->gid, !=, 0);
    h = dedup_holding_add(t->e->space, s);
    for (unsigned i = 0; i < t->copies; i++) {
        DedupAction a = { .page = first + i, .holding = h };

        g_assert_cmpuint(dedup_space_windows(t->ram->region, &a, 1, &limits),
                         ==, 1);
    }
}

static DedupHolding *holding(const Engine *t, unsigned no)
{
    return dedup_holding_get(t->e->space, no);
}

static void engine_new(Engine *t, unsigned segments, unsigned copies)
{
    *t = (Engine) { .dir = fx_group_dir(), .copies = copies };
    t->fe = fx_engine_new(t->dir);
    t->e = t->fe->e;
    t->ram = fx_ram_new(FX_MEMFD, segments * copies);
    for (unsigned i = 0; i < segments * copies; i++) {
        fx_page(t->ram, i, i / copies + 1);
    }
    fx_add(t->fe, t->ram);
    dedup_space_set_scanner(t->e->space, NULL);
    join(t);
    for (unsigned i = 0; i < segments; i++) {
        add_segment(t, i);
    }
}

static void engine_free(Engine *t)
{
    fx_assert_bytes(t->ram);
    fx_engine_free(t->fe);
    t->ram->region = NULL;
    fx_ram_free(t->ram);
    if (t->other) {
        test_member_free(t->other);
    }
    fx_group_dir_free(t->dir);
}

static void run(const char *format, const char *dir)
{
    g_autofree char *command = g_strdup_printf(format, dir);

    g_assert_cmpint(system(command), ==, 0);
}

static void delete(const char *dir)
{
    run("rm -r %s/v1-4k", dir);
}

/* The group's files go, the engine notices, somebody begins another group. */
static void lose_group(Engine *t)
{
    delete(t->dir);
    t->e->scan->watched_us = 0;
    g_assert_true(dedup_scan_has_lost_group(t->e->scan));
    g_assert_false(dedup_group_is_joined(t->e->group));
    t->other = test_member_new(t->dir, 0);
}

static unsigned count_named(DedupEngine *e)
{
    unsigned n = 0, member, npages;

    for (unsigned i = 0; i < dedup_holding_count(e->space); i++) {
        DedupHolding *h = dedup_holding_get(e->space, i);

        if (!h || !h->segment->gid) {
            continue;
        }
        n++;
        g_assert_true(dedup_holding_find(e->space, h->segment->gid) == h);
        g_assert_true(dedup_group_segment_lookup(e->group, h->segment->gid,
                                                 &member, &npages));
        g_assert_cmpuint(member, ==, dedup_group_self(e->group));
        g_assert_cmpuint(npages, ==, h->segment->npages);
    }
    g_assert_cmpuint(n, ==, g_hash_table_size(e->space->holdings.by_gid));
    return n;
}

static void figures(DedupEngine *e)
{
    DedupTally tally = { 0 };

    e->figures.pause_us = 0;
    g_assert_true(dedup_figures_pass(&e->figures, &tally));
}

static void pass(DedupEngine *e, DedupStats *stats)
{
    figures(e);
    dedup_scan_upkeep(e->scan);
    dedup_engine_get_stats(e, stats, false);
}

static void check_saved(const DedupStats *a, const DedupStats *b)
{
    /* the shared file's own pages make it differ a little */
    g_assert_cmpint(llabs((long long)(a->bytes_saved - b->bytes_saved)), <,
                    SEGMENTS * DEDUP_PAGE_SIZE / 4);
}

/* ---- no name can be had ---- */

/* Somebody who is stopped while it holds the table's lock. */
static int hold_table(const Engine *t)
{
    g_autofree char *path = g_strdup_printf("%s/v1-4k/slots", t->dir);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct flock lock = {
        .l_type = F_WRLCK,
        .l_whence = SEEK_SET,
        .l_start = TABLE_BYTE,
        .l_len = 1,
    };

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(fcntl(fd, F_OFD_SETLK, &lock), ==, 0);
    return fd;
}

typedef struct Visitor {
    DedupEngine *e;
    bool stop;
    int64_t waited_us;      /* longest */
} Visitor;

/* What a vCPU does that discards memory. */
static gpointer visit(gpointer opaque)
{
    Visitor *v = opaque;

    while (!__atomic_load_n(&v->stop, __ATOMIC_RELAXED)) {
        int64_t start = g_get_monotonic_time();

        dedup_space_lock(v->e->space);
        dedup_space_unlock(v->e->space);
        v->waited_us = MAX(v->waited_us, g_get_monotonic_time() - start);
        g_usleep(500);
    }
    return NULL;
}

/*
 * Another group, whose table is locked: nobody waits for that.  What has no
 * name is counted, and named when that is possible.
 */
static void test_locked(void)
{
    DedupStats named, nameless, again;
    Visitor v = { 0 };
    GThread *thread;
    Engine t;
    int lock;

    engine_new(&t, SEGMENTS, COPIES);
    pass(t.e, &named);
    g_assert_cmpuint(count_named(t.e), ==, SEGMENTS);
    lose_group(&t);
    lock = hold_table(&t);
    v.e = t.e;
    thread = g_thread_new("visitor", visit, &v);
    join(&t);
    __atomic_store_n(&v.stop, true, __ATOMIC_RELAXED);
    g_thread_join(thread);
    g_test_message("waited for the remap lock for %" G_GINT64_FORMAT " us",
                   v.waited_us);
    g_assert_cmpint(v.waited_us, <, 300 * G_TIME_SPAN_MILLISECOND);
    g_assert_cmpuint(count_named(t.e), ==, 0);

    pass(t.e, &nameless);
    g_assert_cmpuint(count_named(t.e), ==, 0);
    check_saved(&nameless, &named);
    g_assert_cmpuint(dedup_space_maps(t.e->space), >=, SEGMENTS);

    close(lock);
    pass(t.e, &again);
    g_assert_cmpuint(count_named(t.e), ==, SEGMENTS);
    pass(t.e, &again);
    check_saved(&again, &named);
    engine_free(&t);
}

/* ---- names get lost ---- */

/* Somebody releases a name, and another segment takes the place. */
static void test_lost(void)
{
    DedupTableEntry entry;
    DedupStats before, after;
    const DedupSegment *s;
    uint32_t gid, taken;
    Engine t;

    engine_new(&t, SEGMENTS, COPIES);
    pass(t.e, &before);
    t.other = test_member_new(t.dir, 0);
    s = holding(&t, 5)->segment;
    gid = s->gid;
    entry = (DedupTableEntry) { .gid = gid };
    g_assert_true(dedup_group_file_write(&t.e->group->file, &entry,
                                         sizeof(entry), DEDUP_FILE_TABLE +
                                         DEDUP_GID_SLOT(gid) *
                                         sizeof(entry)));
    /* looks for a free place from the first one on */
    dedup_group_refresh(t.other->g);
    taken = dedup_group_segment_alloc(t.other->g, 1);
    g_assert_cmpuint(DEDUP_GID_SLOT(taken), ==, DEDUP_GID_SLOT(gid));
    pass(t.e, &after);
    g_assert_cmpuint(s->gid, !=, 0);
    g_assert_cmpuint(s->gid, !=, gid);
    g_assert_null(dedup_holding_find(t.e->space, gid));
    g_assert_cmpuint(count_named(t.e), ==, SEGMENTS);
    check_saved(&after, &before);
    pass(t.e, &after);
    g_assert_cmpuint(count_named(t.e), ==, SEGMENTS);
    check_saved(&after, &before);
    /* the rows are whole */
    g_assert_true(dedup_group_uses(t.e->group, 0, s->gid));
    engine_free(&t);
}

/* What a part of the table that cannot be read says of names: nothing. */
static void test_unread(void)
{
    g_autofree char *path = NULL;
    DedupStats stats;
    uint32_t first;
    Engine t;
    int fd;

    engine_new(&t, SEGMENTS, COPIES);
    first = holding(&t, 0)->segment->gid;
    fd = t.e->group->file.fd;
    path = g_strdup_printf("/proc/self/fd/%d", fd);
    t.e->group->file.fd = open(path, O_WRONLY | O_CLOEXEC);
    g_assert_cmpint(t.e->group->file.fd, >=, 0);
    figures(t.e);
    close(t.e->group->file.fd);
    t.e->group->file.fd = fd;
    pass(t.e, &stats);
    g_assert_cmpuint(count_named(t.e), ==, SEGMENTS);
    g_assert_true(dedup_holding_find(t.e->space, first));
    engine_free(&t);
}

/* ---- away from the group ---- */

/* What was let go of meanwhile leaves the table when we are back. */
static void test_back(void)
{
    DedupSegmentUse others;
    g_autoptr(GError) error = NULL;
    DedupStats stats;
    uint32_t gid;
    Engine t;

    engine_new(&t, SEGMENTS, COPIES);
    gid = holding(&t, 7)->segment->gid;
    pass(t.e, &stats);
    delete(t.dir);
    t.e->scan->watched_us = 0;
    g_assert_true(dedup_scan_has_lost_group(t.e->scan));
    g_assert_false(dedup_group_is_joined(t.e->group));
    g_assert_null(t.e->scan->index);
    g_assert_true(dedup_engine_restore_range(t.e, fx_addr(t.ram, 7 * COPIES),
                                             COPIES * FX_PAGE, &error));
    dedup_scan_drop_unused(t.e->scan);
    g_assert_cmpuint(dedup_holdings_held(t.e->space), ==, SEGMENTS - 1);
    join(&t);
    g_assert_true(dedup_group_resumed(t.e->group));
    g_assert_nonnull(t.e->scan->index);
    t.other = test_member_new(t.dir, 0);
    dedup_group_others_use(t.other->g, gid, &others);
    g_assert_cmpuint(others.mapped, ==, COPIES);
    for (unsigned i = 0; i < 3; i++) {
        pass(t.e, &stats);
        g_assert_cmpuint(count_named(t.e), ==, SEGMENTS - 1);
        dedup_group_others_use(t.other->g, gid, &others);
        g_assert_cmpuint(others.mapped, ==, 0);
    }
    g_assert_false(dedup_group_segment_lookup(t.e->group, gid,
                                              &(unsigned) { 0 },
                                              &(unsigned) { 0 }));
    engine_free(&t);
}

/* ---- one memfd with two names ---- */

static bool is_leaving(const Engine *t, unsigned no)
{
    return dedup_leave_note(t->e->scan, holding(t, no))->leaving;
}

/* Another member has the same segment under a higher name, and goes first. */
static void test_twin(void)
{
    DedupHint hint = { .kind = DEDUP_HINT_PUBLISHED };
    const DedupSegment *s;
    DedupStats stats;
    uint64_t hash;
    Engine t;

    engine_new(&t, 1, 1); /* one page, which does not pay */
    s = holding(&t, 0)->segment;
    t.other = test_member_new(t.dir, 0);
    hint.where = dedup_group_segment_alloc(t.other->g, 1);
    g_assert_cmpuint(hint.where, >, s->gid);
    hash = dedup_page_hash(dedup_segment_page(s, 0), t.e->scan->salt);
    g_assert_true(dedup_index_insert(t.e->scan->index, hash, &hint));
    /* one that does not scan: each pass is a tick */
    for (unsigned i = 0; i < 7; i++) {
        pass(t.e, &stats);
        g_assert_false(is_leaving(&t, 0));
    }
    /* but not for ever */
    for (unsigned i = 0; i < 7; i++) {
        pass(t.e, &stats);
    }
    g_assert_null(holding(&t, 0)); /* it was left, and let go of */
    engine_free(&t);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_func("/names/locked", test_locked);
    g_test_add_func("/names/lost", test_lost);
    g_test_add_func("/names/unread", test_unread);
    g_test_add_func("/names/back", test_back);
    g_test_add_func("/names/twin", test_twin);
    return g_test_run();
}
