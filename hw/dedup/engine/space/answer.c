/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What this member answers to others: hashes of pages that it may have; see
 * answer.h.
 */

#include "space/answer.h"
#include "space/array.h"
#include "space/ledger.h"
#include "space/presence.h"

/* For 512 MiB; if there are more, one takes another's place. */
#define KNOWN_CHUNKS 256
#define KNOWN_BYTES (KNOWN_CHUNKS * sizeof(DedupKnownChunk))
/*
 * That a page is there may have been found out so long ago: it may have been
 * swapped out since; and that it is not, as the guest may have touched it.
 */
#define KNOWN_US G_TIME_SPAN_SECOND
#define ABSENT_US (20 * G_TIME_SPAN_MILLISECOND)

static bool is_known(const DedupKnownChunk *known, const DedupRegion *r,
                     uint32_t chunk, int64_t most_us, int64_t now)
{
    return known->region == r && known->chunk == chunk &&
           known->strangers == r->space->lock.strangers &&
           now - known->since_us < most_us;
}

static bool has(const DedupKnownChunk *known, uint32_t i)
{
    return known->present[i / 64] >> i % 64 & 1;
}

static bool look(DedupKnownChunk *known, DedupRegion *r, uint32_t chunk,
                 int64_t now)
{
    uint32_t first = chunk * DEDUP_CHUNK_PAGES;
    uint32_t n = MIN(DEDUP_CHUNK_PAGES, r->npages - first);
    uint8_t flags[DEDUP_CHUNK_PAGES];

    if (!dedup_presence(r, first, n, flags)) {
        return false;
    }
    *known = (DedupKnownChunk) {
        .region = r, .chunk = chunk, .since_us = now,
        .strangers = r->space->lock.strangers,
    };
    for (uint32_t i = 0; i < n; i++) {
        known->present[i / 64] |=
            (uint64_t)!!(flags[i] & DEDUP_PRESENT) << i % 64;
    }
    return true;
}

/* Does a page have memory?  Others ask for pages in whatever order. */
static bool is_present(DedupAnswers *a, DedupRegion *r, uint32_t page)
{
    uint32_t chunk = page / DEDUP_CHUNK_PAGES;
    uint32_t i = page % DEDUP_CHUNK_PAGES;
    int64_t now = g_get_monotonic_time();
    DedupKnownChunk *known;

    if (!a->known) {
        return false;
    }
    known = &a->known[(r->base / DEDUP_CHUNK_PAGES + chunk) % KNOWN_CHUNKS];
    if (is_known(known, r, chunk, KNOWN_US, now) && has(known, i)) {
        return true;
    }
    return (is_known(known, r, chunk, ABSENT_US, now) ||
            look(known, r, chunk, now)) && has(known, i);
}

/* The page with that number, if it is there.  Remap lock held. */
static const uint8_t *find_content(DedupSpace *space, uint32_t member_page,
                                   bool merged)
{
    DedupRegion *r;
    uint32_t page, entry;

    if (!dedup_region_find(space, member_page, &r, &page)) {
        return NULL;
    }
    entry = dedup_entry_at(r, page);
    if (!dedup_entry_is_private(entry)) {
        /* a merged page is there, without memory of its own */
        return merged && dedup_entry_is_segment(entry) ?
               dedup_region_addr(r, page) : NULL;
    }
    return is_present(&space->answers, r, page) ? dedup_region_addr(r, page)
                                                : NULL;
}

/* Others may want the lock: it is given up after so many pages. */
#define PEER_PAGES 16

void dedup_space_keyed_hashes(DedupSpace *space, DedupOwnPage *pages,
                              unsigned n, const uint8_t *secret)
{
    for (unsigned i = 0, end; i < n; i = end) {
        end = MIN(i + PEER_PAGES, n);
        dedup_space_lock_to_read(space);
        for (unsigned k = i; k < end; k++) {
            const uint8_t *content = find_content(space, pages[k].page, true);

            pages[k].is_there = content &&
                dedup_page_keyed_hash(content, secret, &pages[k].hash);
        }
        dedup_space_unlock(space);
    }
}

void dedup_space_hashes(DedupSpace *space, const DedupOwnPage *pages,
                        unsigned n, uint64_t salt, uint64_t *hashes)
{
    for (unsigned i = 0, end; i < n; i = end) {
        end = MIN(i + PEER_PAGES, n);
        dedup_space_lock_to_read(space);
        for (unsigned k = i; k < end; k++) {
            const uint8_t *content = pages[k].is_there ?
                find_content(space, pages[k].page, false) : NULL;

            hashes[k] = content ? dedup_page_hash(content, salt)
                                : DEDUP_UNREADABLE;
        }
        dedup_space_unlock(space);
    }
}

void dedup_answers_init(DedupAnswers *a)
{
    a->known = dedup_array_new(KNOWN_BYTES);
}

uint64_t dedup_answers_bytes(const DedupAnswers *a)
{
    return a->known ? dedup_array_resident(a->known, KNOWN_BYTES) : 0;
}

void dedup_answers_clear(DedupAnswers *a)
{
    dedup_array_free(a->known, KNOWN_BYTES);
    a->known = NULL;
}
