/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How much memory this process may take without taking what belongs to
 * another member of its group; see room.h.
 *
 * A limit of a memory cgroup holds for all processes in it and below it.  So
 * of the room in each cgroup that we are in, what is owed to all members that
 * are in it, too, is taken off: what their guests may still grow by, where a
 * segment is to be published, and what they reserved, where something is to
 * be restored.  Members of other groups are not known and not counted.
 *
 * A file system is asked with statfs().  What other members have reserved
 * there is not known: who comes second may find it full on the way, and ends
 * with an error.
 *
 * On the way, the less room there is the more often it is looked at: the
 * guest, which runs on, may take several times what we take in one step
 * before a limit binds.
 */

#include "host/mutant.h"
#include "scan/room.h"

/* A step takes this share of the room, but not more nor less than these. */
#define STEP_SHARE 8
#define STEP_MOST (64ULL << 20)
#define STEP_LEAST (1ULL << 20)

/*
 * What is left in any case: a window's copies, and page tables and mappings,
 * which are charged, too.
 */
#define MARGIN_BYTES (4ULL << 20)
#define MARGIN_SHARE 128

/* What a hostile member may be owed at most: far from any overflow. */
#define OWED_MAX (1ULL << 50)

uint64_t dedup_owed_bytes(DedupRoom *room)
{
    DedupSpaceSums sums;
    int64_t total, own;

    dedup_space_sums(room->space, &sums);
    total = sums.total;
    own = (int64_t)sums.own -
          (int64_t)(dedup_space_ksm_bytes(room->space) >> DEDUP_PAGE_SHIFT);
    return ((uint64_t)(total - CLAMP(own, 0, total)) << DEDUP_PAGE_SHIFT) +
           (room->beside ? __atomic_load_n(room->beside, __ATOMIC_RELAXED) : 0);
}

static uint64_t owed_by(const DedupMemberInfo *info, DedupOwed kind)
{
    uint64_t bytes = kind == DEDUP_OWED_RESERVED ? info->reserved_bytes
                                                  : info->owed_bytes;

    if (kind == DEDUP_OWED_GROWTH && info->scanning &&
        !info->estimates) {
        bytes = MIN(bytes, OWED_MAX) + DEDUP_PUBLISH_BYTES;
    }
    return MIN(bytes, OWED_MAX);
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

/* What is taken off for the other members. */
typedef struct Others {
    DedupOwed kind;
    DedupCgroupRoom *rooms;   /* @n of them, each less what is owed in it */
    unsigned n;
    uint64_t host;            /* less all of it */
} Others;

static void take_off(void *opaque, unsigned member, bool self,
                     const DedupMemberInfo *info)
{
    Others *c = opaque;
    uint64_t bytes = owed_by(info, c->kind);

    if (self) {
        return;
    }
    c->host -= MIN(c->host, bytes);
    for (unsigned i = 0; i < c->n; i++) {
        if (is_in(info, c->rooms[i].id)) {
            c->rooms[i].bytes -= MIN(c->rooms[i].bytes, bytes);
        }
    }
}

static uint64_t least_room(const Others *c)
{
    uint64_t least = UINT64_MAX;

    for (unsigned i = 0; i < c->n; i++) {
        least = MIN(least, c->rooms[i].bytes);
    }
    return least;
}

uint64_t dedup_cgroup_room(DedupRoom *room, DedupOwed kind)
{
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS];
    Others c = { .kind = kind, .rooms = rooms };

    c.n = dedup_hostmem_cgroup_rooms(room->hostmem, rooms);
    if (c.n) {
        dedup_group_foreach_member(room->group, take_off, &c);
    }
    return least_room(&c);
}

/* What is there for the holder of @res, and who has the least: *@who. */
static uint64_t room_for(DedupRoom *room, const DedupReservation *res,
                         const char **who)
{
    uint64_t taken = __atomic_load_n(&room->reserved, __ATOMIC_RELAXED);
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS];
    Others c = { .kind = DEDUP_OWED_RESERVED, .rooms = rooms };
    uint64_t left;

    c.n = dedup_hostmem_cgroup_rooms(room->hostmem, rooms);
    c.host = dedup_hostmem_available(room->hostmem);
    c.host -= c.host == UINT64_MAX ? 0 : MIN(c.host, DEDUP_SPARE_BYTES);
    dedup_group_foreach_member(room->group, take_off, &c);
    left = least_room(&c);
    taken -= MIN(taken, res->bytes);
    *who = left < c.host ? "the memory cgroup" : "the host";
    left = MIN(c.host, left);
    return left - MIN(left, taken);
}

uint64_t dedup_restore_room(DedupRoom *room)
{
    const char *who;

    return room_for(room, &(DedupReservation) { 0 }, &who);
}

/* ---- the gate ---- */

static void set_memory_error(GError **error, uint64_t needed, const char *who,
                             uint64_t available)
{
    g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY,
                "giving merged pages their own memory takes %"
                G_GUINT64_FORMAT " MiB, but %s has only %" G_GUINT64_FORMAT
                " MiB to spare", (needed + (1 << 20) - 1) >> 20, who,
                available >> 20);
}

/* Do the file systems have @least bytes, and all that is needed, if less? */
static bool check_files(const DedupNeed *need, uint64_t least,
                        GError **error)
{
    for (unsigned i = 0; i < need->nfiles; i++) {
        g_autofree char *who = NULL;

        if (MIN(need->files[i].bytes, least) <= need->files[i].free) {
            continue;
        }
        who = g_strdup_printf("the file system of memory '%s'",
                              need->files[i].id);
        set_memory_error(error, need->files[i].bytes, who,
                         need->files[i].free);
        return false;
    }
    return true;
}

static uint64_t margin(uint64_t bytes)
{
    return bytes ? MARGIN_BYTES + bytes / MARGIN_SHARE : 0;
}

/* Change what @res holds, and tell the others. */
static void hold(DedupRoom *room, DedupReservation *res, uint64_t bytes)
{
    /* wraps around where it gets less */
    __atomic_fetch_add(&room->reserved, bytes - res->bytes, __ATOMIC_RELAXED);
    res->bytes = bytes;
    dedup_group_tell_reserved(room->group, &room->reserved);
}

bool dedup_reserve(DedupRoom *room, DedupReservation *res,
                   const DedupNeed *need, bool force, GError **error)
{
    uint64_t before = res->bytes;
    uint64_t left;
    const char *who;

    /* reserve first, then look: two that ask at once see each other */
    hold(room, res, need->memory);
    if (force || DEDUP_MUTANT(NO_GATE)) {
        return true;
    }
    left = room_for(room, res, &who);
    left -= MIN(left, margin(need->memory));
    if (need->memory > left) {
        set_memory_error(error, need->memory, who, left);
    } else if (check_files(need, UINT64_MAX, error)) {
        return true;
    }
    hold(room, res, before);
    return false;
}

uint64_t dedup_reserve_next(DedupRoom *room, DedupReservation *res,
                            const DedupNeed *rest, bool force,
                            GError **error)
{
    uint64_t left;
    const char *who;

    hold(room, res, rest->memory);
    if (force || DEDUP_MUTANT(NO_GATE)) {
        return STEP_MOST;
    }
    left = room_for(room, res, &who);
    left -= MIN(left, margin(rest->memory));
    if (MIN(rest->memory, STEP_LEAST) > left) {
        set_memory_error(error, rest->memory, who, left);
        return 0;
    }
    if (!check_files(rest, STEP_LEAST, error)) {
        return 0;
    }
    return CLAMP(left / STEP_SHARE, STEP_LEAST, STEP_MOST);
}

void dedup_unreserve(DedupRoom *room, DedupReservation *res)
{
    if (res->bytes) {
        hold(room, res, 0);
    }
}
