/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The ledger: what is mapped at each page of a region, and all sums that
 * follow from it.  Remap lock held; a sum is atomic for who reads it without.
 */

#ifndef DEDUP_LEDGER_H
#define DEDUP_LEDGER_H

#include "group/segment.h"
#include "space/space-internal.h"

/*
 * An entry of the ledger, one per page:
 *   DEDUP_OWN     the page is as its owner mapped it
 *   DEDUP_ZERO    dropped because it was zero; not seen again since
 *                 (but see zeroes.c: some are merged to a segment of zeros)
 *   else          entry_no()/entry_page(): the segment page that is mapped
 *                 there; with DEDUP_BROKEN, the kernel copied it since
 */
#define DEDUP_OWN 0u
#define DEDUP_ZERO UINT32_MAX
#define DEDUP_BROKEN (1u << 31)

static inline bool dedup_entry_is_segment(uint32_t entry)
{
    return entry != DEDUP_OWN && entry != DEDUP_ZERO;
}

/* Was it merged, and copied by the kernel since? */
static inline bool dedup_entry_is_broken(uint32_t entry)
{
    return dedup_entry_is_segment(entry) && (entry & DEDUP_BROKEN);
}

/* Has the page memory of its own, unless it is a hole? */
static inline bool dedup_entry_is_private(uint32_t entry)
{
    return entry == DEDUP_OWN || dedup_entry_is_broken(entry);
}

static inline uint32_t dedup_entry_no(uint32_t entry)
{
    return ((entry & ~DEDUP_BROKEN) - 1) / DEDUP_SEGMENT_PAGES;
}

static inline uint32_t dedup_entry_page(uint32_t entry)
{
    return ((entry & ~DEDUP_BROKEN) - 1) % DEDUP_SEGMENT_PAGES;
}

static inline uint32_t dedup_entry(uint32_t no, uint32_t page)
{
    return no * DEDUP_SEGMENT_PAGES + page + 1;
}

/*
 * The entry of a page.  A chunk of own pages has none: to read it there would
 * take memory for it on hosts without a shared page of zeros, and on all
 * others a page table.
 */
static inline uint32_t dedup_entry_at(const DedupRegion *r, uint32_t page)
{
    return r->chunk[page / DEDUP_CHUNK_PAGES].taken ? r->entry[page]
                                                   : DEDUP_OWN;
}

/*
 * Change one page's state, with all sums that follow from it.  A page that
 * becomes own has memory, or does so with _absent(): there is none then.
 */
void dedup_ledger_set(DedupRegion *r, uint32_t page, uint32_t entry);
void dedup_ledger_absent(DedupRegion *r, uint32_t page);
/* So many pages of the chunk were seen to have memory of their own. */
void dedup_ledger_own(DedupRegion *r, uint32_t chunk, uint32_t own);
/* The next page from @page on, before @end, that is not own; @end: none. */
uint32_t dedup_ledger_next(const DedupRegion *r, uint32_t page,
                           uint32_t end);
/*
 * How many pages from @page on, before @end, are what that one is: @is says the
 * same of them, *@answer.  At least one.
 */
uint32_t dedup_ledger_run(const DedupRegion *r, uint32_t page, uint32_t end,
                          bool (*is)(uint32_t entry), bool *answer);
/*
 * Does a mapping end between two neighbours in these states?  Own pages share
 * the region's mapping, and so do dropped pages, unless the region is a
 * private file: there they are anonymous memory.  Segment pages share one if
 * they follow each other.
 */
bool dedup_ledger_is_boundary(const DedupRegion *r, uint32_t a, uint32_t b);
/* Mappings that our own doing costs, segment views included. */
uint64_t dedup_ledger_maps(DedupSpace *space);
/* The holding that an entry refers to. */
DedupHolding *dedup_entry_holding(DedupSpace *space, uint32_t entry);

#endif /* DEDUP_LEDGER_H */
