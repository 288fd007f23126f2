/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Windows that no vCPU may meet: where a store to a frozen page would be an
 * error (KVM, with mprotect()), the engine has vCPUs kept out of the guest
 * first, and takes its lock then; and they run for most of the time.
 *
 * Threads play the vCPUs here, and a lock the part of QEMU that keeps them out.
 */

#include <string.h>
#include <sys/mman.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "host/mutant.h"
#include "space/space-internal.h"

/* ---- threads that play vCPUs, and a KVM that keeps them out ---- */

#define VCPUS 2
/* Pages of RAM, and those of a vCPU's own, which writes to one in EQUAL. */
#define MANY 512
#define VCPU_PAGES (MANY / VCPUS)
#define EQUAL 8
/* So many that their share of the time says something. */
#define MANY_WINDOWS 20
#define AT 100
#define LOCK_US (1 * G_USEC_PER_SEC)

static struct {
    GMutex lock;
    GCond changed;
    int inside;               /* vCPUs in the guest; lock */
    bool pending;             /* somebody wants them out; lock */
    int stop;                 /* atomic */
    bool refuses;             /* they never come out */
    unsigned inside_us;       /* they stay inside for so much longer */
    int64_t held_us;          /* for how long they were out */
    int64_t last_us;          /* and the last time */
    int64_t most_us;          /* and at most */
    bool discards;            /* atomic: in the next window somebody does */
    bool discarded;           /* atomic: it is over */
    bool locked;              /* lock: he has the remap lock */
    GThread *discarder;
    unsigned windows;         /* atomic */
    FxEngine *fe;
    FxRam *ram;
} kvm;

typedef struct Vcpu {
    unsigned number;
    bool discards;
    uint8_t before;           /* the byte that it changes */
    uint64_t rounds;          /* atomic */
} Vcpu;

static void enter_guest(void)
{
    g_mutex_lock(&kvm.lock);
    while (kvm.pending) {
        g_cond_wait(&kvm.changed, &kvm.lock);
    }
    kvm.inside++;
    g_mutex_unlock(&kvm.lock);
}

static void leave_guest(void)
{
    g_mutex_lock(&kvm.lock);
    kvm.inside--;
    g_cond_broadcast(&kvm.changed);
    g_mutex_unlock(&kvm.lock);
}

/* A page that no vCPU writes to; as long as if it were much memory. */
static gpointer discarder_main(gpointer opaque)
{
    uint8_t *host = fx_addr(kvm.ram, MANY - 1);

    g_assert_true(dedup_engine_discard_begin(kvm.fe->e, host, FX_PAGE));
    g_mutex_lock(&kvm.lock);
    kvm.locked = true;
    g_cond_broadcast(&kvm.changed);
    g_mutex_unlock(&kvm.lock);
    g_usleep(LOCK_US);
    g_assert_cmpint(madvise(host, FX_PAGE, MADV_DONTNEED), ==, 0);
    dedup_engine_discard_end(kvm.fe->e);
    fx_shadow_page(kvm.ram, MANY - 1, 0);
    __atomic_store_n(&kvm.discarded, true, __ATOMIC_SEQ_CST);
    return NULL;
}

/* When vCPUs are out, and the window is about to take the lock. */
static void take_lock_first(void)
{
    if (!__atomic_exchange_n(&kvm.discards, false, __ATOMIC_SEQ_CST)) {
        return;
    }
    kvm.locked = false;
    kvm.discarder = g_thread_new("discarder", discarder_main, NULL);
    g_mutex_lock(&kvm.lock);
    while (!kvm.locked) {
        g_cond_wait(&kvm.changed, &kvm.lock);
    }
    g_mutex_unlock(&kvm.lock);
}

static DedupExclusion keep_out(void *opaque, DedupBodyFn *body, void *arg)
{
    int64_t start = g_get_monotonic_time();
    int64_t end = start + fx_hang_us();

    if (kvm.refuses) {
        return DEDUP_EXCLUSION_FAILED;
    }
    g_mutex_lock(&kvm.lock);
    kvm.pending = true;
    while (kvm.inside) {
        if (!g_cond_wait_until(&kvm.changed, &kvm.lock, end)) {
            fx_fail("vCPU hangs", "it does not come out of the guest");
        }
    }
    g_mutex_unlock(&kvm.lock);
    take_lock_first();
    body(arg);
    g_mutex_lock(&kvm.lock);
    kvm.pending = false;
    kvm.last_us = g_get_monotonic_time() - start;
    kvm.held_us += kvm.last_us;
    kvm.most_us = MAX(kvm.most_us, kvm.last_us);
    g_cond_broadcast(&kvm.changed);
    g_mutex_unlock(&kvm.lock);
    return DEDUP_EXCLUSION_HELD;
}

/* In each window: none is inside. */
static void nobody_inside(int stage)
{
    if (stage != DEDUP_HOOK_JUDGED && stage != DEDUP_HOOK_COPIED) {
        return;
    }
    __atomic_fetch_add(&kvm.windows, 1, __ATOMIC_RELAXED);
    g_mutex_lock(&kvm.lock);
    if (kvm.inside) {
        fx_fail("vCPU inside", "of a window");
    }
    g_mutex_unlock(&kvm.lock);
}

/* It stays inside for a while, as a vCPU does; each round changes a page. */
FX_GUEST
static gpointer vcpu_main(gpointer opaque)
{
    Vcpu *v = opaque;
    uint32_t first = v->number * VCPU_PAGES;
    uint64_t seed = 88172645463325252ULL + v->number;

    while (!__atomic_load_n(&kvm.stop, __ATOMIC_RELAXED)) {
        uint32_t page;

        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        page = first + seed % (VCPU_PAGES / EQUAL) * EQUAL + 3;
        enter_guest();
        /* the guest does something else, most of the time */
        g_usleep(200 + kvm.inside_us);
        if (v->discards) {
            /* as a balloon in the guest has it done */
            g_assert_true(dedup_engine_discard_begin(kvm.fe->e,
                                                     fx_addr(kvm.ram, page),
                                                     FX_PAGE));
            g_assert_cmpint(madvise(fx_addr(kvm.ram, page), FX_PAGE,
                                    MADV_DONTNEED), ==, 0);
            dedup_engine_discard_end(kvm.fe->e);
            fx_shadow_page(kvm.ram, page, 0);
        } else {
            /* all of these begin with the same contents, and come back to it */
            uint8_t value = v->before ^ (seed >> 40 & 1 ? 0xff : 0);

            *(FxByte *)(fx_addr(kvm.ram, page) + AT) = value;
            kvm.ram->shadow[page * FX_PAGE + AT] = value;
        }
        leave_guest();
        __atomic_fetch_add(&v->rounds, 1, __ATOMIC_RELAXED);
        g_usleep(20);
    }
    return NULL;
}

static void kvm_start(Vcpu *vcpu, GThread **thread, bool discards)
{
    kvm.ram = fx_ram_new(FX_ANON, MANY);
    for (uint32_t i = 0; i < MANY; i++) {
        fx_page(kvm.ram, i, i % EQUAL);
    }
    kvm.stop = 0;
    kvm.windows = 0;
    kvm.held_us = kvm.most_us = 0;
    kvm.fe = fx_engine_new(NULL);
    dedup_mutant_hook = nobody_inside;
    for (unsigned i = 0; i < VCPUS; i++) {
        vcpu[i] = (Vcpu) {
            .number = i, .discards = discards,
            .before = kvm.ram->shadow[3 * FX_PAGE + AT],
        };
        thread[i] = g_thread_new("vcpu", vcpu_main, &vcpu[i]);
    }
    fx_add(kvm.fe, kvm.ram);
    fx_engine_start(kvm.fe);
}

static void kvm_end(Vcpu *vcpu, GThread **thread)
{
    __atomic_store_n(&kvm.stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < VCPUS; i++) {
        g_thread_join(thread[i]);
        g_assert_cmpuint(vcpu[i].rounds, >, 10);
    }
    fx_engine_free(kvm.fe);
    dedup_mutant_hook = NULL;
    fx_assert_bytes(kvm.ram);
    kvm.ram->region = NULL;
    fx_ram_free(kvm.ram);
}

static bool has_merged(void *opaque)
{
    DedupStats stats;

    fx_stats(kvm.fe, &stats);
    return stats.pages_merged >= MANY / 2 && stats.cow_breaks >= 20 &&
           __atomic_load_n(&kvm.windows, __ATOMIC_RELAXED) >= MANY_WINDOWS;
}

static void test_vcpus(gconstpointer data)
{
    Vcpu vcpu[VCPUS];
    GThread *thread[VCPUS];
    int64_t start = g_get_monotonic_time(), took;

    kvm_start(vcpu, thread, GPOINTER_TO_INT(data));
    if (GPOINTER_TO_INT(data)) {
        fx_wait_scans(kvm.fe, 50);
        fx_set_run(kvm.fe, false);
        fx_wait_state(kvm.fe, DEDUP_STATE_STOPPED);
    } else {
        fx_wait_until(has_merged, NULL, "not merged");
        fx_set_run(kvm.fe, false);
        fx_wait_state(kvm.fe, DEDUP_STATE_STOPPED);
        took = g_get_monotonic_time() - start;
        g_test_message("%u windows, vCPUs out for %.2f %% of %.2f s",
                       kvm.windows, 100.0 * kvm.held_us / took, took / 1e6);
        /* one in a hundred; nothing has followed the last one */
        g_assert_cmpint(kvm.held_us - kvm.last_us, <=, took / 50);
        fx_restore_begin(kvm.fe, true, false);
        fx_wait_restored(kvm.fe);
        g_assert_cmpuint(kvm.fe->left, ==, 0);
    }
    g_assert_cmpuint(kvm.windows, >=, 4);
    kvm_end(vcpu, thread);
}

static bool is_over(void *opaque)
{
    return __atomic_load_n(&kvm.discarded, __ATOMIC_SEQ_CST);
}

/* Somebody has the lock for long: vCPUs do not wait for that. */
static void test_lock(void)
{
    Vcpu vcpu[VCPUS];
    GThread *thread[VCPUS];

    kvm_start(vcpu, thread, false);
    fx_wait_until(has_merged, NULL, "not merged");
    kvm.discarded = false;
    __atomic_store_n(&kvm.discards, true, __ATOMIC_SEQ_CST);
    fx_wait_until(is_over, NULL, "no window");
    fx_set_run(kvm.fe, false);
    fx_wait_state(kvm.fe, DEDUP_STATE_STOPPED);
    g_thread_join(kvm.discarder);
    g_assert_cmpint(kvm.most_us, <, LOCK_US / 2);
    kvm_end(vcpu, thread);
}

static bool is_known(void *opaque)
{
    return __atomic_load_n(&kvm.fe->e->space->exclusive.stops,
                           __ATOMIC_RELAXED) >= 64;
}

/* How long it takes is counted: here a vCPU stays inside for longer. */
static void test_long(void)
{
    Vcpu vcpu[VCPUS];
    GThread *thread[VCPUS];

    kvm.inside_us = 1000;
    kvm_start(vcpu, thread, false);
    g_assert_false(dedup_engine_holds_long(kvm.fe->e));
    fx_wait_until(is_known, NULL, "no windows");
    g_assert_true(dedup_engine_holds_long(kvm.fe->e));
    kvm_end(vcpu, thread);
    kvm.inside_us = 0;
}

/* They never come out: nothing is merged, nobody waits for ever. */
static void test_refused(void)
{
    Vcpu vcpu[VCPUS];
    GThread *thread[VCPUS];
    g_autoptr(GError) error = NULL;
    DedupStats stats;

    kvm_start(vcpu, thread, false);
    fx_wait_until(has_merged, NULL, "not merged");
    kvm.refuses = true;
    fx_stats(kvm.fe, &stats);
    g_assert_false(dedup_engine_restore_range(kvm.fe->e, kvm.ram->host,
                                              MANY * FX_PAGE, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_STATE);
    fx_wait_scans(kvm.fe, 3);
    kvm.refuses = false;
    g_clear_error(&error);
    fx_set_run(kvm.fe, false);
    fx_wait_state(kvm.fe, DEDUP_STATE_STOPPED);
    g_assert_true(dedup_engine_restore_range(kvm.fe->e, kvm.ram->host,
                                             MANY * FX_PAGE, &error));
    kvm_end(vcpu, thread);
}

int main(int argc, char **argv)
{
    g_setenv("DEDUP_TEST_FREEZE", "mprotect", TRUE);
    fx_exclusive = keep_out;
    fx_init(&argc, &argv);
    dedup_mutants_init();
    g_test_add_data_func("/vcpus/store", GINT_TO_POINTER(false), test_vcpus);
    g_test_add_data_func("/vcpus/discard", GINT_TO_POINTER(true), test_vcpus);
    g_test_add_func("/vcpus/refused", test_refused);
    g_test_add_func("/vcpus/lock", test_lock);
    g_test_add_func("/vcpus/long", test_long);
    return g_test_run();
}
