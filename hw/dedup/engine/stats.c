/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The figures: what this process counts, what it tells the group, what it
 * reads of the group.
 *
 * Three kinds, by how they are kept:
 *   live      sums that every change keeps (merged, broken, dropped pages,
 *             pages scanned): atomics of the engine
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

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"
#include "rejoin.h"
#include "zeroes.h"

#define FIGURES_US (500 * 1000)
/* They take about one part in so many of the scanner's time at most... */
#define FIGURES_SHARE 20
/* ...but are not older than this. */
#define FIGURES_MAX_US (10 * G_TIME_SPAN_SECOND)

static uint64_t live(const uint64_t *sum)
{
    return __atomic_load_n(sum, __ATOMIC_RELAXED);
}

/* Bytes of a lazily populated array that have memory. */
static uint64_t resident(const void *array, size_t size)
{
    unsigned char vec[1024];
    uint64_t pages = 0;
    const uint8_t *p = array;

    for (size_t off = 0; off < size; ) {
        size_t len = MIN(size - off, sizeof(vec) << DEDUP_PAGE_SHIFT);

        if (mincore((void *)(p + off), len, vec) < 0) {
            return size;
        }
        for (size_t i = 0; i < (len + DEDUP_PAGE_SIZE - 1) >>
             DEDUP_PAGE_SHIFT; i++) {
            pages += vec[i] & 1;
        }
        off += len;
    }
    return pages << DEDUP_PAGE_SHIFT;
}

static DedupRegion *region_at(DedupEngine *e, uint32_t at)
{
    DedupRegion *r;

    dedup_lock(e);
    r = dedup_region_next(e, at);
    dedup_unlock(e);
    return r;
}

static uint64_t private_metadata(DedupEngine *e)
{
    DedupRegion *r;
    uint32_t at = 0;
    uint64_t bytes = sizeof(*e) + dedup_scan_size() + dedup_zeroes_bytes(e) +
                     dedup_spare_size(&e->spare) +
                     resident(e->proof_buffer,
                              DEDUP_PROOF_PAGES * DEDUP_PAGE_SIZE);

    while ((r = region_at(e, at))) {
        /* without the lock: nobody but us, the scanner, frees a region */
        bytes += sizeof(*r) +
                 resident(r->area, dedup_region_chunks(r)) +
                 resident(r->sums,
                          dedup_region_chunks(r) * sizeof(r->sums[0])) +
                 resident(r->entry, r->npages * sizeof(r->entry[0])) +
                 resident(r->fingerprint,
                          r->npages * sizeof(r->fingerprint[0]));
        at = r->base + r->npages;
    }
    /* a segment's struct, and the page table of its read-only view */
    bytes += e->segments_held * (sizeof(DedupSegment) + DEDUP_PAGE_SIZE);
    return bytes;
}

void dedup_stats_tell(DedupEngine *e)
{
    DedupMemberInfo info = {
        .pid = getpid(),
        .pages_total = live(&e->pages_total),
        .pages_merged = live(&e->merged),
        .zero_pages = live(&e->zero) + live(&e->zero_mapped),
        .reserved_bytes = live(&e->reserved_bytes),
    };

    if (!dedup_group_is_joined(e->group)) {
        return;
    }
    dedup_hostmem_cgroup_ids(e->hostmem, info.cgroups);
    g_mutex_lock(&e->stats_lock);
    info.scanning = e->state == DEDUP_STATE_SCANNING ||
                    e->state == DEDUP_STATE_IDLE ||
                    e->state == DEDUP_STATE_LIMITED;
    info.full_scans = e->stats.full_scans;
    info.overhead_bytes = e->overhead_bytes;
    info.owed_bytes = dedup_owed_bytes(e);
    g_mutex_unlock(&e->stats_lock);
    dedup_group_tell(e->group, &info);
}

static DedupSegmentUse own_use(DedupEngine *e, const DedupSegment *s)
{
    DedupSegmentUse use = { .gid = s->gid };

    dedup_lock(e);
    use.mapped = s->mapped;
    for (unsigned p = 0; p < s->npages; p++) {
        use.pages[p / 64] |= (uint64_t)!!s->use[p] << (p % 64);
    }
    dedup_unlock(e);
    return use;
}

/* Tell the group which segment pages we use. */
static void tell_use(DedupEngine *e)
{
    for (unsigned i = 0; i < e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(e->segments, i);
        DedupSegmentUse use;

        if (!s || !s->gid || !__atomic_load_n(&s->dirty, __ATOMIC_RELAXED)) {
            continue;
        }
        __atomic_store_n(&s->dirty, false, __ATOMIC_RELAXED);
        use = own_use(e, s);
        if (!dedup_group_tell_use(e->group, &use)) {
            s->dirty = true;
        }
    }
}

/* ---- a walk over all segments of the group ---- */

typedef struct Walk {
    DedupEngine *e;
    uint64_t shared;          /* segment pages used by anyone */
    uint64_t mapped;          /* pages merged, all members */
    uint64_t cost;            /* bytes of all segments */
    uint64_t own_cost;        /* our share of it */
    uint64_t within;
    uint64_t between;
} Walk;

static const DedupSegmentUse no_use;

/* @s: as we hold it, or NULL. */
static void add_segment(Walk *w, DedupSegment *s, unsigned npages,
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
    } else if (s && (s->mine || !s->gid)) {
        w->own_cost += cost;
    }
    if (!s) {
        return;
    }
    s->others = others->mapped;
    for (unsigned i = 0; i < s->npages; i++) {
        uint32_t n = __atomic_load_n(&s->use[i], __ATOMIC_RELAXED);

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
    DedupSegment *s = dedup_segments_find(w->e, gid);

    if (s && (s->npages != npages || (s->mine && !ours))) {
        s = NULL; /* another one, which has got its name */
    }
    if (s) {
        s->met = true;
    } else if (own->mapped) {
        /* let go of while we were away from the group */
        dedup_group_clear_use(w->e->group, gid);
        own = &no_use;
    }
    add_segment(w, s, npages, own, others);
    return s != NULL;
}

/* What is in no group's table we bear alone. */
static void walk_nameless(Walk *w)
{
    for (unsigned i = 0; i < w->e->segments->len; i++) {
        DedupSegment *s = g_ptr_array_index(w->e->segments, i);

        if (s && !s->zeroes && !s->gid) {
            DedupSegmentUse own = own_use(w->e, s);

            add_segment(w, s, s->npages, &own, &no_use);
        }
    }
}

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

static void group_figures(DedupEngine *e, const Walk *w,
                          DedupGroupStats *group)
{
    Sums sums = { 0 };

    dedup_group_foreach_member(e->group, add_member, &sums);
    group->members = dedup_group_members(e->group);
    group->members_incompatible =
        dedup_group_members_incompatible(e->group);
    group->pages_shared = w->shared;
    group->pages_sharing = w->mapped - MIN(w->shared, w->mapped);
    group->bytes_saved = (int64_t)((w->mapped + sums.zero) <<
                                   DEDUP_PAGE_SHIFT) -
                         (int64_t)w->cost - (int64_t)sums.overhead;
}

static void count_maps(DedupEngine *e)
{
    uint64_t maps = dedup_hostmem_maps(e->hostmem);

    if (!maps) {
        return; /* could not be counted: what was known is better */
    }
    dedup_lock(e);
    e->maps_other = (int64_t)maps - (int64_t)dedup_ledger_maps(e);
    dedup_unlock(e);
}

int64_t dedup_maps_left(DedupEngine *e)
{
    return (int64_t)e->stats.maps_limit - e->maps_other -
           (int64_t)dedup_ledger_maps(e);
}

static void costly_figures(DedupEngine *e)
{
    Walk w = { .e = e };
    DedupGroupStats group = { 0 };
    int64_t start = g_get_monotonic_time();
    uint64_t private = private_metadata(e);
    uint64_t shared = dedup_group_shared_bytes(e->group);
    uint64_t maps;
    unsigned members;
    bool lost;

    tell_use(e);
    lost = dedup_group_foreach_segment(e->group, walk_segment, &w) &&
           dedup_forget_lost_names(e);
    walk_nameless(&w);
    if (lost) {
        dedup_name_segments(e);
    }
    count_maps(e);
    members = MAX(dedup_group_members(e->group), 1);
    dedup_lock(e);
    maps = dedup_ledger_maps(e);
    dedup_unlock(e);

    g_mutex_lock(&e->stats_lock);
    e->overhead_bytes = private + shared / members + maps * DEDUP_MAP_COST;
    e->stats.metadata_bytes = private + shared / members;
    e->stats.pages_merged_within = w.within;
    e->stats.pages_merged_between = w.between;
    e->stats.bytes_saved = (int64_t)((live(&e->merged) + live(&e->zero) +
                                      live(&e->zero_mapped)) <<
                                     DEDUP_PAGE_SHIFT) -
                           (int64_t)w.own_cost - (int64_t)e->overhead_bytes;
    e->stats.maps_used = e->maps_other + maps;
    g_mutex_unlock(&e->stats_lock);

    dedup_stats_tell(e);
    if (dedup_group_has_dir(e->group)) {
        group_figures(e, &w, &group);
        g_mutex_lock(&e->stats_lock);
        e->stats.group = group;
        e->stats.in_group = true;
        g_mutex_unlock(&e->stats_lock);
    }
    e->figures_us = g_get_monotonic_time();
    e->figures_pause_us = CLAMP((e->figures_us - start) * FIGURES_SHARE,
                                FIGURES_US, FIGURES_MAX_US);
}

/*
 * Pages on swap that belong to the files of shared regions.  @copies: copies
 * of segment pages on swap.
 */
static uint64_t swapped_in_file(const DedupRegion *r, uint64_t copies)
{
    uint64_t copied = r->broken - MIN(copies, r->broken);
    struct stat st;
    uint64_t blocks;

    if (r->memory != DEDUP_MEMORY_SHARED || fstat(r->fd, &st) < 0) {
        return 0;
    }
    /* what the file has and mincore() did not see resident */
    blocks = (uint64_t)st.st_blocks * 512 >> DEDUP_PAGE_SHIFT;
    return blocks - MIN(blocks, r->own - MIN(copied, r->own));
}

static void sum_counts(DedupEngine *e, DedupCounts *sum)
{
    memset(sum, 0, sizeof(*sum));
    dedup_lock(e);
    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        r->counts = r->counting;
        memset(&r->counting, 0, sizeof(r->counting));
        r->counts.swapped += swapped_in_file(r, r->counts.swapped);
        sum->unshared += r->counts.unshared;
        sum->volatiles += r->counts.volatiles;
        sum->pinned += r->counts.pinned;
        sum->swapped += r->counts.swapped;
        sum->huge_kept += r->counts.huge_kept;
    }
    dedup_unlock(e);
}

void dedup_stats_batch(DedupEngine *e)
{
    if (!dedup_group_is_joined(e->group)) {
        return; /* a group that could not be joined: nothing was merged */
    }
    if (g_get_monotonic_time() - e->figures_us >= e->figures_pause_us) {
        costly_figures(e);
    } else {
        dedup_stats_tell(e);
    }
}

bool dedup_stats_pass(DedupEngine *e)
{
    int64_t now = g_get_monotonic_time();
    DedupCounts sum;

    sum_counts(e, &sum);
    g_mutex_lock(&e->stats_lock);
    e->stats.pages_unshared = sum.unshared;
    e->stats.pages_volatile = sum.volatiles;
    e->stats.pages_pinned = sum.pinned;
    e->stats.pages_swapped = sum.swapped;
    e->stats.pages_huge_kept = sum.huge_kept;
    e->stats.full_scans++;
    e->stats.last_pass_ms = (now - e->pass_start_us) / 1000;
    e->stats.limits = e->pass_limits;
    g_mutex_unlock(&e->stats_lock);
    e->pass_start_us = now;
    e->idle_passes = e->pass_found ? 0 : e->idle_passes + 1;
    e->pass_found = 0;
    e->pass_limits = 0;
    if (now - e->policy_us < e->figures_pause_us) {
        dedup_stats_batch(e);
        return false;
    }
    e->policy_us = now;
    costly_figures(e);
    return true;
}

static uint64_t cpu_time_ns(DedupEngine *e)
{
    struct timespec ts;

    if (!__atomic_load_n(&e->cpu_clock_valid, __ATOMIC_ACQUIRE) ||
        clock_gettime(e->cpu_clock, &ts) < 0) {
        return 0;
    }
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec +
           dedup_group_cpu_ns(e->group);
}

void dedup_engine_get_stats(DedupEngine *e, DedupStats *stats,
                            bool reset_max)
{
    uint64_t cpu = cpu_time_ns(e);

    g_mutex_lock(&e->stats_lock);
    *stats = e->stats;
    stats->state = e->state;
    stats->pages_total = live(&e->pages_total);
    stats->pages_merged = live(&e->merged);
    stats->pages_present = MIN(live(&e->own_present) + stats->pages_merged,
                               stats->pages_total);
    stats->zero_pages = live(&e->zero) + live(&e->zero_mapped);
    stats->cow_breaks = live(&e->cow_breaks);
    stats->pages_scanned = live(&e->pages_scanned);
    /* member page numbers have no gaps but where regions were removed */
    stats->pass_pages = MIN(__atomic_load_n(&e->pass_at, __ATOMIC_RELAXED),
                            stats->pages_total);
    stats->cpu_time_ns = MAX(cpu, e->stats.cpu_time_ns);
    e->stats.cpu_time_ns = stats->cpu_time_ns; /* outlives the thread */
    stats->pages_left = e->state == DEDUP_STATE_UNMERGING ?
                        stats->pages_merged : 0;
    stats->window_max_ns = reset_max ?
        __atomic_exchange_n(&e->window_max_ns, 0, __ATOMIC_RELAXED) :
        __atomic_load_n(&e->window_max_ns, __ATOMIC_RELAXED);
    g_mutex_unlock(&e->stats_lock);
}
