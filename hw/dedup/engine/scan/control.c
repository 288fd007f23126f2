/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What is asked of the scanner; see control.h.
 */

#include "scan/control.h"

void dedup_control_init(DedupControl *c, const DedupParams *params)
{
    g_mutex_init(&c->lock);
    g_cond_init(&c->wake);
    c->params = *params;
}

void dedup_control_clear(DedupControl *c)
{
    g_cond_clear(&c->wake);
    g_mutex_clear(&c->lock);
}

void dedup_control_kick(DedupControl *c)
{
    g_mutex_lock(&c->lock);
    c->kick = true;
    g_cond_broadcast(&c->wake);
    g_mutex_unlock(&c->lock);
}

void dedup_control_nudge(DedupControl *c)
{
    g_mutex_lock(&c->lock);
    c->nudge = true;
    g_cond_broadcast(&c->wake);
    g_mutex_unlock(&c->lock);
}

void dedup_control_stop(DedupControl *c)
{
    g_mutex_lock(&c->lock);
    c->stop = true;
    g_cond_broadcast(&c->wake);
    g_mutex_unlock(&c->lock);
}

bool dedup_control_is_stopping(DedupControl *c)
{
    bool stop;

    g_mutex_lock(&c->lock);
    stop = c->stop;
    g_mutex_unlock(&c->lock);
    return stop;
}

bool dedup_control_may_scan(DedupControl *c)
{
    bool may;

    g_mutex_lock(&c->lock);
    may = !c->stop && !c->restoring && c->params.run;
    g_mutex_unlock(&c->lock);
    return may;
}

DedupWake dedup_control_wait(DedupControl *c, int64_t us)
{
    int64_t end = g_get_monotonic_time() + us;
    DedupWake wake = DEDUP_WAKE_KICK;

    g_mutex_lock(&c->lock);
    while (!c->kick && !c->stop && !c->nudge) {
        if (us < 0) {
            g_cond_wait(&c->wake, &c->lock);
        } else if (!g_cond_wait_until(&c->wake, &c->lock, end)) {
            wake = DEDUP_WAKE_TIME;
            break;
        }
    }
    if (!c->kick && !c->stop && c->nudge) {
        wake = DEDUP_WAKE_NUDGE;
    }
    c->kick = c->nudge = false;
    g_mutex_unlock(&c->lock);
    return wake;
}

bool dedup_control_pause(DedupControl *c, int64_t us)
{
    int64_t end = g_get_monotonic_time() + us;
    bool asked;

    g_mutex_lock(&c->lock);
    while (!c->kick && !c->stop &&
           g_cond_wait_until(&c->wake, &c->lock, end)) {
        ;
    }
    asked = c->kick || c->stop;
    g_mutex_unlock(&c->lock);
    return !asked;
}
