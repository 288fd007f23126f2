/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Asking other members: for proof that they have a page, and for a segment;
 * see ask.c.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_ASK_H
#define DEDUP_ASK_H

#include "scan/scan-internal.h"

/* A hint says that another member has the content of a page of ours. */
typedef struct DedupRemote {
    DedupRegion *region;
    uint32_t page;
    uint64_t hash;
    DedupHint hint;
} DedupRemote;

/*
 * Copy what is to be proven; false: the page is not what was hashed, or is not
 * there.
 */
bool dedup_ask_copy(DedupScan *scan, DedupRegion *r, uint32_t page,
                    uint64_t hash, uint8_t *copy);

/* Calls @ask for each member that is named, with all that may name it. */
typedef void DedupAskFn(DedupScan *scan, unsigned member,
                        const DedupRemote *remotes, unsigned n);
void dedup_ask_each(DedupScan *scan, const DedupRemote *remotes, unsigned n,
                    DedupAskFn *ask);

/* Publish what they prove to have; at most DEDUP_PROOF_PAGES. */
void dedup_ask_remotes(DedupScan *scan, DedupRemote *remotes, unsigned n);

/*
 * The holding behind a hint about the page, which has that hash, fetched if
 * need be: with the page as proof.  NULL: there is none (@stale), or we do not
 * want it or cannot have it now.
 */
DedupHolding *dedup_ask_holding(DedupScan *scan, DedupRegion *r,
                                uint32_t page, uint64_t hash,
                                const DedupHint *hint, bool *stale);

#endif /* DEDUP_ASK_H */
