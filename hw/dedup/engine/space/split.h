/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Huge pages, split before pages of them are replaced.
 */

#ifndef DEDUP_SPLIT_H
#define DEDUP_SPLIT_H

#include "space/space-internal.h"

/*
 * Split the huge pages under a window's pages.  @flags: presence of the pages
 * from @first on.  True: some may be split now, ask again.
 */
bool dedup_split_huge(DedupRegion *r, DedupAction *const *actions, unsigned n,
                      uint32_t first, const uint8_t *flags);

#endif /* DEDUP_SPLIT_H */
