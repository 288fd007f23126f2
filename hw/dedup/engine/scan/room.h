/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Room: the one gate for memory that is taken on somebody's behalf.
 *
 * Whoever gives merged pages their own memory (an unmerge, a region that its
 * owner wants back, a segment that is left) takes memory that the host, a
 * memory cgroup or the file system of the RAM's file may not have.  There the
 * answer is no error code but the OOM killer, or SIGBUS for the guest.  So it
 * is reserved and looked for first, and again on the way, because others take
 * memory meanwhile.  What is taken from KSM for a moment nobody reserves: it is
 * bounded by dedup_restore_room().
 *
 * Terms:
 *   need         what something will take: memory, and blocks of file systems
 *   reservation  memory that we are about to take: no other taker in this
 *                process, nor another member of the group, counts on it
 *   owed         what the guest may take at any time: pages without memory
 *                of their own, and what else its devices may take for it
 *
 * Any thread.  A DedupReservation belongs to its taker.
 */

#ifndef DEDUP_ROOM_H
#define DEDUP_ROOM_H

#include "group/group.h"
#include "host/hostmem.h"
#include "space/need.h"

/* Keep this much of MemAvailable for everybody else. */
#define DEDUP_SPARE_BYTES (64ULL << 20)

/* What a member may publish between two looks at the room. */
#define DEDUP_PUBLISH_BYTES (2 * DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE)

/* What of the other members' memory is taken off. */
typedef enum DedupOwed {
    DEDUP_OWED_GROWTH,        /* what they may still grow by, and publish */
    DEDUP_OWED_RESERVED,      /* what they are about to restore */
} DedupOwed;

typedef struct DedupRoom {
    DedupHostMem *hostmem;
    DedupGroup *group;
    DedupSpace *space;
    const uint64_t *beside;   /* what is owed beside our RAM; atomic, or NULL */
    uint64_t reserved;        /* atomic: the sum of all reservations, bytes */
} DedupRoom;

typedef struct DedupReservation {
    uint64_t bytes;
} DedupReservation;

/* What we may still grow by: pages without memory of their own, and beside. */
uint64_t dedup_owed_bytes(DedupRoom *room);
/* Bytes until a limit of our cgroups binds; UINT64_MAX if none has one. */
uint64_t dedup_cgroup_room(DedupRoom *room, DedupOwed kind);
/* What the host and the cgroups can give to one more taker. */
uint64_t dedup_restore_room(DedupRoom *room);

/*
 * Reserve @need in place of what @res holds.  False and DEDUP_ERROR_MEMORY
 * with the figures if it is not there, unless @force: @res is as before then.
 */
bool dedup_reserve(DedupRoom *room, DedupReservation *res,
                   const DedupNeed *need, bool force, GError **error);

/*
 * On the way: @rest is what is still to be taken of @res.  Returns how many
 * bytes may be taken until the next look; 0 and DEDUP_ERROR_MEMORY if there
 * is no room any more.
 */
uint64_t dedup_reserve_next(DedupRoom *room, DedupReservation *res,
                            const DedupNeed *rest, bool force,
                            GError **error);

/* All was taken, or will not be. */
void dedup_unreserve(DedupRoom *room, DedupReservation *res);

#endif /* DEDUP_ROOM_H */
