/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the face's files share: the engine, which is its layers.
 */

#ifndef DEDUP_ENGINE_INTERNAL_H
#define DEDUP_ENGINE_INTERNAL_H

#include "engine.h"
#include "figures.h"
#include "scan/pace.h"
#include "scan/scan.h"
#include "unmerge.h"

struct DedupEngine {
    DedupCallbacks callbacks;
    void *opaque;
    DedupHostMem *hostmem;
    DedupGroup *group;
    DedupControl control;
    DedupSpace *space;
    DedupRoom room;
    DedupScan *scan;
    DedupPace pace;
    DedupUnmerge unmerge;
    DedupFigures figures;
    char *group_error;        /* control lock */
};

/*
 * What dedup_engine_run() does, for who has no thread for it: begin once, step
 * until that says false, end.  A step that has nothing to do waits, unless
 * dedup_control_kick() was called before.
 */
void dedup_engine_begin(DedupEngine *engine);
bool dedup_engine_step(DedupEngine *engine);
void dedup_engine_end(DedupEngine *engine);

#endif /* DEDUP_ENGINE_INTERNAL_H */
