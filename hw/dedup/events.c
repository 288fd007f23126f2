/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: what is told to QMP: states, the end of an unmerge
 *
 * The scanner's thread finds out, and QMP is told by a bottom half in the main
 * loop.  The end of each unmerge is told once, and before the next begins: so
 * whoever begins one, or ends it early, does not wait for the bottom half.
 *
 * States come and go with what the guest writes, so they are told a few times
 * a second at most, each compared with what was told last.  Nothing is queued:
 * who was told too recently is told what is true when the timer looks again.
 */

#include "qemu/osdep.h"
#include "qapi/qapi-events-dedup.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "dedup-internal.h"
#include "trace.h"

/* Between two events about states */
#define DEDUP_TELL_MS 500

/* One enum for the engine, one for people; the same values. */
QEMU_BUILD_BUG_ON((int)DEDUP_STATE_SCANNING !=
                  (int)DEDUP_SCANNER_STATE_SCANNING);
QEMU_BUILD_BUG_ON((int)DEDUP_STATE_IDLE != (int)DEDUP_SCANNER_STATE_IDLE);
QEMU_BUILD_BUG_ON((int)DEDUP_STATE_LIMITED !=
                  (int)DEDUP_SCANNER_STATE_LIMITED);
QEMU_BUILD_BUG_ON((int)DEDUP_STATE_UNMERGING !=
                  (int)DEDUP_SCANNER_STATE_UNMERGING);
QEMU_BUILD_BUG_ON((int)DEDUP_STATE_STOPPED !=
                  (int)DEDUP_SCANNER_STATE_STOPPED);
QEMU_BUILD_BUG_ON((int)DEDUP_STATE_BLOCKED !=
                  (int)DEDUP_SCANNER_STATE_BLOCKED);

void dedup_events_init(DedupScanner *ds)
{
    qemu_mutex_init(&ds->event.lock);
}

void dedup_events_destroy(DedupScanner *ds)
{
    qemu_mutex_destroy(&ds->event.lock);
    g_free(ds->event.error);
}

void dedup_events_restored(void *opaque, uint64_t pages_left,
                           const GError *error)
{
    DedupScanner *ds = opaque;
    DedupEvent *ev = &ds->event;

    trace_dedup_scanner_restored(pages_left, error ? error->message : "");
    WITH_QEMU_LOCK_GUARD(&ev->lock) {
        ev->unmerged = true;
        ev->pages_left = pages_left;
        g_free(ev->error);
        ev->error = error ? g_strdup(error->message) : NULL;
    }
    qemu_bh_schedule(ds->update_bh);
}

static void unmerge_ended(DedupScanner *ds, uint64_t pages_left,
                          const char *error)
{
    ds->unmerging = false;
    /* What was cancelled after its last page is complete. */
    qapi_event_send_dedup_unmerge_completed(
        object_get_canonical_path_component(OBJECT(ds)), pages_left,
        pages_left ? error : NULL);
}

void dedup_events_send(DedupScanner *ds)
{
    DedupEvent *ev = &ds->event;
    g_autofree char *error = NULL;
    uint64_t left;

    WITH_QEMU_LOCK_GUARD(&ev->lock) {
        if (!ev->unmerged) {
            return;
        }
        ev->unmerged = false;
        left = ev->pages_left;
        error = g_steal_pointer(&ev->error);
    }
    if (ds->unmerging) {
        unmerge_ended(ds, left, error);
    }
}

void dedup_events_cancel_unmerge(DedupScanner *ds)
{
    DedupStats stats;

    /* Its end may have been said, and wait for the bottom half. */
    dedup_events_send(ds);
    if (ds->unmerging) {
        dedup_engine_get_stats(ds->engine, &stats, false);
        unmerge_ended(ds, stats.pages_merged,
                      "the property 'run' was turned on");
    }
}

void dedup_events_end_unmerge(DedupScanner *ds)
{
    dedup_events_send(ds);
    if (ds->unmerging) {
        unmerge_ended(ds, 0, NULL);
    }
}

/*
 * The scanner's thread takes a moment to notice what was decided here.
 * Nobody should read "blocked" without a reason meanwhile, or take "stopped"
 * for the end of an unmerge that has not begun.
 */
DedupScannerState dedup_events_state(DedupScanner *ds,
                                     const DedupStats *stats)
{
    DedupParams params;

    if (stats->state == DEDUP_STATE_UNMERGING || ds->unmerging) {
        return DEDUP_SCANNER_STATE_UNMERGING;
    }
    if (ds->reasons) {
        return DEDUP_SCANNER_STATE_BLOCKED;
    }
    if (stats->state == DEDUP_STATE_BLOCKED) {
        dedup_scanner_get_params(ds, &params);
        return params.run ? DEDUP_SCANNER_STATE_SCANNING
                          : DEDUP_SCANNER_STATE_STOPPED;
    }
    return (DedupScannerState)stats->state;
}

void dedup_events_tell_state(DedupScanner *ds)
{
    g_autoptr(DedupBlockedList) list = NULL;
    DedupStats stats = { .state = DEDUP_STATE_BLOCKED };
    DedupTold now = { .any = true, .reason = DEDUP_BLOCKED_REASON__MAX };
    DedupTold *told = &ds->told;
    const DedupBlocked *first = NULL;

    now.ms = qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
    if (told->any && now.ms - told->ms < DEDUP_TELL_MS) {
        return;
    }
    if (ds->engine) {
        dedup_engine_get_stats(ds->engine, &stats, false);
    }
    now.state = dedup_events_state(ds, &stats);
    if (now.state == DEDUP_SCANNER_STATE_BLOCKED ||
        now.state == DEDUP_SCANNER_STATE_LIMITED) {
        list = dedup_blockers_list(ds, &stats);
    }
    if (list) {
        first = list->value;
        now.reason = first->reason;
    }
    if (told->any && now.state == told->state && now.reason == told->reason) {
        return;
    }
    *told = now;
    qapi_event_send_dedup_state_changed(
        object_get_canonical_path_component(OBJECT(ds)), now.state,
        first != NULL, now.reason, first ? first->detail : NULL);
}
