/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * QEMU's side of memory deduplication: what its files share
 *
 *   exclusive.c       windows that no vCPU of KVM may meet
 *   coredump.c        guest RAM in core dumps of QEMU
 *   drain.c           an end to the transfers of block devices
 *   leases.c          who else opens a RAM file; the worker thread
 *   eligible.c        which block is eligible, and why not
 *   ram.c             RAM blocks -> regions of the engine
 *   whole.c           wait until blocks are whole
 *   blockers.c        what forbids deduplication for the whole VM
 *   events.c          what is told to QMP: states, the end of an unmerge
 *   watch.c           look again at everything that may forbid it
 *   guard.c           what the RAM guard asks of us
 *   migration.c       what migration and snapshots forbid, and when
 *   dedup-properties.c, dedup-qmp-cmds.c, dedup-hmp-cmds.c, dedup-stats.c
 *                     what users set and see
 *   dedup-scanner.c   the object: life cycle, the thread
 *
 * Each calls only those above it.  ram-guard.c is above all of them, and knows
 * none; what it calls is registered (guard.c), as are the engine's callbacks.
 *
 * Terms: those of engine/engine.h.  A block is a RAMBlock; a block that the
 * engine works on has a region.  Whole: no page of it is merged (ram-guard.h).
 *
 * Threads and locks.  Everything here is called with the BQL held unless its
 * comment says otherwise.  Two threads never take the BQL: the scanner, which
 * runs the engine, and the worker, which gives memory back.  What they share
 * with the rest is DedupScanner.event (scanner) and the fields of DedupBlock
 * that say so (worker).  Lock order: BQL, DedupRam.lock, the engine's locks;
 * DedupRam.lock is not held when the engine is asked to give memory back.
 */

#ifndef HW_DEDUP_INTERNAL_H
#define HW_DEDUP_INTERNAL_H

#include "hw/dedup/qemu-compat.h"
#include "exec/ramlist.h"
#include "hw/dedup/dedup.h"
#include "migration/misc.h"
#include "qapi/qapi-types-dedup.h"
#include "qemu/queue.h"
#include "qemu/thread.h"
#include "qemu/thread-context.h"
#include "qom/object.h"
#include "system/runstate.h"
#include "engine/engine.h"

/**
 * struct DedupBlock - a RAM block, from ram_block_added to ram_block_removed
 * @rb: the block; valid until ram_block_removed has returned
 * @id: dedup_block_id() as of the last look, for the worker's traces; lock
 * @eligible: as of the last look
 * @reason: why not
 * @opened: somebody opened the file while it was leased to us; for good; lock
 * @region: the engine's, NULL if it does not work on the block; lock
 * @flags: what the engine was told, enum DedupRegionFlags
 * @leaving: the worker is to remove the region, with contents; lock
 * @closed: it tried and failed, and the engine merges nothing there until it
 *     is told that the block may stay; lock
 * @busy: the worker is removing it right now, and @region is NULL; lock
 * @leased: the worker watches a lease on rb->fd; lock
 * @from_ksm: the engine took it from KSM, and it was not given back yet
 * @named: the file outlives the block
 * @error: why the last attempts of the worker to remove it failed; lock
 * @pinned: the last one failed for pages that a device writes to, and was not
 *     made under a drain; lock
 * @drained: the next one is, and it is waited for with the BQL held; lock
 * @tries: how many did so far; lock
 * @retry_ms: when it tries again; lock
 * @pages_merged: last known figure, for when @busy
 */
typedef struct DedupBlock {
    RAMBlock *rb;
    char *id;
    bool eligible;
    DedupBlockReason reason;
    bool opened;
    DedupRegion *region;
    unsigned flags;
    bool leaving;
    bool closed;
    bool pinned;
    bool drained;
    bool busy;
    bool leased;
    bool from_ksm;
    bool named;
    GError *error;
    unsigned tries;
    int64_t retry_ms;
    uint64_t pages_merged;
    QTAILQ_ENTRY(DedupBlock) next;
} DedupBlock;

/**
 * struct DedupRam - all RAM blocks, and the worker
 * @lock: protects @blocks against the worker, and what DedupBlock says
 * @changed: the worker has ended something
 * @draining: the worker begins with no block that is not @drained; lock
 * @blocks: written with the BQL and @lock held
 * @worker: thread that gives memory back
 * @worker_tid: its thread ID, 0 while there is none
 * @kick_fd: eventfd that makes the worker look
 * @signal_fd: where the worker hears of leases
 * @stop: the worker is to end; lock
 */
typedef struct DedupRam {
    QemuMutex lock;
    QemuCond changed;
    bool draining;
    QTAILQ_HEAD(, DedupBlock) blocks;
    RAMBlockNotifier notifier;
    MemoryListener listener;
    bool watching;
    QemuThread worker;
    int worker_tid;
    QemuSemaphore worker_ready;
    int kick_fd;
    int signal_fd;
    bool stop;
} DedupRam;

/**
 * struct DedupMigration - what migration keeps us from
 * @left: the VM has gone, or stopped in order to go; until it runs again
 * @whole: the destination maps the RAM's file: nothing that is ignored by
 *     the migration stream may be merged; until the VM runs again
 * @snapshot: a background snapshot tracks writes
 * @uncounted: pages are sent from where they are, and no counter tells of it
 */
typedef struct DedupMigration {
    bool left;
    bool whole;
    bool snapshot;
    bool uncounted;
    NotifierWithReturn notifier[MIG_MODE__MAX];
    VMChangeStateEntry *vm_state;
} DedupMigration;

/* What the scanner's thread has to say (events.c); @lock protects the rest. */
typedef struct DedupEvent {
    QemuMutex lock;
    bool unmerged;
    uint64_t pages_left;
    char *error;
} DedupEvent;

/* What the last DEDUP_STATE_CHANGED said (events.c) */
typedef struct DedupTold {
    bool any;
    int64_t ms;
    DedupScannerState state;
    DedupBlockedReason reason;  /* DEDUP_BLOCKED_REASON__MAX: none */
} DedupTold;

struct DedupScanner {
    Object parent_obj;

    /* Properties.  The engine has the parameters once it exists. */
    char *group;
    DedupWriteProtect write_protect;
    DedupParams params;
    bool has_advisor;           /* the user chose one */
    ThreadContext *thread_context;

    /* From complete() on */
    bool completed;
    char *group_dir;
    DedupEngine *engine;        /* NULL: the host has not what it takes */
    DedupFreezeHow freeze;      /* of the engine */
    char *userfaultfd_error;    /* NULL: there is one, or none was wanted */
    int overcommit_fd;
    int coredump_fd;
    bool coredump_set;          /* the bit was not set before */
    Notifier machine_done;
    QEMUBH *start_bh;
    QEMUBH *update_bh;
    QEMUTimer *recheck;

    /* While the thread runs */
    bool started;
    QemuThread thread;
    QemuSemaphore thread_ready;
    int thread_id;              /* atomic, 0 while there is none */
    bool discard_required;      /* atomic */
    bool blocked;
    bool hard;
    bool unmerging;             /* asked for, and its end not yet said */
    uint32_t reasons;           /* BIT(DedupBlockedReason) of the last look */
    uint32_t warned;            /* of which stderr has been told */
    DedupMigration migration;
    DedupRam ram;
    DedupEvent event;
    DedupTold told;
};

/* Does it change nothing, for all of its life? */
static inline bool dedup_scanner_estimates(const DedupScanner *ds)
{
    return ds->params.mode == DEDUP_MODE_ESTIMATE;
}

/* The parameters in force, in every state. */
static inline void dedup_scanner_get_params(DedupScanner *ds,
                                            DedupParams *params)
{
    if (ds->engine) {
        dedup_engine_get_params(ds->engine, params);
    } else {
        *params = ds->params;
    }
}

/* Defaults of properties */
#define DEDUP_DEFAULT_PAGES_TO_SCAN 4096
#define DEDUP_DEFAULT_SLEEP_MILLISECS 20
#define DEDUP_DEFAULT_MAX_MAPS 60
#define DEDUP_DEFAULT_TARGET_SCAN_TIME 200
#define DEDUP_DEFAULT_MAX_CPU 70
#define DEDUP_DEFAULT_MAX_PAGES 30000

/* exclusive.c: see DedupCallbacks.exclusive */
DedupExclusion dedup_exclusive(void *opaque, DedupBodyFn *body, void *arg);
/*
 * Who has the BQL, and keeps it while he waits for the worker: vCPUs are
 * stopped, if windows must not meet them.  May release the BQL and take it.
 */
void dedup_exclusive_begin(const DedupScanner *ds);
void dedup_exclusive_end(void);

/* coredump.c */
void dedup_coredump_init(DedupScanner *ds);
void dedup_coredump_start(DedupScanner *ds);
void dedup_coredump_stop(DedupScanner *ds);
void dedup_coredump_destroy(DedupScanner *ds);

/*
 * drain.c: have block devices end their transfers, and begin none before
 * dedup_drain_end().  False if some are still under way after @ms; the others
 * have ended, and dedup_drain_end() is needed all the same.
 */
bool dedup_drain_begin(int64_t ms);
void dedup_drain_end(void);
/* How long vCPUs may be kept from the BQL by storage that hangs */
#define DEDUP_DRAIN_MS 2000

/* leases.c; dedup_worker_kick() on any thread */
void dedup_worker_start(DedupScanner *ds);
void dedup_worker_stop(DedupScanner *ds);
void dedup_worker_kick(DedupScanner *ds);
/*
 * While DedupRam.draining: have the worker try once what is pinned, and wait
 * for it.  @last: what fails then is an error, not tried on.  With the BQL and
 * DedupRam.lock held.
 */
void dedup_worker_try_pinned(DedupScanner *ds, bool last);
int dedup_worker_signalfd(void);
/*
 * If others might open the block's file: take the lease that tells of them.
 * False, and why, if it cannot be had.  DedupRam.lock held.
 */
bool dedup_block_secure(DedupScanner *ds, DedupBlock *block,
                        DedupBlockReason *reason);

/* Does it wait for transfers that a drain may end?  DedupRam.lock held. */
static inline bool dedup_block_is_pinned(const DedupBlock *block)
{
    return block->leaving && block->pinned && !block->error;
}

/*
 * eligible.c: is the block eligible; if not, why not.  It must be secured
 * (dedup_block_secure()) besides.
 */
bool dedup_block_eligible(DedupScanner *ds, const DedupBlock *block,
                          DedupBlockReason *reason);
/* What the engine is told about it */
void dedup_block_info(const DedupBlock *block, DedupRegionInfo *info);
const char *dedup_block_id(const DedupBlock *block);
const char *dedup_block_reason_text(DedupBlockReason reason);

/* ram.c */
bool dedup_ram_init(DedupScanner *ds, Error **errp);
void dedup_ram_start(DedupScanner *ds);
void dedup_ram_update(DedupScanner *ds);
/* @whole: put the regions' mappings back to what they were; else leave all */
void dedup_ram_stop(DedupScanner *ds, bool whole);
void dedup_ram_destroy(DedupScanner *ds);
/* Is there a block that may be merged, or is? */
bool dedup_ram_has_eligible(DedupScanner *ds);
/* Why the largest block may not, for people.  To be freed. */
char *dedup_ram_why_none(DedupScanner *ds);
/* NULL if it is not there.  BQL or DedupRam.lock held. */
DedupBlock *dedup_ram_find(DedupScanner *ds, const RAMBlock *rb);

/*
 * whole.c: is there memory to restore all blocks that @needed is true for?  To
 * be asked before the first of them is made to leave: then nothing has changed
 * if there is not.
 */
bool dedup_whole_check_room(DedupScanner *ds, bool (*needed)(RAMBlock *rb),
                            Error **errp);
/*
 * Wait until no block that is not eligible is merged, of those that @needed
 * is true for (all if NULL).  May release and take the BQL.
 */
bool dedup_whole_wait(DedupScanner *ds, bool (*needed)(RAMBlock *rb),
                      Error **errp);
/* Wait until the block may be removed.  May release and take the BQL. */
bool dedup_whole_wait_removable(DedupScanner *ds, RAMBlock *rb, Error **errp);

/*
 * blockers.c: what forbids deduplication now, BIT(DedupBlockedReason) each.
 * Without discard-disabled, which is only known by trying.
 */
uint32_t dedup_blockers(DedupScanner *ds);
/* Can there be an engine at all? */
bool dedup_host_is_supported(void);
/* Is one of them such that nothing may be remapped at all? */
bool dedup_blockers_hard(DedupScanner *ds);
/* The same as a list for people, with what limits the engine. */
DedupBlockedList *dedup_blockers_list(DedupScanner *ds,
                                      const DedupStats *stats);

/* Tell stderr of what is new in DedupScanner.reasons. */
void dedup_blockers_warn(DedupScanner *ds);

/* events.c */
void dedup_events_init(DedupScanner *ds);
void dedup_events_destroy(DedupScanner *ds);
/* The engine's callback, on the scanner's thread: an unmerge has ended. */
void dedup_events_restored(void *opaque, uint64_t pages_left,
                           const GError *error);
/* Say what the scanner's thread has to say, if the bottom half did not yet. */
void dedup_events_send(DedupScanner *ds);
/* The engine was told to merge again while it was unmerging: say so. */
void dedup_events_cancel_unmerge(DedupScanner *ds);
/* No page is merged any more, nor will be: an unmerge has ended by that. */
void dedup_events_end_unmerge(DedupScanner *ds);
/* What the object is doing, for people; @stats are the engine's. */
DedupScannerState dedup_events_state(DedupScanner *ds,
                                     const DedupStats *stats);
/* Say it if it has changed, unless something was said a moment ago. */
void dedup_events_tell_state(DedupScanner *ds);

/* watch.c: the VM's scanner, or NULL.  Complete, and not being finalized. */
DedupScanner *dedup_scanner_get(void);
void dedup_scanner_set(DedupScanner *ds);

/*
 * Look again at everything that may forbid deduplication, for the VM and for
 * each block, and tell the engine.  @run is what the property is about to be.
 */
void dedup_scanner_update(DedupScanner *ds, bool run);

/* The same for the property's present value. */
void dedup_scanner_recheck(DedupScanner *ds);

/* guard.c: discards reach the engine from here on, until it is unregistered. */
bool dedup_guard_register(DedupScanner *ds);

/* migration.c */
void dedup_migration_start(DedupScanner *ds);
void dedup_migration_stop(DedupScanner *ds);

/* dedup-properties.c */
void dedup_scanner_add_properties(ObjectClass *oc);
/* Do these parameters contradict each other? */
bool dedup_scanner_check_mode(const DedupParams *params, Error **errp);

/* dedup-qmp-cmds.c */
DedupInfo *dedup_info(DedupScanner *ds, bool reset_max);

#endif /* HW_DEDUP_INTERNAL_H */
