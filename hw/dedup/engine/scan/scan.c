/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The scan: from "which pages are there" to "what shall happen to them".
 *
 * A full pass walks all regions in chunks of 2 MiB.  A chunk is worked on in
 * three steps:
 *
 *   look      under the remap lock: presence; the ledger learns which merged
 *             pages were written (broken) and which dropped pages are back;
 *             pages with memory of their own are hashed and their
 *             fingerprint is compared with that of the pass before.
 *   decide    without the lock: each hash is looked up.  The answer is a
 *             hint (see index.h) and decides only what is tried.
 *   act       windows (window.c), and what has to be published first
 *             (publish.c).
 *
 * As in KSM, a page that is already published is merged at first sight,
 * while a page that changed since the last pass ("volatile") is not worth a
 * hint or a copy of its own.
 *
 * A fingerprint is 16 bits of the content hash: 0 is "never seen", 1 is "all
 * zero".  A false match makes a volatile page look stable, no more.
 */

#include <string.h>

#include "internal.h"
#include "ksm.h"
#include "zeroes.h"

#define FINGERPRINT_ZERO 1

/* Looking at a page costs this much less than hashing it. */
#define LOOK_SHARE 16

/*
 * A private page that is restored gets a mapping of its own, so restoring
 * frees maps only if many go at once.
 */
#define SETTLE_PRIVATE 16

/* A page that was hashed in this chunk. */
typedef struct Seen {
    uint32_t page;
    bool stable;
    bool zero;
    bool broken;
    uint64_t hash;
} Seen;

struct DedupChunk {
    DedupRegion *r;
    uint32_t first;
    uint32_t n;
    Seen seen[DEDUP_CHUNK_PAGES];
    unsigned nseen;
    DedupAction actions[DEDUP_CHUNK_PAGES];
    unsigned nactions;
    DedupRemote remotes[DEDUP_PROOF_PAGES];
    unsigned nremotes;
    bool is_void;             /* nothing was there: nor may be behind it */
};

typedef struct DedupChunk Chunk;

static uint16_t fingerprint(uint64_t hash)
{
    uint16_t f = hash >> 48;

    return f > FINGERPRINT_ZERO ? f : f + 2;
}

/* What presence says about a page that is not the owner's own any more. */
static void sync_entry(DedupEngine *e, DedupRegion *r, uint32_t page,
                       uint8_t flags)
{
    uint32_t entry = dedup_entry_at(r, page);
    bool memory = flags & (DEDUP_PRESENT | DEDUP_SWAPPED);

    if (entry == DEDUP_OWN || !memory) {
        return;
    }
    if (entry == DEDUP_ZERO) {
        dedup_ledger_set(r, page, DEDUP_OWN);
        if (r->memory == DEDUP_MEMORY_SHARED) {
            dedup_punch_around(r, page, 1);
        }
    } else if (!(entry & DEDUP_BROKEN)) {
        dedup_ledger_set(r, page, entry | DEDUP_BROKEN);
        __atomic_fetch_add(&e->cow_breaks, 1, __ATOMIC_RELAXED);
    }
}

static void hash_page(DedupEngine *e, Chunk *c, uint32_t page)
{
    DedupRegion *r = c->r;
    const uint8_t *addr = dedup_region_addr(r, page);
    Seen *s = &c->seen[c->nseen++];
    uint16_t f;

    s->page = page;
    s->broken = dedup_entry_at(r, page) != DEDUP_OWN;
    s->zero = dedup_page_is_zero(addr);
    s->hash = s->zero ? 0 : dedup_page_hash(addr, e->salt);
    f = s->zero ? FINGERPRINT_ZERO : fingerprint(s->hash);
    s->stable = r->fingerprint[page] == f;
    if (!(r->area[page / DEDUP_CHUNK_PAGES] & DEDUP_AREA_PRINTS)) {
        r->area[page / DEDUP_CHUNK_PAGES] |= DEDUP_AREA_PRINTS;
        r->prints++;
    }
    r->fingerprint[page] = f;
    if (!s->zero) {
        dedup_index_prefetch(e->index, s->hash);
    }
    if (s->stable) {
        r->counting.unshared++;  /* until it is merged below */
    } else {
        r->counting.volatiles++;
    }
}

static void sync_entries(DedupEngine *e, DedupRegion *r, uint32_t first,
                         uint32_t n, const uint8_t *flags)
{
    for (uint32_t i = 0; i < n; i++) {
        sync_entry(e, r, first + i, flags[i]);
    }
}

/*
 * A chunk is come to: presence of all of it, so that its sums are right even
 * if the budget ends within it.  @flags: of its pages.
 */
static bool enter_chunk(DedupEngine *e, Chunk *c, uint8_t *flags)
{
    DedupRegion *r = c->r;
    uint32_t n = MIN(DEDUP_CHUNK_PAGES, r->npages - c->first);
    uint32_t chunk = c->first / DEDUP_CHUNK_PAGES;
    uint32_t own = 0;
    uint8_t any = 0;

    if (!dedup_presence(r, c->first, n, flags)) {
        return false;
    }
    sync_entries(e, r, c->first, n, flags);
    for (uint32_t i = 0; i < n; i++) {
        any |= flags[i];
        own += !!(flags[i] & DEDUP_PRESENT);
    }
    dedup_ledger_own(r, chunk, own);
    c->is_void = !(any & (DEDUP_PRESENT | DEDUP_SWAPPED)) &&
                 !r->sums[chunk].mapped;
    if (c->is_void) {
        c->n = n; /* all of it was seen */
    }
    if (!own) {
        dedup_region_forget(r, chunk, chunk + 1);
    }
    r->area[chunk] &= ~DEDUP_AREA_SPLIT;
    return true;
}

/* The budget ended within the chunk: this is more of it. */
static bool go_on(DedupEngine *e, Chunk *c, uint8_t *flags)
{
    if (!dedup_presence(c->r, c->first, c->n, flags)) {
        return false;
    }
    sync_entries(e, c->r, c->first, c->n, flags);
    return true;
}

/* Step one.  Returns false when the region is gone or we may not scan. */
static bool look(DedupEngine *e, Chunk *c)
{
    DedupRegion *r = c->r;
    uint8_t flags[DEDUP_CHUNK_PAGES];
    DedupCounts *count = &r->counting;
    bool ok = false;

    dedup_lock(e);
    if (!r->dead && !e->blocked &&
        (c->first % DEDUP_CHUNK_PAGES == 0 ? enter_chunk(e, c, flags)
                                           : go_on(e, c, flags))) {
        ok = true;
        if (c->first % DEDUP_CHUNK_PAGES == 0) {
            dedup_ksm_take_chunk(r, c->first);
        }
        dedup_punch_late(r, c->first, c->n);
        for (uint32_t i = 0; i < c->n; i++) {
            uint32_t page = c->first + i;

            count->swapped += !!(flags[i] & DEDUP_SWAPPED);
            if (!(flags[i] & DEDUP_PRESENT)) {
                continue;
            }
            if (dedup_region_pinned(r, page)) {
                count->pinned++;
            } else if ((flags[i] & DEDUP_HUGE) &&
                       !e->active.huge_pages_split) {
                count->huge_kept++;
            } else {
                hash_page(e, c, page);
            }
        }
    }
    dedup_unlock(e);
    return ok;
}

static void add_action(Chunk *c, uint32_t page, DedupSegment *segment,
                       uint32_t index)
{
    c->actions[c->nactions++] = (DedupAction) {
        .page = page, .segment = segment, .index = index,
    };
}

static void ask_remotes(DedupEngine *e, Chunk *c)
{
    if (c->nremotes) {
        dedup_publish_remote(e, c->remotes, c->nremotes);
        c->nremotes = 0;
    }
}

/* Our own hint: who else of us has this page? */
static DedupPair try_own(DedupEngine *e, Chunk *c, const Seen *s,
                         const DedupHint *hint)
{
    DedupRegion *r2;
    uint32_t page2;
    bool found;

    if (hint->kind == DEDUP_HINT_CLAIMED) {
        return DEDUP_PAIR_STALE; /* what we claimed came to nothing */
    }
    if (hint->page == c->r->base + s->page) {
        return DEDUP_PAIR_EQUAL; /* most often: nobody else has it */
    }
    dedup_lock(e);
    found = dedup_region_find(e, hint->page, &r2, &page2);
    dedup_unlock(e);
    return found ? dedup_publish_pair(e, c->r, s->page, r2, page2, s->hash,
                                      hint) : DEDUP_PAIR_STALE;
}

/* A hint that names a member: what is it worth? */
static DedupPair try_member(DedupEngine *e, Chunk *c, const Seen *s,
                            const DedupHint *hint)
{
    if (hint->where == dedup_group_self(e->group)) {
        return try_own(e, c, s, hint);
    }
    if (!dedup_group_alive(e->group, hint->where)) {
        return DEDUP_PAIR_STALE;
    }
    if (hint->kind == DEDUP_HINT_CANDIDATE) {
        c->remotes[c->nremotes++] = (DedupRemote) {
            .region = c->r, .page = s->page, .hash = s->hash, .hint = *hint,
        };
        if (c->nremotes == DEDUP_PROOF_PAGES) {
            ask_remotes(e, c);
        }
    }
    /* claimed: it is published by the time of the next pass */
    return DEDUP_PAIR_EQUAL;
}

/* The index compares only a part of the hash; this is all of it. */
static bool has_hash(DedupEngine *e, const DedupSegment *segment,
                     uint32_t page, uint64_t hash)
{
    return dedup_page_hash(dedup_segment_page(segment, page), e->salt) ==
           hash;
}

/* What to do with one page that is not zero. */
static void decide(DedupEngine *e, Chunk *c, const Seen *s)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    DedupHint mine = {
        .kind = DEDUP_HINT_CANDIDATE,
        .where = dedup_group_self(e->group),
        .page = c->r->base + s->page,
    };
    const DedupHint *stale = NULL;
    unsigned n = dedup_index_lookup(e->index, s->hash, hits);

    for (unsigned i = 0; i < n; i++) {
        DedupSegment *segment;
        bool is_stale;

        if (hits[i].kind != DEDUP_HINT_PUBLISHED) {
            continue;
        }
        segment = dedup_publish_segment(e, c->r, s->page, s->hash, &hits[i],
                                        &is_stale);
        if (is_stale || (segment && hits[i].page >= segment->npages)) {
            stale = &hits[i];
        } else if (segment && has_hash(e, segment, hits[i].page, s->hash)) {
            add_action(c, s->page, segment, hits[i].page);
            return;
        }
    }
    if (!s->stable) {
        return;
    }
    if (dedup_publish_pending(e, c->r, s->page, s->hash)) {
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        if (hits[i].kind == DEDUP_HINT_PUBLISHED) {
            continue;
        }
        switch (try_member(e, c, s, &hits[i])) {
        case DEDUP_PAIR_EQUAL:
            return;
        case DEDUP_PAIR_STALE:
            stale = &hits[i];
            break;
        case DEDUP_PAIR_COLLIDES:
            break; /* it stays beside ours */
        }
    }
    if (stale) {
        dedup_index_replace(e->index, s->hash, stale, &mine);
    } else if (!dedup_index_insert(e->index, s->hash, &mine)) {
        e->pass_limits |= e->index_short ? DEDUP_LIMIT_MEMORY
                                         : DEDUP_LIMIT_INDEX;
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
        while (c->seen[i].page != c->actions[a].page) {
            i++;
        }
        if (c->seen[i].stable) {
            c->r->counting.unshared--;
        } else {
            c->r->counting.volatiles--;
        }
    }
}

/*
 * Broken pages that found no segment page again go back to the region's own
 * memory once they have settled: that frees maps, and segments in the end.
 */
static void settle_broken(DedupEngine *e, Chunk *c)
{
    for (unsigned i = 0; i < c->nseen; i++) {
        const Seen *s = &c->seen[i];
        uint32_t first = s->page;
        uint32_t n = 1;

        if (!s->broken || !s->stable) {
            continue;
        }
        while (i + 1 < c->nseen && c->seen[i + 1].page == first + n &&
               c->seen[i + 1].broken && c->seen[i + 1].stable &&
               n < DEDUP_WINDOW_PAGES) {
            n++;
            i++;
        }
        if (c->r->memory != DEDUP_MEMORY_SHARED && n < SETTLE_PRIVATE) {
            continue;
        }
        dedup_lock(e);
        if (!c->r->dead && !e->blocked && dedup_file_has_room(c->r)) {
            bool all_broken = true;

            for (uint32_t k = first; k < first + n; k++) {
                uint32_t entry = dedup_entry_at(c->r, k);

                all_broken &= dedup_entry_is_segment(entry) &&
                              (entry & DEDUP_BROKEN);
            }
            if (all_broken) {
                dedup_restore_locked(c->r, first, n);
            }
        }
        dedup_unlock(e);
    }
}

static void scan_chunk(DedupEngine *e, Chunk *c)
{
    DedupAction zero;

    c->nseen = c->nactions = c->nremotes = 0;
    if (!look(e, c)) {
        return;
    }
    __atomic_fetch_add(&e->pages_scanned, c->nseen, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < c->nseen; i++) {
        const Seen *s = &c->seen[i];

        if (!s->zero) {
            decide(e, c, s);
        } else if (s->stable && e->active.zero_pages &&
                   dedup_zeroes_action(c->r, s->page, &zero)) {
            add_action(c, s->page, zero.segment, zero.index);
        }
    }
    ask_remotes(e, c);
    if (c->nactions) {
        e->pass_found += dedup_windows(c->r, c->actions, c->nactions,
                                       &e->pass_limits);
        uncount(c);
    }
    settle_broken(e, c);
}

/*
 * Where the pass goes on, at most @most pages; c->n is 0 if nothing is there.
 * False: it is at its end.
 */
static bool next_chunk(DedupEngine *e, Chunk *c, int64_t most)
{
    bool more = true;

    c->n = 0;
    dedup_lock(e);
    c->r = dedup_region_next(e, e->pass_at);
    if (c->r) {
        c->first = dedup_region_at(c->r, e->pass_at);
        if (!c->first || !c->r->prepared) {
            dedup_presence_prepare(c->r);
            c->is_void = true;
        }
        if (c->is_void && c->first % DEDUP_CHUNK_PAGES == 0) {
            more = dedup_skip_void(c->r, &c->first);
        }
        if (more) {
            c->n = MIN(DEDUP_CHUNK_PAGES - c->first % DEDUP_CHUNK_PAGES,
                       c->r->npages - c->first);
            /* a batch smaller than a chunk is honoured, by the page */
            c->n = MIN(c->n, MAX(most, 1));
        }
        __atomic_store_n(&e->pass_at, c->r->base + c->first,
                         __ATOMIC_RELAXED);
    }
    dedup_unlock(e);
    return c->r;
}

static void end_pass(DedupEngine *e)
{
    dedup_publish_flush(e);
    if (dedup_stats_pass(e)) {
        dedup_policy_pass_end(e);
    }
    __atomic_store_n(&e->pass_at, 0, __ATOMIC_RELAXED);
}

void dedup_scan_init(DedupEngine *e)
{
    e->chunk = g_new0(Chunk, 1);
}

void dedup_scan_free(DedupEngine *e)
{
    g_free(e->chunk);
}

size_t dedup_scan_size(void)
{
    return sizeof(Chunk);
}

bool dedup_scan_batch(DedupEngine *e, uint32_t budget)
{
    int64_t left = (int64_t)budget * LOOK_SHARE;
    Chunk *c = e->chunk;
    bool ended = false;

    dedup_forget_looks(e);
    dedup_ksm_look(e);
    while (left > 0 && !ended && dedup_may_scan(e)) {
        if (!next_chunk(e, c, left / LOOK_SHARE)) {
            ended = true;
        } else if (!c->n) {
            left -= LOOK_SHARE;
        } else {
            dedup_policy_index_room(e);
            scan_chunk(e, c);
            /* whoever asks for the figures reads it */
            __atomic_store_n(&e->pass_at, e->pass_at + c->n,
                             __ATOMIC_RELAXED);
            left -= c->n + (int64_t)c->nseen * (LOOK_SHARE - 1);
        }
    }
    if (ended) {
        end_pass(e);
    }
    return ended;
}
