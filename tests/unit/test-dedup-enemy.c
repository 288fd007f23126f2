/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Members that mean no good, and what they cost the others at most:
 *
 *   floods     two seconds of CPU time, then a tenth of a processor, and two
 *              rounds of an answer's time
 *   crowds     nothing: a process has few connections, and they give way to
 *              each other
 *   dawdles    a second and a half of a pass, as one that is silent
 *   fills      the shared file, so that each walk of the scanner takes long:
 *              it ends when it is to stop; the directory: a part of it is read
 *
 * What is silent, lies, plays again or hangs up is in test-dedup-peer.c; what
 * is deleted under live members is in test-dedup-rejoin.c.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"
#include "group-util.h"

#define ALL DEDUP_PEER_BATCH

static bool prove(TestMember *m, unsigned member, unsigned n)
{
    DedupProof proofs[ALL];

    for (unsigned i = 0; i < n; i++) {
        proofs[i] = (DedupProof) { .page = i, .content = m->pages[i] };
    }
    if (!dedup_group_prove(m->g, member, proofs, n)) {
        return false;
    }
    for (unsigned i = 0; i < n; i++) {
        g_assert_true(proofs[i].proven);
    }
    return true;
}

/* ---- floods ---- */

#define FLOODERS 4
#define ROUNDS 20

typedef struct Flood {
    const char *dir;
    bool stop;                  /* atomic */
    uint64_t sent;              /* atomic */
} Flood;

/* Asks for whatever takes longest, and does not wait for an answer. */
static gpointer flood(gpointer opaque)
{
    Flood *f = opaque;
    DedupMessage m = { .head.n = ALL };
    int sock = -1;

    while (!__atomic_load_n(&f->stop, __ATOMIC_RELAXED)) {
        struct pollfd pfd = { .fd = sock, .events = POLLIN | POLLOUT };
        char reply[sizeof(m)];

        if (sock < 0) {
            sock = test_connect(f->dir, 1);
            continue;
        }
        poll(&pfd, 1, 100);
        while (recv(sock, reply, sizeof(reply), MSG_DONTWAIT) > 0) {
            continue;
        }
        if (pfd.revents & (POLLHUP | POLLERR)) {
            close(sock);
            sock = -1;
        } else if (pfd.revents & POLLOUT &&
                   dedup_message_send(sock, &m, DEDUP_MESSAGE_PROVE, NULL,
                                      0) == 0) {
            __atomic_fetch_add(&f->sent, 1, __ATOMIC_RELAXED);
        }
    }
    close(sock);
    return NULL;
}

static void test_flood(TestPair *f, gconstpointer data)
{
    Flood fl = { .dir = f->dir };
    GThread *threads[FLOODERS];
    int64_t start, now;
    uint64_t cpu;
    unsigned answered = 0, asked = 0;

    for (unsigned i = 0; i < FLOODERS; i++) {
        threads[i] = g_thread_new("flooder", flood, &fl);
    }
    /* what nobody used until now, and what comes to it meanwhile */
    start = g_get_monotonic_time();
    do {
        prove(f->a, 1, ALL);
        now = g_get_monotonic_time();
    } while (dedup_group_cpu_ns(f->b->g) < DEDUP_PEER_CREDIT_NS / 100 * 99 +
             (uint64_t)(now - start) * 100);
    /* who joins is not slowed: with a tenth it would take ten times as long */
    g_assert_cmpint(now - start, <, DEDUP_PEER_CREDIT_NS * 9 / 1000);
    cpu = dedup_group_cpu_ns(f->b->g);
    start = now = g_get_monotonic_time();
    for (; asked < ROUNDS || now - start < G_TIME_SPAN_SECOND; asked++) {
        int64_t before = g_get_monotonic_time();

        dedup_group_refresh(f->a->g);
        answered += prove(f->a, 1, ALL);
        now = g_get_monotonic_time();
        /* three times as long is a machine that is busy, not a hang */
        g_assert_cmpint(now - before, <, DEDUP_PEER_TIMEOUT_MS * 3000);
    }
    cpu = dedup_group_cpu_ns(f->b->g) - cpu;
    __atomic_store_n(&fl.stop, true, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < FLOODERS; i++) {
        g_thread_join(threads[i]);
    }
    g_test_message("%u of %u answered in %d ms beside %u others, for %u ms of"
                   " CPU time", answered, asked, (int)(now - start) / 1000,
                   (unsigned)fl.sent, (unsigned)(cpu / 1000000));
    g_assert_cmpuint(fl.sent, >, 0);
    g_assert_cmpuint(answered, >, asked / 2);
    /* a tenth, and what is begun is done */
    g_assert_cmpuint(cpu, <, (now - start) * 1000 / 5 + 50000000);
}

/* ---- crowds ---- */

static void connect_on(const char *dir, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        struct pollfd pfd = {
            .fd = test_connect(dir, 1), .events = POLLIN,
        };

        /* it is greeted, so it is one of those that are kept */
        poll(&pfd, 1, -1);
    }
}

/* Another process takes all connections that it can get. */
static void test_crowd(TestPair *f, gconstpointer data)
{
    int to_child[2], from_child[2], status;
    char c;
    pid_t pid;

    g_assert_true(prove(f->a, 1, 1));
    g_assert_cmpint(pipe(to_child), ==, 0);
    g_assert_cmpint(pipe(from_child), ==, 0);
    pid = fork();
    if (pid == 0) {
        connect_on(f->dir, DEDUP_MAX_MEMBERS + 60);
        (void)!write(from_child[1], "", 1);
        close(to_child[1]);
        (void)!read(to_child[0], &c, 1);
        _exit(0);
    }
    close(to_child[0]);
    close(from_child[1]);
    g_assert_cmpint(read(from_child[0], &c, 1), ==, 1);
    /* the connection that there was is still there */
    g_assert_true(prove(f->a, 1, ALL));
    close(to_child[1]);
    close(from_child[0]);
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_cmpint(status, ==, 0);
}

/* ---- dawdles ---- */

#define DAWDLE_MS 300

/* Right answers, but late. */
static void dawdle(int sock, void *opaque)
{
    const TestPair *f = opaque;
    DedupMessage m, reply;
    uint8_t nonce[DEDUP_NONCE_SIZE] = { 1 };
    DedupProofKey key;

    test_greet(sock, nonce);
    while (test_receive(sock, &m)) {
        struct pollfd pfd = { .fd = sock };

        memset(&reply, 0, sizeof(reply));
        reply.head.n = m.head.n;
        dedup_proof_key(&key, nonce, m.nonce, 7);
        for (unsigned i = 0; i < m.head.n; i++) {
            DedupHash128 digest;

            g_assert_true(dedup_page_keyed_hash(f->b->pages[i], key.secret,
                                                &digest));
            reply.answer[i].yes = 1;
            dedup_proof_value(&key, DEDUP_PROOF_ANSWER, i, &digest,
                              reply.answer[i].answer);
        }
        nonce[0]++;
        memcpy(reply.nonce, nonce, sizeof(nonce));
        if (poll(&pfd, 1, DAWDLE_MS) != 0) {
            return;
        }
        dedup_message_send(sock, &reply, DEDUP_MESSAGE_PROVE_REPLY, NULL, 0);
    }
}

static void test_dawdle(TestPair *f, gconstpointer data)
{
    TestFake *fake = test_fake_new(f->dir, 7, dawdle, f);
    int64_t start, took;
    unsigned asked = 0;

    dedup_group_refresh(f->a->g);
    start = g_get_monotonic_time();
    while (asked < 20 && prove(f->a, 7, 1)) {
        asked++;
    }
    took = g_get_monotonic_time() - start;
    g_test_message("%u answers in %d ms, then no more", asked,
                   (int)(took / 1000));
    g_assert_cmpuint(asked, >, 0);
    g_assert_cmpuint(asked, <=, 1000 / DAWDLE_MS + 1);
    /* a second, and one answer or time-out more; three times if busy */
    g_assert_cmpint(took, <, 3 * 1500 * G_TIME_SPAN_MILLISECOND);
    test_hang_up(f->a);
    test_fake_free(fake);
}

/* ---- fills ---- */

static bool count_segment(void *opaque, uint32_t gid, unsigned npages,
                          bool ours, const DedupSegmentUse *own,
                          const DedupSegmentUse *others)
{
    ++*(unsigned *)opaque;
    return false;
}

static bool stop_at_once(void *opaque)
{
    return true;
}

/* The table is full of segments of nobody, all rows are as long as may be. */
static void test_tall_table(TestPair *f, gconstpointer data)
{
    g_autofree DedupTableEntry *table = g_new0(DedupTableEntry,
                                               DEDUP_MAX_SEGMENTS);
    DedupGroup *enemy = f->b->g;
    struct flock all = { .l_type = F_WRLCK, .l_start = 2 };
    uint32_t most = UINT32_MAX;
    unsigned n = 0;
    int64_t start;

    for (uint32_t i = 0; i < DEDUP_MAX_SEGMENTS; i++) {
        table[i] = (DedupTableEntry) {
            .gid = DEDUP_MAX_SEGMENTS + i, .npages = 1, .member = 200,
        };
    }
    all.l_len = DEDUP_MAX_MEMBERS - 2;
    g_assert_cmpint(fcntl(enemy->slots_fd, F_OFD_SETLK, &all), ==, 0);
    for (unsigned k = 2; k < DEDUP_MAX_MEMBERS; k++) {
        g_assert_true(dedup_group_file_write(
            &enemy->file, &most, sizeof(most), DEDUP_FILE_SLOTS +
            k * sizeof(DedupSlot) + offsetof(DedupSlot, rows)));
    }
    g_assert_true(dedup_group_file_write(&enemy->file, table,
                                         DEDUP_MAX_SEGMENTS * sizeof(*table),
                                         DEDUP_FILE_TABLE));
    enemy->file.header->segments = most;
    dedup_group_refresh(f->a->g);
    g_assert_cmpuint(dedup_group_members(f->a->g), ==, DEDUP_MAX_MEMBERS);
    start = g_get_monotonic_time();
    dedup_group_foreach_segment(f->a->g, count_segment, &n);
    g_test_message("%u segments, %u members: a walk takes %d ms", n,
                   dedup_group_members(f->a->g),
                   (int)((g_get_monotonic_time() - start) / 1000));
    g_assert_cmpuint(n, ==, DEDUP_MAX_SEGMENTS);

    /* somebody waits for the scanner's end, with QEMU's lock */
    f->a->g->walk->is_stopping = stop_at_once;
    n = 0;
    g_assert_false(dedup_group_foreach_segment(f->a->g, count_segment, &n));
    g_assert_cmpuint(n, ==, 0);
}

/* A directory with more names in it than anybody wants to read. */
static void test_names(TestPair *f, gconstpointer data)
{
    struct flock lock = { .l_type = F_WRLCK, .l_len = 1 };
    g_autofree char *first = g_strdup_printf("%s/first", f->dir);
    int fd = open(first, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    g_assert_cmpint(fcntl(fd, F_OFD_SETLK, &lock), ==, 0);
    for (unsigned i = 0; i < 300; i++) {
        g_autofree char *sub = g_strdup_printf("%s/v9-%u", f->dir, i);
        g_autofree char *slots = g_strdup_printf("%s/slots", sub);

        g_assert_cmpint(mkdir(sub, 0700), ==, 0);
        g_assert_cmpint(link(first, slots), ==, 0);
    }
    /* each is opened, and has a member that lives */
    dedup_group_refresh(f->a->g);
    g_assert_cmpuint(dedup_group_members_incompatible(f->a->g), >, 100);
    g_assert_cmpuint(dedup_group_members_incompatible(f->a->g), <=, 256);
    close(fd);
}

/* ---- in the middle of a join ---- */

typedef struct Thief {
    DedupGroupFile file;
    char *lock;
    bool takes;                 /* the lock's file away */
} Thief;

static void take_lock(int sock, void *opaque)
{
    Thief *t = opaque;
    DedupMessage m;

    test_greet(sock, NULL);
    if (!test_receive(sock, &m)) {
        return;
    }
    if (t->takes) {
        g_assert_cmpint(unlink(t->lock), ==, 0);
    }
    dedup_message_send(sock, &m, DEDUP_MESSAGE_HELLO_REPLY, &t->file.fd, 1);
}

/* Whose lock is gone gives up: somebody else may be joining with another. */
static void test_lock_deleted(void)
{
    g_autoptr(GError) error = NULL;
    char *dir = test_dir_new();
    Thief t = {
        .lock = g_strdup_printf("%s/v1-4k/lock", dir), .takes = true,
    };
    TestFake *fake;
    TestMember *m;
    char *why;

    g_assert_true(dedup_group_file_create(&t.file, &error));
    fake = test_fake_new(dir, 0, take_lock, &t);
    why = test_join_error(dir);
    g_test_message("%s", why);
    g_assert_nonnull(strstr(why, "deleted or replaced"));
    g_assert_false(test_dir_has(dir, "m1.sock"));
    g_free(why);
    t.takes = false;
    m = test_member_new(dir, 0);
    g_assert_cmpuint(dedup_group_self(m->g), ==, 1);
    test_member_free(m);
    test_fake_free(fake);
    dedup_group_file_close(&t.file);
    g_free(t.lock);
    test_dir_free(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    test_pair_add("/enemy/flood", test_flood);
    test_pair_add("/enemy/crowd", test_crowd);
    test_pair_add("/enemy/dawdle", test_dawdle);
    test_pair_add("/enemy/tall-table", test_tall_table);
    test_pair_add("/enemy/names", test_names);
    g_test_add_func("/enemy/lock-deleted", test_lock_deleted);
    return g_test_run();
}
