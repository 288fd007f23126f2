/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A request to restore everything; see unmerge.c.
 */

#ifndef DEDUP_UNMERGE_H
#define DEDUP_UNMERGE_H

#include "scan/control.h"
#include "scan/room.h"

typedef struct DedupUnmerge {
    DedupControl *control;
    DedupSpace *space;
    DedupRoom *room;
    bool fresh;               /* a new request; control lock */
    bool force;               /* control lock */
    DedupReservation reserved; /* control lock */
    DedupRestore round;       /* scanner's own, as is what follows */
    uint64_t last;            /* pages left after the last round */
    int64_t moved_us;         /* when a round last made progress */
} DedupUnmerge;

/*
 * Ask for it; @off: and scan no more.  False and DEDUP_ERROR_MEMORY with the
 * figures if the memory is not there and @force is false: nothing has changed.
 * Any thread.
 */
bool dedup_unmerge_request(DedupUnmerge *u, bool off, bool force,
                           GError **error);
/* Take it back; the control lock is held. */
void dedup_unmerge_cancel(DedupUnmerge *u);

typedef enum DedupUnmergeStep {
    DEDUP_UNMERGE_GOES_ON,
    DEDUP_UNMERGE_WAITS,      /* for pins, which nobody tells the end of */
    DEDUP_UNMERGE_ENDED,
} DedupUnmergeStep;

/*
 * One step of the request.  ENDED: @left pages are not own, and @error says
 * why.  Scanner's.
 */
DedupUnmergeStep dedup_unmerge_step(DedupUnmerge *u, uint64_t *left,
                                    GError **error);

/* Why pages could not be restored: DEDUP_ERROR_MEMORY, _STATE or _PINNED. */
void dedup_restore_error(uint64_t left, unsigned lacks, GError **error);

#endif /* DEDUP_UNMERGE_H */
