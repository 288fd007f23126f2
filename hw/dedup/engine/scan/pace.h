/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The pace: how fast the scanner goes.
 *
 * Without an advisor it is what the parameters say, as KSM's.  With one, a pass
 * is to take a certain time, which follows from what passes find: at first, and
 * while they find much, as little as may be; then more and more, up to the
 * target.  So a new guest is merged quickly, and where nothing is to be found
 * next to nothing is spent, while what becomes equal is found within the
 * target.
 *
 * What it may spend is bounded: by max_cpu_vm, and by a fair share of what the
 * group may, max_cpu.  Who wants less than its share leaves the rest to others.
 * Counted is the CPU time of the scanner and of the thread that answers other
 * members.
 *
 * Thread: the scanner's, but for dedup_pace_wants() and dedup_pace_hurry().
 */

#ifndef DEDUP_PACE_H
#define DEDUP_PACE_H

#include "group/group.h"
#include "host/pressure.h"
#include "scan/scan.h"

typedef struct DedupPace {
    DedupGroup *group;
    DedupPressure pressure;
    int64_t wish_us;          /* what a pass should take, by what was found */
    int64_t scan_us;          /* and shall; 0: as fast as may be */
    uint64_t pass_work;       /* of the last pass, in pages hashed */
    int64_t pass_cpu_ns;      /* and what it took */
    int64_t pass_start_ns;    /* CPU time when it began */
    uint32_t share;           /* what we may spend, in permille of a core */
    uint32_t wants;           /* what we would, likewise; atomic */
    int64_t share_ns;         /* when that was found out */
    int64_t target_ns;        /* when the target was looked at */
    int64_t credit_ns;        /* CPU time that may be spent at once */
    int64_t wall_ns;          /* as of that */
    int64_t cpu_ns;
    uint32_t batch;           /* pages of this batch */
    bool hurry;               /* atomic: something new is there */
} DedupPace;

/* @hostmem and @group outlive it. */
void dedup_pace_init(DedupPace *p, DedupGroup *group, DedupHostMem *hostmem);
void dedup_pace_clear(DedupPace *p);

/* How many pages the next batch is to have. */
uint32_t dedup_pace_batch(DedupPace *p, const DedupParams *params);
/* A batch is done: how long to sleep, in us. */
int64_t dedup_pace_rest(DedupPace *p, const DedupParams *params);
/*
 * The pass that is under way has had @work, in pages hashed.  If that is far
 * more than all of the last one, as the guest has booted meanwhile, its pace
 * was wrong: it goes on as fast as may be.
 */
void dedup_pace_grown(DedupPace *p, uint64_t work);
/* A pass is done. */
void dedup_pace_pass(DedupPace *p, const DedupParams *params,
                     const DedupTally *tally);
/* There is something new to look at: begin as fast as at the start. */
void dedup_pace_hurry(DedupPace *p);

/* What this member would spend, in permille of a core; any thread. */
uint32_t dedup_pace_wants(const DedupPace *p);

#endif /* DEDUP_PACE_H */
