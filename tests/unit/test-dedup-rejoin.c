/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The directory of a group: which may be one, and what if it is missing.
 *
 * Its files are deleted or replaced under live members, as systemd-tmpfiles, a
 * logout or an rm does: a newcomer does no harm, members notice, say so and
 * join again, and what is merged stays so.
 *
 * Two engines of one process stand for two virtual machines.
 */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "group-util.h"
#include "engine-internal.h"
#include "space/space-internal.h"

#define PAGES 1024

/* ---- the group alone ---- */

static char *inside(const TestPair *f, const char *name)
{
    return g_strdup_printf("%s/v1-4k/%s", f->dir, name);
}

static void delete(const TestPair *f, const char *name)
{
    g_autofree char *path = inside(f, name);

    g_assert_cmpint(unlink(path), ==, 0);
}

static void check_refused(const char *dir, const char *why)
{
    g_autoptr(GError) error = NULL;

    g_assert_null(dedup_group_new(dir, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_GROUP);
    g_test_message("%s", error->message);
    g_assert_nonnull(strstr(error->message, dir));
    g_assert_nonnull(strstr(error->message, why));
}

/* What nobody can mean by a group is refused, and nothing is made there. */
static void test_refused(TestPair *f, gconstpointer data)
{
    g_autofree char *file = g_strdup_printf("%s/file", f->dir);
    g_autofree char *link = g_strdup_printf("%s/link", f->dir);

    g_assert_true(g_file_set_contents(file, "x", 1, NULL));
    check_refused(file, "is not a directory");
    g_assert_cmpint(symlink(f->dir, link), ==, 0);
    check_refused(link, "is a symbolic link");
    check_refused("/", "is the root directory");
    check_refused("/proc/tty", "kernel's own");
    check_refused("/sys/kernel", "kernel's own");
    g_assert_cmpint(access("/v1-4k", F_OK), <, 0);
    unlink(link);
}

/* One that is missing is made, one level; else it is said what to do. */
static void test_missing(TestPair *f, gconstpointer data)
{
    g_autofree char *none = g_strdup_printf("%s/none", f->dir);
    g_autofree char *deep = g_strdup_printf("%s/no/such", f->dir);
    g_autofree char *no = g_strdup_printf("%s/no", f->dir);
    g_autofree char *why = NULL;
    TestMember *m;
    struct stat st;

    m = test_member_new(none, 0);
    g_assert_cmpint(stat(none, &st), ==, 0);
    g_assert_cmpint(st.st_mode & 07777, ==, 0700);
    test_member_free(m);

    why = test_join_error(deep);
    g_test_message("%s", why);
    g_assert_nonnull(strstr(why, "mkdir -p -m 700"));
    g_assert_cmpint(access(no, F_OK), <, 0);
}

/* Can others see where a member listens?  systemd-tmpfiles asks that. */
static void test_visible(TestPair *f, gconstpointer data)
{
    g_autofree char *path = inside(f, "m1.sock");
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents("/proc/net/unix", &text, NULL, NULL));
    g_assert_nonnull(strstr(text, path));
}

/* Nor does the path need to be the one that the kernel knows. */
static void test_visible_by_link(TestPair *f, gconstpointer data)
{
    g_autofree char *real = g_strdup_printf("%s/real", f->dir);
    g_autofree char *link = g_strdup_printf("%s/link", f->dir);
    g_autofree char *group = g_strdup_printf("%s/web", link);
    g_autofree char *sock = g_strdup_printf("%s/web/v1-4k/m0.sock", real);
    g_autofree char *text = NULL;
    TestMember *m;

    g_assert_cmpint(mkdir(real, 0700), ==, 0);
    g_assert_cmpint(symlink("real", link), ==, 0);
    m = test_member_new(group, 0);
    g_assert_true(g_file_get_contents("/proc/net/unix", &text, NULL, NULL));
    g_assert_nonnull(strstr(text, sock));
    test_member_free(m);
}

/* Names of members whose "slots" is gone stay, and lead to their group. */
static void test_newcomer(TestPair *f, gconstpointer data)
{
    g_autofree char *first = inside(f, "m0.sock");
    TestMember *c;
    struct stat st;

    g_assert_true(dedup_group_is_current(f->a->g));
    delete(f, "slots");
    g_assert_false(dedup_group_is_current(f->a->g));
    g_assert_false(dedup_group_is_current(f->b->g));
    c = test_member_new(f->dir, 0);
    g_assert_cmpint(stat(first, &st), ==, 0);
    g_assert_cmpuint(dedup_group_self(c->g), ==, 2);
    g_assert_cmpuint(dedup_group_salt(c->g), ==, dedup_group_salt(f->a->g));
    test_member_free(c);
}

/* A look that fails does not say that anything was deleted. */
static void test_no_answer(TestPair *f, gconstpointer data)
{
    g_autofree char *sub = g_strdup_printf("%s/v1-4k", f->dir);
    g_autofree char *aside = g_strdup_printf("%s/aside", f->dir);

    g_assert_cmpint(rename(sub, aside), ==, 0);
    g_assert_false(dedup_group_is_current(f->a->g));
    g_assert_cmpint(symlink("v1-4k", sub), ==, 0);
    g_assert_cmpint(access(sub, F_OK), <, 0);
    g_assert_cmpint(errno, ==, ELOOP);
    g_assert_true(dedup_group_is_current(f->a->g));
    g_assert_cmpint(unlink(sub), ==, 0);
    g_assert_true(g_file_set_contents(sub, "x", 1, NULL));
    g_assert_false(dedup_group_is_current(f->a->g));
    g_assert_cmpint(unlink(sub), ==, 0);
    g_assert_cmpint(rename(aside, sub), ==, 0);
    g_assert_true(dedup_group_is_current(f->a->g));
}

/* Without /proc nobody can be reached: that is not nobody who listens. */
static void test_no_proc(TestPair *f, gconstpointer data)
{
    int fd = f->a->g->subfd, status;
    pid_t pid = fork();

    if (pid == 0) {
        /* threads did not come along: system calls, no more */
        if (chroot(f->dir) < 0) {
            _exit(77);
        }
        _exit(!dedup_peer_is_listening(fd, 1) ? 1 :
              dedup_peer_is_listening(fd, 9) ? 2 : 0);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) {
        g_test_skip("chroot() is not permitted");
        return;
    }
    g_assert_cmpint(WEXITSTATUS(status), ==, 0);
}

static void rejoin(TestMember *m)
{
    g_autoptr(GError) error = NULL;

    dedup_group_detach(m->g);
    g_assert_true(dedup_group_join(m->g, test_ops(), m, &error));
    g_assert_no_error(error);
    dedup_group_enter(m->g);
}

/* Everything is deleted, and nobody came: they are what they were. */
static void test_resume(TestPair *f, gconstpointer data)
{
    uint32_t gid = dedup_group_segment_alloc(f->b->g, 9);
    DedupSegmentUse use = { .gid = gid, .mapped = 5 }, others;
    g_autofree char *sub = inside(f, ".");
    unsigned member, npages;

    g_assert_true(dedup_group_tell_use(f->b->g, &use));
    delete(f, "slots");
    delete(f, "lock");
    delete(f, "m0.sock");
    delete(f, "m1.sock");
    g_assert_cmpint(rmdir(sub) == 0 || errno == EINVAL, ==, true);
    rejoin(f->a);
    g_assert_true(dedup_group_resumed(f->a->g));
    rejoin(f->b);
    g_assert_true(dedup_group_resumed(f->b->g));
    g_assert_cmpuint(dedup_group_self(f->a->g), ==, 0);
    g_assert_cmpuint(dedup_group_self(f->b->g), ==, 1);
    dedup_group_refresh(f->a->g);
    g_assert_cmpuint(dedup_group_members(f->a->g), ==, 2);
    g_assert_true(dedup_group_segment_lookup(f->a->g, gid, &member,
                                             &npages));
    g_assert_cmpuint(member, ==, 1);
    dedup_group_others_use(f->a->g, gid, &others);
    g_assert_cmpuint(others.mapped, ==, 5);
    g_assert_true(dedup_group_is_current(f->a->g));
}

/* Somebody has begun another group by now: they are in that one. */
static void test_move(TestPair *f, gconstpointer data)
{
    uint64_t salt = dedup_group_salt(f->a->g);
    TestMember *c;

    delete(f, "slots");
    delete(f, "m0.sock");
    delete(f, "m1.sock");
    c = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_salt(c->g), !=, salt);
    rejoin(f->a);
    g_assert_false(dedup_group_resumed(f->a->g));
    g_assert_cmpuint(dedup_group_salt(f->a->g), ==, dedup_group_salt(c->g));
    rejoin(f->b);
    dedup_group_refresh(c->g);
    g_assert_cmpuint(dedup_group_members(c->g), ==, 3);
    test_member_free(c);
}

/* A segment takes the place of another: its use is not cleared for that. */
static void test_clear_use(TestPair *f, gconstpointer data)
{
    uint32_t old = dedup_group_segment_alloc(f->a->g, 9);
    DedupSegmentUse use = { .mapped = 7 }, others;

    dedup_group_segment_release(f->a->g, old);
    use.gid = dedup_group_segment_alloc(f->a->g, 9);
    g_assert_cmpuint(use.gid, !=, old);
    g_assert_cmpuint(use.gid % DEDUP_MAX_SEGMENTS, ==,
                     old % DEDUP_MAX_SEGMENTS);
    g_assert_true(dedup_group_tell_use(f->a->g, &use));
    g_assert_true(dedup_group_clear_use(f->a->g, old));
    dedup_group_others_use(f->b->g, use.gid, &others);
    g_assert_cmpuint(others.mapped, ==, 7);
}

typedef struct Looker {
    TestPair *f;
    bool stop;
} Looker;

static void ignore(void *opaque, unsigned member, bool self,
                   const DedupMemberInfo *info)
{
}

/* What room.c does, on any thread. */
static gpointer look_on(gpointer opaque)
{
    Looker *l = opaque;

    while (!__atomic_load_n(&l->stop, __ATOMIC_RELAXED)) {
        dedup_group_foreach_member(l->f->a->g, ignore, NULL);
    }
    return NULL;
}

/* Members are found by two threads at a time: they are counted once. */
static void test_two_threads(TestPair *f, gconstpointer data)
{
    Looker l = { .f = f };
    GThread *thread;

    thread = g_thread_new("looker", look_on, &l);
    for (unsigned i = 0; i < 300; i++) {
        TestMember *c = test_member_new(f->dir, 0);

        dedup_group_alive(f->a->g, dedup_group_self(c->g));
        dedup_group_alive(f->a->g, 77);
        test_member_free(c);
        if (i % 8 == 0) {
            dedup_group_refresh(f->a->g);
        }
    }
    __atomic_store_n(&l.stop, true, __ATOMIC_RELAXED);
    g_thread_join(thread);
    dedup_group_refresh(f->a->g);
    g_assert_cmpuint(dedup_group_members(f->a->g), ==, 2);
}

/* ---- engines ---- */

typedef struct Pair {
    char *dir;
    FxEngine *fe[2];
    FxRam *ram[2];
} Pair;

static void wait_shared(FxEngine *fe, uint64_t pages);

static void pair_new(Pair *p, FxKind kind)
{
    p->dir = fx_group_dir();
    for (unsigned i = 0; i < 2; i++) {
        p->ram[i] = fx_ram_new(kind, PAGES);
        for (uint32_t k = 0; k < PAGES / 2; k++) {
            fx_page(p->ram[i], k, 1000 + k);        /* in both */
        }
        p->fe[i] = fx_engine_new(p->dir);
        fx_add(p->fe[i], p->ram[i]);
        fx_engine_start(p->fe[i]);
    }
    wait_shared(p->fe[0], PAGES / 2);
    wait_shared(p->fe[1], PAGES / 2);
}

static void pair_free(Pair *p)
{
    for (unsigned i = 0; i < 2; i++) {
        fx_unmerge(p->fe[i]);
        fx_assert_bytes(p->ram[i]);
        fx_engine_free(p->fe[i]);
        p->ram[i]->region = NULL;
        fx_ram_free(p->ram[i]);
    }
    fx_group_dir_free(p->dir);
}

typedef struct Wanted {
    FxEngine *fe;
    uint64_t between;
    uint64_t members;
} Wanted;

static bool is_reached(void *opaque)
{
    Wanted *w = opaque;
    DedupStats stats;

    fx_stats(w->fe, &stats);
    /* some hints of pages that hide each other get lost */
    return stats.state != DEDUP_STATE_BLOCKED &&
           stats.pages_merged_between + 4 >= w->between &&
           (!w->members || stats.group.members == w->members);
}

static void wait_shared(FxEngine *fe, uint64_t pages)
{
    Wanted w = { .fe = fe, .between = pages };

    fx_wait_until(is_reached, &w, "not shared");
}

/* What is wrong is said as long as it is. */
static void check_says(FxEngine *fe)
{
    g_autofree char *text = dedup_engine_group_error(fe->e);
    DedupStats stats;

    fx_stats(fe, &stats);
    if (stats.state == DEDUP_STATE_BLOCKED) {
        g_assert_nonnull(text);
        g_assert_nonnull(strstr(text, "deleted or replaced"));
    }
}

/* Deleted by somebody; notice, say why, be together again. */
static void check_heals(Pair *p, const char *deletes)
{
    g_autofree char *command = g_strdup_printf(deletes, p->dir, p->dir);
    FxView before[2], after;

    for (unsigned i = 0; i < 2; i++) {
        fx_view(p->ram[i], &before[i]);
        g_assert_cmpuint(before[i].segment_pages, >=, PAGES / 2 - 4);
    }
    g_assert_cmpint(system(command), ==, 0);
    for (unsigned i = 0; i < 2; i++) {
        fx_wait_state(p->fe[i], DEDUP_STATE_BLOCKED);
        check_says(p->fe[i]);
    }
    for (unsigned i = 0; i < 2; i++) {
        Wanted w = { .fe = p->fe[i], .members = 2 };

        fx_wait_until(is_reached, &w, "not together again");
        /* nothing that was merged was given back */
        fx_view(p->ram[i], &after);
        g_assert_cmpuint(after.segment_pages, >=, before[i].segment_pages);
        g_assert_cmpuint(after.copied, ==, before[i].copied);
        fx_assert_bytes(p->ram[i]);
    }
    /* and they go on sharing */
    for (unsigned i = 0; i < 2; i++) {
        for (uint32_t k = PAGES / 2; k < PAGES; k++) {
            fx_page(p->ram[i], k, 9000 + k);
        }
    }
    wait_shared(p->fe[0], PAGES);
    wait_shared(p->fe[1], PAGES);
    fx_assert_bytes(p->ram[0]);
    fx_assert_bytes(p->ram[1]);
}

static void test_deleted(gconstpointer data)
{
    Pair p;

    pair_new(&p, FX_MEMFD);
    check_heals(&p, data);
    pair_free(&p);
}

/* A third comes before they notice, and begins a group of its own. */
static void test_third(void)
{
    FxRam *ram = fx_ram_new(FX_ANON, PAGES);
    g_autofree char *command = NULL;
    FxEngine *fe;
    Pair p;

    for (uint32_t k = 0; k < PAGES; k++) {
        fx_page(ram, k, k < PAGES / 2 ? 1000 + k : 20000 + k);
    }
    pair_new(&p, FX_ANON);
    command = g_strdup_printf("rm -r %s/v1-4k", p.dir);
    g_assert_cmpint(system(command), ==, 0);
    fe = fx_engine_new(p.dir);
    fx_add(fe, ram);
    fx_engine_start(fe);
    for (unsigned i = 0; i < 2; i++) {
        Wanted w = { .fe = p.fe[i], .members = 3 };

        fx_wait_until(is_reached, &w, "not together again");
        fx_assert_bytes(p.ram[i]);
    }
    /* what the two have had for long is found by the third */
    wait_shared(fe, PAGES / 2);
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    pair_free(&p);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    test_pair_add("/rejoin/refused", test_refused);
    test_pair_add("/rejoin/missing", test_missing);
    test_pair_add("/rejoin/visible", test_visible);
    test_pair_add("/rejoin/visible-by-link", test_visible_by_link);
    test_pair_add("/rejoin/newcomer", test_newcomer);
    test_pair_add("/rejoin/no-answer", test_no_answer);
    test_pair_add("/rejoin/no-proc", test_no_proc);
    test_pair_add("/rejoin/resume", test_resume);
    test_pair_add("/rejoin/move", test_move);
    test_pair_add("/rejoin/clear-use", test_clear_use);
    test_pair_add("/rejoin/two-threads", test_two_threads);
    g_test_add_data_func("/rejoin/deleted/slots", "rm %s/v1-4k/slots",
                         test_deleted);
    g_test_add_data_func("/rejoin/deleted/sockets", "rm %s/v1-4k/m?.sock",
                         test_deleted);
    g_test_add_data_func("/rejoin/deleted/all", "rm -r %1$s/v1-4k",
                         test_deleted);
    g_test_add_data_func("/rejoin/deleted/directory", "rm -r %s",
                         test_deleted);
    g_test_add_data_func("/rejoin/deleted/replaced",
                         "mv %1$s %1$s.old && mkdir -m 700 %1$s && "
                         "rm -r %1$s.old", test_deleted);
    g_test_add_func("/rejoin/third", test_third);
    return g_test_run();
}
