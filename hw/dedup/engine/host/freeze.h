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

/* What freezes; of the space that it is part of. */
typedef struct DedupFreezer {
    int uffd;                 /* atomic; -1: lost, until it is opened again */
    bool zero_anon;           /* anonymous zero pages can be frozen */
} DedupFreezer;

/*
 * Open a userfaultfd that covers faults of the kernel, with write protection
 * of shared memory.  -1 and DEDUP_ERROR_USERFAULTFD if the host grants none.
 */
int dedup_freeze_open(GError **error);

/*
 * Does the protection of a page of zeros survive that the kernel splits the
 * huge page that it is part of?  If not, pages of zeros of anonymous memory
 * must be left alone.
 */
bool dedup_freeze_survives_split(int uffd, int pagemap_fd);

/* The same by trying it out.  False also without a huge page to try it on. */
bool dedup_freeze_probe_split(int uffd, int pagemap_fd);

/*
 * Freeze a range.  @missing: pages of it that are absent, or are dropped
 * meanwhile, block their readers as well (anonymous memory only).  On failure
 * nothing is left frozen and nobody waits.
 *
 * *@uffd becomes -1 when thawing was only possible by closing it: then
 * another one must be opened before anything can be frozen again.
 */
bool dedup_freeze_begin(int *uffd, void *addr, size_t len, bool missing);

/*
 * Let a frozen range block readers of absent pages from here on, as @missing
 * does: for a caller that wants to read the range itself before that.
 * @shared: of pages that are in the file, but not in the page table.
 */
bool dedup_freeze_readers(int uffd, void *addr, size_t len, bool shared);

/* Does anybody wait for a frozen range to be thawed? */
bool dedup_freeze_is_waited_for(int uffd);

/*
 * Let stores pass again, where there are pages; who waits goes on waiting.
 * For a caller that took out of a range, frozen with its readers, all that
 * nobody may store to.  One call for the whole range costs one TLB flush;
 * dedup_freeze_end() one for each mapping that has protected pages still.
 */
void dedup_freeze_unprotect(int uffd, void *addr, size_t len);

/*
 * Thaw it and wake everybody who waited in it (I3), whatever was mapped over
 * it meanwhile.
 */
void dedup_freeze_end(int *uffd, void *addr, size_t len);

/*
 * Fill a page that was dropped inside a frozen range with contents again:
 * only for the path where mapping its replacement failed.  A page that is
 * still there stays as it is.
 *
 * If the kernel has no page to give, the caller's @spare is moved there: a
 * private page, populated, that no other process has.  Where that fails, too,
 * the page is marked as lost: who touches it gets a SIGBUS as of a broken
 * one (BUS_MCEERR_AR), of which QEMU tells the guest.  Nobody waits, and
 * nobody sees other bytes.  False: that happened.
 */
bool dedup_freeze_refill(int uffd, void *addr, const void *content,
                         void *spare);

#endif /* DEDUP_FREEZE_H */
