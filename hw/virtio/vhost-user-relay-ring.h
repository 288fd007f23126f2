/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A split virtqueue of ours, of which somebody we do not trust is the device
 *
 * The driver's side of a virtqueue, in memory that the device (a vhost-user
 * back end) may write to as it likes.  So everything that decides what we do
 * is kept apart: which descriptors are free, which chain a head stands for,
 * how far the device has come.  What the device says is read once and checked.
 *
 *   chain   descriptors of one request; its first one, the head, names it
 *
 * Little-endian, as VIRTIO 1.x has it, and as older guests on x86 have.
 *
 * Belongs to one queue of a relay; one thread at a time.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_RING_H
#define HW_VIRTIO_VHOST_USER_RELAY_RING_H

/* One buffer, as the device is to see it. */
typedef struct VhostUserRelayDesc {
    uint64_t gpa;
    uint32_t len;
    uint16_t flags;           /* VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT */
} VhostUserRelayDesc;

typedef struct VhostUserRelayRing {
    /* In shared memory: only ever written to, but for what the device says. */
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    unsigned num;
    bool event_idx;
    /* Ours. */
    uint16_t avail_idx;       /* chains added */
    uint16_t kicked_idx;      /* those that the device was told of */
    uint16_t used_idx;        /* chains taken back */
    uint16_t free_head;
    unsigned n_free;
    uint16_t *next;           /* of @num: the chain's or the free list's */
    uint16_t *length;         /* of @num: of the chain that begins here, or 0 */
} VhostUserRelayRing;

/* What vhost_user_relay_ring_take() found. */
typedef enum VhostUserRelayTaken {
    VHOST_USER_RELAY_TAKEN,
    VHOST_USER_RELAY_NOTHING,
    VHOST_USER_RELAY_BAD,     /* the device broke the rules */
} VhostUserRelayTaken;

/* Bytes of shared memory for a ring of @num descriptors. */
size_t vhost_user_relay_ring_bytes(unsigned num);
/* Where its parts are, from the beginning of that memory. */
size_t vhost_user_relay_ring_avail_offset(unsigned num);
size_t vhost_user_relay_ring_used_offset(unsigned num);

/**
 * vhost_user_relay_ring_init - an empty ring
 * @mem: vhost_user_relay_ring_bytes(@num) bytes, aligned to a page; cleared
 * @num: descriptors, a power of two up to 32768
 * @event_idx: VIRTIO_RING_F_EVENT_IDX was negotiated
 */
void vhost_user_relay_ring_init(VhostUserRelayRing *ring, void *mem,
                                unsigned num, bool event_idx);
void vhost_user_relay_ring_destroy(VhostUserRelayRing *ring);

/**
 * vhost_user_relay_ring_add - offer a chain to the device
 * @descs: @n buffers, those that the device reads first
 * @head: by what it is known from now on
 *
 * Returns: false if there are not so many descriptors left.
 */
bool vhost_user_relay_ring_add(VhostUserRelayRing *ring,
                               const VhostUserRelayDesc *descs, unsigned n,
                               uint16_t *head);

/**
 * vhost_user_relay_ring_kick - does the device want to hear of what was added?
 *
 * Since the last call; what was added counts as told then.
 */
bool vhost_user_relay_ring_kick(VhostUserRelayRing *ring);

/**
 * vhost_user_relay_ring_take - take back a chain that the device is done with
 * @head: which; the chain is free then
 * @len: how much the device says that it wrote; may be any number
 * @error: set on VHOST_USER_RELAY_BAD: what it did; static
 */
VhostUserRelayTaken vhost_user_relay_ring_take(VhostUserRelayRing *ring,
                                               uint16_t *head, uint32_t *len,
                                               const char **error);

/* Has the device said anything that was not taken?  Of no consequence. */
bool vhost_user_relay_ring_pending(const VhostUserRelayRing *ring);

/**
 * vhost_user_relay_ring_set_call - shall the device tell us of what it did?
 *
 * When it is switched on, look at vhost_user_relay_ring_pending() once more.
 */
void vhost_user_relay_ring_set_call(VhostUserRelayRing *ring, bool on);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_RING_H */
