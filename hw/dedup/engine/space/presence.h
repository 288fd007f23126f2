/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Presence: which pages are there (I7).  Remap lock held.
 */

#ifndef DEDUP_PRESENCE_H
#define DEDUP_PRESENCE_H

#include "space/space-internal.h"

#define DEDUP_PRESENT (1 << 0)       /* own memory, or a copied page */
#define DEDUP_SWAPPED (1 << 1)
#define DEDUP_HUGE (1 << 2)          /* mapped by a huge page */
#define DEDUP_ZERO_MAPPED (1 << 3)   /* the kernel's zero page is mapped */

/* Find out how to look at a region; once a pass, as the user id may change. */
void dedup_presence_prepare(DedupRegion *r);

/* Flags of @n pages (at most a chunk) from @first; touches no page. */
bool dedup_presence(DedupRegion *r, uint32_t first, uint32_t n,
                    uint8_t *flags);

/*
 * Skip chunks from *@page, the start of one, in which a look would find
 * nothing: no memory, no swap, no segment.  False: *@page is how far the
 * kernel was asked, and there may be more of them.
 */
bool dedup_skip_void(DedupRegion *r, uint32_t *page);

/*
 * Does the page have memory?  What is asked of single pages: the kernel is
 * asked about its chunk, and the answer kept in @looks until they are
 * forgotten, as long as nobody else had the remap lock, who might have
 * discarded something.
 */
bool dedup_is_present(DedupLooks *looks, DedupRegion *r, uint32_t page);
/* What was found out about a chunk anyway: @flags of all of it. */
void dedup_keep_look(DedupLooks *looks, DedupRegion *r, uint32_t first,
                     const uint8_t *flags);
void dedup_forget_looks(DedupLooks *looks);

#endif /* DEDUP_PRESENCE_H */
