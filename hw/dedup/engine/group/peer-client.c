/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The side that asks another member; peer.h has the protocol.
 *
 * The other one may be hostile, stopped or slow: nothing here waits longer
 * than the caller says, and what comes back is checked.  After any failure
 * the connection is closed, so a late reply cannot be taken for another's.
 *
 * Thread: the scanner's.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "group/peer.h"
#include "host/sys.h"

static int64_t deadline_after(unsigned timeout_ms)
{
    return g_get_monotonic_time() + timeout_ms * G_TIME_SPAN_MILLISECOND;
}

void dedup_peer_close(DedupPeer *p)
{
    if (p->fd >= 0) {
        close(p->fd);
        p->fd = -1;
    }
}

/* Waits for a message of @type with @n entries. */
static bool receive(DedupPeer *p, DedupMessage *m, DedupMessageType type,
                    unsigned n, int *fds, unsigned max_fds, unsigned *nfds,
                    int64_t deadline)
{
    for (;;) {
        int ret = dedup_message_receive(p->fd, m, fds, max_fds, nfds);
        struct pollfd pfd = { .fd = p->fd, .events = POLLIN };
        int64_t left = deadline - g_get_monotonic_time();

        if (ret == 0) {
            if (m->head.type == type && m->head.n == n) {
                return true;
            }
            while (*nfds) {
                close(fds[--*nfds]);
            }
            return false;
        }
        if (ret != -EAGAIN || left <= 0) {
            return false;
        }
        sys_poll(&pfd, 1, left / G_TIME_SPAN_MILLISECOND + 1);
    }
}

static void socket_address(struct sockaddr_un *addr, int dirfd,
                           unsigned member)
{
    /* The directory's own path may be longer than a socket's may be. */
    *addr = (struct sockaddr_un) { .sun_family = AF_UNIX };
    snprintf(addr->sun_path, sizeof(addr->sun_path),
             "/proc/self/fd/%d/m%u.sock", dirfd, member);
}

/* Is there no such name?  Without /proc none can be reached. */
static bool is_missing(int dirfd, unsigned member)
{
    struct stat st;
    char name[16];

    snprintf(name, sizeof(name), "m%u.sock", member);
    return sys_fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0 &&
           errno == ENOENT;
}

bool dedup_peer_is_listening(int dirfd, unsigned member)
{
    int fd = sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC,
                        0);
    struct sockaddr_un addr;
    bool listening;

    socket_address(&addr, dirfd, member);
    /* in doubt it is: a queue that is full, no descriptor for us */
    listening = fd < 0 ||
                sys_connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 ||
                (errno == ENOENT && !is_missing(dirfd, member)) ||
                (errno != ENOENT && errno != ECONNREFUSED &&
                 errno != ENOTSOCK && errno != EPROTOTYPE);
    if (fd >= 0) {
        close(fd);
    }
    return listening;
}

bool dedup_peer_connect(DedupPeer *p, int dirfd, unsigned member,
                        unsigned timeout_ms)
{
    int64_t deadline = deadline_after(timeout_ms);
    struct sockaddr_un addr;
    DedupMessage m;
    unsigned nfds;
    pid_t pid;

    g_assert(p->fd < 0);
    socket_address(&addr, dirfd, member);
    p->fd = sys_socket(AF_UNIX,
                       SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (p->fd < 0) {
        return false;
    }
    /* It is done at once, or the other one's queue is full: EAGAIN. */
    if (sys_connect(p->fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 ||
        !dedup_peer_is_ours(p->fd, &pid) ||
        !receive(p, &m, DEDUP_MESSAGE_GREETING, 0, NULL, 0, &nfds,
                 deadline)) {
        dedup_peer_close(p);
        return false;
    }
    memcpy(p->nonce, m.nonce, sizeof(p->nonce));
    return true;
}

int dedup_peer_hello(DedupPeer *p, unsigned timeout_ms)
{
    int64_t deadline = deadline_after(timeout_ms);
    DedupMessage m = { .head.n = 0 };
    unsigned nfds;
    int fd;

    if (dedup_message_send(p->fd, &m, DEDUP_MESSAGE_HELLO, NULL, 0) < 0 ||
        !receive(p, &m, DEDUP_MESSAGE_HELLO_REPLY, 0, &fd, 1, &nfds,
                 deadline)) {
        dedup_peer_close(p);
        return -1;
    }
    return nfds ? fd : -1;
}

bool dedup_peer_fetch(DedupPeer *p, unsigned holder, DedupFetch *items,
                      unsigned n, unsigned timeout_ms)
{
    int64_t deadline = deadline_after(timeout_ms);
    int got[DEDUP_PEER_BATCH];
    unsigned nfds = 0, used = 0, flags = 0;
    DedupMessage m = { .head.n = n };
    DedupProofKey key;

    g_assert(n <= DEDUP_PEER_BATCH);
    for (unsigned i = 0; i < n; i++) {
        items[i].fd = -1;
    }
    if (!dedup_nonce_make(m.nonce)) {
        return false;
    }
    dedup_proof_key(&key, p->nonce, m.nonce, holder);
    for (unsigned i = 0; i < n; i++) {
        DedupHash128 digest;

        if (!dedup_page_keyed_hash(items[i].content, key.secret, &digest)) {
            return false;
        }
        m.fetch[i].gid = items[i].gid;
        m.fetch[i].page = items[i].page;
        dedup_proof_value(&key, DEDUP_PROOF_FETCH, i, &digest,
                          m.fetch[i].ask);
    }
    if (dedup_message_send(p->fd, &m, DEDUP_MESSAGE_FETCH, NULL, 0) < 0 ||
        !receive(p, &m, DEDUP_MESSAGE_FETCH_REPLY, n, got, n, &nfds,
                 deadline)) {
        dedup_peer_close(p);
        return false;
    }
    for (unsigned i = 0; i < n; i++) {
        flags += m.has[i] != 0;
    }
    if (flags != nfds) {
        while (nfds) {
            close(got[--nfds]);
        }
        dedup_peer_close(p);
        return false;
    }
    for (unsigned i = 0; i < n; i++) {
        if (m.has[i]) {
            items[i].fd = got[used++];
        }
    }
    memcpy(p->nonce, m.nonce, sizeof(p->nonce));
    return true;
}

bool dedup_peer_prove(DedupPeer *p, unsigned holder, DedupProof *proofs,
                      unsigned n, unsigned timeout_ms)
{
    int64_t deadline = deadline_after(timeout_ms);
    uint8_t expected[DEDUP_PEER_BATCH][DEDUP_PROOF_SIZE];
    DedupMessage m = { .head.n = n };
    DedupProofKey key;
    unsigned nfds;

    g_assert(n <= DEDUP_PEER_BATCH);
    for (unsigned i = 0; i < n; i++) {
        proofs[i].proven = false;
    }
    if (!dedup_nonce_make(m.nonce)) {
        return false;
    }
    dedup_proof_key(&key, p->nonce, m.nonce, holder);
    for (unsigned i = 0; i < n; i++) {
        DedupHash128 digest;

        if (!dedup_page_keyed_hash(proofs[i].content, key.secret, &digest)) {
            return false;
        }
        m.ask[i].page = proofs[i].page;
        dedup_proof_value(&key, DEDUP_PROOF_ASK, i, &digest, m.ask[i].ask);
        dedup_proof_value(&key, DEDUP_PROOF_ANSWER, i, &digest, expected[i]);
    }
    if (dedup_message_send(p->fd, &m, DEDUP_MESSAGE_PROVE, NULL, 0) < 0 ||
        !receive(p, &m, DEDUP_MESSAGE_PROVE_REPLY, n, NULL, 0, &nfds,
                 deadline)) {
        dedup_peer_close(p);
        return false;
    }
    for (unsigned i = 0; i < n; i++) {
        proofs[i].proven = m.answer[i].yes == 1 &&
                           memcmp(m.answer[i].answer, expected[i],
                                  DEDUP_PROOF_SIZE) == 0;
    }
    memcpy(p->nonce, m.nonce, sizeof(p->nonce));
    return true;
}
