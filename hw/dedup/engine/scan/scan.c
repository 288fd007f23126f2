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
 *   act       what has to be published goes to a draft (publish.c), and what
 *             can be merged, or will be, becomes a task (todo.h).
 *
 * As in KSM, a page that is already published is merged at first sight,
 * while a page that changed since the last pass ("volatile") is not worth a
 * hint or a copy of its own.
 */

#include <string.h>
#include <sys/mman.h>

#include "scan/ask.h"
#include "scan/estimate.h"
#include "scan/leave.h"
#include "scan/merge.h"
#include "scan/publish.h"
#include "scan/todo.h"
#include "scan/upkeep.h"

/* Looking at a page costs this much less than hashing it. */
#define LOOK_SHARE 16

/* A page that was hashed in this chunk. */
typedef struct Page {
    uint32_t page;
    bool stable;
    bool zero;
    bool broken;
    bool settles;             /* nobody else has what it was changed to */
    uint64_t hash;
} Page;

struct DedupChunk {
    DedupRegion *r;
    DedupMemo *memo;
    Page pages[DEDUP_CHUNK_PAGES];
    unsigned npages;
    unsigned nother;          /* looked at, of no use in this mode */
    unsigned broke;           /* merged pages that were written meanwhile */
    bool rests;               /* it is not looked into */
    DedupRemote remotes[DEDUP_PROOF_PAGES];
    unsigned nremotes;
};

typedef struct DedupChunk Chunk;

/* ---- look ---- */

static bool see(void *opaque, uint32_t page, const void *content,
                bool broken, bool breaks)
{
    DedupScan *scan = opaque;
    Chunk *c = scan->chunk;
    Page *p;

    if (breaks) {
        dedup_memo_broke(c->memo, page);
        c->broke++;
    }
    if (c->rests) {
        c->memo->counting.volatiles++;
        return true;
    }
    if (!dedup_memo_is_due(c->memo, page, &scan->clock)) {
        return true;
    }
    p = &c->pages[c->npages];
    p->zero = dedup_page_is_zero(content);
    if (!p->zero && scan->now.mode == DEDUP_MODE_ZERO) {
        c->nother++;
        return dedup_page_touch(content);
    }
    p->hash = p->zero ? 0 : dedup_page_hash(content, scan->salt);
    if (!p->zero && p->hash == DEDUP_UNREADABLE) {
        return false;
    }
    c->npages++;
    p->page = page;
    p->broken = p->settles = broken;
    p->stable = dedup_memo_see(c->memo, page, p->hash);
    if (!p->zero) {
        dedup_index_prefetch(scan->index, p->hash);
    }
    return true;
}

/* False: nothing may be done here now. */
static bool look(DedupScan *scan, Chunk *c)
{
    uint32_t chunk = scan->place.first / DEDUP_CHUNK_PAGES;
    DedupSeen seen;

    c->rests = dedup_memo_rests(c->memo, chunk, scan->clock.now);
    if (!dedup_space_look(scan->space, &scan->place, &seen, see, scan)) {
        return false;
    }
    c->memo->counting.pinned += seen.pinned;
    c->memo->counting.swapped += seen.swapped;
    c->memo->counting.huge_kept += seen.huge_kept;
    c->memo->counting.poisoned += seen.poisoned;
    dedup_memo_judge(c->memo, chunk, scan->clock.now, seen.kept, c->broke);
    if (seen.is_empty && !seen.kept) {
        dedup_memo_forget(c->memo, chunk, 1);
    }
    __atomic_fetch_add(&scan->pages, c->npages + c->nother, __ATOMIC_RELAXED);
    return !c->rests;
}

/* ---- decide ---- */

/* What shall happen to a page. */
typedef struct Verdict {
    enum {
        VERDICT_NONE,         /* nothing: it changes, or waits already */
        VERDICT_MERGE,        /* with a page that is published */
        VERDICT_SHARE,        /* with who else has it, or it gets a hint */
    } kind;
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned nhits;
    const DedupHint *stale;   /* one of them that leads nowhere */
} Verdict;

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
        } else if (h && dedup_merge_is_right(c->r, p->page, h, hit->page)) {
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
    } else {
        v->kind = p->stable ? VERDICT_SHARE : VERDICT_NONE;
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
        if (!dedup_publish_has(scan, p->hash)) {
            return DEDUP_PAIR_STALE; /* what we claimed came to nothing */
        }
        dedup_todo_add(scan, c->r, p->page, p->hash, true);
        return DEDUP_PAIR_EQUAL;
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
    if (dedup_group_estimates(scan->group, hint->where)) {
        return DEDUP_PAIR_STALE; /* it merges with nobody, and will find us */
    }
    if (hint->kind == DEDUP_HINT_CANDIDATE) {
        c->remotes[c->nremotes++] = (DedupRemote) {
            .region = c->r, .page = p->page, .hash = p->hash, .hint = *hint,
        };
        if (c->nremotes == DEDUP_PROOF_PAGES) {
            ask_remotes(scan, c);
        }
    } else {
        /* claimed: it will be published */
        dedup_todo_add(scan, c->r, p->page, p->hash, true);
    }
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

static void act(DedupScan *scan, Chunk *c, Page *p, Verdict *v)
{
    switch (v->kind) {
    case VERDICT_NONE:
        break;
    case VERDICT_MERGE:
        dedup_todo_add(scan, c->r, p->page, p->hash, p->stable);
        p->settles = false;
        break;
    case VERDICT_SHARE:
        share(scan, c, p, v);
        break;
    }
}

static void act_on_zero(DedupScan *scan, Chunk *c, Page *p)
{
    if (p->stable && scan->now.zero_pages) {
        dedup_todo_add_zero(scan, c->r, p->page);
        p->settles = false;
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

        if (!p->settles || !p->stable) {
            continue;
        }
        while (i + 1 < c->npages && c->pages[i + 1].page == p->page + n &&
               c->pages[i + 1].settles && c->pages[i + 1].stable &&
               n < DEDUP_RESTORE_PAGES) {
            n++;
            i++;
        }
        dedup_space_settle(c->r, p->page, n);
    }
}

/* Nothing is done, but counted. */
static void estimate_chunk(DedupScan *scan, Chunk *c)
{
    for (unsigned i = 0; i < c->npages; i++) {
        const Page *p = &c->pages[i];

        if (p->zero) {
            scan->sums.estimate.zero += p->stable;
        } else if (p->stable &&
                   dedup_estimate_page(scan, c->r, p->page, p->hash,
                                       &c->remotes[c->nremotes]) &&
                   ++c->nremotes == DEDUP_PROOF_PAGES) {
            dedup_estimate_remotes(scan, c->remotes, c->nremotes);
            c->nremotes = 0;
        }
    }
    dedup_estimate_remotes(scan, c->remotes, c->nremotes);
}

static void scan_chunk(DedupScan *scan, Chunk *c)
{
    Verdict v;

    c->npages = c->nother = c->nremotes = c->broke = 0;
    scan->now_us = g_get_monotonic_time();
    if (!look(scan, c)) {
        return;
    }
    if (scan->now.mode == DEDUP_MODE_ESTIMATE) {
        estimate_chunk(scan, c);
        return;
    }
    for (unsigned i = 0; i < c->npages; i++) {
        Page *p = &c->pages[i];

        if (p->zero) {
            act_on_zero(scan, c, p);
        } else {
            decide(scan, c, p, &v);
            act(scan, c, p, &v);
        }
    }
    ask_remotes(scan, c);
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
    c->memo->begun += scan->at <= dedup_region_base(c->r);
    if (place->skipped) {
        dedup_memo_forget(c->memo, (place->first + DEDUP_CHUNK_PAGES - 1) /
                          DEDUP_CHUNK_PAGES - place->skipped,
                          place->skipped);
    }
    __atomic_store_n(&scan->at, dedup_region_base(c->r) + place->first,
                     __ATOMIC_RELAXED);
    return true;
}

bool dedup_scan_batch(DedupScan *scan, const DedupParams *params,
                      uint32_t pages)
{
    int64_t all = (int64_t)pages * LOOK_SHARE;
    int64_t left = all;
    Chunk *c = scan->chunk;
    bool ended = false;

    scan->now = *params;
    dedup_space_begin_batch(scan->space, params->huge_pages_split,
                            params->mode == DEDUP_MODE_FULL);
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
        if (dedup_scan_waits_us(scan) == 0) {
            dedup_scan_merge(scan);
        }
    }
    scan->sums.work += all - left;
    if (ended) {
        dedup_publish_seal(scan);
        dedup_scan_merge(scan);
    }
    return ended;
}

uint64_t dedup_scan_work(const DedupScan *scan)
{
    return scan->sums.work / LOOK_SHARE;
}

void dedup_scan_end_pass(DedupScan *scan, DedupTally *tally)
{
    int64_t now = g_get_monotonic_time();
    DedupRegion *r;
    uint32_t at = 0;

    *tally = (DedupTally) {
        .found = scan->sums.found, .limits = scan->limits,
        .estimate = scan->sums.estimate,
        .us = now - scan->start_us,
        .hashed = scan->pages - scan->sums.pages_before,
        .work = dedup_scan_work(scan),
    };
    while ((r = dedup_space_next(scan->space, at))) {
        DedupMemo *memo = dedup_region_memo(r);

        memo->counting.swapped +=
            dedup_region_swapped(r, memo->counting.swapped);
        dedup_memo_take_counts(memo, &tally->counts);
        at = dedup_region_base(r) + dedup_region_npages(r);
    }
    dedup_space_tidy(scan->space);
    dedup_publish_tidy(scan);
    scan->upkeep.was_full = scan->limits & DEDUP_LIMIT_INDEX;
    scan->sums = (DedupPassSums) { .pages_before = scan->pages };
    scan->limits = 0;
    scan->start_us = now;
    scan->pass++;
    scan->clock = (DedupMemoClock) {
        .before = scan->clock.now, .now = now / G_TIME_SPAN_SECOND,
    };
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

uint64_t dedup_scan_salt(const DedupScan *scan)
{
    return __atomic_load_n(&scan->salt, __ATOMIC_RELAXED);
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
    scan->clock.now = g_get_monotonic_time() / G_TIME_SPAN_SECOND;
    dedup_leave_init(scan);
    dedup_upkeep_init(scan);
    if (!dedup_todo_init(scan, error)) {
        dedup_leave_clear(scan);
        g_free(scan->chunk);
        g_free(scan);
        return NULL;
    }
    if (!dedup_publish_init(scan, error)) {
        dedup_todo_clear(scan);
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
    dedup_todo_clear(scan);
    dedup_leave_clear(scan);
    g_free(scan->chunk);
    g_free(scan);
}

uint64_t dedup_scan_bytes(DedupScan *scan)
{
    uint64_t bytes = sizeof(*scan) + sizeof(Chunk) +
                     dedup_publish_bytes(scan) + dedup_todo_bytes(scan);
    DedupRegion *r;
    uint32_t at = 0;

    while ((r = dedup_space_next(scan->space, at))) {
        bytes += dedup_memo_bytes(dedup_region_memo(r));
        at = dedup_region_base(r) + dedup_region_npages(r);
    }
    return bytes;
}
