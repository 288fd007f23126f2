/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A split virtqueue of ours, of which somebody we do not trust is the device:
 * see vhost-user-relay-ring.h
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/host-utils.h"
#include "standard-headers/linux/virtio_ring.h"
#include "vhost-user-relay-ring.h"

size_t vhost_user_relay_ring_avail_offset(unsigned num)
{
    return num * sizeof(struct vring_desc);
}

size_t vhost_user_relay_ring_used_offset(unsigned num)
{
    /* flags, idx, the ring, used_event */
    return QEMU_ALIGN_UP(vhost_user_relay_ring_avail_offset(num) +
                         (3 + num) * sizeof(uint16_t), 64);
}

size_t vhost_user_relay_ring_bytes(unsigned num)
{
    /* flags, idx, the ring, avail_event */
    return vhost_user_relay_ring_used_offset(num) + 3 * sizeof(uint16_t) +
           num * sizeof(struct vring_used_elem);
}

/* Behind the rings: up to where the other side need not hear from us. */
static uint16_t *used_event(const VhostUserRelayRing *ring)
{
    return (uint16_t *)&ring->avail->ring[ring->num];
}

static const uint16_t *avail_event(const VhostUserRelayRing *ring)
{
    return (const uint16_t *)&ring->used->ring[ring->num];
}

void vhost_user_relay_ring_init(VhostUserRelayRing *ring, void *mem,
                                unsigned num, bool event_idx)
{
    assert(is_power_of_2(num) && num <= 32768);
    memset(mem, 0, vhost_user_relay_ring_bytes(num));
    *ring = (VhostUserRelayRing) {
        .desc = mem,
        .avail = mem + vhost_user_relay_ring_avail_offset(num),
        .used = mem + vhost_user_relay_ring_used_offset(num),
        .num = num,
        .event_idx = event_idx,
        .n_free = num,
        .next = g_new(uint16_t, num),
        .length = g_new0(uint16_t, num),
    };
    for (unsigned i = 0; i < num; i++) {
        ring->next[i] = i + 1;
    }
}

void vhost_user_relay_ring_destroy(VhostUserRelayRing *ring)
{
    g_clear_pointer(&ring->next, g_free);
    g_clear_pointer(&ring->length, g_free);
}

bool vhost_user_relay_ring_add(VhostUserRelayRing *ring,
                               const VhostUserRelayDesc *descs, unsigned n,
                               uint16_t *head)
{
    uint16_t at = ring->free_head, last = at;

    assert(n);
    if (n > ring->n_free) {
        return false;
    }
    *head = at;
    for (unsigned i = 0; i < n; i++) {
        bool more = i + 1 < n;

        last = at;
        ring->desc[at] = (struct vring_desc) {
            .addr = cpu_to_le64(descs[i].gpa),
            .len = cpu_to_le32(descs[i].len),
            .flags = cpu_to_le16(descs[i].flags |
                                 (more ? VRING_DESC_F_NEXT : 0)),
            .next = cpu_to_le16(more ? ring->next[at] : 0),
        };
        at = ring->next[at];
    }
    ring->free_head = ring->next[last];
    ring->n_free -= n;
    ring->length[*head] = n;

    ring->avail->ring[ring->avail_idx & (ring->num - 1)] = cpu_to_le16(*head);
    ring->avail_idx++;
    /* The device must find the chain when it sees the index. */
    smp_wmb();
    qatomic_set(&ring->avail->idx, cpu_to_le16(ring->avail_idx));
    return true;
}

bool vhost_user_relay_ring_kick(VhostUserRelayRing *ring)
{
    uint16_t old = ring->kicked_idx;

    if (old == ring->avail_idx) {
        return false;
    }
    ring->kicked_idx = ring->avail_idx;
    /* Between our index and what the device says that it wants to hear. */
    smp_mb();
    if (ring->event_idx) {
        uint16_t event = le16_to_cpu(qatomic_read(avail_event(ring)));

        return vring_need_event(event, ring->avail_idx, old);
    }
    return !(le16_to_cpu(qatomic_read(&ring->used->flags)) &
             VRING_USED_F_NO_NOTIFY);
}

bool vhost_user_relay_ring_pending(const VhostUserRelayRing *ring)
{
    return le16_to_cpu(qatomic_read(&ring->used->idx)) != ring->used_idx;
}

/* Its descriptors are free again. */
static void free_chain(VhostUserRelayRing *ring, uint16_t head)
{
    unsigned n = ring->length[head];
    uint16_t last = head;

    for (unsigned i = 1; i < n; i++) {
        last = ring->next[last];
    }
    ring->next[last] = ring->free_head;
    ring->free_head = head;
    ring->n_free += n;
    ring->length[head] = 0;
}

VhostUserRelayTaken vhost_user_relay_ring_take(VhostUserRelayRing *ring,
                                               uint16_t *head, uint32_t *len,
                                               const char **error)
{
    uint16_t idx = le16_to_cpu(qatomic_read(&ring->used->idx));
    const struct vring_used_elem *elem;
    uint32_t id;

    if (idx == ring->used_idx) {
        return VHOST_USER_RELAY_NOTHING;
    }
    if ((uint16_t)(idx - ring->used_idx) >
        (uint16_t)(ring->avail_idx - ring->used_idx)) {
        *error = "used more requests than it was given";
        return VHOST_USER_RELAY_BAD;
    }
    /* What the index speaks of must not be read before it. */
    smp_rmb();
    elem = &ring->used->ring[ring->used_idx & (ring->num - 1)];
    id = le32_to_cpu(qatomic_read(&elem->id));
    if (id >= ring->num || !ring->length[id]) {
        *error = "used a request that it was not given, or used it twice";
        return VHOST_USER_RELAY_BAD;
    }
    *head = id;
    *len = le32_to_cpu(qatomic_read(&elem->len));
    free_chain(ring, id);
    ring->used_idx++;
    return VHOST_USER_RELAY_TAKEN;
}

void vhost_user_relay_ring_set_call(VhostUserRelayRing *ring, bool on)
{
    if (ring->event_idx) {
        /* An index that was passed asks for nothing until it comes round. */
        qatomic_set(used_event(ring),
                    cpu_to_le16(on ? ring->used_idx : ring->used_idx - 1));
    } else {
        qatomic_set(&ring->avail->flags,
                    cpu_to_le16(on ? 0 : VRING_AVAIL_F_NO_INTERRUPT));
    }
    if (on) {
        /* Between that and the caller's look at what was used meanwhile. */
        smp_mb();
    }
}
