/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: the end of an unmerge, and who is told of it
 *
 * The scanner's thread finds out, and QMP is told by a bottom half in the main
 * loop.  The end of each unmerge is told once, and before the next begins: so
 * whoever begins one, or ends it early, does not wait for the bottom half.
 */

#include "qemu/osdep.h"
#include "qapi/qapi-events-dedup.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "dedup-internal.h"
#include "trace.h"

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
