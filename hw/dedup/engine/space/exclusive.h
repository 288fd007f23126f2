/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Windows that nobody may meet: where a vCPU that stores to a frozen page would
 * fail, its owner keeps all of them out of the guest for a window's time.
 *
 * The order is: vCPUs out, then the remap lock.  The other way round, a vCPU
 * that waits for the lock, in a discard, would never get out.
 *
 * Such a window costs all vCPUs its length, so merging takes no more than one
 * part in a hundred of the time; what is restored for somebody, as much as it
 * takes.  A window is short, but how long it takes until all vCPUs are out
 * depends on the host: the owner may ask whether it takes too long.
 */

#ifndef DEDUP_EXCLUSIVE_H
#define DEDUP_EXCLUSIVE_H

#include "space/space.h"

/* All zero at first. */
typedef struct DedupExclusive {
    DedupExclusiveFn *fn;     /* the owner's; NULL: nobody need be kept out */
    int64_t rests_ns;         /* scanner's: the next window may begin then */
    bool held;                /* atomic: vCPUs waited for the last one */
    unsigned stops;           /* atomic: that they waited for, all in all */
    unsigned long_stops;      /* atomic: of them, longer than they may be */
} DedupExclusive;

/*
 * Take the remap lock and run @body, with vCPUs kept out if they must be: maybe
 * on another thread, while this one waits.  The remap lock is not held by the
 * caller.  False: they did not come out, or somebody had the lock then, for
 * whom they would have had to wait; @body was not run.
 */
bool dedup_space_exclusively(DedupSpace *space, DedupBodyFn *body, void *arg);

/*
 * Do vCPUs have to wait for longer than DEDUP_BOUND_NS, more often than once in
 * a hundred times?  Known after some tens of windows.  Any thread, no lock.
 */
bool dedup_exclusive_is_long(const DedupExclusive *e);

/* It is @now_ns: in how many us may a merge window begin?  0: now. */
int64_t dedup_exclusive_wait_us(const DedupExclusive *e, int64_t now_ns);

#endif /* DEDUP_EXCLUSIVE_H */
