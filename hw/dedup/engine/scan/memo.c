/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the scanner remembers of pages; see memo.h.
 */

#include <string.h>
#include <sys/mman.h>

#include "scan/memo.h"
#include "space/array.h"

#define FINGERPRINT_ZERO 1

static uint32_t chunks_of(const DedupMemo *m)
{
    return (m->npages + DEDUP_CHUNK_PAGES - 1) / DEDUP_CHUNK_PAGES;
}

static size_t bytes_of(const DedupMemo *m)
{
    return (size_t)m->npages * sizeof(m->fingerprint[0]);
}

void dedup_memo_free(gpointer memo)
{
    DedupMemo *m = memo;

    dedup_array_free(m->fingerprint, bytes_of(m));
    dedup_array_free(m->taken, chunks_of(m) * sizeof(m->taken[0]));
    g_free(m);
}

DedupMemo *dedup_memo_new(uint32_t npages)
{
    DedupMemo *m = g_new0(DedupMemo, 1);

    m->npages = npages;
    m->fingerprint = dedup_array_new(bytes_of(m));
    m->taken = dedup_array_new(chunks_of(m) * sizeof(m->taken[0]));
    if (!m->fingerprint || !m->taken) {
        dedup_memo_free(m);
        return NULL;
    }
    return m;
}

static uint16_t fingerprint(uint64_t hash)
{
    uint16_t f = hash >> 48;

    if (!hash) {
        return FINGERPRINT_ZERO;
    }
    return f > FINGERPRINT_ZERO ? f : f + 2;
}

bool dedup_memo_see(DedupMemo *m, uint32_t page, uint64_t hash)
{
    uint16_t f = fingerprint(hash);
    bool stable = m->fingerprint[page] == f;
    bool *taken = &m->taken[page / DEDUP_CHUNK_PAGES];

    m->ntaken += !*taken;
    *taken = true;
    m->fingerprint[page] = f;
    if (stable) {
        m->counting.unshared++;  /* until it is merged */
    } else {
        m->counting.volatiles++;
    }
    return stable;
}

/* The fingerprints of some chunks lie in one page: is none of them needed? */
static void forget_around(DedupMemo *m, uint32_t chunk)
{
    const uint32_t per_page = DEDUP_PAGE_SIZE / sizeof(m->fingerprint[0]);
    const uint32_t chunks = per_page / DEDUP_CHUNK_PAGES;
    uint32_t first = chunk - chunk % chunks;
    uint32_t end = MIN(first + chunks, chunks_of(m));

    for (uint32_t c = first; c < end; c++) {
        if (m->taken[c]) {
            return;
        }
    }
    madvise(m->fingerprint + (size_t)first * DEDUP_CHUNK_PAGES,
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
    sum->huge_kept += m->counting.huge_kept;
    memset(&m->counting, 0, sizeof(m->counting));
}

uint64_t dedup_memo_bytes(const DedupMemo *m)
{
    return sizeof(*m) + dedup_array_resident(m->fingerprint, bytes_of(m)) +
           dedup_array_resident(m->taken, chunks_of(m));
}
