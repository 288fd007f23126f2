/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: the properties of the dedup-scanner object
 *
 * Until complete() the object keeps them all; then the engine has those that
 * may be changed at any time (DedupParams), and the others are fixed.  All of
 * them can be read in every state.  With the BQL held.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/visitor.h"
#include "dedup-internal.h"

static void set_params(DedupScanner *ds, const DedupParams *params)
{
    ds->params = *params;
    if (ds->engine) {
        /* Merging must be allowed before it begins. */
        if (params->run) {
            dedup_scanner_update(ds, true);
        }
        dedup_engine_set_params(ds->engine, params);
        if (params->run && ds->unmerging) {
            dedup_events_cancel_unmerge(ds);
        }
        dedup_scanner_update(ds, params->run);
    }
}

/* Is it too late to change a property that is fixed at creation? */
static bool is_fixed(DedupScanner *ds, const char *name, Error **errp)
{
    if (ds->completed) {
        error_setg(errp, "property '%s' of a dedup-scanner cannot be changed "
                   "once it exists", name);
    }
    return ds->completed;
}

static char *get_group(Object *obj, Error **errp)
{
    return g_strdup(DEDUP_SCANNER(obj)->group);
}

static void set_group(Object *obj, const char *value, Error **errp)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);

    if (!is_fixed(ds, "group", errp)) {
        g_free(ds->group);
        ds->group = g_strdup(value);
    }
}

static int get_write_protect(Object *obj, Error **errp)
{
    return DEDUP_SCANNER(obj)->write_protect;
}

static void set_write_protect(Object *obj, int value, Error **errp)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);

    if (!is_fixed(ds, "write-protect", errp)) {
        ds->write_protect = value;
    }
}

static void check_thread_context(const Object *obj, const char *name,
                                 Object *val, Error **errp)
{
    is_fixed(DEDUP_SCANNER(obj), name, errp);
}

static int get_huge_pages(Object *obj, Error **errp)
{
    DedupParams params;

    dedup_scanner_get_params(DEDUP_SCANNER(obj), &params);
    return params.huge_pages_split ? DEDUP_HUGE_PAGES_SPLIT
                                   : DEDUP_HUGE_PAGES_KEEP;
}

static void set_huge_pages(Object *obj, int value, Error **errp)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);
    DedupParams params;

    dedup_scanner_get_params(ds, &params);
    params.huge_pages_split = value == DEDUP_HUGE_PAGES_SPLIT;
    set_params(ds, &params);
}

/* One enum for the engine, one for people; the same values. */
QEMU_BUILD_BUG_ON((int)DEDUP_MODE_FULL != (int)DEDUP_SCAN_MODE_FULL);
QEMU_BUILD_BUG_ON((int)DEDUP_MODE_ZERO != (int)DEDUP_SCAN_MODE_ZERO);
QEMU_BUILD_BUG_ON((int)DEDUP_MODE_ESTIMATE != (int)DEDUP_SCAN_MODE_ESTIMATE);

static int get_mode(Object *obj, Error **errp)
{
    DedupParams params;

    dedup_scanner_get_params(DEDUP_SCANNER(obj), &params);
    return params.mode;
}

bool dedup_scanner_check_mode(const DedupParams *params, Error **errp)
{
    if (params->mode == DEDUP_MODE_ZERO && !params->zero_pages) {
        error_setg(errp, "mode=zero with zero-pages=off would do nothing: set "
                   "zero-pages=on, or run=off");
        return false;
    }
    return true;
}

static void set_mode(Object *obj, int value, Error **errp)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);
    DedupParams params;

    dedup_scanner_get_params(ds, &params);
    if (ds->completed && value != params.mode &&
        (value == DEDUP_SCAN_MODE_ESTIMATE || dedup_scanner_estimates(ds))) {
        error_setg(errp, "a dedup-scanner with mode=estimate takes nothing "
                   "that merging needs: remove it with object-del, and add "
                   "one with the mode you want");
        return;
    }
    params.mode = value;
    if (!ds->completed || dedup_scanner_check_mode(&params, errp)) {
        set_params(ds, &params);
    }
}

/* One enum for the engine, one for people; the same values. */
QEMU_BUILD_BUG_ON((int)DEDUP_ADVISOR_NONE != (int)DEDUP_SCAN_ADVISOR_NONE);
QEMU_BUILD_BUG_ON((int)DEDUP_ADVISOR_SCAN_TIME !=
                  (int)DEDUP_SCAN_ADVISOR_SCAN_TIME);
QEMU_BUILD_BUG_ON((int)DEDUP_ADVISOR_PRESSURE !=
                  (int)DEDUP_SCAN_ADVISOR_PRESSURE);

static int get_advisor(Object *obj, Error **errp)
{
    DedupParams params;

    dedup_scanner_get_params(DEDUP_SCANNER(obj), &params);
    return params.advisor;
}

static void set_advisor(Object *obj, int value, Error **errp)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);
    DedupParams params;

    dedup_scanner_get_params(ds, &params);
    params.advisor = value;
    ds->has_advisor = true;
    set_params(ds, &params);
}

/* Who says how fast to scan wants no advice, unless he has said that, too. */
static void choose_advisor(DedupScanner *ds, DedupParams *params,
                           const void *field)
{
    if (!ds->has_advisor && (field == &params->pages_to_scan ||
                             field == &params->sleep_millisecs)) {
        params->advisor = DEDUP_ADVISOR_NONE;
    }
}

/*
 * A property that is a field of DedupParams.  Not the enums, because
 * object_property_get_enum() needs what object_class_property_add_enum() makes.
 */
typedef struct DedupProperty {
    const char *name;
    size_t offset;
    uint32_t min;
    uint32_t max;               /* 0: a bool */
    uint32_t def;
    const char *description;
} DedupProperty;

#define BOOL(name_, field, description_) \
    { .name = name_, .offset = offsetof(DedupParams, field), \
      .def = true, .description = description_ }
#define NUMBER(name_, field, min_, max_, def_, description_) \
    { .name = name_, .offset = offsetof(DedupParams, field), \
      .min = min_, .max = max_, .def = def_, .description = description_ }

static DedupProperty properties[] = {
    BOOL("run", run, "Scan and merge; off keeps what is merged"),
    BOOL("zero-pages", zero_pages, "Give back pages that contain only zeros"),
    NUMBER("target-scan-time", target_scan_s, 1, 86400,
           DEDUP_DEFAULT_TARGET_SCAN_TIME,
           "With an advisor: seconds that a full scan is to take "
           "(1 to 86400)"),
    NUMBER("max-cpu", max_cpu, 0, 100000, DEDUP_DEFAULT_MAX_CPU,
           "With an advisor: CPU time that the group may spend, in percent of "
           "a processor (0: no limit, to 100000)"),
    NUMBER("max-cpu-vm", max_cpu_vm, 0, 100, 0,
           "With an advisor: CPU time that this VM may spend, in percent of a "
           "processor (0: no limit, to 100)"),
    NUMBER("advisor-min-pages-to-scan", min_pages, 0, 1U << 31, 0,
           "With an advisor: fewest pages to look at in sleep-millisecs "
           "(0 to 2147483648)"),
    NUMBER("advisor-max-pages-to-scan", max_pages, 0, 1U << 31,
           DEDUP_DEFAULT_MAX_PAGES,
           "With an advisor: most pages to look at in sleep-millisecs "
           "(0: no limit, to 2147483648)"),
    NUMBER("pages-to-scan", pages_to_scan, 1, 1U << 31,
           DEDUP_DEFAULT_PAGES_TO_SCAN,
           "Without an advisor: pages to look at in a batch "
           "(1 to 2147483648)"),
    NUMBER("sleep-millisecs", sleep_millisecs, 0, 60000,
           DEDUP_DEFAULT_SLEEP_MILLISECS,
           "Without an advisor: pause between two batches in milliseconds "
           "(0 to 60000)"),
    NUMBER("max-maps", max_maps, 1, 90, DEDUP_DEFAULT_MAX_MAPS,
           "Share of vm.max_map_count that QEMU may use, in percent "
           "(1 to 90)"),
};

static void get_param(Object *obj, Visitor *v, const char *name, void *opaque,
                      Error **errp)
{
    DedupProperty *p = opaque;
    DedupParams params;
    void *field = (void *)&params + p->offset;

    dedup_scanner_get_params(DEDUP_SCANNER(obj), &params);
    if (p->max) {
        visit_type_uint32(v, name, field, errp);
    } else {
        visit_type_bool(v, name, field, errp);
    }
}

static bool visit_number(Visitor *v, const DedupProperty *p, uint32_t *number,
                         Error **errp)
{
    int64_t value;

    /* A wider type than needed: who is out of range is told the range. */
    if (!visit_type_int64(v, p->name, &value, errp)) {
        return false;
    }
    if (value < p->min || value > p->max) {
        error_setg(errp, "property '%s' must be between %" PRIu32 " and %"
                   PRIu32, p->name, p->min, p->max);
        return false;
    }
    *number = value;
    return true;
}

static void set_param(Object *obj, Visitor *v, const char *name, void *opaque,
                      Error **errp)
{
    DedupScanner *ds = DEDUP_SCANNER(obj);
    DedupProperty *p = opaque;
    DedupParams params;
    void *field = (void *)&params + p->offset;

    dedup_scanner_get_params(ds, &params);
    if ((p->max ? visit_number(v, p, field, errp)
                : visit_type_bool(v, name, field, errp)) &&
        (!ds->completed || dedup_scanner_check_mode(&params, errp))) {
        choose_advisor(ds, &params, field);
        set_params(ds, &params);
    }
}

static void add_param(ObjectClass *oc, DedupProperty *p)
{
    ObjectProperty *prop;

    prop = object_class_property_add(oc, p->name, p->max ? "int" : "bool",
                                     get_param, set_param, NULL, p);
    if (p->max) {
        object_property_set_default_uint(prop, p->def);
    } else {
        object_property_set_default_bool(prop, p->def);
    }
    object_class_property_set_description(oc, p->name, p->description);
}

void dedup_scanner_add_properties(ObjectClass *oc)
{
    ObjectProperty *prop;
    int i;

    /* Defaults are set before dedup_scanner_init() sets the same. */
    object_class_property_add_str(oc, "group", get_group, set_group);
    object_class_property_set_description(oc, "group",
        "Directory or name of the group to share pages with");
    prop = object_class_property_add_enum(oc, "write-protect",
                                          "DedupWriteProtect",
                                          &DedupWriteProtect_lookup,
                                          get_write_protect,
                                          set_write_protect);
    object_property_set_default_str(prop, "auto");
    object_class_property_set_description(oc, "write-protect",
        "How pages are kept from changing while they are replaced "
        "(auto, userfaultfd, mprotect)");
    prop = object_class_property_add_enum(oc, "mode", "DedupScanMode",
                                          &DedupScanMode_lookup,
                                          get_mode, set_mode);
    object_property_set_default_str(prop, "full");
    object_class_property_set_description(oc, "mode",
        "What to look for (full, zero, estimate)");
    prop = object_class_property_add_enum(oc, "huge-pages", "DedupHugePages",
                                          &DedupHugePages_lookup,
                                          get_huge_pages, set_huge_pages);
    object_property_set_default_str(prop, "split");
    object_class_property_set_description(oc, "huge-pages",
        "What to do with transparent huge pages (split, keep)");
    prop = object_class_property_add_enum(oc, "advisor", "DedupScanAdvisor",
                                          &DedupScanAdvisor_lookup,
                                          get_advisor, set_advisor);
    object_property_set_default_str(prop, "scan-time");
    object_class_property_set_description(oc, "advisor",
        "What decides how fast to scan (none, scan-time, pressure)");
    for (i = 0; i < ARRAY_SIZE(properties); i++) {
        add_param(oc, &properties[i]);
    }
    object_class_property_add_link(oc, "thread-context", TYPE_THREAD_CONTEXT,
                                   offsetof(DedupScanner, thread_context),
                                   check_thread_context,
                                   OBJ_PROP_LINK_STRONG);
    object_class_property_set_description(oc, "thread-context",
        "Context to create the scanner's thread from");
}
