/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A device for tests of the relay's ring
 *
 * It reads the shared memory as VIRTIO 1.x lays it out, by offsets of its own,
 * and it may fill all of that with random bytes.
 */

#ifndef VHOST_USER_RELAY_DEVICE_H
#define VHOST_USER_RELAY_DEVICE_H

#include "qemu/bswap.h"
#include "standard-headers/linux/virtio_ring.h"
#include "../../hw/virtio/vhost-user-relay-ring.h"

static VhostUserRelayRing ring;
static uint8_t *shared;
static size_t shared_bytes;

/* The device */
static uint16_t dev_used_idx;

static inline void *avail_at(unsigned offset)
{
    return shared + 16 * ring.num + offset;
}

static inline void *used_at(unsigned offset)
{
    return shared + vhost_user_relay_ring_used_offset(ring.num) + offset;
}

static inline uint16_t dev_avail_idx(void)
{
    return lduw_le_p(avail_at(2));
}

static inline uint16_t dev_avail(uint16_t idx)
{
    return lduw_le_p(avail_at(4 + 2 * (idx % ring.num)));
}

static inline void dev_use_at(uint16_t idx, uint32_t id, uint32_t len)
{
    stl_le_p(used_at(4 + 8 * (idx % ring.num)), id);
    stl_le_p(used_at(8 + 8 * (idx % ring.num)), len);
}

static inline void dev_set_used_idx(uint16_t idx)
{
    dev_used_idx = idx;
    stw_le_p(used_at(2), idx);
}

static inline void dev_use(uint32_t id, uint32_t len)
{
    dev_use_at(dev_used_idx, id, len);
    dev_set_used_idx(dev_used_idx + 1);
}

/* All that it can write to, but for how far it says that it has come. */
static inline void dev_scribble(void)
{
    uint32_t seed = g_test_rand_int();

    for (size_t i = 0; i < shared_bytes; i++) {
        seed = seed * 1664525 + 1013904223;
        shared[i] = seed >> 24;
    }
    stw_le_p(used_at(2), dev_used_idx);
}

static inline void start(unsigned num, bool event_idx)
{
    shared_bytes = vhost_user_relay_ring_bytes(num);
    shared = g_malloc(shared_bytes);
    memset(shared, 0xee, shared_bytes);
    vhost_user_relay_ring_init(&ring, shared, num, event_idx);
    dev_used_idx = 0;
}

static inline void end(void)
{
    vhost_user_relay_ring_destroy(&ring);
    g_clear_pointer(&shared, g_free);
}

static inline uint16_t add(unsigned n)
{
    g_autofree VhostUserRelayDesc *descs = g_new0(VhostUserRelayDesc, n);
    uint16_t head = -1;

    g_assert_true(vhost_user_relay_ring_add(&ring, descs, n, &head));
    g_assert_cmpuint(head, <, ring.num);
    return head;
}

static inline bool cannot_add(unsigned n)
{
    g_autofree VhostUserRelayDesc *descs = g_new0(VhostUserRelayDesc, n);
    uint16_t before = dev_avail_idx(), head;

    return !vhost_user_relay_ring_add(&ring, descs, n, &head) &&
           dev_avail_idx() == before;
}

static inline VhostUserRelayTaken take(uint16_t *head, uint32_t *len)
{
    const char *error = NULL;
    VhostUserRelayTaken taken = vhost_user_relay_ring_take(&ring, head, len,
                                                           &error);

    g_assert_cmpint(!!error, ==, taken == VHOST_USER_RELAY_BAD);
    return taken;
}

static inline void assert_taken(uint16_t expected, uint32_t expected_len)
{
    uint16_t head = -1;
    uint32_t len = -1;

    g_assert_true(vhost_user_relay_ring_pending(&ring));
    g_assert_cmpint(take(&head, &len), ==, VHOST_USER_RELAY_TAKEN);
    g_assert_cmpuint(head, ==, expected);
    g_assert_cmpuint(len, ==, expected_len);
}

static inline void assert_nothing(void)
{
    uint16_t head;
    uint32_t len;

    g_assert_false(vhost_user_relay_ring_pending(&ring));
    g_assert_cmpint(take(&head, &len), ==, VHOST_USER_RELAY_NOTHING);
}

/* It is bad, bad again, and nothing was freed by it. */
static inline void assert_bad(void)
{
    unsigned n_free = ring.n_free;
    uint16_t head;
    uint32_t len;

    g_assert_cmpint(take(&head, &len), ==, VHOST_USER_RELAY_BAD);
    g_assert_cmpint(take(&head, &len), ==, VHOST_USER_RELAY_BAD);
    g_assert_cmpuint(ring.n_free, ==, n_free);
}

#endif /* VHOST_USER_RELAY_DEVICE_H */
