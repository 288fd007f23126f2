/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One virtqueue that is relayed to a vhost-user back end
 *
 * Requests are popped from the guest's ring, copied into the bounce area and
 * offered to the back end in a ring of ours; what it has done is copied back
 * and pushed.
 *
 *   request       an element of the guest's ring that was popped
 *   in flight     it is in our ring, and the back end did not use it yet
 *   held          popped, but no room was left for it: the queue's next one
 *   quarantined   memory that a back end may still write to although the queue
 *                 was stopped; it stays taken until the area goes
 *
 * All of it runs in one thread, that of the relay's AioContext, but for
 * vhost_user_relay_queue_set_call() and the figures.
 */

#ifndef HW_VIRTIO_VHOST_USER_RELAY_QUEUE_H
#define HW_VIRTIO_VHOST_USER_RELAY_QUEUE_H

#include "hw/dedup/qemu-compat.h"
#include "hw/virtio/virtio.h"
#include "qemu/event_notifier.h"
#include "qemu/queue.h"
#include "qemu/stats64.h"
#include "vhost-user-relay-request.h"
#include "vhost-user-relay-ring.h"

/* Fillers of one queue take no more than this: 512 KiB of buffers. */
#define VHOST_USER_RELAY_FILLER_PAGES 128u

/* So long a queue is drained even if others have used up the time. */
#define VHOST_USER_RELAY_DRAIN_LEAST_MS 100

typedef struct VhostUserRelayQueue VhostUserRelayQueue;
typedef struct VhostUserRelayFailure VhostUserRelayFailure;

/* What the queues of a connection share. */
typedef struct VhostUserRelayPool {
    VhostUserRelayArea *area;
    unsigned quarantined;     /* pages */
    unsigned in_flight;       /* requests that are no fillers, of all queues */
    unsigned filler_pages;    /* of all queues */
    /* Queues whose held request waits for pages, the longest waiting first. */
    QTAILQ_HEAD(, VhostUserRelayQueue) waiters;
    /* Figures; any thread reads them. */
    Stat64 requests;
    Stat64 bytes_out;
    Stat64 bytes_in;
    Stat64 waits;
    Stat64 unpopped;
    bool clamped;             /* that was said already */
    int64_t drain_end;        /* ms; 0: nothing was drained since a start */
} VhostUserRelayPool;

struct VhostUserRelayQueue {
    VhostUserRelayPool *pool;
    VirtIODevice *vdev;
    VirtQueue *vq;
    int index;
    /* To the back end, and from it. */
    EventNotifier kick;
    EventNotifier call;
    int guest_call;           /* what the guest hears by; atomic, -1: nothing */
    VhostUserRelayRing ring;
    unsigned ring_page, ring_pages;
    bool indirect;            /* the back end knows indirect tables */
    VhostUserRelayInitial initial;
    bool ordered;             /* the guest must get them as it gave them */
    bool enabled;             /* may take requests from the guest */
    bool broken;
    VhostUserRelayFailure *failure;                  /* not said yet */
    hwaddr rings[3];          /* the guest's, when the queue was started */
    VhostUserRelayRequests requests;                 /* in flight, as popped */
    VhostUserRelayRequest **by_head;                 /* of ring.num */
    VhostUserRelayRequest *held;
    bool waits;               /* is among the pool's waiters */
    unsigned filler_pages;
    QTAILQ_ENTRY(VhostUserRelayQueue) next_waiter;
};

void vhost_user_relay_pool_init(VhostUserRelayPool *pool);

/**
 * vhost_user_relay_queue_start - a queue with an empty ring in the area
 * @q: with @pool, @vdev, @vq, @index and the notifiers set
 * @num: descriptors of the ring
 * @features: negotiated with the back end
 *
 * Returns: false with @errp set if the area has no room for the ring.
 */
bool vhost_user_relay_queue_start(VhostUserRelayQueue *q, unsigned num,
                                  uint64_t features, Error **errp);

/* Take nothing more from the guest.  What is in flight still comes back. */
void vhost_user_relay_queue_suspend(VhostUserRelayQueue *q);

/**
 * vhost_user_relay_queue_drain - suspend, and wait until the back end has done
 * what it has
 * @limit_ms: for all queues of the pool together, since the first of them
 *
 * Before it is told to stop: then it may still be at work when it says that it
 * is not (QEMU's storage daemon, which ends when it is told to replace what it
 * would notify).  Fillers are left.
 */
void vhost_user_relay_queue_drain(VhostUserRelayQueue *q, int64_t limit_ms);

/**
 * vhost_user_relay_queue_stop - take back all that the back end has not done
 * @taken: how many requests the back end says it has begun with since the
 *     start, modulo 65536; or -1 if it is gone
 *
 * The guest's ring is then as if the rest had never been popped, in the order
 * in which the guest gave it.  So is what it has done but not in turn, where
 * the guest wants them in order.  What the back end may still write to is
 * quarantined.  Nobody is told of anything until the next
 * vhost_user_relay_queue_set_call().
 */
void vhost_user_relay_queue_stop(VhostUserRelayQueue *q, int taken);

/* Pop what the guest has to offer, and kick the back end. */
void vhost_user_relay_queue_pop(VhostUserRelayQueue *q);
/* Push what the back end is done with. */
void vhost_user_relay_queue_push(VhostUserRelayQueue *q);

/* Would those two find anything?  For polling. */
bool vhost_user_relay_queue_can_pop(VhostUserRelayQueue *q);
bool vhost_user_relay_queue_can_push(VhostUserRelayQueue *q);

/*
 * What the guest hears by from now on; -1: nothing.  Any thread.  @started: it
 * is told at once, as something may have been pushed before.
 */
void vhost_user_relay_queue_set_call(VhostUserRelayQueue *q, int fd,
                                     bool started);

#endif /* HW_VIRTIO_VHOST_USER_RELAY_QUEUE_H */
