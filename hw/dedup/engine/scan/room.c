/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How much memory this process may take without taking what belongs to
 * another member of its group; see room.h.
 *
 * A limit of a memory cgroup holds for all processes in it and below it.  So
 * of the room in each cgroup that we are in, the claims of all members that
 * are in it, too, are taken off: what their guests may still grow by, where a
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

#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "internal.h"
#include "ksm.h"

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

/* What a hostile member may claim at most: far from any overflow. */
#define CLAIM_MAX (1ULL << 50)

uint64_t dedup_owed_bytes(DedupEngine *e)
{
    int64_t total = __atomic_load_n(&e->pages_total, __ATOMIC_RELAXED);
    int64_t own = __atomic_load_n(&e->own_present, __ATOMIC_RELAXED);

    own -= dedup_ksm_shared_bytes(e) >> DEDUP_PAGE_SHIFT;
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

/* What is taken off for the other members. */
typedef struct Claims {
    DedupClaim kind;
    DedupCgroupRoom *rooms;   /* @n of them, each less the claims in it */
    unsigned n;
    uint64_t host;            /* less all claims */
} Claims;

static void take_off(void *opaque, unsigned member, bool self,
                     const DedupMemberInfo *info)
{
    Claims *c = opaque;
    uint64_t bytes = claim(info, c->kind);

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

static uint64_t least_room(const Claims *c)
{
    uint64_t least = UINT64_MAX;

    for (unsigned i = 0; i < c->n; i++) {
        least = MIN(least, c->rooms[i].bytes);
    }
    return least;
}

uint64_t dedup_cgroup_room(DedupEngine *e, DedupClaim kind)
{
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS];
    Claims c = { .kind = kind, .rooms = rooms };

    c.n = dedup_hostmem_cgroup_rooms(e->hostmem, rooms);
    if (c.n) {
        dedup_group_foreach_member(e->group, take_off, &c);
    }
    return least_room(&c);
}

/* What is there for the holder of @res, and who has the least: *@who. */
static uint64_t room_for(DedupEngine *e, const DedupReservation *res,
                         const char **who)
{
    uint64_t taken = __atomic_load_n(&e->reserved_bytes, __ATOMIC_RELAXED);
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS];
    Claims c = { .kind = DEDUP_CLAIM_RESERVED, .rooms = rooms };
    uint64_t room;

    c.n = dedup_hostmem_cgroup_rooms(e->hostmem, rooms);
    c.host = dedup_hostmem_available(e->hostmem);
    c.host -= c.host == UINT64_MAX ? 0 : MIN(c.host, DEDUP_SPARE_BYTES);
    dedup_group_foreach_member(e->group, take_off, &c);
    room = least_room(&c);
    taken -= MIN(taken, res->bytes);
    *who = room < c.host ? "the memory cgroup" : "the host";
    room = MIN(c.host, room);
    return room - MIN(room, taken);
}

uint64_t dedup_restore_room(DedupEngine *e)
{
    const char *who;

    return room_for(e, &(DedupReservation) { 0 }, &who);
}

/* ---- file systems ---- */

/* What the file system of an open file has left; tmpfs without a size: all. */
static uint64_t file_room(int fd)
{
    struct statfs sfs;

    if (fstatfs(fd, &sfs) < 0) {
        return 0;
    }
    return sfs.f_blocks ? (uint64_t)sfs.f_bavail * sfs.f_bsize : UINT64_MAX;
}

void dedup_need_add(DedupNeed *need, DedupRegion *r, uint64_t pages)
{
    /* none of them has memory in the file */
    uint64_t bytes = MIN(pages, dedup_region_mapped(r)) << DEDUP_PAGE_SHIFT;
    uint64_t broken = MIN(r->broken, dedup_ksm_shared_bytes(r->engine) >>
                                     DEDUP_PAGE_SHIFT);
    unsigned i;

    /* broken pages have their memory already, unless KSM shares it */
    need->memory += MIN(pages, r->merged + r->zero_mapped + broken) <<
                    DEDUP_PAGE_SHIFT;
    if (!r->bounded || !bytes) {
        return;
    }
    for (i = 0; i < need->nfiles && need->files[i].dev != r->dev; i++) {
        ;
    }
    if (i == DEDUP_NEED_FILES) {
        i--; /* the free space of one for the needs of two: the safe side */
    } else if (i == need->nfiles) {
        need->nfiles++;
        need->files[i].dev = r->dev;
        need->files[i].bytes = 0;
        need->files[i].free = UINT64_MAX;
    }
    need->files[i].bytes += bytes;
    need->files[i].free = MIN(need->files[i].free, file_room(r->fd));
    g_strlcpy(need->files[i].id, r->id, sizeof(need->files[i].id));
}

bool dedup_file_has_room(DedupRegion *r)
{
    GPtrArray *regions = r->engine->regions;
    uint64_t owed = 0;

    if (!r->bounded) {
        return true;
    }
    for (unsigned i = 0; i < regions->len; i++) {
        const DedupRegion *other = g_ptr_array_index(regions, i);

        if (other->bounded && other->dev == r->dev) {
            owed += dedup_region_mapped(other);
        }
    }
    return file_room(r->fd) >= owed << DEDUP_PAGE_SHIFT;
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
static void hold(DedupEngine *e, DedupReservation *res, uint64_t bytes)
{
    /* wraps around where it gets less */
    uint64_t all = __atomic_add_fetch(&e->reserved_bytes, bytes - res->bytes,
                                      __ATOMIC_RELAXED);

    res->bytes = bytes;
    dedup_group_tell_reserved(e->group, all);
}

bool dedup_reserve(DedupEngine *e, DedupReservation *res,
                   const DedupNeed *need, bool force, GError **error)
{
    uint64_t before = res->bytes;
    uint64_t room;
    const char *who;

    /* reserve first, then look: two that ask at once see each other */
    hold(e, res, need->memory);
    if (force || DEDUP_MUTANT(NO_GATE)) {
        return true;
    }
    room = room_for(e, res, &who);
    room -= MIN(room, margin(need->memory));
    if (need->memory > room) {
        set_memory_error(error, need->memory, who, room);
    } else if (check_files(need, UINT64_MAX, error)) {
        return true;
    }
    hold(e, res, before);
    return false;
}

uint64_t dedup_reserve_next(DedupEngine *e, DedupReservation *res,
                            const DedupNeed *rest, bool force,
                            GError **error)
{
    uint64_t room;
    const char *who;

    hold(e, res, rest->memory);
    if (force || DEDUP_MUTANT(NO_GATE)) {
        return STEP_MOST;
    }
    room = room_for(e, res, &who);
    room -= MIN(room, margin(rest->memory));
    if (MIN(rest->memory, STEP_LEAST) > room) {
        set_memory_error(error, rest->memory, who, room);
        return 0;
    }
    if (!check_files(rest, STEP_LEAST, error)) {
        return 0;
    }
    return CLAMP(room / STEP_SHARE, STEP_LEAST, STEP_MOST);
}

void dedup_unreserve(DedupEngine *e, DedupReservation *res)
{
    if (res->bytes) {
        hold(e, res, 0);
    }
}
