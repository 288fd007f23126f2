/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine: its life, its thread's loop, its requests.
 *
 * The scanner's thread alternates between batches of scanning, waits, and
 * steps of a restore request.  Everything that is asked of it (parameters,
 * block, restore, stop) is written down under the control lock and announced
 * with dedup_kick(); the thread looks at it between batches, and between the
 * chunks of a batch.
 *
 * Lock order: control, the group's own, turn, remap, stats_lock; each may be
 * taken without those before it.
 */

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "freeze.h"
#include "internal.h"
#include "rejoin.h"
#include "ksm.h"

/* How often to try again for what could not be had. */
#define RETRY_US (2 * G_TIME_SPAN_SECOND)

/*
 * Whoever wants the remap lock queues on "turn" first.  The scanner, which
 * takes and drops it all the time, cannot overtake: a plain mutex would let
 * it win again and again.
 */
void dedup_lock(DedupEngine *e)
{
    g_mutex_lock(&e->turn);
    g_mutex_lock(&e->remap);
    g_mutex_unlock(&e->turn);
    e->visits += g_thread_self() != e->scanner;
}

void dedup_unlock(DedupEngine *e)
{
    g_mutex_unlock(&e->remap);
}

void dedup_kick(DedupEngine *e)
{
    g_mutex_lock(&e->control);
    e->kick = true;
    g_cond_broadcast(&e->wake);
    g_mutex_unlock(&e->control);
}

void dedup_wait(DedupEngine *e, int64_t us)
{
    int64_t end = g_get_monotonic_time() + us;

    g_mutex_lock(&e->control);
    while (!e->kick && !e->stop) {
        if (us < 0) {
            g_cond_wait(&e->wake, &e->control);
        } else if (!g_cond_wait_until(&e->wake, &e->control, end)) {
            break;
        }
    }
    e->kick = false;
    g_mutex_unlock(&e->control);
}

static bool is_blocked(DedupEngine *e, bool *hard)
{
    bool blocked;

    dedup_lock(e);
    blocked = e->blocked || e->uffd < 0;
    *hard = e->hard_blocked;
    dedup_unlock(e);
    return blocked;
}

bool dedup_may_scan(DedupEngine *e)
{
    bool may, hard;

    g_mutex_lock(&e->control);
    may = !e->stop && !e->restoring && e->params.run;
    g_mutex_unlock(&e->control);
    return may && !is_blocked(e, &hard);
}

void dedup_set_state(DedupEngine *e, DedupState state)
{
    bool changed;

    g_mutex_lock(&e->stats_lock);
    changed = e->state != state;
    e->state = state;
    g_mutex_unlock(&e->stats_lock);
    if (changed) {
        dedup_stats_tell(e);
        if (e->callbacks.state_changed) {
            e->callbacks.state_changed(e->opaque, state);
        }
    }
}

const char *dedup_state_str(DedupState state)
{
    static const char *const names[] = {
        [DEDUP_STATE_SCANNING] = "scanning",
        [DEDUP_STATE_IDLE] = "idle",
        [DEDUP_STATE_LIMITED] = "limited",
        [DEDUP_STATE_UNMERGING] = "unmerging",
        [DEDUP_STATE_STOPPED] = "stopped",
        [DEDUP_STATE_BLOCKED] = "blocked",
    };

    return names[state];
}

/* ---- what the peers may ask, on their thread ---- */

static bool peer_keyed_hash(void *opaque, uint32_t member_page,
                            const uint8_t *secret, DedupHash128 *hash)
{
    DedupEngine *e = opaque;
    DedupRegion *r;
    uint32_t page;
    uint8_t flags;
    bool ok = false;

    dedup_lock(e);
    if (dedup_region_find(e, member_page, &r, &page)) {
        uint32_t entry = dedup_entry_at(r, page);

        /* a merged page is there, without memory of its own */
        ok = dedup_entry_is_segment(entry) && !(entry & DEDUP_BROKEN);
        if (!ok && dedup_presence(r, page, 1, &flags)) {
            ok = flags & DEDUP_PRESENT;
        }
        if (ok) {
            *hash = dedup_page_keyed_hash(dedup_region_addr(r, page),
                                          secret);
        }
    }
    dedup_unlock(e);
    return ok;
}

static int peer_segment_fd(void *opaque, uint32_t gid, uint32_t page,
                           const uint8_t *secret, DedupHash128 *hash)
{
    DedupEngine *e = opaque;
    DedupSegment *s = NULL;
    int fd = -1;

    dedup_lock(e);
    /* while we join again our names may be those of another group */
    if (dedup_group_is_joined(e->group)) {
        s = dedup_segments_find(e, gid);
    }
    if (s && page < s->npages) {
        *hash = dedup_page_keyed_hash(dedup_segment_page(s, page), secret);
        fd = fcntl(s->fd, F_DUPFD_CLOEXEC, 0);
    }
    dedup_unlock(e);
    return fd;
}

static bool is_stopping(void *opaque)
{
    DedupEngine *e = opaque;
    bool stop;

    g_mutex_lock(&e->control);
    stop = e->stop;
    g_mutex_unlock(&e->control);
    return stop;
}

static const DedupGroupOps group_ops = {
    .keyed_hash = peer_keyed_hash,
    .segment_fd = peer_segment_fd,
    .is_stopping = is_stopping,
};

/* ---- life ---- */

DedupEngine *dedup_engine_new(const DedupConfig *config, GError **error)
{
    DedupGroup *group;
    DedupEngine *e;
    void *buffer;
    int uffd;

    if (config->page_size != DEDUP_PAGE_SIZE) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "pages of %zu bytes are not supported, only of %zu",
                    config->page_size, DEDUP_PAGE_SIZE);
        return NULL;
    }
    group = dedup_group_new(config->group_dir, error);
    if (!group) {
        return NULL;
    }
    uffd = dedup_freeze_open(error);
    if (uffd < 0) {
        dedup_group_free(group);
        return NULL;
    }

    buffer = mmap(NULL, DEDUP_PROOF_PAGES * DEDUP_PAGE_SIZE,
                  PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (buffer == MAP_FAILED) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "cannot map a buffer: %s", g_strerror(errno));
        close(uffd);
        dedup_group_free(group);
        return NULL;
    }

    madvise(buffer, DEDUP_PROOF_PAGES * DEDUP_PAGE_SIZE, MADV_DONTDUMP);

    e = g_new0(DedupEngine, 1);
    dedup_mutants_init();
    e->callbacks = config->callbacks;
    e->opaque = config->opaque;
    e->uffd = uffd;
    e->group = group;
    e->params = config->params;
    e->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    e->has_pagemap_scan = true;
    e->zero_anon = dedup_freeze_survives_split(uffd, e->pagemap_fd);
    e->self_pidfd = syscall(SYS_pidfd_open, getpid(), 0);
    e->has_madvise_vector = e->self_pidfd >= 0;
    e->hostmem = dedup_hostmem_new("/proc");
    dedup_ksm_open(e);
    e->stats.maps_limit = dedup_hostmem_max_maps(e->hostmem) *
                          config->params.max_maps / 100;
    g_mutex_init(&e->turn);
    g_mutex_init(&e->remap);
    g_mutex_init(&e->control);
    g_mutex_init(&e->stats_lock);
    g_cond_init(&e->wake);
    e->regions = g_ptr_array_new();
    e->dead = g_ptr_array_new();
    e->segments = g_ptr_array_new();
    e->by_gid = g_hash_table_new(NULL, NULL);
    dedup_publish_init(e);
    e->left_gids = g_hash_table_new(NULL, NULL);
    e->failed_gids = g_hash_table_new(NULL, NULL);
    e->tick_scans = g_new0(uint64_t, DEDUP_MAX_MEMBERS);
    e->generation = 1;
    e->index_limit = 1ULL << DEDUP_MEMBER_PAGE_BITS; /* until the first tick */
    e->tick_us = g_get_monotonic_time();
    e->proof_buffer = buffer;
    dedup_scan_init(e);
    e->state = config->params.run ? DEDUP_STATE_SCANNING
                                  : DEDUP_STATE_STOPPED;
    return e;
}

void dedup_engine_free(DedupEngine *e)
{
    dedup_publish_free(e);
    dedup_group_free(e->group);
    dedup_regions_free(e);
    for (unsigned i = 0; i < e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(e->segments, i);

        if (s) {
            dedup_segment_free(s);
        }
    }
    dedup_scan_free(e);
    munmap(e->proof_buffer, DEDUP_PROOF_PAGES * DEDUP_PAGE_SIZE);
    dedup_spare_free(&e->spare);
    g_free(e->tick_scans);
    g_hash_table_destroy(e->failed_gids);
    g_hash_table_destroy(e->left_gids);
    g_hash_table_destroy(e->by_gid);
    g_ptr_array_free(e->segments, true);
    g_cond_clear(&e->wake);
    g_mutex_clear(&e->stats_lock);
    g_mutex_clear(&e->control);
    g_mutex_clear(&e->remap);
    g_mutex_clear(&e->turn);
    dedup_hostmem_free(e->hostmem);
    dedup_ksm_close(e);
    if (e->self_pidfd >= 0) {
        close(e->self_pidfd);
    }
    if (e->pagemap_fd >= 0) {
        close(e->pagemap_fd);
    }
    if (e->uffd >= 0) {
        close(e->uffd);
    }
    g_free(e->group_error);
    g_free(e);
}

/* Have we what scanning needs? */
static bool is_complete(DedupEngine *e)
{
    bool complete;

    dedup_lock(e);
    complete = dedup_group_is_joined(e->group) && e->uffd >= 0;
    dedup_unlock(e);
    return complete;
}

/* A userfaultfd that was lost (freeze.h) may be had again. */
static void reopen(DedupEngine *e)
{
    dedup_lock(e);
    if (e->uffd < 0) {
        __atomic_store_n(&e->uffd, dedup_freeze_open(NULL), __ATOMIC_RELAXED);
    }
    dedup_unlock(e);
}

/* Try again: the group's directory may have been mended. */
static void complete(DedupEngine *e)
{
    if (!dedup_group_is_joined(e->group)) {
        dedup_join(e, &group_ops);
    }
    reopen(e);
}

/* What the state is called while scanning. */
static DedupState scan_state(DedupEngine *e)
{
    unsigned limits;

    /* what ran short shows with the state, not at the end of the pass */
    g_mutex_lock(&e->stats_lock);
    limits = e->stats.limits |= e->pass_limits;
    g_mutex_unlock(&e->stats_lock);
    if (limits) {
        return DEDUP_STATE_LIMITED;
    }
    /* a page is merged in its second pass at the earliest */
    return e->stats.full_scans >= 3 && e->idle_passes >= 2
           ? DEDUP_STATE_IDLE : DEDUP_STATE_SCANNING;
}

typedef enum Task { TASK_STOP, TASK_RESTORE, TASK_SCAN, TASK_REST } Task;

/* What to do next; takes over new parameters. */
static Task next_task(DedupEngine *e, DedupState *state)
{
    bool hard;
    bool blocked = is_blocked(e, &hard) || !dedup_group_is_joined(e->group);
    Task task;

    g_mutex_lock(&e->control);
    e->active = e->params;
    if (e->stop) {
        task = TASK_STOP;
    } else if (e->restoring) {
        *state = DEDUP_STATE_UNMERGING;
        task = hard ? TASK_REST : TASK_RESTORE;
        if (e->restore_fresh) {
            e->restore_fresh = false;
            e->restore_at = 0;
            e->restore_lacks = 0;
            e->restore_last = 0;
            e->restore_moved_us = g_get_monotonic_time();
        }
    } else if (blocked) {
        *state = DEDUP_STATE_BLOCKED;
        task = TASK_REST;
    } else if (!e->params.run) {
        *state = DEDUP_STATE_STOPPED;
        task = TASK_REST;
    } else {
        task = TASK_SCAN;
    }
    g_mutex_unlock(&e->control);

    g_mutex_lock(&e->stats_lock);
    e->stats.maps_limit = dedup_hostmem_max_maps(e->hostmem) *
                          e->active.max_maps / 100;
    g_mutex_unlock(&e->stats_lock);
    if (task == TASK_SCAN) {
        *state = scan_state(e);
    }
    return task;
}

static bool has_regions(DedupEngine *e)
{
    return __atomic_load_n(&e->pages_total, __ATOMIC_RELAXED) > 0;
}

/* Take over a state, with figures that go with it for whoever waits for it. */
static void enter_state(DedupEngine *e, DedupState state)
{
    if (state != e->state && dedup_group_is_joined(e->group)) {
        e->figures_us = 0;
        dedup_stats_batch(e);
    }
    dedup_set_state(e, state);
}

void dedup_update_state(DedupEngine *e)
{
    DedupState state = e->state;

    next_task(e, &state);
    enter_state(e, state);
}

void dedup_engine_run(DedupEngine *e)
{
    DedupState state = DEDUP_STATE_SCANNING;

    if (pthread_getcpuclockid(pthread_self(), &e->cpu_clock) == 0) {
        __atomic_store_n(&e->cpu_clock_valid, true, __ATOMIC_RELEASE);
    }
    dedup_lock(e);
    e->scanner = g_thread_self();
    dedup_unlock(e);
    dedup_join(e, &group_ops);
    e->pass_start_us = g_get_monotonic_time();

    for (;;) {
        Task task;

        dedup_watch_group(e);
        task = next_task(e, &state);

        if (task == TASK_STOP) {
            break;
        }
        if (task != TASK_SCAN || !has_regions(e)) {
            /* what waits for a segment would wait for long */
            dedup_publish_abandon(e);
        }
        enter_state(e, state);
        if (!dedup_publish_waiting(e) && dedup_regions_reap(e)) {
            dedup_policy_drop_unused(e); /* no pass may come by */
        }
        switch (task) {
        case TASK_RESTORE:
            reopen(e);
            dedup_restore_step(e);
            break;
        case TASK_SCAN:
            dedup_scan_batch(e, e->active.pages_to_scan);
            dedup_stats_batch(e);
            dedup_wait(e, has_regions(e) ?
                       e->active.sleep_millisecs * 1000LL : -1);
            break;
        default:
            if (dedup_group_is_joined(e->group)) {
                dedup_stats_batch(e);
            }
            if (is_complete(e)) {
                dedup_wait(e, -1);
            } else {
                dedup_wait(e, RETRY_US);
                complete(e);
            }
            break;
        }
    }
    dedup_publish_abandon(e);
    /* the thread's clock dies with it */
    dedup_engine_get_stats(e, &(DedupStats) { 0 }, false);
    __atomic_store_n(&e->cpu_clock_valid, false, __ATOMIC_RELEASE);
}

void dedup_engine_stop(DedupEngine *e)
{
    g_mutex_lock(&e->control);
    e->stop = true;
    g_cond_broadcast(&e->wake);
    g_mutex_unlock(&e->control);
}

/* ---- parameters and requests, any thread ---- */

char *dedup_engine_group_error(DedupEngine *e)
{
    char *text;

    g_mutex_lock(&e->control);
    text = g_strdup(e->group_error);
    g_mutex_unlock(&e->control);
    return text;
}

bool dedup_engine_lost_userfaultfd(DedupEngine *e)
{
    /* no lock: the caller may be one that nobody should wait for */
    return __atomic_load_n(&e->uffd, __ATOMIC_RELAXED) < 0;
}

bool dedup_engine_has_pagemap(DedupEngine *e)
{
    return e->pagemap_fd >= 0;
}

void dedup_engine_get_params(DedupEngine *e, DedupParams *params)
{
    g_mutex_lock(&e->control);
    *params = e->params;
    g_mutex_unlock(&e->control);
}

void dedup_engine_set_params(DedupEngine *e, const DedupParams *params)
{
    g_mutex_lock(&e->control);
    if (params->run && !e->params.run) {
        e->restoring = false;
        dedup_unreserve(e, &e->restore_reserved);
    }
    e->params = *params;
    g_mutex_unlock(&e->control);
    dedup_kick(e);
}

void dedup_engine_block(DedupEngine *e, bool block, bool hard)
{
    /* taking the lock waits for the window that may be open */
    dedup_lock(e);
    e->blocked = block;
    e->hard_blocked = block && hard;
    dedup_unlock(e);
    dedup_kick(e);
}

bool dedup_engine_lean(DedupEngine *e)
{
    return !__atomic_load_n(&e->merged, __ATOMIC_RELAXED) &&
           !__atomic_load_n(&e->broken, __ATOMIC_RELAXED) &&
           !__atomic_load_n(&e->zero, __ATOMIC_RELAXED) &&
           !__atomic_load_n(&e->zero_mapped, __ATOMIC_RELAXED);
}
