/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: what blocks the whole virtual machine
 *
 * In each case QEMU starts, says why it does not merge and what to change,
 * and, where the reason can go away, goes on when it has.
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include <sys/un.h>
#include "dedup-qtest.h"

#define SCANNER "-object dedup-scanner,id=ds0," DEDUP_FAST " "
#define NOBODY "setpriv --reuid=65534 --regid=65534 --clear-groups "
/* What makes the kernel grant a userfaultfd */
#define NOBODY_PTRACE NOBODY \
    "--inh-caps=+sys_ptrace --ambient-caps=+sys_ptrace "

static void test_mem_merge_off(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init("-machine pc,mem-merge=off -nodefaults -display none "
                     "-m 64M " SCANNER);
    dedup_assert_blocked(qts, "mem-merge-off", "mem-merge=on");
    qtest_quit(qts);
}

static void test_mem_lock(void)
{
    QTestState *qts;

    if (dedup_skip_unless_root()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-overcommit mem-lock=on " SCANNER);
    dedup_assert_blocked(qts, "mem-lock", "mem-lock=on-fault");
    qtest_quit(qts);
    qts = qtest_init(DEDUP_MACHINE "-overcommit mem-lock=on-fault " SCANNER);
    dedup_wait_at_least(qts, "full-scans", 1);
    qtest_quit(qts);
}

/* The host's own setting stays as it is: a file stands in its place. */
static void test_overcommit(void)
{
    g_autofree char *dir = NULL, *path = NULL;
    g_autoptr(GError) err = NULL;
    QTestState *qts;

    if (dedup_skip_unless_root()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    path = g_strdup_printf("%s/two", dir);
    g_file_set_contents(path, "2\n", -1, &err);
    g_assert_no_error(err);
    if (dedup_mount_over(path, "/proc/sys/vm/overcommit_memory")) {
        qts = qtest_init(DEDUP_MACHINE SCANNER);
        dedup_assert_blocked(qts, "overcommit", "vm.overcommit_memory");
        qtest_quit(qts);
        umount("/proc/sys/vm/overcommit_memory");
    }
    unlink(path);
    rmdir(dir);
}

/* Start QEMU as another user; NULL and a skipped test if that cannot be. */
static QTestState *start_as(const char *prefix, const char *options)
{
    g_autofree char *binary = g_strdup(g_getenv("QTEST_QEMU_BINARY"));
    g_autofree char *wrapped = g_strconcat(prefix, binary, NULL);
    g_autofree char *probe = g_strconcat(NOBODY "test -x ", binary, NULL);
    g_autofree char *unpriv = NULL;
    QTestState *qts;
    mode_t mask;

    if (geteuid() != 0 || system(probe) != 0) {
        g_test_skip("cannot run QEMU as nobody");
        return NULL;
    }
    if (g_file_get_contents("/proc/sys/vm/unprivileged_userfaultfd", &unpriv,
                            NULL, NULL) && *unpriv == '1') {
        g_test_skip("this host grants everybody a userfaultfd");
        return NULL;
    }
    g_setenv("QTEST_QEMU_BINARY", wrapped, true);
    /* QEMU connects to sockets that we make. */
    mask = umask(0);
    qts = qtest_initf("%s %s", DEDUP_MACHINE, options);
    umask(mask);
    g_setenv("QTEST_QEMU_BINARY", binary, true);
    return qts;
}

/* Without one there is another way; but not if one is asked for. */
static void test_userfaultfd(void)
{
    g_autofree char *err = NULL, *out = NULL;
    QTestState *qts = start_as(NOBODY, SCANNER);

    if (!qts) {
        return;
    }
    g_assert_null(dedup_blocked(qts, "userfaultfd"));
    out = qtest_hmp(qts, "info dedup");
    g_assert_nonnull(strstr(out, "write-protect mprotect"));
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_quit(qts);

    err = dedup_run_failing(NOBODY, "-machine none -object dedup-scanner,"
                            "id=ds0,write-protect=userfaultfd");
    g_test_message("%s", err);
    g_assert_nonnull(strstr(err, "write-protect=userfaultfd is not possible"));
    g_assert_nonnull(strstr(err, "/dev/userfaultfd"));
    g_assert_nonnull(strstr(err, "CAP_SYS_PTRACE"));
    g_assert_nonnull(strstr(err, "vm.unprivileged_userfaultfd"));
}

/* The group's directory is there, and not ours to use. */
static void check_group(uid_t owner, mode_t mode, const char *detail)
{
    g_autofree char *dir = dedup_tmpdir("/tmp");
    g_autofree char *options = NULL;
    QTestState *qts;

    g_assert_cmpint(chown(dir, owner, owner), ==, 0);
    g_assert_cmpint(chmod(dir, mode), ==, 0);
    options = g_strdup_printf("-object dedup-scanner,id=ds0,group=%s", dir);
    qts = start_as(NOBODY_PTRACE, options);
    if (qts) {
        dedup_assert_blocked(qts, "group", dir);
        dedup_assert_blocked(qts, "group", detail);
        qtest_quit(qts);
    }
    rmdir(dir);
}

static void test_group_unreadable(void)
{
    if (!dedup_skip_unless_root()) {
        check_group(0, 0700, "security module");
    }
}

static void test_group_foreign(void)
{
    if (!dedup_skip_unless_root()) {
        check_group(1, 0777, "make user 65534 its owner (chown)");
    }
}

/* A name is found in the user's own directory. */
static void test_group_name(void)
{
    g_autofree char *xdg = NULL, *parent = NULL, *dir = NULL;
    QTestState *qts;
    QDict *info;

    if (dedup_skip()) {
        return;
    }
    xdg = dedup_tmpdir("/tmp");
    parent = g_strdup_printf("%s/qemu-dedup", xdg);
    dir = g_strdup_printf("%s/qtest", parent);
    g_assert_cmpint(g_mkdir_with_parents(dir, 0700), ==, 0);
    g_setenv("XDG_RUNTIME_DIR", xdg, true);
    qts = qtest_init(DEDUP_MACHINE
                     "-object dedup-scanner,id=ds0,group=qtest");
    /* the group's figures come a moment after those of the scan */
    while (!qdict_haskey(info = dedup_info(qts), "group")) {
        qobject_unref(info);
        dedup_wait_at_least(qts, "full-scans", 1);
    }
    g_assert_cmpstr(qdict_get_str(qdict_get_qdict(info, "group"), "path"),
                    ==, dir);
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(info, "group"), "members"),
                    ==, 1);
    qobject_unref(info);
    qtest_quit(qts);
    g_unsetenv("XDG_RUNTIME_DIR");
    dedup_remove_tree(xdg);
}

/* After a boot /run is empty: a VM starts all the same, and joins later. */
static void test_group_missing(void)
{
    g_autofree char *dir = NULL, *parent = NULL, *group = NULL;
    g_autofree char *out = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    parent = g_strdup_printf("%s/not", dir);
    group = g_strdup_printf("%s/there", parent);
    qts = qtest_initf(DEDUP_MACHINE "-object dedup-scanner,id=ds0,group=%s",
                      group);
    dedup_wait_state(qts, "blocked");
    dedup_assert_blocked(qts, "group", "mkdir -p -m 700");
    dedup_assert_blocked(qts, "group", group);
    /* somebody makes the parent: the rest is made */
    g_assert_cmpint(mkdir(parent, 0700), ==, 0);
    dedup_wait_at_least(qts, "full-scans", 1);
    g_assert_true(g_file_test(group, G_FILE_TEST_IS_DIR));
    out = dedup_blocked(qts, "group");
    g_assert_null(out);
    qtest_quit(qts);
    dedup_remove_tree(dir);
}

/* The least that QEMU accepts as a vhost-user back end. */
typedef struct VhostUserHeader {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
} VhostUserHeader;

static void *vhost_user_backend(void *opaque)
{
    int listener = GPOINTER_TO_INT(opaque);
    int fd = accept(listener, NULL, NULL);
    VhostUserHeader header;
    uint8_t payload[4096];

    while (recv(fd, &header, sizeof(header), MSG_WAITALL) == sizeof(header)) {
        if (header.size &&
            recv(fd, payload, header.size, MSG_WAITALL) != header.size) {
            break;
        }
        /* GET_FEATURES, GET_VRING_BASE, GET_PROTOCOL_FEATURES, .._NUM */
        if (header.request == 1 || header.request == 11 ||
            header.request == 15 || header.request == 17) {
            struct {
                VhostUserHeader header;
                uint64_t value;
            } QEMU_PACKED reply = {
                { header.request, 1 | 4, sizeof(uint64_t) },
                /* VHOST_USER_F_PROTOCOL_FEATURES, and none of them */
                header.request == 1 ? 1 << 30 : 0
            };
            ssize_t n = send(fd, &reply, sizeof(reply), MSG_NOSIGNAL);

            g_assert_cmpint(n, ==, sizeof(reply));
        }
    }
    close(fd);
    return NULL;
}

static int vhost_user_listen(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    g_strlcpy(addr.sun_path, path, sizeof(addr.sun_path));
    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    g_assert_cmpint(listen(fd, 1), ==, 0);
    return fd;
}

/*
 * A vhost-user device comes when pages are merged: it finds the RAM whole,
 * and no page is merged while it is there.
 */
static void test_ram_exported(void)
{
    g_autofree char *dir = NULL, *path = NULL;
    GThread *backend;
    QTestState *qts;
    int listener;

    if (dedup_skip()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    path = g_strdup_printf("%s/vu", dir);
    listener = vhost_user_listen(path);
    backend = g_thread_new("vhost-user", vhost_user_backend,
                           GINT_TO_POINTER(listener));

    qts = qtest_init("-machine pc,memory-backend=ram0 -nodefaults "
                     "-display none -m 64M "
                     "-object memory-backend-memfd,id=ram0,size=64M " SCANNER);
    dedup_fill(qts, 0x1000000, 1, 512);
    dedup_fill(qts, 0x2000000, 1, 512);
    dedup_wait_at_least(qts, "pages-merged", 1000);

    qtest_qmp_assert_success(qts, "{ 'execute': 'chardev-add', 'arguments': {"
                             " 'id': 'c0', 'backend': { 'type': 'socket',"
                             " 'data': { 'server': false, 'addr': {"
                             " 'type': 'unix', 'data': {"
                             " 'path': %s } } } } } }", path);
    qtest_qmp_assert_success(qts, "{ 'execute': 'netdev_add', 'arguments': {"
                             " 'type': 'vhost-user', 'id': 'n0',"
                             " 'chardev': 'c0' } }");
    dedup_assert_blocked(qts, "ram-exported", "vhost-user (chardev 'c0')");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==, 0);
    dedup_wait_block(qts, "ram0", "exported");
    dedup_verify(qts, 0x1000000, 1, 512);
    dedup_verify(qts, 0x2000000, 1, 512);

    qtest_qmp_assert_success(qts, "{ 'execute': 'netdev_del', 'arguments': {"
                             " 'id': 'n0' } }");
    dedup_wait_block(qts, "ram0", "eligible");
    dedup_wait_at_least(qts, "pages-merged", 1000);
    dedup_verify(qts, 0x2000000, 1, 512);
    qtest_quit(qts);
    g_thread_join(backend);
    close(listener);
    unlink(path);
    rmdir(dir);
}

static void test_incoming(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE SCANNER "-incoming defer");
    dedup_assert_blocked(qts, "migration", "runs here");
    qtest_quit(qts);
}

/* Gone: nothing is merged until it runs here again. */
static void test_outgoing(void)
{
    QTestState *qts;
    int64_t scans;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE SCANNER);
    dedup_fill(qts, 0x1000000, 1, 512);
    dedup_fill(qts, 0x2000000, 1, 512);
    dedup_wait_at_least(qts, "pages-merged", 1000);
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': 'exec:cat > /dev/null' } }");
    qtest_qmp_eventwait(qts, "STOP");
    dedup_wait_state(qts, "blocked");
    dedup_assert_blocked(qts, "migration", "runs here");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), >=, 1000);
    /* From finish-migrate to postmigrate, with no time between */
    for (;;) {
        QDict *resp = qtest_qmp(qts, "{ 'execute': 'query-status' }");
        bool done = g_str_equal("postmigrate", qdict_get_str(
            qdict_get_qdict(resp, "return"), "status"));

        qobject_unref(resp);
        if (done) {
            break;
        }
        g_usleep(DEDUP_POLL_US);
    }
    dedup_assert_blocked(qts, "migration", "runs here");
    scans = dedup_figure(qts, "full-scans");
    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    dedup_wait_at_least(qts, "full-scans", scans + 1);
    dedup_verify(qts, 0x1000000, 1, 512);
    qtest_quit(qts);
}

/* Nobody reads the stream: the snapshot lasts until we do. */
static void test_background_snapshot(void)
{
    g_autofree char *dir = NULL, *path = NULL, *uri = NULL;
    uint8_t buf[65536];
    QTestState *qts;
    int listener, fd;
    int64_t scans;

    if (dedup_skip()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    path = g_strdup_printf("%s/out", dir);
    uri = g_strdup_printf("unix:%s", path);
    listener = vhost_user_listen(path);
    qts = qtest_init(DEDUP_MACHINE SCANNER);
    dedup_fill(qts, 0x1000000, 1, 512);
    dedup_fill(qts, 0x2000000, 1, 512);
    dedup_wait_at_least(qts, "pages-merged", 1000);
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    dedup_wait_state(qts, "stopped");
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-set-capabilities',"
                             " 'arguments': { 'capabilities': [ {"
                             " 'capability': 'background-snapshot',"
                             " 'state': true } ] } }");
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': %s } }", uri);
    fd = accept(listener, NULL, NULL);
    qtest_qmp_eventwait(qts, "RESUME");
    dedup_assert_blocked(qts, "background-snapshot", "has ended");
    scans = dedup_figure(qts, "full-scans");
    /* Pages that are merged: nothing remaps them. */
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), >=, 1000);
    while (read(fd, buf, sizeof(buf)) > 0) {
        continue;
    }
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    dedup_wait_at_least(qts, "full-scans", scans + 1);
    dedup_verify(qts, 0x1000000, 1, 512);
    dedup_verify(qts, 0x2000000, 1, 512);
    qtest_quit(qts);
    close(fd);
    close(listener);
    unlink(path);
    rmdir(dir);
}

/* A CPU that runs guests of its own, if this KVM can make one */
static void test_nested(void)
{
    QTestState *qts;
    QDict *resp;
    bool nested = false;
    int i;

    if (dedup_skip()) {
        return;
    }
    if (!qtest_has_accel("kvm") || access("/dev/kvm", R_OK | W_OK) < 0) {
        g_test_skip("no KVM");
        return;
    }
    /* "-cpu max" cannot start on every KVM; what is not offered is left out */
    qts = qtest_init(DEDUP_MACHINE "-S -accel kvm "
                     "-cpu qemu64,vmx=on,svm=on " SCANNER);
    for (i = 0; i < 2; i++) {
        resp = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': {"
                         " 'path': '/machine/unattached/device[0]',"
                         " 'property': %s } }", i ? "vmx" : "svm");
        nested = nested || qdict_get_try_bool(resp, "return", false);
        qobject_unref(resp);
    }
    if (nested) {
        dedup_assert_blocked(qts, "nested-virtualization", "vmx=off");
    } else {
        g_autofree char *detail = dedup_blocked(qts, "nested-virtualization");

        g_assert_null(detail);
        g_test_skip("this KVM does not offer nested virtualization");
    }
    qtest_quit(qts);
}

/* A private /dev without the device, as libvirt makes it. */
static void test_userfaultfd_missing(void)
{
    const char *const prefix = "unshare -m sh -c 'mount -t tmpfs none /dev && "
                               "exec " NOBODY "\"$0\" \"$@\"' ";
    g_autofree char *err = NULL;
    QTestState *qts = start_as(prefix, SCANNER);

    if (!qts) {
        return;
    }
    g_assert_null(dedup_blocked(qts, "userfaultfd"));
    qtest_quit(qts);
    err = dedup_run_failing(prefix, "-machine none -object dedup-scanner,"
                            "id=ds0,write-protect=userfaultfd");
    g_assert_nonnull(strstr(err, "/dev/userfaultfd is not there"));
    g_assert_nonnull(strstr(err, "cgroup_device_acl"));
    g_assert_nonnull(strstr(err, "the system call is not permitted"));
}

/* Without a /proc nobody can tell which pages are there. */
static void test_pagemap(void)
{
    QTestState *qts = start_as("unshare -m sh -c 'mount -t tmpfs none /proc "
                               "&& exec \"$0\" \"$@\"' ", SCANNER);

    if (!qts) {
        return;
    }
    dedup_assert_blocked(qts, "pagemap", "/proc/self/pagemap");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    qtest_quit(qts);
}

/* RAM in a file on a disk, as a libvirt domain has it by default. */
static void test_no_eligible_memory(void)
{
    g_autofree char *dir = dedup_tmpdir("/var/tmp");
    g_autofree char *path = g_strdup_printf("%s/ram", dir);
    g_autofree char *out = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        rmdir(dir);
        return;
    }
    qts = qtest_initf("-machine pc,memory-backend=ram0 -nodefaults "
                      "-display none -m 64M,slots=1,maxmem=1G "
                      "-object memory-backend-file,id=ram0,size=64M,share=on,"
                      "mem-path=%s " SCANNER, path);
    dedup_assert_blocked(qts, "no-eligible-memory", "'ram0'");
    dedup_assert_blocked(qts, "no-eligible-memory", "tmpfs");
    out = qtest_hmp(qts, "info dedup");
    g_assert_nonnull(strstr(out, "ds0: blocked"));
    g_assert_null(strstr(out, "pages merged"));
    /* not while it is off: nothing would be merged anyway */
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    dedup_wait_state(qts, "stopped");
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    dedup_wait_state(qts, "blocked");
    /* other memory comes */
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'id': 'mem1', 'size': 134217728,"
                             " 'qom-type': 'memory-backend-ram' } }");
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_add', 'arguments': {"
                             " 'driver': 'pc-dimm', 'id': 'dimm1',"
                             " 'memdev': 'mem1' } }");
    dedup_wait_block(qts, "mem1", "eligible");
    dedup_wait_at_least(qts, "full-scans", 2);
    g_free(out);
    out = dedup_blocked(qts, "no-eligible-memory");
    g_assert_null(out);
    qtest_quit(qts);
    unlink(path);
    rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    qtest_add_func("/dedup/blocked/mem-merge-off", test_mem_merge_off);
    qtest_add_func("/dedup/blocked/mem-lock", test_mem_lock);
    qtest_add_func("/dedup/blocked/overcommit", test_overcommit);
    qtest_add_func("/dedup/blocked/userfaultfd", test_userfaultfd);
    qtest_add_func("/dedup/blocked/group/unreadable", test_group_unreadable);
    qtest_add_func("/dedup/blocked/group/foreign", test_group_foreign);
    qtest_add_func("/dedup/blocked/group/name", test_group_name);
    qtest_add_func("/dedup/blocked/group/missing", test_group_missing);
    qtest_add_func("/dedup/blocked/ram-exported", test_ram_exported);
    qtest_add_func("/dedup/blocked/migration/incoming", test_incoming);
    qtest_add_func("/dedup/blocked/migration/outgoing", test_outgoing);
    qtest_add_func("/dedup/blocked/background-snapshot",
                   test_background_snapshot);
    qtest_add_func("/dedup/blocked/nested", test_nested);
    qtest_add_func("/dedup/blocked/userfaultfd-missing",
                   test_userfaultfd_missing);
    qtest_add_func("/dedup/blocked/pagemap", test_pagemap);
    qtest_add_func("/dedup/blocked/no-eligible-memory",
                   test_no_eligible_memory);
    return g_test_run();
}
