/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Freezing: no store can reach a range until it is thawed; a writer waits.
 *
 * There are two ways, chosen when a freezer is opened:
 *
 *   userfaultfd  (freeze-uffd.c) all writers wait in the kernel, those of the
 *                kernel included, and readers of absent pages can.
 *   mprotect     (freeze-mprotect.c) for hosts that grant none.  Threads of
 *                this process wait in a signal handler.  A system call, or the
 *                kernel on a guest's behalf, fails instead: who has it write
 *                to memory raises a pin counter first, and then calls
 *                dedup_freeze_wait(); and what is pinned is not frozen.
 *
 * Terms: a range is *announced* before it is frozen: whoever raises a counter
 * later waits for its end.
 *
 * Thread: whoever holds the remap lock; one range of each freezer at a time.
 */

#ifndef DEDUP_FREEZE_H
#define DEDUP_FREEZE_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "host/types.h"

typedef struct DedupFreezeOps DedupFreezeOps;

/* What freezes; of the space that it is part of. */
typedef struct DedupFreezer {
    const DedupFreezeOps *ops; /* NULL: none; nothing is ever frozen */
    int uffd;                 /* -1: none */
    unsigned slot;            /* mprotect: in the table of windows */
    bool lost;                /* atomic: until it is opened again */
    bool zero_anon;           /* anonymous zero pages can be frozen */
} DedupFreezer;

/* A range that is announced, and then frozen. */
typedef struct DedupFrozen {
    DedupFreezer *freezer;
    uint8_t *addr;
    size_t len;
} DedupFrozen;

/*
 * Open a freezer.  @pagemap_fd: of this process; -1 if there is none.  False
 * and @error if it cannot be had: DEDUP_ERROR_USERFAULTFD if the host grants
 * none that covers faults of the kernel and protects shared memory;
 * DEDUP_ERROR_SYSTEM for mprotect.
 *
 * @f->zero_anon says whether the protection of a page of zeros survives that
 * the kernel splits the huge page that it is part of.  If not, pages of zeros
 * of anonymous memory must be left alone.
 */
bool dedup_freezer_open(DedupFreezer *f, DedupFreezeHow how, int pagemap_fd,
                        GError **error);
/* One that is not open is nothing to care about. */
void dedup_freezer_close(DedupFreezer *f);
/* It was lost: try to have it again. */
void dedup_freezer_reopen(DedupFreezer *f);
/* Any thread. */
bool dedup_freezer_is_lost(const DedupFreezer *f);

/*
 * What it can do.  Drops: readers of absent pages can be made to wait, and a
 * page be put back into a frozen range.  Keeps KSM out: what ksmd does to a
 * frozen page lets no store pass.  Fails in the kernel: a writer in the kernel
 * does not wait, so what is pinned must not be frozen.
 */
bool dedup_freezer_drops(const DedupFreezer *f);
bool dedup_freezer_keeps_ksm_out(const DedupFreezer *f);
bool dedup_freezer_fails_in_kernel(const DedupFreezer *f);

/*
 * A range is about to be frozen.  A full barrier: who raises a pin counter, and
 * is not seen by the caller from now on, waits in dedup_freeze_wait().
 */
void dedup_freeze_announce(DedupFrozen *z, DedupFreezer *f, void *addr,
                           size_t len);
/* It will not be, after all. */
void dedup_freeze_withdraw(DedupFrozen *z);

/*
 * Freeze what was announced.  @missing: pages of it that are absent, or are
 * dropped meanwhile, block their readers as well (anonymous memory only; for a
 * freezer that drops, else nothing).  On failure errno is set, nothing is left
 * frozen or announced, and nobody waits.
 */
bool dedup_freeze_begin(DedupFrozen *z, bool missing);

/*
 * Let a frozen range block readers of absent pages from here on, as @missing
 * does: for a caller that wants to read the range itself before that.
 * @shared: of pages that are in the file, but not in the page table.
 * False where the freezer drops nothing.
 */
bool dedup_freeze_readers(DedupFrozen *z, bool shared);

/* Does anybody wait for a frozen range to be thawed? */
bool dedup_freeze_is_waited_for(const DedupFrozen *z);

/*
 * Let stores pass again, where there are pages; who waits goes on waiting.
 * For a caller that took out of a part, frozen with its readers, all that
 * nobody may store to.  One call for the whole range costs one TLB flush;
 * dedup_freeze_end() one for each mapping that has protected pages still.
 */
void dedup_freeze_unprotect(DedupFrozen *z, void *addr, size_t len);

/*
 * Thaw it and wake everybody who waited in it (I3), whatever was mapped over
 * it meanwhile.  The freezer may be lost by that.
 */
void dedup_freeze_end(DedupFrozen *z);

/*
 * Fill a page that was dropped inside a frozen range with contents again:
 * only for the path where mapping its replacement failed, of a freezer that
 * drops.  A page that is still there stays as it is.
 *
 * If the kernel has no page to give, the caller's @spare is moved there: a
 * private page, populated, that no other process has.  Where that fails, too,
 * the page is marked as lost: who touches it gets a SIGBUS as of a broken
 * one (BUS_MCEERR_AR), of which QEMU tells the guest.  Nobody waits, and
 * nobody sees other bytes.  False: that happened.
 */
bool dedup_freeze_refill(DedupFrozen *z, void *addr, const void *content,
                         void *spare);

/*
 * How many ranges are announced or frozen for which a writer in the kernel must
 * wait; atomic, valid for ever.  Read it after a pin counter was raised, with a
 * full barrier in between; if it is not 0, call dedup_freeze_wait().
 */
const unsigned *dedup_freeze_windows(void);

/*
 * Wait until no part of [addr, addr + len) is announced or frozen.  Any thread,
 * but not who holds the remap lock.
 */
void dedup_freeze_wait(const void *addr, size_t len);

#endif /* DEDUP_FREEZE_H */
