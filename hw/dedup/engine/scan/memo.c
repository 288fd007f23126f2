/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the scanner remembers of pages; see memo.h.
 */

#include <string.h>
#include <sys/mman.h>

#include "host/mutant.h"
#include "host/sys.h"
#include "scan/memo.h"
#include "space/array.h"

/* ---- a page's bits ---- */

#define FINGERPRINT_BITS 11
#define FINGERPRINT_MASK ((1u << FINGERPRINT_BITS) - 1)
#define FINGERPRINT_ZERO 1
#define PATIENCE_SHIFT FINGERPRINT_BITS
#define PATIENCE_MASK (15u << PATIENCE_SHIFT)
/* A page is looked at once in 2^PATIENCE_MOST s, 17 minutes, at least. */
#define PATIENCE_MOST 10
#define DOUBT (1u << 15)

/* How long a chunk rests: from 8 s on, an hour at most. */
#define REST_S 8
#define REST_LEVELS 9
/*
 * It rests if one of so many merged pages was written within that time, and at
 * least a few.
 */
#define BROKE_SHARE 8
#define BROKE_LEAST 8
/* Then so few pages are tried, and so many times more after some seconds. */
#define TRIES_FIRST 4
#define TRIES_FACTOR 4
#define TRIES_S 2
/* After so many times its rest without harm it is trusted more again. */
#define TRUST_FACTOR 8

static uint32_t chunks_of(const DedupMemo *m)
{
    return (m->npages + DEDUP_CHUNK_PAGES - 1) / DEDUP_CHUNK_PAGES;
}

static size_t bytes_of(const DedupMemo *m)
{
    return (size_t)m->npages * sizeof(m->pages[0]);
}

void dedup_memo_free(gpointer memo)
{
    DedupMemo *m = memo;

    dedup_array_free(m->pages, bytes_of(m));
    dedup_array_free(m->rest, chunks_of(m) * sizeof(m->rest[0]));
    dedup_array_free(m->taken, chunks_of(m) * sizeof(m->taken[0]));
    g_free(m);
}

DedupMemo *dedup_memo_new(uint32_t npages)
{
    DedupMemo *m = g_new0(DedupMemo, 1);

    m->npages = npages;
    m->pages = dedup_array_new(bytes_of(m));
    m->rest = dedup_array_new(chunks_of(m) * sizeof(m->rest[0]));
    m->taken = dedup_array_new(chunks_of(m) * sizeof(m->taken[0]));
    if (!m->pages || !m->rest || !m->taken) {
        dedup_memo_free(m);
        return NULL;
    }
    return m;
}

static unsigned patience_of(const DedupMemo *m, uint32_t page)
{
    return (m->pages[page] & PATIENCE_MASK) >> PATIENCE_SHIFT;
}

/* Pages of the same patience are not all due at the same time. */
bool dedup_memo_is_due(DedupMemo *m, uint32_t page,
                       const DedupMemoClock *clock)
{
    unsigned patience = m->taken[page / DEDUP_CHUNK_PAGES] ?
                        patience_of(m, page) : 0;
    uint32_t offset = page * 0x9e3779b1u >> 16;
    bool due = !patience || (clock->now + offset) >> patience !=
                            (clock->before + offset) >> patience;

    m->counting.volatiles += !due;
    return due;
}

static uint16_t fingerprint(uint64_t hash)
{
    uint16_t f = hash >> (64 - FINGERPRINT_BITS);

    if (!hash) {
        return FINGERPRINT_ZERO;
    }
    return f > FINGERPRINT_ZERO ? f : f + 2;
}

static void enter(DedupMemo *m, uint32_t page, uint16_t bits)
{
    bool *taken = &m->taken[page / DEDUP_CHUNK_PAGES];

    m->ntaken += !*taken;
    *taken = true;
    m->pages[page] = bits;
}

bool dedup_memo_see(DedupMemo *m, uint32_t page, uint64_t hash)
{
    uint16_t f = fingerprint(hash);
    uint16_t known = m->pages[page] & FINGERPRINT_MASK;
    bool stable = known == f || (!known && m->begun <= 1);

    enter(m, page, f | (m->pages[page] & PATIENCE_MASK) |
                   (stable ? m->pages[page] & DOUBT : 0));
    if (stable) {
        m->counting.unshared++;  /* until it is merged */
    } else {
        m->counting.volatiles++;
    }
    return stable;
}

void dedup_memo_merged(DedupMemo *m, bool stable)
{
    uint64_t *count = stable ? &m->counting.unshared : &m->counting.volatiles;

    *count -= *count > 0;
}

void dedup_memo_broke(DedupMemo *m, uint32_t page)
{
    unsigned patience = MIN(patience_of(m, page) + 1, PATIENCE_MOST);

    if (!DEDUP_NEVER_RESTS) {
        enter(m, page, patience << PATIENCE_SHIFT);
    }
}

bool dedup_memo_doubts(const DedupMemo *m, uint32_t page)
{
    return m->pages[page] & DOUBT;
}

void dedup_memo_doubt(DedupMemo *m, uint32_t page)
{
    enter(m, page, m->pages[page] | DOUBT);
}

/* ---- chunks ---- */

/* None has ever rested: then nothing is read, which might take memory. */
static const DedupRest *rest_of(const DedupMemo *m, uint32_t chunk)
{
    static const DedupRest none;

    return m->nrests ? &m->rest[chunk] : &none;
}

bool dedup_memo_rests(const DedupMemo *m, uint32_t chunk, uint32_t now)
{
    const DedupRest *rest = rest_of(m, chunk);

    return rest->level && now < rest->until;
}

static void begin_rest(DedupMemo *m, DedupRest *rest, uint32_t now)
{
    m->nrests += !rest->level;
    rest->until = now + (REST_S << rest->level);
    rest->since = rest->until;
    rest->level = MIN(rest->level + 1, REST_LEVELS);
    rest->tries = TRIES_FIRST;
    rest->broke = 0;
}

/* What was tried has not been written: try more. */
static void trust(DedupMemo *m, DedupRest *rest, uint32_t now)
{
    if (rest->tries < DEDUP_CHUNK_PAGES) {
        if (now - rest->since >= TRIES_S) {
            rest->tries *= TRIES_FACTOR;
            rest->since = now;
        }
    } else if (now - rest->since >= TRUST_FACTOR * (REST_S << rest->level)) {
        rest->level--;
        rest->since = now;
        m->nrests -= !rest->level;
    }
}

void dedup_memo_judge(DedupMemo *m, uint32_t chunk, uint32_t now,
                      unsigned kept, unsigned broke)
{
    DedupRest *rest;

    if (dedup_memo_rests(m, chunk, now)) {
        return; /* what was merged before breaks: that is known */
    }
    if (!broke) {
        if (rest_of(m, chunk)->level && kept) {
            trust(m, &m->rest[chunk], now);
        }
        return;
    }
    if (DEDUP_NEVER_RESTS) {
        return;
    }
    rest = &m->rest[chunk];
    if (now - rest->counting > REST_S) {
        rest->counting = now;
        rest->broke = 0;
    }
    rest->broke = MIN(rest->broke + broke, DEDUP_CHUNK_PAGES);
    if (rest->broke >= (rest->level ? 1 : BROKE_LEAST) &&
        rest->broke * BROKE_SHARE >= kept + rest->broke) {
        begin_rest(m, rest, now);
    }
}

unsigned dedup_memo_may_merge(const DedupMemo *m, uint32_t chunk)
{
    const DedupRest *rest = rest_of(m, chunk);

    return rest->level ? rest->tries : DEDUP_CHUNK_PAGES;
}

/* What is kept of some chunks lies in one page: is none of them needed? */
static void forget_around(DedupMemo *m, uint32_t chunk)
{
    const uint32_t per_page = DEDUP_PAGE_SIZE / sizeof(m->pages[0]);
    const uint32_t chunks = per_page / DEDUP_CHUNK_PAGES;
    uint32_t first = chunk - chunk % chunks;
    uint32_t end = MIN(first + chunks, chunks_of(m));

    for (uint32_t c = first; c < end; c++) {
        if (m->taken[c]) {
            return;
        }
    }
    sys_madvise(m->pages + (size_t)first * DEDUP_CHUNK_PAGES,
                DEDUP_PAGE_SIZE, MADV_DONTNEED);
}

void dedup_memo_forget(DedupMemo *m, uint32_t chunk, uint32_t n)
{
    for (uint32_t c = chunk; m->ntaken && c < chunk + n; c++) {
        if (m->taken[c]) {
            m->taken[c] = false;
            m->ntaken--;
            forget_around(m, c);
        }
    }
}

void dedup_memo_take_counts(DedupMemo *m, DedupCounts *sum)
{
    sum->unshared += m->counting.unshared;
    sum->volatiles += m->counting.volatiles;
    sum->pinned += m->counting.pinned;
    sum->swapped += m->counting.swapped;
    sum->poisoned += m->counting.poisoned;
    sum->huge_kept += m->counting.huge_kept;
    memset(&m->counting, 0, sizeof(m->counting));
}

uint64_t dedup_memo_bytes(const DedupMemo *m)
{
    return sizeof(*m) + dedup_array_resident(m->pages, bytes_of(m)) +
           dedup_array_resident(m->rest, chunks_of(m) * sizeof(m->rest[0])) +
           dedup_array_resident(m->taken, chunks_of(m));
}
