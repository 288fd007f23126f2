/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Room: how much memory this process may take without taking what belongs to
 * another member of its group.
 *
 * A limit of a memory cgroup holds for all processes in it and below it.  So
 * of the room in each cgroup that we are in, the claims of all members that
 * are in it, too, are taken off: what their guests may still grow by, where a
 * segment is to be published, and what they reserved, where something is to
 * be restored.  Members of other groups are not known and not counted.
 *
 * Any thread.
 */

#include "internal.h"

/* What a hostile member may claim at most: far from any overflow. */
#define CLAIM_MAX (1ULL << 50)

uint64_t dedup_owed_bytes(DedupEngine *e)
{
    int64_t total = __atomic_load_n(&e->pages_total, __ATOMIC_RELAXED);
    int64_t own = __atomic_load_n(&e->own_present, __ATOMIC_RELAXED);

    own -= __atomic_load_n(&e->discarded[0], __ATOMIC_RELAXED);
    own -= __atomic_load_n(&e->discarded[1], __ATOMIC_RELAXED);
    return (uint64_t)(total - CLAMP(own, 0, total)) << DEDUP_PAGE_SHIFT;
}

static uint64_t claim(const DedupMemberInfo *info, DedupClaim kind)
{
    uint64_t bytes = kind == DEDUP_CLAIM_RESERVED ? info->reserved_bytes
                                                  : info->owed_bytes;

    if (kind == DEDUP_CLAIM_OWED && info->scanning) {
        bytes = MIN(bytes, CLAIM_MAX) + DEDUP_PUBLISH_BYTES;
    }
    return MIN(bytes, CLAIM_MAX);
}

static bool is_in(const DedupMemberInfo *info, uint64_t cgroup)
{
    for (unsigned i = 0; i < DEDUP_CGROUP_IDS; i++) {
        if (info->cgroups[i] == cgroup) {
            return true;
        }
    }
    return false;
}

static bool other_member(DedupEngine *e, unsigned m, DedupMemberInfo *info)
{
    return m != dedup_group_self(e->group) &&
           dedup_group_member(e->group, m, info);
}

uint64_t dedup_cgroup_room(DedupEngine *e, DedupClaim kind)
{
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS];
    unsigned n = dedup_hostmem_cgroup_rooms(e->hostmem, rooms);
    uint64_t least = UINT64_MAX;

    g_mutex_lock(&e->group_lock);
    for (unsigned m = 0; n && m < DEDUP_MAX_MEMBERS &&
         __atomic_load_n(&e->joined, __ATOMIC_ACQUIRE); m++) {
        DedupMemberInfo info;

        if (!other_member(e, m, &info)) {
            continue;
        }
        for (unsigned i = 0; i < n; i++) {
            if (is_in(&info, rooms[i].id)) {
                rooms[i].bytes -= MIN(rooms[i].bytes, claim(&info, kind));
            }
        }
    }
    g_mutex_unlock(&e->group_lock);
    for (unsigned i = 0; i < n; i++) {
        least = MIN(least, rooms[i].bytes);
    }
    return least;
}

uint64_t dedup_restore_room(DedupEngine *e)
{
    uint64_t host = dedup_hostmem_available(e->hostmem);
    uint64_t room = dedup_cgroup_room(e, DEDUP_CLAIM_RESERVED);

    host -= host == UINT64_MAX ? 0 : MIN(host, DEDUP_SPARE_BYTES);
    g_mutex_lock(&e->group_lock);
    for (unsigned m = 0; m < DEDUP_MAX_MEMBERS &&
         __atomic_load_n(&e->joined, __ATOMIC_ACQUIRE); m++) {
        DedupMemberInfo info;

        if (other_member(e, m, &info)) {
            host -= MIN(host, claim(&info, DEDUP_CLAIM_RESERVED));
        }
    }
    g_mutex_unlock(&e->group_lock);
    return MIN(host, room);
}
