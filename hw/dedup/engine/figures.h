/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The figures: what this process counts, what it tells the group, what it
 * reads of the group; see figures.c.
 *
 * Thread: the scanner's, unless a comment says otherwise.
 */

#ifndef DEDUP_FIGURES_H
#define DEDUP_FIGURES_H

#include <time.h>

#include "engine.h"
#include "scan/pace.h"
#include "scan/scan.h"

typedef struct DedupFigures {
    DedupHostMem *hostmem;
    DedupGroup *group;
    DedupSpace *space;
    DedupRoom *room;
    DedupScan *scan;
    const DedupPace *pace;
    bool estimates;           /* nothing is merged, ever */
    GMutex lock;              /* the last one in the order */
    DedupStats stats;         /* what get_stats() returns; lock */
    uint64_t overhead_bytes;  /* metadata and maps that we bear; lock */
    unsigned idle_passes;     /* full passes in a row that found nothing */
    int64_t taken_us;         /* when the costly figures were last taken */
    int64_t pause_us;         /* and how long not again */
    int64_t maps_us;          /* when the process's maps were counted */
    uint64_t maps_then;       /* and how many of them were ours */
    int64_t judged_us;        /* when dedup_figures_pass() last said true */
    clockid_t cpu_clock;
    bool cpu_clock_valid;     /* atomic */
} DedupFigures;

/* All but the lock and the state is zero at first. */
void dedup_figures_init(DedupFigures *f, DedupState state);
void dedup_figures_clear(DedupFigures *f);

/* The calling thread's CPU time counts, until _end(). */
void dedup_figures_begin_thread(DedupFigures *f);
void dedup_figures_end_thread(DedupFigures *f);

/* Another state?  Then the group is told. */
bool dedup_figures_set_state(DedupFigures *f, DedupState state);
DedupState dedup_figures_state(DedupFigures *f);
/* What the state is called while scanning. */
DedupState dedup_figures_scan_state(DedupFigures *f);

/* The process may have so many mappings, in percent of what is allowed. */
void dedup_figures_limit_maps(DedupFigures *f, uint32_t percent);

/* At the end of a batch; @now: the costly ones, too. */
void dedup_figures_batch(DedupFigures *f, bool now);
/*
 * At the end of a pass.  True: the costly ones are new, and scan/ can judge by
 * them.
 */
bool dedup_figures_pass(DedupFigures *f, const DedupTally *tally);

/* See dedup_engine_get_stats().  Any thread. */
void dedup_figures_get(DedupFigures *f, DedupStats *stats, bool reset_max);

#endif /* DEDUP_FIGURES_H */
