/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The guest's rings: see vhost-user-relay-guest.h
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/rcu.h"
#include "hw/dedup/qemu-compat.h"
#include "standard-headers/linux/virtio_ring.h"
#include "vhost-user-relay-guest.h"
#include "trace.h"

/*
 * A ring in a device's registers would have our thread enter that device:
 * this one, even.
 */
static bool in_ram(VirtIODevice *vdev, hwaddr addr, hwaddr size)
{
    hwaddr xlat, len = size;
    MemoryRegion *mr;

    RCU_READ_LOCK_GUARD();
    mr = address_space_translate(vdev->dma_as, addr, &xlat, &len, true,
                                 MEMTXATTRS_UNSPECIFIED);
    return len == size && memory_region_is_ram(mr);
}

bool vhost_user_relay_guest_find(VirtIODevice *vdev, int index,
                                 hwaddr rings[3], Error **errp)
{
    rings[0] = virtio_queue_get_desc_addr(vdev, index);
    rings[1] = virtio_queue_get_avail_addr(vdev, index);
    rings[2] = virtio_queue_get_used_addr(vdev, index);
    if (!in_ram(vdev, rings[0], virtio_queue_get_desc_size(vdev, index)) ||
        !in_ram(vdev, rings[1], virtio_queue_get_avail_size(vdev, index)) ||
        !in_ram(vdev, rings[2], virtio_queue_get_used_size(vdev, index))) {
        error_setg(errp, "%s: queue %d: the guest's rings are not in RAM",
                   vdev->name, index);
        return false;
    }
    return true;
}

bool vhost_user_relay_guest_stayed(VirtIODevice *vdev, int index,
                                   const hwaddr rings[3])
{
    return rings[0] == virtio_queue_get_desc_addr(vdev, index) &&
           rings[1] == virtio_queue_get_avail_addr(vdev, index) &&
           rings[2] == virtio_queue_get_used_addr(vdev, index);
}

/*
 * Those that came after the requests may be done, so the heads are written in
 * a row again, where the guest put the last ones that were popped: it does not
 * look there, and does not come there before they are done.
 */
static void write_heads(VirtIODevice *vdev, int index,
                        VhostUserRelayRequests *requests)
{
    unsigned num = virtio_queue_get_num(vdev, index);
    hwaddr ring = virtio_queue_get_avail_addr(vdev, index) +
                  offsetof(struct vring_avail, ring);
    uint16_t idx = virtio_queue_get_last_avail_idx(vdev, index);
    VhostUserRelayRequest *r;

    QTAILQ_FOREACH(r, requests, next) {
        hwaddr slot = ring + (idx++ % num) * sizeof(uint16_t);
        MemTxResult res;

        if (address_space_lduw_le(vdev->dma_as, slot, VHOST_USER_RELAY_ATTRS,
                                  NULL) == r->elem.index) {
            continue;
        }
        address_space_stw_le(vdev->dma_as, slot, r->elem.index,
                             VHOST_USER_RELAY_ATTRS, &res);
        if (res != MEMTX_OK) {
            /* It has taken its ring away, and will reset the device. */
            trace_vhost_user_relay_broken(vdev, index, "no ring to give back");
            return;
        }
    }
}

unsigned vhost_user_relay_guest_unpop(VirtIODevice *vdev, int index,
                                      VhostUserRelayRequests *requests,
                                      bool ordered)
{
    VhostUserRelayRequest *r;
    unsigned n = 0, descs = 0;

    QTAILQ_FOREACH(r, requests, next) {
        n++;
        descs += r->elem.ndescs;
    }
    if (!n || !virtqueue_rewind(virtio_get_queue(vdev, index), descs)) {
        return 0;
    }
    if (!ordered) {
        write_heads(vdev, index, requests);
    }
    return n;
}
