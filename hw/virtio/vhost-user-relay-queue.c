/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One virtqueue that is relayed to a vhost-user back end: see
 * vhost-user-relay-queue.h
 */

#include "qemu/osdep.h"
#include <poll.h>
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qapi/error.h"
#include "block/aio.h"
#include "standard-headers/linux/virtio_ring.h"
#include "vhost-user-relay-guest.h"
#include "vhost-user-relay-queue.h"
#include "trace.h"

typedef enum Placed {
    PLACED,
    PLACE_LATER,              /* the queue's own requests must end first */
    PLACE_WAITS,              /* there are no pages */
    PLACE_FAILS,              /* the queue is broken now */
} Placed;

void vhost_user_relay_pool_init(VhostUserRelayPool *pool)
{
    QTAILQ_INIT(&pool->waiters);
    stat64_init(&pool->requests, 0);
    stat64_init(&pool->bytes_out, 0);
    stat64_init(&pool->bytes_in, 0);
    stat64_init(&pool->waits, 0);
    stat64_init(&pool->unpopped, 0);
}

struct VhostUserRelayFailure {
    VhostUserRelayQueue *q;   /* NULL: it was stopped meanwhile */
    VirtIODevice *vdev;
    char *message;
};

static void fail_bh(void *opaque)
{
    VhostUserRelayFailure *f = opaque;

    if (f->q) {
        f->q->failure = NULL;
        virtio_error(f->vdev, "%s", f->message);
    }
    object_unref(OBJECT(f->vdev));
    g_free(f->message);
    g_free(f);
}

/* Stopped: the device was reset, or will be looked at anew. */
static void cancel_failure(VhostUserRelayQueue *q)
{
    if (q->failure) {
        q->failure->q = NULL;
        q->failure = NULL;
    }
}

/* The device needs a reset.  Said in the main loop: it interrupts the guest. */
static void fail(VhostUserRelayQueue *q, const char *what)
{
    VhostUserRelayFailure *f;

    if (q->broken) {
        return;
    }
    q->broken = true;
    trace_vhost_user_relay_broken(q->vdev, q->index, what);
    f = g_new0(VhostUserRelayFailure, 1);
    f->q = q;
    q->failure = f;
    f->vdev = VIRTIO_DEVICE(object_ref(OBJECT(q->vdev)));
    f->message = g_strdup_printf("%s: queue %d: %s", q->vdev->name, q->index,
                                 what);
    aio_bh_schedule_oneshot(qemu_get_aio_context(), fail_bh, f);
}

static Placed too_large(VhostUserRelayQueue *q, uint64_t pages)
{
    const VhostUserRelayPool *pool = q->pool;
    g_autofree char *what = g_strdup_printf(
        "a request of %" PRIu64 " KiB finds no room in the relay's %" PRIu64
        " KiB (%u KiB are receive buffers, %u KiB a back end may still write "
        "to): make relay-size larger", pages * VHOST_USER_RELAY_PAGE / 1024,
        vhost_user_relay_area_size(pool->area) / 1024,
        pool->filler_pages * VHOST_USER_RELAY_PAGE / 1024,
        pool->quarantined * VHOST_USER_RELAY_PAGE / 1024);

    fail(q, what);
    return PLACE_FAILS;
}

/* Receive buffers must leave room for what is to be sent. */
static bool fillers_abound(VhostUserRelayQueue *q, unsigned pages)
{
    uint64_t half = vhost_user_relay_area_size(q->pool->area) /
                    VHOST_USER_RELAY_PAGE / 2;

    return q->filler_pages + pages > VHOST_USER_RELAY_FILLER_PAGES ||
           q->pool->filler_pages + pages > half;
}

static Placed take_pages(VhostUserRelayQueue *q, VhostUserRelayRequest *r,
                         unsigned pages)
{
    VhostUserRelayPool *pool = q->pool;

    if (vhost_user_relay_request_is_filler(r) && q->filler_pages &&
        fillers_abound(q, pages)) {
        return PLACE_LATER;
    }
    /* Who waits for many must not wait for ever. */
    if (!QTAILQ_EMPTY(&pool->waiters) && QTAILQ_FIRST(&pool->waiters) != q) {
        return PLACE_WAITS;
    }
    if (!vhost_user_relay_area_alloc(pool->area, pages, &r->page)) {
        /* Fillers end when it pleases others. */
        return pool->in_flight ? PLACE_WAITS : too_large(q, pages);
    }
    r->pages = pages;
    return PLACED;
}

static void give_pages_back(VhostUserRelayQueue *q, VhostUserRelayRequest *r)
{
    vhost_user_relay_area_release(q->pool->area, r->page, r->pages);
    r->pages = 0;
}

static void offer(VhostUserRelayQueue *q, VhostUserRelayRequest *r,
                  const VhostUserRelayDesc *descs, unsigned n)
{
    uint16_t head;
    bool ok;

    ok = vhost_user_relay_ring_add(&q->ring, descs, n, &head);
    assert(ok);
    q->by_head[head] = r;
    QTAILQ_INSERT_TAIL(&q->requests, r, next);
    if (vhost_user_relay_request_is_filler(r)) {
        q->filler_pages += r->pages;
        q->pool->filler_pages += r->pages;
    } else {
        q->pool->in_flight++;
    }
    stat64_add(&q->pool->bytes_out, r->out_bytes);
    trace_vhost_user_relay_offer(q->vdev, q->index, r->elem.index, head,
                                 r->out_bytes, r->in_bytes, n);
}

/* Give a popped request its place, and show it to the back end. */
static Placed place(VhostUserRelayQueue *q, VhostUserRelayRequest *r)
{
    VhostUserRelayLayout layout;
    uint64_t pages = vhost_user_relay_request_lay_out(r, &layout, q->indirect);
    unsigned n = q->indirect ? 1 : layout.n;
    Placed placed;

    if (n > q->ring.num ||
        pages > vhost_user_relay_area_size(q->pool->area) /
                VHOST_USER_RELAY_PAGE) {
        return too_large(q, pages);
    }
    if (n > q->ring.n_free) {
        return PLACE_LATER;
    }
    placed = take_pages(q, r, pages);
    if (placed != PLACED) {
        return placed;
    }
    if (!vhost_user_relay_request_fill(r, q->pool->area, q->vdev->dma_as,
                                       &layout, q->indirect, q->initial)) {
        give_pages_back(q, r);
        fail(q, "a request's buffers cannot be read");
        return PLACE_FAILS;
    }
    offer(q, r, layout.descs, layout.n);
    return PLACED;
}

static void stop_waiting(VhostUserRelayQueue *q)
{
    if (q->waits) {
        QTAILQ_REMOVE(&q->pool->waiters, q, next_waiter);
        q->waits = false;
    }
}

/* Place the held request.  False if it has to be held on. */
static bool place_held(VhostUserRelayQueue *q)
{
    Placed placed = place(q, q->held);

    if (placed == PLACE_WAITS) {
        if (!q->waits) {
            q->waits = true;
            QTAILQ_INSERT_TAIL(&q->pool->waiters, q, next_waiter);
            stat64_add(&q->pool->waits, 1);
            trace_vhost_user_relay_wait(q->vdev, q->index);
        }
        return false;
    }
    stop_waiting(q);
    if (placed == PLACED) {
        q->held = NULL;
    }
    return placed == PLACED;
}

static bool rings_stayed(VhostUserRelayQueue *q)
{
    if (!vhost_user_relay_guest_stayed(q->vdev, q->index, q->rings)) {
        fail(q, "the guest has moved its rings while they are in use");
        return false;
    }
    return true;
}

static VhostUserRelayRequest *pop(VhostUserRelayQueue *q)
{
    return vhost_user_relay_request_pop(q->vq, q->vdev->dma_as);
}

static void kick(VhostUserRelayQueue *q)
{
    if (vhost_user_relay_ring_kick(&q->ring)) {
        event_notifier_set(&q->kick);
    }
}

/*
 * Of a device that needs a reset nothing can be popped; but for a packed ring
 * QEMU 10.2 says that there is something.
 */
static bool has_more(VhostUserRelayQueue *q)
{
    return !virtio_device_disabled(q->vdev) && !virtio_queue_empty(q->vq);
}

bool vhost_user_relay_queue_can_pop(VhostUserRelayQueue *q)
{
    return q->enabled && !q->broken && !q->held && has_more(q);
}

void vhost_user_relay_queue_pop(VhostUserRelayQueue *q)
{
    unsigned budget = q->ring.num;

    if (!q->enabled || q->broken || !rings_stayed(q)) {
        return;
    }
    RCU_READ_LOCK_GUARD();
    do {
        if (q->held && !place_held(q)) {
            break;
        }
        virtio_queue_set_notification(q->vq, 0);
        while (budget && (q->held = pop(q)) && place_held(q)) {
            budget--;
        }
        if (q->held) {
            break;
        }
        virtio_queue_set_notification(q->vq, 1);
    } while (budget && has_more(q));
    kick(q);
    if (!budget) {
        /* Others have a right to the thread, too. */
        event_notifier_set(virtio_queue_get_host_notifier(q->vq));
    }
}

/* Pages have become free: those who wait for some come first. */
static void serve_waiters(VhostUserRelayPool *pool)
{
    VhostUserRelayQueue *q;

    while ((q = QTAILQ_FIRST(&pool->waiters))) {
        if (q->broken) {
            stop_waiting(q);
        } else if (place_held(q)) {
            vhost_user_relay_queue_pop(q);
        } else if (q->waits) {
            break;
        }
        /* Else it cannot be served at all, which must not keep the others. */
    }
}

static void poke(int fd)
{
    uint64_t one = 1;
    ssize_t n;

    /* Full means set; an eventfd knows no other failure. */
    n = write(fd, &one, sizeof(one));
    (void)n;
}

/* Masked: whoever unmasks it looks there, unless he has done so by now. */
static void notify_guest(VhostUserRelayQueue *q)
{
    EventNotifier *guest = virtio_queue_get_guest_notifier(q->vq);
    int fd = qatomic_read(&q->guest_call), now;

    while (fd >= 0 && fd != event_notifier_get_wfd(guest)) {
        poke(fd);
        /* Between that and whether it is still where somebody looks. */
        smp_mb();
        now = qatomic_read(&q->guest_call);
        if (now == fd) {
            return;
        }
        fd = now;
    }
    if (fd >= 0) {
        virtio_notify_irqfd(q->vdev, q->vq);
    }
}

/* It is not in flight any more, and its pages are free. */
static void forget(VhostUserRelayQueue *q, VhostUserRelayRequest *r)
{
    QTAILQ_REMOVE(&q->requests, r, next);
    if (vhost_user_relay_request_is_filler(r)) {
        q->filler_pages -= r->pages;
        q->pool->filler_pages -= r->pages;
    } else {
        q->pool->in_flight--;
    }
}

static void push_one(VhostUserRelayQueue *q, VhostUserRelayRequest *r,
                     unsigned n)
{
    uint64_t bytes = vhost_user_relay_request_copy_back(r, q->vdev->dma_as,
                                                        q->initial);

    stat64_add(&q->pool->requests, 1);
    stat64_add(&q->pool->bytes_in, bytes);
    trace_vhost_user_relay_push(q->vdev, q->index, r->elem.index, r->len);
    virtqueue_fill(q->vq, &r->elem, r->len, n);
    forget(q, r);
    give_pages_back(q, r);
    g_free(r);
}

static uint32_t clamp_len(VhostUserRelayQueue *q, VhostUserRelayRequest *r,
                          uint32_t len)
{
    if (len <= r->in_bytes) {
        return len;
    }
    if (!q->pool->clamped) {
        q->pool->clamped = true;
        warn_report("%s: queue %d: the vhost-user back end says that it wrote "
                    "%" PRIu32 " bytes where there is room for %" PRIu64
                    "; lengths are cut", q->vdev->name, q->index, len,
                    r->in_bytes);
    }
    return r->in_bytes;
}

/* Fill in what is done; how many. */
static unsigned push_some(VhostUserRelayQueue *q)
{
    VhostUserRelayRequest *r;
    VhostUserRelayTaken taken;
    const char *error = NULL;
    unsigned n = 0;
    uint16_t head;
    uint32_t len;

    while ((taken = vhost_user_relay_ring_take(&q->ring, &head, &len,
                                               &error)) ==
           VHOST_USER_RELAY_TAKEN) {
        r = q->by_head[head];
        r->len = clamp_len(q, r, len);
        r->done = true;
        if (!q->ordered) {
            push_one(q, r, n++);
            continue;
        }
        while ((r = QTAILQ_FIRST(&q->requests)) && r->done) {
            push_one(q, r, n++);
        }
    }
    if (taken == VHOST_USER_RELAY_BAD) {
        g_autofree char *what =
            g_strdup_printf("the vhost-user back end %s", error);

        fail(q, what);
    }
    return n;
}

bool vhost_user_relay_queue_can_push(VhostUserRelayQueue *q)
{
    return !q->broken && vhost_user_relay_ring_pending(&q->ring);
}

/* All that is used by now.  True if there was something. */
static bool push(VhostUserRelayQueue *q)
{
    unsigned n;
    bool any = false;

    RCU_READ_LOCK_GUARD();
    vhost_user_relay_ring_set_call(&q->ring, false);
    do {
        n = push_some(q);
        if (n) {
            virtqueue_flush(q->vq, n);
            any = true;
        }
        vhost_user_relay_ring_set_call(&q->ring, true);
    } while (vhost_user_relay_queue_can_push(q));
    if (any) {
        notify_guest(q);
    }
    return any;
}

void vhost_user_relay_queue_push(VhostUserRelayQueue *q)
{
    if (q->broken || !rings_stayed(q) || (!push(q) && !q->broken)) {
        return;
    }
    /* Even if it only broke: others may be waiting behind it. */
    serve_waiters(q->pool);
    if (q->held && !q->waits) {
        vhost_user_relay_queue_pop(q);
    }
}

void vhost_user_relay_queue_set_call(VhostUserRelayQueue *q, int fd,
                                     bool started)
{
    qatomic_set(&q->guest_call, fd);
    if (started && fd >= 0) {
        /* What was pushed until now may have found nobody to tell. */
        poke(fd);
    }
}

bool vhost_user_relay_queue_start(VhostUserRelayQueue *q, unsigned num,
                                  uint64_t features, Error **errp)
{
    if (!vhost_user_relay_guest_find(q->vdev, q->index, q->rings, errp)) {
        return false;
    }
    q->ring_pages = DIV_ROUND_UP(vhost_user_relay_ring_bytes(num),
                                 VHOST_USER_RELAY_PAGE);
    if (!vhost_user_relay_area_alloc(q->pool->area, q->ring_pages,
                                     &q->ring_page)) {
        error_setg(errp, "%s: queue %d: no room for its ring (%u KiB a back "
                   "end may still write to): make relay-size larger",
                   q->vdev->name, q->index,
                   q->pool->quarantined * VHOST_USER_RELAY_PAGE / 1024);
        return false;
    }
    vhost_user_relay_ring_init(&q->ring,
                               vhost_user_relay_area_ptr(q->pool->area,
                                                         q->ring_page),
                               num, virtio_has_feature(features,
                                                   VIRTIO_RING_F_EVENT_IDX));
    q->indirect = virtio_has_feature(features, VIRTIO_RING_F_INDIRECT_DESC);
    q->initial = vhost_user_relay_request_initial(q->vdev);
    q->ordered = virtio_vdev_has_feature(q->vdev, VIRTIO_F_RING_PACKED) ||
                 virtio_vdev_has_feature(q->vdev, VIRTIO_F_IN_ORDER);
    q->pool->drain_end = 0;
    q->enabled = q->broken = q->waits = false;
    q->held = NULL;
    q->filler_pages = 0;
    QTAILQ_INIT(&q->requests);
    q->by_head = g_new0(VhostUserRelayRequest *, num);
    trace_vhost_user_relay_start(q->vdev, q->index, num, features);
    return true;
}

void vhost_user_relay_queue_suspend(VhostUserRelayQueue *q)
{
    q->enabled = false;
    stop_waiting(q);
}

void vhost_user_relay_queue_drain(VhostUserRelayQueue *q, int64_t limit_ms)
{
    int64_t now = g_get_monotonic_time() / 1000;
    struct pollfd p = {
        .fd = event_notifier_get_fd(&q->call),
        .events = POLLIN,
    };
    int64_t end;

    vhost_user_relay_queue_suspend(q);
    if (q->broken || !rings_stayed(q)) {
        return;
    }
    /* All queues together; but none is left without a chance. */
    q->pool->drain_end = q->pool->drain_end ?: now + limit_ms;
    end = MAX(q->pool->drain_end, now + VHOST_USER_RELAY_DRAIN_LEAST_MS);
    push(q);
    while (!q->broken && !QTAILQ_EMPTY(&q->requests) &&
           !vhost_user_relay_request_is_filler(QTAILQ_FIRST(&q->requests))) {
        now = g_get_monotonic_time() / 1000;
        if (now >= end) {
            trace_vhost_user_relay_hangs(q->vdev, q->index);
            break;
        }
        /* A signal ends it early, no more. */
        if (poll(&p, 1, end - now) > 0) {
            event_notifier_test_and_clear(&q->call);
        }
        push(q);
    }
}

/* May the back end still be at something that it was given? */
static bool may_be_late(VhostUserRelayQueue *q, int taken)
{
    if (taken < 0 || q->broken) {
        return true;
    }
    if ((int16_t)(taken - q->ring.used_idx) <= 0) {
        return false;
    }
    if (vhost_user_relay_request_stores(q->initial)) {
        /* Of a disk: what it writes then may be older than what follows. */
        warn_report("%s: queue %d: the vhost-user back end has stopped and "
                    "not completed %d requests, which will be done again",
                    q->vdev->name, q->index,
                    (int16_t)(taken - q->ring.used_idx));
    }
    return true;
}

void vhost_user_relay_queue_stop(VhostUserRelayQueue *q, int taken)
{
    VhostUserRelayRequest *r;
    bool late;

    vhost_user_relay_queue_suspend(q);
    if (!q->broken && rings_stayed(q)) {
        push(q);
    }
    cancel_failure(q);
    qatomic_set(&q->guest_call, -1);
    if (q->held) {
        /* The last one that was popped; it has no pages. */
        QTAILQ_INSERT_TAIL(&q->requests, q->held, next);
    }
    stat64_add(&q->pool->unpopped,
               vhost_user_relay_guest_unpop(q->vdev, q->index, &q->requests,
                                            q->ordered));
    trace_vhost_user_relay_stop(q->vdev, q->index, taken, q->ring.used_idx);
    late = q->held != QTAILQ_FIRST(&q->requests) && may_be_late(q, taken);
    while ((r = QTAILQ_FIRST(&q->requests))) {
        if (r == q->held) {
            QTAILQ_REMOVE(&q->requests, r, next);
            q->held = NULL;
            g_free(r);
            continue;
        }
        forget(q, r);
        if (late) {
            /* Nobody can tell which of them. */
            q->pool->quarantined += r->pages;
        } else {
            give_pages_back(q, r);
        }
        g_free(r);
    }
    if (late) {
        q->pool->quarantined += q->ring_pages;
    } else {
        vhost_user_relay_area_release(q->pool->area, q->ring_page,
                                      q->ring_pages);
    }
    vhost_user_relay_ring_destroy(&q->ring);
    g_clear_pointer(&q->by_head, g_free);
    serve_waiters(q->pool);
}
