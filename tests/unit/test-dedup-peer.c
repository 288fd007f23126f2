/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of what members say to each other: proofs that hold and do not
 * hold, liars on both sides, broken messages, silence, and descriptors that
 * nobody asked for.  Asking for segments is in test-dedup-fetch.c.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"
#include "group-util.h"
#include "host/mutant.h"

/* Asks @member whether it has the pages @from.. of @m at the same numbers. */
static bool prove(TestMember *m, unsigned member, DedupProof *proofs,
                  unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        proofs[i] = (DedupProof) { .page = i, .content = m->pages[i] };
    }
    return dedup_group_prove(m->g, member, proofs, n);
}

static void test_proof(TestPair *f, gconstpointer data)
{
    DedupProof proofs[DEDUP_PEER_BATCH];

    /* One bit, at either end; a page that is not there; one moved. */
    f->b->pages[3][0] ^= 1;
    f->b->pages[4][DEDUP_PAGE_SIZE - 1] ^= 0x80;
    f->b->absent[5] = true;
    memcpy(f->b->pages[6], f->b->pages[7], DEDUP_PAGE_SIZE);
    for (unsigned round = 0; round < 3; round++) {
        g_assert_true(prove(f->a, 1, proofs, DEDUP_PEER_BATCH));
        for (unsigned i = 0; i < DEDUP_PEER_BATCH; i++) {
            g_assert_cmpint(proofs[i].proven, ==, i < 3 || i > 6);
        }
    }
    /* Numbers beyond what the other has. */
    proofs[0].page = UINT32_MAX;
    proofs[1].page = TEST_PAGES;
    proofs[2].page = 2;
    g_assert_true(dedup_group_prove(f->a->g, 1, proofs, 3));
    g_assert_false(proofs[0].proven);
    g_assert_false(proofs[1].proven);
    g_assert_true(proofs[2].proven);
    /* Nobody, ourselves, no such member. */
    g_assert_false(prove(f->a, 2, proofs, 1));
    g_assert_false(prove(f->a, 0, proofs, 1));
    g_assert_false(prove(f->a, 1000, proofs, 1));
    g_assert_cmpuint(dedup_group_cpu_ns(f->b->g), >, 0);
}

/* ---- liars that are asked ---- */

typedef enum LieKind {
    LIE_GARBAGE,        /* yes to everything, with random answers */
    LIE_ECHO,           /* yes, with what the asker sent */
    LIE_SHORT,          /* fewer answers than questions */
    LIE_LONG,           /* more */
    LIE_TYPE,           /* another type of message */
    LIE_TRUNCATED,      /* half a message */
    LIE_FDS,            /* descriptors that nobody asked for */
    LIE_CLOSE,          /* hangs up */
    LIE_SILENT,         /* greets, and says no more until it is released */
    LIE_NO_GREETING,
} LieKind;

typedef struct Liar {
    LieKind kind;
    int release;        /* pipe: closed to end the silence */
} Liar;

static void wait_release(const Liar *liar)
{
    char c;

    g_assert_cmpint(read(liar->release, &c, 1), ==, 0);
}

static void lie_about_proof(int sock, void *opaque)
{
    const Liar *liar = opaque;
    DedupMessage m, reply;
    int fds[8];

    if (liar->kind == LIE_NO_GREETING) {
        wait_release(liar);
        return;
    }
    test_greet(sock, NULL);
    while (test_receive(sock, &m)) {
        memset(&reply, 0x5a, sizeof(reply));
        reply.head.n = m.head.n;
        for (unsigned i = 0; i < m.head.n; i++) {
            reply.answer[i].yes = 1;
            if (liar->kind == LIE_ECHO) {
                memcpy(reply.answer[i].answer, m.ask[i].ask,
                       DEDUP_PROOF_SIZE);
            }
        }
        switch (liar->kind) {
        case LIE_SHORT:
            reply.head.n--;
            break;
        case LIE_LONG:
            reply.head.n++;
            break;
        case LIE_TYPE:
            dedup_message_send(sock, &reply, DEDUP_MESSAGE_FETCH_REPLY, NULL,
                               0);
            continue;
        case LIE_TRUNCATED:
            send(sock, &m, sizeof(m.head) + 5, MSG_NOSIGNAL);
            continue;
        case LIE_FDS:
            for (unsigned i = 0; i < G_N_ELEMENTS(fds); i++) {
                fds[i] = sock;
            }
            dedup_message_send(sock, &reply, DEDUP_MESSAGE_PROVE_REPLY, fds,
                               G_N_ELEMENTS(fds));
            continue;
        case LIE_CLOSE:
            return;
        case LIE_SILENT:
            wait_release(liar);
            return;
        default:
            break;
        }
        dedup_message_send(sock, &reply, DEDUP_MESSAGE_PROVE_REPLY, NULL, 0);
    }
}

static void test_liars(TestPair *f, gconstpointer data)
{
    DedupProof proofs[16];

    for (LieKind kind = 0; kind <= LIE_NO_GREETING; kind++) {
        int release[2];
        Liar liar = { .kind = kind };
        TestFake *fake;
        bool answers = kind == LIE_GARBAGE || kind == LIE_ECHO;
        int64_t start, took;

        g_assert_cmpint(pipe2(release, O_CLOEXEC), ==, 0);
        liar.release = release[0];
        fake = test_fake_new(f->dir, 7, lie_about_proof, &liar);
        dedup_group_refresh(f->a->g);
        g_assert_true(dedup_group_alive(f->a->g, 7));

        start = g_get_monotonic_time();
        g_assert_cmpint(prove(f->a, 7, proofs, 16), ==, answers);
        took = g_get_monotonic_time() - start;
        for (unsigned i = 0; i < 16; i++) {
            g_assert_false(proofs[i].proven);
        }
        if (kind == LIE_SILENT || kind == LIE_NO_GREETING) {
            g_assert_cmpint(took, >=, DEDUP_PEER_TIMEOUT_MS * 900);
            /* Three times as long is a machine that is busy, not a hang. */
            g_assert_cmpint(took, <, DEDUP_PEER_TIMEOUT_MS * 3000);
        }
        if (!answers) {
            /* It is not asked again before the next refresh. */
            start = g_get_monotonic_time();
            g_assert_false(prove(f->a, 7, proofs, 16));
            took = g_get_monotonic_time() - start;
            g_assert_cmpint(took, <, DEDUP_PEER_TIMEOUT_MS * 500);
        }
        /* The others are not concerned. */
        g_assert_true(prove(f->a, 1, proofs, 16));
        g_assert_true(proofs[15].proven);
        close(release[1]);
        test_hang_up(f->a);
        test_fake_free(fake);
        close(release[0]);
        dedup_group_refresh(f->a->g);
        g_assert_false(dedup_group_alive(f->a->g, 7));
    }
}

/* M8: a page counts as proven that the other never had. */
static void test_mutant_no_proof(TestPair *f, gconstpointer data)
{
    DedupProof proofs[2];

    f->b->pages[0][0] ^= 1;
    g_assert_true(prove(f->a, 1, proofs, 2));
    g_assert_false(proofs[0].proven);
    dedup_mutant = DEDUP_MUTANT_NO_PROOF;
    prove(f->a, 1, proofs, 2);
    dedup_mutant = 0;
    g_assert_true(proofs[0].proven);
}

/* ---- a liar that has nothing and asks the asker itself ---- */

typedef struct Mirror {
    const char *dir;
    unsigned victim;            /* whose server is asked */
    unsigned yes;               /* answers that it got from there */
} Mirror;

static void serve_mirror(int sock, void *opaque)
{
    Mirror *mirror = opaque;
    int back = test_connect(mirror->dir, mirror->victim);
    DedupMessage m;

    /* The victim's nonce is passed on, so that both sides see the same. */
    g_assert_true(test_receive(back, &m));
    test_greet(sock, m.nonce);
    if (test_receive(sock, &m)) {
        dedup_message_send(back, &m, DEDUP_MESSAGE_PROVE, NULL, 0);
        g_assert_true(test_receive(back, &m));
        for (unsigned i = 0; i < m.head.n; i++) {
            mirror->yes += m.answer[i].yes;
        }
        dedup_message_send(sock, &m, DEDUP_MESSAGE_PROVE_REPLY, NULL, 0);
    }
    close(back);
}

static void test_mirror(TestPair *f, gconstpointer data)
{
    DedupProof proofs[4];
    Mirror mirror = { .dir = f->dir, .victim = 0 };
    TestFake *fake = test_fake_new(f->dir, 7, serve_mirror, &mirror);
    DedupPeer peer = DEDUP_PEER_INIT;

    /* A has the pages; 7 has none and asks A for what A wants of it. */
    dedup_group_refresh(f->a->g);
    g_assert_true(prove(f->a, 7, proofs, 4));
    for (unsigned i = 0; i < 4; i++) {
        g_assert_false(proofs[i].proven);
    }
    g_assert_cmpuint(mirror.yes, ==, 0);

    /* That it was the member's number which told: with it, this works. */
    g_assert_true(dedup_peer_connect(&peer, f->a->g->subfd, 7, 1000));
    g_assert_true(dedup_peer_prove(&peer, 0, proofs, 4, 1000));
    for (unsigned i = 0; i < 4; i++) {
        g_assert_true(proofs[i].proven);
    }
    dedup_peer_close(&peer);
    test_fake_free(fake);
}

/* ---- liars that ask ---- */

/*
 * Who does not have a page gets no answer for it: not by guessing, not by
 * playing a right question again, not with another nonce.
 */
static void test_hostile_asker(TestPair *f, gconstpointer data)
{
    int sock = test_connect(f->dir, 1);
    DedupMessage greeting, m, first;
    DedupProofKey key;
    DedupHash128 digest;

    g_assert_true(test_receive(sock, &greeting));
    memset(&m, 0x11, sizeof(m));
    m.head.n = 100;
    for (unsigned i = 0; i < 100; i++) {
        m.ask[i].page = i;
    }
    g_assert_cmpint(dedup_message_send(sock, &m, DEDUP_MESSAGE_PROVE, NULL,
                                       0), ==, 0);
    g_assert_true(test_receive(sock, &greeting));
    g_assert_cmpuint(greeting.head.type, ==, DEDUP_MESSAGE_PROVE_REPLY);
    for (unsigned i = 0; i < 100; i++) {
        static const uint8_t zero[DEDUP_PROOF_SIZE];

        g_assert_cmpuint(greeting.answer[i].yes, ==, 0);
        g_assert_cmpmem(greeting.answer[i].answer, DEDUP_PROOF_SIZE, zero,
                        DEDUP_PROOF_SIZE);
    }

    /* A right question for page 9 ... */
    memset(&m, 0, sizeof(m));
    m.head.n = 1;
    dedup_nonce_make(m.nonce);
    dedup_proof_key(&key, greeting.nonce, m.nonce, 1);
    g_assert_true(dedup_page_keyed_hash(f->a->pages[9], key.secret, &digest));
    m.ask[0].page = 9;
    dedup_proof_value(&key, DEDUP_PROOF_ASK, 0, &digest, m.ask[0].ask);
    first = m;
    g_assert_cmpint(dedup_message_send(sock, &m, DEDUP_MESSAGE_PROVE, NULL,
                                       0), ==, 0);
    g_assert_true(test_receive(sock, &m));
    g_assert_cmpuint(m.answer[0].yes, ==, 1);
    dedup_proof_value(&key, DEDUP_PROOF_ANSWER, 0, &digest, first.nonce);
    g_assert_cmpmem(m.answer[0].answer, DEDUP_PROOF_SIZE, first.nonce,
                    DEDUP_PROOF_SIZE);
    /* ... is worth nothing the second time: the nonce is another. */
    g_assert_cmpint(memcmp(m.nonce, greeting.nonce, DEDUP_NONCE_SIZE), !=,
                    0);
    m = first;
    g_assert_cmpint(dedup_message_send(sock, &m, DEDUP_MESSAGE_PROVE, NULL,
                                       0), ==, 0);
    g_assert_true(test_receive(sock, &m));
    g_assert_cmpuint(m.answer[0].yes, ==, 0);
    close(sock);
}

/* Whoever sends nonsense is cut off, and B serves on. */
static void assert_cut_off(TestPair *f, const void *data, size_t size,
                           unsigned nfds)
{
    int sock = test_connect(f->dir, 1);
    DedupMessage m;
    struct pollfd pfd = { .fd = sock, .events = POLLIN };
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(200 * sizeof(int))];
    } control;
    struct iovec iov = { .iov_base = (void *)data, .iov_len = size };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
    char byte;

    g_assert_true(test_receive(sock, &m));
    if (nfds) {
        struct cmsghdr *c;

        memset(&control, 0, sizeof(control));
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        for (unsigned i = 0; i < nfds; i++) {
            memcpy(CMSG_DATA(c) + i * sizeof(int), &sock, sizeof(int));
        }
    }
    g_assert_cmpint(sendmsg(sock, &msg, MSG_NOSIGNAL), ==, size);
    g_assert_cmpint(poll(&pfd, 1, 2000), ==, 1);
    g_assert_cmpint(recv(sock, &byte, 1, 0), <=, 0);
    close(sock);
}

static void test_broken_messages(TestPair *f, gconstpointer data)
{
    DedupProof proof;
    uint8_t big[sizeof(DedupMessage) + 100] = { 0 };
    DedupMessage m;
    DedupMessageHead good = {
        .magic = DEDUP_PEER_MAGIC,
        .version = DEDUP_PEER_VERSION,
        .type = DEDUP_MESSAGE_FETCH,
        .n = 2,
    };
    size_t size = dedup_message_size(DEDUP_MESSAGE_FETCH, 2);

    memset(&m, 0, sizeof(m));
#define CUT_OFF(field, value, n)                                        \
    do {                                                                \
        m.head = good;                                                  \
        m.head.field = value;                                           \
        assert_cut_off(f, &m, n, 0);                                    \
    } while (0)
    CUT_OFF(magic, 0, size);
    CUT_OFF(version, DEDUP_PEER_VERSION - 1, size);
    CUT_OFF(type, 0, size);
    CUT_OFF(type, 999, size);
    CUT_OFF(type, DEDUP_MESSAGE_GREETING, size);
    CUT_OFF(type, DEDUP_MESSAGE_HELLO_REPLY, sizeof(m.head));
    CUT_OFF(type, DEDUP_MESSAGE_PROVE, size);
    CUT_OFF(n, 3, size);
    CUT_OFF(n, 1, size);
    CUT_OFF(n, DEDUP_PEER_BATCH + 1, size);
    CUT_OFF(n, UINT32_MAX, size);
    CUT_OFF(n, 2, size - 1);
    CUT_OFF(n, 2, sizeof(m.head) - 1);
    CUT_OFF(n, 2, 1);
#undef CUT_OFF
    m.head = good;
    memcpy(big, &m, sizeof(m));
    assert_cut_off(f, big, sizeof(big), 0);
    /* Descriptors are of no use to a server: closed, and cut off. */
    assert_cut_off(f, &m, size, 1);
    assert_cut_off(f, &m, size, 200);
    g_assert_true(prove(f->a, 1, &proof, 1));
    g_assert_true(proof.proven);
}

/* More connections than a process gets: the newest are served. */
static void test_flood(TestPair *f, gconstpointer data)
{
    int sock[DEDUP_MAX_MEMBERS + 60];
    DedupProof proof;
    unsigned open = 0;
    char byte;

    for (unsigned i = 0; i < G_N_ELEMENTS(sock); i++) {
        DedupMessage m;

        sock[i] = test_connect(f->dir, 1);
        g_assert_true(test_receive(sock[i], &m));
    }
    g_assert_true(prove(f->a, 1, &proof, 1));
    g_assert_true(proof.proven);
    for (unsigned i = 0; i < G_N_ELEMENTS(sock); i++) {
        open += recv(sock[i], &byte, 1, MSG_DONTWAIT) < 0 &&
                errno == EAGAIN;
        close(sock[i]);
    }
    g_assert_cmpuint(open, <, 16);
    g_assert_cmpuint(open, >, 8);
}

/* A listener whose queue is full: connect() must not wait. */
static void test_full_queue(TestPair *f, gconstpointer data)
{
    TestFake *fake = test_fake_new(f->dir, 7, NULL, NULL);
    DedupProof proof;
    int sock[5];
    int64_t start;

    for (unsigned i = 0; i < G_N_ELEMENTS(sock); i++) {
        sock[i] = test_connect(f->dir, 7);
    }
    dedup_group_refresh(f->a->g);
    start = g_get_monotonic_time();
    g_assert_false(prove(f->a, 7, &proof, 1));
    g_assert_cmpint(g_get_monotonic_time() - start, <,
                    DEDUP_PEER_TIMEOUT_MS * 900);
    for (unsigned i = 0; i < G_N_ELEMENTS(sock); i++) {
        close(sock[i]);
    }
    test_fake_free(fake);
}

/* Connects to a socket as another user, and waits until it is closed. */
static pid_t connect_as(const struct sockaddr_un *addr, uid_t uid)
{
    pid_t pid = fork();
    char byte;
    int s;

    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (setresuid(uid, uid, uid) < 0 ||
            connect(s, (const struct sockaddr *)addr, sizeof(*addr)) < 0) {
            _exit(1);
        }
        _exit(read(s, &byte, 1) != 0);
    }
    return pid;
}

/* Only a peer of our own user is one of ours. */
static void test_other_user(void)
{
    static const struct { uid_t uid; bool ours; } users[] = {
        { 0, true }, { 65534, false },
    };
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int listener, status;

    if (getuid() != 0) {
        g_test_skip("needs root");
        return;
    }
    /* in no file system, so that everybody may connect */
    snprintf(addr.sun_path + 1, sizeof(addr.sun_path) - 1,
             "test-dedup-peer-%d", getpid());
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    g_assert_no_errno(bind(listener, (struct sockaddr *)&addr,
                           sizeof(addr)));
    g_assert_no_errno(listen(listener, 1));
    for (unsigned i = 0; i < G_N_ELEMENTS(users); i++) {
        pid_t pid = connect_as(&addr, users[i].uid);
        int s = accept(listener, NULL, NULL);
        pid_t peer;

        g_assert_cmpint(s, >=, 0);
        g_assert_true(dedup_peer_is_ours(s, &peer) == users[i].ours);
        g_assert_cmpint(peer, ==, pid);
        close(s);
        g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
        g_assert_cmpint(status, ==, 0);
    }
    close(listener);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    test_pair_add("/peer/proof", test_proof);
    test_pair_add("/peer/liars", test_liars);
    test_pair_add("/peer/mutant-no-proof", test_mutant_no_proof);
    test_pair_add("/peer/mirror", test_mirror);
    test_pair_add("/peer/hostile-asker", test_hostile_asker);
    test_pair_add("/peer/broken-messages", test_broken_messages);
    test_pair_add("/peer/flood", test_flood);
    test_pair_add("/peer/full-queue", test_full_queue);
    g_test_add_func("/peer/other-user", test_other_user);
    return g_test_run();
}
