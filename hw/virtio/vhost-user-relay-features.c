/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Which features there are on either side of a relay: see
 * vhost-user-relay-features.h and hw/virtio/vhost-user-relay.h
 */

#include "qemu/osdep.h"
#include "hw/virtio/vhost-user.h"
#include "standard-headers/linux/vhost_types.h"
#include "vhost-user-relay-features.h"

/* Between the guest and us alone. */
#define NOT_FOR_BACKEND \
    (1ULL << VIRTIO_F_RING_PACKED | 1ULL << VIRTIO_F_IOMMU_PLATFORM | \
     1ULL << VIRTIO_F_IN_ORDER | 1ULL << VIRTIO_F_NOTIFICATION_DATA | \
     1ULL << VIRTIO_F_NOTIFY_ON_EMPTY | 1ULL << VHOST_F_LOG_ALL)

/* Our virtqueues have it, whatever the back end has. */
#define FOR_GUEST \
    (1ULL << VIRTIO_F_RING_PACKED | 1ULL << VIRTIO_F_IOMMU_PLATFORM | \
     1ULL << VIRTIO_F_IN_ORDER | 1ULL << VIRTIO_RING_F_EVENT_IDX | \
     1ULL << VHOST_F_LOG_ALL)

/* What speaks of guest RAM, or of rings in it. */
#define NOT_IN_PROTOCOL \
    (1ULL << VHOST_USER_PROTOCOL_F_LOG_SHMFD | \
     1ULL << VHOST_USER_PROTOCOL_F_PAGEFAULT | \
     1ULL << VHOST_USER_PROTOCOL_F_HOST_NOTIFIER | \
     1ULL << VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD | \
     1ULL << VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)

/* A queue of a vhost-user device is never reset by itself in QEMU. */
#define NOT_FOR_GUEST \
    (1ULL << VIRTIO_F_NOTIFICATION_DATA | 1ULL << VIRTIO_F_RING_RESET)

uint64_t vhost_user_relay_features_for_guest(uint64_t features)
{
    return (features | FOR_GUEST) & ~NOT_FOR_GUEST;
}

uint64_t vhost_user_relay_features_for_backend(uint64_t offered,
                                               uint64_t accepted)
{
    return offered & accepted & ~NOT_FOR_BACKEND;
}

uint64_t vhost_user_relay_protocol_features(uint64_t features)
{
    return features & ~NOT_IN_PROTOCOL;
}

uint64_t vhost_user_relay_device_features(uint64_t features,
                                          uint64_t requested)
{
    return features & (~FOR_GUEST | requested);
}
