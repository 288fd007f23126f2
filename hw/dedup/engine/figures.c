/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The figures: what this process counts, what it tells the group, what it
 * reads of the group.
 *
 * Three kinds, by how they are kept:
 *   live      sums that every change keeps (merged, broken, dropped pages,
 *             pages scanned): atomics of the layers
 *   per pass  what a full scan counted: replaced when it ends
 *   costly    what has to be walked for: the group's segments, the process's
 *             maps, the memory of our own arrays; not more often than once
 *             in FIGURES_US, and less often in a large group
 *
 * Savings are net.  What a segment costs (its pages and its slab) is shared
 * by its users in proportion to the pages that they map; each member bears
 * its own metadata, its maps, and an equal share of the group's file.  So
 * the members' figures add up to the group's.
 */

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "figures.h"

#define FIGURES_US (500 * 1000)
/* They take about one part in so many of the time at most... */
#define FIGURES_SHARE 200
/* ...but are not older than this. */
#define FIGURES_MAX_US (10 * G_TIME_SPAN_SECOND)
/*
 * To count the process's maps the kernel writes a line for each.  So that is
 * done again only after this time, or when we have made so many more, of the
 * share that the process may have, or when less than a part of that is left.
 */
#define MAPS_US (30 * G_TIME_SPAN_SECOND)
#define MAPS_SHARE 32
#define MAPS_LEFT 4

/* ---- what the group is told ---- */

static void tell(DedupFigures *f)
{
    DedupMemberInfo info = { .pid = getpid() };
    DedupSpaceSums sums;

    if (!dedup_group_is_joined(f->group)) {
        return;
    }
    dedup_space_sums(f->space, &sums);
    info.pages_total = sums.total;
    info.pages_merged = sums.merged;
    info.zero_pages = sums.zero + sums.zero_mapped;
    info.owed_bytes = dedup_owed_bytes(f->room);
    dedup_hostmem_cgroup_ids(f->hostmem, info.cgroups);
    g_mutex_lock(&f->lock);
    info.scanning = f->stats.state == DEDUP_STATE_SCANNING ||
                    f->stats.state == DEDUP_STATE_IDLE ||
                    f->stats.state == DEDUP_STATE_LIMITED;
    info.estimates = f->estimates;
    info.cpu_wanted = dedup_pace_wants(f->pace);
    info.full_scans = f->stats.full_scans;
    info.overhead_bytes = f->overhead_bytes;
    g_mutex_unlock(&f->lock);
    dedup_group_tell(f->group, &info);
}

/* Tell the group which segment pages we use. */
static void tell_use(DedupFigures *f)
{
    for (unsigned i = 0; i < dedup_holding_count(f->space); i++) {
        DedupHolding *h = dedup_holding_get(f->space, i);
        DedupSegmentUse use;

        if (!h || !h->segment->gid ||
            !__atomic_exchange_n(&h->dirty, false, __ATOMIC_RELAXED)) {
            continue;
        }
        use = dedup_holding_use(f->space, h);
        if (!dedup_group_tell_use(f->group, &use)) {
            __atomic_store_n(&h->dirty, true, __ATOMIC_RELAXED);
        }
    }
}

/* ---- a walk over all segments of the group ---- */

typedef struct Walk {
    DedupFigures *f;
    uint64_t shared;          /* segment pages used by anyone */
    uint64_t mapped;          /* pages merged, all members */
    uint64_t cost;            /* bytes of all segments */
    uint64_t own_cost;        /* our share of it */
    uint64_t within;
    uint64_t between;
} Walk;

static const DedupSegmentUse no_use;

/* @h: as we hold it, or NULL. */
static void add_segment(Walk *w, const DedupHolding *h, unsigned npages,
                        const DedupSegmentUse *own,
                        const DedupSegmentUse *others)
{
    uint64_t cost = npages * DEDUP_PAGE_SIZE + DEDUP_SEGMENT_SLAB;
    uint64_t total = (uint64_t)own->mapped + others->mapped;

    w->cost += cost;
    w->mapped += total;
    for (unsigned i = 0; i < G_N_ELEMENTS(own->pages); i++) {
        w->shared += __builtin_popcountll(own->pages[i] | others->pages[i]);
    }
    if (total) {
        w->own_cost += (double)cost * own->mapped / total;
    } else if (h && (h->segment->mine || !h->segment->gid)) {
        w->own_cost += cost;
    }
    for (unsigned i = 0; h && i < h->segment->npages; i++) {
        uint32_t n = __atomic_load_n(&h->use[i], __ATOMIC_RELAXED);

        if (others->pages[i / 64] >> (i % 64) & 1) {
            w->between += n;
        } else {
            w->within += n;
        }
    }
}

static bool walk_segment(void *opaque, uint32_t gid, unsigned npages,
                         bool ours, const DedupSegmentUse *own,
                         const DedupSegmentUse *others)
{
    Walk *w = opaque;
    DedupHolding *h = dedup_holding_find(w->f->space, gid);

    if (h && (h->segment->npages != npages || (h->segment->mine && !ours))) {
        h = NULL; /* another one, which has got its name */
    }
    if (h) {
        dedup_scan_note_others(w->f->scan, h, others->mapped);
    } else if (own->mapped) {
        /* let go of while we were away from the group */
        dedup_group_clear_use(w->f->group, gid);
        own = &no_use;
    }
    add_segment(w, h, npages, own, others);
    return h != NULL;
}

/* What is in no group's table we bear alone. */
static void walk_nameless(Walk *w)
{
    for (unsigned i = 0; i < dedup_holding_count(w->f->space); i++) {
        const DedupHolding *h = dedup_holding_get(w->f->space, i);

        if (h && !h->zeroes && !h->segment->gid) {
            DedupSegmentUse own = dedup_holding_use(w->f->space, h);

            add_segment(w, h, h->segment->npages, &own, &no_use);
        }
    }
}

static void walk(DedupFigures *f, Walk *w)
{
    bool lost;

    *w = (Walk) { .f = f };
    lost = dedup_group_foreach_segment(f->group, walk_segment, w) &&
           dedup_scan_forget_lost_names(f->scan);
    walk_nameless(w);
    if (lost) {
        dedup_scan_name_holdings(f->scan);
    }
}

/* ---- the group ---- */

typedef struct Sums {
    uint64_t zero;
    uint64_t overhead;
} Sums;

static void add_member(void *opaque, unsigned member, bool self,
                       const DedupMemberInfo *info)
{
    Sums *sums = opaque;

    sums->zero += info->zero_pages;
    sums->overhead += info->overhead_bytes;
}

static void group_figures(DedupFigures *f, const Walk *w)
{
    DedupGroupStats group = { 0 };
    Sums sums = { 0 };

    if (!dedup_group_has_dir(f->group)) {
        return;
    }
    dedup_group_foreach_member(f->group, add_member, &sums);
    group.members = dedup_group_members(f->group);
    group.members_incompatible = dedup_group_members_incompatible(f->group);
    group.pages_shared = w->shared;
    group.pages_sharing = w->mapped - MIN(w->shared, w->mapped);
    group.bytes_saved = (int64_t)((w->mapped + sums.zero) <<
                                  DEDUP_PAGE_SHIFT) -
                        (int64_t)w->cost - (int64_t)sums.overhead;
    g_mutex_lock(&f->lock);
    f->stats.group = group;
    f->stats.in_group = true;
    g_mutex_unlock(&f->lock);
}

/* ---- this process ---- */

static void count_maps(DedupFigures *f)
{
    int64_t now = g_get_monotonic_time();
    uint64_t ours = dedup_space_maps(f->space);
    uint64_t used = dedup_space_maps_used(f->space);
    uint64_t limit = f->stats.maps_limit;
    uint64_t maps;

    if (f->maps_us && now - f->maps_us < MAPS_US && !f->stats.limits &&
        ours <= f->maps_then + limit / MAPS_SHARE &&
        used < limit - limit / MAPS_LEFT) {
        return;
    }
    f->maps_us = now;
    f->maps_then = ours;
    maps = dedup_hostmem_maps(f->hostmem);
    if (maps) { /* else it could not be counted: what was known is better */
        dedup_space_count_maps(f->space, maps);
    }
}

static void own_figures(DedupFigures *f, const Walk *w, uint64_t metadata)
{
    uint64_t maps = dedup_space_maps(f->space);
    uint64_t used = dedup_space_maps_used(f->space);
    DedupSpaceSums sums;

    dedup_space_sums(f->space, &sums);
    g_mutex_lock(&f->lock);
    f->overhead_bytes = metadata + maps * DEDUP_MAP_COST;
    f->stats.metadata_bytes = metadata;
    f->stats.pages_merged_within = w->within;
    f->stats.pages_merged_between = w->between;
    f->stats.bytes_saved = (int64_t)((sums.merged + sums.zero +
                                      sums.zero_mapped) << DEDUP_PAGE_SHIFT) -
                           (int64_t)w->own_cost - (int64_t)f->overhead_bytes;
    f->stats.maps_used = used;
    g_mutex_unlock(&f->lock);
}

static void costly_figures(DedupFigures *f)
{
    int64_t start = g_get_monotonic_time();
    uint64_t metadata = sizeof(*f) + dedup_space_bytes(f->space) +
                        dedup_scan_bytes(f->scan);
    uint64_t shared = dedup_group_shared_bytes(f->group);
    Walk w;

    tell_use(f);
    walk(f, &w);
    count_maps(f);
    own_figures(f, &w, metadata + shared /
                       MAX(dedup_group_members(f->group), 1));
    tell(f);
    group_figures(f, &w);
    f->taken_us = g_get_monotonic_time();
    f->pause_us = CLAMP((f->taken_us - start) * FIGURES_SHARE,
                        FIGURES_US, FIGURES_MAX_US);
}

void dedup_figures_batch(DedupFigures *f, bool now)
{
    if (!dedup_group_is_joined(f->group)) {
        return; /* a group that could not be joined: nothing was merged */
    }
    if (now) {
        f->maps_us = 0; /* somebody waits for them */
    }
    if (now || g_get_monotonic_time() - f->taken_us >= f->pause_us) {
        costly_figures(f);
    } else {
        tell(f);
    }
}

bool dedup_figures_pass(DedupFigures *f, const DedupTally *tally)
{
    int64_t now = g_get_monotonic_time();

    g_mutex_lock(&f->lock);
    f->stats.pass = tally->counts;
    f->stats.estimate = tally->estimate;
    f->stats.full_scans++;
    f->stats.last_pass_ms = tally->us / 1000;
    f->stats.limits = tally->limits;
    g_mutex_unlock(&f->lock);
    f->idle_passes = tally->found ? 0 : f->idle_passes + 1;
    if (now - f->judged_us < f->pause_us) {
        dedup_figures_batch(f, false);
        return false;
    }
    f->judged_us = now;
    costly_figures(f);
    return true;
}

void dedup_figures_limit_maps(DedupFigures *f, uint32_t percent)
{
    uint64_t limit = dedup_hostmem_max_maps(f->hostmem) * percent / 100;

    dedup_space_limit_maps(f->space, limit);
    g_mutex_lock(&f->lock);
    f->stats.maps_limit = limit;
    g_mutex_unlock(&f->lock);
}

/* ---- the state ---- */

bool dedup_figures_set_state(DedupFigures *f, DedupState state)
{
    bool changed;

    g_mutex_lock(&f->lock);
    changed = f->stats.state != state;
    f->stats.state = state;
    g_mutex_unlock(&f->lock);
    if (changed) {
        tell(f);
    }
    return changed;
}

DedupState dedup_figures_state(DedupFigures *f)
{
    DedupState state;

    g_mutex_lock(&f->lock);
    state = f->stats.state;
    g_mutex_unlock(&f->lock);
    return state;
}

DedupState dedup_figures_scan_state(DedupFigures *f)
{
    unsigned limits;
    uint64_t scans;

    /* what ran short shows with the state, not at the end of the pass */
    g_mutex_lock(&f->lock);
    limits = f->stats.limits |= dedup_scan_limits(f->scan);
    scans = f->stats.full_scans;
    g_mutex_unlock(&f->lock);
    if (limits) {
        return DEDUP_STATE_LIMITED;
    }
    /* a page is merged in its second pass at the earliest */
    return scans >= 3 && f->idle_passes >= 2 ? DEDUP_STATE_IDLE
                                             : DEDUP_STATE_SCANNING;
}

/* ---- whoever asks, any thread ---- */

static uint64_t cpu_time_ns(DedupFigures *f)
{
    struct timespec ts;

    if (!__atomic_load_n(&f->cpu_clock_valid, __ATOMIC_ACQUIRE) ||
        clock_gettime(f->cpu_clock, &ts) < 0) {
        return 0;
    }
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec +
           dedup_group_cpu_ns(f->group);
}

void dedup_figures_get(DedupFigures *f, DedupStats *stats, bool reset_max)
{
    uint64_t cpu = cpu_time_ns(f);
    DedupSpaceSums sums;

    dedup_space_sums(f->space, &sums);
    g_mutex_lock(&f->lock);
    f->stats.cpu_time_ns = MAX(cpu, f->stats.cpu_time_ns); /* outlives it */
    *stats = f->stats;
    g_mutex_unlock(&f->lock);
    stats->pages_total = sums.total;
    stats->pages_merged = sums.merged;
    stats->pages_present = MIN(sums.own + sums.merged, sums.total);
    stats->zero_pages = sums.zero + sums.zero_mapped;
    stats->cow_breaks = sums.cow_breaks;
    stats->pages_scanned = dedup_scan_pages(f->scan);
    /* member page numbers have no gaps but where regions were removed */
    stats->pass_pages = MIN(dedup_scan_at(f->scan), sums.total);
    stats->pages_left = stats->state == DEDUP_STATE_UNMERGING ? sums.merged
                                                              : 0;
    stats->window_max_ns = dedup_space_window_max_ns(f->space, reset_max);
}

/* ---- life ---- */

void dedup_figures_begin_thread(DedupFigures *f)
{
    if (pthread_getcpuclockid(pthread_self(), &f->cpu_clock) == 0) {
        __atomic_store_n(&f->cpu_clock_valid, true, __ATOMIC_RELEASE);
    }
}

void dedup_figures_end_thread(DedupFigures *f)
{
    DedupStats stats;

    /* the thread's clock dies with it */
    dedup_figures_get(f, &stats, false);
    __atomic_store_n(&f->cpu_clock_valid, false, __ATOMIC_RELEASE);
}

void dedup_figures_init(DedupFigures *f, DedupState state)
{
    g_mutex_init(&f->lock);
    f->stats.state = state;
}

void dedup_figures_clear(DedupFigures *f)
{
    g_mutex_clear(&f->lock);
}
