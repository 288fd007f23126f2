/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: windows that no vCPU of KVM may meet
 *
 * With write-protect=mprotect a vCPU that stores to a frozen page leaves KVM_RUN
 * with an error, and the VM stops.  So a window is a work item for which all
 * vCPUs are kept out of KVM_RUN.  It runs on the first one's thread.
 *
 * That thread takes the BQL before it comes to the item.  Whoever has the BQL
 * and waits for us, to join a thread or for the end of a restore, would wait
 * for ever: so we give up soon.  The item then does nothing when its time comes.
 *
 * TCG needs none of this: its vCPUs are threads that wait in a signal handler.
 */

#include "qemu/osdep.h"
#include "exec/cpu-common.h"
#include "hw/core/cpu.h"
#include "qemu/main-loop.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "system/kvm.h"
#include "system/runstate.h"
#include "dedup-internal.h"
#include "trace.h"

/* vCPUs are out in some tens of microseconds, unless somebody has the BQL. */
#define EXCLUSIVE_MS 20

typedef enum SectionState {
    SECTION_WAITS,
    SECTION_RUNS,
    SECTION_GIVEN_UP,
} SectionState;

/* Of who asked, and of the work item: the last one frees it. */
typedef struct Section {
    int users;                /* atomic */
    int state;                /* atomic: a SectionState */
    QemuSemaphore done;
    DedupBodyFn *body;
    void *arg;
} Section;

static void section_put(Section *s)
{
    if (qatomic_fetch_dec(&s->users) == 1) {
        qemu_sem_destroy(&s->done);
        g_free(s);
    }
}

/* On a vCPU's thread, without the BQL, all others out of KVM_RUN. */
static void section_run(CPUState *cpu, run_on_cpu_data data)
{
    Section *s = data.host_ptr;

    if (qatomic_cmpxchg(&s->state, SECTION_WAITS, SECTION_RUNS) ==
        SECTION_WAITS) {
        s->body(s->arg);
        qemu_sem_post(&s->done);
    }
    section_put(s);
}

DedupExclusion dedup_exclusive(void *opaque, DedupBodyFn *body, void *arg)
{
    bool running = runstate_is_running();
    int64_t start = get_clock();
    Section *s;

    /*
     * Whoever has the BQL removes a block that no vCPU can reach any more
     * (ram.c): the others wait without it.
     */
    if (!kvm_enabled() || !first_cpu || bql_locked()) {
        body(arg);
        return DEDUP_EXCLUSION_FREE;
    }
    s = g_new0(Section, 1);
    s->users = 2;
    s->body = body;
    s->arg = arg;
    qemu_sem_init(&s->done, 0);
    async_safe_run_on_cpu(first_cpu, section_run, RUN_ON_CPU_HOST_PTR(s));
    if (qemu_sem_timedwait(&s->done, EXCLUSIVE_MS) < 0) {
        if (qatomic_cmpxchg(&s->state, SECTION_WAITS, SECTION_GIVEN_UP) ==
            SECTION_WAITS) {
            trace_dedup_exclusive_given_up();
            section_put(s);
            return DEDUP_EXCLUSION_FAILED;
        }
        qemu_sem_wait(&s->done);
    }
    section_put(s);
    trace_dedup_exclusive(get_clock() - start, running);
    return running ? DEDUP_EXCLUSION_HELD : DEDUP_EXCLUSION_FREE;
}
