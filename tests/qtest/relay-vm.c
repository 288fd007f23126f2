/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A machine with one vhost-user device, its driver and its back end
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "libqos/pci-pc.h"
#include "relay-vm.h"
#include <glib/gstdio.h>

bool rvm_plain(void)
{
    return g_getenv("RELAY_TEST_PLAIN") != NULL;
}

bool rvm_skip_plain(void)
{
    if (rvm_plain()) {
        g_test_skip("needs a relay");
    }
    return rvm_plain();
}

void rvm_init(RelayVm *vm)
{
    *vm = (RelayVm) {
        .device = RVM_FS,
        .props = "",
        .relay = ",relay=on",
        .machine = "pc",
        .ram = "",
        .chardev = "",
        .more = "",
        .nqueues = 2,
        .wanted = VUB_BIT(VIRTIO_F_VERSION_1) |
                  VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC),
    };
    vm->b = vub_new();
    if (rvm_plain()) {
        vm->relay = "";
        vm->machine = "pc,memory-backend=pc.ram";
        vm->ram = "-object memory-backend-memfd,id=pc.ram,size=128M,share=on ";
        vm->b->features = VUB_PLAIN_FEATURES;
        vm->b->protocol_features = VUB_PLAIN_PROTOCOL;
    }
}

/* A test that fails shows what QEMU had to say. */
static void show_stderr(void *opaque)
{
    RelayVm *vm = opaque;
    g_autofree char *said = NULL;

    if (g_file_get_contents(vm->errors, &said, NULL, NULL) && *said) {
        fprintf(stderr, "# QEMU's stderr:\n%s", said);
    }
}

void rvm_start(RelayVm *vm)
{
    g_autofree char *device = NULL;

    vm->dir = g_strdup("/tmp/relay-vm-XXXXXX");
    g_assert_nonnull(g_mkdtemp(vm->dir));
    vm->errors = g_strdup_printf("%s/stderr", vm->dir);
    vub_start(vm->b);
    qtest_add_abrt_handler(show_stderr, vm);
    if (vm->net) {
        device = g_strdup_printf("-netdev vhost-user,id=n0,chardev=c0%s "
                                 "-device %s,id=d0,netdev=n0,addr=%x%s",
                                 vm->relay, vm->device, RVM_SLOT, vm->props);
    } else {
        bool drains = strstr(vm->relay, "relay=on") &&
                      (g_str_equal(vm->device, RVM_FS) ||
                       g_str_equal(vm->device, RVM_BLK));

        /* Our back end ends what it has begun, or it never does. */
        device = g_strdup_printf("-device %s,id=d0,chardev=c0,addr=%x%s%s%s",
                                 vm->device, RVM_SLOT, vm->relay, vm->props,
                                 drains ? ",x-relay-drain-ms=300" : "");
    }
    vm->qts = qtest_initf("-machine %s -nodefaults -display none -m 128M %s"
                          "-chardev socket,id=c0,path=%s%s %s %s 2> %s",
                          vm->machine, vm->ram, vm->b->path, vm->chardev,
                          vm->more, device, vm->errors);
}

/*
 * From reset to DRIVER_OK.  Not libqos's functions: they assert that the
 * status is what they wrote, but a back end may break the device at any time.
 */
static void negotiate(RelayVm *vm)
{
    QVirtioDevice *vdev = &vm->dev->vdev;
    const QVirtioBus *bus = vdev->bus;
    uint8_t status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    unsigned i;

    rvm_reset(vm);
    bus->set_status(vdev, status);
    vm->features = bus->get_features(vdev) & vm->wanted;
    bus->set_features(vdev, vm->features);
    vdev->features = vm->features;
    vdev->features_negotiated = true;
    status |= VIRTIO_CONFIG_S_FEATURES_OK;
    bus->set_status(vdev, status);
    g_assert_cmphex(bus->get_status(vdev) & status, ==, status);
    for (i = 0; i < vm->nqueues; i++) {
        drv_setup(&vm->q[i], vm->dev, i, vm->num, vm->features, vm->iova);
        if (vm->msix) {
            drv_msix(&vm->q[i], i);
        }
    }
    bus->set_status(vdev, status | VIRTIO_CONFIG_S_DRIVER_OK);
}

void rvm_reset(RelayVm *vm)
{
    QVirtioDevice *vdev = &vm->dev->vdev;

    vdev->bus->set_status(vdev, 0);
    g_assert_cmphex(vdev->bus->get_status(vdev), ==, 0);
}

void rvm_drive(RelayVm *vm)
{
    QPCIAddress address = { .devfn = QPCI_DEVFN(RVM_SLOT, 0) };

    vm->bus = qpci_new_pc(vm->qts, NULL);
    vm->dev = virtio_pci_new(vm->bus, &address);
    g_assert_nonnull(vm->dev);
    qvirtio_pci_device_enable(vm->dev);
    if (vm->msix) {
        qpci_msix_enable(vm->dev->pdev);
    }
    negotiate(vm);
}

void rvm_drive_again(RelayVm *vm)
{
    negotiate(vm);
}

void rvm_run(RelayVm *vm, const char *device, const char *props)
{
    rvm_init(vm);
    vm->device = device;
    vm->props = props;
    if (g_str_has_prefix(device, RVM_BLK)) {
        vm->b->protocol_features |= VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIG);
        vm->nqueues = 1;
    }
    rvm_start(vm);
    rvm_drive(vm);
}

void rvm_quit(RelayVm *vm)
{
    if (vm->dev) {
        g_free(vm->dev->pdev);
        g_free(vm->dev);
        qpci_free_pc(vm->bus);
    }
    qtest_quit(vm->qts);
    qtest_remove_abrt_handler(vm);
    vub_free(vm->b);
    g_unlink(vm->errors);
    g_rmdir(vm->dir);
    g_free(vm->errors);
    g_free(vm->dir);
}

char *rvm_stderr(RelayVm *vm)
{
    char *text;

    g_assert_true(g_file_get_contents(vm->errors, &text, NULL, NULL));
    return text;
}

void rvm_wait_stderr(RelayVm *vm, const char *text)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

    for (;;) {
        g_autofree char *said = rvm_stderr(vm);

        if (strstr(said, text)) {
            return;
        }
        if (g_get_monotonic_time() > end) {
            g_error("not \"%s\" on stderr, but: %s", text, said);
        }
        g_usleep(1000);
    }
}

QDict *rvm_relay(RelayVm *vm)
{
    QDict *resp = qtest_qmp(vm->qts,
                            "{ 'execute': 'query-vhost-user-relays' }");
    QList *list = qdict_get_qlist(resp, "return");
    QDict *relay;

    g_assert_nonnull(list);
    g_assert_cmpint(qlist_size(list), ==, 1);
    relay = qobject_to(QDict, qlist_pop(list));
    qobject_unref(resp);
    return relay;
}

int64_t rvm_relay_figure(RelayVm *vm, const char *name)
{
    QDict *relay = rvm_relay(vm);
    int64_t value;

    g_assert_true(qdict_haskey(relay, name));
    value = qdict_get_int(relay, name);
    qobject_unref(relay);
    return value;
}

uint8_t rvm_status(RelayVm *vm)
{
    return vm->dev->vdev.bus->get_status(&vm->dev->vdev);
}

void rvm_wait_needs_reset(RelayVm *vm)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

    while (!(rvm_status(vm) & VIRTIO_CONFIG_S_NEEDS_RESET)) {
        if (g_get_monotonic_time() > end) {
            g_autofree char *said = rvm_stderr(vm);

            g_error("the device does not say that it needs a reset; "
                    "stderr: %s", said);
        }
    }
}

uint8_t rvm_byte(unsigned seed, size_t i)
{
    uint32_t x = seed * 2654435761u + i * 40503u + (i >> 12) * 97;

    return x >> 13;
}

void rvm_pattern(uint8_t *buf, unsigned seed, size_t len)
{
    size_t i;

    for (i = 0; i < len; i++) {
        buf[i] = rvm_byte(seed, i);
    }
}

void rvm_fill(RelayVm *vm, uint64_t addr, unsigned seed, size_t len)
{
    g_autofree uint8_t *buf = g_malloc(len);

    rvm_pattern(buf, seed, len);
    qtest_bufwrite(vm->qts, addr, buf, len);
}

/* The first difference is worth more than two dumps. */
static void compare(const char *what, const uint8_t *got, unsigned seed,
                    size_t len)
{
    size_t i;

    for (i = 0; i < len; i++) {
        if (got[i] != rvm_byte(seed, i)) {
            g_error("%s: byte %zu of %zu is %02x, not %02x (seed %u)", what,
                    i, len, got[i], rvm_byte(seed, i), seed);
        }
    }
}

void rvm_check(RelayVm *vm, uint64_t addr, unsigned seed, size_t len)
{
    g_autofree uint8_t *buf = g_malloc(len);

    qtest_bufread(vm->qts, addr, buf, len);
    compare("guest memory", buf, seed, len);
}

void rvm_check_byte(RelayVm *vm, uint64_t addr, int byte, size_t len)
{
    g_autofree uint8_t *buf = g_malloc(len);
    size_t i;

    qtest_bufread(vm->qts, addr, buf, len);
    for (i = 0; i < len; i++) {
        if (buf[i] != byte) {
            g_error("guest memory at 0x%" PRIx64 ": byte %zu of %zu is %02x, "
                    "not %02x", addr, i, len, buf[i], byte);
        }
    }
}

void rvm_check_out(const VubRequest *req, size_t offset, unsigned seed,
                   size_t len)
{
    g_autofree uint8_t *buf = g_malloc(len);

    vub_read(req, offset, buf, len);
    compare("out-part", buf, seed, len);
}

void rvm_write_in(const VubRequest *req, size_t offset, unsigned seed,
                  size_t len)
{
    g_autofree uint8_t *buf = g_malloc(len);

    rvm_pattern(buf, seed, len);
    vub_write(req, offset, buf, len);
}

/* Of a head: its part out and, behind it, its part in. */
static uint64_t tag_addr(unsigned queue, uint16_t head)
{
    return RVM_TAGS + (queue * DRV_MAX + head) * 64;
}

uint16_t rvm_send_tag(RelayVm *vm, unsigned queue, uint64_t tag)
{
    DrvQueue *q = &vm->q[queue];
    uint16_t head = drv_next_head(q);
    uint64_t at = tag_addr(queue, head);

    /* Not 0: a disk's request that begins so is a read and ends in a status. */
    qtest_writeq(vm->qts, at, tag + 1);
    qtest_memset(vm->qts, at + 16, 0xee, 16);
    g_assert_cmpuint(drv_send(q, (DrvSegment[]) {
        { at, 8, false },
        { at + 16, 16, true },
    }, 2, vm->features & VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC)), ==, head);
    return head;
}

uint64_t rvm_tag(const VubRequest *req)
{
    uint64_t tag;

    g_assert_cmpuint(req->out_len, ==, 8);
    g_assert_cmpuint(req->in_len, ==, 16);
    vub_read(req, 0, &tag, 8);
    return tag - 1;
}

VubRequest *rvm_expect_tag(VubRing *r, uint64_t tag)
{
    VubRequest *req = vub_pop(r);

    g_assert_cmpuint(rvm_tag(req), ==, tag);
    return req;
}

void rvm_answer(VubRequest *req)
{
    rvm_write_in(req, 0, rvm_tag(req), 16);
    vub_done(req, 16);
}

void rvm_check_answer(RelayVm *vm, unsigned queue, uint16_t head, uint64_t tag)
{
    drv_expect_used(&vm->q[queue], head, 16);
    rvm_check(vm, tag_addr(queue, head) + 16, tag, 16);
}
