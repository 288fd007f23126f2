/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Consistency of the ledger: every sum is what its entries say.
 */

#ifndef DEDUP_CHECK_H
#define DEDUP_CHECK_H

#include "space/space.h"

/*
 * Aborts if a sum is wrong.  In builds with mutants, when the remap lock is
 * given up: each time while all regions are small, else now and then.  Nothing
 * in others.  Remap lock held.
 */
#ifdef CONFIG_DEDUP_MUTANTS
void dedup_space_check(DedupSpace *space);
#else
static inline void dedup_space_check(DedupSpace *space)
{
}
#endif

#endif /* DEDUP_CHECK_H */
