/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A request of a guest on its way through the bounce area: see
 * vhost-user-relay-request.h
 */

#include "qemu/osdep.h"
#include "system/dma.h"
#include "standard-headers/linux/virtio_blk.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_ring.h"
#include "vhost-user-relay-request.h"

VhostUserRelayInitial
vhost_user_relay_request_initial(const VirtIODevice *vdev)
{
    switch (vdev->device_id) {
    case VIRTIO_ID_BLOCK:
        /* Of a read the status tells whether all has been written. */
        return VHOST_USER_RELAY_DISKS;
    case VIRTIO_ID_SCSI:
        /* They may tell less than they have written. */
        return VHOST_USER_RELAY_GUESTS;
    case VIRTIO_ID_FS:
        /*
         * Its replies begin with their own length, which guests go by, and
         * are up to 1 MiB long: to clear that is a fifth of the relay's work.
         */
        return VHOST_USER_RELAY_ANYTHING;
    default:
        return VHOST_USER_RELAY_ZEROS;
    }
}

static uint64_t unmap(AddressSpace *as, struct iovec *iov, unsigned n,
                      DMADirection dir)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < n; i++) {
        dma_memory_unmap(as, iov[i].iov_base, iov[i].iov_len, dir, 0);
        bytes += iov[i].iov_len;
    }
    return bytes;
}

VhostUserRelayRequest *vhost_user_relay_request_pop(VirtQueue *vq,
                                                    AddressSpace *as)
{
    VhostUserRelayRequest *r = virtqueue_pop(vq, sizeof(*r));

    if (!r) {
        return NULL;
    }
    /*
     * It may be in flight for long.  A mapping would keep others from moving
     * the memory, and be of no use: the copies find their way without.
     */
    r->in_num = r->elem.in_num;
    r->out_num = r->elem.out_num;
    r->in_bytes = unmap(as, r->elem.in_sg, r->in_num,
                        DMA_DIRECTION_FROM_DEVICE);
    r->out_bytes = unmap(as, r->elem.out_sg, r->out_num,
                         DMA_DIRECTION_TO_DEVICE);
    r->elem.in_num = r->elem.out_num = 0;
    r->pages = 0;
    r->read = r->done = false;
    return r;
}

static bool has_table(const VhostUserRelayLayout *layout, bool indirect)
{
    return indirect && layout->n > 1;
}

static unsigned table_pages(const VhostUserRelayLayout *layout, bool indirect)
{
    return has_table(layout, indirect) ?
           DIV_ROUND_UP(layout->n * sizeof(struct vring_desc),
                        VHOST_USER_RELAY_PAGE) : 0;
}

uint64_t vhost_user_relay_request_lay_out(VhostUserRelayRequest *r,
                                          VhostUserRelayLayout *layout,
                                          bool indirect)
{
    vhost_user_relay_layout_init(layout);
    vhost_user_relay_layout_add(layout, r->elem.out_addr, r->elem.out_sg,
                                r->out_num, false);
    vhost_user_relay_layout_add(layout, r->elem.in_addr, r->elem.in_sg,
                                r->in_num, true);
    return table_pages(layout, indirect) +
           vhost_user_relay_layout_pages(layout);
}

static bool copy_out(VhostUserRelayRequest *r, AddressSpace *as,
                     const hwaddr *addr, const struct iovec *iov, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        if (dma_memory_read(as, addr[i], r->data + (uintptr_t)iov[i].iov_base,
                            iov[i].iov_len, VHOST_USER_RELAY_ATTRS)) {
            return false;
        }
    }
    return true;
}

/* Never read back. */
static void write_table(void *table, const VhostUserRelayLayout *layout)
{
    struct vring_desc *desc = table;

    for (unsigned i = 0; i < layout->n; i++) {
        const VhostUserRelayDesc *from = &layout->descs[i];
        bool more = i + 1 < layout->n;

        desc[i] = (struct vring_desc) {
            .addr = cpu_to_le64(from->gpa),
            .len = cpu_to_le32(from->len),
            .flags = cpu_to_le16(from->flags |
                                 (more ? VRING_DESC_F_NEXT : 0)),
            .next = cpu_to_le16(more ? i + 1 : 0),
        };
    }
}

/* Nothing of an earlier request is for this one to see. */
static void clear(VhostUserRelayRequest *r)
{
    for (unsigned i = 0; i < r->in_num; i++) {
        memset(r->data + (uintptr_t)r->elem.in_sg[i].iov_base, 0,
               r->elem.in_sg[i].iov_len);
    }
}

/* Asked of the guest: in the area the back end may have changed it. */
static bool is_read(const VhostUserRelayRequest *r, AddressSpace *as)
{
    uint32_t type;

    return r->out_num && r->in_num &&
           r->elem.out_sg[0].iov_len >= sizeof(type) &&
           !dma_memory_read(as, r->elem.out_addr[0], &type, sizeof(type),
                            VHOST_USER_RELAY_ATTRS) &&
           type == VIRTIO_BLK_T_IN;     /* 0 in each byte order */
}

bool vhost_user_relay_request_fill(VhostUserRelayRequest *r,
                                   VhostUserRelayArea *area, AddressSpace *as,
                                   VhostUserRelayLayout *layout,
                                   bool indirect,
                                   VhostUserRelayInitial initial)
{
    unsigned first = r->page + table_pages(layout, indirect);

    r->data = vhost_user_relay_area_ptr(area, first);
    r->read = initial == VHOST_USER_RELAY_DISKS && is_read(r, as);
    if (!copy_out(r, as, r->elem.out_addr, r->elem.out_sg, r->out_num) ||
        (vhost_user_relay_request_stores(initial) && !r->read &&
         !copy_out(r, as, r->elem.in_addr, r->elem.in_sg, r->in_num))) {
        return false;
    }
    if (initial == VHOST_USER_RELAY_ZEROS) {
        clear(r);
    }
    for (unsigned i = 0; i < layout->n; i++) {
        layout->descs[i].gpa += vhost_user_relay_area_gpa(first);
    }
    if (has_table(layout, indirect)) {
        write_table(vhost_user_relay_area_ptr(area, r->page), layout);
        layout->descs[0] = (VhostUserRelayDesc) {
            .gpa = vhost_user_relay_area_gpa(r->page),
            .len = layout->n * sizeof(struct vring_desc),
            .flags = VRING_DESC_F_INDIRECT,
        };
        layout->n = 1;
    }
    return true;
}

static void copy_in(VhostUserRelayRequest *r, AddressSpace *as,
                    uint64_t bytes)
{
    for (unsigned i = 0; bytes && i < r->in_num; i++) {
        const struct iovec *iov = &r->elem.in_sg[i];
        size_t n = MIN(bytes, iov->iov_len);

        /* If the address is not there any more, the guest has taken it away. */
        dma_memory_write(as, r->elem.in_addr[i],
                         r->data + (uintptr_t)iov->iov_base, n,
                         VHOST_USER_RELAY_ATTRS);
        bytes -= n;
    }
}

static uint64_t copy_read_in(VhostUserRelayRequest *r, AddressSpace *as)
{
    const struct iovec *last = &r->elem.in_sg[r->in_num - 1];
    size_t at = last->iov_len - 1;
    uint8_t status = qatomic_read((uint8_t *)r->data +
                                  (uintptr_t)last->iov_base + at);
    uint64_t bytes = status == VIRTIO_BLK_S_OK ? r->in_bytes - 1 : 0;

    copy_in(r, as, bytes);
    /* Read once: the guest gets the status by which this went. */
    dma_memory_write(as, r->elem.in_addr[r->in_num - 1] + at, &status, 1,
                     VHOST_USER_RELAY_ATTRS);
    return bytes + 1;
}

uint64_t vhost_user_relay_request_copy_back(VhostUserRelayRequest *r,
                                            AddressSpace *as,
                                            VhostUserRelayInitial initial)
{
    uint64_t bytes = vhost_user_relay_request_stores(initial) ? r->in_bytes :
                                                                r->len;

    if (r->read) {
        return copy_read_in(r, as);
    }
    copy_in(r, as, bytes);
    return bytes;
}
