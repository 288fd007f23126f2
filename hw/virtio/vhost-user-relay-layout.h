/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Where the buffers of a request lie in the bounce area
 *
 * Each buffer keeps its offset modulo VHOST_USER_RELAY_PAGE, because back ends
 * use O_DIRECT.  Whole pages in a row become one descriptor: a megabyte from
 * 256 pages of a guest needs one.  Anything smaller stays a descriptor of its
 * own, as some back ends take the first buffer for the header.
 *
 * Pure functions; any thread.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_LAYOUT_H
#define HW_VIRTIO_VHOST_USER_RELAY_LAYOUT_H

#include "exec/hwaddr.h"
#include "vhost-user-relay-ring.h"

/* @descs has room for this many. */
#define VHOST_USER_RELAY_DESCS_MAX 1024

/*
 * A layout under way.  All offsets count from the beginning of the request's
 * run of pages, in bytes.
 */
typedef struct VhostUserRelayLayout {
    uint64_t end;             /* behind the last buffer */
    unsigned n;
    VhostUserRelayDesc descs[VHOST_USER_RELAY_DESCS_MAX];  /* gpa: an offset */
} VhostUserRelayLayout;

void vhost_user_relay_layout_init(VhostUserRelayLayout *layout);

/**
 * vhost_user_relay_layout_add - place buffers behind what is there
 * @addr: @n guest addresses
 * @iov: @n lengths, none of them 0; iov_base becomes the offset
 * @write: the device writes to them
 */
void vhost_user_relay_layout_add(VhostUserRelayLayout *layout,
                                 const hwaddr *addr, struct iovec *iov,
                                 unsigned n, bool write);

/* Pages that the buffers need. */
uint64_t vhost_user_relay_layout_pages(const VhostUserRelayLayout *layout);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_LAYOUT_H */
