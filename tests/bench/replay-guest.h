/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A process with the RAM of a guest that once ran, as an image has it, and no
 * guest: the engine, or KSM, merges it, and every byte is compared with the
 * image afterwards.
 *
 * An image is a file with the guest's RAM; pages that had no memory are holes.
 */

#ifndef REPLAY_GUEST_H
#define REPLAY_GUEST_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "bench-cgroup.h"
#include "bench-counts.h"

typedef enum ReplayMemory {
    REPLAY_ANON,              /* as "-m" has it: huge pages wanted */
    REPLAY_MEMFD,             /* shared */
} ReplayMemory;

/* Who merges it. */
typedef enum ReplayWho {
    REPLAY_ENGINE,
    REPLAY_KSM,
    REPLAY_NOBODY,
} ReplayWho;

#define REPLAY_MAX_ENGINES 8

/* What a thread of it stores to, meanwhile. */
typedef enum ReplayWrites {
    REPLAY_NO_WRITES,
    REPLAY_BURSTS,            /* to one page in twenty, with pauses */
    REPLAY_LOOP,              /* the same, without */
    REPLAY_ROUNDS,            /* to all pages, with a pause after each round */
} ReplayWrites;

typedef struct ReplayConfig {
    const char *image;
    const char *group;        /* a directory, of the engine's */
    ReplayMemory memory;
    ReplayWho who;
    bool defaults;            /* the engine's speed: as users get it */
    bool by_mprotect;         /* the engine freezes; else by userfaultfd */
    unsigned engines;         /* each has a part of the RAM; 0: one */
    unsigned max_cpu;         /* with @defaults: its limit, if not 0 */
    ReplayWrites writes;
    unsigned after_s;         /* stores count from then on */
    BenchCgroup *cgroup;
} ReplayConfig;

/* What the engine said in the end. */
typedef struct ReplayResult {
    uint64_t present;         /* pages with memory at the start */
    uint64_t scanned;         /* pages hashed */
    uint64_t scans;
    uint64_t merged;
    uint64_t zero;
    uint64_t breaks;
    uint64_t maps;
    uint64_t metadata;
    uint64_t window_max_ns;
    uint64_t bad;             /* bytes that are not the image's */
    uint64_t stores;          /* of the writer */
    uint64_t p99_ns;          /* of a hundred, all but one take less */
    uint64_t p999_ns;         /* of a thousand */
    uint64_t most_ns;
} ReplayResult;

typedef struct ReplayGuest {
    pid_t pid;
    int control;              /* to it */
    int answers;              /* from it */
    clockid_t clock;          /* of all its threads */
    BenchCounters counters;
} ReplayGuest;

/* Fork it; the caller has one thread only.  Returns when its RAM is loaded. */
void replay_guest_start(ReplayGuest *g, const ReplayConfig *config);
/* Let the merging begin; counts begin here. */
void replay_guest_go(ReplayGuest *g);
/* CPU time of all its threads since it was forked, in ns. */
uint64_t replay_guest_cpu_ns(const ReplayGuest *g);
/* End the merging, compare all bytes, end the process. */
void replay_guest_end(ReplayGuest *g, ReplayResult *result);

#endif /* REPLAY_GUEST_H */
