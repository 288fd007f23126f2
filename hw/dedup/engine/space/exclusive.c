/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Windows with all vCPUs kept out; see exclusive.h.
 */

#include "host/clock.h"
#include "host/mutant.h"
#include "space/exclusive.h"
#include "space/space-internal.h"

/* vCPUs may run so many times longer than they were kept out. */
#define SHARE 99

/* When vCPUs did not come out, or the lock was taken: the next try. */
#define PAUSE_NS (200 * INT64_C(1000000))

/* What is known after so many stops counts, and so many may be long. */
#define STOPS_LEAST 64
#define LONG_LEAST 4
#define LONG_SHARE 100

typedef struct Section {
    DedupSpace *space;
    DedupBodyFn *body;
    void *arg;
    bool for_scanner;
    bool done;
} Section;

/*
 * vCPUs wait: so nobody is waited for who has the lock, be it for a discard of
 * much memory.
 */
static void run_section(void *opaque)
{
    Section *s = opaque;

    if (DEDUP_MUTANT(LOCK_FIRST)) {
        s->body(s->arg);
        s->done = true;
        return;
    }
    if (!dedup_space_trylock_to_read(s->space)) {
        return;
    }
    s->space->lock.strangers += !s->for_scanner;
    s->body(s->arg);
    dedup_space_unlock(s->space);
    s->done = true;
}

static void note(Section *s, DedupExclusion how, int64_t start)
{
    DedupExclusive *e = &s->space->exclusive;
    int64_t now = dedup_now_ns();

    __atomic_store_n(&e->held, how == DEDUP_EXCLUSION_HELD, __ATOMIC_RELAXED);
    if (how == DEDUP_EXCLUSION_HELD) {
        dedup_bound_took(&s->space->bound, now - start);
        __atomic_fetch_add(&e->long_stops, now - start > DEDUP_BOUND_NS,
                           __ATOMIC_RELAXED);
        __atomic_fetch_add(&e->stops, 1, __ATOMIC_RELAXED);
    }
    if (!s->for_scanner) {
        return;
    }
    if (!s->done) {
        e->rests_ns = now + PAUSE_NS;
    } else if (how == DEDUP_EXCLUSION_HELD) {
        e->rests_ns = now + SHARE * (now - start);
    }
}

bool dedup_space_exclusively(DedupSpace *space, DedupBodyFn *body, void *arg)
{
    DedupExclusive *e = &space->exclusive;
    Section s = {
        .space = space, .body = body, .arg = arg,
        .for_scanner = g_thread_self() ==
                       __atomic_load_n(&space->lock.scanner, __ATOMIC_RELAXED),
    };
    DedupExclusion how;
    int64_t start;

    if (!e->fn) {
        dedup_space_lock(space);
        body(arg);
        dedup_space_unlock(space);
        return true;
    }
    start = dedup_now_ns();
    if (DEDUP_MUTANT(LOCK_FIRST)) {
        dedup_space_lock(space);
    }
    how = e->fn(space->owner, run_section, &s);
    if (DEDUP_MUTANT(LOCK_FIRST)) {
        dedup_space_unlock(space);
    }
    note(&s, how, start);
    return s.done;
}

bool dedup_exclusive_is_long(const DedupExclusive *e)
{
    unsigned stops = __atomic_load_n(&e->stops, __ATOMIC_RELAXED);
    unsigned n = __atomic_load_n(&e->long_stops, __ATOMIC_RELAXED);

    return stops >= STOPS_LEAST && n >= LONG_LEAST && n > stops / LONG_SHARE;
}

int64_t dedup_exclusive_wait_us(const DedupExclusive *e, int64_t now_ns)
{
    return e->rests_ns > now_ns ? (e->rests_ns - now_ns + 999) / 1000 : 0;
}
