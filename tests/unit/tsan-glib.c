/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * GLib's mutexes and conditions, made of POSIX ones: only for tests that are
 * built with the thread sanitizer.
 *
 * GLib's own are futexes inside a library that is not instrumented, so the
 * sanitizer would not see them and call everything behind them a race.  The
 * definitions here take their place in the test's executable; GLib itself
 * goes on with its own, for its own locks.
 *
 * As GLib allows, a GMutex or GCond in zeroed memory works without init: the
 * POSIX object is made at its first use.
 */

#include <errno.h>
#include <glib.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

static void *get(gpointer *p, void *(*make)(void), void (*drop)(void *))
{
    void *have = __atomic_load_n(p, __ATOMIC_ACQUIRE);

    if (!have) {
        void *fresh = make();

        if (__atomic_compare_exchange_n(p, &have, fresh, false,
                                        __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE)) {
            have = fresh;
        } else {
            drop(fresh);
        }
    }
    return have;
}

static void *mutex_make(void)
{
    pthread_mutex_t *m = malloc(sizeof(*m));

    pthread_mutex_init(m, NULL);
    return m;
}

static void mutex_drop(void *m)
{
    pthread_mutex_destroy(m);
    free(m);
}

static pthread_mutex_t *mutex_of(GMutex *mutex)
{
    return get(&mutex->p, mutex_make, mutex_drop);
}

static void *cond_make(void)
{
    pthread_cond_t *c = malloc(sizeof(*c));
    pthread_condattr_t attr;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(c, &attr);
    pthread_condattr_destroy(&attr);
    return c;
}

static void cond_drop(void *c)
{
    pthread_cond_destroy(c);
    free(c);
}

static pthread_cond_t *cond_of(GCond *cond)
{
    return get(&cond->p, cond_make, cond_drop);
}

void g_mutex_init(GMutex *mutex)
{
    mutex->p = mutex_make();
}

void g_mutex_clear(GMutex *mutex)
{
    if (mutex->p) {
        mutex_drop(mutex->p);
        mutex->p = NULL;
    }
}

void g_mutex_lock(GMutex *mutex)
{
    pthread_mutex_lock(mutex_of(mutex));
}

gboolean g_mutex_trylock(GMutex *mutex)
{
    return pthread_mutex_trylock(mutex_of(mutex)) == 0;
}

void g_mutex_unlock(GMutex *mutex)
{
    pthread_mutex_unlock(mutex_of(mutex));
}

void g_cond_init(GCond *cond)
{
    cond->p = cond_make();
}

void g_cond_clear(GCond *cond)
{
    if (cond->p) {
        cond_drop(cond->p);
        cond->p = NULL;
    }
}

void g_cond_signal(GCond *cond)
{
    pthread_cond_signal(cond_of(cond));
}

void g_cond_broadcast(GCond *cond)
{
    pthread_cond_broadcast(cond_of(cond));
}

void g_cond_wait(GCond *cond, GMutex *mutex)
{
    pthread_cond_wait(cond_of(cond), mutex_of(mutex));
}

gboolean g_cond_wait_until(GCond *cond, GMutex *mutex, gint64 end_time)
{
    struct timespec ts = {
        .tv_sec = end_time / G_USEC_PER_SEC,
        .tv_nsec = end_time % G_USEC_PER_SEC * 1000,
    };

    return pthread_cond_timedwait(cond_of(cond), mutex_of(mutex), &ts) !=
           ETIMEDOUT;
}
