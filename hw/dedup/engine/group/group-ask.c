/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Asking other members: for proof that they have a page, and for segments;
 * peer.h has the protocol.
 *
 * A member that does not answer, or takes its time again and again, is not
 * asked any more until the next dedup_group_refresh(): it would hold up our
 * scan.
 *
 * Thread: the scanner's.
 */

#include "group/group-internal.h"
#include "host/mutant.h"

/* Wait so long for answers that take longer than SLOW_US each. */
#define PATIENCE_US G_TIME_SPAN_SECOND
#define SLOW_US (50 * G_TIME_SPAN_MILLISECOND)

/* It was asked at @start; did it not answer, or does it take too long? */
static void peer_answered(DedupGroup *g, unsigned member, int64_t start,
                          bool ok)
{
    int64_t waited = g->client[member].waited_us +
                     g_get_monotonic_time() - start;

    g->client[member].waited_us = waited;
    g->client[member].asked++;
    g->client[member].skip = !ok ||
        (waited > PATIENCE_US && waited > g->client[member].asked * SLOW_US);
}

/* A connection to @member, or NULL: it is not asked now. */
static DedupPeer *peer_of(DedupGroup *g, unsigned member)
{
    DedupPeer *p;

    if (member == g->self || !dedup_group_alive(g, member) ||
        g->client[member].skip || g->subfd < 0) {
        return NULL;
    }
    p = &g->client[member].peer;
    if (p->fd < 0 &&
        !dedup_peer_connect(p, g->subfd, member, DEDUP_PEER_TIMEOUT_MS)) {
        g->client[member].skip = true;
        return NULL;
    }
    g->client[member].used = true;
    return p;
}

bool dedup_group_prove(DedupGroup *g, unsigned member, DedupProof *proofs,
                       unsigned n)
{
    int64_t start = g_get_monotonic_time();
    DedupPeer *p;
    bool ok;

    dedup_group_assert_scanner(g);
    for (unsigned i = 0; i < n; i++) {
        proofs[i].proven = DEDUP_MUTANT(NO_PROOF);
    }
    if (DEDUP_MUTANT(NO_PROOF)) {
        return true;
    }
    p = peer_of(g, member);
    if (!p) {
        return false;
    }
    ok = dedup_peer_prove(p, member, proofs, n, DEDUP_PEER_TIMEOUT_MS);
    peer_answered(g, member, start, ok);
    return ok;
}

/* Ask @member for those that have no fd yet; all, or what it uses. */
static unsigned fetch_from(DedupGroup *g, unsigned member, DedupFetch *items,
                           unsigned n, bool all)
{
    DedupFetch ask[DEDUP_PEER_BATCH];
    unsigned place[DEDUP_PEER_BATCH];
    unsigned asked = 0, found = 0;
    int64_t start = g_get_monotonic_time();
    DedupPeer *p;
    bool ok;

    for (unsigned i = 0; i < n; i++) {
        if (items[i].fd < 0 &&
            (all || dedup_group_uses(g, member, items[i].gid))) {
            place[asked] = i;
            ask[asked++] = items[i];
        }
    }
    if (asked == 0) {
        return 0;
    }
    p = peer_of(g, member);
    if (!p) {
        return 0;
    }
    ok = dedup_peer_fetch(p, member, ask, asked, DEDUP_PEER_TIMEOUT_MS);
    peer_answered(g, member, start, ok);
    if (!ok) {
        return 0;
    }
    for (unsigned i = 0; i < asked; i++) {
        items[place[i]].fd = ask[i].fd;
        found += ask[i].fd >= 0;
    }
    return found;
}

void dedup_group_fetch(DedupGroup *g, unsigned member, DedupFetch *items,
                       unsigned n)
{
    int64_t end = g_get_monotonic_time() + PATIENCE_US;
    unsigned left = n;

    dedup_group_assert_scanner(g);
    g_assert(n <= DEDUP_PEER_BATCH);
    for (unsigned i = 0; i < n; i++) {
        items[i].fd = -1;
    }
    left -= fetch_from(g, member, items, n, true);
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS && left &&
         g_get_monotonic_time() < end; k++) {
        if (k != member && k != g->self &&
            __atomic_load_n(&g->alive[k], __ATOMIC_RELAXED)) {
            left -= fetch_from(g, k, items, n, false);
        }
    }
}
