/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * vhost-user without shared memory: a connection's area, queues and thread;
 * see hw/virtio/vhost-user-relay.h
 *
 * Who owns what: the relay has the area and the queues; a queue
 * (vhost-user-relay-queue.h) is run by the thread of the relay's AioContext
 * from attach() to detach(), and nobody else touches it meanwhile.  The BQL is
 * held by whoever calls in here, and not needed by that thread.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "block/aio.h"
#include "qemu/host-utils.h"
#include "qemu/main-loop.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "hw/dedup/ram-guard.h"
#include "hw/virtio/vhost.h"
#include "hw/virtio/vhost-user.h"
#include "hw/virtio/vhost-user-relay.h"
#include "standard-headers/linux/vhost_types.h"
#include "standard-headers/linux/virtio_ids.h"
#include "vhost-user-relay-features.h"
#include "vhost-user-relay-internal.h"
#include "trace.h"

/* Memory that is reserved by address only, until it is used. */
#define DEFAULT_SIZE (64 * MiB)

#define SHRINK_MS 1000

/*
 * How long a stop waits for the back end.  A disk is worth it: what it does
 * later would be done twice, and overwrite what came after.
 */
#define DRAIN_DISK_MS 30000
#define DRAIN_FS_MS 5000

VhostUserRelayList vhost_user_relays =
    QLIST_HEAD_INITIALIZER(vhost_user_relays);

static bool is_wanted(const VhostUserRelayConf *conf)
{
    bool ambiguous = false;

    if (conf->mode != ON_OFF_AUTO_AUTO) {
        return conf->mode == ON_OFF_AUTO_ON;
    }
    return object_resolve_path_type("", "dedup-scanner", &ambiguous) ||
           ambiguous;
}

bool vhost_user_relay_new(VhostUserRelay **relay,
                          const VhostUserRelayConf *conf, const char *chardev,
                          Error **errp)
{
    size_t page = MAX(qemu_real_host_page_size(), VHOST_USER_RELAY_PAGE);
    VhostUserRelay *new;

    *relay = NULL;
    if (conf->mode == ON_OFF_AUTO_OFF &&
        (conf->iothread || conf->size)) {
        error_setg(errp, "%s needs relay=on",
                   conf->iothread ? "iothread" : "relay-size");
        return false;
    }
    if (!is_wanted(conf)) {
        return true;
    }
    if (conf->size && (conf->size < VHOST_USER_RELAY_SIZE_MIN ||
                       conf->size > VHOST_USER_RELAY_SIZE_MAX ||
                       conf->size % page)) {
        error_setg(errp, "relay-size must be a multiple of %zu from %llu to "
                   "%llu bytes", page, VHOST_USER_RELAY_SIZE_MIN,
                   VHOST_USER_RELAY_SIZE_MAX);
        return false;
    }
    new = g_new0(VhostUserRelay, 1);
    new->chardev = g_strdup(chardev);
    new->size = conf->size ?: DEFAULT_SIZE;
    new->drain_ms = conf->drain_ms;
    new->iothread = conf->iothread;
    if (new->iothread) {
        object_ref(OBJECT(new->iothread));
        new->ctx = iothread_get_aio_context(new->iothread);
    } else {
        /* Not within drains: what else touches guest RAM then is over. */
        new->ctx = iohandler_get_aio_context();
    }
    new->queues = g_ptr_array_new();
    vhost_user_relay_pool_init(&new->pool);
    QLIST_INSERT_HEAD(&vhost_user_relays, new, next);
    *relay = new;
    return true;
}

typedef struct Errand {
    QEMUBHFunc *fn;
    void *opaque;
    QemuEvent done;
} Errand;

static void errand_bh(void *opaque)
{
    Errand *e = opaque;

    e->fn(e->opaque);
    qemu_event_set(&e->done);
}

/*
 * Have the relay's thread do it, and wait.  Not in an event loop: vhost is in
 * the middle of something, and one of its bottom halves may close the
 * connection.
 */
static void in_thread(VhostUserRelay *relay, QEMUBHFunc *fn, void *opaque)
{
    Errand e = { .fn = fn, .opaque = opaque };

    assert(bql_locked());
    /* It would wait for itself. */
    assert(!relay->iothread || qemu_get_current_aio_context() != relay->ctx);
    if (!relay->iothread) {
        return fn(opaque);
    }
    qemu_event_init(&e.done, false);
    aio_bh_schedule_oneshot(relay->ctx, errand_bh, &e);
    qemu_event_wait(&e.done);
    qemu_event_destroy(&e.done);
}

static RelayQueue *get_queue(VhostUserRelay *relay, int index)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, index);

    if (rq) {
        return rq;
    }
    rq = g_new0(RelayQueue, 1);
    if (event_notifier_init(&rq->q.kick, 0) < 0) {
        g_free(rq);
        return NULL;
    }
    if (event_notifier_init(&rq->q.call, 0) < 0) {
        event_notifier_cleanup(&rq->q.kick);
        g_free(rq);
        return NULL;
    }
    rq->relay = relay;
    rq->q.pool = &relay->pool;
    rq->q.index = index;
    rq->q.guest_call = rq->guest_kick = -1;
    if (index >= relay->queues->len) {
        g_ptr_array_set_size(relay->queues, index + 1);
    }
    g_ptr_array_index(relay->queues, index) = rq;
    return rq;
}

/* Handlers of the relay's thread. */

/* What of the area has no memory yet is kept for it. */
static void tell_size(VhostUserRelay *relay)
{
    const VhostUserRelayArea *area = relay->pool.area;
    uint64_t may_take = area ? vhost_user_relay_area_size(area) -
                               vhost_user_relay_area_held(area) : 0;

    if (may_take != relay->may_take) {
        ram_guard_may_take(may_take - relay->may_take);
        relay->may_take = may_take;
    }
}

static void shrink(void *opaque)
{
    VhostUserRelay *relay = opaque;
    bool more = vhost_user_relay_area_shrink(relay->pool.area);

    tell_size(relay);
    trace_vhost_user_relay_shrink(
        relay->chardev, vhost_user_relay_area_held(relay->pool.area));
    if (more) {
        timer_mod(relay->timer,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + SHRINK_MS);
    }
}

static void watch_size(VhostUserRelay *relay)
{
    tell_size(relay);
    if (!timer_pending(relay->timer) &&
        vhost_user_relay_area_held(relay->pool.area) >
        VHOST_USER_RELAY_IDLE_PAGES * VHOST_USER_RELAY_PAGE) {
        timer_mod(relay->timer,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + SHRINK_MS);
    }
}

static void guest_kick_ready(void *opaque)
{
    RelayQueue *rq = opaque;

    vhost_user_relay_queue_pop(&rq->q);
    watch_size(rq->relay);
}

static void guest_kick_read(void *opaque)
{
    RelayQueue *rq = opaque;

    event_notifier_test_and_clear(virtio_queue_get_host_notifier(rq->q.vq));
    guest_kick_ready(rq);
}

static bool guest_kick_poll(void *opaque)
{
    RelayQueue *rq = opaque;

    return vhost_user_relay_queue_can_pop(&rq->q);
}

static void backend_call_ready(void *opaque)
{
    RelayQueue *rq = opaque;

    vhost_user_relay_queue_push(&rq->q);
    watch_size(rq->relay);
}

static void backend_call_read(void *opaque)
{
    RelayQueue *rq = opaque;

    event_notifier_test_and_clear(&rq->q.call);
    backend_call_ready(rq);
}

static bool backend_call_poll(void *opaque)
{
    RelayQueue *rq = opaque;

    return vhost_user_relay_queue_can_push(&rq->q);
}

static void set_handlers(RelayQueue *rq, bool on)
{
    AioContext *ctx = rq->relay->ctx;

    aio_set_fd_handler(ctx, rq->guest_kick,
                       on ? guest_kick_read : NULL, NULL,
                       on ? guest_kick_poll : NULL,
                       on ? guest_kick_ready : NULL, rq);
    aio_set_fd_handler(ctx, event_notifier_get_fd(&rq->q.call),
                       on ? backend_call_read : NULL, NULL,
                       on ? backend_call_poll : NULL,
                       on ? backend_call_ready : NULL, rq);
}

static void attach(void *opaque)
{
    RelayQueue *rq = opaque;

    if (!rq->q.enabled) {
        rq->q.enabled = true;
        /* By number: it may be closed when the handler is removed. */
        rq->guest_kick = event_notifier_get_fd(
            virtio_queue_get_host_notifier(rq->q.vq));
        set_handlers(rq, true);
        guest_kick_ready(rq);
    }
}

/*
 * A network sends again what was lost, and what its back end cannot send now
 * may stay for long.  Others wait for events.
 */
static int64_t drain_limit_ms(VhostUserRelay *relay, VirtIODevice *vdev)
{
    bool disk = vdev->device_id == VIRTIO_ID_BLOCK ||
                vdev->device_id == VIRTIO_ID_SCSI;

    if (!disk && vdev->device_id != VIRTIO_ID_FS) {
        return 0;
    }
    return relay->drain_ms ?: disk ? DRAIN_DISK_MS : DRAIN_FS_MS;
}

static void drain(void *opaque)
{
    RelayQueue *rq = opaque;

    vhost_user_relay_queue_drain(&rq->q, drain_limit_ms(rq->relay, rq->q.vdev));
}

static void suspend(void *opaque)
{
    RelayQueue *rq = opaque;

    vhost_user_relay_queue_suspend(&rq->q);
}

typedef struct Start {
    RelayQueue *rq;
    uint64_t features;
    bool ok;
    Error *err;
} Start;

static void start(void *opaque)
{
    Start *s = opaque;

    s->ok = vhost_user_relay_queue_start(&s->rq->q, s->rq->num, s->features,
                                         &s->err);
}

typedef struct Stop {
    RelayQueue *rq;
    int taken;
} Stop;

static void detach(void *opaque)
{
    Stop *s = opaque;

    if (s->rq->guest_kick >= 0) {
        set_handlers(s->rq, false);
        s->rq->guest_kick = -1;
    }
    vhost_user_relay_queue_stop(&s->rq->q, s->taken);
}

static void free_timer(void *opaque)
{
    VhostUserRelay *relay = opaque;

    g_clear_pointer(&relay->timer, timer_free);
}

/* Calls from vhost-user.c */

bool vhost_user_relay_has_started(VhostUserRelay *relay, int index)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, index);

    return rq && rq->started;
}

void vhost_user_relay_drain(VhostUserRelay *relay, struct vhost_dev *dev,
                            int index)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, index);

    if (rq && rq->started && dev->started && drain_limit_ms(relay, dev->vdev)) {
        in_thread(relay, drain, rq);
    }
}

unsigned vhost_user_relay_stop(VhostUserRelay *relay, struct vhost_dev *dev,
                               int index, int taken)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, index);
    VirtIODevice *vdev = dev->vdev;

    if (!vdev && rq) {
        /* After a start that failed vhost does not know it any more. */
        vdev = rq->q.vdev;
    }
    if (rq && rq->started) {
        Stop s = { .rq = rq, .taken = taken };

        rq->started = false;
        rq->call_sent = false;
        in_thread(relay, detach, &s);
    }
    return vdev ? virtio_queue_get_last_avail_idx(vdev, index) : 0;
}

static void drop_area(VhostUserRelay *relay)
{
    RelayQueue *rq;

    for (int i = 0; i < relay->queues->len; i++) {
        rq = vhost_user_relay_queue(relay, i);
        if (rq && rq->started) {
            Stop s = { .rq = rq, .taken = -1 };

            rq->started = false;
            in_thread(relay, detach, &s);
        }
        if (rq) {
            rq->wanted = rq->call_sent = false;
        }
    }
    if (relay->timer) {
        in_thread(relay, free_timer, relay);
    }
    g_clear_pointer(&relay->pool.area, vhost_user_relay_area_free);
    tell_size(relay);
    relay->pool.quarantined = 0;
    relay->table_sent = false;
}

static bool make_area(VhostUserRelay *relay, Error **errp)
{
    AioContext *ctx = relay->iothread ? relay->ctx : qemu_get_aio_context();

    relay->pool.area = vhost_user_relay_area_new(relay->size, errp);
    if (!relay->pool.area) {
        error_prepend(errp, "relay of chardev '%s': ", relay->chardev);
        return false;
    }
    tell_size(relay);
    relay->timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_MS, shrink,
                                 relay);
    return true;
}

bool vhost_user_relay_connect(VhostUserRelay *relay, struct vhost_dev *dev,
                              Error **errp)
{
    ERRP_GUARD();

    drop_area(relay);
    relay->owner = dev;
    return make_area(relay, errp);
}

void vhost_user_relay_disconnect(VhostUserRelay *relay, struct vhost_dev *dev)
{
    if (relay->owner == dev) {
        drop_area(relay);
        relay->owner = NULL;
    }
}

void vhost_user_relay_free(VhostUserRelay *relay)
{
    RelayQueue *rq;

    if (!relay) {
        return;
    }
    drop_area(relay);
    for (int i = 0; i < relay->queues->len; i++) {
        rq = vhost_user_relay_queue(relay, i);
        if (rq) {
            event_notifier_cleanup(&rq->q.kick);
            event_notifier_cleanup(&rq->q.call);
            g_free(rq);
        }
    }
    g_ptr_array_free(relay->queues, true);
    if (relay->iothread) {
        object_unref(OBJECT(relay->iothread));
    }
    QLIST_REMOVE(relay, next);
    g_free(relay->chardev);
    g_free(relay);
}

uint64_t vhost_user_relay_guest_features(VhostUserRelay *relay,
                                         uint64_t features)
{
    relay->features = features;
    return vhost_user_relay_features_for_guest(features);
}

uint64_t vhost_user_relay_backend_features(VhostUserRelay *relay,
                                           uint64_t features)
{
    return vhost_user_relay_features_for_backend(relay->features, features);
}

bool vhost_user_relay_table(VhostUserRelay *relay, uint64_t *gpa,
                            uint64_t *size, int *fd)
{
    if (relay->table_sent || !relay->pool.area) {
        return false;
    }
    *gpa = VHOST_USER_RELAY_GPA;
    *size = vhost_user_relay_area_size(relay->pool.area);
    *fd = vhost_user_relay_area_fd(relay->pool.area);
    return true;
}

void vhost_user_relay_table_sent(VhostUserRelay *relay, bool sent)
{
    relay->table_sent = sent;
}

int vhost_user_relay_set_num(VhostUserRelay *relay, struct vhost_dev *dev,
                             int index, unsigned *num)
{
    RelayQueue *rq = get_queue(relay, index);

    if (!rq) {
        return -EMFILE;
    }
    if (virtio_is_big_endian(dev->vdev)) {
        error_report("%s: a big-endian guest cannot be relayed",
                     dev->vdev->name);
        return -ENOTSUP;
    }
    rq->num = *num = pow2ceil(*num);
    return 0;
}

int vhost_user_relay_set_addr(VhostUserRelay *relay, struct vhost_dev *dev,
                              struct vhost_vring_addr *addr)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, addr->index);
    Start s = { };
    uint64_t ring;

    if (!rq || !relay->pool.area) {
        return -EINVAL;
    }
    /* If the last start has failed half-way. */
    vhost_user_relay_stop(relay, dev, addr->index, -1);
    rq->q.vdev = dev->vdev;
    rq->q.vq = virtio_get_queue(dev->vdev, addr->index);
    s.rq = rq;
    s.features = vhost_user_relay_backend_features(relay,
                                                   dev->acked_features);
    dev->vdev->memory_only = true;
    in_thread(relay, start, &s);
    if (!s.ok) {
        error_report_err(s.err);
        return -ENOMEM;
    }
    rq->started = true;
    ring = vhost_user_relay_area_gpa(rq->q.ring_page);
    addr->flags = 0;
    addr->log_guest_addr = 0;
    addr->desc_user_addr = ring;
    addr->avail_user_addr = ring + vhost_user_relay_ring_avail_offset(rq->num);
    addr->used_user_addr = ring + vhost_user_relay_ring_used_offset(rq->num);
    return 0;
}

static void update_running(RelayQueue *rq)
{
    if (rq->started) {
        in_thread(rq->relay, rq->wanted ? attach : suspend, rq);
    }
}

int vhost_user_relay_kick(VhostUserRelay *relay, int index)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, index);

    return rq && rq->started ? event_notifier_get_fd(&rq->q.kick) : -1;
}

void vhost_user_relay_started(VhostUserRelay *relay, int index)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, index);

    if (rq) {
        update_running(rq);
    }
}

void vhost_user_relay_set_call(VhostUserRelay *relay, int index, int fd)
{
    RelayQueue *rq = get_queue(relay, index);

    if (rq) {
        vhost_user_relay_queue_set_call(&rq->q, fd, rq->started);
    }
}

int vhost_user_relay_call(VhostUserRelay *relay, int index, bool again)
{
    RelayQueue *rq = vhost_user_relay_queue(relay, index);

    if (!rq || (rq->call_sent && !again)) {
        return -1;
    }
    rq->call_sent = true;
    return event_notifier_get_wfd(&rq->q.call);
}

void vhost_user_relay_set_enable(VhostUserRelay *relay, int index,
                                 bool enable)
{
    RelayQueue *rq = get_queue(relay, index);

    if (rq) {
        rq->wanted = enable;
        update_running(rq);
    }
}
