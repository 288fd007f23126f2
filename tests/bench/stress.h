/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the parts of stress-dedup share: RAM, its writers, and what each page
 * must hold.
 *
 * Terms:
 *   slot    a quarter of a page.  Each writer has one slot of every page for
 *           itself, so that all writers meet in the same pages.
 *   value   what a writer put into its slot of a page last: 0 is all zero.
 *           There are few values, and what they look like does not depend on
 *           the page: so pages are often equal, and often zero.
 *   shadow  a writer's own record of the value in each of its slots.  A write
 *           mostly changes the value, so one that is lost shows.
 *
 * Stores by writers stand for a guest's.  They, and the checks, are no C
 * program to the engine that reads the same pages: STRESS_GUEST.
 */

#ifndef STRESS_H
#define STRESS_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

#define STRESS_PAGE 4096u
#define STRESS_SLOT 1024u
#define STRESS_WORDS (STRESS_SLOT / 4)
#define STRESS_VALUES 3
#define STRESS_RAMS 2

#define STRESS_GUEST __attribute__((no_sanitize("thread", "address", \
                                                "undefined"), noinline))

/* volatile: what it points at changes behind the compiler's back */
typedef volatile uint32_t StressWord;

typedef struct StressRam {
    const char *name;
    DedupMemory memory;
    uint8_t *host;
    int fd;                   /* -1: anonymous */
    uint16_t *pins;           /* one counter per 64 KiB */
    DedupRegion *region;
} StressRam;

typedef struct Stress Stress;
typedef struct StressWriter StressWriter;

struct StressWriter {
    const char *name;
    unsigned slot;
    /* Opens what it needs.  NULL, or why it cannot be had here. */
    const char *(*open)(StressWriter *w);
    /* Writes and checks until stress_go_on() is false. */
    void (*run)(StressWriter *w);
    void (*close)(StressWriter *w);

    Stress *s;
    const char *skip;         /* what open() returned */
    uint8_t *shadow;          /* a byte per page of all RAM */
    uint8_t *own_shadow;      /* the same, if it is main's to free */
    uint64_t writes;          /* atomic; also a sign of life */
    GThread *thread;
    uint64_t random;
    void *data;               /* its own */
};

struct Stress {
    StressRam rams[STRESS_RAMS];
    uint32_t pages;           /* of each RAM */
    DedupFreezeHow freeze;
    bool stop;                /* atomic */
    char *failure;            /* the first; set once, under @lock */
    GMutex lock;
    GCond changed;
};

extern StressWriter stress_user, stress_read, stress_direct, stress_kvm;

static inline bool stress_go_on(Stress *s)
{
    return !__atomic_load_n(&s->stop, __ATOMIC_RELAXED);
}

/* The first failure ends the run. */
void stress_fail(Stress *s, const char *format, ...) G_GNUC_PRINTF(2, 3);

static inline uint32_t stress_random(StressWriter *w)
{
    /* splitmix64 */
    uint64_t z = w->random += 0x9e3779b97f4a7c15ull;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z >> 32;
}

/* Pages that are to be all zero much of the time. */
static inline bool stress_mostly_zero(uint32_t page)
{
    return page % 4 == 0;
}

/* Another value than @old, but a page that is to be zero often stays so. */
static inline uint8_t stress_next_value(uint8_t old, uint32_t page,
                                        uint32_t random)
{
    bool zero = stress_mostly_zero(page);

    if (old == 0) {
        return zero && random % 8 ? 0
                                  : 1 + (random >> 8) % (STRESS_VALUES - 1);
    }
    return zero || random % 3 ? 0 : STRESS_VALUES - old;
}

/* Pages are numbered through all RAM. */
static inline uint8_t *stress_slot(const StressWriter *w, uint32_t page)
{
    const Stress *s = w->s;

    return s->rams[page / s->pages].host +
           (size_t)(page % s->pages) * STRESS_PAGE + w->slot * STRESS_SLOT;
}

/*
 * Word @k of a slot with a value.  The vCPU's slot has few words that are not
 * zero (stress-guest.S writes them): software may interpret its every
 * instruction.
 */
#define STRESS_KVM_SLOT 3
#define STRESS_KVM_STEP 32

static inline uint32_t stress_word(unsigned slot, uint8_t value, unsigned k)
{
    if (!value || (slot == STRESS_KVM_SLOT && k % STRESS_KVM_STEP)) {
        return 0;
    }
    return 0x80000000u | slot << 24 | (uint32_t)value << 16 | k;
}

/* Does a slot hold what the shadow says?  If not: stress_fail(). */
bool stress_check(StressWriter *w, uint32_t page, const char *when);

/* The vCPU's program: stress-guest.S. */
extern const uint8_t stress_guest_start[], stress_guest_end[];

/* Linked before and behind the engine's dedup_ledger_set(). */
void __wrap_dedup_ledger_set(DedupRegion *r, uint32_t page, uint32_t entry);
void __real_dedup_ledger_set(DedupRegion *r, uint32_t page, uint32_t entry);

#endif /* STRESS_H */
