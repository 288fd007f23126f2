/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Asking other members.
 *
 * What another member is said to have is published only after that member
 * proved that it has it (I10): the proof is made over the copy that will be
 * published, not over the guest's page, which may change in between.  To fetch
 * a segment, we prove in turn that we have the page for which we want it.
 *
 * A member may take its time to answer, or be an enemy: what it says is
 * compared here, and what it gives is checked (group/segment.h).
 */

#include "scan/ask.h"
#include "scan/leave.h"
#include "scan/publish.h"
#include "scan/todo.h"

/*
 * How often in a pass a segment is asked for in vain.  More than once, as
 * the index compares a part of the hash: we may lack the page after all, and
 * yet have another one of the same segment.
 */
#define FETCH_TRIES 64

bool dedup_ask_copy(DedupScan *scan, DedupRegion *r, uint32_t page,
                    uint64_t hash, uint8_t *copy)
{
    return dedup_space_copy(r, page, copy) &&
           dedup_page_hash(copy, scan->salt) == hash;
}

static void publish_proven(DedupScan *scan, const DedupRemote *remote,
                           const uint8_t *copy)
{
    DedupDraft *d = &scan->publisher.draft[DEDUP_DRAFT_BETWEEN];

    if (!dedup_publish_ready(scan, d)) {
        dedup_publish_disclaim(scan, remote->region, remote->page,
                               remote->hash);
        return;
    }
    if (dedup_publish_append(scan, d, remote->region, remote->page,
                             remote->hash, copy)) {
        dedup_todo_add(scan, remote->region, remote->page, remote->hash,
                       true);
    }
}

/* Can this page be asked for?  @copy is what is to be proven then. */
static bool prepare(DedupScan *scan, const DedupRemote *remote, uint8_t *copy)
{
    if (dedup_publish_has(scan, remote->hash)) {
        /* another page of ours came first */
        dedup_todo_add(scan, remote->region, remote->page, remote->hash,
                       true);
        return false;
    }
    return dedup_ask_copy(scan, remote->region, remote->page, remote->hash,
                          copy) &&
           dedup_publish_claim(scan, remote->region, remote->page,
                               remote->hash, &remote->hint);
}

/* Ask one member about all of its pages among @remotes. */
static void ask_member(DedupScan *scan, unsigned member,
                       const DedupRemote *remotes, unsigned n)
{
    DedupProof proofs[DEDUP_PROOF_PAGES];
    const DedupRemote *asked[DEDUP_PROOF_PAGES];
    unsigned nproofs = 0;

    /* it may take its time to answer: is somebody waiting for us? */
    if (!dedup_scan_may_go_on(scan) ||
        !dedup_publish_ready(scan,
                             &scan->publisher.draft[DEDUP_DRAFT_BETWEEN])) {
        return;
    }
    for (unsigned i = 0; i < n; i++) {
        uint8_t *copy = scan->publisher.buffer + ((size_t)nproofs <<
                                                  DEDUP_PAGE_SHIFT);

        if (remotes[i].hint.where == member &&
            prepare(scan, &remotes[i], copy)) {
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
    dedup_group_prove(scan->group, member, proofs, nproofs);
    for (unsigned i = 0; i < nproofs; i++) {
        if (proofs[i].proven) {
            publish_proven(scan, asked[i], proofs[i].content);
        } else {
            dedup_publish_disclaim(scan, asked[i]->region, asked[i]->page,
                                   asked[i]->hash);
        }
    }
}

void dedup_ask_each(DedupScan *scan, const DedupRemote *remotes, unsigned n,
                    DedupAskFn *ask)
{
    g_assert(n <= DEDUP_PROOF_PAGES);
    for (unsigned i = 0; i < n; i++) {
        unsigned member = remotes[i].hint.where;
        bool asked = false;

        for (unsigned k = 0; k < i && !asked; k++) {
            asked = remotes[k].hint.where == member;
        }
        if (!asked) {
            ask(scan, member, remotes + i, n - i);
        }
    }
}

void dedup_ask_remotes(DedupScan *scan, DedupRemote *remotes, unsigned n)
{
    dedup_ask_each(scan, remotes, n, ask_member);
}

/* Fetch a segment for which the page in @copy is the proof. */
static DedupSegment *fetch(DedupScan *scan, unsigned member, unsigned npages,
                           const DedupHint *hint, const uint8_t *copy)
{
    g_autoptr(GError) error = NULL;
    DedupFetch item = {
        .gid = hint->where, .page = hint->page, .content = copy,
    };

    dedup_group_fetch(scan->group, member, &item, 1);
    return item.fd < 0 ? NULL : dedup_segment_accept(item.fd, item.gid,
                                                     npages, &error);
}

/* May and can it be asked for now?  The page is copied then. */
static bool may_fetch(DedupScan *scan, DedupRegion *r, uint32_t page,
                      uint64_t hash)
{
    if (!dedup_publish_has_fds(scan)) {
        scan->limits |= DEDUP_LIMIT_FDS;
        return false;
    }
    /* the buffer is free: no proof is under way */
    return dedup_scan_may_go_on(scan) &&
           dedup_ask_copy(scan, r, page, hash, scan->publisher.buffer);
}

DedupHolding *dedup_ask_holding(DedupScan *scan, DedupRegion *r,
                                uint32_t page, uint64_t hash,
                                const DedupHint *hint, bool *stale)
{
    gpointer gid = GUINT_TO_POINTER(hint->where);
    GHashTable *failed = scan->publisher.failed;
    DedupHolding *h = dedup_holding_find(scan->space, hint->where);
    unsigned member, npages, failures;
    DedupSegment *segment;
    DedupLookup found;

    *stale = false;
    if (h) {
        return dedup_leave_note(scan, h)->leaving ? NULL : h;
    }
    failures = GPOINTER_TO_UINT(g_hash_table_lookup(failed, gid));
    if (g_hash_table_contains(scan->leave.avoided, gid) ||
        failures >= FETCH_TRIES) {
        return NULL;
    }
    found = dedup_group_segment_lookup(scan->group, hint->where, &member,
                                       &npages);
    *stale = found == DEDUP_LOOKUP_GONE ||
             (found == DEDUP_LOOKUP_FOUND && hint->page >= npages);
    if (*stale || found == DEDUP_LOOKUP_FAILED) {
        return NULL;
    }
    if (!may_fetch(scan, r, page, hash)) {
        return NULL;
    }
    segment = fetch(scan, member, npages, hint, scan->publisher.buffer);
    if (!segment) {
        /* nobody has it, or it is not what it should be, or not for us */
        g_hash_table_insert(failed, gid, GUINT_TO_POINTER(failures + 1));
        return NULL;
    }
    return dedup_holding_add(scan->space, segment);
}
