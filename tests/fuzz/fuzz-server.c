/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer: the side of a member's socket that answers.
 *
 * An input is what several clients do: connect, send messages that are right,
 * nearly right, old ones, or bytes, with descriptors or without; not read;
 * hang up.  Only who proves a page is told that it is there, or given a
 * segment; whatever came before, the next one is served, and no descriptor
 * stays open.
 *
 * The server's functions are called here, one message at a time, so the source
 * is a part of this one.
 */

#include <sys/mman.h>
#include <sys/un.h>

#include "fuzz-input.h"
#include "fuzz-packet.h"
#include "group/peer-server.c"

#define PAGES 8
#define GIDS 3
#define CLIENTS 5
#define SELF 7

static uint8_t pages[PAGES][DEDUP_PAGE_SIZE];
static int segment[GIDS + 1];
static DedupPeerServer server;

typedef struct FuzzClient {
    int fd;                     /* -1: none */
    bool deaf;
    uint8_t nonce[DEDUP_NONCE_SIZE];
    uint8_t old[DEDUP_NONCE_SIZE];
    bool right[DEDUP_PEER_BATCH];   /* of what it asked last */
} FuzzClient;

static FuzzClient client[CLIENTS];
static uint32_t nonces;         /* made for this input */

bool __wrap_dedup_nonce_make(uint8_t *nonce)
{
    memset(nonce, 0, DEDUP_NONCE_SIZE);
    nonces++;
    memcpy(nonce, &nonces, sizeof(nonces));
    return true;
}

static void keyed_hashes(void *opaque, DedupOwnPage *own, unsigned n,
                         const uint8_t *secret)
{
    for (unsigned i = 0; i < n; i++) {
        own[i].is_there = own[i].page < PAGES &&
            dedup_page_keyed_hash(pages[own[i].page], secret, &own[i].hash);
    }
}

static int segment_fd(void *opaque, uint32_t gid, uint32_t page,
                      const uint8_t *secret, DedupHash128 *hash)
{
    if (gid == 0 || gid > GIDS || page >= PAGES) {
        return -1;
    }
    dedup_page_keyed_hash(pages[page], secret, hash);
    return fcntl(segment[gid], F_DUPFD_CLOEXEC, 0);
}

static void proven(void *opaque, const DedupOwnPage *own, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        g_assert_true(!own[i].is_there || own[i].page < PAGES);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };

    for (unsigned i = 0; i < PAGES; i++) {
        memset(pages[i], 'a' + i, DEDUP_PAGE_SIZE);
    }
    for (unsigned i = 0; i <= GIDS; i++) {
        segment[i] = memfd_create("fuzz", MFD_CLOEXEC);
    }
    server.listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK |
                              SOCK_CLOEXEC, 0);
    server.shared_fd = segment[0];
    server.self = SELF;
    server.ops = (DedupGroupOps) {
        .keyed_hashes = keyed_hashes, .segment_fd = segment_fd,
        .proven = proven,
    };
    /* a name that the kernel chooses, in no directory */
    g_assert_cmpint(bind(server.listen_fd, (struct sockaddr *)&addr,
                         sizeof(addr.sun_family)), ==, 0);
    g_assert_cmpint(listen(server.listen_fd, 16), ==, 0);
    return 0;
}

static void hang_up(FuzzClient *c)
{
    if (c->fd >= 0) {
        close(c->fd);
    }
    *c = (FuzzClient) { .fd = -1 };
}

/* What the thread does in one round of its loop. */
static void serve(void)
{
    for (unsigned i = server.clients; i-- > 0;) {
        struct pollfd pfd = {
            .fd = server.client[i].fd, .events = POLLIN
        };

        if (poll(&pfd, 1, 0) == 1 && !client_serve(&server,
                                                   &server.client[i])) {
            client_close(&server, i);
        }
    }
}

static bool take_reply(FuzzClient *c)
{
    int fds[DEDUP_PEER_BATCH];
    unsigned nfds, given = 0;
    DedupMessage m;
    int ret = dedup_message_receive(c->fd, &m, fds, DEDUP_PEER_BATCH, &nfds);

    if (ret == -EAGAIN) {
        return false;
    }
    if (ret < 0) {
        g_assert_cmpint(ret, !=, -EPROTO);
        hang_up(c);
        return false;
    }
    switch (m.head.type) {
    case DEDUP_MESSAGE_HELLO_REPLY:
        g_assert_cmpuint(nfds, ==, 1);
        given = 1;
        break;
    case DEDUP_MESSAGE_FETCH_REPLY:
        for (unsigned i = 0; i < m.head.n; i++) {
            g_assert_true(!m.has[i] || c->right[i]);
            given += m.has[i] != 0;
        }
        break;
    case DEDUP_MESSAGE_PROVE_REPLY:
        for (unsigned i = 0; i < m.head.n; i++) {
            g_assert_cmpint(m.answer[i].yes, ==, c->right[i]);
        }
        break;
    default:
        g_assert_cmpint(m.head.type, ==, DEDUP_MESSAGE_GREETING);
    }
    g_assert_cmpuint(nfds, ==, given);
    while (nfds) {
        close(fds[--nfds]);
    }
    if (m.head.type != DEDUP_MESSAGE_HELLO_REPLY) {
        memcpy(c->old, c->nonce, sizeof(c->old));
        memcpy(c->nonce, m.nonce, sizeof(c->nonce));
    }
    return true;
}

static void take_replies(FuzzClient *c)
{
    while (c->fd >= 0 && !c->deaf && take_reply(c)) {
        continue;
    }
}

static void start(FuzzClient *c)
{
    struct sockaddr_un addr;
    socklen_t len = sizeof(addr);

    hang_up(c);
    getsockname(server.listen_fd, (struct sockaddr *)&addr, &len);
    c->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    g_assert_cmpint(connect(c->fd, (struct sockaddr *)&addr, len), ==, 0);
    client_accept(&server);
    g_assert_true(take_reply(c));
}

/* A packet, with descriptors. */
static void send_raw(FuzzClient *c, const void *data, size_t size,
                     unsigned nfds)
{
    int fds[FUZZ_FDS_MOST];

    for (unsigned i = 0; i < nfds; i++) {
        fds[i] = segment[0];
    }
    fuzz_send(c->fd, data, size, fds, nfds);
}

/* Questions of which the input says how each is wrong. */
static void ask(FuzzInput *in, FuzzClient *c, bool fetch)
{
    bool replay = fuzz_u8(in) & 1;
    DedupMessage m = { .head.n = fuzz_u8(in) % (DEDUP_PEER_BATCH + 1) };
    DedupProofKey key;

    fuzz_bytes(in, m.nonce, 4);
    dedup_proof_key(&key, replay ? c->old : c->nonce, m.nonce, SELF);
    for (unsigned i = 0; i < m.head.n; i++) {
        unsigned how = fuzz_u8(in);
        uint32_t page = how & 0x80 ? fuzz_u32(in) : how % (PAGES + 1);
        uint32_t gid = how & 0x20 ? fuzz_u32(in) : 1 + how / 8 % (GIDS + 1);
        uint8_t value[DEDUP_PROOF_SIZE];
        DedupHash128 digest;

        dedup_page_keyed_hash(pages[page % PAGES], key.secret, &digest);
        dedup_proof_value(&key, fetch ? DEDUP_PROOF_FETCH : DEDUP_PROOF_ASK,
                          i, &digest, value);
        value[i % DEDUP_PROOF_SIZE] ^= how & 0x40 ? fuzz_u8(in) : 0;
        /* wrong in one bit only is what the input may have made of it */
        c->right[i] = !(how & 0x40) && page < PAGES && !replay &&
                      (!fetch || (gid && gid <= GIDS));
        if (how & 0x40) {
            value[0] ^= 1;
            value[DEDUP_PROOF_SIZE - 1] ^= 2;
        }
        if (fetch) {
            m.fetch[i] = (DedupFetchAsk) { .gid = gid, .page = page };
            memcpy(m.fetch[i].ask, value, sizeof(value));
        } else {
            m.ask[i].page = page;
            memcpy(m.ask[i].ask, value, sizeof(value));
        }
    }
    dedup_message_send(c->fd, &m, fetch ? DEDUP_MESSAGE_FETCH
                                        : DEDUP_MESSAGE_PROVE, NULL, 0);
}

/* A message whose head is nearly right, or bytes. */
static void send_any(FuzzInput *in, FuzzClient *c)
{
    uint8_t how = fuzz_u8(in), more;
    DedupMessage m = { 0 };
    uint8_t head[sizeof(m.head)];
    size_t size;

    m.head.magic = DEDUP_PEER_MAGIC;
    m.head.version = DEDUP_PEER_VERSION;
    m.head.type = fuzz_u8(in) % 9;
    m.head.n = fuzz_u8(in);
    size = dedup_message_size(m.head.type, MIN(m.head.n, DEDUP_PEER_BATCH));
    if (how & 1) {
        fuzz_bytes(in, head, sizeof(head));
        for (unsigned i = 0; i < sizeof(head); i++) {
            ((uint8_t *)&m.head)[i] ^= head[i];
        }
    }
    fuzz_bytes(in, m.nonce, MIN(in->left, 40));
    if (how & 6) {
        more = fuzz_u8(in);
        size = how & 2 ? MIN(size + more, sizeof(m)) : size - MIN(size, more);
    }
    memset(c->right, 0, sizeof(c->right));
    send_raw(c, &m, size, how & 8 ? fuzz_u8(in) % (FUZZ_FDS_MOST + 1) : 0);
}

static void step(FuzzInput *in)
{
    unsigned op = fuzz_u8(in);
    FuzzClient *c = &client[op / 8 % CLIENTS];

    if (c->fd < 0) {
        start(c);
        return;
    }
    if (c->deaf && op % 8 < 4) {
        /* what it asks is not what it reads next */
        memset(c->right, 0, sizeof(c->right));
        op = 3;
    }
    switch (op % 8) {
    case 0:
    case 1:
        take_replies(c);
        if (c->fd >= 0) {
            ask(in, c, op & 1);
        }
        break;
    case 2:
        send_any(in, c);
        break;
    case 3: {
        DedupMessage m = { .head.n = 0 };

        dedup_message_send(c->fd, &m, DEDUP_MESSAGE_HELLO, NULL, 0);
        break;
    }
    case 4:
        c->deaf = true;
        break;
    case 5:
        hang_up(c);
        break;
    case 6:
        shutdown(c->fd, fuzz_u8(in) % 3);
        break;
    default:
        start(c);
    }
    serve();
    take_replies(c);
}

/* Somebody who does as he should gets his answer. */
static void check_serves(void)
{
    FuzzClient *c = &client[0];
    uint8_t how[] = { 0, 2, 0x01, 0x12 };
    FuzzInput in = { .at = how, .left = sizeof(how) };

    start(c);
    ask(&in, c, true);
    serve();
    g_assert_true(take_reply(c));
    g_assert_true(c->right[0]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    FuzzInput in = { .at = data, .left = size };
    int lowest = fuzz_lowest_fd();

    nonces = 0;
    for (unsigned i = 0; i < CLIENTS; i++) {
        client[i].fd = -1;
    }
    while (in.left) {
        step(&in);
    }
    check_serves();
    for (unsigned i = 0; i < CLIENTS; i++) {
        hang_up(&client[i]);
    }
    while (server.clients) {
        client_close(&server, 0);
    }
    g_assert_cmpint(fuzz_lowest_fd(), ==, lowest);
    return 0;
}
