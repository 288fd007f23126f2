/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Mutants: deliberate faults that the tests must catch.
 *
 * A build with CONFIG_DEDUP_MUTANTS (the library that the unit tests link)
 * can switch one of them on; a release build has none of this: there
 * DEDUP_MUTANT() is the constant false and the compiler drops the branch.
 * The numbers are those of docs/devel/dedup-mutants.rst.
 */

#ifndef DEDUP_MUTANT_H
#define DEDUP_MUTANT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

enum {
    DEDUP_MUTANT_NO_PIN_RECHECK = 1,  /* M1: pins not read after the freeze */
    DEDUP_MUTANT_NO_FREEZE = 2,       /* M2: nothing is write-protected */
    DEDUP_MUTANT_NO_WAKE = 3,         /* M3: waiters are not woken */
    DEDUP_MUTANT_PUNCH_FIRST = 4,     /* M4: punch before the map stands */
    DEDUP_MUTANT_TRUST_HASH = 5,      /* M5: no byte compare */
    DEDUP_MUTANT_NO_MADVISE = 6,      /* M6: flags not re-applied */
    DEDUP_MUTANT_NO_SEAL_CHECK = 7,   /* M7: any fd is taken as a segment */
    DEDUP_MUTANT_NO_PROOF = 8,        /* M8: published without being proven */
    DEDUP_MUTANT_NO_LOCK = 9,         /* M9: lock dropped before the punch */
    DEDUP_MUTANT_NO_HEADROOM = 10,    /* cgroup headroom not looked at */
    DEDUP_MUTANT_PUNCH_HELD = 11,     /* punched though a reader holds it */
    DEDUP_MUTANT_NO_FETCH_PROOF = 12, /* a segment is given without proof */
    DEDUP_MUTANT_NO_GATE = 13,        /* restores do not look at the memory */
    DEDUP_MUTANT_PUNCH_ZEROES = 14,   /* zero pages of any file are punched */
    DEDUP_MUTANT_KSM_LEFT = 15,       /* KSM's pages are not refused */
    DEDUP_MUTANT_RESTORE_HELD = 16,   /* pinned and copied, restored anyway */
    DEDUP_MUTANT_RESTORE_KSM = 17,    /* KSM's pages in between, too */
    DEDUP_MUTANT_SUM_OFF = 18,        /* a sum of the ledger is off by one */
    DEDUP_MUTANT_UNPROTECT_ALL = 19,  /* also what is not flushed yet */
    DEDUP_MUTANT_NO_WAIT = 20,        /* mprotect: the handler does not wait */
    DEDUP_MUTANT_DMA_NO_WAIT = 21,    /* nor who has raised a pin counter */
    DEDUP_MUTANT_FREEZE_PINNED = 22,  /* pinned pages are frozen */
    DEDUP_MUTANT_LOCK_FIRST = 23,     /* the lock, then vCPUs are kept out */
    DEDUP_MUTANT_VHOST_USER_SILENT = 24, /* it exports RAM and says nothing */
    DEDUP_MUTANT_NO_PUT_BACK = 25,    /* a refused mapping is not undone */
    DEDUP_MUTANT_FD_LEAK = 26,        /* nor a file closed that is refused */
};

#ifdef CONFIG_DEDUP_MUTANTS
/* Which mutant is on, 0: none; set from $DEDUP_MUTANT or by a test. */
extern int dedup_mutant;
/* And-ed to every content hash: a forced collision (C21). */
extern uint64_t dedup_hash_mask;
/* Pages that are written again and again are merged again and again. */
extern bool dedup_never_rests;
/* Pause at the place where a mutant opens its race, in microseconds. */
extern unsigned dedup_mutant_delay_us;
#define DEDUP_MUTANT(n) (dedup_mutant == DEDUP_MUTANT_##n)
#define DEDUP_NEVER_RESTS dedup_never_rests
#define DEDUP_MUTANT_DELAY()                                            \
    do {                                                                \
        if (dedup_mutant_delay_us) {                                    \
            usleep(dedup_mutant_delay_us);                              \
        }                                                               \
    } while (0)
/*
 * Called in each window, on the scanner's thread or that of a restore: what
 * a test does here comes at the worst moment, every time.
 */
enum {
    DEDUP_HOOK_ADMITTED,      /* the pages are chosen, not frozen yet */
    DEDUP_HOOK_JUDGED,        /* they are frozen and compared, not replaced */
    DEDUP_HOOK_FLUSHED,       /* some of them are gone, others are to follow */
    DEDUP_HOOK_CHOSEN,        /* a restore's are chosen, not frozen yet */
    DEDUP_HOOK_COPIED,        /* they are frozen and copied, not moved */
};
extern void (*dedup_mutant_hook)(int stage);
#define DEDUP_MUTANT_HOOK(stage)                                        \
    do {                                                                \
        if (dedup_mutant_hook) {                                        \
            dedup_mutant_hook(DEDUP_HOOK_##stage);                      \
        }                                                               \
    } while (0)
static inline void dedup_mutants_init(void)
{
    if (getenv("DEDUP_MUTANT")) {
        dedup_mutant = atoi(getenv("DEDUP_MUTANT"));
        dedup_mutant_delay_us = 2000;
        /* as many chances as may be; for a run with mutant 0 as well */
        dedup_never_rests = true;
    }
}
#else
static inline void dedup_mutants_init(void) { }
#define DEDUP_NEVER_RESTS false
#define DEDUP_MUTANT(n) false
#define DEDUP_MUTANT_HOOK(stage) do { } while (0)
#define DEDUP_MUTANT_DELAY() do { } while (0)
#endif

#endif /* DEDUP_MUTANT_H */
