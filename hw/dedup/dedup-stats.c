/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: the provider "dedup" of query-stats
 *
 * The figures of query-dedup-stats that are numbers, but for the estimate,
 * under the same names, for the target "vm".  query-stats knows unsigned
 * numbers only, so what is negative (bytes-saved, when it costs more than it
 * brings) is 0 here.
 */

#include "qemu/osdep.h"
#include "qemu/module.h"
#include "system/stats.h"
#include "dedup-internal.h"

typedef struct DedupStat {
    const char *name;
    size_t offset;
    StatsType type;
    bool has_unit;
    StatsUnit unit;
    int16_t exponent;
} DedupStat;

#define INSTANT(name_, field) \
    { .name = name_, .offset = offsetof(DedupStats, field), \
      .type = STATS_TYPE_INSTANT }
#define CUMULATIVE(name_, field) \
    { .name = name_, .offset = offsetof(DedupStats, field), \
      .type = STATS_TYPE_CUMULATIVE }
#define BYTES(name_, field) \
    { .name = name_, .offset = offsetof(DedupStats, field), \
      .type = STATS_TYPE_INSTANT, .has_unit = true, \
      .unit = STATS_UNIT_BYTES }
#define SECONDS(name_, field, type_, exponent_) \
    { .name = name_, .offset = offsetof(DedupStats, field), \
      .type = type_, .has_unit = true, \
      .unit = STATS_UNIT_SECONDS, .exponent = exponent_ }

static const DedupStat dedup_stats[] = {
    INSTANT("pages-total", pages_total),
    INSTANT("pages-present", pages_present),
    INSTANT("pages-merged", pages_merged),
    INSTANT("pages-merged-within", pages_merged_within),
    INSTANT("pages-merged-between", pages_merged_between),
    INSTANT("zero-pages", zero_pages),
    INSTANT("pages-unshared", pass.unshared),
    INSTANT("pages-volatile", pass.volatiles),
    INSTANT("pages-pinned", pass.pinned),
    INSTANT("pages-swapped", pass.swapped),
    INSTANT("pages-huge-kept", pass.huge_kept),
    INSTANT("pages-poisoned", pass.poisoned),
    CUMULATIVE("cow-breaks", cow_breaks),
    CUMULATIVE("full-scans", full_scans),
    CUMULATIVE("pages-scanned", pages_scanned),
    INSTANT("pass-pages", pass_pages),
    SECONDS("cpu-time-ns", cpu_time_ns, STATS_TYPE_CUMULATIVE, -9),
    SECONDS("last-pass-ms", last_pass_ms, STATS_TYPE_INSTANT, -3),
    SECONDS("window-max-ns", window_max_ns, STATS_TYPE_INSTANT, -9),
    BYTES("metadata-bytes", metadata_bytes),
    INSTANT("maps-used", maps_used),
    INSTANT("maps-limit", maps_limit),
    BYTES("bytes-saved", bytes_saved),
};

static StatsValue *dedup_stat_value(const DedupStat *stat,
                                    const DedupStats *stats)
{
    StatsValue *value = g_new0(StatsValue, 1);
    uint64_t n = *(uint64_t *)((const char *)stats + stat->offset);

    if (stat->offset == offsetof(DedupStats, bytes_saved)) {
        n = MAX(stats->bytes_saved, 0);
    }
    value->type = QTYPE_QNUM;
    value->u.scalar = n;
    return value;
}

static void dedup_stats_query(StatsResultList **result, StatsTarget target,
                              strList *names, strList *targets, Error **errp)
{
    DedupScanner *ds = dedup_scanner_get();
    g_autofree char *path = NULL;
    StatsList *list = NULL, **tail = &list;
    DedupStats stats = { 0 };
    int i;

    if (!ds || target != STATS_TARGET_VM) {
        return;
    }
    if (ds->engine) {
        dedup_engine_get_stats(ds->engine, &stats, false);
    }
    for (i = 0; i < ARRAY_SIZE(dedup_stats); i++) {
        if (apply_str_list_filter(dedup_stats[i].name, names)) {
            Stats *entry = g_new0(Stats, 1);

            entry->name = g_strdup(dedup_stats[i].name);
            entry->value = dedup_stat_value(&dedup_stats[i], &stats);
            QAPI_LIST_APPEND(tail, entry);
        }
    }
    if (list) {
        path = object_get_canonical_path(OBJECT(ds));
        add_stats_entry(result, STATS_PROVIDER_DEDUP, path, list);
    }
}

static void dedup_stats_schema(StatsSchemaList **result, Error **errp)
{
    StatsSchemaValueList *list = NULL, **tail = &list;
    int i;

    for (i = 0; i < ARRAY_SIZE(dedup_stats); i++) {
        StatsSchemaValue *value = g_new0(StatsSchemaValue, 1);

        value->name = g_strdup(dedup_stats[i].name);
        value->type = dedup_stats[i].type;
        value->has_unit = dedup_stats[i].has_unit;
        value->unit = dedup_stats[i].unit;
        value->exponent = dedup_stats[i].exponent;
        if (value->exponent) {
            value->has_base = true;
            value->base = 10;
        }
        QAPI_LIST_APPEND(tail, value);
    }
    add_stats_schema(result, STATS_PROVIDER_DEDUP, STATS_TARGET_VM, list);
}

static void dedup_stats_register(void)
{
    add_stats_callbacks(STATS_PROVIDER_DEDUP, dedup_stats_query,
                        dedup_stats_schema);
}

type_init(dedup_stats_register)
