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
};

#ifdef CONFIG_DEDUP_MUTANTS
/* Which mutant is on, 0: none; set from $DEDUP_MUTANT or by a test. */
extern int dedup_mutant;
/* And-ed to every content hash: a forced collision (C21). */
extern uint64_t dedup_hash_mask;
/* Pause at the place where a mutant opens its race, in microseconds. */
extern unsigned dedup_mutant_delay_us;
#define DEDUP_MUTANT(n) (dedup_mutant == DEDUP_MUTANT_##n)
#define DEDUP_MUTANT_DELAY()                                            \
    do {                                                                \
        if (dedup_mutant_delay_us) {                                    \
            usleep(dedup_mutant_delay_us);                              \
        }                                                               \
    } while (0)
#else
#define DEDUP_MUTANT(n) false
#define DEDUP_MUTANT_DELAY() do { } while (0)
#endif

#endif /* DEDUP_MUTANT_H */
