/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Freezing: no store can reach a range until it is thawed; a writer waits.
 *
 * Thread: whoever holds the remap lock; one range at a time.
 */

#ifndef DEDUP_FREEZE_H
#define DEDUP_FREEZE_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>

/*
 * Open a userfaultfd that covers faults of the kernel, with write protection
 * of shared memory.  -1 and DEDUP_ERROR_USERFAULTFD if the host grants none.
 */
int dedup_freeze_open(GError **error);

/*
 * Freeze a range.  @missing: pages that are dropped in it meanwhile block
 * their readers as well (anonymous memory only).  On failure nothing is left
 * frozen and nobody waits.
 */
bool dedup_freeze_begin(int uffd, void *addr, size_t len, bool missing);

/*
 * Thaw it and wake everybody who waited in it (I3), whatever was mapped over
 * it meanwhile.  Returns false when the descriptor had to be closed for
 * that: the range is thawed all the same, but nothing can be frozen again.
 */
bool dedup_freeze_end(int uffd, void *addr, size_t len);

/*
 * Fill a page that was dropped inside a frozen range with contents again:
 * only for the path where mapping its replacement failed.
 */
bool dedup_freeze_refill(int uffd, void *addr, const void *content);

#endif /* DEDUP_FREEZE_H */
