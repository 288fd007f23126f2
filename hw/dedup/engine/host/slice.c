/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A fresh slice; see slice.h.
 */

#include <sched.h>

#include "host/clock.h"
#include "host/slice.h"

int64_t dedup_slice_renew(void)
{
    static __thread int64_t since_ns;
    int64_t now = dedup_now_ns();

    /* it may have slept meanwhile: then that is one call too many */
    if (now - since_ns > DEDUP_SLICE_NS) {
        sched_yield();
        now = since_ns = dedup_now_ns();
    }
    return now;
}
