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
 * Nothing is published while the memory cgroup could not bear the guest
 * taking all its RAM back: a segment stays charged to its publisher even
 * when only others map it.
 */

#include <string.h>
#include <sys/resource.h>

#include "internal.h"

/* Room to leave in the cgroup for what is not guest RAM. */
#define CGROUP_MARGIN (32ULL << 20)

/* Could the cgroup bear one more segment and all our RAM? */
static bool cgroup_has_room(DedupEngine *e)
{
    uint64_t cgroup_id;
    uint64_t room = dedup_hostmem_cgroup_room(e->hostmem, &cgroup_id);
    uint64_t need = CGROUP_MARGIN + DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE;

    if (room == UINT64_MAX || DEDUP_MUTANT(NO_HEADROOM)) {
        return true;
    }
    need += dedup_owed_bytes(e);
    g_mutex_lock(&e->group_lock);
    for (unsigned m = 0; m < DEDUP_MAX_MEMBERS; m++) {
        DedupMemberInfo info;

        if (m != dedup_group_self(e->group) &&
            dedup_group_member(e->group, m, &info) &&
            info.cgroup_id == cgroup_id) {
            need += MIN(info.owed_bytes, 1ULL << 50);
        }
    }
    g_mutex_unlock(&e->group_lock);
    return room >= need;
}

/* QEMU needs descriptors as well: half of them are for segments. */
static bool fds_left(DedupEngine *e)
{
    struct rlimit limit;

    return getrlimit(RLIMIT_NOFILE, &limit) < 0 ||
           g_hash_table_size(e->by_gid) < limit.rlim_cur / 2;
}

static bool builder_has_memory(DedupEngine *e)
{
    if (!dedup_builder_next(e->builder)) {
        e->pass_limits |= DEDUP_LIMIT_MEMORY;
        return false;
    }
    return true;
}

/* Make sure that the builder has room for a page. */
static bool builder_ready(DedupEngine *e)
{
    g_autoptr(GError) error = NULL;

    if (e->builder &&
        dedup_builder_count(e->builder) == DEDUP_SEGMENT_PAGES) {
        dedup_publish_flush(e);
    }
    if (e->builder) {
        return builder_has_memory(e);
    }
    if (!fds_left(e)) {
        e->pass_limits |= DEDUP_LIMIT_FDS;
        return false;
    }
    if (!cgroup_has_room(e)) {
        e->pass_limits |= DEDUP_LIMIT_MEMORY;
        return false;
    }
    e->builder = dedup_builder_new(&error);
    if (!e->builder) {
        e->pass_limits |= DEDUP_LIMIT_FDS;
        return false;
    }
    return builder_has_memory(e);
}

static void add_pending(DedupEngine *e, DedupRegion *r, uint32_t page,
                        unsigned index)
{
    DedupPending p = { .region = r, .page = page, .index = index };

    g_array_append_val(e->pending, p);
}

/* A hint of ours about one of our pages. */
static DedupHint own_hint(DedupEngine *e, DedupHintKind kind,
                          const DedupRegion *r, uint32_t page)
{
    return (DedupHint) {
        .kind = kind,
        .where = dedup_group_self(e->group),
        .page = r->base + page,
    };
}

/*
 * Tell the others that we are about to publish this content, so that no two
 * members do.  False: the hint is another one by now, and the content is for
 * whoever changed it to publish.
 */
static bool claim(DedupEngine *e, const DedupRegion *r, uint32_t page,
                  uint64_t hash, const DedupHint *hint)
{
    DedupHint claimed = own_hint(e, DEDUP_HINT_CLAIMED, r, page);

    return dedup_index_replace(e->index, hash, hint, &claimed);
}

/* The claim came to nothing: we have the page, no more. */
static void disclaim(DedupEngine *e, const DedupRemote *remote)
{
    DedupHint claimed = own_hint(e, DEDUP_HINT_CLAIMED, remote->region,
                                 remote->page);
    DedupHint mine = own_hint(e, DEDUP_HINT_CANDIDATE, remote->region,
                              remote->page);

    claimed.raw = dedup_index_raw(remote->hash, &claimed);
    dedup_index_replace(e->index, remote->hash, &claimed, &mine);
}

/* The page in the builder's next place, claimed, becomes part of it. */
static unsigned commit(DedupEngine *e, const DedupRegion *r, uint32_t page,
                       uint64_t hash)
{
    DedupHint claimed = own_hint(e, DEDUP_HINT_CLAIMED, r, page);
    DedupAnnounce a = {
        .hash = hash, .old_raw = dedup_index_raw(hash, &claimed),
    };
    unsigned index = dedup_builder_commit(e->builder);

    g_array_append_val(e->announce, a);
    g_hash_table_insert(e->pending_hash, GSIZE_TO_POINTER(hash),
                        GUINT_TO_POINTER(index + 1));
    return index;
}

/* May a page be read, and is it worth merging?  Remap lock held. */
static bool readable(DedupRegion *r, uint32_t page)
{
    uint32_t entry = r->where[page];
    uint8_t flags;

    return !r->dead && (entry == DEDUP_OWN || (dedup_entry_is_segment(entry) &&
                                               (entry & DEDUP_BROKEN))) &&
           dedup_presence(r, page, 1, &flags) && (flags & DEDUP_PRESENT);
}

bool dedup_publish_pending(DedupEngine *e, DedupRegion *r, uint32_t page,
                           uint64_t hash)
{
    unsigned index = GPOINTER_TO_UINT(g_hash_table_lookup(
        e->pending_hash, GSIZE_TO_POINTER(hash)));
    bool same = false;

    if (!index) {
        return false;
    }
    index--;
    dedup_lock(e);
    if (readable(r, page)) {
        same = dedup_page_equal(dedup_region_addr(r, page),
                                dedup_builder_page(e->builder, index));
    }
    dedup_unlock(e);
    if (same) {
        add_pending(e, r, page, index);
    }
    return same;
}

bool dedup_publish_pair(DedupEngine *e, DedupRegion *r, uint32_t page,
                        DedupRegion *r2, uint32_t page2, uint64_t hash,
                        const DedupHint *hint)
{
    bool ready = builder_ready(e);
    bool same = false;
    uint32_t entry;

    dedup_lock(e);
    entry = r2->dead ? DEDUP_OWN : r2->where[page2];
    if (dedup_entry_is_segment(entry) && !(entry & DEDUP_BROKEN)) {
        /* it is published, but the hint does not say so: mend that */
        DedupSegment *s = dedup_entry_segment(e, entry);
        DedupHint published = {
            .kind = DEDUP_HINT_PUBLISHED,
            .where = s->gid,
            .page = dedup_entry_page(entry),
        };

        same = dedup_page_hash(s->map + ((size_t)published.page <<
                                         DEDUP_PAGE_SHIFT),
                               e->salt) == hash && !s->leaving;
        dedup_unlock(e);
        return same && dedup_index_replace(e->index, hash, hint, &published);
    }
    if (readable(r, page) && readable(r2, page2)) {
        if (ready) {
            uint8_t *copy = dedup_builder_next(e->builder);

            dedup_page_copy(copy, dedup_region_addr(r, page));
            same = dedup_page_equal(copy, dedup_region_addr(r2, page2)) &&
                   dedup_page_hash(copy, e->salt) == hash;
        } else {
            /* no room now: leave the hint as it is if it is right */
            same = dedup_page_equal(dedup_region_addr(r, page),
                                    dedup_region_addr(r2, page2));
        }
    }
    dedup_unlock(e);
    if (same && ready && claim(e, r, page, hash, hint)) {
        unsigned index = commit(e, r, page, hash);

        add_pending(e, r2, page2, index);
        add_pending(e, r, page, index);
    }
    return same;
}

/* Copy what is to be proven; false: the page is not what was hashed. */
static bool copy_for_proof(DedupEngine *e, const DedupRemote *remote,
                           uint8_t *copy)
{
    bool ok;

    dedup_lock(e);
    ok = readable(remote->region, remote->page);
    if (ok) {
        dedup_page_copy(copy, dedup_region_addr(remote->region,
                                                remote->page));
    }
    dedup_unlock(e);
    return ok && dedup_page_hash(copy, e->salt) == remote->hash;
}

static void publish_proven(DedupEngine *e, const DedupRemote *remote,
                           const uint8_t *copy)
{
    unsigned index;

    if (!builder_ready(e)) {
        disclaim(e, remote);
        return;
    }
    memcpy(dedup_builder_next(e->builder), copy, DEDUP_PAGE_SIZE);
    index = commit(e, remote->region, remote->page, remote->hash);
    add_pending(e, remote->region, remote->page, index);
}

/* Ask one member about all of its pages among @remotes. */
static void ask_member(DedupEngine *e, unsigned member,
                       const DedupRemote *remotes, unsigned n)
{
    DedupProof proofs[DEDUP_PROOF_PAGES];
    const DedupRemote *asked[DEDUP_PROOF_PAGES];
    unsigned nproofs = 0;

    if (!builder_ready(e)) {
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        uint8_t *copy = e->proof_buffer + ((size_t)nproofs <<
                                           DEDUP_PAGE_SHIFT);

        if (remotes[i].hint.where == member &&
            !dedup_publish_pending(e, remotes[i].region, remotes[i].page,
                                   remotes[i].hash) &&
            copy_for_proof(e, &remotes[i], copy) &&
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
            disclaim(e, asked[i]);
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

    if (x->region != y->region) {
        return x->region->base < y->region->base ? -1 : 1;
    }
    return x->page < y->page ? -1 : x->page > y->page;
}

/* Merge everything that waited for the segment, in address order. */
static void merge_pending(DedupEngine *e, DedupSegment *segment)
{
    DedupPending *p = (DedupPending *)e->pending->data;
    DedupAction actions[DEDUP_WINDOW_PAGES];
    unsigned n = 0;

    g_array_sort(e->pending, compare_pending);
    for (unsigned i = 0; i < e->pending->len; i++) {
        /* a page may wait twice: found by another page, then scanned itself */
        bool again = i && p[i].region == p[i - 1].region &&
                     p[i].page == p[i - 1].page;

        if (!again) {
            actions[n++] = (DedupAction) {
                .page = p[i].page, .segment = segment, .index = p[i].index,
            };
        }
        if (n && (n == DEDUP_WINDOW_PAGES || i + 1 == e->pending->len ||
                  p[i + 1].region != p[i].region)) {
            e->pass_found += dedup_windows(p[i].region, actions, n,
                                           &e->pass_limits);
            n = 0;
        }
    }
}

static void announce(DedupEngine *e, const DedupSegment *segment)
{
    for (unsigned i = 0; i < e->announce->len; i++) {
        const DedupAnnounce *a = &g_array_index(e->announce, DedupAnnounce,
                                                i);
        DedupHint old = { .kind = DEDUP_HINT_CLAIMED, .raw = a->old_raw };
        DedupHint published = {
            .kind = DEDUP_HINT_PUBLISHED, .where = segment->gid, .page = i,
        };

        if (!dedup_index_replace(e->index, a->hash, &old, &published) &&
            !dedup_index_insert(e->index, a->hash, &published)) {
            e->pass_limits |= DEDUP_LIMIT_INDEX;
        }
    }
}

static void forget_builder(DedupEngine *e)
{
    g_array_set_size(e->pending, 0);
    g_array_set_size(e->announce, 0);
    g_hash_table_remove_all(e->pending_hash);
}

void dedup_publish_flush(DedupEngine *e)
{
    g_autoptr(GError) error = NULL;
    DedupBuilder *b = g_steal_pointer(&e->builder);
    DedupSegment *segment = NULL;
    uint32_t gid;

    if (!b || !e->pending->len) {
        dedup_builder_free(b);
        forget_builder(e);
        return;
    }
    gid = dedup_group_segment_alloc(e->group, dedup_builder_count(b));
    if (gid) {
        segment = dedup_builder_finish(b, gid, &error);
        if (!segment) {
            dedup_group_segment_release(e->group, gid);
        }
        e->pass_limits |= segment ? 0 : DEDUP_LIMIT_FDS;
    } else {
        dedup_builder_free(b);
        e->pass_limits |= DEDUP_LIMIT_INDEX;
    }
    if (segment) {
        segment->mine = true;
        dedup_lock(e);
        dedup_segments_add(e, segment);
        dedup_unlock(e);
        announce(e, segment);
        /* the builder's table is of no use for pages that come now */
        g_hash_table_remove_all(e->pending_hash);
        merge_pending(e, segment);
    }
    forget_builder(e);
}

void dedup_publish_free(DedupEngine *e)
{
    dedup_builder_free(g_steal_pointer(&e->builder));
    forget_builder(e);
}

DedupSegment *dedup_publish_segment(DedupEngine *e, uint32_t gid,
                                    bool *stale)
{
    g_autoptr(GError) error = NULL;
    DedupSegment *s = dedup_segments_find(e, gid);
    unsigned member, npages;
    int fd = -1;

    *stale = false;
    if (s) {
        return s->leaving ? NULL : s;
    }
    if (g_hash_table_contains(e->left_gids, GUINT_TO_POINTER(gid)) ||
        g_hash_table_contains(e->failed_gids, GUINT_TO_POINTER(gid))) {
        return NULL;
    }
    if (!dedup_group_segment_lookup(e->group, gid, &member, &npages)) {
        *stale = true;
        return NULL;
    }
    if (!fds_left(e)) {
        e->pass_limits |= DEDUP_LIMIT_FDS;
        return NULL;
    }
    dedup_group_fetch(e->group, member, &gid, 1, &fd);
    if (fd >= 0) {
        s = dedup_segment_accept(fd, gid, npages, &error);
    }
    if (!s) {
        /* nobody answers, or it is not what it should be: ask again later */
        g_hash_table_add(e->failed_gids, GUINT_TO_POINTER(gid));
        return NULL;
    }
    dedup_lock(e);
    dedup_segments_add(e, s);
    dedup_unlock(e);
    return s;
}
