/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The budget of mappings: how many are left, and what may be had for them.
 *
 * The process may have vm.max_map_count of them, QEMU needs some, and beyond
 * the limit it can do nothing at all.
 */

#include <string.h>

#include "space/ledger.h"
#include "space/maps.h"

int64_t dedup_maps_left(DedupSpace *space)
{
    return __atomic_load_n(&space->maps.limit, __ATOMIC_RELAXED) -
           space->maps.other - (int64_t)dedup_ledger_maps(space);
}

uint64_t dedup_space_maps(DedupSpace *space)
{
    uint64_t maps;

    dedup_space_lock(space);
    maps = dedup_ledger_maps(space);
    dedup_space_unlock(space);
    return maps;
}

void dedup_space_count_maps(DedupSpace *space, uint64_t maps)
{
    dedup_space_lock(space);
    space->maps.other = (int64_t)maps - (int64_t)dedup_ledger_maps(space);
    dedup_space_unlock(space);
}

void dedup_space_limit_maps(DedupSpace *space, uint64_t limit)
{
    __atomic_store_n(&space->maps.limit, limit, __ATOMIC_RELAXED);
}

uint64_t dedup_space_maps_used(DedupSpace *space)
{
    uint64_t maps;

    dedup_space_lock(space);
    maps = space->maps.other + dedup_ledger_maps(space);
    dedup_space_unlock(space);
    return maps;
}

/*
 * Is there room for the maps?  The scarcer they are, the longer a run must
 * be: an isolated page costs two maps, a run of 64 costs two as well.
 */
bool dedup_maps_admit(const DedupRegion *r, DedupAction **actions,
                      unsigned *n, unsigned *limits)
{
    DedupSpace *space = r->space;
    int64_t left = dedup_maps_left(space);
    int64_t limit = __atomic_load_n(&space->maps.limit, __ATOMIC_RELAXED);
    unsigned least = left < limit / 10 ? 16 : left < limit / 4 ? 4 : 1;
    unsigned kept = 0;
    int64_t needed = 4; /* the window's own registration splits maps */

    for (unsigned i = 0, j; i < *n; i = j) {
        DedupAction *a = actions[i];

        for (j = i + 1; j < *n &&
             actions[j]->page == a->page + (j - i) &&
             actions[j]->holding == a->holding &&
             (!a->holding || actions[j]->index == a->index + (j - i));
             j++) {
            ;
        }
        if (a->holding || r->info.memory == DEDUP_MEMORY_PRIVATE_FILE) {
            if ((a->holding && j - i < least) || left < needed + 2) {
                *limits |= DEDUP_LIMIT_MAPS;
                continue;
            }
            needed += 2;
        }
        memmove(&actions[kept], &actions[i],
                (j - i) * sizeof(actions[0]));
        kept += j - i;
    }
    *n = kept;
    return kept > 0;
}
