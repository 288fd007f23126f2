/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The guest's rings: where they are, and what is given back to them
 *
 * What virtio.c does not do for a device that never stops in the middle.
 *
 * One thread at a time, that of the queue.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_GUEST_H
#define HW_VIRTIO_VHOST_USER_RELAY_GUEST_H

#include "vhost-user-relay-request.h"

/**
 * vhost_user_relay_guest_find - where the rings of a queue are
 * @rings: descriptors, available, used
 *
 * Returns: false with @errp set if they are not all in RAM.
 */
bool vhost_user_relay_guest_find(VirtIODevice *vdev, int index,
                                 hwaddr rings[3], Error **errp);

/* Are they still there?  A guest may say otherwise, and has no right to. */
bool vhost_user_relay_guest_stayed(VirtIODevice *vdev, int index,
                                   const hwaddr rings[3]);

/**
 * vhost_user_relay_guest_unpop - the ring as if requests had not been popped
 * @requests: all that were popped and not pushed, as they were popped; stay
 *     on the list
 * @ordered: none that was popped after one of them was pushed
 *
 * Returns: how many that were.
 */
unsigned vhost_user_relay_guest_unpop(VirtIODevice *vdev, int index,
                                      VhostUserRelayRequests *requests,
                                      bool ordered);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_GUEST_H */
