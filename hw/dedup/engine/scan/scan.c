/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The scan: from "which pages are there" to "what shall happen to them".
 *
 * A full pass walks all regions in chunks of 2 MiB.  A chunk is worked on in
 * three steps:
 *
 *   look      the space shows the pages that may be merged (space/pass.c);
 *             each is hashed, and its fingerprint is compared with that of
 *             the pass before (memo.c).
 *   decide    each hash is looked up.  The answer is a hint (see index.h) and
 *             decides only what is tried.
 *   act       windows, and what has to be published first (publish.c).
 *
 * As in KSM, a page that is already published is merged at first sight,
 * while a page that changed since the last pass ("volatile") is not worth a
 * hint or a copy of its own.
 */

#include <string.h>
#include <sys/mman.h>

#include "scan/ask.h"
#include "scan/leave.h"
#include "scan/publish.h"
#include "scan/upkeep.h"

/* Looking at a page costs this much less than hashing it. */
#define LOOK_SHARE 16

/* A page that was hashed in this chunk. */
typedef struct Page {
    uint32_t page;
    bool stable;
    bool zero;
    bool broken;
    uint64_t hash;
} Page;

struct DedupChunk {
    DedupRegion *r;
    DedupMemo *memo;
    Page pages[DEDUP_CHUNK_PAGES];
    unsigned npages;
    DedupAction actions[DEDUP_CHUNK_PAGES];
    unsigned nactions;
    DedupRemote remotes[DEDUP_PROOF_PAGES];
    unsigned nremotes;
};

typedef struct DedupChunk Chunk;

/* ---- look ---- */

static void see(void *opaque, uint32_t page, const void *content, bool broken)
{
    DedupScan *scan = opaque;
    Chunk *c = scan->chunk;
    Page *p = &c->pages[c->npages++];

    p->page = page;
    p->broken = broken;
    p->zero = dedup_page_is_zero(content);
    p->hash = p->zero ? 0 : dedup_page_hash(content, scan->salt);
    p->stable = dedup_memo_see(c->memo, page, p->hash);
    if (!p->zero) {
        dedup_index_prefetch(scan->index, p->hash);
    }
}

/* False: nothing may be done here now. */
static bool look(DedupScan *scan, Chunk *c)
{
    DedupSeen seen;

    if (!dedup_space_look(scan->space, &scan->place, &seen, see, scan)) {
        return false;
    }
    c->memo->counting.pinned += seen.pinned;
    c->memo->counting.swapped += seen.swapped;
    c->memo->counting.huge_kept += seen.huge_kept;
    if (seen.is_empty) {
        dedup_memo_forget(c->memo, scan->place.first / DEDUP_CHUNK_PAGES, 1);
    }
    __atomic_fetch_add(&scan->pages, c->npages, __ATOMIC_RELAXED);
    return true;
}

/* ---- decide ---- */

/* What shall happen to a page. */
typedef struct Verdict {
    enum {
        VERDICT_NONE,         /* nothing: it changes, or waits already */
        VERDICT_MERGE,        /* with a page of a holding */
        VERDICT_SHARE,        /* with who else has it, or it gets a hint */
    } kind;
    DedupHolding *holding;
    uint16_t index;
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned nhits;
    const DedupHint *stale;   /* one of them that leads nowhere */
} Verdict;

/* The index compares only a part of the hash; this is all of it. */
static bool has_hash(const DedupScan *scan, const DedupHolding *h,
                     uint32_t page, uint64_t hash)
{
    return dedup_page_hash(dedup_segment_page(h->segment, page),
                           scan->salt) == hash;
}

/* A published page of the content? */
static bool is_published(DedupScan *scan, const Chunk *c, const Page *p,
                         Verdict *v)
{
    for (unsigned i = 0; i < v->nhits; i++) {
        const DedupHint *hit = &v->hits[i];
        DedupHolding *h;
        bool stale;

        if (hit->kind != DEDUP_HINT_PUBLISHED) {
            continue;
        }
        h = dedup_ask_holding(scan, c->r, p->page, p->hash, hit, &stale);
        if (stale || (h && hit->page >= h->segment->npages)) {
            v->stale = hit;
        } else if (h && has_hash(scan, h, hit->page, p->hash)) {
            v->holding = h;
            v->index = hit->page;
            return true;
        }
    }
    return false;
}

/* What to do with one page that is not zero. */
static void decide(DedupScan *scan, const Chunk *c, const Page *p, Verdict *v)
{
    v->stale = NULL;
    v->nhits = dedup_index_lookup(scan->index, p->hash, v->hits);
    if (is_published(scan, c, p, v)) {
        v->kind = VERDICT_MERGE;
    } else if (!p->stable ||
               dedup_publish_pending(scan, c->r, p->page, p->hash)) {
        v->kind = VERDICT_NONE;
    } else {
        v->kind = VERDICT_SHARE;
    }
}

/* ---- act ---- */

static void ask_remotes(DedupScan *scan, Chunk *c)
{
    if (c->nremotes) {
        dedup_ask_remotes(scan, c->remotes, c->nremotes);
        c->nremotes = 0;
    }
}

/* Our own hint: who else of us has this page? */
static DedupPair try_own(DedupScan *scan, Chunk *c, const Page *p,
                         const DedupHint *hint)
{
    DedupRegion *r2;
    uint32_t page2;

    if (hint->kind == DEDUP_HINT_CLAIMED) {
        return DEDUP_PAIR_STALE; /* what we claimed came to nothing */
    }
    if (hint->page == dedup_region_base(c->r) + p->page) {
        return DEDUP_PAIR_EQUAL; /* most often: nobody else has it */
    }
    return dedup_space_find(scan->space, hint->page, &r2, &page2) ?
           dedup_publish_pair(scan, c->r, p->page, r2, page2, p->hash, hint) :
           DEDUP_PAIR_STALE;
}

/* A hint that names a member: what is it worth? */
static DedupPair try_member(DedupScan *scan, Chunk *c, const Page *p,
                            const DedupHint *hint)
{
    if (hint->where == dedup_group_self(scan->group)) {
        return try_own(scan, c, p, hint);
    }
    if (!dedup_group_alive(scan->group, hint->where)) {
        return DEDUP_PAIR_STALE;
    }
    if (hint->kind == DEDUP_HINT_CANDIDATE) {
        c->remotes[c->nremotes++] = (DedupRemote) {
            .region = c->r, .page = p->page, .hash = p->hash, .hint = *hint,
        };
        if (c->nremotes == DEDUP_PROOF_PAGES) {
            ask_remotes(scan, c);
        }
    }
    /* claimed: it is published by the time of the next pass */
    return DEDUP_PAIR_EQUAL;
}

/* With whoever else has the page; if nobody has, the next one finds us. */
static void share(DedupScan *scan, Chunk *c, const Page *p, Verdict *v)
{
    DedupHint mine = {
        .kind = DEDUP_HINT_CANDIDATE,
        .where = dedup_group_self(scan->group),
        .page = dedup_region_base(c->r) + p->page,
    };

    for (unsigned i = 0; i < v->nhits; i++) {
        if (v->hits[i].kind == DEDUP_HINT_PUBLISHED) {
            continue;
        }
        switch (try_member(scan, c, p, &v->hits[i])) {
        case DEDUP_PAIR_EQUAL:
            return;
        case DEDUP_PAIR_STALE:
            v->stale = &v->hits[i];
            break;
        case DEDUP_PAIR_COLLIDES:
            break; /* it stays beside ours */
        }
    }
    if (v->stale) {
        dedup_index_replace(scan->index, p->hash, v->stale, &mine);
    } else if (!dedup_index_insert(scan->index, p->hash, &mine)) {
        scan->limits |= dedup_scan_index_limit(scan);
    }
}

static void act(DedupScan *scan, Chunk *c, const Page *p, Verdict *v)
{
    switch (v->kind) {
    case VERDICT_NONE:
        break;
    case VERDICT_MERGE:
        c->actions[c->nactions++] = (DedupAction) {
            .page = p->page, .holding = v->holding, .index = v->index,
        };
        break;
    case VERDICT_SHARE:
        share(scan, c, p, v);
        break;
    }
}

static void act_on_zero(DedupScan *scan, Chunk *c, const Page *p)
{
    DedupAction a = { 0 };

    if (p->stable && scan->now.zero_pages &&
        dedup_space_zero_action(c->r, p->page, &a, &scan->limits)) {
        c->actions[c->nactions++] = a;
    }
}

/* A page that was merged counts neither as unshared nor as volatile. */
static void uncount(Chunk *c)
{
    unsigned i = 0;

    for (unsigned a = 0; a < c->nactions; a++) {
        if (!c->actions[a].done) {
            continue;
        }
        while (c->pages[i].page != c->actions[a].page) {
            i++;
        }
        if (c->pages[i].stable) {
            c->memo->counting.unshared--;
        } else {
            c->memo->counting.volatiles--;
        }
    }
}

/*
 * Broken pages that found no segment page again go back to the region's own
 * memory once they have settled.
 */
static void settle_broken(Chunk *c)
{
    for (unsigned i = 0; i < c->npages; i++) {
        const Page *p = &c->pages[i];
        uint32_t n = 1;

        if (!p->broken || !p->stable) {
            continue;
        }
        while (i + 1 < c->npages && c->pages[i + 1].page == p->page + n &&
               c->pages[i + 1].broken && c->pages[i + 1].stable &&
               n < DEDUP_WINDOW_PAGES) {
            n++;
            i++;
        }
        dedup_space_settle(c->r, p->page, n);
    }
}

static void scan_chunk(DedupScan *scan, Chunk *c)
{
    Verdict v;

    c->npages = c->nactions = c->nremotes = 0;
    if (!look(scan, c)) {
        return;
    }
    for (unsigned i = 0; i < c->npages; i++) {
        const Page *p = &c->pages[i];

        if (p->zero) {
            act_on_zero(scan, c, p);
        } else {
            decide(scan, c, p, &v);
            act(scan, c, p, &v);
        }
    }
    ask_remotes(scan, c);
    if (c->nactions) {
        scan->found += dedup_space_windows(c->r, c->actions, c->nactions,
                                           &scan->limits);
        uncount(c);
    }
    settle_broken(c);
}

/* ---- a pass ---- */

/* Where the pass goes on; place.n is 0 if nothing is there.  False: its end. */
static bool go_on(DedupScan *scan, int64_t most)
{
    DedupPlace *place = &scan->place;
    Chunk *c = scan->chunk;

    if (!dedup_space_go_on(scan->space, place, scan->at, most)) {
        return false;
    }
    c->r = place->region;
    c->memo = dedup_region_memo(c->r);
    if (place->skipped) {
        dedup_memo_forget(c->memo, (place->first + DEDUP_CHUNK_PAGES - 1) /
                          DEDUP_CHUNK_PAGES - place->skipped,
                          place->skipped);
    }
    __atomic_store_n(&scan->at, dedup_region_base(c->r) + place->first,
                     __ATOMIC_RELAXED);
    return true;
}

bool dedup_scan_batch(DedupScan *scan, const DedupParams *params)
{
    int64_t left = (int64_t)params->pages_to_scan * LOOK_SHARE;
    Chunk *c = scan->chunk;
    bool ended = false;

    scan->now = *params;
    dedup_space_begin_batch(scan->space, params->huge_pages_split);
    if (dedup_space_asks_room(scan->space)) {
        dedup_space_set_room(scan->space, dedup_restore_room(scan->room));
    }
    while (left > 0 && !ended && dedup_scan_may_go_on(scan)) {
        if (!go_on(scan, left / LOOK_SHARE)) {
            ended = true;
        } else if (!scan->place.n) {
            left -= LOOK_SHARE;
        } else {
            dedup_upkeep_index_room(scan);
            scan_chunk(scan, c);
            /* whoever asks for the figures reads it */
            __atomic_store_n(&scan->at, scan->at + scan->place.n,
                             __ATOMIC_RELAXED);
            left -= scan->place.n + (int64_t)c->npages * (LOOK_SHARE - 1);
        }
    }
    if (ended) {
        dedup_publish_seal(scan);
    }
    return ended;
}

void dedup_scan_end_pass(DedupScan *scan, DedupTally *tally)
{
    int64_t now = g_get_monotonic_time();
    DedupRegion *r;
    uint32_t at = 0;

    *tally = (DedupTally) {
        .found = scan->found, .limits = scan->limits,
        .us = now - scan->start_us,
    };
    while ((r = dedup_space_next(scan->space, at))) {
        DedupMemo *memo = dedup_region_memo(r);

        memo->counting.swapped +=
            dedup_region_swapped(r, memo->counting.swapped);
        dedup_memo_take_counts(memo, &tally->counts);
        at = dedup_region_base(r) + dedup_region_npages(r);
    }
    scan->upkeep.was_full = scan->limits & DEDUP_LIMIT_INDEX;
    scan->found = 0;
    scan->limits = 0;
    scan->start_us = now;
    __atomic_store_n(&scan->at, 0, __ATOMIC_RELAXED);
}

void dedup_scan_upkeep(DedupScan *scan)
{
    dedup_group_refresh(scan->group);
    g_hash_table_remove_all(scan->publisher.failed);
    dedup_upkeep_set_index_limit(scan, dedup_leave_tick(scan));
    dedup_leave_lean(scan);
    dedup_scan_drop_unused(scan);
    dedup_scan_name_holdings(scan);
    dedup_upkeep_sweep(scan);
    dedup_upkeep_announce(scan);
}

unsigned dedup_scan_limits(const DedupScan *scan)
{
    return scan->limits;
}

uint32_t dedup_scan_at(const DedupScan *scan)
{
    return __atomic_load_n(&scan->at, __ATOMIC_RELAXED);
}

uint64_t dedup_scan_pages(const DedupScan *scan)
{
    return __atomic_load_n(&scan->pages, __ATOMIC_RELAXED);
}

/* ---- life ---- */

DedupScan *dedup_scan_new(DedupSpace *space, DedupGroup *group,
                          DedupControl *control, DedupRoom *room,
                          GError **error)
{
    DedupScan *scan = g_new0(DedupScan, 1);

    scan->space = space;
    scan->group = group;
    scan->control = control;
    scan->room = room;
    scan->chunk = g_new0(Chunk, 1);
    dedup_leave_init(scan);
    dedup_upkeep_init(scan);
    if (!dedup_publish_init(scan, error)) {
        dedup_leave_clear(scan);
        g_free(scan->chunk);
        g_free(scan);
        return NULL;
    }
    return scan;
}

void dedup_scan_free(DedupScan *scan)
{
    dedup_publish_clear(scan);
    dedup_leave_clear(scan);
    g_free(scan->chunk);
    g_free(scan);
}

uint64_t dedup_scan_bytes(DedupScan *scan)
{
    uint64_t bytes = sizeof(*scan) + sizeof(Chunk) + dedup_publish_bytes(scan);
    DedupRegion *r;
    uint32_t at = 0;

    while ((r = dedup_space_next(scan->space, at))) {
        bytes += dedup_memo_bytes(dedup_region_memo(r));
        at = dedup_region_base(r) + dedup_region_npages(r);
    }
    return bytes;
}
