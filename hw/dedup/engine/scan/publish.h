/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Publishing: making segments of what is wanted twice; see publish.c.
 *
 * Thread: the scanner's.
 */

#ifndef DEDUP_PUBLISH_H
#define DEDUP_PUBLISH_H

#include "scan/scan-internal.h"

/* Part of a scan's life.  False and @error: there is no memory. */
bool dedup_publish_init(DedupScan *scan, GError **error);
/* Gives up what is claimed, if the group is there. */
void dedup_publish_clear(DedupScan *scan);
/* Memory of its own, in bytes. */
/* Nothing is published for some time. */
void dedup_publish_tidy(DedupScan *scan);
uint64_t dedup_publish_bytes(const DedupScan *scan);

/* Descriptors left for segments? */
bool dedup_publish_has_fds(DedupScan *scan);

/* Make sure that the draft has room for a page; false: a limit was set. */
bool dedup_publish_ready(DedupScan *scan, DedupDraft *d);

/*
 * Tell the others that we are about to publish this content of a page of ours,
 * so that no two members do.  False: somebody changed the hint first;
 * publishing is theirs.
 */
bool dedup_publish_claim(DedupScan *scan, const DedupRegion *r, uint32_t page,
                         uint64_t hash, const DedupHint *hint);
/* The claim came to nothing: others would wait for what is claimed. */
void dedup_publish_disclaim(DedupScan *scan, const DedupRegion *r,
                            uint32_t page, uint64_t hash);

/*
 * The contents of a page that is claimed become part of the draft.  False:
 * there is no memory for them, and the claim is off.
 */
bool dedup_publish_append(DedupScan *scan, DedupDraft *d,
                          const DedupRegion *r, uint32_t page, uint64_t hash,
                          const void *content);
/* Is that content in a draft? */
bool dedup_publish_has(DedupScan *scan, uint64_t hash);

/* What a hint to another own page was worth. */
typedef enum DedupPair {
    DEDUP_PAIR_STALE,         /* the page has other contents by now */
    DEDUP_PAIR_EQUAL,
    DEDUP_PAIR_COLLIDES,      /* other contents, which the hint is right for */
} DedupPair;

/* Publish two own pages if they are equal; both are to be merged then. */
DedupPair dedup_publish_pair(DedupScan *scan, DedupRegion *r, uint32_t page,
                             DedupRegion *r2, uint32_t page2, uint64_t hash,
                             const DedupHint *hint);

/* Seal what is there, and announce it. */
void dedup_publish_seal(DedupScan *scan);

#endif /* DEDUP_PUBLISH_H */
