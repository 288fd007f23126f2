/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine: its life, its thread's loop, its parameters.
 *
 * The scanner's thread alternates between batches of scanning, waits, and
 * steps of a restore request.  What is asked of it is in DedupControl.
 *
 * Lock order: control, the group's, the remap lock (turn before it), that of
 * the figures; each may be taken without those before it.
 */

#include <string.h>

#include "engine-internal.h"
#include "host/freeze.h"
#include "host/mutant.h"
#include "host/reader.h"

/* How often to try again for what could not be had. */
#define RETRY_US (2 * G_TIME_SPAN_SECOND)
/* Pause after a round of a restore that left pages. */
#define ROUND_US 20000

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

static void peer_keyed_hashes(void *opaque, DedupOwnPage *pages, unsigned n,
                              const uint8_t *secret)
{
    DedupEngine *e = opaque;

    dedup_space_keyed_hashes(e->space, pages, n, secret);
}

static int peer_segment_fd(void *opaque, uint32_t gid, uint32_t page,
                           const uint8_t *secret, DedupHash128 *hash)
{
    DedupEngine *e = opaque;

    /* while we join again our names may be those of another group */
    return dedup_group_is_joined(e->group) ?
           dedup_holding_fd(e->space, gid, page, secret, hash) : -1;
}

/* What was proven is about to be published: it need not be found again. */
static void peer_proven(void *opaque, const DedupOwnPage *pages, unsigned n)
{
    DedupEngine *e = opaque;
    uint64_t hashes[DEDUP_PEER_BATCH];

    if (!dedup_group_is_joined(e->group)) {
        return; /* the salt may be that of another one */
    }
    dedup_space_hashes(e->space, pages, n, dedup_scan_salt(e->scan), hashes);
    for (unsigned i = 0; i < n; i++) {
        if (hashes[i]) {
            dedup_scan_tell(e->scan, pages[i].page, hashes[i]);
        }
    }
}

static bool is_stopping(void *opaque)
{
    DedupEngine *e = opaque;

    return dedup_control_is_stopping(&e->control);
}

/* ---- between two windows, on the scanner's ---- */

static bool pause_scanner(void *opaque, int64_t us)
{
    DedupEngine *e = opaque;
    bool goes_on = dedup_control_pause(&e->control, us);

    if (goes_on && dedup_space_asks_room(e->space)) {
        dedup_space_set_room(e->space, dedup_restore_room(&e->room));
    }
    return goes_on;
}

static DedupExclusion exclusive(void *opaque, DedupBodyFn *body, void *arg)
{
    DedupEngine *e = opaque;

    return e->callbacks.exclusive(e->opaque, body, arg);
}

/* For all of its life. */
static bool estimates(const DedupParams *params)
{
    return params->mode == DEDUP_MODE_ESTIMATE;
}

static const DedupGroupOps group_ops = {
    .keyed_hashes = peer_keyed_hashes,
    .segment_fd = peer_segment_fd,
    .proven = peer_proven,
    .is_stopping = is_stopping,
};

/* ---- life ---- */

/* What each part knows of the others. */
static void connect_parts(DedupEngine *e, const DedupConfig *config)
{
    e->room = (DedupRoom) {
        .hostmem = e->hostmem, .group = e->group, .space = e->space,
        .beside = config->beside,
    };
    e->unmerge = (DedupUnmerge) {
        .control = &e->control, .space = e->space, .room = &e->room,
    };
    e->figures.hostmem = e->hostmem;
    e->figures.group = e->group;
    e->figures.space = e->space;
    e->figures.room = &e->room;
    e->figures.scan = e->scan;
    e->figures.pace = &e->pace;
    e->figures.estimates = estimates(&e->control.params);
}

DedupEngine *dedup_engine_new(const DedupConfig *config, GError **error)
{
    DedupEngine *e;

    if (config->page_size != DEDUP_PAGE_SIZE) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "pages of %zu bytes are not supported, only of %zu",
                    config->page_size, DEDUP_PAGE_SIZE);
        return NULL;
    }
    if (!dedup_reader_install(error)) {
        return NULL;
    }
    dedup_mutants_init();
    e = g_new0(DedupEngine, 1);
    e->callbacks = config->callbacks;
    e->opaque = config->opaque;
    dedup_control_init(&e->control, &config->params);
    dedup_figures_init(&e->figures, config->params.run ? DEDUP_STATE_SCANNING
                                                       : DEDUP_STATE_STOPPED);
    e->hostmem = dedup_hostmem_new("/proc");
    e->group = dedup_group_new(config->group_dir, error);
    dedup_pace_init(&e->pace, e->group, e->hostmem);
    if (e->group) {
        e->space = dedup_space_new(e, estimates(&config->params),
                                   config->freeze, error);
    }
    if (e->space) {
        e->scan = dedup_scan_new(e->space, e->group, &e->control, &e->room,
                                 error);
    }
    if (!e->scan) {
        dedup_engine_free(e);
        return NULL;
    }
    connect_parts(e, config);
    dedup_figures_limit_maps(&e->figures, config->params.max_maps);
    if (e->callbacks.exclusive) {
        dedup_space_set_exclusive(e->space, exclusive);
    }
    return e;
}

void dedup_engine_free(DedupEngine *e)
{
    if (e->group) {
        dedup_group_free(e->group); /* ends the thread that tells the scan */
    }
    if (e->scan) {
        dedup_scan_free(e->scan);
    }
    if (e->space) {
        dedup_space_free(e->space);
    }
    dedup_pace_clear(&e->pace);
    dedup_hostmem_free(e->hostmem);
    dedup_figures_clear(&e->figures);
    dedup_control_clear(&e->control);
    g_free(e->group_error);
    g_free(e);
}

/* ---- the loop ---- */

static void set_group_error(DedupEngine *e, const char *text)
{
    g_mutex_lock(&e->control.lock);
    g_free(e->group_error);
    e->group_error = g_strdup(text);
    g_mutex_unlock(&e->control.lock);
}

static void join(DedupEngine *e)
{
    g_autoptr(GError) error = NULL;
    DedupGroupOps ops = group_ops;

    if (e->figures.estimates) {
        ops.proven = NULL; /* nothing is to be merged */
    }
    dedup_scan_join(e->scan, &ops, e, &error);
    set_group_error(e, error ? error->message : NULL);
}

/* Have we what scanning needs? */
static bool is_complete(DedupEngine *e)
{
    return dedup_group_is_joined(e->group) &&
           !dedup_space_lost_freezer(e->space);
}

/* Try again: the group's directory may have been mended. */
static void complete(DedupEngine *e)
{
    if (!dedup_group_is_joined(e->group)) {
        join(e);
    }
    dedup_space_reopen(e->space);
}

typedef enum Task { TASK_STOP, TASK_RESTORE, TASK_SCAN, TASK_REST } Task;

/*
 * What to do next, and what that is called (unless to stop); takes over new
 * parameters.
 */
static Task next_task(DedupEngine *e, DedupParams *params, DedupState *state)
{
    bool sealed;
    bool blocked = dedup_space_is_closed(e->space, &sealed) ||
                   !dedup_group_is_joined(e->group);
    Task task;

    g_mutex_lock(&e->control.lock);
    *params = e->control.params;
    if (e->control.stop) {
        task = TASK_STOP;
    } else if (e->control.restoring) {
        *state = DEDUP_STATE_UNMERGING;
        task = sealed ? TASK_REST : TASK_RESTORE;
    } else if (blocked) {
        *state = DEDUP_STATE_BLOCKED;
        task = TASK_REST;
    } else if (!params->run) {
        *state = DEDUP_STATE_STOPPED;
        task = TASK_REST;
    } else {
        task = TASK_SCAN;
    }
    g_mutex_unlock(&e->control.lock);
    dedup_figures_limit_maps(&e->figures, params->max_maps);
    if (task == TASK_SCAN) {
        *state = dedup_figures_scan_state(&e->figures);
    }
    return task;
}

static bool has_regions(DedupEngine *e)
{
    DedupSpaceSums sums;

    dedup_space_sums(e->space, &sums);
    return sums.total > 0;
}

/* Take over a state, with figures that go with it for whoever waits for it. */
static void enter_state(DedupEngine *e, DedupState state)
{
    if (state != dedup_figures_state(&e->figures)) {
        dedup_figures_batch(&e->figures, true);
    }
    if (dedup_figures_set_state(&e->figures, state) &&
        e->callbacks.state_changed) {
        e->callbacks.state_changed(e->opaque, state);
    }
}

/*
 * Until the next batch is due, or something is asked; what is to be done
 * meanwhile is, and paid for later.
 */
static void sleep_and_merge(DedupEngine *e, int64_t rest)
{
    int64_t end = g_get_monotonic_time() + rest;
    int64_t left = rest;
    DedupWake wake;

    do {
        wake = dedup_control_wait(&e->control,
                                  MIN(left, dedup_scan_waits_us(e->scan)));
        left = end - g_get_monotonic_time();
        if (wake != DEDUP_WAKE_KICK && left > 0 &&
            !dedup_scan_waits_us(e->scan)) {
            dedup_scan_merge(e->scan);
            left = end - g_get_monotonic_time();
        }
    } while (wake != DEDUP_WAKE_KICK && left > 0);
}

static void scan(DedupEngine *e, const DedupParams *params)
{
    uint32_t pages = dedup_pace_batch(&e->pace, params);
    DedupTally tally;

    if (dedup_scan_batch(e->scan, params, pages)) {
        dedup_scan_end_pass(e->scan, &tally);
        dedup_pace_pass(&e->pace, params, &tally);
        if (dedup_figures_pass(&e->figures, &tally)) {
            dedup_scan_upkeep(e->scan);
        }
    } else {
        dedup_pace_grown(&e->pace, dedup_scan_work(e->scan));
    }
    dedup_figures_batch(&e->figures, false);
    if (has_regions(e)) {
        sleep_and_merge(e, dedup_pace_rest(&e->pace, params));
    } else {
        dedup_control_wait(&e->control, -1);
    }
}

static void end_restore(DedupEngine *e, uint64_t left, GError *error)
{
    DedupState state = dedup_figures_state(&e->figures);
    DedupParams params;

    dedup_scan_drop_unused(e->scan); /* no pass will come by */
    next_task(e, &params, &state);
    enter_state(e, state);
    if (e->callbacks.restored) {
        e->callbacks.restored(e->opaque, left, error);
    }
}

static void restore(DedupEngine *e)
{
    g_autoptr(GError) error = NULL;
    uint64_t left;

    dedup_space_reopen(e->space);
    switch (dedup_unmerge_step(&e->unmerge, &left, &error)) {
    case DEDUP_UNMERGE_GOES_ON:
        dedup_figures_batch(&e->figures, false);
        break;
    case DEDUP_UNMERGE_WAITS:
        dedup_control_wait(&e->control, ROUND_US);
        break;
    case DEDUP_UNMERGE_ENDED:
        end_restore(e, left, error);
        break;
    }
}

static void rest(DedupEngine *e)
{
    dedup_figures_batch(&e->figures, false);
    if (is_complete(e)) {
        dedup_control_wait(&e->control, -1);
    } else {
        dedup_control_wait(&e->control, RETRY_US);
        complete(e);
    }
}

void dedup_engine_begin(DedupEngine *e)
{
    dedup_reader_thread();
    dedup_figures_begin_thread(&e->figures);
    dedup_space_set_scanner(e->space, pause_scanner);
    join(e);
    /* the first pass merges: how many mappings are there before? */
    dedup_figures_batch(&e->figures, true);
}

bool dedup_engine_step(DedupEngine *e)
{
    DedupState state;
    DedupParams params;
    Task task = next_task(e, &params, &state);

    if (task == TASK_STOP) {
        return false;
    }
    if (task != TASK_SCAN || !has_regions(e)) {
        /* what waits for a segment would wait for long */
        dedup_scan_abandon(e->scan);
    }
    enter_state(e, state);
    if (dedup_space_reap(e->space)) {
        dedup_scan_drop_unused(e->scan); /* no pass may come by */
    }
    if (task == TASK_SCAN) {
        scan(e, &params);
    } else if (task == TASK_RESTORE) {
        restore(e);
    } else {
        rest(e);
    }
    if (dedup_scan_has_lost_group(e->scan)) {
        set_group_error(e, "its files were deleted or replaced while they"
                           " were in use; joining it again");
    }
    return true;
}

void dedup_engine_end(DedupEngine *e)
{
    dedup_scan_abandon(e->scan);
    dedup_figures_end_thread(&e->figures);
}

void dedup_engine_run(DedupEngine *e)
{
    dedup_engine_begin(e);
    while (dedup_engine_step(e)) {
        ;
    }
    dedup_engine_end(e);
}

void dedup_engine_stop(DedupEngine *e)
{
    dedup_control_stop(&e->control);
}

/* ---- parameters and requests, any thread ---- */

char *dedup_engine_group_error(DedupEngine *e)
{
    char *text;

    g_mutex_lock(&e->control.lock);
    text = g_strdup(e->group_error);
    g_mutex_unlock(&e->control.lock);
    return text;
}

const unsigned *dedup_engine_windows(void)
{
    return dedup_freeze_windows();
}

void dedup_engine_wait_window(const void *host, size_t size)
{
    dedup_freeze_wait(host, size);
}

bool dedup_engine_holds_long(DedupEngine *e)
{
    return dedup_space_holds_long(e->space);
}

bool dedup_engine_lost_userfaultfd(DedupEngine *e)
{
    /* no lock: the caller may be one that nobody should wait for */
    return dedup_space_lost_freezer(e->space);
}

bool dedup_engine_has_pagemap(DedupEngine *e)
{
    return dedup_space_has_pagemap(e->space);
}

void dedup_engine_get_params(DedupEngine *e, DedupParams *params)
{
    g_mutex_lock(&e->control.lock);
    *params = e->control.params;
    g_mutex_unlock(&e->control.lock);
}

void dedup_engine_set_params(DedupEngine *e, const DedupParams *params)
{
    g_mutex_lock(&e->control.lock);
    g_assert(estimates(params) == e->figures.estimates);
    if (params->run && !e->control.params.run) {
        dedup_unmerge_cancel(&e->unmerge);
    }
    e->control.params = *params;
    g_mutex_unlock(&e->control.lock);
    dedup_control_kick(&e->control);
}

bool dedup_engine_restore(DedupEngine *e, bool unmerge, bool force,
                          GError **error)
{
    bool ok = dedup_unmerge_request(&e->unmerge, unmerge, force, error);

    if (ok) {
        dedup_control_kick(&e->control);
    }
    return ok;
}

void dedup_engine_block(DedupEngine *e, bool block, bool hard)
{
    dedup_space_close(e->space, block, block && hard);
    dedup_control_kick(&e->control);
}

bool dedup_engine_is_whole(DedupEngine *e)
{
    DedupSpaceSums sums;

    dedup_space_sums(e->space, &sums);
    return !(sums.merged + sums.broken + sums.zero + sums.zero_mapped);
}

void dedup_engine_get_stats(DedupEngine *e, DedupStats *stats,
                            bool reset_max)
{
    dedup_figures_get(&e->figures, stats, reset_max);
}
