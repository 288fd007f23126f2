/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: who tells whom that there is something in a ring
 *
 * Compiled with hw/virtio/vhost-user-relay-ring.c alone; the device is that of
 * vhost-user-relay-device.h.
 */

#include "qemu/osdep.h"
#include "vhost-user-relay-device.h"

/* Does a device that has come from @old to @new kick, or call? */
static bool wants(uint16_t event, uint16_t old, uint16_t new)
{
    for (uint16_t i = old; i != new; i++) {
        if (i == event) {
            return true;
        }
    }
    return false;
}

static void test_kick_flags(void)
{
    start(8, false);
    g_assert_false(vhost_user_relay_ring_kick(&ring));
    add(1);
    g_assert_true(vhost_user_relay_ring_kick(&ring));
    g_assert_false(vhost_user_relay_ring_kick(&ring));
    add(1);
    add(1);
    stw_le_p(used_at(0), VRING_USED_F_NO_NOTIFY);
    g_assert_false(vhost_user_relay_ring_kick(&ring));
    /* It was said that it may look itself; nothing is owed for that. */
    stw_le_p(used_at(0), 0);
    g_assert_false(vhost_user_relay_ring_kick(&ring));
    add(1);
    /* Other bits say nothing. */
    stw_le_p(used_at(0), 0xffff & ~VRING_USED_F_NO_NOTIFY);
    g_assert_true(vhost_user_relay_ring_kick(&ring));
    end();
}

static void kick_at(unsigned done, int event_from, unsigned n)
{
    uint16_t event = done + event_from;

    for (unsigned i = 0; i < n; i++) {
        add(1);
    }
    stw_le_p(used_at(4 + 8 * ring.num), event);
    /* That means nothing here. */
    stw_le_p(used_at(0), VRING_USED_F_NO_NOTIFY);
    g_assert_cmpint(vhost_user_relay_ring_kick(&ring), ==,
                    wants(event, done, done + n));
    g_assert_false(vhost_user_relay_ring_kick(&ring));
    for (unsigned i = 0; i < n; i++) {
        uint16_t head = dev_avail(done + i);

        dev_use(head, 0);
        assert_taken(head, 0);
    }
}

static void test_kick_event(void)
{
    unsigned done = 0;

    start(8, true);
    for (int from = -3; from < 10; from++) {
        for (unsigned n = 1; n <= 8; n++) {
            kick_at(done, from, n);
            done += n;
        }
    }
    while (done < 65536 + 100) {
        kick_at(done, (int)(done % 7) - 2, 1 + done % 3);
        done += 1 + done % 3;
    }
    end();
}

static bool device_calls(uint16_t old)
{
    if (ring.event_idx) {
        return wants(lduw_le_p(avail_at(4 + 2 * ring.num)), old,
                     dev_used_idx);
    }
    return !(lduw_le_p(avail_at(0)) & VRING_AVAIL_F_NO_INTERRUPT);
}

/* It calls if it shall, and else not, wherever the index stands. */
static void test_call(void)
{
    for (int event_idx = 0; event_idx < 2; event_idx++) {
        start(4, event_idx);
        /* Without a word, it calls. */
        dev_use(add(1), 0);
        g_assert_true(device_calls(0));
        assert_taken(0, 0);
        for (unsigned i = 1; i < 65536 + 50; i++) {
            uint16_t head = add(1), old = dev_used_idx;
            bool on = i % 3;

            vhost_user_relay_ring_set_call(&ring, !on);
            vhost_user_relay_ring_set_call(&ring, on);
            dev_use(head, 0);
            g_assert_cmpint(device_calls(old), ==, on);
            assert_taken(head, 0);
        }
        end();
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/vhost-user-relay/ring-events/kick-flags",
                    test_kick_flags);
    g_test_add_func("/vhost-user-relay/ring-events/kick-event",
                    test_kick_event);
    g_test_add_func("/vhost-user-relay/ring-events/call", test_call);
    return g_test_run();
}
