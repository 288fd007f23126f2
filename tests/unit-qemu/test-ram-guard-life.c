/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The RAM guard: the one who replaces RAM goes while others are at work
 *
 * ram_guard_unregister() runs with the BQL held.  A vCPU may wait for the BQL
 * in an RCU read-side critical section, so nobody may wait for that; but who
 * is in a discard must be waited for.
 *
 * Compiled with hw/dedup/ram-guard.c alone.  The main thread stands for the
 * one that has the BQL.
 */

#include "qemu/osdep.h"
#include "hw/dedup/qemu-compat.h"
#include "hw/dedup/ram-guard.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"

#define ROUNDS 20000
#define THREADS 3

/* In QEMU in system/physmem.c. */
RAMBlock *qemu_ram_block_from_host(void *ptr, bool round_offset,
                                   ram_addr_t *offset)
{
    return NULL;
}

typedef struct Replacer {
    bool gone;                  /* atomic: unregistered and freed, as it were */
    unsigned inside;            /* atomic */
    QemuSemaphore *entered;
    QemuSemaphore *go_on;
} Replacer;

static bool discard_begin(void *opaque, RAMBlock *rb, ram_addr_t start,
                          size_t length)
{
    Replacer *r = opaque;

    g_assert_false(qatomic_read(&r->gone));
    qatomic_inc(&r->inside);
    if (r->entered) {
        qemu_sem_post(r->entered);
        qemu_sem_wait(r->go_on);
    }
    return true;
}

static void discard_end(void *opaque)
{
    Replacer *r = opaque;

    g_assert_false(qatomic_read(&r->gone));
    qatomic_dec(&r->inside);
}

static const RamGuardOps ops = {
    .discard_begin = discard_begin,
    .discard_end = discard_end,
};

/* "The BQL" that a vCPU waits for in a read section. */
static QemuMutex big_lock;
static QemuSemaphore in_section;

static void *vcpu(void *opaque)
{
    rcu_register_thread();
    rcu_read_lock();
    qemu_sem_post(&in_section);
    qemu_mutex_lock(&big_lock);
    qemu_mutex_unlock(&big_lock);
    rcu_read_unlock();
    rcu_unregister_thread();
    return NULL;
}

/* Hangs for ever where unregistering waits for a grace period. */
static void test_waiting_vcpu(void)
{
    Replacer r = { 0 };
    QemuThread thread;

    qemu_mutex_init(&big_lock);
    qemu_sem_init(&in_section, 0);
    qemu_mutex_lock(&big_lock);
    qemu_thread_create(&thread, "vcpu", vcpu, NULL, QEMU_THREAD_JOINABLE);
    qemu_sem_wait(&in_section);
    alarm(60);
    for (int i = 0; i < 100; i++) {
        g_assert_true(ram_guard_register(&ops, &r));
        ram_guard_unregister();
    }
    alarm(0);
    qemu_mutex_unlock(&big_lock);
    qemu_thread_join(&thread);
}

static void *one_discard(void *opaque)
{
    RamGuardDiscard d;

    rcu_register_thread();
    g_assert_true(ram_guard_discard_begin(&d, NULL, 0, 0));
    ram_guard_discard_end(&d);
    rcu_unregister_thread();
    return NULL;
}

static void *let_go_on(void *opaque)
{
    Replacer *r = opaque;

    /* the other one has not left yet: so nobody may be told that it has */
    g_usleep(20000);
    g_assert_cmpuint(qatomic_read(&r->inside), ==, 1);
    g_assert_false(qatomic_read(&r->gone));
    qemu_sem_post(r->go_on);
    return NULL;
}

static void test_waits_for_discard(void)
{
    QemuSemaphore entered, go_on;
    Replacer r = { .entered = &entered, .go_on = &go_on };
    QemuThread discarder, helper;

    qemu_sem_init(&entered, 0);
    qemu_sem_init(&go_on, 0);
    g_assert_true(ram_guard_register(&ops, &r));
    qemu_thread_create(&discarder, "discard", one_discard, NULL,
                       QEMU_THREAD_JOINABLE);
    qemu_sem_wait(&entered);
    qemu_thread_create(&helper, "helper", let_go_on, &r,
                       QEMU_THREAD_JOINABLE);
    ram_guard_unregister();
    g_assert_cmpuint(qatomic_read(&r.inside), ==, 0);
    qatomic_set(&r.gone, true);
    qemu_thread_join(&discarder);
    qemu_thread_join(&helper);
    qemu_sem_destroy(&entered);
    qemu_sem_destroy(&go_on);
}

static bool stop;

static void *discard_on(void *opaque)
{
    uint64_t *count = opaque;

    rcu_register_thread();
    while (!qatomic_read(&stop)) {
        RamGuardDiscard d;

        g_assert_true(ram_guard_discard_begin(&d, NULL, 0, 0));
        *count += d.guard != NULL;
        ram_guard_discard_end(&d);
    }
    rcu_unregister_thread();
    return NULL;
}

/* No callback comes when the one who replaces has gone. */
static void test_comes_and_goes(void)
{
    uint64_t count[THREADS] = { 0 }, all = 0;
    /* one each, kept: who comes late finds that it is gone */
    g_autofree Replacer *rs = g_new0(Replacer, ROUNDS);
    QemuThread threads[THREADS];

    for (int i = 0; i < THREADS; i++) {
        qemu_thread_create(&threads[i], "discard", discard_on, &count[i],
                           QEMU_THREAD_JOINABLE);
    }
    for (int i = 0; i < ROUNDS; i++) {
        Replacer *r = &rs[i];

        g_assert_true(ram_guard_register(&ops, r));
        if (i % 64 == 0) {
            g_usleep(100);
        }
        ram_guard_unregister();
        qatomic_set(&r->gone, true);
        g_assert_cmpuint(qatomic_read(&r->inside), ==, 0);
    }
    qatomic_set(&stop, true);
    for (int i = 0; i < THREADS; i++) {
        qemu_thread_join(&threads[i]);
        all += count[i];
    }
    g_assert_cmpuint(all, >, 0);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    rust_bql_mock_lock();

    g_test_add_func("/ram-guard/life/waiting-vcpu", test_waiting_vcpu);
    g_test_add_func("/ram-guard/life/waits-for-discard",
                    test_waits_for_discard);
    g_test_add_func("/ram-guard/life/comes-and-goes", test_comes_and_goes);
    return g_test_run();
}
