/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Publishing: making segments of what is wanted twice.
 *
 * The first place that sees a content leaves a hint.  The second copies the
 * page into a draft, in scan order, so that runs of guest pages become runs of
 * segment pages.  When the draft is full, or the pass ends, it is sealed, and
 * its pages are announced in the index, where who waits for them finds them
 * (todo.h).  Until then they are claimed there, so that no other member
 * publishes the same content meanwhile.
 *
 * What another member is said to have is published only after that member
 * proved that it has it (I10): ask.c.
 *
 * Whoever holds one page of a segment can fetch it, and then reads all of
 * it.  So what was found twice within this VM goes to one draft, and what
 * another member proved to have goes to another: who shares a page with us
 * learns nothing that only we hold.
 *
 * Nothing is published while the memory cgroup could not bear the guest
 * taking all its RAM back: a segment stays charged to its publisher even
 * when only others map it.
 */

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "host/mutant.h"
#include "scan/leave.h"
#include "scan/publish.h"
#include "scan/todo.h"
#include "space/array.h"

#define BUFFER_BYTES (DEDUP_PROOF_PAGES * DEDUP_PAGE_SIZE)

/* Room to leave in the cgroup for what is not guest RAM. */
#define CGROUP_MARGIN (32ULL << 20)

/* A page of the builder, to be announced when it is sealed. */
typedef struct Announce {
    uint64_t hash;
    uint32_t page;            /* ours, of the claim that it replaces */
} Announce;

/* Could the cgroup bear one more segment of each kind and all our RAM? */
static bool cgroup_has_room(DedupScan *scan)
{
    return DEDUP_MUTANT(NO_HEADROOM) ||
           dedup_cgroup_room(scan->room, DEDUP_OWED_GROWTH) >=
           CGROUP_MARGIN + DEDUP_PUBLISH_BYTES + dedup_owed_bytes(scan->room);
}

/*
 * QEMU needs descriptors as well: half of them are for segments, and for a
 * socket to each member and one from it.
 */
bool dedup_publish_has_fds(DedupScan *scan)
{
    struct rlimit limit;
    uint64_t sockets = 2 * dedup_group_members(scan->group);

    return getrlimit(RLIMIT_NOFILE, &limit) < 0 ||
           dedup_holdings_held(scan->space) +
           MIN(sockets, limit.rlim_cur / 4) < limit.rlim_cur / 2;
}

/* ---- a draft ---- */

static void seal_draft(DedupScan *scan, DedupDraft *d);

bool dedup_publish_ready(DedupScan *scan, DedupDraft *d)
{
    g_autoptr(GError) error = NULL;

    if (d->builder &&
        dedup_builder_count(d->builder) == DEDUP_SEGMENT_PAGES) {
        seal_draft(scan, d);
    }
    if (d->builder) {
        return true;
    }
    if (!dedup_publish_has_fds(scan)) {
        scan->limits |= DEDUP_LIMIT_FDS;
        return false;
    }
    if (!cgroup_has_room(scan)) {
        scan->limits |= DEDUP_LIMIT_MEMORY;
        return false;
    }
    d->builder = dedup_builder_new(&error);
    if (!d->builder) {
        scan->limits |= DEDUP_LIMIT_FDS;
        return false;
    }
    return true;
}

/* A hint of ours about one of our pages, by its member page number. */
static DedupHint own_hint(DedupScan *scan, DedupHintKind kind, uint32_t page,
                          uint64_t hash)
{
    DedupHint hint = {
        .kind = kind,
        .where = dedup_group_self(scan->group),
        .page = page,
    };

    hint.raw = dedup_index_raw(hash, &hint);
    return hint;
}

bool dedup_publish_claim(DedupScan *scan, const DedupRegion *r, uint32_t page,
                         uint64_t hash, const DedupHint *hint)
{
    DedupHint claimed = own_hint(scan, DEDUP_HINT_CLAIMED,
                                 dedup_region_base(r) + page, hash);

    return dedup_index_replace(scan->index, hash, hint, &claimed);
}

static void disclaim(DedupScan *scan, uint32_t page, uint64_t hash)
{
    DedupHint claimed = own_hint(scan, DEDUP_HINT_CLAIMED, page, hash);
    DedupHint mine = own_hint(scan, DEDUP_HINT_CANDIDATE, page, hash);

    dedup_index_replace(scan->index, hash, &claimed, &mine);
}

void dedup_publish_disclaim(DedupScan *scan, const DedupRegion *r,
                            uint32_t page, uint64_t hash)
{
    disclaim(scan, dedup_region_base(r) + page, hash);
}

/* What is behind the first @n pages is not in it after all. */
static void cut_draft(DedupScan *scan, DedupDraft *d, unsigned n)
{
    for (unsigned i = n; i < d->announce->len; i++) {
        const Announce *a = &g_array_index(d->announce, Announce, i);

        disclaim(scan, a->page, a->hash);
        g_hash_table_remove(d->hashes, GSIZE_TO_POINTER(a->hash));
    }
    g_array_set_size(d->announce, MIN(n, d->announce->len));
}

bool dedup_publish_append(DedupScan *scan, DedupDraft *d,
                          const DedupRegion *r, uint32_t page, uint64_t hash,
                          const void *content)
{
    Announce a = { .hash = hash, .page = dedup_region_base(r) + page };

    if (dedup_builder_append(d->builder, content) < 0) {
        disclaim(scan, a.page, hash);
        cut_draft(scan, d, dedup_builder_count(d->builder));
        scan->limits |= DEDUP_LIMIT_MEMORY;
        return false;
    }
    g_array_append_val(d->announce, a);
    g_hash_table_add(d->hashes, GSIZE_TO_POINTER(hash));
    return true;
}

bool dedup_publish_has(DedupScan *scan, uint64_t hash)
{
    bool has = false;

    for (unsigned k = 0; k < DEDUP_DRAFTS && !has; k++) {
        has = g_hash_table_contains(scan->publisher.draft[k].hashes,
                                    GSIZE_TO_POINTER(hash));
    }
    return has;
}

/* ---- two own pages ---- */

/* It is published, but the hint does not say so: mend that. */
static bool mend_hint(DedupScan *scan, const DedupHolding *h, uint32_t page,
                      uint64_t hash, const DedupHint *hint)
{
    DedupHint published = dedup_scan_published(h->segment, page);

    return h->segment->gid && !dedup_leave_note(scan, h)->leaving &&
           dedup_page_hash(dedup_segment_page(h->segment, page),
                           scan->salt) == hash &&
           dedup_index_replace(scan->index, hash, hint, &published);
}

static void publish_copy(DedupScan *scan, DedupRegion *r, uint32_t page,
                         DedupRegion *r2, uint32_t page2, uint64_t hash,
                         const uint8_t *copy)
{
    DedupDraft *d = &scan->publisher.draft[DEDUP_DRAFT_WITHIN];

    if (dedup_publish_append(scan, d, r, page, hash, copy)) {
        dedup_todo_add(scan, r2, page2, hash, true);
        dedup_todo_add(scan, r, page, hash, true);
    }
}

DedupPair dedup_publish_pair(DedupScan *scan, DedupRegion *r, uint32_t page,
                             DedupRegion *r2, uint32_t page2, uint64_t hash,
                             const DedupHint *hint)
{
    /* free: no proof is under way */
    uint8_t *copy = scan->publisher.buffer;
    bool ready = dedup_publish_ready(
        scan, &scan->publisher.draft[DEDUP_DRAFT_WITHIN]);
    DedupHolding *h;
    uint16_t index;
    uint64_t other;

    switch (dedup_space_relate(r, page, r2, page2, copy, scan->salt, &other,
                               &h, &index)) {
    case DEDUP_PAGES_MERGED:
        if (!mend_hint(scan, h, index, hash, hint)) {
            return DEDUP_PAIR_STALE;
        }
        dedup_todo_add(scan, r, page, hash, true);
        return DEDUP_PAIR_EQUAL;
    case DEDUP_PAGES_SAME:
        if (dedup_page_hash(copy, scan->salt) != hash) {
            return DEDUP_PAIR_STALE;
        }
        /* without room now the hint stays as it is */
        if (ready && dedup_publish_claim(scan, r, page, hash, hint)) {
            publish_copy(scan, r, page, r2, page2, hash, copy);
        }
        return DEDUP_PAIR_EQUAL;
    case DEDUP_PAGES_DIFFER:
        return dedup_index_collides(hash, other) ? DEDUP_PAIR_COLLIDES
                                                 : DEDUP_PAIR_STALE;
    case DEDUP_PAGES_GONE:
        break;
    }
    return DEDUP_PAIR_STALE;
}

/* ---- the end of a draft ---- */

static void announce(DedupScan *scan, DedupDraft *d,
                     const DedupSegment *segment)
{
    for (unsigned i = 0; i < d->announce->len; i++) {
        const Announce *a = &g_array_index(d->announce, Announce, i);
        DedupHint old = own_hint(scan, DEDUP_HINT_CLAIMED, a->page, a->hash);
        DedupHint published = dedup_scan_published(segment, i);

        if (!dedup_index_replace(scan->index, a->hash, &old, &published) &&
            !dedup_index_insert(scan->index, a->hash, &published)) {
            scan->limits |= dedup_scan_index_limit(scan);
        }
    }
    g_array_set_size(d->announce, 0);
}

/* What was not announced is not claimed any more. */
static void forget_draft(DedupScan *scan, DedupDraft *d)
{
    dedup_builder_free(g_steal_pointer(&d->builder));
    cut_draft(scan, d, 0);
    g_hash_table_remove_all(d->hashes);
}

/*
 * Make a segment of the draft and give it a name, or NULL.
 *
 * The name is in the group's table before any hint has it, and stays there
 * until nobody uses the segment any more.  So who reads a hint, then looks
 * for its segment and finds none, may remove the hint (upkeep.c sweeps the
 * index of such): it is stale, never too young.
 */
static DedupSegment *finish_draft(DedupScan *scan, DedupDraft *d)
{
    g_autoptr(GError) error = NULL;
    unsigned n = dedup_builder_flush(d->builder);
    DedupSegment *segment;
    uint32_t gid;

    if (n < d->announce->len) {
        cut_draft(scan, d, n);
        scan->limits |= DEDUP_LIMIT_MEMORY;
    }
    gid = n ? dedup_group_segment_alloc(scan->group, n) : 0;
    if (!gid) {
        scan->limits |= n ? DEDUP_LIMIT_INDEX : 0;
        return NULL;
    }
    segment = dedup_builder_finish(g_steal_pointer(&d->builder), gid, &error);
    if (!segment) {
        dedup_group_segment_release(scan->group, gid);
        scan->limits |= DEDUP_LIMIT_FDS;
        return NULL;
    }
    return segment;
}

static void seal_draft(DedupScan *scan, DedupDraft *d)
{
    DedupSegment *segment = d->announce->len ? finish_draft(scan, d) : NULL;

    if (segment) {
        dedup_holding_add(scan->space, segment);
        announce(scan, d, segment);
    }
    forget_draft(scan, d);
}

void dedup_publish_seal(DedupScan *scan)
{
    for (unsigned k = 0; k < DEDUP_DRAFTS; k++) {
        seal_draft(scan, &scan->publisher.draft[k]);
    }
}

void dedup_scan_abandon(DedupScan *scan)
{
    for (unsigned k = 0; k < DEDUP_DRAFTS; k++) {
        forget_draft(scan, &scan->publisher.draft[k]);
    }
    dedup_todo_forget_told(scan);
    dedup_todo_forget(scan);
}

/* ---- life ---- */

bool dedup_publish_init(DedupScan *scan, GError **error)
{
    DedupPublisher *p = &scan->publisher;

    p->buffer = dedup_array_new(BUFFER_BYTES);
    if (!p->buffer) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM,
                    "cannot map a buffer: %s", g_strerror(errno));
        return false;
    }
    for (unsigned k = 0; k < DEDUP_DRAFTS; k++) {
        p->draft[k] = (DedupDraft) {
            .announce = g_array_new(false, false, sizeof(Announce)),
            .hashes = g_hash_table_new(NULL, NULL),
        };
    }
    p->failed = g_hash_table_new(NULL, NULL);
    return true;
}

void dedup_publish_clear(DedupScan *scan)
{
    DedupPublisher *p = &scan->publisher;

    dedup_scan_abandon(scan);
    for (unsigned k = 0; k < DEDUP_DRAFTS; k++) {
        g_array_free(p->draft[k].announce, true);
        g_hash_table_destroy(p->draft[k].hashes);
    }
    g_hash_table_destroy(p->failed);
    dedup_array_free(p->buffer, BUFFER_BYTES);
}

void dedup_publish_tidy(DedupScan *scan)
{
    dedup_array_forget(scan->publisher.buffer, BUFFER_BYTES);
}

uint64_t dedup_publish_bytes(const DedupScan *scan)
{
    return dedup_array_resident(scan->publisher.buffer, BUFFER_BYTES);
}
