/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of a group's table of segments and of who uses them: two members
 * and an outsider that writes what it likes into the shared file.
 */

#include <string.h>
#include <sys/stat.h>

#include "group-util.h"
#include "host/sys.h"

typedef struct Fixture {
    char *dir;
    TestMember *a;
    TestMember *b;
} Fixture;

static void setup(Fixture *f, gconstpointer data)
{
    f->dir = test_dir_new();
    f->a = test_member_new(f->dir, 0);
    f->b = test_member_new(f->dir, 0);
    dedup_group_refresh(f->a->g);
}

static void teardown(Fixture *f, gconstpointer data)
{
    if (f->a) {
        test_member_free(f->a);
    }
    test_member_free(f->b);
    test_dir_free(f->dir);
}

static void b_alone(Fixture *f)
{
    test_member_free(f->a);
    f->a = NULL;
    dedup_group_refresh(f->b->g);
}

static bool known(TestMember *m, uint32_t gid)
{
    unsigned member, npages;

    return dedup_group_segment_lookup(m->g, gid, &member, &npages);
}

static void test_alloc(Fixture *f, gconstpointer data)
{
    uint32_t x = dedup_group_segment_alloc(f->a->g, 64);
    uint32_t y = dedup_group_segment_alloc(f->b->g, 512);
    uint32_t z;
    unsigned member, npages;

    g_assert_cmpuint(x, !=, 0);
    g_assert_cmpuint(y, !=, 0);
    g_assert_cmpuint(x, !=, y);
    g_assert_cmpuint(x | y, <, 1u << DEDUP_GID_BITS);
    g_assert_true(dedup_group_segment_lookup(f->b->g, x, &member, &npages));
    g_assert_cmpuint(member, ==, 0);
    g_assert_cmpuint(npages, ==, 64);
    g_assert_true(dedup_group_segment_lookup(f->a->g, y, &member, &npages));
    g_assert_cmpuint(member, ==, 1);
    g_assert_cmpuint(npages, ==, 512);
    g_assert_false(known(f->a, 0));
    g_assert_false(known(f->a, UINT32_MAX));
    g_assert_false(known(f->a, x + DEDUP_MAX_SEGMENTS));

    /* B cannot take back what A published; A can. */
    dedup_group_segment_release(f->b->g, x);
    g_assert_true(known(f->b, x));
    dedup_group_segment_release(f->a->g, x);
    g_assert_false(known(f->b, x));
    /* The entry serves again, under another name. */
    z = dedup_group_segment_alloc(f->a->g, 1);
    g_assert_cmpuint(DEDUP_GID_SLOT(z), ==, DEDUP_GID_SLOT(x));
    g_assert_cmpuint(z, !=, x);
    g_assert_false(known(f->b, x));
    /* Releasing it by its old name does nothing. */
    dedup_group_segment_release(f->a->g, x);
    g_assert_true(known(f->b, z));
}

/* A gid comes back only after all generations of its entry. */
static void test_generations(Fixture *f, gconstpointer data)
{
    uint32_t first = dedup_group_segment_alloc(f->a->g, 1), gid = first;
    unsigned n = 0;

    do {
        uint32_t next;

        dedup_group_segment_release(f->a->g, gid);
        next = dedup_group_segment_alloc(f->a->g, 1);
        g_assert_cmpuint(next, !=, 0);
        g_assert_cmpuint(next, !=, gid);
        g_assert_cmpuint(next, <, 1u << DEDUP_GID_BITS);
        gid = next;
        n++;
    } while (gid != first && n < 5000);
    g_assert_cmpuint(n, ==, (1u << (DEDUP_GID_BITS - 18)) - 1);
}

/* The publisher is gone: anyone may release.  Its slot has another owner. */
static void test_publisher_gone(Fixture *f, gconstpointer data)
{
    uint32_t x = dedup_group_segment_alloc(f->a->g, 64);
    uint32_t y = dedup_group_segment_alloc(f->a->g, 64);

    b_alone(f);
    g_assert_true(known(f->b, x));
    dedup_group_segment_release(f->b->g, x);
    g_assert_false(known(f->b, x));
    f->a = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_self(f->a->g), ==, 0);
    dedup_group_refresh(f->b->g);
    g_assert_true(known(f->b, y));
    dedup_group_segment_release(f->b->g, y);
    g_assert_false(known(f->b, y));
}

static void test_full(Fixture *f, gconstpointer data)
{
    g_autofree DedupTableEntry *all = g_new0(DedupTableEntry,
                                             DEDUP_MAX_SEGMENTS);
    size_t size = DEDUP_MAX_SEGMENTS * sizeof(*all);
    uint32_t gid;

    for (uint32_t i = 0; i < DEDUP_MAX_SEGMENTS; i++) {
        all[i].gid = DEDUP_MAX_SEGMENTS + i;
        all[i].npages = 1;
        all[i].member = 1;
    }
    g_assert_true(dedup_group_file_write(&f->a->g->file, all, size,
                                         DEDUP_FILE_TABLE));
    g_assert_cmpuint(dedup_group_segment_alloc(f->a->g, 1), ==, 0);
    /* Room at the very end. */
    all[0].npages = 0;
    g_assert_true(dedup_group_file_write(&f->a->g->file, all, sizeof(*all),
                                         DEDUP_FILE_TABLE + size -
                                         sizeof(*all)));
    gid = dedup_group_segment_alloc(f->a->g, 1);
    g_assert_cmpuint(DEDUP_GID_SLOT(gid), ==, DEDUP_MAX_SEGMENTS - 1);
    g_assert_true(known(f->b, gid));
    g_assert_cmpuint(dedup_group_segment_alloc(f->a->g, 1), ==, 0);
    /* And before the place where one was found last. */
    g_assert_true(dedup_group_file_write(&f->a->g->file, all, sizeof(*all),
                                         DEDUP_FILE_TABLE +
                                         7 * sizeof(*all)));
    gid = dedup_group_segment_alloc(f->a->g, 1);
    g_assert_cmpuint(DEDUP_GID_SLOT(gid), ==, 7);
}

/* Somebody was stopped with the table's lock in hand: nobody waits. */
static void test_lock_held(Fixture *f, gconstpointer data)
{
    uint32_t gid = dedup_group_segment_alloc(f->a->g, 1);
    int64_t start = g_get_monotonic_time();

    g_assert_true(dedup_group_table_lock(f->b->g));
    g_assert_cmpuint(dedup_group_segment_alloc(f->a->g, 1), ==, 0);
    dedup_group_segment_release(f->a->g, gid);
    g_assert_true(known(f->a, gid));
    g_assert_cmpint(g_get_monotonic_time() - start, <, G_USEC_PER_SEC / 2);
    dedup_group_table_unlock(f->b->g);
    g_assert_cmpuint(dedup_group_segment_alloc(f->a->g, 1), !=, 0);
    dedup_group_segment_release(f->a->g, gid);
    g_assert_false(known(f->a, gid));
}

/* The same, by a process that is killed: the lock dies with it. */
static void test_lock_killed(void)
{
    char *dir = test_dir_new();
    TestChild c = test_child_new(dir, 0);
    TestMember *m;

    g_assert_cmpint(test_tell(&c, 'L'), ==, 1);
    m = test_member_new(dir, 0);
    g_assert_cmpuint(dedup_group_segment_alloc(m->g, 1), ==, 0);
    test_child_kill(&c);
    g_assert_cmpuint(dedup_group_segment_alloc(m->g, 1), !=, 0);
    test_member_free(m);
    test_dir_free(dir);
}

typedef struct Walk {
    unsigned n;
    uint32_t gid;
    unsigned npages;
    DedupSegmentUse own;
    DedupSegmentUse others;
    uint32_t dropped;           /* the only segment that we do not hold */
} Walk;

static bool walk(void *opaque, uint32_t gid, unsigned npages,
                 bool ours, const DedupSegmentUse *own,
                 const DedupSegmentUse *others)
{
    Walk *w = opaque;

    w->n++;
    if (!w->gid || gid == w->gid) {
        w->gid = gid;
        w->npages = npages;
        w->own = *own;
        w->others = *others;
    }
    return gid != w->dropped;
}

static void test_use(Fixture *f, gconstpointer data)
{
    TestMember *c = test_member_new(f->dir, 0);
    uint32_t gid = 0;
    DedupSegmentUse use = { .mapped = 10, .pages = { 1, [7] = 1ull << 63 } };
    DedupSegmentUse got;
    Walk w;

    for (unsigned i = 0; i < 3000; i++) {
        gid = dedup_group_segment_alloc(f->a->g, 77);
    }
    dedup_group_refresh(f->a->g);
    dedup_group_refresh(f->b->g);
    use.gid = gid;
    g_assert_true(dedup_group_tell_use(f->a->g, &use));
    use.mapped = 20;
    use.pages[0] = 6;
    g_assert_true(dedup_group_tell_use(f->b->g, &use));
    use.mapped = UINT32_MAX - 5;
    use.pages[0] = 8;
    g_assert_true(dedup_group_tell_use(c->g, &use));

    dedup_group_others_use(f->a->g, gid, &got);
    g_assert_cmpuint(got.gid, ==, gid);
    g_assert_cmpuint(got.mapped, ==, UINT32_MAX);
    g_assert_cmpuint(got.pages[0], ==, 14);
    g_assert_cmpuint(got.pages[7], ==, 1ull << 63);
    dedup_group_others_use(c->g, gid, &got);
    g_assert_cmpuint(got.mapped, ==, 30);
    g_assert_cmpuint(got.pages[0], ==, 7);
    /* The same entry in another generation is another segment. */
    dedup_group_others_use(c->g, gid + DEDUP_MAX_SEGMENTS, &got);
    g_assert_cmpuint(got.mapped, ==, 0);

    w = (Walk) { .gid = gid };
    dedup_group_foreach_segment(f->b->g, walk, &w);
    g_assert_cmpuint(w.n, ==, 3000);
    g_assert_cmpuint(w.npages, ==, 77);
    g_assert_cmpuint(w.own.mapped, ==, 20);
    g_assert_cmpuint(w.own.pages[0], ==, 6);
    g_assert_cmpuint(w.others.mapped, ==, UINT32_MAX);
    g_assert_cmpuint(w.others.pages[0], ==, 9);

    g_assert_true(dedup_group_clear_use(c->g, gid));
    dedup_group_others_use(f->a->g, gid, &got);
    g_assert_cmpuint(got.mapped, ==, 20);
    test_member_free(c);
}

/*
 * A segment whose publisher is gone and that nobody uses leaves the table
 * at the second walk; one that is used stays.
 */
static void test_orphans(Fixture *f, gconstpointer data)
{
    uint32_t used = dedup_group_segment_alloc(f->a->g, 64);
    uint32_t unused = dedup_group_segment_alloc(f->a->g, 64);
    uint32_t ours = dedup_group_segment_alloc(f->b->g, 64);
    DedupSegmentUse use = { .gid = used, .mapped = 1 };
    Walk w = { 0 };

    g_assert_true(dedup_group_tell_use(f->b->g, &use));
    dedup_group_foreach_segment(f->b->g, walk, &w);
    dedup_group_foreach_segment(f->b->g, walk, &w);
    g_assert_true(known(f->b, unused));
    b_alone(f);
    dedup_group_foreach_segment(f->b->g, walk, &w);
    g_assert_true(known(f->b, unused));
    dedup_group_foreach_segment(f->b->g, walk, &w);
    g_assert_false(known(f->b, unused));
    g_assert_true(known(f->b, used));
    g_assert_true(known(f->b, ours));
}

/*
 * The publisher let go of a segment that somebody else still used: it leaves
 * the table when that one lets go, too, though the publisher lives.
 */
static void test_let_go(Fixture *f, gconstpointer data)
{
    uint32_t gid = dedup_group_segment_alloc(f->a->g, 64);
    DedupSegmentUse use = { .gid = gid, .mapped = 1 };
    Walk w = { .dropped = gid };

    dedup_group_refresh(f->a->g);
    g_assert_true(dedup_group_tell_use(f->b->g, &use));
    for (unsigned i = 0; i < 3; i++) {
        dedup_group_foreach_segment(f->a->g, walk, &w);
    }
    g_assert_true(known(f->a, gid));
    g_assert_true(dedup_group_clear_use(f->b->g, gid));
    /* not while we hold it */
    w.dropped = 0;
    for (unsigned i = 0; i < 3; i++) {
        dedup_group_foreach_segment(f->a->g, walk, &w);
    }
    g_assert_true(known(f->a, gid));
    /* what another one published is not ours to release */
    w.dropped = gid;
    for (unsigned i = 0; i < 3; i++) {
        dedup_group_foreach_segment(f->b->g, walk, &w);
    }
    g_assert_true(known(f->a, gid));
    for (unsigned i = 0; i < 2; i++) {
        dedup_group_foreach_segment(f->a->g, walk, &w);
    }
    g_assert_false(known(f->a, gid));
}

/* An outsider fills slots, table, rows and header with garbage. */
static void test_garbage(Fixture *f, gconstpointer data)
{
    const DedupGroupFile *file = &f->a->g->file;
    size_t size = 64 * 1024;
    g_autofree uint32_t *garbage = g_malloc(size);
    uint32_t random = 99;
    DedupMemberInfo info;
    Walk w = { 0 };

    for (unsigned round = 0; round < 6; round++) {
        for (size_t i = 0; i < size / sizeof(*garbage); i++) {
            random = random * 1664525 + 1013904223;
            garbage[i] = round == 0 ? UINT32_MAX : random >> (random % 32);
        }
        g_assert_true(dedup_group_file_write(file, garbage,
                                             DEDUP_MAX_MEMBERS *
                                             sizeof(DedupSlot),
                                             DEDUP_FILE_SLOTS));
        g_assert_true(dedup_group_file_write(file, garbage, size,
                                             DEDUP_FILE_TABLE));
        for (unsigned k = 0; k < 2; k++) {
            g_assert_true(dedup_group_file_write(file, garbage, size,
                                                 DEDUP_FILE_USE +
                                                 k * DEDUP_FILE_ROW));
        }
        file->header->segments = garbage[round];
        dedup_group_member(f->a->g, 1, &info);
        dedup_group_foreach_segment(f->a->g, walk, &w);
        for (unsigned i = 0; i < 2000; i++) {
            unsigned member, npages;
            DedupSegmentUse use;
            uint32_t gid = garbage[i * 4];

            if (dedup_group_segment_lookup(f->a->g, gid, &member, &npages)) {
                g_assert_cmpuint(member, <, DEDUP_MAX_MEMBERS);
                g_assert_cmpuint(npages, >, 0);
                g_assert_cmpuint(npages, <=, DEDUP_SEGMENT_PAGES);
            }
            dedup_group_others_use(f->a->g, gid, &use);
            dedup_group_segment_release(f->b->g, gid);
        }
        dedup_group_segment_alloc(f->a->g, 3);
    }
}

/* Nothing of the table can be read now, nor who lives be seen. */
static int refuse_to_tell(DedupSysCall *call)
{
    return strcmp(call->name, "pread") == 0 ? EIO :
           strcmp(call->name, "fcntl_lock") == 0 && call->arg == F_OFD_GETLK ?
           ENOLCK : 0;
}

/* What cannot be read is not gone, and who cannot be seen is not dead. */
static void test_unreadable(Fixture *f, gconstpointer data)
{
    uint32_t gid = dedup_group_segment_alloc(f->a->g, 64);
    unsigned member, npages;

    dedup_group_refresh(f->b->g);
    dedup_sys_hook = refuse_to_tell;
    g_assert_cmpint(dedup_group_segment_lookup(f->b->g, gid, &member,
                                               &npages), ==,
                    DEDUP_LOOKUP_FAILED);
    g_assert_cmpint(dedup_group_segment_lookup(f->b->g, 0, &member, &npages),
                    ==, DEDUP_LOOKUP_GONE);
    dedup_group_segment_release(f->b->g, gid);
    dedup_group_refresh(f->b->g);
    g_assert_cmpuint(dedup_group_members(f->b->g), ==, 2);
    g_assert_true(dedup_group_alive(f->b->g, 0));
    dedup_sys_hook = NULL;
    g_assert_cmpint(dedup_group_segment_lookup(f->b->g, gid, &member,
                                               &npages), ==,
                    DEDUP_LOOKUP_FOUND);
    g_assert_cmpuint(npages, ==, 64);
}

static void add(const char *name, void (*fn)(Fixture *, gconstpointer))
{
    g_test_add(name, Fixture, NULL, setup, fn, teardown);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add("/table/alloc", test_alloc);
    add("/table/generations", test_generations);
    add("/table/publisher-gone", test_publisher_gone);
    add("/table/full", test_full);
    add("/table/lock-held", test_lock_held);
    g_test_add_func("/table/lock-killed", test_lock_killed);
    add("/table/use", test_use);
    add("/table/orphans", test_orphans);
    add("/table/let-go", test_let_go);
    add("/table/garbage", test_garbage);
    add("/table/unreadable", test_unreadable);
    return g_test_run();
}
