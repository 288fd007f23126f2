/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The remap lock (I12); see space-internal.h.
 */

#include "host/mutant.h"
#include "space/check.h"
#include "space/space-internal.h"

void dedup_space_lock_to_read(DedupSpace *space)
{
    DedupSpaceLock *l = &space->lock;

    g_mutex_lock(&l->turn);
    g_mutex_lock(&l->mutex);
    g_mutex_unlock(&l->turn);
    __atomic_store_n(&l->holder, g_thread_self(), __ATOMIC_RELAXED);
}

bool dedup_space_trylock_to_read(DedupSpace *space)
{
    DedupSpaceLock *l = &space->lock;
    bool ok;

    if (!g_mutex_trylock(&l->turn)) {
        return false;
    }
    ok = g_mutex_trylock(&l->mutex);
    g_mutex_unlock(&l->turn);
    if (ok) {
        __atomic_store_n(&l->holder, g_thread_self(), __ATOMIC_RELAXED);
    }
    return ok;
}

void dedup_space_lock(DedupSpace *space)
{
    dedup_space_lock_to_read(space);
    space->lock.strangers += g_thread_self() != space->lock.scanner;
}

void dedup_space_unlock(DedupSpace *space)
{
    dedup_space_assert_locked(space);
    dedup_space_check(space);
    __atomic_store_n(&space->lock.holder, NULL, __ATOMIC_RELAXED);
    g_mutex_unlock(&space->lock.mutex);
}

void dedup_space_assert_locked(const DedupSpace *space)
{
    g_assert(__atomic_load_n(&space->lock.holder, __ATOMIC_RELAXED) ==
             g_thread_self());
}
