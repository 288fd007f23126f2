/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: windows that no vCPU of KVM may meet
 *
 * With write-protect=mprotect a vCPU that stores to a frozen page leaves
 * KVM_RUN with an error, and the VM stops.  So a window is a work item for
 * which all vCPUs are kept out of KVM_RUN.  It runs on the first one's thread.
 *
 * That thread takes the BQL before it comes to the item.  Whoever has the BQL
 * and waits for us, to join a thread or for the end of a restore, would wait
 * for ever: so we give up soon.  The item then does nothing when its time
 * comes, and there is no other one before that.
 *
 * Who keeps the BQL all the time that he waits for pages (whole.c) stops the
 * vCPUs himself: dedup_exclusive_begin().
 *
 * TCG needs none of this: its vCPUs are threads that wait in a signal handler.
 */

#include "qemu/osdep.h"
#include "exec/cpu-common.h"
#include "hw/core/cpu.h"
#include "qemu/main-loop.h"
#include "qemu/lockable.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "system/cpus.h"
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
    QemuSemaphore done;       /* the item has gone */
    DedupBodyFn *body;
    void *arg;
} Section;

/* One at a time. */
static QemuMutex turn;
/* The item that was given up and has not gone yet; turn. */
static Section *given_up;
/* Atomic: vCPUs are stopped, and stay so until dedup_exclusive_end(). */
static bool vcpus_stopped;

static void __attribute__((constructor)) turn_init(void)
{
    qemu_mutex_init(&turn);
}

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
    }
    qemu_sem_post(&s->done);
    section_put(s);
}

/* False: the last one has not gone yet.  Turn held. */
static bool wait_given_up(void)
{
    if (given_up) {
        if (qemu_sem_timedwait(&given_up->done, EXCLUSIVE_MS) < 0) {
            return false;
        }
        section_put(given_up);
        given_up = NULL;
    }
    return true;
}

/* False: vCPUs did not come out.  Turn held. */
static bool run_exclusive(DedupBodyFn *body, void *arg)
{
    Section *s;

    if (!wait_given_up()) {
        return false;
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
            given_up = s;
            return false;
        }
        qemu_sem_wait(&s->done);
    }
    section_put(s);
    return true;
}

DedupExclusion dedup_exclusive(void *opaque, DedupBodyFn *body, void *arg)
{
    bool running = runstate_is_running();
    int64_t start = get_clock();
    bool done;

    /*
     * Whoever has the BQL removes a block that no vCPU can reach any more
     * (ram.c): the others wait without it.
     */
    if (!kvm_enabled() || !first_cpu || bql_locked() ||
        qatomic_read(&vcpus_stopped)) {
        body(arg);
        return DEDUP_EXCLUSION_FREE;
    }
    WITH_QEMU_LOCK_GUARD(&turn) {
        done = run_exclusive(body, arg);
    }
    if (!done) {
        trace_dedup_exclusive_given_up();
        return DEDUP_EXCLUSION_FAILED;
    }
    trace_dedup_exclusive(get_clock() - start, running);
    return running ? DEDUP_EXCLUSION_HELD : DEDUP_EXCLUSION_FREE;
}

void dedup_exclusive_begin(const DedupScanner *ds)
{
    assert(bql_locked());
    if (kvm_enabled() && ds->freeze == DEDUP_FREEZE_MPROTECT) {
        pause_all_vcpus();
        qatomic_set(&vcpus_stopped, true);
    }
}

void dedup_exclusive_end(void)
{
    assert(bql_locked());
    if (qatomic_read(&vcpus_stopped)) {
        qatomic_set(&vcpus_stopped, false);
        resume_all_vcpus();
    }
}
