/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the engine's parts share: the engine, its regions, the remap lock.
 *
 * The remap lock (I12) guards: the list of regions, every region's ledger
 * and its mappings, the table of segments, the block flags.  Whoever reads
 * guest memory or changes a mapping holds it, from the pre-checks to the
 * punch.  The statistics lock guards only DedupEngine.stats and is the last
 * in the order.  The scanner's own fields need no lock.
 */

#ifndef DEDUP_INTERNAL_H
#define DEDUP_INTERNAL_H

#include <time.h>

#include "engine.h"
#include "group.h"
#include "hostmem.h"
#include "mutant.h"
#include "page.h"
#include "room.h"
#include "segment.h"
#include "spare.h"

/* Pages looked at together: the reach of one page table, 2 MiB. */
#define DEDUP_CHUNK_PAGES 512

/*
 * An entry of the ledger, one per page:
 *   DEDUP_OWN     the page is as its owner mapped it
 *   DEDUP_ZERO    dropped because it was zero; not seen again since
 *                 (but see zeroes.c: some are merged to a segment of zeros)
 *   else          entry_no()/entry_page(): the segment page that is mapped
 *                 there; with DEDUP_BROKEN, the kernel copied it since
 */
#define DEDUP_OWN 0u
#define DEDUP_ZERO UINT32_MAX
#define DEDUP_BROKEN (1u << 31)

/* Bits of DedupRegion.area, one byte per chunk. */
#define DEDUP_AREA_NOHUGE (1 << 0)   /* MADV_NOHUGEPAGE is set here */
#define DEDUP_AREA_UNKSM (1 << 1)    /* all of it is taken from KSM */
#define DEDUP_AREA_SPLIT (1 << 2)    /* huge page split in this pass */
#define DEDUP_AREA_UNPUNCHED (1 << 3) /* merged pages may be in the file */
#define DEDUP_AREA_PUNCH (1 << 4)    /* and is punched in this pass */
#define DEDUP_AREA_PRINTS (1 << 5)   /* fingerprints were taken here */

/* What the last scan of a region counted; replaced at the end of a pass. */
typedef struct DedupCounts {
    uint64_t unshared;
    uint64_t volatiles;
    uint64_t pinned;
    uint64_t swapped;
    uint64_t huge_kept;
} DedupCounts;

/* What pages could not be restored for want of; bits of DedupRegion.lacks. */
typedef enum DedupLack {
    DEDUP_LACK_UNPINNED = 1 << 0, /* a device writes to them */
    DEDUP_LACK_MAPS = 1 << 1,     /* the kernel has no more mappings for us */
    DEDUP_LACK_FILE = 1 << 2,     /* the file's file system is full */
    DEDUP_LACK_FREEZE = 1 << 3,   /* the RAM cannot be frozen, or not now */
} DedupLack;

/* What the ledger has in a chunk; changed with it. */
typedef struct DedupChunkSums {
    uint16_t taken;           /* entries that are not DEDUP_OWN */
    uint16_t mapped;          /* of them: a segment is mapped there */
    uint16_t own;             /* pages that have memory of their own */
} DedupChunkSums;

struct DedupRegion {
    DedupEngine *engine;
    char *id;
    uint8_t *host;
    uint32_t npages;
    uint32_t base;            /* member page number of its first page */
    uint64_t serial;          /* of all that ever were; breaks a tie of bases */
    DedupMemory memory;
    int fd;
    uint64_t fd_offset;
    const uint16_t *pins;
    const uint16_t *readers;
    unsigned flags;
    dev_t dev;                /* of the file's file system */
    bool bounded;             /* which may run full: see zeroes.c */
    bool closing;             /* its owner wants it back: nothing is merged */
    bool abandoned;           /* a restore for its owner ends here */
    unsigned lacks;           /* DedupLack bits of restores */
    bool blind;               /* mincore() would not tell us, presence.c */
    bool prepared;            /* and that was found out */
    bool dead;                /* removed; freed when the scanner lets go */

    uint32_t *entry;          /* the ledger: read by dedup_entry_at() only */
    DedupChunkSums *sums;     /* of the ledger, one per chunk */
    uint16_t *fingerprint;    /* 0: not seen yet; lazily populated */
    uint8_t *area;
    uint32_t prints;          /* chunks with DEDUP_AREA_PRINTS */

    /* Ledger sums; written under the remap lock, read by anyone. */
    uint64_t merged;
    uint64_t broken;
    uint64_t zero;
    uint64_t zero_mapped;     /* merged to the segment of zeros */
    uint64_t boundaries;      /* places where our mappings begin or end */
    uint64_t own;             /* pages that have memory of their own */

    DedupCounts counts;       /* of the last full pass */
    DedupCounts counting;     /* of the pass under way */
};

/* A page waiting for a segment that is being built. */
typedef struct DedupPending {
    DedupRegion *region;
    uint32_t page;
    uint16_t index;           /* page of the builder */
} DedupPending;

/* A page of the builder, to be announced when it is sealed. */
typedef struct DedupAnnounce {
    uint64_t hash;
    uint32_t page;            /* ours, of the claim that it replaces */
} DedupAnnounce;

/*
 * A segment that is being built.  What only this VM holds and what another
 * member proved to hold are kept apart: whoever has one page of a segment
 * can read all of it (I10).
 */
typedef enum DedupBatchKind {
    DEDUP_BATCH_WITHIN,       /* found twice within this VM */
    DEDUP_BATCH_BETWEEN,      /* proven by another member */
    DEDUP_BATCHES
} DedupBatchKind;

typedef struct DedupBatch {
    DedupBuilder *builder;    /* NULL: nothing yet */
    GArray *pending;          /* of DedupPending */
    GArray *announce;         /* of DedupAnnounce, by builder page */
    GHashTable *pending_hash; /* hash -> builder page + 1 */
} DedupBatch;

/* What the kernel said about some pages; see dedup_is_present(). */
#define DEDUP_LOOK_PAGES 64
typedef struct DedupLook {
    DedupRegion *region;      /* NULL: nothing */
    uint32_t first;
    uint64_t visits;          /* DedupEngine.visits at that time */
    uint8_t flags[DEDUP_LOOK_PAGES];
} DedupLook;

/* What is known of KSM and this process; ksm.c. */
typedef struct DedupKsm {
    int stat_fd;              /* ksm_stat of this process */
    bool absent;              /* this kernel has none */
    bool known;               /* the figures are */
    bool idle;                /* it knows no page of this process */
    uint64_t may_take;        /* pages, until the next look */
    uint64_t shared;          /* atomic: pages that it has merged */
    uint64_t zero;            /* pages that it found to be zero */
} DedupKsm;

struct DedupEngine {
    DedupCallbacks callbacks;
    void *opaque;
    int uffd;                 /* remap lock; read by anyone, atomic */
    int pagemap_fd;
    int self_pidfd;
    bool has_pagemap_scan;
    bool zero_anon;           /* anonymous zero pages can be frozen */
    bool has_madvise_vector;  /* process_madvise(MADV_DONTNEED) of oneself */
    DedupHostMem *hostmem;
    DedupKsm ksm;             /* scanner's own, but "absent": remap lock */
    DedupGroup *group;
    int64_t watched_us;       /* when the group's files were looked at */

    GMutex turn;              /* makes the remap lock fair, see dedup_lock() */
    GMutex remap;
    GThread *scanner;         /* who runs it; NULL: nobody yet */
    uint64_t visits;          /* times that others had the remap lock */
    GPtrArray *regions;       /* of DedupRegion */
    uint64_t regions_made;
    GPtrArray *dead;          /* removed regions that the scanner may hold */
    GPtrArray *segments;      /* of DedupSegment, by number; holes are NULL */
    unsigned segment_hint;    /* no hole before this one */
    unsigned segments_held;   /* but for that of zeros */
    GHashTable *by_gid;       /* gid -> DedupSegment, of those with a name */
    DedupSegment *zeroes;     /* scanner's own, NULL: nothing needs it */
    bool blocked;
    bool hard_blocked;

    GMutex control;           /* params, requests; before the remap lock */
    GCond wake;
    DedupParams params;
    bool stop;
    bool kick;                /* something was asked of the scanner */
    bool restoring;
    bool restore_force;
    bool restore_fresh;       /* a new request: start from the beginning */
    DedupReservation restore_reserved; /* what the request has reserved */
    char *group_error;

    uint64_t reserved_bytes;  /* atomic: the sum of all reservations */

    /* A restore request's walk; scanner's own. */
    uint64_t restore_at;      /* member page number */
    unsigned restore_lacks;   /* in this round: DedupLack bits */
    uint64_t restore_last;    /* pages left after the last round */
    int64_t restore_moved_us; /* when a round last made progress */

    /* Scanner's own. */
    DedupParams active;       /* copy of params, taken at each batch */
    DedupLook look[2];        /* the older one is replaced */
    unsigned last_look;
    struct DedupChunk *chunk; /* scan.c's work space */
    DedupIndex *index;        /* of the group; NULL: not joined */
    uint64_t salt;
    uint32_t pass_at;         /* where it is: member page number; atomic */
    int64_t pass_start_us;
    uint64_t pass_found;      /* pages merged or dropped in this pass */
    unsigned idle_passes;     /* full passes in a row that found nothing */
    unsigned pass_limits;
    DedupBatch batch[DEDUP_BATCHES];
    uint8_t *proof_buffer;    /* DEDUP_PROOF_PAGES pages */
    DedupSpare spare;         /* for windows of anonymous memory */
    uint64_t index_limit;     /* entries, as of the last tick */
    int64_t index_room_us;    /* when its room was last looked at */
    bool index_short;         /* there is none: it does not grow */
    uint64_t announced_growths;
    unsigned announce_left;   /* segments to announce again since then */
    uint64_t sweep_cursor;    /* where the sweep of the index is */
    int64_t maps_other;       /* maps of the process that are not ours */
    int64_t figures_us;       /* when the costly figures were last taken */
    int64_t figures_pause_us; /* and how long not again */
    int64_t policy_us;        /* when policy.c last judged by them */
    GHashTable *left_gids;    /* segments that we left, see policy.c */
    GHashTable *failed_gids;  /* gid -> how often nobody gave it to us */
    uint64_t *tick_scans;     /* full scans of each member at the last tick */
    int64_t tick_us;          /* when that was */
    uint64_t generation;      /* ticks: each member has made a pass since */

    /* Live sums, atomic. */
    uint64_t own_present;     /* pages with memory of their own */
    uint64_t merged;
    uint64_t broken;
    uint64_t zero;
    uint64_t zero_mapped;
    uint64_t pages_total;
    uint64_t cow_breaks;
    uint64_t pages_scanned;

    GMutex stats_lock;
    DedupStats stats;         /* what get_stats() returns */
    DedupState state;
    uint64_t overhead_bytes;  /* metadata and maps that we bear */
    int64_t window_max_ns;    /* atomic */
    clockid_t cpu_clock;
    bool cpu_clock_valid;
};

/* The remap lock; fair, so that a discard never waits for many windows. */
void dedup_lock(DedupEngine *e);
void dedup_unlock(DedupEngine *e);

/* ---- ledger.c: what is merged; the remap lock is held ---- */

static inline bool dedup_entry_is_segment(uint32_t entry)
{
    return entry != DEDUP_OWN && entry != DEDUP_ZERO;
}

static inline uint32_t dedup_entry_no(uint32_t entry)
{
    return ((entry & ~DEDUP_BROKEN) - 1) / DEDUP_SEGMENT_PAGES;
}

static inline uint32_t dedup_entry_page(uint32_t entry)
{
    return ((entry & ~DEDUP_BROKEN) - 1) % DEDUP_SEGMENT_PAGES;
}

static inline uint32_t dedup_entry(uint32_t no, uint32_t page)
{
    return no * DEDUP_SEGMENT_PAGES + page + 1;
}

/*
 * The entry of a page.  A chunk of own pages has none: to read it there would
 * take memory for it on hosts without a shared page of zeros, and on all
 * others a page table.
 */
static inline uint32_t dedup_entry_at(const DedupRegion *r, uint32_t page)
{
    return r->sums[page / DEDUP_CHUNK_PAGES].taken ? r->entry[page]
                                                   : DEDUP_OWN;
}

/*
 * Change one page's state, with all sums that follow from it.  A page that
 * becomes own has memory, or does so with _absent(): there is none then.
 */
void dedup_ledger_set(DedupRegion *r, uint32_t page, uint32_t entry);
void dedup_ledger_absent(DedupRegion *r, uint32_t page);
/* So many pages of the chunk were seen to have memory of their own. */
void dedup_ledger_own(DedupRegion *r, uint32_t chunk, uint32_t own);
/* The next page from @page on, before @end, that is not own; @end: none. */
uint32_t dedup_ledger_next(const DedupRegion *r, uint32_t page,
                           uint32_t end);
/* A mapping and what hangs on it, in bytes: slabinfo of Linux 6.18. */
#define DEDUP_MAP_COST 256

/* Mappings that our own doing costs, segment views included. */
uint64_t dedup_ledger_maps(DedupEngine *e);

/* Segments of this process; add numbers it, drop frees it (no refs left). */
void dedup_segments_add(DedupEngine *e, DedupSegment *s);
void dedup_segments_drop(DedupEngine *e, DedupSegment *s);
DedupSegment *dedup_segments_find(DedupEngine *e, uint32_t gid);
DedupSegment *dedup_entry_segment(DedupEngine *e, uint32_t entry);

/* ---- region.c ---- */

static inline uint8_t *dedup_region_addr(const DedupRegion *r, uint32_t page)
{
    return r->host + ((uint64_t)page << DEDUP_PAGE_SHIFT);
}

/* Pages with a segment's mapping, copied or not. */
static inline uint64_t dedup_region_mapped(const DedupRegion *r)
{
    return r->merged + r->broken + r->zero_mapped;
}

static inline uint32_t dedup_region_chunks(const DedupRegion *r)
{
    return (r->npages + DEDUP_CHUNK_PAGES - 1) / DEDUP_CHUNK_PAGES;
}

static inline uint64_t dedup_region_file_offset(const DedupRegion *r,
                                                uint32_t page)
{
    return r->fd_offset + ((uint64_t)page << DEDUP_PAGE_SHIFT);
}

/*
 * Is an asynchronous write in flight near the page (I5)?  The read is a
 * sequentially consistent read-modify-write, so that it is ordered after the
 * freeze: a writer that raised the counter later faults on the frozen page.
 */
bool dedup_region_pinned(const DedupRegion *r, uint32_t page);

/* As pinned, for taking the page out of its file: readers count there too. */
bool dedup_region_held(const DedupRegion *r, uint32_t page);

/* The region and page behind a member page number; false: there is none. */
bool dedup_region_find(DedupEngine *e, uint32_t member_page,
                       DedupRegion **region, uint32_t *page);

/*
 * The region that holds member page @at, or the next one behind; NULL: none.
 * So a member page number is a cursor that survives whatever comes or goes
 * between two takings of the remap lock: go on at base + page, or at
 * base + npages for the next region.  Remap lock held.
 */
DedupRegion *dedup_region_next(DedupEngine *e, uint32_t at);

/* The page of a region where a walk with that cursor goes on. */
static inline uint32_t dedup_region_at(const DedupRegion *r, uint32_t at)
{
    return at > r->base ? at - r->base : 0;
}

/* Re-apply the region's madvise() state to new mappings (M6). */
void dedup_region_reapply(const DedupRegion *r, uint32_t page, uint32_t n);

/* Map the region's own memory there, without contents. */
bool dedup_region_map_own(DedupRegion *r, uint32_t page, uint32_t n);

/* The chunks from @first on, before @last, have no memory of their own now. */
void dedup_region_forget(DedupRegion *r, uint32_t first, uint32_t last);

/*
 * Free what was removed; the scanner, which calls it, holds no region now.
 * True: there was something, and segments may be unused now.
 */
bool dedup_regions_reap(DedupEngine *e);
/* Free all: the engine ends.  Mappings stay as they are. */
void dedup_regions_free(DedupEngine *e);

/* ---- presence.c: which pages are there (I7); remap lock held ---- */

#define DEDUP_PRESENT (1 << 0)       /* own memory, or a copied page */
#define DEDUP_SWAPPED (1 << 1)
#define DEDUP_HUGE (1 << 2)          /* mapped by a huge page */
#define DEDUP_ZERO_MAPPED (1 << 3)   /* the kernel's zero page is mapped */

/* Find out how to look at a region; once a pass, as the user id may change. */
void dedup_presence_prepare(DedupRegion *r);

/* Flags of @n pages (at most a chunk) from @first; touches no page. */
bool dedup_presence(DedupRegion *r, uint32_t first, uint32_t n,
                    uint8_t *flags);

/*
 * Skip chunks from *@page, the start of one, in which a look would find
 * nothing: no memory, no swap, no segment.  False: *@page is how far the
 * kernel was asked, and there may be more of them.
 */
bool dedup_skip_void(DedupRegion *r, uint32_t *page);

/*
 * Does the page have memory?  What the scanner asks of single pages: the
 * kernel is asked about the pages around, too, and the answer kept for this
 * batch, as long as nobody else had the remap lock, who might have discarded
 * something.
 */
bool dedup_is_present(DedupRegion *r, uint32_t page);
void dedup_forget_looks(DedupEngine *e);

/* ---- punch.c: out of the file of a shared region ---- */

/* What the file has there is worth nothing: remove it, whoever holds it. */
bool dedup_punch(const DedupRegion *r, uint32_t page, uint32_t n);

/* A segment is mapped there: remove what nobody holds, note the rest. */
void dedup_punch_replaced(DedupRegion *r, uint32_t page, uint32_t n);

/* Pages got memory: the file may have got it for merged ones around, too. */
void dedup_punch_around(DedupRegion *r, uint32_t page, uint32_t n);

/* Part of a chunk is looked at: punch what could not be at that time. */
void dedup_punch_late(DedupRegion *r, uint32_t first, uint32_t n);

/* ---- window.c, restore.c, unmerge.c ---- */

typedef struct DedupAction {
    uint32_t page;            /* of the region; ascending in an array */
    uint16_t index;           /* segment page */
    bool done;                /* out */
    DedupSegment *segment;    /* NULL: drop as zero */
} DedupAction;

/*
 * split.c: split the huge pages under a window's pages.  @flags: presence of
 * the pages from @first on.  True: some may be split now, ask again.
 */
bool dedup_split_huge(DedupRegion *r, DedupAction *const *actions, unsigned n,
                      uint32_t first, const uint8_t *flags);

/*
 * One window: merge or drop @n pages of @r that lie within
 * DEDUP_WINDOW_PAGES of each other.  Takes the remap lock.  Returns how many
 * were done; sets bits of @limits where something ran short.
 */
unsigned dedup_window(DedupRegion *r, DedupAction *actions, unsigned n,
                      unsigned *limits);

/* As many windows as it takes. */
unsigned dedup_windows(DedupRegion *r, DedupAction *actions, unsigned n,
                       unsigned *limits);

/*
 * Give pages [first, first + n) their own memory back, contents and all; at
 * most DEDUP_WINDOW_PAGES.  Remap lock held.  Returns how many pages are
 * still not own: pinned, or the kernel refused.
 */
unsigned dedup_restore_locked(DedupRegion *r, uint32_t first, unsigned n);

/*
 * Mapping something over pages has failed, and the kernel had unmapped them:
 * put own memory there with @content; NULL: with what the file of a shared
 * region has there, or zeros.  False: there was no hole, or it stays.
 */
bool dedup_fill_hole(DedupRegion *r, uint32_t page, uint32_t n,
                     const uint8_t *content);

/* One step of a restore request: returns false when it has ended. */
bool dedup_restore_step(DedupEngine *e);

/* Why pages could not be restored: DEDUP_ERROR_MEMORY or _STATE. */
void dedup_restore_error(uint64_t left, unsigned lacks, GError **error);

/* ---- scan.c, publish.c ---- */

#define DEDUP_PROOF_PAGES 64

void dedup_scan_init(DedupEngine *e);
void dedup_scan_free(DedupEngine *e);
size_t dedup_scan_size(void);

/* Scan about @budget pages; returns true at the end of a full pass. */
bool dedup_scan_batch(DedupEngine *e, uint32_t budget);

/* What a hint to another own page was worth. */
typedef enum DedupPair {
    DEDUP_PAIR_STALE,         /* the page has other contents by now */
    DEDUP_PAIR_EQUAL,
    DEDUP_PAIR_COLLIDES,      /* other contents, which the hint is right for */
} DedupPair;

/* Publish two own pages if they are equal. */
DedupPair dedup_publish_pair(DedupEngine *e, DedupRegion *r, uint32_t page,
                             DedupRegion *r2, uint32_t page2, uint64_t hash,
                             const DedupHint *hint);
/* Is the content in a segment being built?  Then wait for it. */
bool dedup_publish_pending(DedupEngine *e, DedupRegion *r, uint32_t page,
                           uint64_t hash);
/* Another member says that it has the content: ask for proof, publish. */
typedef struct DedupRemote {
    DedupRegion *region;
    uint32_t page;
    uint64_t hash;
    DedupHint hint;
} DedupRemote;
void dedup_publish_remote(DedupEngine *e, DedupRemote *remotes, unsigned n);
/* Seal what is there, announce it, merge onto it. */
void dedup_publish_flush(DedupEngine *e);
/* Forget what waits. */
void dedup_publish_abandon(DedupEngine *e);
/* Does any page wait for a segment? */
bool dedup_publish_waiting(const DedupEngine *e);
void dedup_publish_init(DedupEngine *e);
void dedup_publish_free(DedupEngine *e);
/*
 * Find the segment behind a hint about the page, which has that hash,
 * fetching it if need be: with the page as proof.  NULL: there is none
 * (@stale), or we do not want it or cannot have it now.
 */
DedupSegment *dedup_publish_segment(DedupEngine *e, DedupRegion *r,
                                    uint32_t page, uint64_t hash,
                                    const DedupHint *hint, bool *stale);

/* ---- policy.c ---- */

/* Leave segments that cost more than they save (I8); announce again. */
void dedup_policy_pass_end(DedupEngine *e);

/* Let go of segments that nothing refers to. */
void dedup_policy_drop_unused(DedupEngine *e);

/* May the index grow?  Looks now and then. */
void dedup_policy_index_room(DedupEngine *e);

/*
 * Which of a window's actions may be done with the maps that are left: takes
 * the others out of @actions.  False: none.  Remap lock held.
 */
bool dedup_policy_maps(const DedupRegion *r, DedupAction **actions,
                       unsigned *n, unsigned *limits);

/* What a member may publish between two looks at the room. */
#define DEDUP_PUBLISH_BYTES \
    (DEDUP_BATCHES * DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE)

/* ---- stats.c, engine.c ---- */

/* May the scanner scan now, or is something else asked of it? */
bool dedup_may_scan(DedupEngine *e);

/* Ask the scanner to look at params and requests again; any thread. */
void dedup_kick(DedupEngine *e);

/* Work out the state anew and tell whoever wants to know. */
void dedup_update_state(DedupEngine *e);

/* Wait, or until something is asked of the scanner. */
void dedup_wait(DedupEngine *e, int64_t us);

/* Tell the group about ourselves: the member slot. */
void dedup_stats_tell(DedupEngine *e);
/* Figures, at the end of a batch and of a pass. */
void dedup_stats_batch(DedupEngine *e);
/* True if the costly figures are new, so that policy.c can judge by them. */
bool dedup_stats_pass(DedupEngine *e);
void dedup_set_state(DedupEngine *e, DedupState state);
/* How many more maps we may use. */
int64_t dedup_maps_left(DedupEngine *e);

static inline int64_t dedup_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

#endif /* DEDUP_INTERNAL_H */
