/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: RAM blocks become regions of the engine
 *
 * The list of blocks follows the RAMBlockNotifier.  Which of them the engine
 * works on is decided by dedup_ram_update(), in a bottom half, because a
 * block is announced before its attributes are set (eligible.c): after
 * each change of the memory map, when something else has changed that may
 * matter, and once a second for what nobody announces.
 *
 * A block that is not eligible any more is left to the worker (leases.c), and
 * who needs it whole waits for that (whole.c).
 * Only removal cannot wait: when ram_block_removed returns, the memory is
 * unmapped.
 */

#include "qemu/osdep.h"
#include <sys/eventfd.h>
#include "hw/dedup/qemu-compat.h"
#include "exec/cpu-common.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/madvise.h"
#include "qemu/main-loop.h"
#include "system/hostmem.h"
#include "dedup-internal.h"
#include "trace.h"

DedupBlock *dedup_ram_find(DedupScanner *ds, const RAMBlock *rb)
{
    DedupBlock *block;

    QTAILQ_FOREACH(block, &ds->ram.blocks, next) {
        if (block->rb == rb) {
            return block;
        }
    }
    return NULL;
}

static void block_free(DedupBlock *block)
{
    g_clear_error(&block->error);
    g_free(block->id);
    g_free(block);
}

/* Lock held. */
static void enter_engine(DedupScanner *ds, DedupBlock *block)
{
    g_autoptr(GError) gerr = NULL;
    DedupRegionInfo info;

    dedup_block_info(block, &info);
    block->region = dedup_region_add(ds->engine, &info, &gerr);
    block->flags = info.flags;
    block->from_ksm = block->from_ksm ||
                      (block->region && !dedup_scanner_estimates(ds));
    trace_dedup_block_enter(info.id, info.size, info.flags, !!block->region);
    if (!block->region) {
        block->eligible = false;
        block->reason = DEDUP_BLOCK_REASON_OUT_OF_MEMORY;
        /* The worker gives the lease back. */
        block->leaving = block->leased;
    }
}

/* Was it given to the engine with advice that has changed since? */
static bool is_stale(DedupBlock *block)
{
    DedupRegionInfo info;

    if (!block->region) {
        return false;
    }
    dedup_block_info(block, &info);
    return info.flags != block->flags;
}

/* Lock held. */
static void stay_in_engine(DedupBlock *block)
{
    /* Too late if the worker is at it: then it enters again. */
    block->leaving = false;
    block->pinned = false;
    g_clear_error(&block->error);
    if (block->closed && block->region) {
        block->closed = false;
        dedup_region_open(block->region);
    }
}

/*
 * Not in dedup_region_remove(): what the backend's owner wants by now is only
 * known under the BQL.
 */
static void give_to_ksm(DedupBlock *block)
{
    RAMBlock *rb = block->rb;

    if (block->from_ksm) {
        block->from_ksm = false;
        if (MEMORY_BACKEND(memory_region_owner(rb->mr))->merge) {
            qemu_madvise(rb->host, rb->used_length, QEMU_MADV_MERGEABLE);
        }
    }
}

static void update_block(DedupScanner *ds, DedupBlock *block)
{
    DedupRam *ram = &ds->ram;
    DedupBlockReason reason = 0;
    bool eligible, kick = false;

    eligible = dedup_block_eligible(ds, block, &reason);
    WITH_QEMU_LOCK_GUARD(&ram->lock) {
        g_free(block->id);
        block->id = g_strdup(dedup_block_id(block));
        /* Last: it makes others wait who open the file. */
        eligible = eligible && dedup_block_secure(ds, block, &reason);
        if (block->eligible && !eligible) {
            trace_dedup_block_leave(block->id, DedupBlockReason_str(reason));
        }
        block->eligible = eligible;
        block->reason = reason;
        if (eligible && !is_stale(block)) {
            stay_in_engine(block);
        } else if (!block->leaving && (block->region || block->leased)) {
            block->leaving = true;
            block->tries = 0;
            block->retry_ms = 0;
            kick = true;
        }
        /* Under the lock: who is asked for the lease must find the region. */
        if (eligible && !block->region && !block->busy) {
            enter_engine(ds, block);
            kick = block->leaving;
        }
        if (!block->region && !block->busy) {
            give_to_ksm(block);
        }
    }
    if (kick) {
        dedup_worker_kick(ds);
    }
}

void dedup_ram_update(DedupScanner *ds)
{
    DedupBlock *block;

    assert(bql_locked());
    QTAILQ_FOREACH(block, &ds->ram.blocks, next) {
        update_block(ds, block);
    }
}

bool dedup_ram_has_eligible(DedupScanner *ds)
{
    DedupBlock *block;

    QTAILQ_FOREACH(block, &ds->ram.blocks, next) {
        if (block->eligible) {
            return true;
        }
    }
    return false;
}

char *dedup_ram_why_none(DedupScanner *ds)
{
    DedupBlock *block, *largest = NULL;

    QTAILQ_FOREACH(block, &ds->ram.blocks, next) {
        /* Firmware may be larger than what somebody tries this with. */
        if (block->reason != DEDUP_BLOCK_REASON_NOT_BACKEND &&
            (!largest ||
             block->rb->used_length > largest->rb->used_length)) {
            largest = block;
        }
    }
    if (!largest) {
        return g_strdup("this virtual machine has no RAM");
    }
    return g_strdup_printf("memory '%s': %s (%s)", dedup_block_id(largest),
                           dedup_block_reason_text(largest->reason),
                           DedupBlockReason_str(largest->reason));
}

static void ram_added(RAMBlockNotifier *n, void *host, size_t size,
                      size_t max_size)
{
    DedupScanner *ds = container_of(n, DedupScanner, ram.notifier);
    DedupBlock *block = g_new0(DedupBlock, 1);
    ram_addr_t offset;

    block->rb = qemu_ram_block_from_host(host, false, &offset);
    assert(block->rb && offset == 0);
    block->id = g_strdup(dedup_block_id(block));
    block->reason = DEDUP_BLOCK_REASON_NOT_MAPPED;
    WITH_QEMU_LOCK_GUARD(&ds->ram.lock) {
        QTAILQ_INSERT_TAIL(&ds->ram.blocks, block, next);
    }
    qemu_bh_schedule(ds->update_bh);
}

static void ram_removed(RAMBlockNotifier *n, void *host, size_t size,
                        size_t max_size)
{
    DedupScanner *ds = container_of(n, DedupScanner, ram.notifier);
    DedupRam *ram = &ds->ram;
    g_autoptr(GError) gerr = NULL;
    DedupBlock *block;
    DedupRegion *region;
    ram_addr_t offset;

    block = dedup_ram_find(ds,
                           qemu_ram_block_from_host(host, false, &offset));
    assert(block);

    qemu_mutex_lock(&ram->lock);
    if (block->busy && !block->named) {
        /* Nobody wants its contents: one window is waited for, not all. */
        dedup_engine_cancel_restore(ds->engine, host);
    }
    while (block->busy) {
        qemu_cond_wait(&ram->changed, &ram->lock);
    }
    region = block->region;
    QTAILQ_REMOVE(&ram->blocks, block, next);
    qemu_mutex_unlock(&ram->lock);

    /*
     * guard_prepare_remove() has seen to it that a file with a name has no
     * region any more; in case that was not called.  The lease ends when the
     * file is closed.
     */
    if (region && !dedup_region_remove(region, block->named, &gerr)) {
        error_report("dedup-scanner: the file of memory '%s' is not "
                     "complete: %s", dedup_block_id(block), gerr->message);
        dedup_region_remove(region, false, NULL);
    }
    block_free(block);
}

static void memory_commit(MemoryListener *listener)
{
    DedupScanner *ds = container_of(listener, DedupScanner, ram.listener);

    qemu_bh_schedule(ds->update_bh);
}

bool dedup_ram_init(DedupScanner *ds, Error **errp)
{
    DedupRam *ram = &ds->ram;

    ram->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    ram->signal_fd = dedup_worker_signalfd();
    if (ram->kick_fd < 0 || ram->signal_fd < 0) {
        error_setg_errno(errp, errno, "cannot make an event descriptor");
        return false;
    }
    return true;
}

void dedup_ram_start(DedupScanner *ds)
{
    DedupRam *ram = &ds->ram;

    dedup_worker_start(ds);
    ram->notifier = (RAMBlockNotifier) {
        .ram_block_added = ram_added,
        .ram_block_removed = ram_removed,
    };
    ram_block_notifier_add(&ram->notifier);
    ram->listener = (MemoryListener) {
        .name = "dedup-scanner",
        .commit = memory_commit,
    };
    memory_listener_register(&ram->listener, &address_space_memory);
}

void dedup_ram_stop(DedupScanner *ds, bool whole)
{
    DedupRam *ram = &ds->ram;
    DedupBlock *block;

    memory_listener_unregister(&ram->listener);
    /* It would be called for each block. */
    ram->notifier.ram_block_removed = NULL;
    ram_block_notifier_remove(&ram->notifier);
    dedup_worker_stop(ds);

    while ((block = QTAILQ_FIRST(&ram->blocks))) {
        QTAILQ_REMOVE(&ram->blocks, block, next);
        if (whole) {
            if (block->region) {
                dedup_region_remove(block->region, false, NULL);
            }
            give_to_ksm(block);
            if (block->leased) {
                fcntl(block->rb->fd, F_SETLEASE, F_UNLCK);
            }
        }
        block_free(block);
    }
}

void dedup_ram_destroy(DedupScanner *ds)
{
    DedupRam *ram = &ds->ram;

    if (ram->kick_fd >= 0) {
        close(ram->kick_fd);
    }
    if (ram->signal_fd >= 0) {
        close(ram->signal_fd);
    }
}
