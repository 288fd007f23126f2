/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The dedup engine's public face: regions of RAM in, figures out.
 *
 * What it is for: find pages of equal content in the regions that a process
 * hands over (and in those of other processes of the same group), map all of
 * them to one immutable copy with copy-on-write, and give the memory back.
 * It knows nothing of QEMU; QEMU's side is hw/dedup/.
 *
 * Terms (those of docs/devel/dedup.rst):
 *   region   a contiguous piece of this process's RAM that may be merged
 *   own      a page in the state that the region's owner mapped it
 *   merged   a page that is a private mapping of a segment page
 *   broken   a merged page that was written since: the kernel copied it
 *   segment  a sealed memfd with one copy of each page that is wanted twice
 *   group    the processes that share an index and segments
 *   window   the time in which a short range of RAM is write-protected,
 *            compared and remapped
 *
 * Threads: the caller makes one thread and lets it call dedup_engine_run();
 * that is the scanner. All other functions may be called from any thread
 * unless their comment says otherwise.  The engine never calls up except
 * through DedupCallbacks, and holds none of its locks when it does.
 *
 * Lock order: a lock of the caller (QEMU's BQL) may be held around any call
 * here except dedup_engine_run(); the engine never waits for one.
 */

#ifndef DEDUP_ENGINE_H
#define DEDUP_ENGINE_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "host/error.h"
#include "host/types.h"

G_BEGIN_DECLS

typedef struct DedupEngine DedupEngine;

/**
 * struct DedupCallbacks - the engine's only calls to the outside.  But for
 * @exclusive on the scanner's thread; with no lock held; they must not wait
 * for a lock that is held by a caller of this API.  Each may be NULL.
 * @state_changed: the state is another one now
 * @restored: what dedup_engine_restore() began has
 *     ended; @pages_left pages are still merged, @error says why (NULL when
 *     none is left)
 * @exclusive: run @body once, while no vCPU is where a store to a page that
 *     cannot be written would be an error instead of a wait (KVM_RUN, with
 *     DEDUP_FREEZE_MPROTECT), on whatever thread.  Called on the scanner's
 *     thread or that of whoever wants pages restored, without locks of the
 *     engine.  May give up, then @body must not be run any more: so whoever
 *     waits for the engine with a lock that vCPUs need waits for no longer
 *     than that.
 */
typedef struct DedupCallbacks {
    void (*state_changed)(void *opaque, DedupState state);
    void (*restored)(void *opaque, uint64_t pages_left, const GError *error);
    DedupExclusiveFn *exclusive;
} DedupCallbacks;

/**
 * struct DedupConfig - what an engine is made with
 * @page_size: of the host; only 4096 is supported in this version
 * @group_dir: absolute path of the group's directory, or NULL: this process
 *     only.  The directory is opened at once, joined when the thread runs
 *     (the user id may change in between).
 * @params: initial parameters
 * @freeze: how pages are kept from changing while they are replaced
 * @beside: how many bytes this process may take at any time beside its RAM,
 *     to be counted as the RAM's own growth is; read atomically.  NULL: none
 * @callbacks: copied
 * @opaque: for the callbacks
 */
typedef struct DedupConfig {
    size_t page_size;
    const char *group_dir;
    DedupParams params;
    DedupFreezeHow freeze;
    const uint64_t *beside;
    DedupCallbacks callbacks;
    void *opaque;
} DedupConfig;

/**
 * dedup_engine_new() - make an engine and open what it needs
 *
 * Opens userfaultfd (/dev/userfaultfd, else the system call) or has SIGSEGV
 * handled, for the life of the process (but not to estimate), opens the
 * process's pagemap and the group's directory, and starts no thread.
 *
 * A directory that exists but may not be read or belongs to somebody else
 * is no error here: the engine is blocked, see dedup_engine_group_error().
 *
 * Returns: the engine; or NULL and @error: DEDUP_ERROR_USERFAULTFD, if the host
 * grants none; DEDUP_ERROR_SYSTEM, if SIGSEGV cannot be handled, or as the
 * kernel is too old for that; or DEDUP_ERROR_GROUP when the directory does
 * not exist or is none.
 */
DedupEngine *dedup_engine_new(const DedupConfig *config, GError **error);

/**
 * dedup_engine_run() - the scanner: scans until dedup_engine_stop()
 *
 * Call once, on a thread of its own with all signals blocked.  Joins the
 * group first.
 */
void dedup_engine_run(DedupEngine *engine);

/**
 * dedup_engine_stop() - make dedup_engine_run() return soon; does not wait.
 * Nothing is restored.
 */
void dedup_engine_stop(DedupEngine *engine);

/**
 * dedup_engine_free() - free a stopped engine
 *
 * Leaves the group.  Whatever is still merged stays mapped as it is: guest
 * contents stay right, memory stays saved (a process that exits must not
 * copy everything back).
 */
void dedup_engine_free(DedupEngine *engine);

/**
 * dedup_engine_group_error() - why the group could not be joined
 *
 * Returns: a text to free with g_free(), or NULL when there is no group, or
 * it was joined, or was not tried yet.
 */
char *dedup_engine_group_error(DedupEngine *engine);

/**
 * dedup_engine_windows() - how many windows are open that a system call which
 * writes to guest memory must not meet
 *
 * With DEDUP_FREEZE_MPROTECT such a call fails instead of waiting.  So whoever
 * has the kernel write raises a pin counter (DedupRegionInfo.pins), passes a
 * full barrier, reads this, and calls dedup_engine_wait_window() if it is not
 * 0; then no window opens there until the counter is lowered.
 *
 * Returns: a counter to read atomically; valid for ever, of all engines of the
 * process.
 */
const unsigned *dedup_engine_windows(void);

/**
 * dedup_engine_wait_window() - wait until no window is open over a range
 *
 * Any thread; not between dedup_engine_discard_begin() and its end.  Takes no
 * lock, and waits for a part of a millisecond as a rule.
 */
void dedup_engine_wait_window(const void *host, size_t size);

/**
 * dedup_engine_holds_long() - are vCPUs kept out (DedupCallbacks.exclusive) for
 * longer than 200 us, more often than once in a hundred times?  Known after
 * some tens of windows.  It is the owner's to say what follows.
 */
bool dedup_engine_holds_long(DedupEngine *engine);

/**
 * dedup_engine_lost_userfaultfd() - was the userfaultfd lost, and could no
 * other be opened?  Nothing is merged then; the engine tries again.
 */
bool dedup_engine_lost_userfaultfd(DedupEngine *engine);

/**
 * dedup_engine_has_pagemap() - could /proc/self/pagemap be opened?  Without it
 * nobody can tell which pages are there, and nothing can be merged.
 */
bool dedup_engine_has_pagemap(DedupEngine *engine);

/** dedup_engine_get_params() - the parameters in force */
void dedup_engine_get_params(DedupEngine *engine, DedupParams *params);

/**
 * dedup_engine_set_params() - change parameters; they hold from the next
 * batch on.  Values are the caller's to check.  Turning @run on ends what
 * dedup_engine_restore() began.
 */
void dedup_engine_set_params(DedupEngine *engine, const DedupParams *params);

/**
 * dedup_engine_block() - stop scanning and merging, or allow it again
 *
 * When it returns with @block true no window is open, and none will be until
 * it is called with false; no page is write-protected or registered with a
 * userfaultfd, but by a restore that somebody asks for.  What is merged stays
 * merged.  Does not nest.
 *
 * @hard: nothing at all may be remapped or registered (somebody else's
 *     userfaultfd or a snapshot works on the RAM): restores fail, and one for
 *     everything that is under way goes on when @hard is lifted.
 */
void dedup_engine_block(DedupEngine *engine, bool block, bool hard);

/**
 * dedup_region_add() - let the engine scan a region
 *
 * What of it the kernel's KSM may merge is taken from KSM (MADV_UNMERGEABLE)
 * while it is merged; the owner gives it back after dedup_region_remove().
 *
 * Returns: the region; or NULL and @error.  The memory must stay mapped as
 * described until dedup_region_remove().
 */
DedupRegion *dedup_region_add(DedupEngine *engine,
                              const DedupRegionInfo *info, GError **error);

/**
 * dedup_region_remove() - take a region from the engine and free it
 *
 * @keep_contents: put the region's own mapping back with its contents first,
 *     as dedup_engine_restore() would (needed when the memory goes on
 *     living); else the mappings stay as they are, for a caller that unmaps
 *     them.
 *
 * Waits for a window that is open.  Returns false, and removes nothing, if
 * @keep_contents was asked for and failed: DEDUP_ERROR_MEMORY where the
 * host, the memory cgroup or the file's file system lacks the memory (if
 * that was seen at the start nothing was restored), DEDUP_ERROR_PINNED where
 * pages are pinned, DEDUP_ERROR_STATE where mappings are short; both may
 * pass.  Nothing is merged in the region from then on, so that another try
 * finds no more to do than this one, until its owner calls
 * dedup_region_open().
 */
bool dedup_region_remove(DedupRegion *region, bool keep_contents,
                         GError **error);

/**
 * dedup_engine_cancel_restore() - have a removal that is under way on another
 * thread fail after the window that it is at
 * @host: of the region, as it was given to dedup_region_add()
 *
 * For who is about to remove the region without its contents.  A region that
 * is gone already is nothing to care about.
 */
void dedup_engine_cancel_restore(DedupEngine *engine, void *host);

/** dedup_region_open() - merge again in a region whose removal has failed */
void dedup_region_open(DedupRegion *region);

/**
 * dedup_engine_check_room() - is there memory to restore these regions?
 * @regions: @n regions, of which none is removed meanwhile
 *
 * For who is about to remove several, and wants to know before the first one
 * is changed.  Nothing stays reserved.
 *
 * Returns: false and DEDUP_ERROR_MEMORY with the figures if there is not.
 */
bool dedup_engine_check_room(DedupEngine *engine,
                             DedupRegion *const *regions, unsigned n,
                             GError **error);

/**
 * dedup_engine_discard_begin() - the caller is about to throw pages away
 *
 * Puts the region's own mapping back for every page of the range that is
 * merged, broken or dropped, without its contents: the file's hole, or fresh
 * anonymous memory.  After it madvise(), fallocate() and mmap() on the range
 * do what they did before the engine came.  Ranges outside all regions are
 * ignored.  Both ends must be page aligned: the range is rounded outward, and
 * what is around it would be lost.  Waits at most for one window.
 *
 * Until dedup_engine_discard_end() the remap lock is held, or a page could be
 * merged again just before it is thrown away, and the guest would see the
 * segment's contents where it must see zeros.  The caller must not touch
 * memory of a region in between, nor call the engine.
 *
 * Returns: false when the mapping could not be put back (the process is at
 * vm.max_map_count): the caller must not discard then, and there is nothing
 * to end.  Pages of the range may have lost what they had by then.
 */
bool dedup_engine_discard_begin(DedupEngine *engine, void *host,
                                uint64_t size);

/** dedup_engine_discard_end() - the pages are gone */
void dedup_engine_discard_end(DedupEngine *engine);

/**
 * dedup_engine_restore_range() - give a range its own memory back, now, on
 * the calling thread
 *
 * Returns: true when no page of the range is merged any more; else errors as
 * those of dedup_region_remove().
 */
bool dedup_engine_restore_range(DedupEngine *engine, void *host,
                                uint64_t size, GError **error);

/**
 * dedup_engine_restore() - give every page its own memory, on the scanner's
 * thread; ends with the callback @restored
 *
 * @unmerge: also turn the parameter @run off (KSM's run=2)
 * @force: go on even if the host seems to lack the memory
 *
 * Returns at once.  False and @error (DEDUP_ERROR_MEMORY with the figures)
 * when the memory is not there: nothing is changed then.  Members of a group
 * reserve what they are about to use.
 */
bool dedup_engine_restore(DedupEngine *engine, bool unmerge, bool force,
                          GError **error);

/**
 * dedup_engine_is_whole() - true when no page is merged or dropped any more,
 * and no mapping of ours is left in any region
 */
bool dedup_engine_is_whole(DedupEngine *engine);

/**
 * struct DedupGroupStats - the group as a whole, the same for all members;
 * as of each member's last batch
 * @members: processes in the group, this one included
 * @members_incompatible: processes in the same directory with another
 *     protocol version or page size
 * @pages_shared: segment pages that are used
 * @pages_sharing: pages mapped to them beyond the first of each
 * @bytes_saved: net of metadata, unused segment pages, slab and maps
 */
typedef struct DedupGroupStats {
    uint64_t members;
    uint64_t members_incompatible;
    uint64_t pages_shared;
    uint64_t pages_sharing;
    int64_t bytes_saved;
} DedupGroupStats;

/**
 * struct DedupStats - figures of one engine; pages are counted in pages of
 * the host, as of the last presence check of each page unless noted
 * @state: what it is doing
 * @limits: bits of enum DedupLimit
 * @pages_total: all pages of all regions
 * @pages_present: have memory of their own, or are merged
 * @pages_merged: mapped to segments
 * @pages_merged_within: of these, the segment page is used by this process
 *     only
 * @pages_merged_between: of these, by other members too
 * @zero_pages: dropped because they were zero, and still absent; or merged to
 *     a segment of zeros without memory, where a hole in the file is not safe
 * @pass: what the last full scan counted
 * @estimate: and what it has found, with DEDUP_MODE_ESTIMATE
 * @pages_left: still to restore while the state is unmerging
 * @cow_breaks: merged pages found written, since the engine started
 * @full_scans: passes completed
 * @pages_scanned: pages hashed since the engine started
 * @pass_pages: how many of @pages_total the pass that is under way has passed
 * @cpu_time_ns: of the scanner's thread and the peer thread
 * @last_pass_ms: duration of the last full pass
 * @window_max_ns: longest window since the last call with @reset_max; with
 *     vCPUs kept out, from asking for that to its end
 * @metadata_bytes: private metadata, and this member's share of the shared
 * @maps_used: mappings of the process, as of the last count
 * @maps_limit: the budget: max_maps percent of vm.max_map_count
 * @bytes_saved: this process's share, net: the members' add up to the group's
 * @in_group: @group is valid
 * @group: the group
 */
typedef struct DedupStats {
    DedupState state;
    unsigned limits;
    uint64_t pages_total;
    uint64_t pages_present;
    uint64_t pages_merged;
    uint64_t pages_merged_within;
    uint64_t pages_merged_between;
    uint64_t zero_pages;
    DedupCounts pass;
    DedupEstimate estimate;
    uint64_t pages_left;
    uint64_t cow_breaks;
    uint64_t full_scans;
    uint64_t pages_scanned;
    uint64_t pass_pages;
    uint64_t cpu_time_ns;
    uint64_t last_pass_ms;
    uint64_t window_max_ns;
    uint64_t metadata_bytes;
    uint64_t maps_used;
    uint64_t maps_limit;
    int64_t bytes_saved;
    bool in_group;
    DedupGroupStats group;
} DedupStats;

/**
 * dedup_engine_get_stats() - the figures; cheap, never waits for a window
 * @reset_max: start a new maximum of @window_max_ns
 */
void dedup_engine_get_stats(DedupEngine *engine, DedupStats *stats,
                            bool reset_max);

/** dedup_region_pages_merged() - pages of one region mapped to segments */
uint64_t dedup_region_pages_merged(DedupRegion *region);

/** dedup_state_str() - the state's name for traces and messages */
const char *dedup_state_str(DedupState state);

G_END_DECLS

#endif /* DEDUP_ENGINE_H */
