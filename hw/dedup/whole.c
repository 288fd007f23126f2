/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: wait until blocks are whole
 *
 * Whoever needs RAM whole, or removes a block, comes here after the block was
 * made to leave the engine (ram.c), and waits for the worker that restores it
 * (leases.c).  Functions that wait may release and take the BQL.
 */

#include "qemu/osdep.h"
#include "hw/dedup/qemu-compat.h"
#include "qapi/error.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "dedup-internal.h"
#include "trace.h"

/*
 * Is there nothing left to restore but pages that a device writes to, and may
 * a drain help?  Lock held.
 */
static bool is_pinned(DedupRam *ram)
{
    DedupBlock *block;
    bool pinned = false;

    QTAILQ_FOREACH(block, &ram->blocks, next) {
        if (block->busy || (block->leaving && block->region &&
                            !block->tries && !block->error)) {
            return false;
        }
        pinned = pinned || dedup_block_is_pinned(block);
    }
    return pinned;
}

/*
 * Transfers end in the main loop, which is where we wait: so they are made to
 * end first, and none begins before the worker has tried again.  What it finds
 * is little, so the BQL is kept: a vCPU would begin the next transfer.  No
 * other block is restored meanwhile, as that might last.  BQL and lock held.
 */
static void retry_drained(DedupScanner *ds)
{
    DedupRam *ram = &ds->ram;
    bool idle;

    /* None is busy now (is_pinned()), and from here on the worker waits. */
    ram->draining = true;
    qemu_mutex_unlock(&ram->lock);
    idle = dedup_drain_begin(DEDUP_DRAIN_MS);
    dedup_exclusive_begin(ds);
    qemu_mutex_lock(&ram->lock);
    /* The main loop was polled: it may have been changed, or ended. */
    ram->draining = is_pinned(ram);
    if (ram->draining) {
        dedup_worker_try_pinned(ds, !idle);
        ram->draining = false;
    }
    trace_dedup_ram_drained(idle);
    qemu_mutex_unlock(&ram->lock);
    dedup_exclusive_end();
    dedup_drain_end();
    dedup_worker_kick(ds);
    qemu_mutex_lock(&ram->lock);
}

/*
 * Wait for the worker.  It does not need the BQL, but the vCPUs do, and it
 * may last.  As in run_on_cpu(), the caller has to expect changes.  BQL and
 * lock held.
 */
static void wait_worker(DedupScanner *ds)
{
    DedupRam *ram = &ds->ram;

    if (is_pinned(ram) && !qemu_in_coroutine()) {
        retry_drained(ds);
        return;
    }
    if (ram->draining) {
        /* Called from within a drain: that one tries later. */
        ram->draining = false;
        dedup_worker_kick(ds);
    }
    bql_unlock();
    qemu_cond_wait(&ram->changed, &ram->lock);
    /* BQL first: so says the order of locks. */
    qemu_mutex_unlock(&ram->lock);
    bql_lock();
    qemu_mutex_lock(&ram->lock);
}

static void set_restore_error(Error **errp, DedupBlock *block)
{
    error_setg(errp, "memory '%s' cannot be restored: %s",
               dedup_block_id(block), block->error->message);
}

/* What failed for somebody else may go now.  Lock held. */
static void try_again(DedupScanner *ds, DedupBlock *block)
{
    if (block->leaving && block->error) {
        g_clear_error(&block->error);
        block->pinned = false;
        block->tries = 0;
        block->retry_ms = 0;
        dedup_worker_kick(ds);
    }
}

/*
 * Is none of these blocks merged?  *@failed is one that cannot be restored.
 * Lock held.
 */
static bool is_whole(DedupRam *ram, bool (*needed)(RAMBlock *rb),
                     DedupBlock **failed)
{
    DedupBlock *block;
    bool whole = true;

    QTAILQ_FOREACH(block, &ram->blocks, next) {
        if (block->eligible || (needed && !needed(block->rb))) {
            continue;
        }
        if (block->error) {
            *failed = block;
        }
        whole = whole && !block->region && !block->busy;
    }
    return whole;
}

bool dedup_whole_check_room(DedupScanner *ds, bool (*needed)(RAMBlock *rb),
                            Error **errp)
{
    g_autoptr(GPtrArray) regions = g_ptr_array_new();
    g_autoptr(GError) gerr = NULL;
    DedupBlock *block;

    assert(bql_locked());
    /* Under the lock: the worker removes none of them meanwhile. */
    QEMU_LOCK_GUARD(&ds->ram.lock);
    QTAILQ_FOREACH(block, &ds->ram.blocks, next) {
        if (block->region && needed(block->rb)) {
            g_ptr_array_add(regions, block->region);
        }
    }
    if (!dedup_engine_check_room(ds->engine, (DedupRegion **)regions->pdata,
                                 regions->len, &gerr)) {
        error_setg(errp, "%s", gerr->message);
        return false;
    }
    return true;
}

bool dedup_whole_wait(DedupScanner *ds, bool (*needed)(RAMBlock *rb),
                      Error **errp)
{
    DedupRam *ram = &ds->ram;
    DedupBlock *block, *failed = NULL;
    bool whole;

    assert(bql_locked());
    qemu_mutex_lock(&ram->lock);
    QTAILQ_FOREACH(block, &ram->blocks, next) {
        if (!needed || needed(block->rb)) {
            try_again(ds, block);
        }
    }
    while (!(whole = is_whole(ram, needed, &failed)) && !failed) {
        wait_worker(ds);
    }
    if (!whole) {
        set_restore_error(errp, failed);
    }
    qemu_mutex_unlock(&ram->lock);
    return whole;
}

bool dedup_whole_wait_removable(DedupScanner *ds, RAMBlock *rb, Error **errp)
{
    DedupBlock *block;
    bool ok;

    QEMU_LOCK_GUARD(&ds->ram.lock);
    block = dedup_ram_find(ds, rb);
    if (block) {
        try_again(ds, block);
    }
    for (;;) {
        block = dedup_ram_find(ds, rb);
        ok = !block || !block->region || !block->named;
        if (!block || (ok ? !block->busy : !!block->error)) {
            break;
        }
        wait_worker(ds);
    }
    if (!ok) {
        set_restore_error(errp, block);
    }
    return ok;
}
