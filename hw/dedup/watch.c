/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: look again at everything that may forbid it
 *
 * For the VM (blockers.c) and for each block (ram.c), and then tell the
 * engine.  Called when something has changed that may matter, and once a
 * second for what nobody announces.  With the BQL held.
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "dedup-internal.h"
#include "trace.h"

static DedupScanner *the_scanner;

DedupScanner *dedup_scanner_get(void)
{
    return the_scanner;
}

void dedup_scanner_set(DedupScanner *ds)
{
    the_scanner = ds;
}

void dedup_scanner_update(DedupScanner *ds, bool run)
{
    uint32_t reasons;
    bool blocked, hard;

    assert(bql_locked());
    reasons = dedup_blockers(ds);
    if (!ds->started) {
        ds->reasons = reasons;
        return;
    }

    /*
     * Merging needs memory that may be taken away, and so does what is
     * merged: VFIO and others must not pin it.  Required before the engine
     * may merge the first page, until after the last was restored.
     */
    if (run && !reasons && !ds->discard_required &&
        !dedup_scanner_estimates(ds)) {
        if (ram_block_discard_require(true) == 0) {
            qatomic_set(&ds->discard_required, true);
        } else {
            reasons |= BIT(DEDUP_BLOCKED_REASON_DISCARD_DISABLED);
        }
    }

    /*
     * Also when run is off: the engine notices that in its own time, and
     * might merge a page when it is not required any more.  When it has been
     * blocked it does not.
     */
    blocked = !run || reasons;
    hard = dedup_blockers_hard(ds);
    if (blocked != ds->blocked || hard != ds->hard) {
        trace_dedup_scanner_block(reasons, blocked, hard);
        dedup_engine_block(ds->engine, blocked, hard);
        ds->blocked = blocked;
        ds->hard = hard;
    }
    dedup_ram_update(ds);
    /* Only said: what is not there is not scanned. */
    if (run && !dedup_ram_has_eligible(ds)) {
        reasons |= BIT(DEDUP_BLOCKED_REASON_NO_ELIGIBLE_MEMORY);
    }
    ds->reasons = reasons;
    if (run) {
        dedup_blockers_warn(ds);
    }

    if (ds->discard_required && blocked && dedup_engine_is_whole(ds->engine)) {
        ram_block_discard_require(false);
        qatomic_set(&ds->discard_required, false);
    }
}

void dedup_scanner_recheck(DedupScanner *ds)
{
    DedupParams params;

    dedup_scanner_get_params(ds, &params);
    dedup_scanner_update(ds, params.run);
}
