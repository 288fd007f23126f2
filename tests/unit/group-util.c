/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the tests of groups and of peers share; see group-util.h.
 */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"
#include "group-util.h"

char *test_dir_new(void)
{
    g_autoptr(GError) error = NULL;
    char *dir = g_dir_make_tmp("test-dedup-XXXXXX", &error);

    g_assert_no_error(error);
    return dir;
}

static void remove_tree(int dirfd, const char *name)
{
    int fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *d;

    if (dir) {
        while ((d = readdir(dir)) != NULL) {
            if (strcmp(d->d_name, ".") && strcmp(d->d_name, "..")) {
                remove_tree(fd, d->d_name);
            }
        }
        closedir(dir);
    }
    if (unlinkat(dirfd, name, dir ? AT_REMOVEDIR : 0) < 0) {
        g_error("cannot remove %s: %s", name, g_strerror(errno));
    }
}

void test_dir_free(char *dir)
{
    remove_tree(AT_FDCWD, dir);
    g_free(dir);
}

bool test_dir_has(const char *dir, const char *name)
{
    g_autofree char *path = g_strdup_printf("%s/v1-4k/%s", dir, name);
    struct stat st;

    return lstat(path, &st) == 0;
}

void test_fill(uint8_t *page, unsigned seed)
{
    uint32_t x = seed * 2654435761u + 1;

    for (size_t i = 0; i < DEDUP_PAGE_SIZE; i++) {
        x = x * 1664525u + 1013904223u;
        page[i] = x >> 24;
    }
}

static bool keyed_hash(void *opaque, uint32_t page, const uint8_t *secret,
                       DedupHash128 *hash)
{
    TestMember *m = opaque;

    __atomic_fetch_add(&m->hashed, 1, __ATOMIC_RELAXED);
    if (page >= TEST_PAGES || m->absent[page]) {
        return false;
    }
    return dedup_page_keyed_hash(m->pages[page], secret, hash);
}

static int segment_fd(void *opaque, uint32_t gid, uint32_t page,
                      const uint8_t *secret, DedupHash128 *hash)
{
    TestMember *m = opaque;

    return gid && gid == __atomic_load_n(&m->gid, __ATOMIC_ACQUIRE) &&
           keyed_hash(m, page, secret, hash) ?
           fcntl(m->segment, F_DUPFD_CLOEXEC, 0) : -1;
}

static void keyed_hashes(void *opaque, DedupOwnPage *pages, unsigned n,
                         const uint8_t *secret)
{
    for (unsigned i = 0; i < n; i++) {
        pages[i].is_there = keyed_hash(opaque, pages[i].page, secret,
                                       &pages[i].hash);
    }
}

static const DedupGroupOps ops = {
    .keyed_hashes = keyed_hashes,
    .segment_fd = segment_fd,
};

const DedupGroupOps *test_ops(void)
{
    return &ops;
}

TestMember *test_member_new(const char *dir, unsigned seed)
{
    g_autoptr(GError) error = NULL;
    TestMember *m = g_new0(TestMember, 1);

    m->segment = -1;
    m->pages = g_malloc(TEST_PAGES * sizeof(*m->pages));
    for (unsigned i = 0; i < TEST_PAGES; i++) {
        test_fill(m->pages[i], seed + i);
    }
    m->g = dedup_group_new(dir, &error);
    g_assert_no_error(error);
    dedup_group_join(m->g, &ops, m, &error);
    g_assert_no_error(error);
    dedup_group_enter(m->g);
    return m;
}

char *test_join_error(const char *dir)
{
    g_autoptr(GError) error = NULL;
    DedupGroup *g = dedup_group_new(dir, &error);

    g_assert_no_error(error);
    g_assert_false(dedup_group_join(g, &ops, NULL, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_GROUP);
    g_assert_nonnull(strstr(error->message, dir));
    dedup_group_free(g);
    return g_strdup(error->message);
}

void test_member_free(TestMember *m)
{
    dedup_group_free(m->g);
    if (m->segment >= 0) {
        close(m->segment);
    }
    g_free(m->pages);
    g_free(m);
}

unsigned test_count_fds(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned n = 0;

    g_assert_nonnull(dir);
    while (readdir(dir)) {
        n++;
    }
    closedir(dir);
    return n;
}

static void pair_setup(TestPair *f, gconstpointer data)
{
    f->fds = test_count_fds();
    f->dir = test_dir_new();
    f->a = test_member_new(f->dir, 1000);
    f->b = test_member_new(f->dir, 1000);
    dedup_group_refresh(f->a->g);
    g_assert_cmpuint(dedup_group_members(f->a->g), ==, 2);
}

static void pair_teardown(TestPair *f, gconstpointer data)
{
    test_member_free(f->a);
    test_member_free(f->b);
    test_dir_free(f->dir);
    g_assert_cmpuint(test_count_fds(), ==, f->fds);
}

void test_pair_add(const char *name, void (*fn)(TestPair *, gconstpointer))
{
    g_test_add(name, TestPair, NULL, pair_setup, fn, pair_teardown);
}

void test_hang_up(TestMember *m)
{
    dedup_group_refresh(m->g);
    dedup_group_refresh(m->g);
}

/*
 * Commands, answered by one int:
 *   r  refresh; members          a  allocate a segment; its gid
 *   u  use that segment          l  leave and join again; slot number
 *   s  slot number               L  hold the table's lock
 *   q  quit
 */
static void child_main(const char *dir, unsigned seed, int fd)
{
    TestMember *m = test_member_new(dir, seed);
    DedupMemberInfo info = { .pid = getpid(), .scanning = 1 };
    DedupSegmentUse use = { .gid = 0, .mapped = 3, .pages = { 7 } };
    int answer = dedup_group_self(m->g);
    char command = 0;

    g_assert_true(dedup_group_tell(m->g, &info));
    do {
        if (write(fd, &answer, sizeof(answer)) != sizeof(answer) ||
            read(fd, &command, 1) != 1) {
            break;
        }
        switch (command) {
        case 'r':
            dedup_group_refresh(m->g);
            answer = dedup_group_members(m->g);
            break;
        case 'a':
            answer = dedup_group_segment_alloc(m->g, 64);
            use.gid = answer;
            break;
        case 'u':
            answer = dedup_group_tell_use(m->g, &use);
            break;
        case 'l':
            test_member_free(m);
            m = test_member_new(dir, seed);
            g_assert_true(dedup_group_tell(m->g, &info));
            /* fall through */
        case 's':
            answer = dedup_group_self(m->g);
            break;
        case 'L':
            answer = dedup_group_table_lock(m->g);
            break;
        }
    } while (command != 'q');
    test_member_free(m);
}

TestChild test_child_new(const char *dir, unsigned seed)
{
    TestChild c;
    int fd[2];
    int joined;

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd),
                    ==, 0);
    c.pid = fork();
    g_assert_cmpint(c.pid, >=, 0);
    if (c.pid == 0) {
        close(fd[0]);
        child_main(dir, seed, fd[1]);
        _exit(0);
    }
    close(fd[1]);
    c.fd = fd[0];
    g_assert_cmpint(read(c.fd, &joined, sizeof(joined)), ==, sizeof(joined));
    return c;
}

int test_tell(TestChild *c, char command)
{
    int answer;

    g_assert_cmpint(write(c->fd, &command, 1), ==, 1);
    g_assert_cmpint(read(c->fd, &answer, sizeof(answer)), ==,
                    sizeof(answer));
    return answer;
}

void test_child_quit(TestChild *c)
{
    char quit = 'q';
    int status;

    g_assert_cmpint(write(c->fd, &quit, 1), ==, 1);
    g_assert_cmpint(waitpid(c->pid, &status, 0), ==, c->pid);
    g_assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    close(c->fd);
}

void test_child_kill(TestChild *c)
{
    int status;

    g_assert_cmpint(kill(c->pid, SIGKILL), ==, 0);
    g_assert_cmpint(waitpid(c->pid, &status, 0), ==, c->pid);
    g_assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    close(c->fd);
}

struct TestFake {
    GThread *thread;
    int listen_fd;
    int slots_fd;
    int stop;
    TestServe serve;
    void *opaque;
};

static void *fake_thread(void *opaque)
{
    TestFake *f = opaque;

    for (;;) {
        struct pollfd pfd[] = {
            { .fd = f->stop, .events = POLLIN },
            { .fd = f->listen_fd, .events = POLLIN },
        };
        int sock;

        poll(pfd, G_N_ELEMENTS(pfd), -1);
        if (pfd[0].revents) {
            return NULL;
        }
        sock = accept4(f->listen_fd, NULL, NULL, SOCK_CLOEXEC);
        if (sock >= 0) {
            f->serve(sock, f->opaque);
            close(sock);
        }
    }
}

TestFake *test_fake_new(const char *dir, unsigned member, TestServe serve,
                        void *opaque)
{
    g_autofree char *sub = g_strdup_printf("%s/v1-4k", dir);
    g_autofree char *slots = g_strdup_printf("%s/slots", sub);
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = member,
        .l_len = 1,
    };
    TestFake *f = g_new0(TestFake, 1);

    g_assert_true(mkdir(sub, 0700) == 0 || errno == EEXIST);
    f->slots_fd = open(slots, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    g_assert_cmpint(f->slots_fd, >=, 0);
    g_assert_cmpint(fcntl(f->slots_fd, F_OFD_SETLK, &lock), ==, 0);
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/m%u.sock", sub,
             member);
    unlink(addr.sun_path);
    f->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    g_assert_cmpint(bind(f->listen_fd, (struct sockaddr *)&addr,
                         sizeof(addr)), ==, 0);
    g_assert_cmpint(listen(f->listen_fd, 4), ==, 0);
    f->stop = eventfd(0, EFD_CLOEXEC);
    f->serve = serve;
    f->opaque = opaque;
    if (serve) {
        f->thread = g_thread_new("fake", fake_thread, f);
    }
    return f;
}

void test_fake_free(TestFake *f)
{
    if (f->thread) {
        eventfd_write(f->stop, 1);
        g_thread_join(f->thread);
    }
    close(f->stop);
    close(f->listen_fd);
    close(f->slots_fd);
    g_free(f);
}

bool test_receive(int sock, DedupMessage *m)
{
    struct pollfd pfd = { .fd = sock, .events = POLLIN };
    unsigned nfds;

    return poll(&pfd, 1, 2000) == 1 &&
           dedup_message_receive(sock, m, NULL, 0, &nfds) == 0;
}

void test_greet(int sock, uint8_t *nonce)
{
    DedupMessage m;

    memset(&m, 0, sizeof(m));
    if (nonce) {
        memcpy(m.nonce, nonce, sizeof(m.nonce));
    }
    dedup_message_send(sock, &m, DEDUP_MESSAGE_GREETING, NULL, 0);
}

int test_connect(const char *dir, unsigned member)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/v1-4k/m%u.sock", dir,
             member);
    g_assert_cmpint(connect(sock, (struct sockaddr *)&addr, sizeof(addr)),
                    ==, 0);
    return sock;
}
