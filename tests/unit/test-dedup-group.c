/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of groups: joining and leaving, members that are killed or stopped,
 * directories that cannot be used, the table of segments and its use.
 *
 * Most run several members in one process: their locks are on descriptions
 * of their own, as those of different processes are.
 */

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"
#include "group-util.h"

typedef struct Fixture {
    char *dir;
    unsigned fds;
} Fixture;

static void setup(Fixture *f, gconstpointer data)
{
    f->fds = test_count_fds();
    f->dir = test_dir_new();
}

static void teardown(Fixture *f, gconstpointer data)
{
    test_dir_free(f->dir);
    g_assert_cmpuint(test_count_fds(), ==, f->fds);
}

/* Without a directory: one member, and all else is the same. */
static void test_alone(Fixture *f, gconstpointer data)
{
    TestMember *m = test_member_new(NULL, 0);
    DedupHint hint = { .kind = DEDUP_HINT_CANDIDATE, .page = 5 };
    DedupHint hits[DEDUP_INDEX_HITS];
    DedupMemberInfo info = { .pid = 42 }, got;
    unsigned member, npages;
    uint32_t gid;
    DedupProof proof = { .content = m->pages[0] };
    DedupFetch item = { .gid = 1, .content = m->pages[0] };

    g_assert_false(dedup_group_has_dir(m->g));
    g_assert_cmpuint(dedup_group_members(m->g), ==, 1);
    g_assert_cmpuint(dedup_group_members_incompatible(m->g), ==, 0);
    g_assert_true(dedup_group_alive(m->g, dedup_group_self(m->g)));
    g_assert_false(dedup_group_alive(m->g, 1));
    g_assert_false(dedup_group_alive(m->g, 100000));
    g_assert_false(dedup_group_prove(m->g, 0, &proof, 1));
    dedup_group_fetch(m->g, 0, &item, 1);
    g_assert_cmpint(item.fd, ==, -1);
    g_assert_true(dedup_index_insert(dedup_group_index(m->g), 77, &hint));
    g_assert_cmpuint(dedup_index_lookup(dedup_group_index(m->g), 77, hits),
                     ==, 1);
    g_assert_false(dedup_group_member(m->g, 0, &got));
    g_assert_true(dedup_group_tell(m->g, &info));
    g_assert_true(dedup_group_member(m->g, 0, &got));
    g_assert_cmpuint(got.pid, ==, 42);
    gid = dedup_group_segment_alloc(m->g, 512);
    g_assert_cmpuint(gid, !=, 0);
    g_assert_true(dedup_group_segment_lookup(m->g, gid, &member, &npages));
    g_assert_cmpuint(member, ==, 0);
    g_assert_cmpuint(npages, ==, 512);
    /* Sparse: a few pages are in use. */
    g_assert_cmpuint(dedup_group_shared_bytes(m->g), >=, 3 * 4096);
    g_assert_cmpuint(dedup_group_shared_bytes(m->g), <=, 64 * 1024);
    test_member_free(m);
}

/* What is reserved is told at once; who tells anything tells that, too. */
static void test_reserved(Fixture *f, gconstpointer data)
{
    TestMember *a = test_member_new(f->dir, 0);
    TestMember *b = test_member_new(f->dir, 0);
    DedupMemberInfo info = { .pid = 7, .reserved_bytes = 5 }, got;
    uint64_t sum = 1 << 20;

    g_assert_false(dedup_group_tell_reserved(a->g, &sum));
    g_assert_false(dedup_group_member(b->g, 0, &got));
    g_assert_true(dedup_group_tell(a->g, &info));
    g_assert_true(dedup_group_member(b->g, 0, &got));
    g_assert_cmpuint(got.reserved_bytes, ==, 1 << 20);
    g_assert_cmpuint(got.pid, ==, 7);
    /* who computed the rest before that does not undo it */
    sum = 2 << 20;
    g_assert_true(dedup_group_tell(a->g, &info));
    g_assert_true(dedup_group_member(b->g, 0, &got));
    g_assert_cmpuint(got.reserved_bytes, ==, 2 << 20);

    /* while we are away it is remembered */
    dedup_group_detach(a->g);
    g_assert_false(dedup_group_is_joined(a->g));
    g_assert_false(dedup_group_tell_reserved(a->g, &sum));
    g_assert_false(dedup_group_member(a->g, 1, &got));
    g_assert_true(dedup_group_join(a->g, test_ops(), a, NULL));
    g_assert_false(dedup_group_is_joined(a->g));
    g_assert_false(dedup_group_tell(a->g, &info));
    dedup_group_enter(a->g);
    g_assert_true(dedup_group_is_joined(a->g));
    sum = 8 << 20;
    g_assert_true(dedup_group_tell_reserved(a->g, &sum));
    g_assert_true(dedup_group_member(b->g, 0, &got));
    g_assert_cmpuint(got.reserved_bytes, ==, 8 << 20);
    g_assert_cmpuint(got.pid, ==, 7);
    test_member_free(a);
    test_member_free(b);
}

static void test_join_leave(Fixture *f, gconstpointer data)
{
    TestMember *a = test_member_new(f->dir, 0), *b, *c;
    DedupHint hint = { .kind = DEDUP_HINT_CANDIDATE, .where = 0, .page = 5 };
    DedupHint hits[DEDUP_INDEX_HITS];
    DedupMemberInfo info = { .pid = 1, .owed_bytes = 1ull << 40 }, got;

    g_assert_true(dedup_group_has_dir(a->g));
    g_assert_true(test_dir_has(f->dir, "m0.sock"));
    b = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_self(a->g), ==, 0);
    g_assert_cmpuint(dedup_group_self(b->g), ==, 1);
    g_assert_cmpuint(dedup_group_members(b->g), ==, 2);
    g_assert_cmpuint(dedup_group_members(a->g), ==, 1);
    dedup_group_refresh(a->g);
    g_assert_cmpuint(dedup_group_members(a->g), ==, 2);
    g_assert_cmpuint(dedup_group_salt(a->g), ==, dedup_group_salt(b->g));
    g_assert_cmpuint(dedup_group_salt(a->g), !=, 0);

    /* One index. */
    g_assert_true(dedup_index_insert(dedup_group_index(a->g), 99, &hint));
    g_assert_cmpuint(dedup_index_lookup(dedup_group_index(b->g), 99, hits),
                     ==, 1);
    g_assert_cmpuint(hits[0].page, ==, 5);
    /* One set of slots. */
    g_assert_false(dedup_group_member(b->g, 0, &got));
    g_assert_true(dedup_group_tell(a->g, &info));
    g_assert_true(dedup_group_member(b->g, 0, &got));
    g_assert_cmpuint(got.owed_bytes, ==, 1ull << 40);

    /* The maker of the file leaves: it lives on with the others. */
    test_member_free(a);
    g_assert_false(test_dir_has(f->dir, "m0.sock"));
    dedup_group_refresh(b->g);
    g_assert_cmpuint(dedup_group_members(b->g), ==, 1);
    g_assert_false(dedup_group_alive(b->g, 0));
    g_assert_false(dedup_group_member(b->g, 0, &got));
    c = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_self(c->g), ==, 0);
    g_assert_cmpuint(dedup_group_salt(c->g), ==, dedup_group_salt(b->g));
    g_assert_cmpuint(dedup_index_lookup(dedup_group_index(c->g), 99, hits),
                     ==, 1);
    /* What the slot's last owner said is gone. */
    dedup_group_refresh(b->g);
    g_assert_false(dedup_group_member(b->g, 0, &got));
    test_member_free(b);
    test_member_free(c);
    g_assert_false(test_dir_has(f->dir, "m1.sock"));

    /* After the last one it begins anew. */
    a = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_index_lookup(dedup_group_index(a->g), 99, hits),
                     ==, 0);
    test_member_free(a);
}

/* A directory whose path is longer than a socket's may be. */
static void test_long_path(Fixture *f, gconstpointer data)
{
    g_autofree char *deep = g_strdup(f->dir);
    TestMember *a, *b;

    for (unsigned i = 0; i < 8; i++) {
        char *next = g_strdup_printf("%s/a-rather-long-name-%u", deep, i);

        g_assert_cmpint(mkdir(next, 0700), ==, 0);
        g_free(deep);
        deep = next;
    }
    g_assert_cmpuint(strlen(deep), >, 108);
    a = test_member_new(deep, 0);
    b = test_member_new(deep, 0);
    g_assert_cmpuint(dedup_group_members(b->g), ==, 2);
    test_member_free(a);
    test_member_free(b);
}

/* SIGKILL leaves a name and a slot; both are taken over clean. */
static void test_kill(Fixture *f, gconstpointer data)
{
    TestChild a = test_child_new(f->dir, 0), b = test_child_new(f->dir, 0);
    TestMember *m = test_member_new(f->dir, 0), *n;
    DedupMemberInfo info;
    DedupSegmentUse use;
    unsigned member, npages;
    uint32_t gid = test_tell(&a, 'a');

    g_assert_cmpuint(dedup_group_self(m->g), ==, 2);
    g_assert_cmpint(test_tell(&a, 'u'), ==, 1);
    g_assert_true(dedup_group_member(m->g, 0, &info));
    g_assert_cmpint(info.pid, ==, a.pid);
    dedup_group_others_use(m->g, gid, &use);
    g_assert_cmpuint(use.mapped, ==, 3);

    test_child_kill(&a);
    g_assert_true(test_dir_has(f->dir, "m0.sock"));
    dedup_group_refresh(m->g);
    g_assert_cmpuint(dedup_group_members(m->g), ==, 2);
    g_assert_false(dedup_group_alive(m->g, 0));
    g_assert_false(dedup_group_member(m->g, 0, &info));
    dedup_group_others_use(m->g, gid, &use);
    g_assert_cmpuint(use.mapped, ==, 0);
    /* Its segment is still known: others may have it. */
    g_assert_true(dedup_group_segment_lookup(m->g, gid, &member, &npages));

    test_child_kill(&b);
    g_assert_true(test_dir_has(f->dir, "m1.sock"));
    n = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_self(n->g), ==, 0);
    /* Its own name is its own, the other stale one is gone. */
    g_assert_true(test_dir_has(f->dir, "m0.sock"));
    g_assert_false(test_dir_has(f->dir, "m1.sock"));
    dedup_group_refresh(m->g);
    g_assert_false(dedup_group_member(m->g, 0, &info));
    dedup_group_others_use(m->g, gid, &use);
    g_assert_cmpuint(use.mapped, ==, 0);
    test_member_free(n);
    test_member_free(m);
}

/* Eight processes come, go and die; those that stay agree. */
static void test_eight(Fixture *f, gconstpointer data)
{
    TestChild c[8];
    g_autoptr(GHashTable) slots = g_hash_table_new(NULL, NULL);
    g_autoptr(GHashTable) gids = g_hash_table_new(NULL, NULL);
    uint32_t random = 12345;

    for (unsigned i = 0; i < 8; i++) {
        c[i] = test_child_new(f->dir, i);
    }
    for (unsigned round = 0; round < 40; round++) {
        TestChild *one = &c[(random >> 16) % 8];

        random = random * 1664525 + 1013904223;
        switch ((random >> 24) % 4) {
        case 0:
            test_child_kill(one);
            *one = test_child_new(f->dir, 0);
            break;
        case 1:
            test_child_quit(one);
            *one = test_child_new(f->dir, 0);
            break;
        case 2:
            g_assert_cmpint(test_tell(one, 'l'), >=, 0);
            break;
        default:
            g_assert_cmpint(test_tell(one, 'a'), !=, 0);
            g_assert_cmpint(test_tell(one, 'u'), ==, 1);
        }
    }
    for (unsigned i = 0; i < 8; i++) {
        int slot = test_tell(&c[i], 's');
        uint32_t gid = test_tell(&c[i], 'a');

        g_assert_cmpint(test_tell(&c[i], 'r'), ==, 8);
        /* No slot and no gid is there twice: one file, one table. */
        g_assert_true(g_hash_table_add(slots, GINT_TO_POINTER(slot + 1)));
        g_assert_true(g_hash_table_add(gids, GUINT_TO_POINTER(gid)));
    }
    for (unsigned i = 0; i < 8; i++) {
        if (i % 2) {
            test_child_kill(&c[i]);
        } else {
            test_child_quit(&c[i]);
        }
    }
}

/* What the join of @dir says to a process of user @uid. */
typedef struct Failing {
    pid_t pid;
    int fd;
} Failing;

static Failing failing_join(const char *dir, uid_t uid)
{
    Failing child;
    int fd[2];

    g_assert_cmpint(pipe2(fd, O_CLOEXEC), ==, 0);
    child.pid = fork();
    g_assert_cmpint(child.pid, >=, 0);
    if (child.pid == 0) {
        g_autofree char *message = NULL;
        ssize_t n;

        if (uid != getuid() && (setresgid(uid, uid, uid) ||
                                setresuid(uid, uid, uid))) {
            _exit(1);
        }
        message = test_join_error(dir);
        n = write(fd[1], message, strlen(message));
        _exit(n != (ssize_t)strlen(message));
    }
    close(fd[1]);
    child.fd = fd[0];
    return child;
}

static char *failing_message(Failing child)
{
    char text[1024] = "";
    ssize_t n = read(child.fd, text, sizeof(text) - 1);
    int status;

    close(child.fd);
    g_assert_cmpint(waitpid(child.pid, &status, 0), ==, child.pid);
    g_assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    g_assert_cmpint(n, >, 0);
    return g_strdup(text);
}

/*
 * A stopped member is no matter while there is another one.  When it is the
 * only one, or stopped while it joins, that is an error after a while.
 */
static void test_stopped(Fixture *f, gconstpointer data)
{
    TestChild stopped = test_child_new(f->dir, 0);
    TestChild other = test_child_new(f->dir, 0);
    char *dir2 = test_dir_new();
    g_autofree char *sub = g_strdup_printf("%s/v1-4k", dir2);
    g_autofree char *path = g_strdup_printf("%s/lock", sub);
    g_autofree char *joining = NULL, *alone = NULL;
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1,
    };
    DedupProof proof;
    TestMember *m;
    Failing child;
    int64_t start;
    int status, fd;

    kill(stopped.pid, SIGSTOP);
    g_assert_cmpint(waitpid(stopped.pid, &status, WUNTRACED), ==,
                    stopped.pid);
    m = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_members(m->g), ==, 3);
    start = g_get_monotonic_time();
    for (unsigned i = 0; i < 20; i++) {
        proof = (DedupProof) { .page = 1, .content = m->pages[1] };
        g_assert_false(dedup_group_prove(m->g, 0, &proof, 1));
        g_assert_true(dedup_group_prove(m->g, 1, &proof, 1));
        g_assert_true(proof.proven);
    }
    /* It cost its time limit once. */
    g_assert_cmpint(g_get_monotonic_time() - start, <,
                    DEDUP_PEER_TIMEOUT_MS * 3000);
    test_member_free(m);
    test_child_quit(&other);

    child = failing_join(f->dir, getuid());
    g_assert_cmpint(mkdir(sub, 0700), ==, 0);
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    g_assert_cmpint(fcntl(fd, F_OFD_SETLK, &lock), ==, 0);
    joining = test_join_error(dir2);
    g_assert_nonnull(strstr(joining, "has been joining"));
    alone = failing_message(child);
    g_assert_nonnull(strstr(alone, "1 live member"));
    g_assert_cmpint(g_get_monotonic_time() - start, <, 20 * G_USEC_PER_SEC);
    close(fd);
    test_dir_free(dir2);
    kill(stopped.pid, SIGCONT);
    test_child_quit(&stopped);
}

/* Live members that hand out something else than the shared file. */
static void serve_file(int sock, void *opaque)
{
    const int *fd = opaque;
    DedupMessage m;

    test_greet(sock, NULL);
    if (test_receive(sock, &m)) {
        dedup_message_send(sock, &m, DEDUP_MESSAGE_HELLO_REPLY, fd,
                           *fd >= 0);
    }
}

static int wrong_file(unsigned kind)
{
    DedupFileHeader header = {
        .magic = DEDUP_FILE_MAGIC,
        .version = DEDUP_FILE_VERSION,
        .page_size = DEDUP_PAGE_SIZE,
    };
    int seals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW;
    uint64_t size = dedup_group_file_size();
    int fd = memfd_create("wrong", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    switch (kind) {
    case 0:
        seals = 0;
        break;
    case 1:
        seals &= ~F_SEAL_SHRINK;
        break;
    case 2:
        seals &= ~F_SEAL_GROW;
        break;
    case 3:
        seals |= F_SEAL_WRITE;
        break;
    case 4:
        size -= DEDUP_PAGE_SIZE;
        break;
    case 5:
        size += DEDUP_PAGE_SIZE;
        break;
    case 6:
        header.magic++;
        break;
    case 7:
        header.version++;
        break;
    case 8:
        header.page_size *= 4;
        break;
    case 9:
        close(fd);
        return open("/dev/zero", O_RDWR | O_CLOEXEC);
    }
    g_assert_cmpint(ftruncate(fd, size), ==, 0);
    g_assert_cmpint(pwrite(fd, &header, sizeof(header), 0), ==,
                    sizeof(header));
    g_assert_cmpint(fcntl(fd, F_ADD_SEALS, seals), ==, 0);
    return fd;
}

static void test_wrong_file(Fixture *f, gconstpointer data)
{
    for (unsigned kind = 0; kind < 10; kind++) {
        int fd = wrong_file(kind);
        TestFake *fake = test_fake_new(f->dir, 3, serve_file, &fd);
        g_autofree char *message = test_join_error(f->dir);

        g_assert_nonnull(strstr(message, "none answered properly"));
        test_fake_free(fake);
        close(fd);
    }
}

/* A good member behind a bad one is found. */
static void test_wrong_file_first(Fixture *f, gconstpointer data)
{
    TestMember *a, *b;
    int fd = wrong_file(6);
    TestFake *fake;

    a = test_member_new(f->dir, 0);
    b = test_member_new(f->dir, 0);
    test_member_free(a);
    fake = test_fake_new(f->dir, 0, serve_file, &fd);
    a = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_self(a->g), ==, 2);
    g_assert_cmpuint(dedup_group_salt(a->g), ==, dedup_group_salt(b->g));
    test_member_free(a);
    test_member_free(b);
    test_fake_free(fake);
    close(fd);
}

/* ---- directories that cannot be used ---- */

static bool not_root(void)
{
    if (geteuid() != 0) {
        g_test_skip("needs root, to make directories of other users");
        return true;
    }
    return false;
}

static void test_foreign(Fixture *f, gconstpointer data)
{
    g_autofree char *message = NULL;

    if (not_root()) {
        return;
    }
    g_assert_cmpint(chown(f->dir, 12345, 12345), ==, 0);
    message = test_join_error(f->dir);
    g_assert_nonnull(strstr(message, "belongs to user 12345"));
    g_assert_nonnull(strstr(message, "chown"));
}

static void test_writable(Fixture *f, gconstpointer data)
{
    static const mode_t modes[] = { 0770, 0707, 0722 };
    TestMember *m;

    for (unsigned i = 0; i < G_N_ELEMENTS(modes); i++) {
        g_autofree char *message = NULL;

        g_assert_cmpint(chmod(f->dir, modes[i]), ==, 0);
        message = test_join_error(f->dir);
        g_assert_nonnull(strstr(message, "chmod go-w"));
        g_assert_false(test_dir_has(f->dir, "lock"));
    }
    g_assert_cmpint(chmod(f->dir, 0755), ==, 0);
    m = test_member_new(f->dir, 0);
    test_member_free(m);
}

static char *error_as_nobody(const char *dir)
{
    return failing_message(failing_join(dir, 65534));
}

static void test_unreadable(Fixture *f, gconstpointer data)
{
    g_autofree char *sub = g_strdup_printf("%s/group", f->dir);
    g_autofree char *first = NULL, *second = NULL, *third = NULL;

    if (not_root()) {
        return;
    }
    g_assert_cmpint(mkdir(sub, 0755), ==, 0);
    /* It cannot even be reached; the group exists nevertheless. */
    first = error_as_nobody(sub);
    g_assert_nonnull(strstr(first, "as user 65534: Permission denied"));
    /* It is there and belongs to root: no place for user 65534. */
    g_assert_cmpint(chmod(f->dir, 0755), ==, 0);
    second = error_as_nobody(sub);
    g_assert_nonnull(strstr(second, "as user 65534: Permission denied"));
    /* Another one's, who lets everybody look. */
    g_assert_cmpint(chown(sub, 1000, 1000), ==, 0);
    third = error_as_nobody(sub);
    g_assert_nonnull(strstr(third, "belongs to user 1000"));
}

/* Members of other versions are counted, and left alone. */
static void test_incompatible(Fixture *f, gconstpointer data)
{
    g_autofree char *v2 = g_strdup_printf("%s/v2-16k", f->dir);
    g_autofree char *slots = g_strdup_printf("%s/slots", v2);
    g_autofree char *odd = g_strdup_printf("%s/v3-4k", f->dir);
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 4, .l_len = 2,
    };
    TestMember *m;
    int fd;

    g_assert_cmpint(mkdir(v2, 0700), ==, 0);
    g_assert_cmpint(mkdir(odd, 0700), ==, 0);
    m = test_member_new(f->dir, 0);
    g_assert_cmpuint(dedup_group_members_incompatible(m->g), ==, 0);
    fd = open(slots, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    g_assert_cmpint(fcntl(fd, F_OFD_SETLK, &lock), ==, 0);
    dedup_group_refresh(m->g);
    g_assert_cmpuint(dedup_group_members_incompatible(m->g), ==, 2);
    g_assert_cmpuint(dedup_group_members(m->g), ==, 1);
    close(fd);
    dedup_group_refresh(m->g);
    g_assert_cmpuint(dedup_group_members_incompatible(m->g), ==, 0);
    test_member_free(m);
}

static void add(const char *name, void (*fn)(Fixture *, gconstpointer))
{
    g_test_add(name, Fixture, NULL, setup, fn, teardown);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    umask(022);
    add("/group/alone", test_alone);
    add("/group/reserved", test_reserved);
    add("/group/join-leave", test_join_leave);
    add("/group/long-path", test_long_path);
    add("/group/kill", test_kill);
    add("/group/eight", test_eight);
    add("/group/stopped", test_stopped);
    add("/group/wrong-file", test_wrong_file);
    add("/group/wrong-file-first", test_wrong_file_first);
    add("/group/foreign", test_foreign);
    add("/group/writable", test_writable);
    add("/group/unreadable", test_unreadable);
    add("/group/incompatible", test_incompatible);
    return g_test_run();
}
