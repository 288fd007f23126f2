/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Whoever gets the file behind guest RAM finds it whole
 *
 * Guest RAM is a shared memfd, of which the test reads the file itself, as a
 * process would that QEMU passed the descriptor to.  Once pages are merged
 * they are holes there.  A device that exports RAM must have put them back
 * by the time that its peer hears from it for the first time.
 */

#include "qemu/osdep.h"
#include "dedup-qtest.h"
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

/* Where the equal pages lie, in RAM and in its file, and what is in them. */
#define START (1 * 1024 * 1024)
#define PAGES 1024
#define LENGTH (PAGES * DEDUP_PAGE)
#define BYTE 0x5a

static QTestState *start(const char *more)
{
    return qtest_initf("-nodefaults -display none -m 64M,slots=4,maxmem=1G "
                       "-object memory-backend-memfd,id=ram0,size=64M,share=on "
                       "-machine pc,memory-backend=ram0 "
                       "-object dedup-scanner,id=ds0,run=off," DEDUP_FAST
                       " %s", more);
}

/* How many of the equal pages have their contents in the file. */
static int pages_in_file(int fd)
{
    uint8_t expected[DEDUP_PAGE], page[DEDUP_PAGE];
    int i, n = 0;

    memset(expected, BYTE, sizeof(expected));
    for (i = 0; i < PAGES; i++) {
        g_assert_cmpint(pread(fd, page, sizeof(page), START + i * DEDUP_PAGE),
                        ==, sizeof(page));
        n += memcmp(page, expected, sizeof(page)) == 0;
    }
    return n;
}

/* Fill RAM with equal pages and wait until they are merged. */
static int fill_and_merge(QTestState *qts)
{
    int64_t end = g_get_monotonic_time() + DEDUP_TIMEOUT_US;
    int fd = dedup_open_memfd(qts);

    qtest_memset(qts, START, BYTE, LENGTH);
    g_assert_cmpint(pages_in_file(fd), ==, PAGES);
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    dedup_wait_at_least(qts, "pages-merged", PAGES);
    /* Else the test would show nothing.  A merged page goes a moment later. */
    while (pages_in_file(fd)) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(10 * 1000);
    }
    return fd;
}

static void assert_guest_sees(QTestState *qts)
{
    g_autofree uint8_t *data = g_malloc(LENGTH);
    int i;

    qtest_bufread(qts, START, data, LENGTH);
    for (i = 0; i < LENGTH; i++) {
        g_assert_cmphex(data[i], ==, BYTE);
    }
}

/* Wait for the first byte from QEMU. */
static void wait_message(int sock)
{
    struct pollfd p = { .fd = sock, .events = POLLIN };

    g_assert_cmpint(poll(&p, 1, DEDUP_TIMEOUT_US / 1000), ==, 1);
}

typedef struct VhostUser {
    const char *driver;
    /* More properties, as JSON. */
    const char *more;
} VhostUser;

static int listen_at(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
    g_assert_cmpint(bind(listener, (struct sockaddr *)&address,
                         sizeof(address)), ==, 0);
    g_assert_cmpint(listen(listener, 1), ==, 0);
    return listener;
}

/* A machine with merged RAM and a chardev that is connected to *@peer. */
static QTestState *start_with_peer(int *ram, int *peer)
{
    g_autofree char *dir = dedup_tmpdir("/tmp");
    g_autofree char *path = g_strdup_printf("%s/sock", dir);
    int listener = listen_at(path);
    QTestState *qts;

    qts = start("");
    *ram = fill_and_merge(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'chardev-add', 'arguments': {"
                             " 'id': 'c0', 'backend': { 'type': 'socket',"
                             " 'data': { 'server': false, 'addr': {"
                             " 'type': 'unix', 'data': { 'path': %s } } } } }"
                             " }", path);
    *peer = accept(listener, NULL, NULL);
    g_assert_cmpint(*peer, >=, 0);
    close(listener);
    unlink(path);
    rmdir(dir);
    return qts;
}

static void send_device_add(QTestState *qts, const VhostUser *device)
{
    qtest_qmp_send_raw(qts, "{ \"execute\": \"device_add\", \"arguments\": {"
                       " \"driver\": \"%s\", \"id\": \"d0\","
                       " \"chardev\": \"c0\"%s } }\n",
                       device->driver, device->more);
}

/*
 * A vhost-user device whose back end hangs up after the first message.  Then
 * the device cannot be, nobody needs RAM whole any more, and merging resumes.
 */
static void test_vhost_user(gconstpointer data)
{
    int peer, ram;
    QTestState *qts;
    QDict *resp;

    if (dedup_skip()) {
        return;
    }
    qts = start_with_peer(&ram, &peer);
    send_device_add(qts, data);
    wait_message(peer);
    g_assert_cmpint(pages_in_file(ram), ==, PAGES);
    close(peer);
    resp = qtest_qmp_receive(qts);
    g_assert_true(qdict_haskey(resp, "error"));
    qobject_unref(resp);

    assert_guest_sees(qts);
    dedup_wait_at_least(qts, "pages-merged", PAGES);
    g_assert_cmpint(pages_in_file(ram), ==, 0);
    assert_guest_sees(qts);
    close(ram);
    qtest_quit(qts);
}

/* This one is not told that it has no chardev before it sends something. */
static void test_no_chardev(void)
{
    g_autofree char *err = NULL;

    err = dedup_run_failing("", "-device vhost-user-gpu-pci");
    g_test_message("%s", err);
}

#define VHOST_USER_GET_FEATURES 1
#define VHOST_USER_GET_PROTOCOL_FEATURES 15
#define VHOST_USER_VERSION 1
#define VHOST_USER_REPLY 4
#define VHOST_USER_F_PROTOCOL_FEATURES (1ULL << 30)
#define VIRTIO_F_VERSION_1 (1ULL << 32)

/* A back end that answers what it is asked while a device is made. */
static void *backend_thread(void *opaque)
{
    struct QEMU_PACKED {
        uint32_t request, flags, size;
        uint64_t payload;
    } reply = {
        .flags = VHOST_USER_VERSION | VHOST_USER_REPLY,
        .size = sizeof(reply.payload),
    };
    uint32_t header[3];
    uint8_t payload[4096];
    int sock = GPOINTER_TO_INT(opaque);

    while (recv(sock, header, sizeof(header), MSG_WAITALL) ==
           sizeof(header)) {
        g_assert_cmpuint(header[2], <=, sizeof(payload));
        if (header[2]) {
            g_assert_cmpint(recv(sock, payload, header[2], MSG_WAITALL), ==,
                            header[2]);
        }
        reply.request = header[0];
        switch (header[0]) {
        case VHOST_USER_GET_FEATURES:
            reply.payload = VIRTIO_F_VERSION_1 |
                            VHOST_USER_F_PROTOCOL_FEATURES;
            break;
        case VHOST_USER_GET_PROTOCOL_FEATURES:
            reply.payload = 0;
            break;
        default:
            continue;
        }
        g_assert_cmpint(send(sock, &reply, sizeof(reply), MSG_NOSIGNAL), ==,
                        sizeof(reply));
    }
    close(sock);
    return NULL;
}

/*
 * While the device is there RAM stays whole, the figures say for whom, and
 * new equal pages are left alone.
 */
static void test_vhost_user_stays(void)
{
    static const VhostUser device = {
        "vhost-user-fs-pci", ", \"tag\": \"t\"",
    };
    g_autofree char *detail = NULL;
    int ram, peer;
    int64_t scans;
    GThread *thread;
    QTestState *qts;
    QDict *resp;

    if (dedup_skip()) {
        return;
    }
    qts = start_with_peer(&ram, &peer);
    thread = g_thread_new("backend", backend_thread, GINT_TO_POINTER(peer));
    send_device_add(qts, &device);
    resp = qtest_qmp_receive(qts);
    if (qdict_haskey(resp, "error")) {
        g_test_message("%s", qdict_get_str(qdict_get_qdict(resp, "error"),
                                           "desc"));
    }
    g_assert_true(qdict_haskey(resp, "return"));
    qobject_unref(resp);

    g_assert_cmpint(pages_in_file(ram), ==, PAGES);
    dedup_assert_blocked(qts, "ram-exported", "vhost-user (chardev 'c0')");
    qtest_memset(qts, START + LENGTH, BYTE, LENGTH);
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    scans = dedup_figure(qts, "full-scans");
    /* Nothing happens, which no event can tell: give it time to happen. */
    g_usleep(G_USEC_PER_SEC / 2);
    g_assert_cmpint(dedup_figure(qts, "full-scans"), ==, scans);
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    g_assert_cmpint(pages_in_file(ram), ==, PAGES);

    /* Unplugging is finished by the reset: there is no guest to agree. */
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_del', 'arguments': {"
                             " 'id': 'd0' } }");
    qtest_qmp_assert_success(qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(qts, "DEVICE_DELETED");
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    detail = dedup_blocked(qts, "ram-exported");
    g_assert_null(detail);
    assert_guest_sees(qts);
    close(ram);
    qtest_quit(qts);
    g_thread_join(thread);
}

/* The same for the remote process of a proxy device. */
static void test_proxy(void)
{
    int pair[2], ram;
    QTestState *qts;
    QDict *resp;

    if (dedup_skip()) {
        return;
    }
    if (!qtest_has_device("x-pci-proxy-dev")) {
        g_test_skip("built without multi-process");
        return;
    }
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair),
                    ==, 0);
    qts = start("");
    ram = fill_and_merge(qts);
    resp = qtest_qmp_fds(qts, &pair[1], 1, "{ 'execute': 'getfd',"
                         " 'arguments': { 'fdname': 'remote' } }");
    g_assert_true(qdict_haskey(resp, "return"));
    qobject_unref(resp);
    close(pair[1]);
    qtest_qmp_send(qts, "{ 'execute': 'device_add', 'arguments': {"
                   " 'driver': 'x-pci-proxy-dev', 'id': 'd0',"
                   " 'fd': 'remote' } }");
    wait_message(pair[0]);
    g_assert_cmpint(pages_in_file(ram), ==, PAGES);
    /* QEMU waits for answers that do not come: it is of no more use. */
    close(ram);
    close(pair[0]);
    qtest_kill_qemu(qts);
    qtest_quit(qts);
}

#define VFIO_USER_VERSION 1
#define VFIO_USER_REPLY 1

typedef struct VfioUserHeader {
    uint16_t id, command;
    uint32_t size, flags, error;
} VfioUserHeader;

/* Receive a message with its body; the fd that came with it, or -1. */
static int vfio_user_receive(int sock, VfioUserHeader *h)
{
    char control[CMSG_SPACE(sizeof(int))], body[4096];
    struct iovec iov = { .iov_base = h, .iov_len = sizeof(*h) };
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1,
        .msg_control = control, .msg_controllen = sizeof(control),
    };
    struct cmsghdr *c;
    int fd = -1;

    wait_message(sock);
    g_assert_cmpint(recvmsg(sock, &msg, MSG_WAITALL), ==, sizeof(*h));
    c = CMSG_FIRSTHDR(&msg);
    if (c && c->cmsg_type == SCM_RIGHTS) {
        memcpy(&fd, CMSG_DATA(c), sizeof(fd));
    }
    g_assert_cmpuint(h->size - sizeof(*h), <=, sizeof(body));
    g_assert_cmpint(recv(sock, body, h->size - sizeof(*h), MSG_WAITALL), ==,
                    h->size - sizeof(*h));
    return fd;
}

/* The server of a vfio-user device is given the file when the device starts. */
static void test_vfio_user(void)
{
    g_autofree char *dir = NULL, *path = NULL;
    struct {
        VfioUserHeader h;
        uint16_t major, minor;
        char capabilities[4];
    } version = { .capabilities = "{}" };
    struct stat ours, given;
    int listener, peer, ram, fd;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    path = g_strdup_printf("%s/sock", dir);
    listener = listen_at(path);
    qts = start("");
    ram = fill_and_merge(qts);
    qtest_qmp_send(qts, "{ 'execute': 'device_add', 'arguments': {"
                   " 'driver': 'vfio-user-pci', 'id': 'd0', 'socket': {"
                   " 'type': 'unix', 'path': %s } } }", path);
    peer = accept(listener, NULL, NULL);
    g_assert_cmpint(peer, >=, 0);
    g_assert_cmpint(vfio_user_receive(peer, &version.h), ==, -1);
    g_assert_cmpint(version.h.command, ==, VFIO_USER_VERSION);
    version.h.flags = VFIO_USER_REPLY;
    version.h.size = sizeof(version);
    g_assert_cmpint(send(peer, &version, sizeof(version), MSG_NOSIGNAL), ==,
                    sizeof(version));

    /* Other memory may come first. */
    g_assert_cmpint(fstat(ram, &ours), ==, 0);
    do {
        VfioUserHeader h;

        fd = vfio_user_receive(peer, &h);
        given.st_ino = 0;
        if (fd >= 0) {
            g_assert_cmpint(fstat(fd, &given), ==, 0);
            close(fd);
        }
    } while (given.st_ino != ours.st_ino);
    g_assert_cmpint(pages_in_file(ram), ==, PAGES);
    /* QEMU waits for answers, and aborts if the server goes: of no more use. */
    close(ram);
    qtest_kill_qemu(qts);
    qtest_quit(qts);
    close(peer);
    close(listener);
    unlink(path);
    rmdir(dir);
}

/* A udmabuf is made of pages of the memfd. */
static void test_udmabuf(void)
{
    g_autofree char *detail = NULL;
    QTestState *qts;
    int ram;

    if (dedup_skip()) {
        return;
    }
    if (access("/dev/udmabuf", R_OK | W_OK) < 0) {
        g_test_skip("the host has no /dev/udmabuf");
        return;
    }
    qts = start("");
    ram = fill_and_merge(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_add', 'arguments': {"
                             " 'driver': 'virtio-gpu-pci', 'id': 'd0',"
                             " 'blob': true } }");
    g_assert_cmpint(pages_in_file(ram), ==, PAGES);
    dedup_assert_blocked(qts, "ram-exported", "virtio-gpu");
    close(ram);
    qtest_quit(qts);
}

/* vhost-scsi: the kernel pins pages; here it is there from the start. */
static void test_vhost_scsi(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    if (access("/dev/vhost-scsi", R_OK | W_OK) < 0) {
        g_test_skip("the host has no /dev/vhost-scsi");
        return;
    }
    qts = start("-device vhost-scsi-pci,wwpn=naa.5001405324af0985");
    dedup_assert_blocked(qts, "ram-exported", "vhost-scsi");
    qtest_quit(qts);
}

/* Memory that a device hands out: it alone is left alone, not all RAM. */
static void test_device_memory(gconstpointer data)
{
    const char *const *driver = data;
    g_autofree char *device = NULL;
    QTestState *qts;
    int ram;

    if (dedup_skip()) {
        return;
    }
    device = g_strdup_printf("-machine nvdimm=on "
                             "-object memory-backend-memfd,id=mem1,size=4M,"
                             "share=on -device %s,memdev=mem1,id=d0",
                             *driver);
    qts = start(device);
    dedup_wait_block(qts, "mem1", "device-backend");
    ram = fill_and_merge(qts);
    close(ram);
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    static const char *const memory_devices[] = {
        "ivshmem-plain", "nvdimm", "virtio-pmem-pci",
    };
    static const VhostUser vhost_user_devices[] = {
        { "vhost-user-fs-pci", ", \"tag\": \"t\"" },
        { "vhost-user-blk-pci", "" },
        { "vhost-user-scsi-pci", "" },
        { "vhost-user-vsock-pci", "" },
        { "vhost-user-rng-pci", "" },
        { "vhost-user-gpio-pci", "" },
    };
    int i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < G_N_ELEMENTS(vhost_user_devices); i++) {
        const VhostUser *device = &vhost_user_devices[i];
        g_autofree char *path = g_strdup_printf("dedup/whole/%s",
                                                device->driver);

        if (qtest_has_device(device->driver)) {
            qtest_add_data_func(path, device, test_vhost_user);
        }
    }
    if (qtest_has_device("vhost-user-gpu-pci")) {
        qtest_add_func("dedup/whole/no-chardev", test_no_chardev);
    }
    qtest_add_func("dedup/whole/vhost-user-stays", test_vhost_user_stays);
    qtest_add_func("dedup/whole/proxy", test_proxy);
    if (qtest_has_device("vfio-user-pci")) {        /* since 10.1 */
        qtest_add_func("dedup/whole/vfio-user", test_vfio_user);
    }
    qtest_add_func("dedup/whole/udmabuf", test_udmabuf);
    qtest_add_func("dedup/whole/vhost-scsi", test_vhost_scsi);
    for (i = 0; i < G_N_ELEMENTS(memory_devices); i++) {
        g_autofree char *path = g_strdup_printf("dedup/whole/%s",
                                                memory_devices[i]);

        if (qtest_has_device(memory_devices[i])) {
            qtest_add_data_func(path, &memory_devices[i],
                                test_device_memory);
        }
    }
    return g_test_run();
}
