/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The merge window: what its two halves share.
 *
 * window.c chooses what is to be replaced, and prepares it; frozen.c has what
 * happens while nobody can store to it.
 */

#ifndef DEDUP_WINDOW_H
#define DEDUP_WINDOW_H

#include "space/ledger.h"

/* Pages that follow each other here and in the segment. */
typedef struct DedupRun {
    uint32_t page;
    uint32_t n;
    DedupHolding *holding;    /* NULL: zero pages */
    uint16_t index;
    bool own;                 /* the pages were own, not broken */
    bool flush;               /* they are dropped before they are replaced */
    bool mapped;              /* out: the replacement stands */
    bool refilled;            /* out: it does not, own memory does */
} DedupRun;

typedef struct DedupWindow {
    DedupRegion *r;
    uint32_t first;           /* what is frozen */
    uint32_t span;
    DedupAction *admitted[DEDUP_WINDOW_PAGES];
    unsigned nadmitted;
    DedupRun runs[DEDUP_WINDOW_PAGES];
    unsigned nruns;
    unsigned nflush;          /* runs that are dropped first */
    unsigned nspared;         /* spare pages that were used */
    bool may_drop;            /* pages: there is memory to put them back */
    DedupFrozen frozen;       /* from the freeze on */
} DedupWindow;

static inline bool dedup_window_is_broken(const DedupRegion *r, uint32_t page)
{
    return dedup_entry_is_broken(dedup_entry_at(r, page));
}

/*
 * Freeze, judge, replace, thaw, enter, punch: everything from the freeze on.
 * Sets DedupAction.done and .differs of what was admitted.
 */
void dedup_window_run(DedupWindow *w, unsigned *limits);

/*
 * Wait until a window may begin: on a fresh slice, with some quota, and when
 * vCPUs that were kept out have run for long enough.  No lock is held.  False:
 * the scanner is asked for something.
 */
bool dedup_window_turn(DedupSpace *space);

#endif /* DEDUP_WINDOW_H */
