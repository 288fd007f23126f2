/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: a network card, and a device behind a vIOMMU
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "relay-vm.h"
#include "standard-headers/linux/virtio_net.h"

#define RX 0
#define TX 1
#define RX_BUFFERS DRV_DATA
#define RX_STRIDE 0x1000
#define RX_LEN 1600
#define TX_BUFFERS (DRV_DATA + 0x400000)
#define CTRL (DRV_DATA + 0x800000)

#define INDIRECT VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC)
#define EVENT VUB_BIT(VIRTIO_RING_F_EVENT_IDX)
#define PACKED VUB_BIT(VIRTIO_F_RING_PACKED)

typedef struct Kind {
    const char *name, *relay, *props;
    uint64_t features;
} Kind;

static const Kind kinds[] = {
    { "split", ",relay=on", "", 0 },
    { "event-idx", ",relay=on", "", EVENT },
    { "packed", ",relay=on", ",packed=on", PACKED | EVENT },
    { "iothread", ",relay=on,iothread=io0", "", INDIRECT | EVENT },
};

static void run(RelayVm *vm, const Kind *k, const char *chardev, bool mq)
{
    static char device[64], relay[64];

    rvm_init(vm);
    vm->net = true;
    g_snprintf(device, sizeof(device), "virtio-net-pci%s%s",
               mq ? ",mq=on,vectors=10" : "", k->props);
    vm->device = device;
    g_snprintf(relay, sizeof(relay), "%s%s", k->relay,
               mq ? ",queues=2" : "");
    vm->relay = relay;
    vm->chardev = chardev;
    vm->more = "-object iothread,id=io0";
    vm->wanted = VUB_BIT(VIRTIO_F_VERSION_1) | k->features;
    vm->nqueues = 2;
    vm->msix = true;
    if (mq) {
        vm->nqueues = 5;
        vm->wanted |= VUB_BIT(VIRTIO_NET_F_MQ) | VUB_BIT(VIRTIO_NET_F_CTRL_VQ);
        vm->b->features |= VUB_BIT(VIRTIO_NET_F_MQ);
    }
    rvm_start(vm);
    rvm_drive(vm);
    g_assert_cmphex(vm->features, ==, vm->wanted);
}

static uint64_t rx_at(uint16_t head)
{
    return RX_BUFFERS + head * RX_STRIDE + 13;
}

static void post_rx(RelayVm *vm, unsigned n)
{
    DrvQueue *q = &vm->q[RX];
    unsigned i;

    for (i = 0; i < n; i++) {
        uint16_t id = drv_next_head(q);

        qtest_memset(vm->qts, rx_at(id), 0xee, RX_LEN);
        g_assert_cmpuint(drv_add(q, (DrvSegment[]) {
            { rx_at(id), RX_LEN, true },
        }, 1, false), ==, id);
    }
    drv_kick(q);
}

/* A packet to the guest, by the next buffer. */
static void receive(RelayVm *vm, VubRing *r, unsigned seed, uint32_t len)
{
    VubRequest *req = vub_pop(r);
    uint16_t id;
    uint32_t got;

    g_assert_cmpuint(req->in_len, ==, RX_LEN);
    g_assert_cmpuint(req->out_len, ==, 0);
    rvm_write_in(req, 0, seed, len);
    vub_done(req, len);
    drv_wait_used(&vm->q[RX], &id, &got);
    g_assert_cmpuint(got, ==, len);
    rvm_check(vm, rx_at(id), seed, len);
    rvm_check_byte(vm, rx_at(id) + len, 0xee, RX_LEN - len);
}

static uint16_t transmit(RelayVm *vm, unsigned queue, unsigned seed,
                         uint32_t len)
{
    uint64_t at = TX_BUFFERS + (seed % 64) * 0x10000 + 77;

    rvm_fill(vm, at, seed, len);
    return drv_send(&vm->q[queue], (DrvSegment[]) {
        { at, 12, false },
        { at + 12, len - 12, false },
    }, 2, vm->features & INDIRECT);
}

static void expect_packet(RelayVm *vm, VubRing *r, unsigned queue,
                          unsigned seed, uint32_t len, uint16_t head)
{
    VubRequest *req = vub_pop(r);

    g_assert_cmpuint(req->out_len, ==, len);
    g_assert_cmpuint(req->in_len, ==, 0);
    rvm_check_out(req, 0, seed, len);
    vub_done(req, 0);
    drv_expect_used(&vm->q[queue], head, 0);
}

/* Both ways; the buffers to receive into are more than the relay takes. */
static void test_traffic(gconstpointer data)
{
    RelayVm vm;
    VubRing *rx, *tx;
    unsigned i;
    uint16_t head;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, data, "", false);
    rx = vub_wait_ring(vm.b, RX, 1);
    tx = vub_wait_ring(vm.b, TX, 1);
    post_rx(&vm, 250);
    for (i = 0; i < 600; i++) {
        receive(&vm, rx, i, i % 1500 + 60);
        if (i % 50 == 49) {
            post_rx(&vm, 50);
            head = transmit(&vm, TX, i, 20 + i * 13);
            expect_packet(&vm, tx, TX, i, 20 + i * 13, head);
        }
    }
    g_assert_cmpuint(vub_count(vm.b, VUB_SET_MEM_TABLE), ==, 1);
    rvm_quit(&vm);
}

/* 200 buffers of the guest are with the back end when it stops. */
static void test_stop(gconstpointer data)
{
    RelayVm vm;
    VubRing *rx, *tx;
    uint16_t head[8];
    unsigned i, round;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, data, "", false);
    vm.b->gives_up = true;
    rx = vub_wait_ring(vm.b, RX, 1);
    tx = vub_wait_ring(vm.b, TX, 1);
    post_rx(&vm, 200);
    for (round = 1; round < 5; round++) {
        for (i = 0; i < 8; i++) {
            head[i] = transmit(&vm, TX, i, 1000 + i);
        }
        receive(&vm, rx, round, 100);
        vub_request_free(vub_pop(tx));
        qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
        qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
        rx = vub_wait_ring(vm.b, RX, round + 1);
        tx = vub_wait_ring(vm.b, TX, round + 1);
        for (i = 0; i < 8; i++) {
            expect_packet(&vm, tx, TX, i, 1000 + i, head[i]);
        }
        receive(&vm, rx, round + 100, 1000);
    }
    rvm_quit(&vm);
}

/* While its vector is masked a queue's interrupt is pending, and no more. */
static void test_masked(gconstpointer data)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;
    RelayVm vm;
    VubRing *tx;
    DrvQueue *q;
    uint16_t head;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, data, "", false);
    q = &vm.q[TX];
    tx = vub_wait_ring(vm.b, TX, 1);
    for (i = 0; i < 5; i++) {
        if (q->event_idx && !q->packed) {
            drv_set_used_event(q, q->last_used);
        }
        drv_msix_mask(q, true);
        drv_interrupted(q);
        head = transmit(&vm, TX, i, 100);
        expect_packet(&vm, tx, TX, i, 100, head);
        while (!qpci_msix_pending(vm.dev->pdev, TX)) {
            g_assert_cmpint(g_get_monotonic_time(), <, end);
        }
        g_assert_false(drv_interrupted(q));
        drv_msix_mask(q, false);
        drv_wait_interrupt(q);
        /* Unmasked it is as before. */
        if (q->event_idx && !q->packed) {
            drv_set_used_event(q, q->last_used);
        }
        head = transmit(&vm, TX, i, 200);
        expect_packet(&vm, tx, TX, i, 200, head);
        drv_wait_interrupt(q);
    }
    rvm_quit(&vm);
}

/* The number of queue pairs, by the control queue. */
static void set_pairs(RelayVm *vm, uint16_t pairs)
{
    DrvQueue *q = &vm->q[4];
    uint16_t id;
    uint32_t len;

    qtest_writeb(vm->qts, CTRL, VIRTIO_NET_CTRL_MQ);
    qtest_writeb(vm->qts, CTRL + 1, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    qtest_writew(vm->qts, CTRL + 2, pairs);
    qtest_writeb(vm->qts, CTRL + 4, 0xff);
    drv_send(q, (DrvSegment[]) {
        { CTRL, 2, false },
        { CTRL + 2, 2, false },
        { CTRL + 4, 1, true },
    }, 3, false);
    drv_wait_used(q, &id, &len);
    g_assert_cmpuint(qtest_readb(vm->qts, CTRL + 4), ==, VIRTIO_NET_OK);
}

/* A queue that is not enabled takes nothing; once it is, it does. */
static void test_disabled(gconstpointer data)
{
    const Kind *k = data;
    RelayVm vm;
    VubRing *tx, *second;
    uint16_t head, late;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, k, "", true);
    tx = vub_wait_ring(vm.b, TX, 1);
    g_assert_true(vub_enabled(vm.b, TX));
    g_assert_false(vub_enabled(vm.b, 3));
    late = transmit(&vm, 3, 9, 500);
    head = transmit(&vm, TX, 1, 100);
    expect_packet(&vm, tx, TX, 1, 100, head);
    g_assert_false(vub_enabled(vm.b, 3));
    if (vub_starts(vm.b, 3)) {
        g_assert_null(vub_try_pop(vub_wait_ring(vm.b, 3, 1)));
    }

    set_pairs(&vm, 2);
    second = vub_wait_ring(vm.b, 3, 1);
    expect_packet(&vm, second, 3, 9, 500, late);
    g_assert_true(vub_enabled(vm.b, 3));

    /* And off again, with one in flight that is completed later. */
    late = transmit(&vm, 3, 10, 600);
    {
        VubRequest *req = vub_pop(second);

        set_pairs(&vm, 1);
        g_assert_false(vub_enabled(vm.b, 3));
        rvm_check_out(req, 0, 10, 600);
        vub_done(req, 0);
    }
    head = transmit(&vm, TX, 2, 100);
    expect_packet(&vm, tx, TX, 2, 100, head);
    set_pairs(&vm, 2);
    {
        uint16_t again = transmit(&vm, 3, 11, 700);
        VubRing *r = vub_wait_ring(vm.b, 3, 1);
        uint16_t id;
        uint32_t len;

        drv_wait_used(&vm.q[3], &id, &len);
        g_assert_cmpuint(id, ==, late);
        expect_packet(&vm, r, 3, 11, 700, again);
    }
    rvm_quit(&vm);
}

/* The back end goes and comes again, with buffers and packets in flight. */
static void test_reconnect(gconstpointer data)
{
    RelayVm vm;
    VubRing *rx, *tx;
    VubRequest *old[4];
    uint16_t head[4];
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    if (((const Kind *)data)->features & PACKED) {
        g_test_skip("QEMU's card miscounts when it drops from a packed ring");
        return;
    }
    run(&vm, data, ",reconnect-ms=1", false);
    rx = vub_wait_ring(vm.b, RX, 1);
    tx = vub_wait_ring(vm.b, TX, 1);
    post_rx(&vm, 100);
    receive(&vm, rx, 1, 100);
    for (i = 0; i < 4; i++) {
        head[i] = transmit(&vm, TX, i, 1000 + i);
        old[i] = vub_pop(tx);
    }
    vub_disconnect(vm.b, false);
    rx = vub_wait_ring(vm.b, RX, 2);
    tx = vub_wait_ring(vm.b, TX, 2);
    /* A card without a link drops what it was to send: QEMU's has. */
    for (i = 0; i < 4; i++) {
        drv_expect_used(&vm.q[TX], head[i], 0);
        vub_done(old[i], 0);
    }
    head[0] = transmit(&vm, TX, 5, 1500);
    expect_packet(&vm, tx, TX, 5, 1500, head[0]);
    receive(&vm, rx, 2, 200);
    drv_expect_none(&vm.q[TX]);
    /* A new back end, a new table. */
    g_assert_cmpuint(vub_count(vm.b, VUB_SET_MEM_TABLE), ==, 2);
    rvm_quit(&vm);
}

/* Root table, context table and one level of pages of 1 GiB. */
#define DMAR 0xfed90000
#define ROOT 0x600000
#define CONTEXT 0x601000
#define LEVEL3 0x602000
#define IOVA (4ULL << 30)

static void enable_iommu(RelayVm *vm)
{
    QTestState *qts = vm->qts;

    qtest_memset(qts, ROOT, 0, 0x3000);
    qtest_writeq(qts, ROOT, CONTEXT | 1);
    qtest_writeq(qts, CONTEXT + (RVM_SLOT << 3) * 16, LEVEL3 | 1);
    /* 39 bits, domain 1 */
    qtest_writeq(qts, CONTEXT + (RVM_SLOT << 3) * 16 + 8, 1 | 1 << 8);
    qtest_writeq(qts, LEVEL3 + 4 * 8, 0x83);
    qtest_writeq(qts, DMAR + 0x20, ROOT);
    qtest_writel(qts, DMAR + 0x18, 1u << 30);
    g_assert_cmphex(qtest_readl(qts, DMAR + 0x1c) & (1u << 30), !=, 0);
    qtest_writel(qts, DMAR + 0x18, 1u << 31);
    g_assert_cmphex(qtest_readl(qts, DMAR + 0x1c) & (1u << 31), !=, 0);
}

/* The guest's addresses are not physical ones; the back end knows neither. */
static void test_iommu(gconstpointer data)
{
    const Kind *k = data;
    g_autofree char *props = g_strdup_printf(",iommu_platform=on%s",
                                             k->props);
    VubRequest *req[4];
    uint16_t head[4];
    RelayVm vm;
    VubRing *r;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_init(&vm);
    vm.machine = "q35";
    vm.relay = k->relay;
    vm.props = props;
    vm.more = "-object iothread,id=io0 -device intel-iommu";
    vm.iova = IOVA;
    vm.wanted = VUB_BIT(VIRTIO_F_VERSION_1) | INDIRECT | k->features |
                VUB_BIT(VIRTIO_F_IOMMU_PLATFORM);
    rvm_start(&vm);
    enable_iommu(&vm);
    rvm_drive(&vm);
    g_assert_cmphex(vm.features, ==, vm.wanted);
    r = vub_wait_ring(vm.b, 1, 1);
    vm.b->gives_up = true;
    for (i = 0; i < 4; i++) {
        head[i] = rvm_send_tag(&vm, 1, i);
        req[i] = rvm_expect_tag(r, i);
    }
    if (!(k->features & PACKED)) {
        rvm_answer(req[3]);
        rvm_check_answer(&vm, 1, head[3], 3);
    } else {
        vub_request_free(req[3]);
    }
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
    r = vub_wait_ring(vm.b, 1, 2);
    for (i = 0; i < 3 + !!(k->features & PACKED); i++) {
        rvm_answer(rvm_expect_tag(r, i));
        rvm_check_answer(&vm, 1, head[i], i);
    }
    for (i = 0; i < 3; i++) {
        vub_request_free(req[i]);
    }
    g_assert_cmpuint(vub_count(vm.b, VUB_IOTLB_MSG), ==, 0);
    g_assert_cmphex(vm.b->acked_features & VUB_BIT(VIRTIO_F_IOMMU_PLATFORM),
                    ==, 0);
    g_assert_cmpuint(vub_count(vm.b, VUB_SET_MEM_TABLE), ==, 1);
    rvm_quit(&vm);
}

static void add(const char *name, GTestDataFunc test)
{
    unsigned i;

    for (i = 0; i < G_N_ELEMENTS(kinds); i++) {
        g_autofree char *path = g_strdup_printf("relay/%s/%s", name,
                                                kinds[i].name);

        qtest_add_data_func(path, &kinds[i], test);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (qtest_has_device("virtio-net-pci")) {
        add("net/traffic", test_traffic);
        add("net/stop", test_stop);
        add("net/masked", test_masked);
        add("net/disabled", test_disabled);
        add("net/reconnect", test_reconnect);
    }
    add("iommu", test_iommu);
    return g_test_run();
}
