/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the files of a relay know of it; see hw/virtio/vhost-user-relay.h
 *
 *   started   the back end has the ring, its kick and call
 *   wanted    SET_VRING_ENABLE says so; comes before or after the start
 *   running   both: requests are taken from the guest
 *
 * BQL, but for what a queue's own thread has.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_INTERNAL_H
#define HW_VIRTIO_VHOST_USER_RELAY_INTERNAL_H

#include "hw/virtio/vhost-user-relay.h"
#include "qemu/timer.h"
#include "vhost-user-relay-queue.h"

typedef struct RelayQueue {
    VhostUserRelayQueue q;
    VhostUserRelay *relay;
    unsigned num;
    bool started;
    bool wanted;
    bool call_sent;
    int guest_kick;           /* whose handler is set; -1: none */
} RelayQueue;

struct VhostUserRelay {
    char *chardev;
    IOThread *iothread;
    AioContext *ctx;
    uint64_t size;
    VhostUserRelayPool pool;
    uint64_t features;        /* as the back end offers them */
    struct vhost_dev *owner;  /* whose connection it is; NULL: there is none */
    bool table_sent;
    GPtrArray *queues;        /* of RelayQueue, by index; NULL: not seen yet */
    QEMUTimer *timer;         /* of the relay's thread; shrinks the area */
    uint32_t drain_ms;        /* 0: by kind of device */
    uint64_t may_take;        /* told to the RAM guard; the relay's thread */
    QLIST_ENTRY(VhostUserRelay) next;
};

/* All that there are. */
typedef QLIST_HEAD(VhostUserRelayList, VhostUserRelay) VhostUserRelayList;
extern VhostUserRelayList vhost_user_relays;

static inline RelayQueue *vhost_user_relay_queue(VhostUserRelay *relay,
                                                 int index)
{
    return index < relay->queues->len ?
           g_ptr_array_index(relay->queues, index) : NULL;
}

#endif /* HW_VIRTIO_VHOST_USER_RELAY_INTERNAL_H */
