/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: who wants to be told of what, and is
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "relay-vm.h"
#include <poll.h>

#define INDIRECT VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC)
#define EVENT VUB_BIT(VIRTIO_RING_F_EVENT_IDX)
#define PACKED VUB_BIT(VIRTIO_F_RING_PACKED)

typedef struct Kind {
    const char *name, *relay, *props;
    uint64_t features, no_backend;
    bool msix;
} Kind;

#define ON ",relay=on"
#define IO ",relay=on,iothread=io0"

static const Kind kinds[] = {
    { "split", ON, "", INDIRECT },
    { "event-idx", ON, "", INDIRECT | EVENT },
    { "event-idx-guest", ON, "", INDIRECT | EVENT, EVENT },
    { "packed", ON, ",packed=on", INDIRECT | PACKED },
    { "packed-event-idx", ON, ",packed=on", INDIRECT | PACKED | EVENT },
    { "msix", ON, "", INDIRECT | EVENT, 0, true },
    { "iothread", IO, "", INDIRECT },
    { "iothread-event-idx", IO, "", INDIRECT | EVENT },
    { "iothread-msix", IO, ",packed=on", INDIRECT | EVENT | PACKED, 0, true },
};

static VubRing *run(RelayVm *vm, const Kind *k)
{
    rvm_init(vm);
    vm->relay = k->relay;
    vm->props = k->props;
    vm->msix = k->msix;
    vm->more = "-object iothread,id=io0";
    vm->wanted = VUB_BIT(VIRTIO_F_VERSION_1) | k->features;
    vm->b->features &= ~k->no_backend;
    rvm_start(vm);
    rvm_drive(vm);
    g_assert_cmphex(vm->features, ==, vm->wanted);
    return vub_wait_ring(vm->b, 1, 1);
}

/* Until the relay has nothing left to do. */
static void settle(RelayVm *vm, unsigned requests)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

    while (rvm_relay_figure(vm, "requests") < requests) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    /* The interrupt is raised by the main loop: let it turn twice. */
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'query-status' }");
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'query-status' }");
}

static void one(RelayVm *vm, VubRing *r, uint64_t tag)
{
    uint16_t head = rvm_send_tag(vm, 1, tag);

    rvm_answer(rvm_expect_tag(r, tag));
    rvm_check_answer(vm, 1, head, tag);
}

/* The guest is interrupted for each, and not if it does not want to be. */
static void test_guest_flags(gconstpointer data)
{
    const Kind *k = data;
    DrvQueue *q;
    RelayVm vm;
    VubRing *r;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    r = run(&vm, k);
    q = &vm.q[1];
    drv_interrupted(q);
    for (i = 0; i < 5; i++) {
        if (k->features & EVENT && !(k->features & PACKED)) {
            drv_set_used_event(q, q->last_used);
        }
        one(&vm, r, i);
        drv_wait_interrupt(q);
    }
    if (k->features & EVENT && !(k->features & PACKED)) {
        /* As good as never. */
        drv_set_used_event(q, q->last_used - 1);
    } else {
        drv_no_interrupt(q, true);
    }
    settle(&vm, 5);
    drv_interrupted(q);
    for (i = 5; i < 10; i++) {
        one(&vm, r, i);
        settle(&vm, i + 1);
        g_assert_false(drv_interrupted(q));
    }
    if (k->features & EVENT && !(k->features & PACKED)) {
        drv_set_used_event(q, q->last_used);
    } else {
        drv_no_interrupt(q, false);
    }
    one(&vm, r, i);
    drv_wait_interrupt(q);
    rvm_quit(&vm);
}

/* With event_idx: at the third of five, and only then. */
static void test_used_event(gconstpointer data)
{
    const Kind *k = data;
    VubRequest *req[5];
    uint16_t head[5];
    DrvQueue *q;
    RelayVm vm;
    VubRing *r;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    r = run(&vm, k);
    q = &vm.q[1];
    /* The first one after a start is told of in any case. */
    one(&vm, r, 99);
    drv_wait_interrupt(q);
    drv_set_used_event(q, 3);
    for (i = 0; i < 5; i++) {
        head[i] = rvm_send_tag(&vm, 1, i);
        req[i] = rvm_expect_tag(r, i);
    }
    for (i = 0; i < 5; i++) {
        drv_interrupted(q);
        rvm_answer(req[i]);
        settle(&vm, i + 2);
        if (i == 2) {
            drv_wait_interrupt(q);
        } else {
            g_assert_false(drv_interrupted(q));
        }
        rvm_check_answer(&vm, 1, head[i], i);
    }
    rvm_quit(&vm);
}

static bool kicked(VubRing *r)
{
    struct pollfd p = { .fd = r->kick, .events = POLLIN };
    uint64_t n;

    return poll(&p, 1, 0) == 1 && read(r->kick, &n, sizeof(n)) > 0;
}

static void wait_avail(VubRing *r, uint16_t idx)
{
    int64_t end = g_get_monotonic_time() + VUB_TIMEOUT_US;

    while (le16_to_cpu(qatomic_read(&r->avail->idx)) != idx) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(100);
    }
}

/* A back end that polls wants no kicks. */
static void test_backend_flags(gconstpointer data)
{
    RelayVm vm;
    VubRing *r;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    r = run(&vm, data);
    g_assert_cmpint(r->event_idx, ==,
                    !!(vm.b->acked_features & EVENT));
    kicked(r);
    if (r->event_idx) {
        *(uint16_t *)&r->used->ring[r->num] = cpu_to_le16(4);
    } else {
        r->used->flags = cpu_to_le16(VRING_USED_F_NO_NOTIFY);
    }
    qatomic_set(&r->used->idx, 0);
    for (i = 0; i < 4; i++) {
        rvm_send_tag(&vm, 1, i);
        wait_avail(r, i + 1);
        /* It has been added; a kick would come right after. */
        settle(&vm, 0);
        g_assert_false(kicked(r));
    }
    r->used->flags = 0;
    rvm_send_tag(&vm, 1, i);
    {
        struct pollfd p = { .fd = r->kick, .events = POLLIN };

        g_assert_cmpint(poll(&p, 1, VUB_TIMEOUT_US / 1000), ==, 1);
    }
    for (i = 0; i < 5; i++) {
        rvm_answer(rvm_expect_tag(r, i));
    }
    rvm_quit(&vm);
}

/*
 * A guest whose kicks are few, and a back end whose calls are few: as many as
 * each one wants, none is lost.
 */
static void test_burst(gconstpointer data)
{
    RelayVm vm;
    DrvQueue *q;
    VubRing *r;
    uint16_t head[64];
    unsigned round, i;

    if (rvm_skip_plain()) {
        return;
    }
    r = run(&vm, data);
    q = &vm.q[1];
    for (round = 0; round < 60; round++) {
        unsigned n = round % 64 + 1;

        for (i = 0; i < n; i++) {
            if (q->event_idx && !q->packed) {
                drv_set_used_event(q, q->last_used + n - 1);
            }
            head[i] = rvm_send_tag(&vm, 1, round * 100 + i);
        }
        for (i = 0; i < n; i++) {
            rvm_answer(rvm_expect_tag(r, round * 100 + i));
        }
        for (i = 0; i < n; i++) {
            rvm_check_answer(&vm, 1, head[i], round * 100 + i);
        }
        drv_wait_interrupt(q);
    }
    rvm_quit(&vm);
}

#define WRAP_BATCH 64

/*
 * Beyond 65536 requests, so that all indices come round.  With event_idx it is
 * only the guest's, as the device is stopped in between.
 */
static void test_wrap(gconstpointer data)
{
    bool stops = ((const Kind *)data)->features & EVENT;
    uint16_t head[WRAP_BATCH], order[WRAP_BATCH];
    unsigned i, sent = 0;
    DrvQueue *q;
    RelayVm vm;
    VubRing *r;

    if (rvm_skip_plain()) {
        return;
    }
    r = run(&vm, data);
    q = &vm.q[1];
    for (i = 0; i < WRAP_BATCH; i++) {
        head[i] = order[i] = rvm_send_tag(&vm, 1, i);
    }
    for (;;) {
        for (i = 0; i < WRAP_BATCH; i++) {
            VubRequest *req = vub_pop(r);

            rvm_write_in(req, 0, sent + i, 16);
            vub_done(req, 16);
        }
        sent += WRAP_BATCH;
        drv_skip_used(q, head, WRAP_BATCH);
        if (sent > 65536 + 3 * WRAP_BATCH) {
            break;
        }
        drv_resend(q, order, WRAP_BATCH);
        drv_kick(q);
        if (stops && sent == 65536 - WRAP_BATCH) {
            /* Half of it is in flight across the wrap, and is taken back. */
            for (i = 0; i < WRAP_BATCH / 2; i++) {
                VubRequest *req = vub_pop(r);

                if (i % 2) {
                    vub_done(req, 16);
                } else {
                    vub_request_free(req);
                }
            }
            qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
            qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
            r = vub_wait_ring(vm.b, 1, 2);
            for (i = 0; i < WRAP_BATCH * 3 / 4; i++) {
                vub_done(vub_pop(r), 16);
            }
            sent += WRAP_BATCH;
            drv_skip_used(q, head, WRAP_BATCH);
            drv_resend(q, order, WRAP_BATCH);
            drv_kick(q);
        }
    }
    one(&vm, r, 1);
    g_assert_null(vub_try_pop(r));
    rvm_quit(&vm);
}

static void add(const char *name, const Kind *k, GTestDataFunc test)
{
    g_autofree char *path = g_strdup_printf("relay/%s/%s", name, k->name);

    qtest_add_data_func(path, k, test);
}

int main(int argc, char **argv)
{
    unsigned i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < G_N_ELEMENTS(kinds); i++) {
        const Kind *k = &kinds[i];

        add("guest-flags", k, test_guest_flags);
        if (k->features & EVENT) {
            add("used-event", k, test_used_event);
        }
        add("backend-flags", k, test_backend_flags);
        add("burst", k, test_burst);
        if (!(k->features & PACKED) && !k->msix) {
            add("wrap", k, test_wrap);
        }
    }
    return g_test_run();
}
