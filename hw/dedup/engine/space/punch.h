/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Punching: out of the file of a shared region.  Remap lock held.
 */

#ifndef DEDUP_PUNCH_H
#define DEDUP_PUNCH_H

#include "space/space-internal.h"

/* Remove what the file has there, whoever holds it: nobody wants it. */
bool dedup_punch(const DedupRegion *r, uint32_t page, uint32_t n);

/* A segment is mapped there: remove what nobody holds, note the rest. */
void dedup_punch_replaced(DedupRegion *r, uint32_t page, uint32_t n);

/* Pages got memory: the file may have got it for merged ones around, too. */
void dedup_punch_around(DedupRegion *r, uint32_t page, uint32_t n);

/* Part of a chunk is looked at: punch what could not be at that time. */
void dedup_punch_late(DedupRegion *r, uint32_t first, uint32_t n);

#endif /* DEDUP_PUNCH_H */
