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

typedef struct Section {
    DedupSpace *space;
    DedupBodyFn *body;
    void *arg;
} Section;

static void locked(void *opaque)
{
    Section *s = opaque;

    if (DEDUP_MUTANT(LOCK_FIRST)) {
        s->body(s->arg);
        return;
    }
    dedup_space_lock(s->space);
    s->body(s->arg);
    dedup_space_unlock(s->space);
}

bool dedup_space_exclusively(DedupSpace *space, DedupBodyFn *body, void *arg)
{
    DedupExclusive *e = &space->exclusive;
    Section s = { .space = space, .body = body, .arg = arg };
    DedupExclusion how;
    int64_t start, now;

    if (!e->fn) {
        locked(&s);
        return true;
    }
    start = dedup_now_ns();
    if (DEDUP_MUTANT(LOCK_FIRST)) {
        dedup_space_lock(space);
    }
    how = e->fn(space->owner, locked, &s);
    if (DEDUP_MUTANT(LOCK_FIRST)) {
        dedup_space_unlock(space);
    }
    if (how == DEDUP_EXCLUSION_HELD) {
        now = dedup_now_ns();
        dedup_space_note_window(space, now - start);
        if (g_thread_self() == space->lock.scanner) {
            e->rests_ns = now + SHARE * (now - start);
        }
    }
    return how != DEDUP_EXCLUSION_FAILED;
}

int64_t dedup_exclusive_wait_us(const DedupExclusive *e, int64_t now_ns)
{
    return e->rests_ns > now_ns ? (e->rests_ns - now_ns + 999) / 1000 : 0;
}
