/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: which RAM blocks are scanned, and why the others are not
 */

#include "qemu/osdep.h"
#include <sys/resource.h>
#include "qapi/error.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "dedup-qtest.h"
#include "tpm-emu.h"

#define SCANNER "-object dedup-scanner,id=ds0,run=off "
#define MEM1_SIZE (32 * MiB)

/* What info dedup says about a block: one text for each reason. */
static void check_text(QTestState *qts, const char *id, const char *reason)
{
    g_autofree char *out = qtest_hmp(qts, "info dedup");
    g_autofree char *start = g_strdup_printf("left alone: %s (", reason);
    const char *block, *text;

    for (block = out; (block = strstr(block, "  block ")); block++) {
        g_autofree char *line = g_strndup(block, strcspn(block, "\r\n"));
        g_autofree char *name = g_strdup_printf("%s: ", id);

        if (strstr(line, name)) {
            text = strstr(line, start);
            g_assert_nonnull(text);
            g_assert_cmpint(strlen(text), >, strlen(start) + 10);
            return;
        }
    }
    g_assert_not_reached();
}

static void check_reason(QTestState *qts, const char *id, const char *reason)
{
    dedup_wait_block(qts, id, reason);
    check_text(qts, id, reason);
}

/* The main memory, made of @backend (NULL: plain -m): is it taken? */
static void check_main_memory(const char *backend, const char *id,
                              const char *reason)
{
    QTestState *qts;

    if (backend) {
        qts = qtest_initf("-machine pc,memory-backend=ram0 -nodefaults "
                          "-display none -m 64M -object %s,id=ram0,size=64M "
                          SCANNER, backend);
    } else {
        qts = qtest_init(DEDUP_MACHINE SCANNER);
    }
    if (reason) {
        check_reason(qts, id, reason);
    } else {
        dedup_wait_block(qts, id, "eligible");
        g_assert_cmpint(dedup_figure(qts, "pages-total"), ==, 16384);
    }
    qtest_quit(qts);
}

static void test_main_memory(void)
{
    g_autofree char *shared = NULL, *private = NULL, *nameless = NULL;
    g_autoptr(DedupFile) file = NULL;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    shared = g_strdup_printf("memory-backend-file,share=on,mem-path=%s",
                             file->path);
    private = g_strdup_printf("memory-backend-file,share=off,mem-path=%s",
                              file->path);
    nameless = g_strdup_printf("memory-backend-file,share=on,mem-path=%s",
                               file->dir);
    check_main_memory(NULL, "pc.ram", NULL);
    check_main_memory("memory-backend-ram", "ram0", NULL);
    check_main_memory("memory-backend-shm", "ram0", NULL);
    check_main_memory("memory-backend-memfd,share=on", "ram0", NULL);
    check_main_memory("memory-backend-memfd,share=off", "ram0", NULL);
    check_main_memory(shared, "ram0", NULL);
    check_main_memory(private, "ram0", NULL);
    check_main_memory(nameless, "ram0", NULL);
}

/* C23: two NUMA nodes, two backends. */
static void test_numa(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init("-machine pc -nodefaults -display none -m 64M -smp 2 "
                     "-object memory-backend-ram,id=m0,size=32M "
                     "-object memory-backend-memfd,id=m1,size=32M "
                     "-numa node,memdev=m0 -numa node,memdev=m1 " SCANNER);
    dedup_wait_block(qts, "m0", "eligible");
    dedup_wait_block(qts, "m1", "eligible");
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==, 16384);
    qtest_quit(qts);
}

/* What is there beside RAM; some of it is read-only (C6). */
static void test_other_blocks(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-vga std " SCANNER);
    check_reason(qts, "vga.vram", "not-backend");
    check_reason(qts, "pc.bios", "read-only");
    check_reason(qts, "/rom@etc/acpi/tables", "resizeable");
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==, 16384);
    qtest_quit(qts);
}

static QTestState *start_with_slots(void)
{
    QTestState *qts = qtest_init(DEDUP_MACHINE SCANNER);

    dedup_wait_block(qts, "pc.ram", "eligible");
    return qts;
}

/* Add a backend, given as JSON without the ID and the size. */
static void add_backend_sized(QTestState *qts, const char *json, int64_t size)
{
    g_autofree char *all = NULL;

    all = g_strdup_printf("{ 'execute': 'object-add', 'arguments': {"
                          " 'id': 'mem1', 'size': %" PRId64 ", %s } }", size,
                          json);
    qtest_qmp_assert_success(qts, "%p", qobject_from_json(all, &error_abort));
}

static void add_backend(QTestState *qts, const char *json)
{
    add_backend_sized(qts, json, MEM1_SIZE);
}

static void add_dimm(QTestState *qts)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_add', 'arguments': {"
                             " 'driver': 'pc-dimm', 'id': 'dimm1',"
                             " 'memdev': 'mem1' } }");
}

/* A hot-added DIMM made of this is left alone for that reason. */
static void check_dimm(const char *json, const char *reason)
{
    QTestState *qts = start_with_slots();

    add_backend(qts, json);
    add_dimm(qts);
    check_reason(qts, "mem1", reason);
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==, 16384);
    qtest_quit(qts);
}

/* Not before it is used, gone when the backend goes. */
static void test_hotplug(void)
{
    g_autofree char *reason = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = start_with_slots();
    add_backend(qts, "'qom-type': 'memory-backend-ram'");
    check_reason(qts, "mem1", "not-mapped");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'mem1' } }");
    reason = dedup_block_reason(qts, "mem1", NULL);
    g_assert_null(reason);

    add_backend(qts, "'qom-type': 'memory-backend-memfd'");
    check_reason(qts, "mem1", "not-mapped");
    add_dimm(qts);
    dedup_wait_block(qts, "mem1", "eligible");
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==,
                    16384 + MEM1_SIZE / DEDUP_PAGE);
    qtest_quit(qts);
}

static void test_merge_off(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = start_with_slots();
    add_backend(qts, "'qom-type': 'memory-backend-ram', 'merge': false");
    add_dimm(qts);
    check_reason(qts, "mem1", "merge-off");
    /* Followed when it changes */
    dedup_set_bool(qts, "/objects/mem1", "merge", true);
    dedup_wait_block(qts, "mem1", "eligible");
    dedup_set_bool(qts, "/objects/mem1", "merge", false);
    dedup_wait_block(qts, "mem1", "merge-off");
    qtest_quit(qts);
}

static void test_prealloc(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    check_dimm("'qom-type': 'memory-backend-ram', 'prealloc': true",
               "prealloc");
    qts = start_with_slots();
    add_backend(qts, "'qom-type': 'memory-backend-ram'");
    add_dimm(qts);
    dedup_wait_block(qts, "mem1", "eligible");
    dedup_set_bool(qts, "/objects/mem1", "prealloc", true);
    check_reason(qts, "mem1", "prealloc");
    qtest_quit(qts);
}

static void test_host_nodes(void)
{
#ifdef CONFIG_NUMA
    if (dedup_skip()) {
        return;
    }
    check_dimm("'qom-type': 'memory-backend-ram', 'policy': 'bind',"
               " 'host-nodes': [ 0 ]", "host-nodes");
#else
    g_test_skip("QEMU is built without NUMA support");
#endif
}

/* Without a reservation: the host need not have a free one. */
static void test_huge_pages(void)
{
    if (dedup_skip()) {
        return;
    }
    check_dimm("'qom-type': 'memory-backend-memfd', 'hugetlb': true,"
               " 'hugetlbsize': 2097152, 'reserve': false", "huge-pages");
}

/* For add_backend(): a memory-backend-file */
static char *file_json(const DedupFile *file, const char *share)
{
    return g_strdup_printf("'qom-type': 'memory-backend-file', 'share': %s,"
                           " 'mem-path': '%s'", share, file->path);
}

static void test_not_tmpfs(void)
{
    g_autoptr(DedupFile) file = NULL;
    g_autofree char *json = NULL;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/var/tmp");
    json = file_json(file, "true");
    check_dimm(json, "not-tmpfs");
    unlink(file->path);
    g_free(json);
    json = file_json(file, "false");
    check_dimm(json, "not-tmpfs");
}

/* Somebody has the file open already; or holds what a path in /proc names. */
static void test_opened_elsewhere(void)
{
    g_autoptr(DedupFile) file = NULL;
    g_autofree char *json = NULL;
    QTestState *qts;
    int fd;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    json = file_json(file, "true");
    fd = open(file->path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    g_assert_cmpint(fd, >=, 0);
    qts = start_with_slots();
    add_backend(qts, json);
    add_dimm(qts);
    check_reason(qts, "mem1", "opened-elsewhere");
    /* Nothing was ever merged: it may be taken when they stop. */
    close(fd);
    dedup_wait_block(qts, "mem1", "eligible");
    qtest_quit(qts);

    fd = memfd_create("foreign", MFD_CLOEXEC);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, MEM1_SIZE), ==, 0);
    g_free(json);
    json = g_strdup_printf("'qom-type': 'memory-backend-file', 'share': true,"
                           " 'mem-path': '/proc/%d/fd/%d'", getpid(), fd);
    check_dimm(json, "opened-elsewhere");
    close(fd);
}

/* The file is somebody else's, and QEMU has no CAP_LEASE. */
static void test_lease_denied(void)
{
    g_autoptr(DedupFile) file = NULL;
    g_autofree char *json = NULL, *wrapped = NULL;
    g_autofree char *binary = g_strdup(g_getenv("QTEST_QEMU_BINARY"));
    int fd;

    if (dedup_skip_unless_root()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    json = file_json(file, "true");
    fd = open(file->path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(fchown(fd, 65534, 65534), ==, 0);
    g_assert_cmpint(fchmod(fd, 0666), ==, 0);
    close(fd);
    wrapped = g_strdup_printf("setpriv --bounding-set=-lease "
                              "--inh-caps=-lease %s", binary);
    g_setenv("QTEST_QEMU_BINARY", wrapped, true);
    check_dimm(json, "lease-denied");
    g_setenv("QTEST_QEMU_BINARY", binary, true);
}

/* A TPM brings a page along, for its physical presence interface. */
static void test_device_memory(void)
{
    g_autofree char *dir = NULL;
    SocketAddress addr = { .type = SOCKET_ADDRESS_TYPE_UNIX };
    TPMTestState tpm = { .addr = &addr, .tpm_version = TPM_VERSION_2_0 };
    QTestState *qts;
    GThread *thread;

    if (dedup_skip()) {
        return;
    }
    if (!qtest_has_device("tpm-crb")) {
        g_test_skip("QEMU is built without TPM support");
        return;
    }
    dir = dedup_tmpdir("/tmp");
    addr.u.q_unix.path = g_strdup_printf("%s/tpm", dir);
    g_mutex_init(&tpm.data_mutex);
    g_cond_init(&tpm.data_cond);
    thread = g_thread_new("tpm", tpm_emu_ctrl_thread, &tpm);
    tpm_emu_test_wait_cond(&tpm);

    qts = qtest_initf(DEDUP_MACHINE SCANNER "-chardev socket,id=c0,path=%s "
                      "-tpmdev emulator,id=t0,chardev=c0 "
                      "-device tpm-crb,tpmdev=t0", addr.u.q_unix.path);
    check_reason(qts, "tpm-ppi", "device-memory");
    dedup_wait_block(qts, "pc.ram", "eligible");
    qtest_quit(qts);

    g_thread_join(thread);
    g_cond_clear(&tpm.data_cond);
    g_mutex_clear(&tpm.data_mutex);
    unlink(addr.u.q_unix.path);
    g_free(addr.u.q_unix.path);
    rmdir(dir);
}

/* What the property says counts, whatever the file is on. */
static void test_pmem(void)
{
#ifdef CONFIG_LIBPMEM
    g_autoptr(DedupFile) file = NULL;
    g_autofree char *json = NULL, *pmem = NULL;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    json = file_json(file, "false");
    pmem = g_strconcat(json, ", 'pmem': true", NULL);
    check_dimm(pmem, "pmem");
#else
    g_test_skip("QEMU is built without libpmem");
#endif
}

/* The other end of a migration maps the file. */
static void test_exported(void)
{
    g_autoptr(DedupFile) file = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    qts = qtest_initf("-machine pc,memory-backend=ram0 -nodefaults "
                      "-display none -m 64M %s " SCANNER, file->backend);
    dedup_wait_block(qts, "ram0", "eligible");
    dedup_migrate_ignoring_shared(qts);
    check_reason(qts, "ram0", "exported");
    qtest_quit(qts);
}

/* How much address space QEMU may have; RLIM_INFINITY: as much as before */
static void limit_address_space(QTestState *qts, rlim_t bytes)
{
    struct rlimit limit;

    g_assert_cmpint(prlimit(qtest_pid(qts), RLIMIT_AS, NULL, &limit), ==, 0);
    limit.rlim_cur = MIN(bytes, limit.rlim_max);
    g_assert_cmpint(prlimit(qtest_pid(qts), RLIMIT_AS, &limit, NULL), ==, 0);
}

static uint64_t address_space_size(QTestState *qts)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/statm",
                                            qtest_pid(qts));
    g_autofree char *text = NULL;
    g_autoptr(GError) err = NULL;
    uint64_t pages;

    g_file_get_contents(path, &text, NULL, &err);
    g_assert_no_error(err);
    pages = g_ascii_strtoull(text, NULL, 10);
    return pages * DEDUP_PAGE;
}

/*
 * To keep track of 128 GiB takes arrays of 192 MiB, of which the host need
 * not have a byte: only address space may be short.
 */
static void test_out_of_memory(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init("-machine pc -nodefaults -display none "
                     "-m 64M,slots=4,maxmem=256G " SCANNER);
    dedup_wait_block(qts, "pc.ram", "eligible");
    add_backend_sized(qts, "'qom-type': 'memory-backend-memfd',"
                      " 'reserve': false", 128 * GiB);
    limit_address_space(qts, address_space_size(qts) + 64 * MiB);
    add_dimm(qts);
    check_reason(qts, "mem1", "out-of-memory");
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==, 16384);
    /* Tried again and again */
    limit_address_space(qts, RLIM_INFINITY);
    dedup_wait_block(qts, "mem1", "eligible");
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==,
                    16384 + 128 * GiB / DEDUP_PAGE);
    qtest_quit(qts);
}

/* Devices that use a backend otherwise than as RAM */
static void test_device_backend(void)
{
    static const struct {
        const char *machine;
        const char *device;
    } cases[] = {
        { "pc", "'driver': 'ivshmem-plain', 'memdev': 'mem1'" },
        { "pc,nvdimm=on", "'driver': 'nvdimm', 'memdev': 'mem1'" },
        { "pc", "'driver': 'virtio-pmem-pci', 'memdev': 'mem1'" },
        { "pc", "'driver': 'virtio-mem-pci', 'memdev': 'mem1'" },
    };
    int i;

    if (dedup_skip()) {
        return;
    }
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autofree char *json = NULL;
        QTestState *qts;

        g_test_message("%s", cases[i].device);
        qts = qtest_initf("-machine %s -nodefaults -display none "
                          "-m 64M,slots=4,maxmem=1G " SCANNER,
                          cases[i].machine);
        add_backend(qts, "'qom-type': 'memory-backend-memfd', 'share': true");
        json = g_strdup_printf("{ 'execute': 'device_add', 'arguments': {"
                               " 'id': 'dev1', %s } }", cases[i].device);
        qtest_qmp_assert_success(qts, "%p",
                                 qobject_from_json(json, &error_abort));
        check_reason(qts, "mem1", "device-backend");
        dedup_wait_block(qts, "pc.ram", "eligible");
        qtest_quit(qts);
    }
}

int main(int argc, char **argv)
{
    /* The TPM emulator's channels are QOM objects. */
    module_call_init(MODULE_INIT_QOM);
    g_test_init(&argc, &argv, NULL);

    qtest_add_func("/dedup/ram/main-memory", test_main_memory);
    qtest_add_func("/dedup/ram/numa", test_numa);
    qtest_add_func("/dedup/ram/hotplug", test_hotplug);
    qtest_add_func("/dedup/ram/reason/other", test_other_blocks);
    qtest_add_func("/dedup/ram/reason/merge-off", test_merge_off);
    qtest_add_func("/dedup/ram/reason/prealloc", test_prealloc);
    qtest_add_func("/dedup/ram/reason/host-nodes", test_host_nodes);
    qtest_add_func("/dedup/ram/reason/huge-pages", test_huge_pages);
    qtest_add_func("/dedup/ram/reason/not-tmpfs", test_not_tmpfs);
    qtest_add_func("/dedup/ram/reason/opened-elsewhere",
                   test_opened_elsewhere);
    qtest_add_func("/dedup/ram/reason/lease-denied", test_lease_denied);
    qtest_add_func("/dedup/ram/reason/device-backend", test_device_backend);
    qtest_add_func("/dedup/ram/reason/device-memory", test_device_memory);
    qtest_add_func("/dedup/ram/reason/pmem", test_pmem);
    qtest_add_func("/dedup/ram/reason/exported", test_exported);
    qtest_add_func("/dedup/ram/reason/out-of-memory", test_out_of_memory);
    return g_test_run();
}
