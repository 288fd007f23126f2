/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: have the transfers of block devices end
 *
 * As bdrv_drain_all_begin() does, but not for as long as it takes: that is
 * without end where storage hangs, and the BQL is held.
 */

#include "qemu/osdep.h"
#include "block/aio-wait.h"
#include "block/block.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "system/replay.h"
#include "dedup-internal.h"

static bool transfers_left(void)
{
    BlockDriverState *bs = NULL;
    bool left = false;

    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();
    while ((bs = bdrv_next_all_states(bs))) {
        left |= bdrv_drain_poll(bs, NULL, true);
    }
    return left;
}

static int64_t now_ms(void)
{
    return qemu_clock_get_ms(QEMU_CLOCK_REALTIME);
}

/* All it is for is that aio_poll() returns. */
static void time_is_up(void *opaque)
{
}

bool dedup_drain_begin(int64_t ms)
{
    int64_t end = now_ms() + ms;
    QEMUTimer timer;
    bool left;

    assert(bql_locked() && !qemu_in_coroutine());
    if (replay_events_enabled()) {
        /* The block layer drains nothing while it records or replays. */
        return true;
    }
    bdrv_drain_all_begin_nopoll();
    aio_timer_init(qemu_get_aio_context(), &timer, QEMU_CLOCK_REALTIME,
                   SCALE_MS, time_is_up, NULL);
    timer_mod(&timer, end);
    AIO_WAIT_WHILE_UNLOCKED(NULL,
                            (left = transfers_left()) && now_ms() < end);
    timer_del(&timer);
    timer_deinit(&timer);
    return !left;
}

void dedup_drain_end(void)
{
    bdrv_drain_all_end();
}
