/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A group as its member sees it: joining and leaving, who lives, and what they
 * say about themselves; see group.h.
 *
 * Who lives is looked up once a pass (dedup_group_refresh()) and remembered.
 * Connections are kept open from one refresh to the next.
 *
 * Thread: the scanner's, but for what group.h says.  Who lives may be found
 * out by any thread, so it is kept in atomics.
 */

#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "group/group-internal.h"
#include "host/sys.h"

DedupGroup *dedup_group_new(const char *dir, GError **error)
{
    DedupGroup *g = g_new0(DedupGroup, 1);

    g_mutex_init(&g->lock);
    g->dirfd = -1;
    g->subfd = -1;
    g->slots_fd = -1;
    g->file.fd = -1;
    g->kept.file.fd = -1;
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        g->client[k].peer = (DedupPeer) DEDUP_PEER_INIT;
    }
    g->walk = g_new0(DedupTableWalk, 1);
    g->walk->orphans = g_array_new(false, false, sizeof(uint32_t));
    if (!dir) {
        return g;
    }
    g->path = g_strdup(dir);
    if (!dedup_group_open_path(g, error)) {
        dedup_group_free(g);
        return NULL;
    }
    return g;
}

bool dedup_group_join(DedupGroup *g, const DedupGroupOps *ops, void *opaque,
                      GError **error)
{
    if (!g->scanner) {
        g->scanner = g_thread_self();
    }
    dedup_group_assert_scanner(g);
    g_assert(g->file.fd < 0);
    g->walk->is_stopping = ops->is_stopping;
    g->walk->opaque = opaque;
    if (g->path) {
        if (!dedup_group_join_directory(g, ops, opaque, error)) {
            return false;
        }
    } else if (!dedup_group_file_create(&g->file, error) ||
               !dedup_group_slot_clear(g, error)) {
        dedup_group_file_close(&g->file);
        return false;
    }
    dedup_group_refresh(g);
    return true;
}

void dedup_group_enter(DedupGroup *g)
{
    dedup_group_assert_scanner(g);
    g_assert(g->file.fd >= 0);
    g_mutex_lock(&g->lock);
    __atomic_store_n(&g->joined, true, __ATOMIC_RELEASE);
    g_mutex_unlock(&g->lock);
}

bool dedup_group_is_joined(const DedupGroup *g)
{
    return __atomic_load_n(&g->joined, __ATOMIC_ACQUIRE);
}

void dedup_group_free(DedupGroup *g)
{
    if (!g) {
        return;
    }
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        dedup_peer_close(&g->client[k].peer);
    }
    dedup_group_leave_directory(g);
    dedup_group_file_close(&g->kept.file);
    if (g->dirfd >= 0) {
        close(g->dirfd);
    }
    g_array_unref(g->walk->orphans);
    g_free(g->walk);
    g_mutex_clear(&g->lock);
    g_free(g->path);
    g_free(g);
}

bool dedup_group_has_dir(const DedupGroup *g)
{
    return g->path != NULL;
}

unsigned dedup_group_self(const DedupGroup *g)
{
    return g->self;
}

uint64_t dedup_group_salt(const DedupGroup *g)
{
    return g->file.salt;
}

DedupIndex *dedup_group_index(const DedupGroup *g)
{
    return g->file.index;
}

uint64_t dedup_group_cpu_ns(const DedupGroup *g)
{
    return __atomic_load_n(&g->cpu_ns, __ATOMIC_RELAXED);
}

uint64_t dedup_group_shared_bytes(const DedupGroup *g)
{
    struct stat st;

    dedup_group_assert_scanner(g);
    return sys_fstat(g->file.fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

/* Whoever changes it counts it, whatever others find at the same time. */
static void set_alive(DedupGroup *g, unsigned member, bool alive)
{
    if (__atomic_exchange_n(&g->alive[member], alive, __ATOMIC_RELAXED) !=
        alive) {
        __atomic_fetch_add(&g->members, alive ? 1 : -1, __ATOMIC_RELAXED);
    }
}

/* Who lives, but for us; if that cannot be told, who was alive. */
static void find_locked(DedupGroup *g, bool *locked)
{
    memset(locked, 0, DEDUP_MAX_MEMBERS * sizeof(locked[0]));
    if (g->slots_fd >= 0 &&
        !dedup_group_locked_slots(g->slots_fd, locked)) {
        for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
            locked[k] = __atomic_load_n(&g->alive[k], __ATOMIC_RELAXED);
        }
    }
}

void dedup_group_refresh(DedupGroup *g)
{
    bool locked[DEDUP_MAX_MEMBERS];

    dedup_group_assert_scanner(g);
    g->free_hint = 0;
    /* a newcomer that another thread finds meanwhile would be lost */
    g_mutex_lock(&g->lock);
    find_locked(g, locked);
    locked[g->self] = true;
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        set_alive(g, k, locked[k]);
    }
    g_mutex_unlock(&g->lock);
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        if (!locked[k] || !g->client[k].used) {
            dedup_peer_close(&g->client[k].peer);
        }
        g->client[k].skip = false;
        g->client[k].used = false;
        g->client[k].asked = 0;
        g->client[k].waited_us = 0;
        g->client[k].role = DEDUP_ROLE_UNKNOWN;
    }
    g->members_incompatible = g->path ? dedup_group_count_incompatible(g) : 0;
}

/* The scanner's thread, or the lock is held. */
static bool find_alive(DedupGroup *g, unsigned member)
{
    if (member >= DEDUP_MAX_MEMBERS) {
        return false;
    }
    if (__atomic_load_n(&g->alive[member], __ATOMIC_RELAXED)) {
        return true;
    }
    /* it may have joined since the last look */
    if (g->slots_fd < 0 || !dedup_group_slot_locked(g->slots_fd, member)) {
        return false;
    }
    set_alive(g, member, true);
    return true;
}

bool dedup_group_alive(DedupGroup *g, unsigned member)
{
    dedup_group_assert_scanner(g);
    return find_alive(g, member);
}

bool dedup_group_estimates(DedupGroup *g, unsigned member)
{
    DedupMemberInfo info;

    dedup_group_assert_scanner(g);
    g_assert(member < DEDUP_MAX_MEMBERS);
    if (g->client[member].role == DEDUP_ROLE_UNKNOWN &&
        dedup_group_member(g, member, &info)) {
        g->client[member].role = info.estimates ? DEDUP_ROLE_ESTIMATES
                                                : DEDUP_ROLE_MERGES;
    }
    return g->client[member].role == DEDUP_ROLE_ESTIMATES;
}

unsigned dedup_group_members(const DedupGroup *g)
{
    return __atomic_load_n(&g->members, __ATOMIC_RELAXED);
}

unsigned dedup_group_members_incompatible(const DedupGroup *g)
{
    dedup_group_assert_scanner(g);
    return g->members_incompatible;
}

/*
 * Write what was told last to our slot; the lock is held.  What is reserved
 * changes on other threads: whoever writes last writes what it is then.
 */
static bool write_slot(DedupGroup *g)
{
    DedupSlot slot = {
        .incarnation = g->incarnation,
        .rows = g->rows,
        .written = 1,
        .info = g->told.info,
    };

    if (g->told.reserved) {
        slot.info.reserved_bytes = __atomic_load_n(g->told.reserved,
                                                   __ATOMIC_RELAXED);
    }
    return dedup_group_is_joined(g) && g->told.any &&
           dedup_group_file_write(&g->file, &slot, sizeof(slot),
                                  DEDUP_FILE_SLOTS +
                                  g->self * sizeof(slot));
}

bool dedup_group_tell(DedupGroup *g, const DedupMemberInfo *info)
{
    bool ok;

    g_mutex_lock(&g->lock);
    g->told.info = *info;
    g->told.any = true;
    ok = write_slot(g);
    g_mutex_unlock(&g->lock);
    return ok;
}

bool dedup_group_tell_reserved(DedupGroup *g, const uint64_t *bytes)
{
    bool ok;

    g_mutex_lock(&g->lock);
    g->told.reserved = bytes;
    ok = write_slot(g);
    g_mutex_unlock(&g->lock);
    return ok;
}

bool dedup_group_member(DedupGroup *g, unsigned member,
                        DedupMemberInfo *info)
{
    DedupSlot slot;
    bool ok;

    g_mutex_lock(&g->lock);
    ok = dedup_group_is_joined(g) && find_alive(g, member) &&
         dedup_group_slot_read(g, member, &slot) && slot.written;
    g_mutex_unlock(&g->lock);
    if (ok) {
        *info = slot.info;
    }
    return ok;
}

void dedup_group_foreach_member(DedupGroup *g, DedupMemberFn fn,
                                void *opaque)
{
    bool locked[DEDUP_MAX_MEMBERS];

    g_mutex_lock(&g->lock);
    if (!dedup_group_is_joined(g)) {
        goto out;
    }
    find_locked(g, locked);
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        DedupSlot slot;

        if (k != g->self && !locked[k]) {
            continue;
        }
        set_alive(g, k, true);
        if (dedup_group_slot_read(g, k, &slot) && slot.written) {
            fn(opaque, k, k == g->self, &slot.info);
        }
    }
out:
    g_mutex_unlock(&g->lock);
}
