/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the files of this layer share: the scan.  All of it is the scanner's
 * own, unless a comment says otherwise.
 */

#ifndef DEDUP_SCAN_INTERNAL_H
#define DEDUP_SCAN_INTERNAL_H

#include "index/index.h"
#include "scan/scan.h"

/* Pages whose proof is asked for at a time. */
#define DEDUP_PROOF_PAGES 64

/*
 * A draft: a segment that is being built.  What only this VM holds and what
 * another member proved to hold are kept apart: whoever has one page of a
 * segment can read all of it (I10).
 */
typedef enum DedupDraftKind {
    DEDUP_DRAFT_WITHIN,       /* found twice within this VM */
    DEDUP_DRAFT_BETWEEN,      /* proven by another member */
    DEDUP_DRAFTS
} DedupDraftKind;

typedef struct DedupDraft {
    DedupBuilder *builder;    /* NULL: nothing yet */
    GArray *announce;         /* of Announce, by builder page */
    GHashTable *hashes;       /* of what is in it */
} DedupDraft;

/* publish.c, ask.c */
typedef struct DedupPublisher {
    DedupDraft draft[DEDUP_DRAFTS];
    uint8_t *buffer;          /* DEDUP_PROOF_PAGES pages: copies */
    GHashTable *failed;       /* gid -> how often nobody gave it to us */
} DedupPublisher;

/* todo.c */
typedef struct DedupTasks {
    struct DedupTask *task;   /* mapped, or malloc() would keep the memory */
    unsigned n;
} DedupTasks;

typedef struct DedupTodo {
    DedupTasks tasks;
    unsigned kept;            /* of them, that could not be done last time */
    DedupAction *actions;     /* work space: a chunk's */
    int64_t pause_us;         /* between two looks at what is kept */
    int64_t since_us;         /* atomic: when the first of the others came */
    int64_t due_us;           /* atomic: when to do them; 0: there are none */
    GMutex lock;              /* of what follows; none is taken with it */
    DedupTasks told;          /* by other members */
} DedupTodo;

/* What is known of a holding; leave.c. */
typedef struct DedupNote {
    uint32_t others;          /* pages that other members merged to it */
    uint64_t lean_since;      /* tick; 0: it pays */
    bool leaving;             /* nothing is merged to it any more */
    uint32_t refs;            /* then: what it had when that was last tried */
    bool met;                 /* in the last walk of the group's table */
} DedupNote;

typedef struct DedupLeave {
    GArray *notes;            /* of DedupNote, by number of the holding */
    GHashTable *avoided;      /* gids of segments that we left */
    uint64_t *scans;          /* passes of each member at the last tick */
    uint64_t tick;            /* each member has made a pass since */
    int64_t tick_us;          /* when that was */
} DedupLeave;

/* upkeep.c */
typedef struct DedupUpkeep {
    uint64_t index_limit;     /* entries, as of the last tick */
    int64_t index_room_us;    /* when its room was last looked at */
    bool index_short;         /* there is none: it does not grow */
    bool was_full;            /* the index, or the table, in the last pass */
    uint64_t growths;         /* of the index, when all was announced */
    unsigned announce_left;   /* holdings to announce again since then */
    uint64_t sweep_cursor;    /* where the sweep of the index is */
} DedupUpkeep;

/* Of the pass that is under way. */
typedef struct DedupPassSums {
    uint64_t found;           /* pages merged or dropped */
    uint64_t pages_before;    /* hashed, before it */
    uint64_t work;            /* in pages hashed / LOOK_SHARE */
    DedupEstimate estimate;
} DedupPassSums;

struct DedupScan {
    DedupSpace *space;
    DedupGroup *group;
    DedupControl *control;
    DedupRoom *room;
    DedupIndex *index;        /* of the group; NULL: not joined */
    uint64_t salt;            /* atomic */
    int64_t watched_us;       /* when the group's files were looked at */
    DedupParams now;          /* of this batch */
    DedupPlace place;
    uint32_t at;              /* member page number; atomic */
    uint64_t pages;           /* hashed; atomic */
    uint8_t pass;             /* its number; wraps */
    DedupMemoClock clock;     /* when it began */
    DedupPassSums sums;
    unsigned limits;          /* in this pass */
    int64_t start_us;         /* of this pass */
    int64_t now_us;           /* when this chunk was begun */
    struct DedupChunk *chunk; /* scan.c's work space */
    DedupPublisher publisher;
    DedupTodo todo;
    DedupLeave leave;
    DedupUpkeep upkeep;
};

/* Is nothing else asked of the scanner, and the space open? */
static inline bool dedup_scan_may_go_on(DedupScan *scan)
{
    bool sealed;

    return dedup_control_may_scan(scan->control) &&
           !dedup_space_is_closed(scan->space, &sealed);
}

/* A limit that came of an index without room. */
static inline unsigned dedup_scan_index_limit(const DedupScan *scan)
{
    return scan->upkeep.index_short ? DEDUP_LIMIT_MEMORY : DEDUP_LIMIT_INDEX;
}

/* The hint that page @page of a segment has that content. */
static inline DedupHint dedup_scan_published(const DedupSegment *s,
                                             uint32_t page)
{
    return (DedupHint) {
        .kind = DEDUP_HINT_PUBLISHED, .where = s->gid, .page = page,
    };
}

#endif /* DEDUP_SCAN_INTERNAL_H */
