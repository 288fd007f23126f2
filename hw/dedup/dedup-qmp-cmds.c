/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: query-dedup-stats and dedup-unmerge
 *
 * With the BQL held, as all QMP commands.  The figures are the engine's; only
 * the blocks, and why something is blocked, are known here.
 */

#include "qemu/osdep.h"
#include "exec/cpu-common.h"
#include "hw/dedup/qemu-compat.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-dedup.h"
#include "qapi/qapi-events-dedup.h"
#include "qemu/lockable.h"
#include "dedup-internal.h"

static DedupBlockInfo *block_info(DedupBlock *block)
{
    DedupBlockInfo *info = g_new0(DedupBlockInfo, 1);

    info->id = g_strdup(dedup_block_id(block));
    info->eligible = block->eligible;
    info->has_reason = !block->eligible;
    info->reason = block->reason;
    info->pages = block->rb->used_length / qemu_real_host_page_size();
    if (block->region) {
        block->pages_merged = dedup_region_pages_merged(block->region);
    } else if (!block->busy) {
        block->pages_merged = 0;
    }
    info->pages_merged = block->pages_merged;
    return info;
}

static DedupBlockInfoList *block_list(DedupScanner *ds)
{
    DedupBlockInfoList *list = NULL, **tail = &list;
    DedupBlock *block;

    QEMU_LOCK_GUARD(&ds->ram.lock);
    QTAILQ_FOREACH(block, &ds->ram.blocks, next) {
        QAPI_LIST_APPEND(tail, block_info(block));
    }
    return list;
}

static DedupGroupInfo *group_info(DedupScanner *ds,
                                  const DedupGroupStats *stats)
{
    DedupGroupInfo *info = g_new0(DedupGroupInfo, 1);

    info->path = g_strdup(ds->group_dir);
    info->members = stats->members;
    info->members_incompatible = stats->members_incompatible;
    info->pages_shared = stats->pages_shared;
    info->pages_sharing = stats->pages_sharing;
    info->bytes_saved = stats->bytes_saved;
    return info;
}

static DedupEstimateInfo *estimate_info(const DedupEstimate *estimate)
{
    DedupEstimateInfo *info = g_new0(DedupEstimateInfo, 1);

    info->zero_pages = estimate->zero;
    info->pages_within = estimate->within;
    info->pages_between = estimate->between;
    info->bytes = (estimate->zero + estimate->within + estimate->between) *
                  qemu_real_host_page_size();
    return info;
}

/* "auto": nothing is, as none can be had, or nothing is changed. */
static DedupWriteProtect info_write_protect(DedupScanner *ds)
{
    if (!ds->engine || dedup_scanner_estimates(ds)) {
        return DEDUP_WRITE_PROTECT_AUTO;
    }
    if (ds->freeze == DEDUP_FREEZE_MPROTECT) {
        return DEDUP_WRITE_PROTECT_MPROTECT;
    }
    return DEDUP_WRITE_PROTECT_USERFAULTFD;
}

DedupInfo *dedup_info(DedupScanner *ds, bool reset_max)
{
    DedupInfo *info = g_new0(DedupInfo, 1);
    DedupStats stats = { .state = DEDUP_STATE_BLOCKED };

    dedup_scanner_recheck(ds);
    if (ds->engine) {
        dedup_engine_get_stats(ds->engine, &stats, reset_max);
    }
    info->id = g_strdup(object_get_canonical_path_component(OBJECT(ds)));
    info->state = dedup_events_state(ds, &stats);
    info->blocked_reasons = dedup_blockers_list(ds, &stats);
    info->write_protect = info_write_protect(ds);
    info->estimate = dedup_scanner_estimates(ds)
                     ? estimate_info(&stats.estimate) : NULL;
    info->thread_id = qatomic_read(&ds->thread_id);
    info->pages_total = stats.pages_total;
    info->pages_present = stats.pages_present;
    info->pages_merged = stats.pages_merged;
    info->pages_merged_within = stats.pages_merged_within;
    info->pages_merged_between = stats.pages_merged_between;
    info->zero_pages = stats.zero_pages;
    info->pages_unshared = stats.pass.unshared;
    info->pages_volatile = stats.pass.volatiles;
    info->pages_pinned = stats.pass.pinned;
    info->pages_swapped = stats.pass.swapped;
    info->pages_huge_kept = stats.pass.huge_kept;
    info->pages_poisoned = stats.pass.poisoned;
    info->has_pages_left = info->state == DEDUP_SCANNER_STATE_UNMERGING;
    info->pages_left = stats.pages_merged;
    info->cow_breaks = stats.cow_breaks;
    info->full_scans = stats.full_scans;
    info->pages_scanned = stats.pages_scanned;
    info->pass_pages = stats.pass_pages;
    info->cpu_time_ns = stats.cpu_time_ns;
    info->last_pass_ms = stats.last_pass_ms;
    info->window_max_ns = stats.window_max_ns;
    info->metadata_bytes = stats.metadata_bytes;
    info->maps_used = stats.maps_used;
    info->maps_limit = stats.maps_limit;
    info->bytes_saved = stats.bytes_saved;
    info->blocks = block_list(ds);
    info->group = stats.in_group ? group_info(ds, &stats.group) : NULL;
    return info;
}

DedupInfoList *qmp_query_dedup_stats(Error **errp)
{
    DedupInfoList *list = NULL;
    DedupScanner *ds = dedup_scanner_get();

    if (ds) {
        QAPI_LIST_PREPEND(list, dedup_info(ds, true));
    }
    return list;
}

void qmp_dedup_unmerge(const char *id, bool has_force, bool force,
                       Error **errp)
{
    DedupScanner *ds = dedup_scanner_get();
    g_autoptr(GError) gerr = NULL;

    if (!ds ||
        !g_str_equal(object_get_canonical_path_component(OBJECT(ds)), id)) {
        error_set(errp, ERROR_CLASS_DEVICE_NOT_FOUND,
                  "dedup-scanner '%s' not found", id);
        return;
    }
    if (!ds->started) {
        /* Nothing was ever merged. */
        object_property_set_bool(OBJECT(ds), "run", false, &error_abort);
        qapi_event_send_dedup_unmerge_completed(id, 0, NULL);
        return;
    }
    /* Or the end of the one before would be taken for the end of this one. */
    dedup_events_send(ds);
    if (!dedup_engine_restore(ds->engine, true, has_force && force, &gerr)) {
        /* Hints do not reach QMP. */
        error_setg(errp, "%s%s", gerr->message,
                   g_error_matches(gerr, DEDUP_ERROR, DEDUP_ERROR_MEMORY)
                   ? "; use force to try it all the same" : "");
        return;
    }
    ds->unmerging = true;
}
