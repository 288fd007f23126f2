/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Which features there are on either side of a relay
 *
 * Between the guest and QEMU's virtqueues, and between our rings and the back
 * end, features are negotiated apart: each side has what the two there have.
 * Those of the device itself must be known to all three.
 *
 * Pure functions; any thread.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_FEATURES_H
#define HW_VIRTIO_VHOST_USER_RELAY_FEATURES_H

/* What a guest may be offered if the back end offers @features. */
uint64_t vhost_user_relay_features_for_guest(uint64_t features);

/* What a back end that offers @offered is told if the guest has @accepted. */
uint64_t vhost_user_relay_features_for_backend(uint64_t offered,
                                               uint64_t accepted);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_FEATURES_H */
