/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: what the RAM guard asks of us
 *
 * See hw/dedup/ram-guard.h for who asks, and when.
 */

#include "qemu/osdep.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/dedup/ram-guard.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "dedup-internal.h"

/* On any thread, with or without the BQL. */
static bool guard_discard_begin(void *opaque, RAMBlock *rb, ram_addr_t start,
                                size_t length)
{
    DedupScanner *ds = opaque;

    return dedup_engine_discard_begin(ds->engine,
                                      rb ? rb->host + start : NULL, length);
}

static void guard_discard_end(void *opaque)
{
    DedupScanner *ds = opaque;

    dedup_engine_discard_end(ds->engine);
}

static bool is_needed_whole(RAMBlock *rb)
{
    return ram_guard_is_whole(rb);
}

static bool guard_whole_begin(void *opaque, RAMBlock *rb, Error **errp)
{
    DedupScanner *ds = opaque;
    bool ok;

    if (!ds->started) {
        return true;
    }
    ok = dedup_whole_check_room(ds, is_needed_whole, errp);
    if (ok) {
        /* The user is on the guard's list already: no block may stay. */
        dedup_scanner_recheck(ds);
        ok = dedup_whole_wait(ds, is_needed_whole, errp);
        /* Nothing needs discards any more: vfio-user forbids them next. */
        dedup_scanner_recheck(ds);
    }
    if (!ok) {
        error_append_hint(errp, "Stop dedup-scanner '%s' with dedup-unmerge "
                          "on a host that has the memory.\n",
                          object_get_canonical_path_component(OBJECT(ds)));
    }
    return ok;
}

static void guard_whole_end(void *opaque, RAMBlock *rb)
{
    DedupScanner *ds = opaque;

    qemu_bh_schedule(ds->update_bh);
}

/*
 * A file with a name lives on, and somebody may want to read it: the worker
 * restores it since no device uses the block.  The others need not be
 * restored, but if the worker is at it, it cannot be interrupted.
 */
static bool guard_prepare_remove(void *opaque, RAMBlock *rb, Error **errp)
{
    DedupScanner *ds = opaque;

    if (!ds->started) {
        return true;
    }
    dedup_scanner_recheck(ds);
    return dedup_whole_wait_removable(ds, rb, errp);
}

/* On any thread. */
static bool guard_needs_discards(void *opaque)
{
    DedupScanner *ds = opaque;

    return qatomic_read(&ds->discard_required);
}

/* On any thread. */
static void guard_wait_window(void *opaque, void *host, size_t length)
{
    dedup_engine_wait_window(host, length);
}

static void guard_kernel_writers_changed(void *opaque)
{
    DedupScanner *ds = opaque;

    /* when this returns no window is open that one could meet */
    dedup_scanner_recheck(ds);
}

static RamGuardOps guard_ops = {
    .discard_begin = guard_discard_begin,
    .discard_end = guard_discard_end,
    .whole_begin = guard_whole_begin,
    .whole_end = guard_whole_end,
    .prepare_remove = guard_prepare_remove,
    .needs_discards = guard_needs_discards,
    .wait_window = guard_wait_window,
    .kernel_writers_changed = guard_kernel_writers_changed,
};

bool dedup_guard_register(DedupScanner *ds)
{
    guard_ops.windows = dedup_engine_windows();
    return ram_guard_register(&guard_ops, ds);
}
