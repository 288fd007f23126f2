/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Counting what would be saved; see estimate.h.
 *
 * A hint may lead nowhere by now: a page of ours is compared, another member
 * has to prove that it has the page.  What is published is taken to be there,
 * as to see that the segment would have to be fetched.
 */

#include "scan/estimate.h"

/* Nobody else has it: whoever comes next shall find us. */
static void keep(DedupScan *scan, const DedupRegion *r, uint32_t page,
                 uint64_t hash, const DedupHint *stale)
{
    DedupHint mine = {
        .kind = DEDUP_HINT_CANDIDATE,
        .where = dedup_group_self(scan->group),
        .page = dedup_region_base(r) + page,
    };

    if (stale) {
        dedup_index_replace(scan->index, hash, stale, &mine);
    } else if (!dedup_index_insert(scan->index, hash, &mine)) {
        scan->limits |= dedup_scan_index_limit(scan);
    }
}

/*
 * May another member have it?  One that estimates too, and comes after us,
 * counts its page itself.
 */
static bool may_have(DedupScan *scan, const DedupHint *hint)
{
    unsigned self = dedup_group_self(scan->group);

    return hint->where != self &&
           dedup_group_alive(scan->group, hint->where) &&
           (hint->where < self ||
            !dedup_group_estimates(scan->group, hint->where));
}

/* Is it in a segment, or about to be? */
static bool is_published(DedupScan *scan, const DedupHint *hint)
{
    unsigned member, npages;

    return hint->kind == DEDUP_HINT_PUBLISHED ?
           dedup_group_segment_lookup(scan->group, hint->where, &member,
                                      &npages) == DEDUP_LOOKUP_FOUND &&
           hint->page < npages :
           hint->kind == DEDUP_HINT_CLAIMED && may_have(scan, hint);
}

/* Has another page of ours the same as this one? */
static bool have_twice(DedupScan *scan, DedupRegion *r, uint32_t page,
                       uint64_t hash, const DedupHint *hint)
{
    uint8_t *copy = scan->publisher.buffer; /* nothing is published */
    DedupRegion *r2;
    uint32_t page2;

    return dedup_space_find(scan->space, hint->page, &r2, &page2) &&
           dedup_ask_copy(scan, r, page, hash, copy) &&
           dedup_space_equals(r2, page2, copy);
}

/* Nobody else has it: do we have it twice? */
static void count_own(DedupScan *scan, DedupRegion *r, uint32_t page,
                      uint64_t hash)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(scan->index, hash, hits);
    const DedupHint *stale = NULL;

    for (unsigned i = 0; i < n; i++) {
        if (hits[i].kind != DEDUP_HINT_CANDIDATE ||
            hits[i].where != dedup_group_self(scan->group)) {
            continue;
        }
        if (hits[i].page == dedup_region_base(r) + page) {
            return; /* it is the one that stays */
        }
        if (have_twice(scan, r, page, hash, &hits[i])) {
            scan->sums.estimate.within++;
            return;
        }
        stale = &hits[i];
    }
    keep(scan, r, page, hash, stale);
}

bool dedup_estimate_page(DedupScan *scan, DedupRegion *r, uint32_t page,
                         uint64_t hash, DedupRemote *remote)
{
    DedupHint hits[DEDUP_INDEX_HITS];
    unsigned n = dedup_index_lookup(scan->index, hash, hits);

    for (unsigned i = 0; i < n; i++) {
        if (is_published(scan, &hits[i])) {
            scan->sums.estimate.between++;
            return false;
        }
        if (hits[i].kind == DEDUP_HINT_CANDIDATE && may_have(scan, &hits[i])) {
            *remote = (DedupRemote) {
                .region = r, .page = page, .hash = hash, .hint = hits[i],
            };
            return true;
        }
    }
    count_own(scan, r, page, hash);
    return false;
}

/* Ask one member about all of its pages among @remotes. */
static void ask_member(DedupScan *scan, unsigned member,
                       const DedupRemote *remotes, unsigned n)
{
    DedupProof proofs[DEDUP_PROOF_PAGES];
    const DedupRemote *asked[DEDUP_PROOF_PAGES];
    unsigned nproofs = 0;

    for (unsigned i = 0; i < n; i++) {
        const DedupRemote *remote = &remotes[i];
        uint8_t *copy = scan->publisher.buffer + ((size_t)nproofs <<
                                                  DEDUP_PAGE_SHIFT);

        if (remote->hint.where == member &&
            dedup_ask_copy(scan, remote->region, remote->page, remote->hash,
                           copy)) {
            asked[nproofs] = remote;
            proofs[nproofs++] = (DedupProof) {
                .page = remote->hint.page, .content = copy,
            };
        }
    }
    if (!nproofs || !dedup_scan_may_go_on(scan) ||
        !dedup_group_prove(scan->group, member, proofs, nproofs)) {
        return; /* nothing is known */
    }
    for (unsigned i = 0; i < nproofs; i++) {
        const DedupRemote *remote = asked[i];

        if (proofs[i].proven) {
            scan->sums.estimate.between++;
            continue;
        }
        /* a hint that leads nowhere; that of who merges is not ours to take */
        if (dedup_group_estimates(scan->group, member)) {
            dedup_index_remove(scan->index, remote->hash, &remote->hint);
        }
        count_own(scan, remote->region, remote->page, remote->hash);
    }
}

void dedup_estimate_remotes(DedupScan *scan, const DedupRemote *remotes,
                            unsigned n)
{
    dedup_ask_each(scan, remotes, n, ask_member);
}
