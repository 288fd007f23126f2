/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: info dedup
 *
 * What query-dedup-stats says, for people; and for each block that is left
 * alone what to change.
 */

#include "qemu/osdep.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qapi/type-helpers.h"
#include "qapi/qapi-visit-dedup.h"
#include "qemu/cutils.h"
#include "qemu/module.h"
#include "dedup-internal.h"

static void format_bytes(GString *buf, const char *name, int64_t bytes)
{
    g_autofree char *size = size_to_str(bytes < 0 ? -bytes : bytes);

    g_string_append_printf(buf, "  %s: %s%s\n", name, bytes < 0 ? "-" : "",
                           size);
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
                           "  full scans: %" PRIu64
                           ", the last in %" PRIu64 " ms\n"
                           "  pages scanned: %" PRIu64 "\n"
                           "  cpu time: %" PRIu64 " ms\n"
                           "  longest window: %" PRIu64 " us\n"
                           "  maps: %" PRIu64 " of %" PRIu64 "\n",
                           info->cow_breaks, info->full_scans,
                           info->last_pass_ms, info->pages_scanned,
                           info->cpu_time_ns / 1000000,
                           info->window_max_ns / 1000,
                           info->maps_used, info->maps_limit);
    format_bytes(buf, "metadata", info->metadata_bytes);
    format_bytes(buf, "saved", info->bytes_saved);
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
    format_pages(buf, info);
    format_work(buf, info);
    format_blocks(buf, info->blocks);
    if (info->group) {
        format_group(buf, info->group);
    }
    return human_readable_text_from_str(buf);
}

static void dedup_hmp_register(void)
{
    monitor_register_hmp_info_hrt("dedup", info_dedup);
}

type_init(dedup_hmp_register)
