/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Publishing: making segments of what is wanted twice, and finding them.
 *
 * The first place that sees a content leaves a hint.  The second copies the
 * page into the segment that is being built (the builder), in scan order, so
 * that runs of guest pages become runs of segment pages.  When the builder
 * is full, or the pass ends, it is sealed, its pages are announced in the
 * index, and what waited for it is merged.  Until then its pages are claimed
 * there, so that no other member publishes the same content meanwhile.
 *
 * What another member is said to have is published only after that member
 * proved that it has it (I10): the proof is made over the copy that will be
 * published, not over the guest's page, which may change in between.
 *
 * Whoever holds one page of a segment can fetch it, and then reads all of
 * it.  So what was found twice within this VM goes to one segment, and what
 * another member proved to have goes to another (DedupBatch): who shares a
 * page with us learns nothing that only we hold.  To fetch a segment, we
 * prove in turn that we have the page for which we want it.
 *
 * Nothing is published while the memory cgroup could not bear the guest
 * taking all its RAM back: a segment stays charged to its publisher even
 * when only others map it.
 */

#include <string.h>
#include <sys/resource.h>

#include "internal.h"

/* Room to leave in the cgroup for what is not guest RAM. */
#define CGROUP_MARGIN (32ULL << 20)

/*
 * How often in a pass a segment is asked for in vain.  More than once, as
 * the index compares a part of the hash: we may lack the page after all, and
 * yet have another one of the same segment.
 */
#define FETCH_TRIES 64

/* Could the cgroup bear one more segment of each kind and all our RAM? */
static bool cgroup_has_room(DedupEngine *e)
{
    return DEDUP_MUTANT(NO_HEADROOM) ||
           dedup_cgroup_room(e, DEDUP_CLAIM_OWED) >=
           CGROUP_MARGIN + DEDUP_PUBLISH_BYTES + dedup_owed_bytes(e);
}

/*
 * QEMU needs descriptors as well: half of them are for segments, and for a
 * socket to each member and one from it.
 */
static bool fds_left(DedupEngine *e)
{
    struct rlimit limit;
    uint64_t sockets = 2 * dedup_group_members(e->group);

    return getrlimit(RLIMIT_NOFILE, &limit) < 0 ||
           e->segments_held + MIN(sockets, limit.rlim_cur / 4) <
           limit.rlim_cur / 2;
}

static void flush_batch(DedupEngine *e, DedupBatch *b);

/* Make sure that the batch has room for a page. */
static bool batch_ready(DedupEngine *e, DedupBatch *b)
{
    g_autoptr(GError) error = NULL;

    if (b->builder &&
        dedup_builder_count(b->builder) == DEDUP_SEGMENT_PAGES) {
        flush_batch(e, b);
    }
    if (b->builder) {
        return true;
    }
    if (!fds_left(e)) {
        e->pass_limits |= DEDUP_LIMIT_FDS;
        return false;
    }
    if (!cgroup_has_room(e)) {
        e->pass_limits |= DEDUP_LIMIT_MEMORY;
        return false;
    }
    b->builder = dedup_builder_new(&error);
    if (!b->builder) {
        e->pass_limits |= DEDUP_LIMIT_FDS;
        return false;
    }
    return true;
}

static void add_pending(DedupBatch *b, DedupRegion *r, uint32_t page,
                        unsigned index)
{
    DedupPending p = { .region = r, .page = page, .index = index };

    g_array_append_val(b->pending, p);
}

/* A hint of ours about one of our pages, by its member page number. */
static DedupHint own_hint(DedupEngine *e, DedupHintKind kind, uint32_t page,
                          uint64_t hash)
{
    DedupHint hint = {
        .kind = kind,
        .where = dedup_group_self(e->group),
        .page = page,
    };

    hint.raw = dedup_index_raw(hash, &hint);
    return hint;
}

/*
 * Tell the others that we are about to publish this content, so that no two
 * members do.  False: the hint is another one by now, and the content is for
 * whoever changed it to publish.
 */
static bool claim(DedupEngine *e, const DedupRegion *r, uint32_t page,
                  uint64_t hash, const DedupHint *hint)
{
    DedupHint claimed = own_hint(e, DEDUP_HINT_CLAIMED, r->base + page, hash);

    return dedup_index_replace(e->index, hash, hint, &claimed);
}

/*
 * The claim came to nothing: we have the page, no more.  Others would wait
 * for what is claimed.
 */
static void disclaim(DedupEngine *e, uint32_t page, uint64_t hash)
{
    DedupHint claimed = own_hint(e, DEDUP_HINT_CLAIMED, page, hash);
    DedupHint mine = own_hint(e, DEDUP_HINT_CANDIDATE, page, hash);

    dedup_index_replace(e->index, hash, &claimed, &mine);
}

static void disclaim_remote(DedupEngine *e, const DedupRemote *remote)
{
    disclaim(e, remote->region->base + remote->page, remote->hash);
}

/*
 * The contents of a page that is claimed become part of the segment.  Returns
 * their number, or -1: there is no memory for them, and the claim is off.
 */
static int append(DedupEngine *e, DedupBatch *b, const DedupRegion *r,
                  uint32_t page, uint64_t hash, const void *content)
{
    DedupAnnounce a = { .hash = hash, .page = r->base + page };
    int index = dedup_builder_append(b->builder, content);

    if (index < 0) {
        disclaim(e, a.page, hash);
        e->pass_limits |= DEDUP_LIMIT_MEMORY;
        return -1;
    }
    g_array_append_val(b->announce, a);
    g_hash_table_insert(b->pending_hash, GSIZE_TO_POINTER(hash),
                        GUINT_TO_POINTER(index + 1));
    return index;
}

/* May a page be read, and is it worth merging?  Remap lock held. */
static bool readable(DedupRegion *r, uint32_t page)
{
    uint32_t entry = dedup_entry_at(r, page);

    return !r->dead && (entry == DEDUP_OWN || (dedup_entry_is_segment(entry) &&
                                               (entry & DEDUP_BROKEN))) &&
           dedup_is_present(r, page);
}

static bool pending_in(DedupEngine *e, DedupBatch *b, DedupRegion *r,
                       uint32_t page, uint64_t hash)
{
    unsigned index = GPOINTER_TO_UINT(g_hash_table_lookup(
        b->pending_hash, GSIZE_TO_POINTER(hash)));
    bool same = false;

    if (!index) {
        return false;
    }
    index--;
    dedup_lock(e);
    if (readable(r, page)) {
        same = dedup_page_equal(dedup_region_addr(r, page),
                                dedup_builder_page(b->builder, index));
    }
    dedup_unlock(e);
    if (same) {
        add_pending(b, r, page, index);
    }
    return same;
}

bool dedup_publish_pending(DedupEngine *e, DedupRegion *r, uint32_t page,
                           uint64_t hash)
{
    for (unsigned k = 0; k < DEDUP_BATCHES; k++) {
        if (pending_in(e, &e->batch[k], r, page, hash)) {
            return true;
        }
    }
    return false;
}

/* Copies the page to @copy if the other one is equal; remap lock held. */
static DedupPair copy_pair(DedupEngine *e, DedupRegion *r, uint32_t page,
                           DedupRegion *r2, uint32_t page2, uint64_t hash,
                           uint8_t *copy)
{
    const uint8_t *other = dedup_region_addr(r2, page2);

    if (!readable(r, page) || !readable(r2, page2)) {
        return DEDUP_PAIR_STALE;
    }
    dedup_page_copy(copy, dedup_region_addr(r, page));
    if (dedup_page_equal(copy, other)) {
        return dedup_page_hash(copy, e->salt) == hash ? DEDUP_PAIR_EQUAL
                                                      : DEDUP_PAIR_STALE;
    }
    return dedup_index_collides(hash, dedup_page_hash(other, e->salt)) ?
           DEDUP_PAIR_COLLIDES : DEDUP_PAIR_STALE;
}

DedupPair dedup_publish_pair(DedupEngine *e, DedupRegion *r, uint32_t page,
                             DedupRegion *r2, uint32_t page2, uint64_t hash,
                             const DedupHint *hint)
{
    DedupBatch *b = &e->batch[DEDUP_BATCH_WITHIN];
    uint8_t *copy = e->proof_buffer; /* free: no proof is under way */
    bool ready = batch_ready(e, b);
    DedupPair pair;
    uint32_t entry;

    dedup_lock(e);
    entry = r2->dead ? DEDUP_OWN : dedup_entry_at(r2, page2);
    if (dedup_entry_is_segment(entry) && !(entry & DEDUP_BROKEN)) {
        /* it is published, but the hint does not say so: mend that */
        DedupSegment *s = dedup_entry_segment(e, entry);
        DedupHint published = {
            .kind = DEDUP_HINT_PUBLISHED,
            .where = s->gid,
            .page = dedup_entry_page(entry),
        };
        bool same = s->gid && !s->leaving &&
                    dedup_page_hash(dedup_segment_page(s, published.page),
                                    e->salt) == hash;

        dedup_unlock(e);
        return same && dedup_index_replace(e->index, hash, hint, &published) ?
               DEDUP_PAIR_EQUAL : DEDUP_PAIR_STALE;
    }
    pair = copy_pair(e, r, page, r2, page2, hash, copy);
    dedup_unlock(e);
    /* without room now the hint stays as it is */
    if (pair == DEDUP_PAIR_EQUAL && ready && claim(e, r, page, hash, hint)) {
        int index = append(e, b, r, page, hash, copy);

        if (index >= 0) {
            add_pending(b, r2, page2, index);
            add_pending(b, r, page, index);
        }
    }
    return pair;
}

/* Copy what is to be proven; false: the page is not what was hashed. */
static bool copy_for_proof(DedupEngine *e, DedupRegion *r, uint32_t page,
                           uint64_t hash, uint8_t *copy)
{
    bool ok;

    dedup_lock(e);
    ok = readable(r, page);
    if (ok) {
        dedup_page_copy(copy, dedup_region_addr(r, page));
    }
    dedup_unlock(e);
    return ok && dedup_page_hash(copy, e->salt) == hash;
}

static void publish_proven(DedupEngine *e, const DedupRemote *remote,
                           const uint8_t *copy)
{
    DedupBatch *b = &e->batch[DEDUP_BATCH_BETWEEN];
    int index;

    if (!batch_ready(e, b)) {
        disclaim_remote(e, remote);
        return;
    }
    index = append(e, b, remote->region, remote->page, remote->hash, copy);
    if (index >= 0) {
        add_pending(b, remote->region, remote->page, index);
    }
}

/* Ask one member about all of its pages among @remotes. */
static void ask_member(DedupEngine *e, unsigned member,
                       const DedupRemote *remotes, unsigned n)
{
    DedupProof proofs[DEDUP_PROOF_PAGES];
    const DedupRemote *asked[DEDUP_PROOF_PAGES];
    unsigned nproofs = 0;

    /* it may take its time to answer: is somebody waiting for us? */
    if (!dedup_may_scan(e) ||
        !batch_ready(e, &e->batch[DEDUP_BATCH_BETWEEN])) {
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        uint8_t *copy = e->proof_buffer + ((size_t)nproofs <<
                                           DEDUP_PAGE_SHIFT);

        if (remotes[i].hint.where == member &&
            !dedup_publish_pending(e, remotes[i].region, remotes[i].page,
                                   remotes[i].hash) &&
            copy_for_proof(e, remotes[i].region, remotes[i].page,
                           remotes[i].hash, copy) &&
            claim(e, remotes[i].region, remotes[i].page, remotes[i].hash,
                  &remotes[i].hint)) {
            asked[nproofs] = &remotes[i];
            proofs[nproofs++] = (DedupProof) {
                .page = remotes[i].hint.page, .content = copy,
            };
        }
    }
    if (!nproofs) {
        return;
    }
    /* a member that does not answer proves nothing */
    dedup_group_prove(e->group, member, proofs, nproofs);
    for (unsigned i = 0; i < nproofs; i++) {
        if (proofs[i].proven) {
            publish_proven(e, asked[i], proofs[i].content);
        } else {
            disclaim_remote(e, asked[i]);
        }
    }
}

void dedup_publish_remote(DedupEngine *e, DedupRemote *remotes, unsigned n)
{
    g_assert(n <= DEDUP_PROOF_PAGES);
    for (unsigned i = 0; i < n; i++) {
        unsigned member = remotes[i].hint.where;
        bool asked = false;

        for (unsigned k = 0; k < i && !asked; k++) {
            asked = remotes[k].hint.where == member;
        }
        if (!asked) {
            ask_member(e, member, remotes + i, n - i);
        }
    }
}

static int compare_pending(const void *a, const void *b)
{
    const DedupPending *x = a;
    const DedupPending *y = b;

    if (x->region->base != y->region->base) {
        return x->region->base < y->region->base ? -1 : 1;
    }
    if (x->region != y->region) {
        /* one that is gone, and who came to its place */
        return x->region->serial < y->region->serial ? -1 : 1;
    }
    return x->page < y->page ? -1 : x->page > y->page;
}

/* Merge everything that waited for the segment, in address order. */
static void merge_pending(DedupEngine *e, DedupBatch *b,
                          DedupSegment *segment)
{
    DedupPending *p = (DedupPending *)b->pending->data;
    DedupAction actions[DEDUP_WINDOW_PAGES];
    unsigned n = 0;

    g_array_sort(b->pending, compare_pending);
    for (unsigned i = 0; i < b->pending->len; i++) {
        /* a page may wait twice: found by another page, then scanned itself */
        bool again = i && p[i].region == p[i - 1].region &&
                     p[i].page == p[i - 1].page;

        if (!again) {
            actions[n++] = (DedupAction) {
                .page = p[i].page, .segment = segment, .index = p[i].index,
            };
        }
        if (n && (n == DEDUP_WINDOW_PAGES || i + 1 == b->pending->len ||
                  p[i + 1].region != p[i].region)) {
            e->pass_found += dedup_windows(p[i].region, actions, n,
                                           &e->pass_limits);
            n = 0;
        }
    }
}

static void announce(DedupEngine *e, DedupBatch *b,
                     const DedupSegment *segment)
{
    for (unsigned i = 0; i < b->announce->len; i++) {
        const DedupAnnounce *a = &g_array_index(b->announce, DedupAnnounce,
                                                i);
        DedupHint old = own_hint(e, DEDUP_HINT_CLAIMED, a->page, a->hash);
        DedupHint published = {
            .kind = DEDUP_HINT_PUBLISHED, .where = segment->gid, .page = i,
        };

        if (!dedup_index_replace(e->index, a->hash, &old, &published) &&
            !dedup_index_insert(e->index, a->hash, &published)) {
            e->pass_limits |= e->index_short ? DEDUP_LIMIT_MEMORY
                                             : DEDUP_LIMIT_INDEX;
        }
    }
    g_array_set_size(b->announce, 0);
}

/* What was not announced is not claimed any more. */
static void forget_batch(DedupEngine *e, DedupBatch *b)
{
    dedup_builder_free(g_steal_pointer(&b->builder));
    for (unsigned i = 0; i < b->announce->len; i++) {
        const DedupAnnounce *a = &g_array_index(b->announce, DedupAnnounce,
                                                i);

        disclaim(e, a->page, a->hash);
    }
    g_array_set_size(b->pending, 0);
    g_array_set_size(b->announce, 0);
    g_hash_table_remove_all(b->pending_hash);
}

/*
 * Seal what is in the batch and give it a name, or NULL.
 *
 * The name is in the group's table before any hint has it, and stays there
 * until nobody uses the segment any more.  So who reads a hint, then looks
 * for its segment and finds none, may remove the hint (policy.c sweeps the
 * index of such): it is stale, never too young.
 */
static DedupSegment *seal_batch(DedupEngine *e, DedupBatch *b)
{
    g_autoptr(GError) error = NULL;
    uint32_t gid = dedup_group_segment_alloc(
        e->group, dedup_builder_count(b->builder));
    DedupSegment *segment;

    if (!gid) {
        e->pass_limits |= DEDUP_LIMIT_INDEX;
        return NULL;
    }
    segment = dedup_builder_finish(g_steal_pointer(&b->builder), gid, &error);
    if (!segment) {
        dedup_group_segment_release(e->group, gid);
        e->pass_limits |= DEDUP_LIMIT_FDS;
        return NULL;
    }
    return segment;
}

static void flush_batch(DedupEngine *e, DedupBatch *b)
{
    DedupSegment *segment = b->pending->len ? seal_batch(e, b) : NULL;

    if (segment) {
        dedup_lock(e);
        dedup_segments_add(e, segment);
        dedup_unlock(e);
        announce(e, b, segment);
        merge_pending(e, b, segment);
    }
    forget_batch(e, b);
}

void dedup_publish_flush(DedupEngine *e)
{
    for (unsigned k = 0; k < DEDUP_BATCHES; k++) {
        flush_batch(e, &e->batch[k]);
    }
}

void dedup_publish_abandon(DedupEngine *e)
{
    for (unsigned k = 0; k < DEDUP_BATCHES; k++) {
        forget_batch(e, &e->batch[k]);
    }
}

bool dedup_publish_waiting(const DedupEngine *e)
{
    bool any = false;

    for (unsigned k = 0; k < DEDUP_BATCHES; k++) {
        any |= e->batch[k].pending->len > 0;
    }
    return any;
}

void dedup_publish_init(DedupEngine *e)
{
    for (unsigned k = 0; k < DEDUP_BATCHES; k++) {
        e->batch[k] = (DedupBatch) {
            .pending = g_array_new(false, false, sizeof(DedupPending)),
            .announce = g_array_new(false, false, sizeof(DedupAnnounce)),
            .pending_hash = g_hash_table_new(NULL, NULL),
        };
    }
}

void dedup_publish_free(DedupEngine *e)
{
    dedup_publish_abandon(e);
    for (unsigned k = 0; k < DEDUP_BATCHES; k++) {
        g_array_free(e->batch[k].pending, true);
        g_array_free(e->batch[k].announce, true);
        g_hash_table_destroy(e->batch[k].pending_hash);
    }
}

/* Fetch a segment for which the page in @copy is the proof. */
static DedupSegment *fetch(DedupEngine *e, unsigned member, unsigned npages,
                           const DedupHint *hint, const uint8_t *copy)
{
    g_autoptr(GError) error = NULL;
    DedupFetch item = {
        .gid = hint->where, .page = hint->page, .content = copy,
    };

    dedup_group_fetch(e->group, member, &item, 1);
    return item.fd < 0 ? NULL : dedup_segment_accept(item.fd, item.gid,
                                                     npages, &error);
}

DedupSegment *dedup_publish_segment(DedupEngine *e, DedupRegion *r,
                                    uint32_t page, uint64_t hash,
                                    const DedupHint *hint, bool *stale)
{
    gpointer gid = GUINT_TO_POINTER(hint->where);
    DedupSegment *s = dedup_segments_find(e, hint->where);
    unsigned member, npages, failed;

    *stale = false;
    if (s) {
        return s->leaving ? NULL : s;
    }
    failed = GPOINTER_TO_UINT(g_hash_table_lookup(e->failed_gids, gid));
    if (g_hash_table_contains(e->left_gids, gid) || failed >= FETCH_TRIES) {
        return NULL;
    }
    if (!dedup_group_segment_lookup(e->group, hint->where, &member,
                                    &npages) || hint->page >= npages) {
        *stale = true;
        return NULL;
    }
    if (!fds_left(e)) {
        e->pass_limits |= DEDUP_LIMIT_FDS;
        return NULL;
    }
    /* the buffer is free: no proof is under way */
    if (!dedup_may_scan(e) ||
        !copy_for_proof(e, r, page, hash, e->proof_buffer)) {
        return NULL;
    }
    s = fetch(e, member, npages, hint, e->proof_buffer);
    if (!s) {
        /* nobody has it, or it is not what it should be, or not for us */
        g_hash_table_insert(e->failed_gids, gid,
                            GUINT_TO_POINTER(failed + 1));
        return NULL;
    }
    dedup_lock(e);
    dedup_segments_add(e, s);
    dedup_unlock(e);
    return s;
}
