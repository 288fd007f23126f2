/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The peer thread: answers other members; peer.h has the protocol.
 *
 * One thread, one poll() loop, no socket ever blocks.  A client that sends
 * nonsense, or does not take its reply, is cut off; one that says nothing
 * costs its place in a bounded list, where the longest silent one gives way
 * to a newcomer: of its own process, if that has many.
 *
 * One that asks without end gets its turn, and the others theirs.  All of them
 * together get a tenth of a processor: what is spent here is taken from our
 * own scan (scan/pace.c), and from the guest where the cgroup has a CPU quota.
 * What they did not use they may use later, up to DEDUP_PEER_CREDIT_NS: a
 * member that joins asks for most of its memory at once, and waits for answers.
 *
 * Owner: the server owns the listening socket and all connections.  All of
 * it is touched by the peer thread only, but for the eventfd that stops it
 * and the CPU time.
 */

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "group/peer.h"
#include "host/clock.h"
#include "host/error.h"
#include "host/mutant.h"
#include "host/reader.h"
#include "host/sys.h"

/* One per member, and some that join. */
#define MAX_CLIENTS (DEDUP_MAX_MEMBERS + 16)
/* A process is one member; some of them join again. */
#define PROCESS_CLIENTS 16

/* A part of the time that goes by is CPU time for whoever asks. */
#define SERVE_PART 10
/* Nobody is left without an answer for longer: there are time-outs. */
#define REST_MOST_MS 100
#define DEBT_NS (REST_MOST_MS * INT64_C(1000000) / SERVE_PART)

/* How long new clients wait when this process has no fd for them. */
#define NO_FDS_PAUSE_MS 100

enum { POLL_STOP, POLL_LISTEN, POLL_CLIENTS };

typedef struct Client {
    int fd;
    pid_t pid;                  /* 0: in a PID namespace that we do not see */
    uint64_t heard;             /* number of the last message */
    uint8_t nonce[DEDUP_NONCE_SIZE];
} Client;

struct DedupPeerServer {
    GThread *thread;
    int stop;                   /* eventfd */
    int listen_fd;
    int shared_fd;
    unsigned self;
    DedupGroupOps ops;
    void *opaque;
    uint64_t *cpu_ns;           /* atomic; what servers before us took, too */
    uint64_t cpu_before;

    Client client[MAX_CLIENTS];
    unsigned clients;
    uint64_t heard;
    bool paused;                /* no fds: not accepting */
    int64_t credit_ns;          /* CPU time that may be spent; below 0: is */
    int64_t seen_us, seen_ns;   /* the time, and the thread's, as of then */
};

static void client_close(DedupPeerServer *s, unsigned i)
{
    close(s->client[i].fd);
    s->client[i] = s->client[--s->clients];
}

static bool client_greet(Client *c)
{
    DedupMessage m = { .head.n = 0 };

    if (!dedup_nonce_make(c->nonce)) {
        return false;
    }
    memcpy(m.nonce, c->nonce, sizeof(m.nonce));
    return dedup_message_send(c->fd, &m, DEDUP_MESSAGE_GREETING, NULL,
                              0) == 0;
}

/* The longest silent client of all, or of a process that has many, or -1. */
static int client_to_go(const DedupPeerServer *s, pid_t pid)
{
    int oldest = -1, own = -1;
    unsigned n = 0;

    for (unsigned i = 0; i < s->clients; i++) {
        const Client *c = &s->client[i];

        if (oldest < 0 || c->heard < s->client[oldest].heard) {
            oldest = i;
        }
        if (pid && c->pid == pid) {
            own = own < 0 || c->heard < s->client[own].heard ? (int)i : own;
            n++;
        }
    }
    if (n >= PROCESS_CLIENTS) {
        return own;
    }
    return s->clients == MAX_CLIENTS ? oldest : -1;
}

static void client_accept(DedupPeerServer *s)
{
    int fd = sys_accept4(s->listen_fd, NULL, NULL,
                         SOCK_NONBLOCK | SOCK_CLOEXEC);
    pid_t pid;
    Client *c;
    int i;

    if (fd < 0) {
        /* Without a pause the loop would spin on the waiting client. */
        s->paused = errno != EAGAIN && errno != ECONNABORTED &&
                    errno != EINTR;
        return;
    }
    if (!dedup_peer_is_ours(fd, &pid)) {
        close(fd);
        return;
    }
    i = client_to_go(s, pid);
    if (i >= 0) {
        client_close(s, i);
    }
    c = &s->client[s->clients];
    c->fd = fd;
    c->pid = pid;
    c->heard = ++s->heard;
    if (!client_greet(c)) {
        close(fd);
        return;
    }
    s->clients++;
}

/* A nonce serves for one request: the reply brings the next. */
static bool next_nonce(Client *c, DedupMessage *reply)
{
    if (!dedup_nonce_make(c->nonce)) {
        return false;
    }
    memcpy(reply->nonce, c->nonce, sizeof(reply->nonce));
    return true;
}

/* The fd of a segment for who proves that it has a page of it, or -1. */
static int proven_fd(DedupPeerServer *s, const DedupProofKey *key, unsigned i,
                     const DedupFetchAsk *ask)
{
    uint8_t expected[DEDUP_PROOF_SIZE];
    DedupHash128 digest;
    int fd = s->ops.segment_fd(s->opaque, ask->gid, ask->page, key->secret,
                               &digest);

    if (fd < 0) {
        return -1;
    }
    dedup_proof_value(key, DEDUP_PROOF_FETCH, i, &digest, expected);
    if (memcmp(expected, ask->ask, DEDUP_PROOF_SIZE) != 0 &&
        !DEDUP_MUTANT(NO_FETCH_PROOF)) {
        close(fd);
        return -1;
    }
    return fd;
}

static int serve_fetch(DedupPeerServer *s, Client *c, DedupMessage *m)
{
    int fds[DEDUP_PEER_BATCH];
    unsigned nfds = 0;
    DedupMessage reply;
    DedupProofKey key;
    int ret;

    memset(&reply, 0, sizeof(reply));
    reply.head.n = m->head.n;
    dedup_proof_key(&key, c->nonce, m->nonce, s->self);
    if (!next_nonce(c, &reply)) {
        return -EIO;
    }
    for (unsigned i = 0; i < m->head.n; i++) {
        int fd = proven_fd(s, &key, i, &m->fetch[i]);

        if (fd >= 0) {
            reply.has[i] = 1;
            fds[nfds++] = fd;
        }
    }
    ret = dedup_message_send(c->fd, &reply, DEDUP_MESSAGE_FETCH_REPLY, fds,
                             nfds);
    if (ret == -ETOOMANYREFS) {
        /* Too many fds of this user are under way: it may ask others. */
        memset(reply.has, 0, sizeof(reply.has));
        ret = dedup_message_send(c->fd, &reply, DEDUP_MESSAGE_FETCH_REPLY,
                                 NULL, 0);
    }
    while (nfds) {
        close(fds[--nfds]);
    }
    return ret;
}

/* Which of our pages has the asker, too?  What he has not is not there. */
static void compare_proofs(const DedupProofKey *key, const DedupMessage *m,
                           DedupOwnPage *pages, DedupMessage *reply)
{
    for (unsigned i = 0; i < m->head.n; i++) {
        uint8_t expected[DEDUP_PROOF_SIZE];

        if (!pages[i].is_there) {
            continue;
        }
        dedup_proof_value(key, DEDUP_PROOF_ASK, i, &pages[i].hash, expected);
        if (memcmp(expected, m->ask[i].ask, DEDUP_PROOF_SIZE) == 0) {
            reply->answer[i].yes = 1;
            dedup_proof_value(key, DEDUP_PROOF_ANSWER, i, &pages[i].hash,
                              reply->answer[i].answer);
        } else {
            pages[i].is_there = false;
        }
    }
}

static int serve_prove(DedupPeerServer *s, Client *c, DedupMessage *m)
{
    DedupOwnPage pages[DEDUP_PEER_BATCH];
    DedupMessage reply;
    DedupProofKey key;
    int ret;

    memset(&reply, 0, sizeof(reply));
    memset(pages, 0, sizeof(pages));
    reply.head.n = m->head.n;
    dedup_proof_key(&key, c->nonce, m->nonce, s->self);
    for (unsigned i = 0; i < m->head.n; i++) {
        pages[i].page = m->ask[i].page;
    }
    s->ops.keyed_hashes(s->opaque, pages, m->head.n, key.secret);
    compare_proofs(&key, m, pages, &reply);
    if (!next_nonce(c, &reply)) {
        return -EIO;
    }
    ret = dedup_message_send(c->fd, &reply, DEDUP_MESSAGE_PROVE_REPLY, NULL,
                             0);
    if (s->ops.proven) {
        s->ops.proven(s->opaque, pages, m->head.n);
    }
    return ret;
}

/* Returns false when the client is to be cut off. */
static bool client_serve(DedupPeerServer *s, Client *c)
{
    DedupMessage m;
    unsigned nfds;
    int ret = dedup_message_receive(c->fd, &m, NULL, 0, &nfds);

    if (ret == -EAGAIN) {
        return true;
    }
    if (ret < 0) {
        return false;
    }
    c->heard = ++s->heard;
    switch (m.head.type) {
    case DEDUP_MESSAGE_HELLO:
        ret = dedup_message_send(c->fd, &m, DEDUP_MESSAGE_HELLO_REPLY,
                                 &s->shared_fd, 1);
        break;
    case DEDUP_MESSAGE_FETCH:
        ret = serve_fetch(s, c, &m);
        break;
    case DEDUP_MESSAGE_PROVE:
        ret = serve_prove(s, c, &m);
        break;
    default:
        ret = -EPROTO;
    }
    return ret == 0;
}

/* For how many milliseconds nobody is served. */
static int rest_ms(DedupPeerServer *s)
{
    int64_t cpu = dedup_thread_cpu_ns();
    int64_t now = g_get_monotonic_time();

    __atomic_store_n(s->cpu_ns, s->cpu_before + cpu, __ATOMIC_RELAXED);
    s->credit_ns = MIN(s->credit_ns + (now - s->seen_us) * 1000 / SERVE_PART,
                       DEDUP_PEER_CREDIT_NS) - (cpu - s->seen_ns);
    s->credit_ns = MAX(s->credit_ns, -DEBT_NS);
    s->seen_us = now;
    s->seen_ns = cpu;
    return s->credit_ns < 0 && !DEDUP_NEVER_RESTS ?
           -s->credit_ns * SERVE_PART / 1000000 + 1 : 0;
}

static void *peer_thread(void *opaque)
{
    DedupPeerServer *s = opaque;
    struct pollfd pfd[POLL_CLIENTS + MAX_CLIENTS];

    dedup_reader_thread();
    for (;;) {
        int rest = rest_ms(s);
        unsigned n = rest ? 0 : s->clients;

        pfd[POLL_STOP] = (struct pollfd) { .fd = s->stop, .events = POLLIN };
        pfd[POLL_LISTEN] = (struct pollfd) {
            .fd = rest || s->paused ? -1 : s->listen_fd,
            .events = POLLIN,
        };
        for (unsigned i = 0; i < n; i++) {
            pfd[POLL_CLIENTS + i] = (struct pollfd) {
                .fd = s->client[i].fd,
                .events = POLLIN,
            };
        }
        if (sys_poll(pfd, POLL_CLIENTS + n,
                     rest ? rest : s->paused ? NO_FDS_PAUSE_MS : -1) < 0) {
            continue;
        }
        s->paused = false;
        if (pfd[POLL_STOP].revents) {
            break;
        }
        /* Downwards: closing one moves the last into its place. */
        for (unsigned i = n; i-- > 0;) {
            if (pfd[POLL_CLIENTS + i].revents &&
                !client_serve(s, &s->client[i])) {
                client_close(s, i);
            }
        }
        if (pfd[POLL_LISTEN].revents) {
            client_accept(s);
        }
    }
    while (s->clients) {
        client_close(s, 0);
    }
    return NULL;
}

DedupPeerServer *dedup_peer_server_new(int listen_fd, int shared_fd,
                                       unsigned self,
                                       const DedupGroupOps *ops, void *opaque,
                                       uint64_t *cpu_ns, GError **error)
{
    DedupPeerServer *s = g_new0(DedupPeerServer, 1);
    sigset_t all, old;

    s->listen_fd = listen_fd;
    s->shared_fd = shared_fd;
    s->self = self;
    s->ops = *ops;
    s->opaque = opaque;
    s->cpu_ns = cpu_ns;
    s->cpu_before = *cpu_ns;
    s->stop = sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->stop < 0) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "cannot create an eventfd: %s", g_strerror(errno));
    } else {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        s->thread = sys_thread_new("dedup-peer", peer_thread, s, error);
        pthread_sigmask(SIG_SETMASK, &old, NULL);
    }
    if (!s->thread) {
        dedup_peer_server_free(s);
        return NULL;
    }
    return s;
}

void dedup_peer_server_free(DedupPeerServer *s)
{
    if (!s) {
        return;
    }
    if (s->thread) {
        eventfd_write(s->stop, 1);
        g_thread_join(s->thread);
    }
    if (s->stop >= 0) {
        close(s->stop);
    }
    close(s->listen_fd);
    g_free(s);
}
