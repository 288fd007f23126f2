/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Restoring a range or a region on behalf of its owner, on the calling
 * thread; a request for everything is unmerge.c's.
 *
 * What it takes is reserved first (room.h), so that an owner who asks for too
 * much gets an error and nothing has changed.  Then it goes window by window,
 * one taking of the remap lock each, and looks at the room on the way: if that
 * runs short, what was restored by then stays restored.
 */

#include "internal.h"

void dedup_restore_error(uint64_t left, unsigned lacks, GError **error)
{
    static const struct {
        DedupLack lack;
        const char *text;
    } reasons[] = {
        { DEDUP_LACK_FILE, "the file system of the RAM's file is full" },
        { DEDUP_LACK_MAPS, "the process is at its limit of mappings "
                           "(vm.max_map_count)" },
        { DEDUP_LACK_UNPINNED, "a device writes to them" },
        { DEDUP_LACK_FREEZE, "a background snapshot or an incoming "
                             "migration works on the RAM, or no userfaultfd "
                             "can be had" },
    };
    g_autoptr(GString) text = g_string_new(NULL);

    for (unsigned i = 0; i < G_N_ELEMENTS(reasons); i++) {
        if (lacks & reasons[i].lack) {
            g_string_append_printf(text, "%s%s", text->len ? ", or " : "",
                                   reasons[i].text);
        }
    }
    g_set_error(error, DEDUP_ERROR,
                lacks & DEDUP_LACK_FILE ? DEDUP_ERROR_MEMORY :
                lacks == DEDUP_LACK_UNPINNED ? DEDUP_ERROR_PINNED
                                             : DEDUP_ERROR_STATE,
                "%" G_GUINT64_FORMAT " pages cannot have their own memory "
                "now: %s", left,
                text->len ? text->str : "the kernel refused it");
}

/* The part of a region that lies in [host, host + size). */
static bool intersect(const DedupRegion *r, const uint8_t *host,
                      const uint8_t *end, uint32_t *first, uint32_t *n)
{
    const uint8_t *start = MAX(host, r->host);
    const uint8_t *stop = MIN(end, dedup_region_addr(r, r->npages));

    if (start >= stop) {
        return false;
    }
    *first = (start - r->host) >> DEDUP_PAGE_SHIFT;
    *n = ((stop - r->host + DEDUP_PAGE_SIZE - 1) >> DEDUP_PAGE_SHIFT) -
         *first;
    return true;
}

/*
 * The first region with a part in [host, end) that may not be its own; NULL:
 * none.  Remap lock held.
 */
static DedupRegion *next_region(DedupEngine *e, const uint8_t *host,
                                const uint8_t *end, uint32_t *first,
                                uint32_t *n)
{
    DedupRegion *next = NULL;
    uint32_t f, k;

    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);

        if (r->merged + r->broken + r->zero + r->zero_mapped &&
            intersect(r, host, end, &f, &k) &&
            (!next || r->host < next->host)) {
            next = r;
            *first = f;
            *n = k;
        }
    }
    return next;
}

/* At most what restoring [host, end) takes. */
static void need_range(DedupEngine *e, const uint8_t *host,
                       const uint8_t *end, DedupNeed *need)
{
    *need = (DedupNeed) { 0 };
    dedup_lock(e);
    for (unsigned i = 0; i < e->regions->len; i++) {
        DedupRegion *r = g_ptr_array_index(e->regions, i);
        uint32_t first, n;

        if (intersect(r, host, end, &first, &n)) {
            dedup_need_add(need, r, n);
        }
    }
    dedup_unlock(e);
}

/* Where a walk is, and what it found. */
typedef struct Walk {
    const uint8_t *at;
    const uint8_t *end;
    uint64_t taken;           /* bytes, since the last look at the room */
    uint64_t left;            /* pages that are not own */
    unsigned lacks;
    bool cancelled;
} Walk;

/* One window.  False: that was all. */
static bool walk_window(DedupEngine *e, Walk *w)
{
    DedupRegion *r;
    uint32_t first, n;

    dedup_lock(e);
    r = next_region(e, w->at, w->end, &first, &n);
    if (r && r->abandoned) {
        w->cancelled = true;
        r = NULL;
    }
    if (r) {
        uint64_t before = dedup_region_mapped(r);
        uint32_t end = first + n;

        first = dedup_ledger_next(r, first, end);
        n = MIN(end - first, DEDUP_WINDOW_PAGES);
        w->left += dedup_restore_locked(r, first, n);
        w->taken += (before - dedup_region_mapped(r)) << DEDUP_PAGE_SHIFT;
        w->lacks |= r->lacks;
        r->lacks = 0;
        w->at = dedup_region_addr(r, first + n);
    }
    dedup_unlock(e);
    return r != NULL;
}

bool dedup_engine_restore_range(DedupEngine *e, void *host, uint64_t size,
                                GError **error)
{
    Walk w = { .at = host, .end = (uint8_t *)host + size };
    DedupReservation reserved = { 0 };
    uint64_t step = 0;
    DedupNeed need;
    bool ok;

    need_range(e, w.at, w.end, &need);
    ok = dedup_reserve(e, &reserved, &need, false, error);
    while (ok) {
        if (w.taken >= step) {
            need_range(e, w.at, w.end, &need);
            step = dedup_reserve_next(e, &reserved, &need, false, error);
            w.taken = 0;
            ok = step > 0;
        }
        if (ok && !walk_window(e, &w)) {
            break;
        }
    }
    dedup_unreserve(e, &reserved);
    if (ok && w.cancelled) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_STATE,
                    "the restore was cancelled");
    } else if (ok && w.left) {
        dedup_restore_error(w.left, w.lacks, error);
    }
    return ok && !w.cancelled && !w.left;
}

bool dedup_engine_check_room(DedupEngine *e, DedupRegion *const *regions,
                             unsigned n, GError **error)
{
    DedupReservation reserved = { 0 };
    DedupNeed need = { 0 };
    bool ok;

    dedup_lock(e);
    for (unsigned i = 0; i < n; i++) {
        dedup_need_add(&need, regions[i], regions[i]->npages);
    }
    dedup_unlock(e);
    ok = dedup_reserve(e, &reserved, &need, false, error);
    dedup_unreserve(e, &reserved);
    return ok;
}
