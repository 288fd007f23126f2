/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer: the side that asks another member.
 *
 * An input is what comes back: right answers, nearly right ones, others' ones,
 * bytes, descriptors of any kind.  Nothing is proven but what was answered
 * rightly, what is taken from a descriptor was checked, and after a failure
 * the connection is gone.
 *
 * The answers lie ready when it asks, so nobody waits; its nonce is known.
 */

#include <errno.h>
#include <sys/socket.h>

#include "fuzz-file.h"
#include "fuzz-packet.h"
#include "group/peer.h"

#define PAGES 8
#define HOLDER 9

bool __wrap_dedup_nonce_make(uint8_t *nonce)
{
    memset(nonce, 0x33, DEDUP_NONCE_SIZE);
    return true;
}

static uint8_t pages[PAGES][DEDUP_PAGE_SIZE];

typedef struct Round {
    unsigned n;                 /* pages that are asked for */
    uint8_t nonce[DEDUP_NONCE_SIZE];    /* the holder's */
    bool first;                 /* nothing was sent yet */
    bool right[DEDUP_PEER_BATCH];
    bool all_right;             /* a first reply without a fault */
} Round;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    for (unsigned i = 0; i < PAGES; i++) {
        fuzz_file_page(pages[i], i);
    }
    return 0;
}

/* A reply to what will be asked; how it is wrong the input says. */
static void put_reply(FuzzInput *in, int sock, Round *r,
                      DedupMessageType type)
{
    unsigned how = fuzz_u8(in), nfds = 0, npages;
    DedupMessage m = { .head.n = r->n };
    int fds[DEDUP_PEER_BATCH];
    unsigned holder = how & 1 ? fuzz_u8(in) : HOLDER;
    uint8_t nonce[DEDUP_NONCE_SIZE];
    DedupProofKey key;
    size_t size;

    memset(nonce, 0x33, sizeof(nonce));
    dedup_proof_key(&key, r->nonce, nonce, holder);
    m.head.magic = DEDUP_PEER_MAGIC;
    m.head.version = DEDUP_PEER_VERSION;
    m.head.type = how & 2 ? fuzz_u8(in) % 9 : type;
    if (how & 4) {
        m.head.n = fuzz_u8(in);
    }
    for (unsigned i = 0; i < MIN(m.head.n, DEDUP_PEER_BATCH); i++) {
        unsigned flip = fuzz_u8(in);
        DedupHash128 digest;

        dedup_page_keyed_hash(pages[i % PAGES], key.secret, &digest);
        if (type == DEDUP_MESSAGE_PROVE_REPLY) {
            m.answer[i].yes = flip & 2 ? fuzz_u8(in) : 1;
            dedup_proof_value(&key, DEDUP_PROOF_ANSWER, i, &digest,
                              m.answer[i].answer);
            m.answer[i].answer[i % DEDUP_PROOF_SIZE] ^= flip & 1;
            r->right[i] |= r->first && !(flip & 1) && holder == HOLDER &&
                           m.answer[i].yes == 1;
        } else {
            m.has[i] = flip & 1;
            if (flip & 2 && nfds < DEDUP_PEER_BATCH) {
                fds[nfds++] = fuzz_file(in, &npages);
            }
        }
    }
    if (type == DEDUP_MESSAGE_HELLO_REPLY && how & 16 &&
        nfds < DEDUP_PEER_BATCH) {
        fds[nfds++] = fuzz_file(in, &npages);
    }
    size = dedup_message_size(m.head.type, MIN(m.head.n, DEDUP_PEER_BATCH));
    if (how & 8) {
        size = fuzz_u32(in) % (sizeof(m) + 1);
    }
    if (how & 32) {
        fuzz_bytes(in, (uint8_t *)&m + fuzz_u8(in) % 16, 1);
    }
    r->all_right = r->first && !(how & 47) &&
                   type == DEDUP_MESSAGE_PROVE_REPLY;
    r->first = false;
    fuzz_send(sock, &m, size, fds, nfds);
    while (nfds) {
        close(fds[--nfds]);
    }
}

static void take_segment(int fd, unsigned npages)
{
    g_autoptr(GError) error = NULL;
    DedupSegment *s = dedup_segment_accept(fd, 1, npages, &error);

    for (unsigned i = 0; s && i < npages; i++) {
        g_assert_cmpuint(dedup_segment_page(s, i)[0], <=, 255);
    }
    dedup_segment_free(s);
}

static void ask_segments(FuzzInput *in, DedupPeer *p, Round *r)
{
    DedupFetch items[DEDUP_PEER_BATCH];
    bool ok;

    for (unsigned i = 0; i < r->n; i++) {
        items[i] = (DedupFetch) {
            .gid = 1 + i, .page = i, .content = pages[i % PAGES],
        };
    }
    ok = dedup_peer_fetch(p, HOLDER, items, r->n, 0);
    g_assert_true(ok == (p->fd >= 0));
    for (unsigned i = 0; i < r->n; i++) {
        g_assert_true(ok || items[i].fd == -1);
        if (items[i].fd >= 0) {
            take_segment(items[i].fd, 1 + i % 8);
        }
    }
}

static void ask_proofs(DedupPeer *p, Round *r)
{
    DedupProof proofs[DEDUP_PEER_BATCH];
    bool ok;

    for (unsigned i = 0; i < r->n; i++) {
        proofs[i] = (DedupProof) {
            .page = i, .content = pages[i % PAGES], .proven = true,
        };
    }
    ok = dedup_peer_prove(p, HOLDER, proofs, r->n, 0);
    g_assert_true(ok == (p->fd >= 0));
    g_assert_true(ok || !r->all_right);
    for (unsigned i = 0; i < r->n; i++) {
        g_assert_true(!proofs[i].proven || r->right[i]);
        g_assert_true(!r->all_right || proofs[i].proven == r->right[i]);
    }
}

static void ask_file(DedupPeer *p)
{
    int fd = dedup_peer_hello(p, 0);

    if (fd >= 0) {
        g_assert_cmpint(p->fd, >=, 0);
        close(fd);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    FuzzInput in = { .at = data, .left = size };
    int lowest = fuzz_lowest_fd();
    static const DedupMessageType types[] = {
        DEDUP_MESSAGE_HELLO_REPLY, DEDUP_MESSAGE_FETCH_REPLY,
        DEDUP_MESSAGE_PROVE_REPLY,
    };
    DedupMessageType type = types[fuzz_u8(&in) % G_N_ELEMENTS(types)];
    Round r = { .first = true };
    DedupPeer p = DEDUP_PEER_INIT;
    int sv[2];

    if (type != DEDUP_MESSAGE_HELLO_REPLY) {
        r.n = fuzz_u8(&in) % (DEDUP_PEER_BATCH + 1);
    }
    fuzz_bytes(&in, r.nonce, 2);
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK |
                               SOCK_CLOEXEC, 0, sv), ==, 0);
    p.fd = sv[0];
    memcpy(p.nonce, r.nonce, sizeof(p.nonce));
    for (unsigned i = 0; i < 3 && in.left; i++) {
        put_reply(&in, sv[1], &r, type);
    }
    if (type == DEDUP_MESSAGE_FETCH_REPLY) {
        ask_segments(&in, &p, &r);
    } else if (type == DEDUP_MESSAGE_PROVE_REPLY) {
        ask_proofs(&p, &r);
    } else {
        ask_file(&p);
    }
    dedup_peer_close(&p);
    close(sv[1]);
    g_assert_cmpint(fuzz_lowest_fd(), ==, lowest);
    return 0;
}
