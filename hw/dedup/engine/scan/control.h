/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Control: what is asked of the scanner, and its sleep.
 *
 * Whatever is asked is written down under the lock and announced with
 * dedup_control_kick(); the scanner looks at it between batches, and between
 * the chunks of a batch.
 *
 * Thread: any.  The lock comes before those of the group and of the space; a
 * caller may hold it over several changes.
 */

#ifndef DEDUP_CONTROL_H
#define DEDUP_CONTROL_H

#include <glib.h>
#include <stdbool.h>

#include "host/types.h"

typedef struct DedupControl {
    GMutex lock;
    GCond wake;
    DedupParams params;
    bool stop;
    bool restoring;           /* everything: no scanning meanwhile */
    bool kick;                /* something was asked */
    bool nudge;               /* a short sleep may do */
} DedupControl;

/* Why a sleep has ended. */
typedef enum DedupWake {
    DEDUP_WAKE_TIME,
    DEDUP_WAKE_KICK,          /* something was asked, or it is to end */
    DEDUP_WAKE_NUDGE,
} DedupWake;

void dedup_control_init(DedupControl *c, const DedupParams *params);
void dedup_control_clear(DedupControl *c);

/* Something was asked: the scanner shall look again. */
void dedup_control_kick(DedupControl *c);
/* Nothing was asked: but how long to sleep is to be thought over. */
void dedup_control_nudge(DedupControl *c);
void dedup_control_stop(DedupControl *c);
bool dedup_control_is_stopping(DedupControl *c);

/* May be scanned, by what was asked? */
bool dedup_control_may_scan(DedupControl *c);

/* Sleep, or until something is asked; @us < 0: for as long as it takes. */
DedupWake dedup_control_wait(DedupControl *c, int64_t us);

/*
 * Sleep in the middle of something: false if something is asked, or was, which
 * stays to be seen by dedup_control_wait().
 */
bool dedup_control_pause(DedupControl *c, int64_t us);

#endif /* DEDUP_CONTROL_H */
