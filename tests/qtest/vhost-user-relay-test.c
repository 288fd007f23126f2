/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: what the back end is told, and what it is not
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "dedup-qtest.h"
#include "relay-vm.h"

/* A kind of device, and a queue of it on which anything may be sent. */
typedef struct Device {
    const char *name, *props;
    unsigned nqueues, queue;
    bool config;
} Device;

static const Device devices[] = {
    { RVM_FS, "", 2, 1 },
    { RVM_BLK, "", 1, 0, true },
    { "vhost-user-scsi-pci", "", 3, 2 },
    { "vhost-user-vsock-pci", "", 3, 1, true },
    { "vhost-user-rng-pci", "", 1, 0 },
    { "vhost-user-i2c-pci", "", 1, 0 },
    { "vhost-user-gpio-pci", "", 2, 0, true },
    { "vhost-user-input-pci", "", 2, 1, true },
    { "vhost-user-snd-pci", "", 4, 0, true },
};

/* RAM of QEMU's that a descriptor could be: any file that is mapped there. */
static bool is_ram(RelayVm *vm, const struct stat *st)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/maps",
                                            qtest_pid(vm->qts));
    g_autofree char *maps = NULL;
    g_auto(GStrv) lines = NULL;
    char **line;

    g_assert_true(g_file_get_contents(path, &maps, NULL, NULL));
    lines = g_strsplit(maps, "\n", -1);
    for (line = lines; *line; line++) {
        unsigned long start, end;
        unsigned major, minor;
        unsigned long long ino;

        if (sscanf(*line, "%lx-%lx %*s %*x %x:%x %llu", &start, &end, &major,
                   &minor, &ino) == 5 && ino == st->st_ino &&
            end - start >= 16 * MiB) {
            return true;
        }
    }
    return false;
}

/* The one region, sealed, and nothing of the guest's. */
static void check_table(RelayVm *vm)
{
    const VubMessage *m = vub_wait_message(vm->b, VUB_SET_MEM_TABLE, 1);
    const VubRegion *region = &m->table.regions[0];
    struct stat st;
    int seals;

    g_assert_cmpuint(m->table.n, ==, 1);
    g_assert_cmpint(m->nfds, ==, 1);
    g_assert_cmphex(region->gpa, ==, RVM_GPA);
    g_assert_cmphex(region->user, ==, RVM_GPA);
    g_assert_cmpuint(region->offset, ==, 0);
    g_assert_cmpint(fstat(m->fds[0], &st), ==, 0);
    g_assert_cmpint(st.st_size, ==, region->size);
    seals = fcntl(m->fds[0], F_GET_SEALS);
    g_assert_cmphex(seals, ==, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    g_assert_cmpuint(vub_count(vm->b, VUB_SET_MEM_TABLE), ==, 1);
}

/* Of all descriptors that were sent. */
static void check_fds(RelayVm *vm)
{
    const VubMessage *table = vub_message(vm->b, VUB_SET_MEM_TABLE, 0);
    g_autofree char *maps = NULL;
    struct stat area, st;
    unsigned i, k;
    int j;

    g_assert_cmpint(fstat(table->fds[0], &area), ==, 0);
    for (i = 0; i < VUB_MAX; i++) {
        const VubMessage *m;

        for (k = 0; (m = vub_message(vm->b, i, k)); k++) {
            for (j = 0; j < m->nfds; j++) {
                g_autofree char *path = NULL, *target = NULL;

                g_assert_cmpint(fstat(m->fds[j], &st), ==, 0);
                if (st.st_ino == area.st_ino) {
                    g_assert_cmpuint(i, ==, VUB_SET_MEM_TABLE);
                    continue;
                }
                path = g_strdup_printf("/proc/self/fd/%d", m->fds[j]);
                target = g_file_read_link(path, NULL);
                if (i == VUB_SET_VRING_KICK || i == VUB_SET_VRING_CALL ||
                    i == VUB_SET_VRING_ERR) {
                    g_assert_cmpstr(target, ==, "anon_inode:[eventfd]");
                } else {
                    g_assert_false(is_ram(vm, &st));
                    g_assert_false(g_str_has_prefix(target, "/memfd:"));
                }
            }
        }
    }
}

static void check_features(RelayVm *vm, const VubMessage *features,
                           const VubMessage *protocol)
{
    const uint64_t never = VUB_BIT(VIRTIO_F_RING_PACKED) |
                           VUB_BIT(VIRTIO_F_IOMMU_PLATFORM) |
                           VUB_BIT(VIRTIO_F_IN_ORDER) |
                           VUB_BIT(VUB_F_LOG_ALL) |
                           VUB_BIT(38);       /* NOTIFICATION_DATA */
    const uint64_t never_protocol =
        VUB_BIT(VHOST_USER_PROTOCOL_F_LOG_SHMFD) |
        VUB_BIT(VHOST_USER_PROTOCOL_F_PAGEFAULT) |
        VUB_BIT(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD) |
        VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS) |
        VUB_BIT(VHOST_USER_PROTOCOL_F_HOST_NOTIFIER);

    g_assert_cmphex(features->u64 & never, ==, 0);
    /* No more than was offered, and what makes it modern. */
    g_assert_cmphex(features->u64 & ~vm->b->features, ==, 0);
    g_assert_cmphex(features->u64 & VUB_BIT(VIRTIO_F_VERSION_1), !=, 0);
    g_assert_cmphex(features->u64 & VUB_BIT(VUB_F_PROTOCOL_FEATURES), !=, 0);
    g_assert_cmphex(protocol->u64 & never_protocol, ==, 0);
    g_assert_cmphex(protocol->u64 & VUB_BIT(VHOST_USER_PROTOCOL_F_REPLY_ACK),
                    !=, 0);
}

/* Every SET_FEATURES, not only the last. */
static void check_all_features(RelayVm *vm)
{
    const VubMessage *m;
    unsigned i;

    for (i = 0; (m = vub_message(vm->b, VUB_SET_FEATURES, i)); i++) {
        check_features(vm, m, vub_message(vm->b, VUB_SET_PROTOCOL_FEATURES,
                                          0));
    }
    g_assert_cmpuint(i, >, 0);
}

static void check_rings(RelayVm *vm)
{
    const VubRegion *region = &vub_table(vm->b)->regions[0];
    const VubMessage *m;
    unsigned i, num;

    g_assert_cmpuint(vub_count(vm->b, VUB_SET_VRING_ADDR), >, 0);
    for (i = 0; (m = vub_message(vm->b, VUB_SET_VRING_ADDR, i)); i++) {
        num = vub_wait_ring(vm->b, m->addr.index, 1)->num;
        g_assert_cmphex(m->addr.desc, >=, region->gpa);
        g_assert_cmphex(m->addr.desc + num * 16, <=,
                        region->gpa + region->size);
        g_assert_cmphex(m->addr.avail, >=, region->gpa);
        g_assert_cmphex(m->addr.avail + num * 2 + 6, <=,
                        region->gpa + region->size);
        g_assert_cmphex(m->addr.used, >=, region->gpa);
        g_assert_cmphex(m->addr.used + num * 8 + 6, <=,
                        region->gpa + region->size);
        g_assert_cmphex(m->addr.flags, ==, 0);
    }
    for (i = 0; (m = vub_message(vm->b, VUB_SET_VRING_BASE, i)); i++) {
        g_assert_cmpuint(m->state.num, ==, 0);
    }
}

static void check_never_sent(RelayVm *vm)
{
    g_assert_cmpuint(vub_count(vm->b, VUB_SET_LOG_BASE), ==, 0);
    g_assert_cmpuint(vub_count(vm->b, VUB_IOTLB_MSG), ==, 0);
    g_assert_cmpuint(vub_count(vm->b, VUB_ADD_MEM_REG), ==, 0);
    g_assert_cmpuint(vub_count(vm->b, VUB_REM_MEM_REG), ==, 0);
    g_assert_cmpuint(vub_count(vm->b, VUB_SET_INFLIGHT_FD), ==, 0);
    g_assert_cmpuint(vub_count(vm->b, VUB_SET_MEM_TABLE), ==, 1);
}

static void run(RelayVm *vm, const Device *d)
{
    rvm_init(vm);
    vm->device = d->name;
    vm->props = d->props;
    vm->nqueues = d->nqueues;
    if (d->config) {
        vm->b->protocol_features |= VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIG);
    }
    rvm_start(vm);
    rvm_drive(vm);
}

/* Each kind of device, on anonymous RAM: one request there and back. */
static void test_device(gconstpointer data)
{
    const Device *d = data;
    RelayVm vm;
    VubRing *r;
    uint16_t head;

    run(&vm, d);
    r = vub_wait_ring(vm.b, d->queue, 1);
    head = rvm_send_tag(&vm, d->queue, 1);
    rvm_answer(rvm_expect_tag(r, 1));
    rvm_check_answer(&vm, d->queue, head, 1);
    if (!rvm_plain()) {
        check_table(&vm);
        check_fds(&vm);
        check_all_features(&vm);
        check_rings(&vm);
        check_never_sent(&vm);
        g_assert_cmpuint(r->num, ==, vm.q[d->queue].num);
        g_assert_true(vub_enabled(vm.b, d->queue));
    }
    rvm_quit(&vm);
}

/*
 * The guest has all that it is offered, and the back end offers all that there
 * is; what is between the guest and QEMU stays there.
 */
static void test_features(gconstpointer data)
{
    RelayVm vm;
    VubRing *r;
    uint16_t head;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_init(&vm);
    vm.props = ",packed=on,in_order=on,iommu_platform=on";
    vm.wanted = ~VUB_BIT(VUB_F_PROTOCOL_FEATURES);
    vm.b->features = data ? VUB_BIT(VIRTIO_F_VERSION_1) |
                            VUB_BIT(VUB_F_PROTOCOL_FEATURES)
                          : VUB_ALL_FEATURES;
    rvm_start(&vm);
    rvm_drive(&vm);
    /* Whatever the back end has. */
    g_assert_cmphex(vm.features & VUB_BIT(VIRTIO_F_RING_PACKED), !=, 0);
    g_assert_cmphex(vm.features & VUB_BIT(VIRTIO_F_IN_ORDER), !=, 0);
    g_assert_cmphex(vm.features & VUB_BIT(VIRTIO_F_IOMMU_PLATFORM), !=, 0);
    g_assert_cmphex(vm.features & VUB_BIT(VIRTIO_RING_F_EVENT_IDX), !=, 0);
    g_assert_cmphex(vm.features & VUB_BIT(38), ==, 0);
    r = vub_wait_ring(vm.b, 1, 1);
    g_assert_cmpint(r->event_idx, ==, !data);
    head = rvm_send_tag(&vm, 1, 1);
    rvm_answer(rvm_expect_tag(r, 1));
    rvm_check_answer(&vm, 1, head, 1);
    check_all_features(&vm);
    check_never_sent(&vm);
    rvm_quit(&vm);
}

/* RAM comes and goes, and the back end hears nothing. */
static void test_hotplug(void)
{
    RelayVm vm;
    VubRing *r;
    uint16_t head;
    unsigned messages;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_init(&vm);
    vm.ram = "-m 128M,slots=2,maxmem=1G ";
    rvm_start(&vm);
    rvm_drive(&vm);
    r = vub_wait_ring(vm.b, 1, 1);
    messages = vub_count(vm.b, VUB_SET_MEM_TABLE);
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'object-add', 'arguments':"
                             " { 'qom-type': 'memory-backend-ram', 'id': 'm1',"
                             " 'size': %d } }", (int)(128 * MiB));
    qtest_qmp_device_add(vm.qts, "pc-dimm", "dimm1", "{ 'memdev': 'm1' }");
    head = rvm_send_tag(&vm, 1, 1);
    rvm_answer(rvm_expect_tag(r, 1));
    rvm_check_answer(&vm, 1, head, 1);
    /* A request that is in the new memory. */
    rvm_fill(&vm, 4 * GiB, 9, 5000);
    qtest_memset(vm.qts, 4 * GiB + 0x8000, 0, 5000);
    head = drv_send(&vm.q[1], (DrvSegment[]) {
        { 4 * GiB, 5000, false },
        { 4 * GiB + 0x8000, 5000, true },
    }, 2, true);
    {
        VubRequest *req = vub_pop(r);

        rvm_check_out(req, 0, 9, 5000);
        rvm_write_in(req, 0, 10, 5000);
        vub_done(req, 5000);
    }
    drv_expect_used(&vm.q[1], head, 5000);
    rvm_check(&vm, 4 * GiB + 0x8000, 10, 5000);
    g_assert_cmpuint(vub_count(vm.b, VUB_SET_MEM_TABLE), ==, messages);
    check_never_sent(&vm);
    rvm_quit(&vm);
}

/* Dirty logging goes by the back end. */
static void test_no_log(void)
{
    RelayVm vm;
    VubRing *r;
    uint16_t head;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_run(&vm, RVM_BLK, "");
    r = vub_wait_ring(vm.b, 0, 1);
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'migrate-set-parameters',"
                             " 'arguments': { 'max-bandwidth': 1024 } }");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': 'exec:cat > /dev/null' } }");
    head = rvm_send_tag(&vm, 0, 1);
    rvm_answer(rvm_expect_tag(r, 1));
    rvm_check_answer(&vm, 0, head, 1);
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'migrate_cancel' }");
    head = rvm_send_tag(&vm, 0, 2);
    rvm_answer(rvm_expect_tag(r, 2));
    rvm_check_answer(&vm, 0, head, 2);
    check_never_sent(&vm);
    check_all_features(&vm);
    rvm_quit(&vm);
}

/* Starts and stops: the table is sent once, each start has a ring at 0. */
static void test_restart(void)
{
    RelayVm vm;
    VubRing *r;
    uint16_t head;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_run(&vm, RVM_FS, "");
    for (i = 1; i < 20; i++) {
        r = vub_wait_ring(vm.b, 1, i);
        g_assert_cmpuint(r->base, ==, 0);
        g_assert_cmpuint(r->used_idx, ==, 0);
        head = rvm_send_tag(&vm, 1, i);
        rvm_answer(rvm_expect_tag(r, i));
        rvm_check_answer(&vm, 1, head, i);
        if (i % 3 == 0) {
            rvm_drive_again(&vm);
        } else {
            qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
            qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
        }
    }
    check_never_sent(&vm);
    check_rings(&vm);
    rvm_quit(&vm);
}

#define SCANNER "-object dedup-scanner,id=ds0,run=off"

/* A second device beside the first, with a back end of its own. */
static VubBackend *add_second(GString *more, const char *relay)
{
    VubBackend *b = vub_new();

    b->features = VUB_PLAIN_FEATURES;
    b->protocol_features = VUB_PLAIN_PROTOCOL;
    vub_start(b);
    g_string_append_printf(more, " -chardev socket,id=c1,path=%s -device "
                           "vhost-user-fs-pci,tag=u,id=d1,chardev=c1%s",
                           b->path, relay);
    return b;
}

/* Whom merging is blocked by: those without a relay, by name. */
static void test_blocked(gconstpointer data)
{
    const char *second = data;
    g_autoptr(GString) more = g_string_new(SCANNER);
    g_autofree char *detail = NULL;
    VubBackend *b = NULL;
    RelayVm vm;

    if (rvm_skip_plain() || dedup_skip()) {
        return;
    }
    rvm_init(&vm);
    if (second) {
        b = add_second(more, second);
    }
    vm.more = more->str;
    rvm_start(&vm);
    rvm_drive(&vm);
    detail = dedup_blocked(vm.qts, "ram-exported");
    if (second && *second == '\0') {
        g_assert_nonnull(detail);
        g_assert_nonnull(strstr(detail, "'c1'"));
        g_assert_null(strstr(detail, "'c0'"));
        g_assert_true(b->tables->len == 0);
    } else {
        g_assert_null(detail);
    }
    rvm_quit(&vm);
    if (b) {
        vub_free(b);
    }
}

/* relay=auto: on if there is a scanner. */
static void test_auto(gconstpointer data)
{
    bool scanner = GPOINTER_TO_INT(data);
    g_autofree char *detail = NULL;
    const VubMessage *m;
    RelayVm vm;
    QDict *resp;

    if (rvm_skip_plain() || dedup_skip()) {
        return;
    }
    rvm_init(&vm);
    vm.relay = ",relay=auto";
    vm.machine = "pc,memory-backend=pc.ram";
    vm.ram = "-object memory-backend-memfd,id=pc.ram,size=128M,share=on ";
    vm.more = scanner ? SCANNER : "";
    vm.b->features = VUB_PLAIN_FEATURES;
    vm.b->protocol_features = VUB_PLAIN_PROTOCOL;
    rvm_start(&vm);
    rvm_drive(&vm);
    m = vub_wait_message(vm.b, VUB_SET_MEM_TABLE, 1);
    resp = qtest_qmp(vm.qts, "{ 'execute': 'query-vhost-user-relays' }");
    if (scanner) {
        check_table(&vm);
        detail = dedup_blocked(vm.qts, "ram-exported");
        g_assert_null(detail);
        g_assert_cmpint(qlist_size(qdict_get_qlist(resp, "return")), ==, 1);
    } else {
        g_assert_cmphex(m->table.regions[0].gpa, <, RVM_GPA);
        g_assert_cmpint(qlist_size(qdict_get_qlist(resp, "return")), ==, 0);
    }
    qobject_unref(resp);
    rvm_quit(&vm);
}

/* QEMU with a device whose options are wrong must say so and end. */
static void assert_refused(const char *args, const char *says)
{
    VubBackend *b = vub_new();
    g_autofree char *all = NULL, *err = NULL;

    b->protocol_features |= VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIG);
    vub_start(b);
    all = g_strdup_printf("-chardev socket,id=c0,path=%s %s", b->path, args);
    err = dedup_run_failing("", all);
    g_test_message("%s: %s", args, err);
    g_assert_nonnull(strstr(err, says));
    vub_free(b);
}

static void test_bad_options(void)
{
    static const struct {
        const char *args, *says;
    } bad[] = {
        { "-device " RVM_FS ",chardev=c0,relay=on,relay-size=4096",
          "relay-size" },
        { "-device " RVM_FS ",chardev=c0,relay=on,relay-size=2000001",
          "relay-size" },
        { "-device " RVM_FS ",chardev=c0,relay=on,relay-size=1T",
          "relay-size" },
        { "-device " RVM_FS ",chardev=c0,relay=on,relay-size=nothing",
          "relay-size" },
        { "-device " RVM_FS ",chardev=c0,relay=on,iothread=nope", "nope" },
        { "-device " RVM_FS ",chardev=c0,relay=maybe", "maybe" },
        { "-device " RVM_BLK ",chardev=c0,relay=on,relay-size=4096",
          "relay-size" },
        { "-object iothread,id=io0 -device " RVM_FS
          ",chardev=c0,iothread=io0", "relay=on" },
        { "-device " RVM_FS ",chardev=c0,relay-size=4M", "relay=on" },
        { "-netdev vhost-user,id=n0,chardev=c0,relay=on,relay-size=4096",
          "relay-size" },
        { "-netdev vhost-user,id=n0,chardev=c0,relay=on,iothread=nope",
          "nope" },
        { "-object cryptodev-vhost-user,id=cr0,chardev=c0,relay=on",
          "relay" },
    };
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    for (i = 0; i < G_N_ELEMENTS(bad); i++) {
        assert_refused(bad[i].args, bad[i].says);
    }
    if (qtest_has_device("vhost-user-gpu-pci")) {
        assert_refused("-device vhost-user-gpu-pci,chardev=c0,relay=on",
                       "relay");
    }
}

/* More queues than there is room for, of which the driver uses few. */
static void test_many_rings(void)
{
    RelayVm vm;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_init(&vm);
    vm.relay = ",relay=on,relay-size=1M";
    vm.props = ",queue-size=1024,num-request-queues=60";
    rvm_start(&vm);
    vm.nqueues = 2;
    rvm_drive(&vm);
    /* Two rings it has room for. */
    {
        VubRing *r = vub_wait_ring(vm.b, 1, 1);
        uint16_t head = rvm_send_tag(&vm, 1, 1);

        rvm_answer(rvm_expect_tag(r, 1));
        rvm_check_answer(&vm, 1, head, 1);
    }
    rvm_quit(&vm);
}

int main(int argc, char **argv)
{
    unsigned i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < G_N_ELEMENTS(devices); i++) {
        g_autofree char *type = g_strdup(devices[i].name);
        g_autofree char *path = NULL;

        type[strcspn(type, ",")] = '\0';
        path = g_strdup_printf("relay/device/%s", type);
        if (qtest_has_device(type)) {
            qtest_add_data_func(path, &devices[i], test_device);
        }
    }
    qtest_add_data_func("relay/features/all", NULL, test_features);
    qtest_add_data_func("relay/features/few", "", test_features);
    qtest_add_func("relay/hotplug", test_hotplug);
    qtest_add_func("relay/no-log", test_no_log);
    qtest_add_func("relay/restart", test_restart);
    qtest_add_data_func("relay/blocked/none", NULL, test_blocked);
    qtest_add_data_func("relay/blocked/second", "", test_blocked);
    qtest_add_data_func("relay/blocked/both", ",relay=on", test_blocked);
    qtest_add_data_func("relay/auto/on", GINT_TO_POINTER(true), test_auto);
    qtest_add_data_func("relay/auto/off", GINT_TO_POINTER(false), test_auto);
    qtest_add_func("relay/bad-options", test_bad_options);
    qtest_add_func("relay/many-rings", test_many_rings);
    return g_test_run();
}
