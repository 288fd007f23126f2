/*
 * Crash points: places where a QEMU with mutants dies when a test says so
 *
 * scripts/link-mutants links this in front of functions of the engine (the
 * linker's --wrap), and the hook of the engine's windows leads here.
 * $DEDUP_CRASH is a file of zeros that the test has mapped or writes to, laid
 * out like Control: the process kills itself when it comes to the place that
 * "point" names, after "skip" times there.  test_kills.py reads the names.
 *
 * Threads: any.
 *
 * Copyright (c) 2026 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "host/mutant.h"
#include "crash-points.h"

typedef enum Point {
    CRASH_NONE,
    CRASH_UNSEALED,     /* the segment has a name and all pages, no seal */
    CRASH_SEALED,       /* it is sealed, no hint leads to it */
    CRASH_ANNOUNCING,   /* some hints do */
    CRASH_ANNOUNCED,    /* all do, none of its pages is mapped */
    CRASH_ASKING,       /* another member was asked, has not answered */
    CRASH_ANSWERING,    /* the answer is made, not sent */
    CRASH_HANDED,       /* a segment's descriptor is on its way */
    CRASH_FETCHED,      /* it has come, nobody has noted that */
    CRASH_FROZEN,       /* a window: pages are frozen and compared */
    CRASH_FLUSHED,      /* some of them are gone */
    CRASH_REPLACED,     /* all are replaced, still in the RAM's file */
    CRASH_RESTORING,    /* pages are frozen and copied, not put back */
    CRASH_LOCKED,       /* the table is locked, not changed */
    CRASH_UNLOCKING,    /* it is changed, still locked */
    CRASH_JOINING,      /* the socket is there, nobody answers */
    CRASH_POINTS
} Point;

typedef struct Control {
    uint32_t point;
    uint32_t skip;
    uint32_t reached[CRASH_POINTS];
} Control;

static Control *control;
/* A segment of ours was made, and is being announced. */
static __thread bool announcing;

static void reach(Point point)
{
    if (!control) {
        return;
    }
    __atomic_fetch_add(&control->reached[point], 1, __ATOMIC_RELAXED);
    if (__atomic_load_n(&control->point, __ATOMIC_ACQUIRE) == point &&
        __atomic_fetch_sub(&control->skip, 1, __ATOMIC_RELAXED) == 0) {
        kill(getpid(), SIGKILL);
    }
}

static void reach_stage(int stage)
{
    switch (stage) {
    case DEDUP_HOOK_JUDGED:
        reach(CRASH_FROZEN);
        break;
    case DEDUP_HOOK_FLUSHED:
        reach(CRASH_FLUSHED);
        break;
    case DEDUP_HOOK_COPIED:
        reach(CRASH_RESTORING);
        break;
    }
}

static void __attribute__((constructor)) crash_points_init(void)
{
    const char *path = getenv("DEDUP_CRASH");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *map;

    if (fd < 0) {
        return;
    }
    map = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED,
               fd, 0);
    close(fd);
    if (map == MAP_FAILED) {
        abort();
    }
    control = map;
    dedup_mutant_hook = reach_stage;
}

DedupSegment *__wrap_dedup_builder_finish(DedupBuilder *b, uint32_t gid,
                                          GError **error)
{
    reach(CRASH_UNSEALED);
    return __real_dedup_builder_finish(b, gid, error);
}

DedupHolding *__wrap_dedup_holding_add(DedupSpace *space,
                                       DedupSegment *segment)
{
    if (segment->mine) {
        reach(CRASH_SEALED);
        announcing = true;
    } else if (!segment->zeroes) {
        reach(CRASH_FETCHED);
    }
    return __real_dedup_holding_add(space, segment);
}

bool __wrap_dedup_index_replace(DedupIndex *index, uint64_t hash,
                                const DedupHint *old, const DedupHint *hint)
{
    bool done = __real_dedup_index_replace(index, hash, old, hint);

    if (announcing) {
        reach(CRASH_ANNOUNCING);
    }
    return done;
}

/* The end of each draft, also of one that has become a segment. */
void __wrap_dedup_builder_free(DedupBuilder *b)
{
    if (announcing) {
        announcing = false;
        reach(CRASH_ANNOUNCED);
    }
    __real_dedup_builder_free(b);
}

int __wrap_dedup_message_send(int sock, DedupMessage *m,
                              DedupMessageType type, const int *fds,
                              unsigned nfds)
{
    bool asks = type == DEDUP_MESSAGE_PROVE || type == DEDUP_MESSAGE_FETCH;
    int ret;

    if (type == DEDUP_MESSAGE_PROVE_REPLY ||
        type == DEDUP_MESSAGE_FETCH_REPLY) {
        reach(CRASH_ANSWERING);
    }
    ret = __real_dedup_message_send(sock, m, type, fds, nfds);
    if (ret == 0 && (asks || nfds)) {
        reach(asks ? CRASH_ASKING : CRASH_HANDED);
    }
    return ret;
}

void __wrap_dedup_punch_replaced(DedupRegion *r, uint32_t page, uint32_t n)
{
    reach(CRASH_REPLACED);
    __real_dedup_punch_replaced(r, page, n);
}

bool __wrap_dedup_group_table_lock(DedupGroup *g)
{
    bool locked = __real_dedup_group_table_lock(g);

    if (locked) {
        reach(CRASH_LOCKED);
    }
    return locked;
}

void __wrap_dedup_group_table_unlock(DedupGroup *g)
{
    reach(CRASH_UNLOCKING);
    __real_dedup_group_table_unlock(g);
}

DedupPeerServer *__wrap_dedup_peer_server_new(int listen_fd, int shared_fd,
                                              unsigned self,
                                              const DedupGroupOps *ops,
                                              void *opaque, uint64_t *cpu_ns,
                                              GError **error)
{
    reach(CRASH_JOINING);
    return __real_dedup_peer_server_new(listen_fd, shared_fd, self, ops,
                                        opaque, cpu_ns, error);
}
