/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Keeping KSM, the kernel's own page merging, out of what the engine
 * replaces; ksm.c says why and how.  How much it may take: space.h.
 */

#ifndef DEDUP_KSM_H
#define DEDUP_KSM_H

#include "space/space-internal.h"

/* Part of a space's life.  The file is opened before a chroot. */
void dedup_ksm_open(DedupSpace *space);
void dedup_ksm_close(DedupSpace *space);

/*
 * A pass has come to the chunk that begins at @first: take all of it from
 * KSM, if KSM saves nothing there.  Remap lock held.
 */
void dedup_ksm_take_chunk(DedupRegion *r, uint32_t first);

/*
 * Take the pages that a window is about to replace: KSM's savings there
 * become ours at once.  Takes out of @actions what must be left to KSM, sets
 * bits of @limits then, and returns how many are left.  Remap lock held.
 */
unsigned dedup_ksm_take_pages(DedupRegion *r, DedupAction **actions,
                              unsigned n, unsigned *limits);

/*
 * Does KSM share any of these pages, at most a chunk, with another one?
 * @flags: their presence.  A private page that is mapped more than once is
 * one, as there are no forked copies; so is the kernel's page of zeros, if KSM
 * uses it for this process.  Allocates nothing, takes no lock.  Lock held.
 */
bool dedup_ksm_shares_any(DedupRegion *r, uint32_t first, uint32_t n,
                          const uint8_t *flags);

/* A window has ended: what it replaced costs nothing any more.  Lock held. */
void dedup_ksm_replaced(DedupRegion *r, const DedupAction *actions,
                        unsigned n);

/*
 * Take what is about to be restored, as far as it can be.  What KSM shares
 * there gets memory of its own at once.  Remap lock held.
 */
void dedup_ksm_take_range(DedupRegion *r, uint32_t first, uint32_t n);

/*
 * In the frozen range: is each of these @n private pages, at most
 * DEDUP_WINDOW_PAGES, protected still?  @which: those that matter; NULL: all.
 * A page of a file counts as protected: KSM takes none.  Lock held.
 */
bool dedup_ksm_kept_out(DedupRegion *r, uint32_t first, uint32_t n,
                        const bool *which);

#endif /* DEDUP_KSM_H */
