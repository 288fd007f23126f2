/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Types that the engine's owner and its lowest layers have in common: how a
 * region of RAM is described, the parameters, states and limits.
 *
 * Public: engine.h includes it.
 */

#ifndef DEDUP_TYPES_H
#define DEDUP_TYPES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct DedupRegion DedupRegion;

/**
 * DEDUP_PIN_SHIFT: one pin counter covers 1 << DEDUP_PIN_SHIFT bytes of a
 * region (64 KiB).
 */
#define DEDUP_PIN_SHIFT 16

/**
 * DEDUP_WINDOW_PAGES: the longest range, in pages, that is write-protected
 * at a time: a huge page of x86-64, which is protected as one.  How much of it
 * is replaced at a time follows from how long writers may wait.
 */
#define DEDUP_WINDOW_PAGES 512

/**
 * DEDUP_RESTORE_PAGES: likewise for a restore, which copies as well.
 */
#define DEDUP_RESTORE_PAGES 64

/**
 * enum DedupState - what the engine is doing
 * @DEDUP_STATE_SCANNING: looking for equal pages
 * @DEDUP_STATE_IDLE: still looking, but the last full scan found nothing
 * @DEDUP_STATE_LIMITED: a limit keeps it from merging more, see
 *     DedupStats.limits
 * @DEDUP_STATE_UNMERGING: giving every page its own memory
 * @DEDUP_STATE_STOPPED: @run is off; what is merged stays merged
 * @DEDUP_STATE_BLOCKED: the caller called dedup_engine_block(), or the group
 *     could not be joined
 */
typedef enum DedupState {
    DEDUP_STATE_SCANNING,
    DEDUP_STATE_IDLE,
    DEDUP_STATE_LIMITED,
    DEDUP_STATE_UNMERGING,
    DEDUP_STATE_STOPPED,
    DEDUP_STATE_BLOCKED,
} DedupState;

/**
 * enum DedupLimit - bits of DedupStats.limits: what ran short in the last
 * full scan.  Each is retried in every scan (I9).
 * @DEDUP_LIMIT_MAPS: the budget of memory mappings (max_maps)
 * @DEDUP_LIMIT_MEMORY: the memory cgroup has no room to publish in
 * @DEDUP_LIMIT_FDS: no more file descriptors
 * @DEDUP_LIMIT_INDEX: the group's index or its table of segments is full
 * @DEDUP_LIMIT_FILE: the file system of the RAM's file is so full that it
 *     could not take back what was merged
 */
typedef enum DedupLimit {
    DEDUP_LIMIT_MAPS = 1 << 0,
    DEDUP_LIMIT_MEMORY = 1 << 1,
    DEDUP_LIMIT_FDS = 1 << 2,
    DEDUP_LIMIT_INDEX = 1 << 3,
    DEDUP_LIMIT_FILE = 1 << 4,
} DedupLimit;

/**
 * enum DedupMemory - how a region's memory is mapped
 * @DEDUP_MEMORY_SHARED: MAP_SHARED of a memfd or a tmpfs file
 * @DEDUP_MEMORY_ANON: MAP_PRIVATE | MAP_ANONYMOUS
 * @DEDUP_MEMORY_PRIVATE_FILE: MAP_PRIVATE of a memfd or a tmpfs file
 */
typedef enum DedupMemory {
    DEDUP_MEMORY_SHARED,
    DEDUP_MEMORY_ANON,
    DEDUP_MEMORY_PRIVATE_FILE,
} DedupMemory;

/**
 * enum DedupRegionFlags - the madvise() state of a region, re-applied to
 * every new mapping, and what its owner wants
 * @DEDUP_REGION_DONTFORK: MADV_DONTFORK
 * @DEDUP_REGION_DONTDUMP: MADV_DONTDUMP
 * @DEDUP_REGION_HUGEPAGE: MADV_HUGEPAGE
 * @DEDUP_REGION_NORESERVE: mapped with MAP_NORESERVE
 */
typedef enum DedupRegionFlags {
    DEDUP_REGION_DONTFORK = 1 << 0,
    DEDUP_REGION_DONTDUMP = 1 << 1,
    DEDUP_REGION_HUGEPAGE = 1 << 2,
    DEDUP_REGION_NORESERVE = 1 << 3,
} DedupRegionFlags;

/**
 * struct DedupRegionInfo - a region as its owner describes it
 * @id: name for messages, copied
 * @host: start of the mapping, page aligned
 * @size: its length in bytes, a multiple of the page size
 * @memory: how it is mapped
 * @fd: the file behind it, -1 for DEDUP_MEMORY_ANON; stays the caller's and
 *     must stay open until dedup_region_remove()
 * @fd_offset: offset of @host in @fd in bytes
 * @pins: one counter per 64 KiB of the region, counted from @host: how many
 *     asynchronous writes (DMA mappings) are in flight there; or NULL.  The
 *     caller raises a counter with a sequentially consistent
 *     read-modify-write before it lets the device write.  Stays the
 *     caller's.
 * @readers: likewise for reads in flight, or NULL.  They keep a page of
 *     DEDUP_MEMORY_SHARED from being taken out of its file, which may zero
 *     it in place.
 * @flags: bits of enum DedupRegionFlags
 */
typedef struct DedupRegionInfo {
    const char *id;
    void *host;
    uint64_t size;
    DedupMemory memory;
    int fd;
    uint64_t fd_offset;
    const uint16_t *pins;
    const uint16_t *readers;
    unsigned flags;
} DedupRegionInfo;

/**
 * enum DedupMode - what is looked for
 * @DEDUP_MODE_FULL: equal pages, and pages of zeros
 * @DEDUP_MODE_ZERO: pages of zeros only; no other page is hashed
 * @DEDUP_MODE_ESTIMATE: how much the first would save; nothing is changed, and
 *     nothing taken that it would need for that
 */
typedef enum DedupMode {
    DEDUP_MODE_FULL,
    DEDUP_MODE_ZERO,
    DEDUP_MODE_ESTIMATE,
} DedupMode;

/**
 * enum DedupAdvisor - who says how fast to scan
 * @DEDUP_ADVISOR_NONE: @pages_to_scan and @sleep_millisecs
 * @DEDUP_ADVISOR_SCAN_TIME: at first as fast as @max_cpu allows; then slower,
 *     until a pass takes @target_scan_s, as long as passes find little
 * @DEDUP_ADVISOR_PRESSURE: the same, but the target follows how short memory
 *     is: a few times as long while there is plenty, none when it is short
 */
typedef enum DedupAdvisor {
    DEDUP_ADVISOR_NONE,
    DEDUP_ADVISOR_SCAN_TIME,
    DEDUP_ADVISOR_PRESSURE,
} DedupAdvisor;

/**
 * enum DedupFreezeHow - how pages are kept from changing while they are
 * replaced; host/freeze.h has what each means for others
 * @DEDUP_FREEZE_USERFAULTFD: whoever stores waits in the kernel
 * @DEDUP_FREEZE_MPROTECT: threads of this process wait in a handler of SIGSEGV;
 *     who has the kernel write to memory must wait before
 */
typedef enum DedupFreezeHow {
    DEDUP_FREEZE_USERFAULTFD,
    DEDUP_FREEZE_MPROTECT,
} DedupFreezeHow;

/**
 * enum DedupExclusion - what came of keeping vCPUs out of the guest
 * @DEDUP_EXCLUSION_FAILED: they did not come out; nothing was run
 * @DEDUP_EXCLUSION_FREE: none was in it, nobody has waited
 * @DEDUP_EXCLUSION_HELD: they have waited for the end
 */
typedef enum DedupExclusion {
    DEDUP_EXCLUSION_FAILED,
    DEDUP_EXCLUSION_FREE,
    DEDUP_EXCLUSION_HELD,
} DedupExclusion;

/* What is run meanwhile. */
typedef void DedupBodyFn(void *arg);
/* See DedupCallbacks.exclusive. */
typedef DedupExclusion DedupExclusiveFn(void *opaque, DedupBodyFn *body,
                                        void *arg);

/**
 * DEDUP_PLENTY_FACTOR: how much longer a pass may take than @target_scan_s
 * while there is plenty of memory.
 */
#define DEDUP_PLENTY_FACTOR 4

/**
 * struct DedupParams - what may be changed while the engine runs
 * @mode: what to look for.  DEDUP_MODE_ESTIMATE is for an engine's whole life.
 * @run: scan and merge; false keeps what is merged
 * @pages_to_scan: pages per batch, at least 1
 * @sleep_millisecs: pause between two batches
 * @zero_pages: drop pages that are all zero
 * @huge_pages_split: split transparent huge pages that hold equal pages;
 *     false leaves them alone
 * @max_maps: share of vm.max_map_count that the process may use, in percent
 * @advisor: what follows counts with one only
 * @target_scan_s: how long a pass is to take in the end
 * @max_cpu: CPU time of all members of the group together, in percent of a
 *     core; 0: no limit
 * @max_cpu_vm: of this member, likewise
 * @min_pages: look at no fewer pages in @sleep_millisecs, however long the
 *     target; 0: no limit
 * @max_pages: nor at more, once passes are to take longer than they must;
 *     0: no limit
 */
typedef struct DedupParams {
    DedupMode mode;
    bool run;
    uint32_t pages_to_scan;
    uint32_t sleep_millisecs;
    bool zero_pages;
    bool huge_pages_split;
    uint32_t max_maps;
    DedupAdvisor advisor;
    uint32_t target_scan_s;
    uint32_t max_cpu;
    uint32_t max_cpu_vm;
    uint32_t min_pages;
    uint32_t max_pages;
} DedupParams;

/**
 * struct DedupCounts - what a full scan counted, in pages
 * @unshared: unique, and unchanged since the scan before
 * @volatiles: changed since the scan before
 * @pinned: left alone because of a pin counter
 * @swapped: on swap
 * @huge_kept: left alone because of a huge page
 * @poisoned: left alone because they could not be read
 */
typedef struct DedupCounts {
    uint64_t unshared;
    uint64_t volatiles;
    uint64_t pinned;
    uint64_t swapped;
    uint64_t huge_kept;
    uint64_t poisoned;
} DedupCounts;

/**
 * struct DedupEstimate - pages that need no memory of their own, as a full scan
 * with DEDUP_MODE_ESTIMATE has found them
 * @zero: they are all zero
 * @within: another page of this process has the same
 * @between: a page of another process of the group has.  Where both estimate,
 *     only one of them counts it, so that the members' figures add up.
 */
typedef struct DedupEstimate {
    uint64_t zero;
    uint64_t within;
    uint64_t between;
} DedupEstimate;

#endif /* DEDUP_TYPES_H */
