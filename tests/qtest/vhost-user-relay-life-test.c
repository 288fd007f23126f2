/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: migration, back ends that go, devices that go
 */

#include "qemu/osdep.h"
#include "libqos/pci-pc.h"
#include "relay-vm.h"
#include <glib/gstdio.h>

#define INDIRECT VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC)
#define EVENT VUB_BIT(VIRTIO_RING_F_EVENT_IDX)
#define PACKED VUB_BIT(VIRTIO_F_RING_PACKED)

typedef struct Kind {
    const char *name, *device, *props;
    uint64_t features;
    const char *from, *to;       /* relay of source and destination */
} Kind;

#define ON ",relay=on"
#define IO ",relay=on,iothread=io0"

static const Kind kinds[] = {
    { "fs", RVM_FS, "", INDIRECT, ON, ON },
    { "fs-on-off", RVM_FS, "", INDIRECT, ON, "" },
    { "fs-off-on", RVM_FS, "", INDIRECT, "", ON },
    { "fs-packed", RVM_FS, ",packed=on", PACKED | INDIRECT, ON, ON },
    { "fs-packed-chains", RVM_FS, ",packed=on", PACKED, ON, IO },
    { "blk", RVM_BLK, "", INDIRECT | EVENT, ON, ON },
    { "blk-iothread", RVM_BLK, "", INDIRECT, IO, IO },
    { "blk-on-off", RVM_BLK, "", INDIRECT | EVENT, ON, "" },
    { "blk-off-on", RVM_BLK, "", 0, "", IO },
};

static bool is_blk(const Kind *k)
{
    return g_str_has_prefix(k->device, RVM_BLK);
}

static void init(RelayVm *vm, const Kind *k, const char *relay)
{
    rvm_init(vm);
    vm->device = k->device;
    vm->props = k->props;
    vm->relay = relay;
    vm->more = "-object iothread,id=io0";
    vm->wanted = VUB_BIT(VIRTIO_F_VERSION_1) | k->features;
    vm->b->gives_up = true;
    if (!*relay) {
        vm->machine = "pc,memory-backend=pc.ram";
        vm->ram = "-object memory-backend-memfd,id=pc.ram,size=128M,"
                  "share=on ";
        vm->b->features = VUB_PLAIN_FEATURES;
        vm->b->protocol_features = VUB_PLAIN_PROTOCOL |
            VUB_BIT(VHOST_USER_PROTOCOL_F_DEVICE_STATE);
    }
    if (is_blk(k)) {
        vm->b->protocol_features |= VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIG);
        vm->nqueues = 1;
    }
}

static void migrate(RelayVm *from, const char *file)
{
    g_autofree char *uri = g_strdup_printf("exec:cat > %s", file);
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

    qtest_qmp_assert_success(from->qts, "{ 'execute': 'migrate',"
                             " 'arguments': { 'uri': %s } }", uri);
    for (;;) {
        QDict *resp = qtest_qmp(from->qts, "{ 'execute': 'query-migrate' }");
        QDict *info = qdict_get_qdict(resp, "return");
        const char *status = qdict_get_try_str(info, "status");
        bool done = !g_strcmp0(status, "completed");

        if (!g_strcmp0(status, "failed")) {
            g_error("migration failed: %s",
                    qdict_get_try_str(info, "error-desc"));
        }
        qobject_unref(resp);
        if (done) {
            return;
        }
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
    }
}

/* The driver of @from goes on with the device of @to. */
static void take_over(RelayVm *to, RelayVm *from)
{
    unsigned i;

    to->bus = qpci_new_pc(to->qts, NULL);
    to->dev = g_memdup2(from->dev, sizeof(*from->dev));
    to->dev->pdev = g_memdup2(from->dev->pdev, sizeof(*from->dev->pdev));
    to->dev->pdev->bus = to->bus;
    to->features = from->features;
    for (i = 0; i < to->nqueues; i++) {
        to->q[i] = from->q[i];
        to->q[i].qts = to->qts;
        to->q[i].dev = to->dev;
        to->q[i].vq.vq.vdev = &to->dev->vdev;
    }
}

/* What the source's back end did not do, the destination's does, in order. */
static void test_migrate(gconstpointer data)
{
    const Kind *k = data;
    unsigned queue = is_blk(k) ? 0 : 1, i;
    bool ordered = k->features & PACKED;
    bool relayed = *k->from;
    g_autofree char *dir = g_strdup("/tmp/relay-migrate-XXXXXX");
    g_autofree char *file = NULL, *incoming = NULL;
    VubRequest *req[8] = { NULL };
    uint16_t head[8], new;
    bool done[8] = { 0 };
    RelayVm from, to;
    VubRing *r;

    if (rvm_skip_plain()) {
        return;
    }
    g_assert_nonnull(g_mkdtemp(dir));
    file = g_strdup_printf("%s/state", dir);
    init(&from, k, k->from);
    rvm_start(&from);
    rvm_drive(&from);
    g_assert_cmphex(from.features, ==, from.wanted);
    strcpy((char *)from.b->state, "state of the back end");
    r = vub_wait_ring(from.b, queue, 1);
    for (i = 0; i < 8; i++) {
        from.q[queue].high_first = i % 3 == 1;
        head[i] = rvm_send_tag(&from, queue, i);
        req[i] = rvm_expect_tag(r, i);
    }
    for (i = 0; i < 8; i++) {
        /* Without a relay a back end is to end what it has begun. */
        if (!relayed || (ordered ? i < 3 : i == 5 || i == 2)) {
            rvm_answer(req[i]);
            req[i] = NULL;
            rvm_check_answer(&from, queue, head[i], i);
            done[i] = true;
        }
    }
    migrate(&from, file);
    g_assert_true(qatomic_read(&r->stopped));

    init(&to, k, k->to);
    incoming = g_strdup_printf("exec:cat %s", file);
    to.more = "-object iothread,id=io0 -incoming defer";
    rvm_start(&to);
    /* Not before somebody listens: the event comes once. */
    qtest_qmp_assert_success(to.qts, "{ 'execute': 'migrate-incoming',"
                             " 'arguments': { 'uri': %s } }", incoming);
    qtest_qmp_eventwait(to.qts, "RESUME");
    take_over(&to, &from);
    r = vub_wait_ring(to.b, queue, 1);
    for (i = 0; i < 8; i++) {
        if (!done[i]) {
            rvm_answer(rvm_expect_tag(r, i));
            rvm_check_answer(&to, queue, head[i], i);
        }
    }
    new = rvm_send_tag(&to, queue, 100);
    rvm_answer(rvm_expect_tag(r, 100));
    rvm_check_answer(&to, queue, new, 100);
    g_assert_null(vub_try_pop(r));
    drv_expect_none(&to.q[queue]);
    if (!is_blk(k)) {
        g_assert_cmpstr((char *)to.b->state, ==, "state of the back end");
    }
    g_assert_cmpuint(vub_count(from.b, VUB_SET_LOG_BASE) == 0, ==, relayed);

    /* The source goes on as if nothing had been. */
    qtest_qmp_assert_success(from.qts, "{ 'execute': 'cont' }");
    r = vub_wait_ring(from.b, queue, 2);
    for (i = 0; i < 8; i++) {
        if (!done[i]) {
            rvm_answer(rvm_expect_tag(r, i));
            rvm_check_answer(&from, queue, head[i], i);
            vub_request_free(req[i]);
        }
    }
    rvm_quit(&to);
    rvm_quit(&from);
    g_unlink(file);
    g_rmdir(dir);
}

/* Devices that survive the end of their back end. */
static const Kind surviving[] = {
    { "blk", RVM_BLK, "", INDIRECT, ON },
    { "blk-event-idx", RVM_BLK, "", INDIRECT | EVENT, ON },
    { "blk-packed", RVM_BLK, ",packed=on", INDIRECT | PACKED, ON },
    { "blk-iothread", RVM_BLK, "", INDIRECT | EVENT, IO },
    { "scsi", "vhost-user-scsi-pci", "", INDIRECT, ON },
};

static unsigned run_surviving(RelayVm *vm, const Kind *k, const char *chardev)
{
    init(vm, k, k->from);
    vm->chardev = chardev;
    if (!is_blk(k)) {
        vm->nqueues = 3;
    }
    rvm_start(vm);
    rvm_drive(vm);
    return is_blk(k) ? 0 : 2;
}

/* Killed with requests in flight, each time, and started again. */
static void test_reconnect(gconstpointer data)
{
    const Kind *k = data;
    bool ordered = k->features & PACKED;
    VubRequest *req[6];
    uint16_t head[6];
    unsigned queue, round, i;
    RelayVm vm;
    VubRing *r;

    if (rvm_skip_plain()) {
        return;
    }
    queue = run_surviving(&vm, k, ",reconnect-ms=1");
    for (round = 1; round < 6; round++) {
        r = vub_wait_ring(vm.b, queue, round * 2 - 1);
        for (i = 0; i < 6; i++) {
            vm.q[queue].high_first = (i + round) % 3 == 1;
            head[i] = rvm_send_tag(&vm, queue, round * 10 + i);
            req[i] = rvm_expect_tag(r, round * 10 + i);
        }
        if (!ordered) {
            /* This one is done: whether the guest knows or not. */
            rvm_answer(req[4]);
            rvm_check_answer(&vm, queue, head[4], round * 10 + 4);
        }
        vub_disconnect(vm.b, false);
        r = vub_wait_ring(vm.b, queue, round * 2);
        /* The dead one's last stores are into what nobody has any more. */
        for (i = 0; i < 6; i++) {
            if (ordered || i != 4) {
                vub_fill(req[i], 0, 0x66, 16);
                vub_done(req[i], 16);
            }
        }
        for (i = 0; i < 6; i++) {
            if (ordered || i != 4) {
                rvm_answer(rvm_expect_tag(r, round * 10 + i));
                rvm_check_answer(&vm, queue, head[i], round * 10 + i);
            }
        }
        g_assert_null(vub_try_pop(r));
        drv_expect_none(&vm.q[queue]);
        /* Idle, it goes once more. */
        vub_disconnect(vm.b, false);
        vub_wait_ring(vm.b, queue, round * 2 + 1);
    }
    /* Each one has its table, and the file of none before. */
    for (i = 1; i < vub_count(vm.b, VUB_SET_MEM_TABLE); i++) {
        const VubMessage *a = vub_message(vm.b, VUB_SET_MEM_TABLE, i - 1);
        const VubMessage *b = vub_message(vm.b, VUB_SET_MEM_TABLE, i);
        struct stat x, y;

        g_assert_cmpuint(b->connection, ==, a->connection + 1);
        g_assert_cmpint(fstat(a->fds[0], &x), ==, 0);
        g_assert_cmpint(fstat(b->fds[0], &y), ==, 0);
        g_assert_cmpuint(x.st_ino, !=, y.st_ino);
    }
    rvm_quit(&vm);
}

/* While there is no back end the guest sends, stops and resets. */
static void test_absent(gconstpointer data)
{
    const Kind *k = data;
    unsigned queue, i;
    uint16_t head[3];
    RelayVm vm;
    VubRing *r;

    if (rvm_skip_plain()) {
        return;
    }
    queue = run_surviving(&vm, k, ",reconnect-ms=1");
    r = vub_wait_ring(vm.b, queue, 1);
    head[0] = rvm_send_tag(&vm, queue, 0);
    vub_request_free(rvm_expect_tag(r, 0));
    vub_disconnect(vm.b, true);
    for (i = 1; i < 3; i++) {
        head[i] = rvm_send_tag(&vm, queue, i);
    }
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
    drv_expect_none(&vm.q[queue]);
    vub_accept(vm.b);
    r = vub_wait_ring(vm.b, queue, 2);
    for (i = 0; i < 3; i++) {
        rvm_answer(rvm_expect_tag(r, i));
        rvm_check_answer(&vm, queue, head[i], i);
    }
    /* A reset while it is away. */
    rvm_send_tag(&vm, queue, 7);
    vub_request_free(rvm_expect_tag(r, 7));
    vub_disconnect(vm.b, true);
    rvm_reset(&vm);
    vub_accept(vm.b);
    i = vub_starts(vm.b, queue);
    vub_wait_message(vm.b, VUB_GET_FEATURES,
                     vub_count(vm.b, VUB_GET_FEATURES) + 0);
    rvm_drive_again(&vm);
    r = vub_wait_ring(vm.b, queue, i + 1);
    head[0] = rvm_send_tag(&vm, queue, 8);
    rvm_answer(rvm_expect_tag(r, 8));
    rvm_check_answer(&vm, queue, head[0], 8);
    rvm_quit(&vm);
}

/* device_del with requests in flight; then another one on the same chardev. */
static void test_unplug(gconstpointer data)
{
    const Kind *k = data;
    unsigned queue = is_blk(k) ? 0 : 1;
    VubRequest *req;
    uint16_t head;
    RelayVm vm;
    VubRing *r;
    QDict *resp;

    if (rvm_skip_plain()) {
        return;
    }
    init(&vm, k, k->from);
    rvm_start(&vm);
    rvm_drive(&vm);
    r = vub_wait_ring(vm.b, queue, 1);
    rvm_send_tag(&vm, queue, 1);
    req = rvm_expect_tag(r, 1);
    rvm_send_tag(&vm, queue, 2);
    qtest_qmp_send(vm.qts, "{ 'execute': 'device_del', 'arguments': {"
                   " 'id': 'd0' } }");
    qobject_unref(qtest_qmp_receive(vm.qts));
    qtest_outl(vm.qts, 0xae08, 1u << RVM_SLOT);
    qtest_qmp_eventwait(vm.qts, "DEVICE_DELETED");
    resp = qtest_qmp(vm.qts, "{ 'execute': 'query-vhost-user-relays' }");
    g_assert_cmpint(qlist_size(qdict_get_qlist(resp, "return")), ==, 0);
    qobject_unref(resp);
    vub_fill(req, 0, 0x66, 16);
    vub_done(req, 16);
    g_assert_true(qatomic_read(&r->stopped));

    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'device_add', 'arguments':"
                             " { 'driver': %s, 'id': 'd1', 'chardev': 'c0',"
                             " 'relay': 'on', 'addr': '4', 'tag': 't' } }",
                             "vhost-user-fs-pci");
    g_free(vm.dev->pdev);
    g_free(vm.dev);
    qpci_free_pc(vm.bus);
    vm.nqueues = 2;
    queue = 1;
    rvm_drive(&vm);
    r = vub_wait_ring(vm.b, 1, is_blk(k) ? 1 : 2);
    head = rvm_send_tag(&vm, 1, 3);
    rvm_answer(rvm_expect_tag(r, 3));
    rvm_check_answer(&vm, 1, head, 3);
    rvm_quit(&vm);
}

static const Kind unplugged[] = {
    { "fs", RVM_FS, "", INDIRECT, ON },
    { "fs-iothread", RVM_FS, "", INDIRECT, IO },
};

static void add(const char *name, const Kind *k, unsigned n,
                GTestDataFunc test)
{
    for (; n--; k++) {
        g_autofree char *path = g_strdup_printf("relay/%s/%s", name, k->name);

        qtest_add_data_func(path, k, test);
    }
}

int main(int argc, char **argv)
{
    unsigned n = G_N_ELEMENTS(surviving);

    g_test_init(&argc, &argv, NULL);
    add("migrate", kinds, G_N_ELEMENTS(kinds), test_migrate);
    if (!qtest_has_device("vhost-user-scsi-pci")) {
        n--;
    }
    add("reconnect", surviving, n, test_reconnect);
    add("absent", surviving, n, test_absent);
    add("unplug", unplugged, G_N_ELEMENTS(unplugged), test_unplug);
    return g_test_run();
}
