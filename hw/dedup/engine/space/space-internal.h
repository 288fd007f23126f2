/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the files of this layer share: the space and its regions.
 *
 * The remap lock (I12) guards: the list of regions, every region's ledger and
 * its mappings, the holdings.  Whoever reads guest memory or changes a mapping
 * holds it, from the pre-checks to the punch.  Functions of this layer's inner
 * headers are called with it held, unless they say otherwise.
 */

#ifndef DEDUP_SPACE_INTERNAL_H
#define DEDUP_SPACE_INTERNAL_H

#include "host/freeze.h"
#include "host/process.h"
#include "host/quota.h"
#include "space/answer.h"
#include "space/bound.h"
#include "space/exclusive.h"
#include "space/space.h"
#include "space/spare.h"

/* Bits of DedupRegion.area, one byte per chunk. */
#define DEDUP_AREA_NOHUGE (1 << 0)   /* MADV_NOHUGEPAGE is set here */
#define DEDUP_AREA_UNKSM (1 << 1)    /* all of it is taken from KSM */
#define DEDUP_AREA_SPLIT (1 << 2)    /* huge page split in this pass */
#define DEDUP_AREA_UNPUNCHED (1 << 3) /* merged pages may be in the file */
#define DEDUP_AREA_PUNCH (1 << 4)    /* and is punched in this pass */

/* What the ledger has in a chunk; changed with it. */
typedef struct DedupChunkSums {
    uint16_t taken;           /* entries that are not DEDUP_OWN */
    uint16_t mapped;          /* of them: a segment is mapped there */
    uint16_t own;             /* pages that have memory of their own */
} DedupChunkSums;

/* Sums of one region, in pages; written under the lock, read by anyone. */
typedef struct DedupRegionSums {
    uint64_t merged;
    uint64_t broken;
    uint64_t zero;
    uint64_t zero_mapped;     /* merged to the segment of zeros */
    uint64_t boundaries;      /* places where our mappings begin or end */
    uint64_t own;             /* pages that have memory of their own */
} DedupRegionSums;

struct DedupRegion {
    DedupSpace *space;
    DedupRegionInfo info;     /* as its owner describes it; the id is ours */
    uint8_t *host;            /* of @info */
    uint32_t npages;
    uint32_t base;            /* member page number of its first page */
    uint64_t serial;          /* of all that ever were; breaks a tie of bases */
    dev_t dev;                /* of the file's file system */
    bool bounded;             /* which may run full: see zeroes.c */
    bool closing;             /* its owner wants it back: nothing is merged */
    bool abandoned;           /* a restore for its owner ends here */
    bool blind;               /* mincore() would not tell us, presence.c */
    bool prepared;            /* and that was found out */
    bool dead;                /* removed; freed when the scanner lets go */
    unsigned lacks;           /* DedupLack bits of restores */

    uint32_t *entry;          /* the ledger: read by dedup_entry_at() only */
    DedupChunkSums *chunk;    /* of the ledger, one per chunk */
    uint8_t *area;            /* DEDUP_AREA bits, one byte per chunk */
    DedupRegionSums sums;
    GHashTable *poisoned;     /* NULL: none; poison.c */

    void *memo;               /* the scanner's */
    GDestroyNotify memo_free;
};

/* What the kernel said about some pages; see dedup_is_present(). */
typedef struct DedupLook {
    DedupRegion *region;      /* NULL: nothing */
    uint32_t first;           /* of a chunk */
    uint64_t strangers;       /* DedupSpaceLock.strangers at that time */
    uint8_t flags[DEDUP_CHUNK_PAGES];
} DedupLook;

/* The older one is replaced. */
typedef struct DedupLooks {
    DedupLook cached[2];
    unsigned last;
} DedupLooks;

/* What is known of KSM and this process; ksm.c. */
typedef struct DedupKsm {
    int stat_fd;              /* ksm_stat of this process */
    int run_fd;               /* whether ksmd runs; -1: not to be read */
    bool absent;              /* this kernel has none */
    bool known;               /* the figures are */
    bool idle;                /* it knows no page of this process */
    int64_t read_ns;          /* when the figures were */
    uint64_t may_take;        /* pages, until the next look */
    bool take_chunks;         /* as the scan comes to them */
    uint64_t shared;          /* atomic: pages that it has merged */
    uint64_t zero;            /* pages that it found to be zero */
} DedupKsm;

/* The segments that this process holds: holdings.c. */
typedef struct DedupHoldings {
    GPtrArray *table;         /* of DedupHolding, by number; holes are NULL */
    unsigned hint;            /* no hole before this one */
    unsigned held;            /* but for that of zeros */
    GHashTable *by_gid;       /* gid -> DedupHolding, of those with a name */
    DedupHolding *zeroes;     /* scanner's own, NULL: nothing needs it */
} DedupHoldings;

/*
 * The remap lock is fair: whoever wants it queues on "turn" first.  The
 * scanner, which takes and drops it all the time, cannot overtake: a plain
 * mutex would let it win again and again.
 */
typedef struct DedupSpaceLock {
    GMutex turn;
    GMutex mutex;
    GThread *holder;          /* atomic; NULL: nobody */
    GThread *scanner;         /* atomic: who scans; NULL: nobody yet */
    DedupSpacePause *pause;   /* scanner's own: its sleep, without the lock */
    uint64_t strangers;       /* times that others had it */
} DedupSpaceLock;

typedef struct DedupMapBudget {
    int64_t other;            /* mappings of the process that are not ours */
    int64_t limit;            /* atomic: of the process, all in all */
} DedupMapBudget;

struct DedupSpace {
    void *owner;
    bool reads_only;          /* nothing is ever changed */
    DedupFreezer freezer;     /* remap lock, but "lost" */
    DedupProcess process;
    DedupSpaceLock lock;
    bool closed;              /* nothing is merged */
    bool sealed;              /* nothing is remapped at all */
    bool split_huge;          /* atomic: huge pages may be split */
    GPtrArray *regions;       /* of DedupRegion */
    uint64_t regions_made;
    GPtrArray *dead;          /* removed regions that the scanner may hold */
    DedupHoldings holdings;
    DedupSpaceSums sums;      /* atomic */
    DedupMapBudget maps;
    DedupLooks looks;         /* scanner's own */
    DedupAnswers answers;     /* remap lock; to other members */
    DedupKsm ksm;             /* scanner's own, but "absent": remap lock */
    DedupSpare spare;         /* for windows of anonymous memory */
    DedupBound bound;         /* how much a window may do */
    DedupExclusive exclusive; /* who keeps vCPUs out, and for how long */
    DedupQuota quota;         /* scanner's own: when one may begin */
    bool is_tidy;             /* scanner's own: no window since that was done */
    uint64_t unchecked;       /* times since check.c last looked */
};

/* Whoever holds it may not take it a second time. */
void dedup_space_lock(DedupSpace *space);
/* The same for who changes no mapping, nor throws pages away. */
void dedup_space_lock_to_read(DedupSpace *space);
/* False: somebody has it, or waits for it. */
bool dedup_space_trylock_to_read(DedupSpace *space);
void dedup_space_unlock(DedupSpace *space);
/* Fails if the calling thread does not hold it. */
void dedup_space_assert_locked(const DedupSpace *space);

static inline uint8_t *dedup_region_addr(const DedupRegion *r, uint32_t page)
{
    return r->host + ((uint64_t)page << DEDUP_PAGE_SHIFT);
}

/* Pages with a segment's mapping, copied or not. */
static inline uint64_t dedup_region_mapped(const DedupRegion *r)
{
    return r->sums.merged + r->sums.broken + r->sums.zero_mapped;
}

static inline uint32_t dedup_region_chunks(const DedupRegion *r)
{
    return (r->npages + DEDUP_CHUNK_PAGES - 1) / DEDUP_CHUNK_PAGES;
}

static inline uint64_t dedup_region_file_offset(const DedupRegion *r,
                                                uint32_t page)
{
    return r->info.fd_offset + ((uint64_t)page << DEDUP_PAGE_SHIFT);
}

/*
 * Is an asynchronous write in flight near the page (I5)?  The read is a
 * sequentially consistent read-modify-write, so that it is ordered after the
 * freeze: a writer that raised the counter later faults on the frozen page.
 */
bool dedup_region_pinned(const DedupRegion *r, uint32_t page);

/* As pinned, for taking the page out of its file: readers count there too. */
bool dedup_region_held(const DedupRegion *r, uint32_t page);

/*
 * How many pages from the first on can be frozen: none that is pinned, where a
 * write of the kernel's to a frozen page would fail.
 */
uint32_t dedup_region_freezable(const DedupRegion *r, uint32_t first,
                                uint32_t n);

/*
 * Freeze pages of a region: see dedup_freeze_begin().  EBUSY where one is
 * pinned, and a write to a frozen page would fail.
 */
bool dedup_region_freeze(DedupRegion *r, uint32_t first, uint32_t n,
                         bool missing, DedupFrozen *z);

/* As dedup_space_next(), under the lock. */
DedupRegion *dedup_region_next(DedupSpace *space, uint32_t at);

/* As dedup_space_find(), under the lock. */
bool dedup_region_find(DedupSpace *space, uint32_t member_page,
                       DedupRegion **region, uint32_t *page);

/* The page of a region where a walk with that cursor goes on. */
static inline uint32_t dedup_region_at(const DedupRegion *r, uint32_t at)
{
    return at > r->base ? at - r->base : 0;
}

/*
 * need.c: could the file system of @r's file take back all that was punched
 * out of its files?  True where no limit is possible (memfd).
 */
bool dedup_file_has_room(DedupRegion *r);

/* All but its place in the space; NULL: no memory. */
DedupRegion *dedup_region_new(DedupSpace *space, const DedupRegionInfo *info,
                              void *memo, GDestroyNotify memo_free);
void dedup_region_free(DedupRegion *r);

/* The part of it that lies in [host, end); false: there is none. */
bool dedup_region_intersect(const DedupRegion *r, const uint8_t *host,
                            const uint8_t *end, uint32_t *first, uint32_t *n);

#endif /* DEDUP_SPACE_INTERNAL_H */
