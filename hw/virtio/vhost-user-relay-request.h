/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A request of a guest on its way through the bounce area
 *
 * It is popped, its buffers unmapped at once, laid out in a run of pages and
 * copied there; what the back end has written is copied back.  Nothing of it
 * is mapped in between: the guest is read and written as by any device of
 * QEMU, at the addresses that it gave.  The layout is ours: what the back end
 * makes of the descriptors that it was shown changes nothing.
 *
 *   filler   a request without a part that the device reads (a buffer to
 *            receive into): it may stay with the back end for ever
 *
 * One thread at a time, that of the queue.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_REQUEST_H
#define HW_VIRTIO_VHOST_USER_RELAY_REQUEST_H

#include "hw/virtio/virtio.h"
#include "qemu/queue.h"
#include "vhost-user-relay-area.h"
#include "vhost-user-relay-layout.h"

/*
 * How guest memory is reached: as memory only.  In a device's registers a copy
 * would enter that device, this one even, in the middle of something.
 */
#define VHOST_USER_RELAY_ATTRS ((MemTxAttrs) { .memory = 1 })

/* What bytes that the device may write to hold before it does. */
typedef enum VhostUserRelayInitial {
    VHOST_USER_RELAY_GUESTS,    /* what the guest has in them */
    VHOST_USER_RELAY_DISKS,     /* likewise, but for a disk's read: anything */
    VHOST_USER_RELAY_ZEROS,
    VHOST_USER_RELAY_ANYTHING,  /* parts of the device's earlier requests */
} VhostUserRelayInitial;

typedef struct VhostUserRelayRequest {
    /* As popped, but for in_num and out_num: 0, as nothing is mapped. */
    VirtQueueElement elem;
    QTAILQ_ENTRY(VhostUserRelayRequest) next;
    /* Of elem.in_sg and out_sg: iov_base is an offset from @data. */
    unsigned in_num, out_num;
    uint64_t in_bytes, out_bytes;
    unsigned page, pages;     /* its run; 0 pages: it has none */
    void *data;               /* where the buffers begin in the run */
    bool read;                /* a disk's: written whole if it succeeds */
    bool done;                /* used, but not its turn yet */
    uint32_t len;             /* of what is done */
} VhostUserRelayRequest;

typedef QTAILQ_HEAD(VhostUserRelayRequests, VhostUserRelayRequest)
    VhostUserRelayRequests;

/* What is right for the requests of a kind of device. */
VhostUserRelayInitial
vhost_user_relay_request_initial(const VirtIODevice *vdev);

/* Does a device with @initial write to what outlives its requests? */
static inline bool
vhost_user_relay_request_stores(VhostUserRelayInitial initial)
{
    return initial == VHOST_USER_RELAY_GUESTS ||
           initial == VHOST_USER_RELAY_DISKS;
}

/* The guest's next one, or NULL.  To be freed by g_free(). */
VhostUserRelayRequest *vhost_user_relay_request_pop(VirtQueue *vq,
                                                    AddressSpace *as);

static inline bool
vhost_user_relay_request_is_filler(const VhostUserRelayRequest *r)
{
    return !r->out_num;
}

/**
 * vhost_user_relay_request_lay_out - where its buffers are to lie
 * @layout: the descriptors, by offset from the beginning of the buffers
 * @indirect: they may be in a table, which lies in front of the buffers
 *
 * Returns: how many pages it needs, table and all.
 */
uint64_t vhost_user_relay_request_lay_out(VhostUserRelayRequest *r,
                                          VhostUserRelayLayout *layout,
                                          bool indirect);

/**
 * vhost_user_relay_request_fill - copy it from the guest into its run
 * @layout: as lay_out() has made it; its addresses become the back end's
 * @indirect: as for lay_out(); what @layout holds is then one descriptor, of
 *     the table
 * @initial: what is in the bytes that the device may write to
 *
 * The run, @r->page and @r->pages, was set by the caller.
 *
 * Returns: false if the guest's memory cannot be read.
 */
bool vhost_user_relay_request_fill(VhostUserRelayRequest *r,
                                   VhostUserRelayArea *area, AddressSpace *as,
                                   VhostUserRelayLayout *layout,
                                   bool indirect,
                                   VhostUserRelayInitial initial);

/**
 * vhost_user_relay_request_copy_back - copy what was written to the guest
 * @initial: as for fill()
 *
 * That is all that the device may write to, of which it wrote what it did, or
 * the first @r->len bytes where the others hold nothing of the guest's.  Of a
 * disk's read that failed it is the status alone.
 *
 * Returns: how many bytes.
 */
uint64_t vhost_user_relay_request_copy_back(VhostUserRelayRequest *r,
                                            AddressSpace *as,
                                            VhostUserRelayInitial initial);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_REQUEST_H */
