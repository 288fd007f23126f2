/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The space: guest RAM as this process maps it, and the only layer that can
 * corrupt it.
 *
 * Terms: those of engine.h, and
 *   remap lock  held from the pre-checks of a window until after its punch
 *               (I12); nobody outside this layer takes it
 *   closed      nothing is merged or left, but restored if somebody asks
 *   sealed      nothing is remapped at all
 *   holding     a segment that this process has: it is mapped here, or may be
 *   member page number
 *               counts the pages of all regions; a number that names a page
 *               to other members, and a cursor that survives whatever comes or
 *               goes between two takings of the lock
 *
 * Threads: any, unless a comment says "scanner's".  The scanner is the thread
 * that dedup_space_set_scanner() names: only it merges, and only it makes a
 * holding's users rise from 0.
 */

#ifndef DEDUP_SPACE_H
#define DEDUP_SPACE_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "group/group.h"
#include "group/segment.h"
#include "host/error.h"
#include "host/page.h"
#include "host/types.h"

typedef struct DedupSpace DedupSpace;

/* Pages looked at together: the reach of one page table, 2 MiB. */
#define DEDUP_CHUNK_PAGES 512


/* What pages could not be restored for want of; bits. */
typedef enum DedupLack {
    DEDUP_LACK_UNPINNED = 1 << 0, /* a device writes to them */
    DEDUP_LACK_MAPS = 1 << 1,     /* the kernel has no more mappings for us */
    DEDUP_LACK_FILE = 1 << 2,     /* the file's file system is full */
    DEDUP_LACK_FREEZE = 1 << 3,   /* the RAM cannot be frozen, or not now */
    DEDUP_LACK_POISON = 1 << 4,   /* what they are merged to cannot be read */
} DedupLack;

/* ---- life ---- */

/*
 * NULL and @error if no freezer of that kind can be had (host/freeze.h).
 * @reads_only: it needs none, and changes nothing, whatever it is asked.
 */
DedupSpace *dedup_space_new(void *owner, bool reads_only, DedupFreezeHow how,
                            GError **error);
/* Who made the space that the region is in. */
void *dedup_region_owner(const DedupRegion *r);
/* Mappings stay as they are. */
void dedup_space_free(DedupSpace *space);

/*
 * The scanner's sleep, between two windows; no lock is held.  The room may have
 * changed meanwhile: it is asked for and set there.  False: the scanner was, or
 * is, asked for something, and goes back to its loop.
 */
typedef bool DedupSpacePause(void *owner, int64_t us);

/* The calling thread is the scanner from here on. */
void dedup_space_set_scanner(DedupSpace *space, DedupSpacePause *pause);

/*
 * Windows are run by @fn, which keeps vCPUs out meanwhile (host/types.h).
 * Before the space has regions.
 */
void dedup_space_set_exclusive(DedupSpace *space, DedupExclusiveFn *fn);

/* Any thread, no lock: dedup_exclusive_is_long(). */
bool dedup_space_holds_long(const DedupSpace *space);

/*
 * Close or open it.  The call waits for the window that may be open; none
 * begins while it is closed.  @sealed: nor does a restore.
 */
void dedup_space_close(DedupSpace *space, bool closed, bool sealed);

/* Closed, or without a freezer?  *@sealed: is it sealed? */
bool dedup_space_is_closed(DedupSpace *space, bool *sealed);

/* A freezer that was lost may be had again. */
void dedup_space_reopen(DedupSpace *space);
/* Takes no lock. */
bool dedup_space_lost_freezer(DedupSpace *space);
/* Can be told which pages are there? */
bool dedup_space_has_pagemap(const DedupSpace *space);

/*
 * A pass has ended: give back what only speeds up merging.  The next one has it
 * made again if it finds something.  Scanner's.
 */
void dedup_space_tidy(DedupSpace *space);

/* Live sums of all regions, in pages; take no lock. */
typedef struct DedupSpaceSums {
    uint64_t total;
    uint64_t own;             /* of them, with memory of their own */
    uint64_t merged;
    uint64_t broken;
    uint64_t zero;            /* dropped */
    uint64_t zero_mapped;     /* merged to the segment of zeros */
    uint64_t cow_breaks;      /* ever */
} DedupSpaceSums;

void dedup_space_sums(DedupSpace *space, DedupSpaceSums *sums);
/* Pages whose mappings are not the region's own. */
uint64_t dedup_space_mapped(DedupSpace *space);
/* Longest window since the last call with @reset, in ns. */
uint64_t dedup_space_window_max_ns(DedupSpace *space, bool reset);

/* ---- regions ---- */

/*
 * @memo: what the scanner remembers of it, freed with it by @memo_free, in any
 * case.  NULL and DEDUP_ERROR_SYSTEM: it is not as it should be, or no memory.
 */
DedupRegion *dedup_space_add(DedupSpace *space, const DedupRegionInfo *info,
                             void *memo, GDestroyNotify memo_free,
                             GError **error);
/*
 * Nothing is merged in it from here on: its owner wants it back; or, with
 * false, has thought better of it.
 */
void dedup_space_close_region(DedupRegion *r, bool closed);
/* A restore that is under way for its owner ends with its window. */
void dedup_space_abandon(DedupSpace *space, void *host);
/*
 * It is gone: no longer read or mapped when this returns.  Its struct lives on
 * until the scanner has called dedup_space_reap().
 */
void dedup_space_remove(DedupRegion *r);
/*
 * Free what was removed.  Scanner's, which holds no region now.  True: there
 * was something, and holdings may be unused now.
 */
bool dedup_space_reap(DedupSpace *space);
/*
 * The region that holds member page @at, or the next one behind; NULL: none.
 * Scanner's: nobody else frees a region.
 */
DedupRegion *dedup_space_next(DedupSpace *space, uint32_t at);
/* The region and page behind a member page number; false: there is none. */
bool dedup_space_find(DedupSpace *space, uint32_t member_page,
                      DedupRegion **region, uint32_t *page);

/* What the scanner remembers of it. */
void *dedup_region_memo(const DedupRegion *r);

uint32_t dedup_region_npages(const DedupRegion *r);
void *dedup_region_host(const DedupRegion *r);
/* Pages merged; takes no lock. */
uint64_t dedup_region_merged(const DedupRegion *r);
/* Member page number of its first page. */
uint32_t dedup_region_base(const DedupRegion *r);
/* Does @a come before @b?  Negative, 0, positive; of dead ones, too. */
int dedup_region_compare(const DedupRegion *a, const DedupRegion *b);
/* Pages of its file that are on swap; @copies: copies of segments' that are. */
uint64_t dedup_region_swapped(DedupRegion *r, uint64_t copies);

/* ---- what a pass looks at; scanner's ---- */

/* Where a pass is. */
typedef struct DedupPlace {
    DedupRegion *region;
    uint32_t first;           /* page of the region */
    uint32_t n;               /* pages; 0: nothing is there */
    bool is_void;             /* nothing was there: nor may be behind it */
    uint32_t skipped;         /* chunks before @first in which nothing is */
} DedupPlace;

/*
 * Go on at member page @at, with at most @most pages, within one chunk.
 * False: that was the last region.
 */
bool dedup_space_go_on(DedupSpace *space, DedupPlace *place, uint32_t at,
                       int64_t most);

/*
 * A page that has memory of its own, in its place; remap lock held.
 * @broken: it was merged, and written since
 * @breaks: it was merged or dropped, and that it was written is seen only now
 * Returns false if it cannot be read: it is not shown again (poison.h).
 */
typedef bool (*DedupSeeFn)(void *opaque, uint32_t page, const void *content,
                           bool broken, bool breaks);

/* What was there beside. */
typedef struct DedupSeen {
    uint32_t pinned;
    uint32_t swapped;
    uint32_t huge_kept;
    uint32_t poisoned;
    uint32_t kept;            /* merged or dropped, and not written since */
    bool is_empty;            /* the chunk has no memory of its own */
} DedupSeen;

/*
 * Look at the pages of a place: the ledger learns what was written and what
 * came back, and @see is called for each page that may be merged.  False: the
 * region is gone, or the space is closed.
 */
bool dedup_space_look(DedupSpace *space, DedupPlace *place, DedupSeen *seen,
                      DedupSeeFn see, void *opaque);

/* A new batch: may huge pages be split, and how much room is there? */
void dedup_space_begin_batch(DedupSpace *space, bool split_huge,
                             bool take_ksm);
/* Has KSM merged anything here?  Then say how much room there is, in bytes. */
bool dedup_space_asks_room(DedupSpace *space);
void dedup_space_set_room(DedupSpace *space, uint64_t bytes);

/* Does the page have memory of its own, with this content? */
bool dedup_space_equals(DedupRegion *r, uint32_t page, const void *content);
/* Copy a page; false: it has no memory of its own now. */
bool dedup_space_copy(DedupRegion *r, uint32_t page, void *copy);

/* What two pages are to each other. */
typedef enum DedupRelation {
    DEDUP_PAGES_GONE,         /* one has no memory of its own */
    DEDUP_PAGES_SAME,
    DEDUP_PAGES_DIFFER,
    DEDUP_PAGES_MERGED,       /* the second one is merged already */
} DedupRelation;

typedef struct DedupHolding DedupHolding;

/*
 * Compare two pages.  SAME: @copy has what both have.  DIFFER: @hash is that
 * of the second one, with @salt.  MERGED: to page *@index of *@holding.
 */
DedupRelation dedup_space_relate(DedupRegion *r, uint32_t page,
                                 DedupRegion *r2, uint32_t page2,
                                 void *copy, uint64_t salt, uint64_t *hash,
                                 DedupHolding **holding, uint16_t *index);

/* ---- windows; scanner's ---- */

typedef struct DedupAction {
    uint32_t page;            /* of the region; ascending in an array */
    uint16_t index;           /* page of the holding's segment */
    bool done;                /* out */
    bool differs;             /* out: it has other contents than that page */
    bool tried;               /* out: false: the scanner was asked to stop */
    DedupHolding *holding;    /* NULL: drop as zero */
} DedupAction;

/*
 * Merge or drop @n pages of @r, in as many windows as it takes.  Returns how
 * many were done; sets bits of @limits where something ran short.  Cheapest
 * with all that is to be done in a chunk.
 */
unsigned dedup_space_windows(DedupRegion *r, DedupAction *actions, unsigned n,
                             unsigned *limits);

/*
 * What to do with the zero page @page of @r: sets @action's holding and index;
 * no holding: drop it.  False: it cannot be merged now, see @limits.
 */
bool dedup_space_zero_action(DedupRegion *r, uint32_t page,
                             DedupAction *action, unsigned *limits);

/* ---- restoring ---- */

/* What is still to be restored, and what came of it. */
typedef struct DedupRestore {
    const uint8_t *at;        /* host addresses */
    const uint8_t *end;
    bool for_owner;           /* of one region: ends where it is abandoned */
    uint64_t taken;           /* out, added: bytes of memory */
    uint64_t left;            /* out, added: pages that are not own */
    unsigned lacks;           /* out: DedupLack bits */
    bool abandoned;           /* out */
} DedupRestore;

/*
 * Give the next pages their own memory, contents and all, at most a window.
 * False: there are no more.
 */
bool dedup_space_restore_next(DedupSpace *space, DedupRestore *restore);

/*
 * Pages that were written and have settled: frees maps, and holdings in the
 * end.  What is not broken any more stays.  Scanner's.
 */
void dedup_space_settle(DedupRegion *r, uint32_t first, uint32_t n);

/*
 * Leave holdings: give the pages that are mapped to them their own memory,
 * where that may be taken now.  @is_leaving is called with the remap lock held,
 * and must call nothing that takes it.  Scanner's.
 */
typedef bool (*DedupLeaveFn)(void *opaque, const DedupHolding *h);
void dedup_space_leave(DedupSpace *space, DedupLeaveFn is_leaving,
                       void *opaque);

/*
 * The caller is about to throw pages away; the lock is held until _end().
 * See dedup_engine_discard_begin().
 */
bool dedup_space_discard_begin(DedupSpace *space, void *host, uint64_t size);
void dedup_space_discard_end(DedupSpace *space);

/* ---- for other members ---- */

/* The keyed hashes of pages of ours; see DedupGroupOps. */
void dedup_space_keyed_hashes(DedupSpace *space, DedupOwnPage *pages,
                              unsigned n, const uint8_t *secret);
/*
 * The hashes of those that are there, and have memory of their own; 0: it is
 * none of them.
 */
void dedup_space_hashes(DedupSpace *space, const DedupOwnPage *pages,
                        unsigned n, uint64_t salt, uint64_t *hashes);

/* ---- what it costs ---- */

/* A mapping and what hangs on it, in bytes: slabinfo of Linux 6.18. */
#define DEDUP_MAP_COST 256

/* Mappings that our own doing costs, segment views included. */
uint64_t dedup_space_maps(DedupSpace *space);
/* The process has that many; may have at most @limit. */
void dedup_space_count_maps(DedupSpace *space, uint64_t maps);
void dedup_space_limit_maps(DedupSpace *space, uint64_t limit);
/* How many it has by the last count. */
uint64_t dedup_space_maps_used(DedupSpace *space);

/* Memory of the layer's own, in bytes.  Scanner's. */
uint64_t dedup_space_bytes(DedupSpace *space);
#endif /* DEDUP_SPACE_H */
