/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Messages between members, and the values of the proof; peer.h tells what
 * they mean.
 *
 * A peer may be hostile or broken: the length of a message must be exactly
 * what its type and its number of entries say, and every fd that comes with
 * it is either handed to the caller or closed.
 *
 * Threads: any.
 */

#include <errno.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "group/peer.h"
#include "host/sys.h"

/* The most that the kernel lets into one message (SCM_MAX_FD). */
#define MAX_FDS 253

size_t dedup_message_size(DedupMessageType type, unsigned n)
{
    switch (type) {
    case DEDUP_MESSAGE_GREETING:
        return offsetof(DedupMessage, ask);
    case DEDUP_MESSAGE_HELLO:
    case DEDUP_MESSAGE_HELLO_REPLY:
        return offsetof(DedupMessage, nonce);
    case DEDUP_MESSAGE_FETCH:
        return offsetof(DedupMessage, fetch[n]);
    case DEDUP_MESSAGE_FETCH_REPLY:
        return offsetof(DedupMessage, has[n]);
    case DEDUP_MESSAGE_PROVE:
        return offsetof(DedupMessage, ask[n]);
    case DEDUP_MESSAGE_PROVE_REPLY:
        return offsetof(DedupMessage, answer[n]);
    }
    return 0;
}

int dedup_message_send(int sock, DedupMessage *m, DedupMessageType type,
                       const int *fds, unsigned nfds)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
    } control;
    struct iovec iov = { .iov_base = m };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
    ssize_t sent;

    m->head.magic = DEDUP_PEER_MAGIC;
    m->head.version = DEDUP_PEER_VERSION;
    m->head.type = type;
    m->head.zero = 0;
    iov.iov_len = dedup_message_size(type, m->head.n);

    if (nfds) {
        struct cmsghdr *c;

        g_assert(nfds <= MAX_FDS);
        memset(&control, 0, CMSG_SPACE(nfds * sizeof(int)));
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
    }
    do {
        sent = sys_sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : 0;
}

static bool well_formed(const DedupMessage *m, size_t len)
{
    return len >= sizeof(m->head) &&
           m->head.magic == DEDUP_PEER_MAGIC &&
           m->head.version == DEDUP_PEER_VERSION &&
           m->head.type >= DEDUP_MESSAGE_GREETING &&
           m->head.type <= DEDUP_MESSAGE_PROVE_REPLY &&
           m->head.n <= DEDUP_PEER_BATCH &&
           len == dedup_message_size(m->head.type, m->head.n);
}

int dedup_message_receive(int sock, DedupMessage *m, int *fds,
                          unsigned max_fds, unsigned *nfds)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
    } control;
    struct iovec iov = { .iov_base = m, .iov_len = sizeof(*m) };
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *c;
    bool bad = false;
    ssize_t len;

    *nfds = 0;
    do {
        len = sys_recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (len < 0 && errno == EINTR);
    if (len < 0) {
        return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    }

    for (c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
        unsigned n;

        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (unsigned i = 0; i < n; i++) {
            int fd;

            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
            if (*nfds < max_fds) {
                fds[(*nfds)++] = fd;
            } else {
                close(fd);
                bad = true;
            }
        }
    }
    if (len > 0 && !bad && !(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) &&
        well_formed(m, len)) {
        return 0;
    }
    while (*nfds) {
        close(fds[--*nfds]);
    }
    return len == 0 ? -EPIPE : -EPROTO;
}

bool dedup_peer_is_ours(int sock, pid_t *pid)
{
    struct ucred cred = { .pid = 0 };
    socklen_t len = sizeof(cred);
    bool ok = sys_getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0;

    *pid = cred.pid;
    return ok && cred.uid == geteuid();
}

bool dedup_nonce_make(uint8_t nonce[DEDUP_NONCE_SIZE])
{
    return sys_getrandom(nonce, DEDUP_NONCE_SIZE, 0) == DEDUP_NONCE_SIZE;
}

static void sha256(const void *data, size_t size, uint8_t digest[32])
{
    GChecksum *sum = g_checksum_new(G_CHECKSUM_SHA256);
    gsize len = 32;

    g_checksum_update(sum, data, size);
    g_checksum_get_digest(sum, digest, &len);
    g_checksum_free(sum);
}

void dedup_proof_key(DedupProofKey *key,
                     const uint8_t holder_nonce[DEDUP_NONCE_SIZE],
                     const uint8_t asker_nonce[DEDUP_NONCE_SIZE],
                     uint32_t holder)
{
    struct {
        char what[20];
        uint8_t holder_nonce[DEDUP_NONCE_SIZE];
        uint8_t asker_nonce[DEDUP_NONCE_SIZE];
        uint32_t holder;
    } start = { .what = "qemu-dedup proof", .holder = holder };
    struct {
        uint8_t seed[32];
        uint32_t i;
    } expand;

    memcpy(start.holder_nonce, holder_nonce, DEDUP_NONCE_SIZE);
    memcpy(start.asker_nonce, asker_nonce, DEDUP_NONCE_SIZE);
    sha256(&start, sizeof(start), key->seed);

    G_STATIC_ASSERT(DEDUP_SECRET_SIZE % 32 == 0);
    memcpy(expand.seed, key->seed, sizeof(expand.seed));
    for (expand.i = 0; expand.i < DEDUP_SECRET_SIZE / 32; expand.i++) {
        sha256(&expand, sizeof(expand), key->secret + expand.i * 32);
    }
}

void dedup_proof_value(const DedupProofKey *key, DedupProofRole role,
                       uint32_t i, const DedupHash128 *digest,
                       uint8_t value[DEDUP_PROOF_SIZE])
{
    struct {
        uint8_t seed[32];
        uint32_t role;
        uint32_t i;
        DedupHash128 digest;
    } data = { .role = role, .i = i, .digest = *digest };
    uint8_t sum[32];

    memcpy(data.seed, key->seed, sizeof(data.seed));
    sha256(&data, sizeof(data), sum);
    memcpy(value, sum, DEDUP_PROOF_SIZE);
}
