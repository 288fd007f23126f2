/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: info dedup, dedup_unmerge
 *
 * What query-dedup-stats says, for people: what matters first, no figures
 * where nothing can be merged, and for each block that is left alone what to
 * change.
 */

#include "qemu/osdep.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-dedup.h"
#include "qapi/qapi-visit-dedup.h"
#include "qapi/type-helpers.h"
#include "qemu/cutils.h"
#include "qemu/module.h"
#include "qobject/qdict.h"
#include "dedup-internal.h"

static char *signed_size(int64_t bytes)
{
    g_autofree char *size = size_to_str(bytes < 0 ? -bytes : bytes);

    return g_strdup_printf("%s%s", bytes < 0 ? "-" : "", size);
}

static void format_bytes(GString *buf, const char *name, int64_t bytes)
{
    g_autofree char *size = signed_size(bytes);

    g_string_append_printf(buf, "  %s: %s\n", name, size);
}

/* At a glance: what it has saved, of how much, and how far it is. */
static void format_glance(GString *buf, DedupInfo *info)
{
    uint64_t page = qemu_real_host_page_size();
    g_autofree char *saved = signed_size(info->bytes_saved);
    g_autofree char *total = size_to_str(info->pages_total * page);
    g_autofree char *present = size_to_str(info->pages_present * page);

    g_string_append_printf(buf, "  saved: %s (present: %s of %s)\n", saved,
                           present, total);
    g_string_append_printf(buf, "  full scan %" PRIu64 ": %" PRIu64 " %% of %"
                           PRIu64 " pages", info->full_scans + 1,
                           info->pages_total ? info->pass_pages * 100 /
                           info->pages_total : 0, info->pages_total);
    if (info->full_scans) {
        g_string_append_printf(buf, ", the last in %" PRIu64 " ms, %" PRIu64
                               " pages per second", info->last_pass_ms,
                               info->pages_total * 1000 /
                               MAX(info->last_pass_ms, 1));
    }
    g_string_append(buf, "\n");
}

static void format_pages(GString *buf, DedupInfo *info)
{
    const struct {
        const char *name;
        uint64_t pages;
    } rows[] = {
        { "total", info->pages_total },
        { "present", info->pages_present },
        { "merged", info->pages_merged },
        { "merged within", info->pages_merged_within },
        { "merged between", info->pages_merged_between },
        { "zero", info->zero_pages },
        { "unshared", info->pages_unshared },
        { "volatile", info->pages_volatile },
        { "pinned", info->pages_pinned },
        { "swapped", info->pages_swapped },
        { "huge kept", info->pages_huge_kept },
        { "poisoned", info->pages_poisoned },
    };
    int i;

    for (i = 0; i < ARRAY_SIZE(rows); i++) {
        g_string_append_printf(buf, "  pages %s: %" PRIu64 "\n",
                               rows[i].name, rows[i].pages);
    }
    if (info->has_pages_left) {
        g_string_append_printf(buf, "  pages left to unmerge: %" PRIu64 "\n",
                               info->pages_left);
    }
}

static void format_work(GString *buf, DedupInfo *info)
{
    g_string_append_printf(buf,
                           "  cow breaks: %" PRIu64 "\n"
                           "  full scans: %" PRIu64 "\n"
                           "  pages scanned: %" PRIu64 "\n"
                           "  cpu time: %" PRIu64 " ms\n"
                           "  longest window: %" PRIu64 " us\n"
                           "  maps: %" PRIu64 " of %" PRIu64 "\n",
                           info->cow_breaks, info->full_scans,
                           info->pages_scanned,
                           info->cpu_time_ns / 1000000,
                           info->window_max_ns / 1000,
                           info->maps_used, info->maps_limit);
    format_bytes(buf, "metadata", info->metadata_bytes);
}

static void format_blocks(GString *buf, DedupBlockInfoList *list)
{
    for (; list; list = list->next) {
        DedupBlockInfo *block = list->value;

        g_string_append_printf(buf, "  block %s: %" PRIu64 " pages, ",
                               block->id, block->pages);
        if (block->eligible) {
            g_string_append_printf(buf, "%" PRIu64 " merged\n",
                                   block->pages_merged);
        } else {
            g_string_append_printf(buf, "left alone: %s (%s)\n",
                                   DedupBlockReason_str(block->reason),
                                   dedup_block_reason_text(block->reason));
        }
    }
}

static void format_group(GString *buf, DedupGroupInfo *group)
{
    g_string_append_printf(buf,
                           "  group %s: %" PRIu64 " members, %" PRIu64
                           " incompatible\n"
                           "  group pages shared: %" PRIu64
                           ", sharing: %" PRIu64 "\n",
                           group->path, group->members,
                           group->members_incompatible,
                           group->pages_shared, group->pages_sharing);
    format_bytes(buf, "group saved", group->bytes_saved);
}

static void format_estimate(GString *buf, DedupEstimateInfo *estimate)
{
    format_bytes(buf, "would be saved", estimate->bytes);
    g_string_append_printf(buf, "  pages would be zero: %" PRIu64
                           ", merged within: %" PRIu64
                           ", between: %" PRIu64 "\n",
                           estimate->zero_pages, estimate->pages_within,
                           estimate->pages_between);
}

/* Blocked from the start: they would all be zero. */
static bool has_figures(DedupInfo *info)
{
    return info->state != DEDUP_SCANNER_STATE_BLOCKED ||
           info->pages_merged || info->zero_pages;
}

static HumanReadableText *info_dedup(Error **errp)
{
    g_autoptr(GString) buf = g_string_new(NULL);
    g_autoptr(DedupInfo) info = NULL;
    DedupScanner *ds = dedup_scanner_get();
    DedupBlockedList *blocked;

    if (!ds) {
        g_string_append(buf, "No dedup-scanner object\n");
        return human_readable_text_from_str(buf);
    }
    info = dedup_info(ds, false);
    g_string_append_printf(buf, "%s: %s, write-protect %s, thread %" PRId64
                           "\n", info->id,
                           DedupScannerState_str(info->state),
                           DedupWriteProtect_str(info->write_protect),
                           info->thread_id);
    for (blocked = info->blocked_reasons; blocked; blocked = blocked->next) {
        g_string_append_printf(buf, "  %s: %s\n",
                               DedupBlockedReason_str(blocked->value->reason),
                               blocked->value->detail);
    }
    if (info->estimate) {
        format_estimate(buf, info->estimate);
    }
    if (has_figures(info)) {
        format_glance(buf, info);
        format_pages(buf, info);
        format_work(buf, info);
    }
    format_blocks(buf, info->blocks);
    if (info->group) {
        format_group(buf, info->group);
    }
    return human_readable_text_from_str(buf);
}

/* dedup_unmerge [-f] [ID]: there is one scanner at most. */
static void hmp_dedup_unmerge(Monitor *mon, const QDict *qdict)
{
    const char *id = qdict_get_try_str(qdict, "id");
    DedupScanner *ds = dedup_scanner_get();
    Error *err = NULL;

    if (!id) {
        id = ds ? object_get_canonical_path_component(OBJECT(ds)) : "";
    }
    if (!ds && !*id) {
        error_setg(&err, "no dedup-scanner object");
    } else {
        qmp_dedup_unmerge(id, true, qdict_get_try_bool(qdict, "force", false),
                          &err);
    }
    if (!hmp_handle_error(mon, err)) {
        monitor_printf(mon, "Unmerging; \"info dedup\" shows how far it is\n");
    }
}

static void dedup_hmp_register(void)
{
    monitor_register_hmp("dedup_unmerge", false, hmp_dedup_unmerge);
    monitor_register_hmp_info_hrt("dedup", info_dedup);
}

type_init(dedup_hmp_register)
