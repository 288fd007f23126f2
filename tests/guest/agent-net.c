/*
 * Guest agent: TCP streams that an echo server sends back
 *
 * Each stream has a sender and a receiver.  What is sent are pieces of a pool
 * that is a file, by sendfile(): the pages of the pool themselves, which a
 * scanner merges, are what the network device reads.  The receiver draws the
 * same numbers as the sender, so it knows each byte that must come back; it
 * receives into a pool of its own, compares, and puts the pool's content back.
 *
 * Threads: two for each stream; figures as in agent-io.c.
 *
 * Copyright (c) 2026 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "agent.h"
#include "agent-pool.h"

#define MAX_STREAMS 8
#define MAX_PIECE (256u << 10)
/* Of 10 ms, or more: then nothing comes any more. */
#define IDLE_TURNS 6000

typedef struct Stream {
    pthread_t sender, receiver;
    int fd, ended;
    uint64_t seed, sent, received;
    Pool from, to;
} Stream;

static struct {
    uint64_t streams, pieces;
    int running, stop;
    Figures f;
    Stream stream[MAX_STREAMS];
} net = { .f.lock = PTHREAD_MUTEX_INITIALIZER };

/* The next piece of a stream: where it begins in the pool, and its size. */
static uint64_t next_piece(const Stream *s, uint64_t *random, uint64_t *size)
{
    uint64_t most = MAX_PIECE >> agent_random(random) % 12;

    *size = 1 + agent_random(random) % most;
    return agent_random(random) % (s->from.size - *size + 1);
}

static void *send_thread(void *opaque)
{
    Stream *s = opaque;
    uint64_t random = s->seed, size;

    while (!__atomic_load_n(&net.stop, __ATOMIC_RELAXED)) {
        off_t at = next_piece(s, &random, &size);
        off_t end = at + size;

        while (at < end) {
            ssize_t n = sendfile(s->fd, s->from.fd, &at, end - at);

            if (n <= 0) {
                figures_error(&net.f, "send: %s", strerror(errno));
                return NULL;
            }
            s->sent += n;
        }
        __atomic_add_fetch(&net.pieces, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* The bytes at @mem of the pool are what is at @at of any pool. */
static void check_piece(Stream *s, uint64_t mem, uint64_t at, uint64_t size)
{
    for (uint64_t i = 0; i < size;) {
        uint64_t n = PG_SIZE - (at + i) % PG_SIZE;
        const uint8_t *got = s->to.mem + mem + i;

        n = n > size - i ? size - i : n;
        if (memcmp(got, pool_bytes(at + i), n)) {
            figures_bad(&net.f, got, pool_bytes(at + i), n, "received",
                        s->received + i);
        }
        i += n;
    }
}

static void *receive_thread(void *opaque)
{
    Stream *s = opaque;
    uint64_t random = s->seed, other = ~s->seed, size;

    for (;;) {
        uint64_t at = next_piece(s, &random, &size);

        while (size) {
            uint64_t mem = agent_random(&other) % (s->to.size - size + 1);
            ssize_t n = recv(s->fd, s->to.mem + mem, size, 0);

            if (n <= 0) {
                if (!__atomic_load_n(&s->ended, __ATOMIC_RELAXED)) {
                    figures_error(&net.f, "receive: %s",
                                  n ? strerror(errno) : "end");
                }
                __atomic_store_n(&s->ended, 1, __ATOMIC_RELAXED);
                return NULL;
            }
            check_piece(s, mem, at, n);
            pool_fill(&s->to, mem, n);
            __atomic_add_fetch(&s->received, n, __ATOMIC_RELAXED);
            at += n;
            size -= n;
        }
    }
}

static int connect_to(const char *address, uint64_t port)
{
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

    if (fd < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
        connect(fd, (struct sockaddr *)&to, sizeof(to))) {
        return -1;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    return fd;
}

/* net-start ADDRESS PORT STREAMS POOL_PAGES */
int net_start(int argc, char **argv, char *reply)
{
    uint64_t port, pages;

    if (argc != 5 || net.running || agent_number(argv[2], &port) ||
        agent_number(argv[3], &net.streams) || net.streams > MAX_STREAMS ||
        agent_number(argv[4], &pages) || pages * PG_SIZE < 2 * MAX_PIECE) {
        strcpy(reply, "usage: net-start ADDRESS PORT STREAMS POOL_PAGES");
        return -1;
    }
    /* A peer that is gone is an error, not the end. */
    signal(SIGPIPE, SIG_IGN);
    net.stop = 0;
    net.pieces = net.f.bad = net.f.err = 0;
    net.f.first[0] = 0;
    memset(net.stream, 0, sizeof(net.stream));
    for (unsigned i = 0; i < net.streams; i++) {
        Stream *s = &net.stream[i];

        s->seed = pg_key(agent_vm_id, i);
        s->fd = connect_to(argv[1], port);
        if (s->fd < 0 || pool_new_file(&s->from, pages) ||
            pool_new(&s->to, pages, i & 1) ||
            pthread_create(&s->sender, NULL, send_thread, s) ||
            pthread_create(&s->receiver, NULL, receive_thread, s)) {
            snprintf(reply, AGENT_REPLY, "stream %u: %s", i, strerror(errno));
            return -1;
        }
    }
    net.running = 1;
    return 0;
}

int net_stat(int argc, char **argv, char *reply)
{
    uint64_t received = 0;
    int used;

    for (unsigned i = 0; i < net.streams; i++) {
        received += __atomic_load_n(&net.stream[i].received,
                                    __ATOMIC_RELAXED);
    }
    used = snprintf(reply, AGENT_REPLY, "running=%d ops=%llu kib=%llu ",
                    net.running, (unsigned long long)net.pieces,
                    (unsigned long long)received >> 10);
    figures_report(&net.f, reply + used, AGENT_REPLY - used);
    return 0;
}

/*
 * Wait until all has come back, while there is progress.  The stream is not
 * closed in one direction before: passt may then lose what is under way.
 */
static void wait_rest(Stream *s)
{
    struct timespec pause = { 0, 10000000 };
    uint64_t before = 0, received;
    unsigned idle = 0;

    while ((received = __atomic_load_n(&s->received, __ATOMIC_RELAXED)) <
           s->sent && idle < IDLE_TURNS &&
           !__atomic_load_n(&s->ended, __ATOMIC_RELAXED)) {
        idle = received == before ? idle + 1 : 0;
        before = received;
        nanosleep(&pause, NULL);
    }
    __atomic_store_n(&s->ended, 1, __ATOMIC_RELAXED);
    shutdown(s->fd, SHUT_RDWR);
}

/* net-stop: all that was sent must come back */
int net_stop(int argc, char **argv, char *reply)
{
    __atomic_store_n(&net.stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; net.running && i < net.streams; i++) {
        Stream *s = &net.stream[i];

        pthread_join(s->sender, NULL);
        wait_rest(s);
        pthread_join(s->receiver, NULL);
        if (s->received != s->sent) {
            figures_error(&net.f, "stream %u: %llu of %llu bytes came back",
                          i, (unsigned long long)s->received,
                          (unsigned long long)s->sent);
        }
        pool_check(&s->from, 0, s->from.size, &net.f);
        pool_check(&s->to, 0, s->to.size, &net.f);
        close(s->fd);
        pool_free(&s->from);
        pool_free(&s->to);
    }
    net.running = 0;
    return net_stat(argc, argv, reply);
}
