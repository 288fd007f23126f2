/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Discards: the region's owner throws pages away, and the engine must not
 * bring them back.  See dedup_engine_discard_begin().
 */

#include "space/ledger.h"
#include "space/own.h"
#include "space/poison.h"
#include "space/presence.h"

/*
 * Does something else than the region's own mapping stand there?  In a private
 * file a dropped page is anonymous memory.
 */
static bool is_mapped_over(const DedupRegion *r, uint32_t entry)
{
    return dedup_entry_is_segment(entry) ||
           (entry == DEDUP_ZERO &&
            r->info.memory == DEDUP_MEMORY_PRIVATE_FILE);
}

static bool discard_locked(DedupRegion *r, uint32_t first, uint32_t n)
{
    uint32_t end = first + n;

    for (uint32_t i = dedup_ledger_next(r, first, end), run; i < end;
         i = dedup_ledger_next(r, i + run, end)) {
        uint32_t entry = dedup_entry_at(r, i);
        bool segment;

        run = 1;
        if (dedup_entry_is_segment(entry)) {
            run = dedup_ledger_run(r, i, MIN(end, i + DEDUP_WINDOW_PAGES),
                                   dedup_entry_is_segment, &segment);
        }
        if (is_mapped_over(r, entry) && !dedup_own_map_whole(r, i, run)) {
            return false;
        }
        for (uint32_t k = i; k < i + run; k++) {
            dedup_ledger_absent(r, k);
        }
    }
    return true;
}

/* Own pages lose what they have: from now on it is owed to the guest. */
static void forget_own(DedupRegion *r, uint32_t first, uint32_t end)
{
    uint8_t flags[DEDUP_CHUNK_PAGES];
    uint32_t n;

    for (; first < end; first += n) {
        bool known;

        n = 0;
        if (end - first >= DEDUP_CHUNK_PAGES &&
            first % DEDUP_CHUNK_PAGES == 0 && !dedup_skip_void(r, &first)) {
            continue;
        }
        if (first >= end) {
            break;
        }
        n = MIN(end - first, DEDUP_CHUNK_PAGES - first % DEDUP_CHUNK_PAGES);
        known = dedup_presence(r, first, n, flags);
        for (uint32_t i = 0; i < n; i++) {
            if ((!known || (flags[i] & DEDUP_PRESENT)) &&
                dedup_entry_at(r, first + i) == DEDUP_OWN) {
                dedup_ledger_absent(r, first + i);
            }
        }
    }
}

bool dedup_space_discard_begin(DedupSpace *space, void *host, uint64_t size)
{
    const uint8_t *end = (const uint8_t *)host + size;
    bool ok = true;

    dedup_space_lock(space);
    for (unsigned i = 0; i < space->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(space->regions, i);
        uint32_t first, n;

        if (dedup_region_intersect(r, host, end, &first, &n)) {
            forget_own(r, first, first + n);
            dedup_poison_forget(r, first, n);
            ok &= discard_locked(r, first, n);
        }
    }
    if (!ok) {
        dedup_space_unlock(space);
    }
    return ok;
}

void dedup_space_discard_end(DedupSpace *space)
{
    dedup_space_unlock(space);
}
