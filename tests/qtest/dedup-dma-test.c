/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory that a device transfers data to is left alone
 *
 * A disk that takes its time: the guest's buffer stays mapped for DMA until
 * the read has ended.  Equal pages there must stay as they are; the same
 * pages elsewhere are merged.  Then they are merged, too.
 *
 * The areas where an AHCI port finds its commands and posts its replies are
 * mapped for as long as the port runs, but not for DMA: they are merged.
 *
 * Who needs RAM whole waits for the disk, but not for one that hangs.
 */

#include "qemu/osdep.h"
#include "dedup-qtest.h"
#include "libqos/libqos-pc.h"
#include "libqos/ahci.h"
#include <sys/socket.h>
#include <sys/un.h>

#define CHUNK (64 * 1024)
#define CHUNK_PAGES (CHUNK / DEDUP_PAGE)
#define ELSEWHERE (16 * 1024 * 1024)
#define BYTE 0x5a

/* Pages of [@start, @start + CHUNK) in RAM's file; merged ones are holes. */
static int pages_in_file(int fd, uint64_t start)
{
    uint8_t page[DEDUP_PAGE];
    int i, n = 0;

    for (i = 0; i < CHUNK_PAGES; i++) {
        g_assert_cmpint(pread(fd, page, sizeof(page),
                              start + i * DEDUP_PAGE), ==, sizeof(page));
        n += page[DEDUP_PAGE / 2] == BYTE;
    }
    return n;
}

#define BUFFER (8 * 1024 * 1024)

static AHCIQState *start(const char *disk, int *fd)
{
    AHCIQState *ahci = g_new0(AHCIQState, 1);

    ahci->parent = qtest_pc_boot("-m 64M -machine q35,memory-backend=ram0 "
        "-object memory-backend-memfd,id=ram0,size=64M,share=on "
        "-object dedup-scanner,id=ds0,run=off," DEDUP_FAST " %s", disk);
    ahci->dev = get_ahci_device(ahci->parent->qts, &ahci->fingerprint);
    ahci_pci_enable(ahci);
    ahci_hba_enable(ahci);
    *fd = dedup_open_memfd(ahci->parent->qts);
    return ahci;
}

static void stop(AHCIQState *ahci, int fd)
{
    close(fd);
    /* Lists of what was allocated may be overwritten: forget it. */
    free_ahci_device(ahci->dev);
    qtest_shutdown(ahci->parent);
}

/* Equal pages at two places */
static void fill(AHCIQState *ahci, int fd, uint64_t chunk)
{
    qtest_memset(ahci->parent->qts, chunk, BYTE, CHUNK);
    qtest_memset(ahci->parent->qts, ELSEWHERE, BYTE, CHUNK);
    g_assert_cmpint(pages_in_file(fd, chunk), ==, CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, ELSEWHERE), ==, CHUNK_PAGES);
    dedup_set_bool(ahci->parent->qts, "/objects/ds0", "run", true);
}

static void test_read(void)
{
    g_autofree AHCIQState *ahci = NULL;
    AHCICommand *cmd;
    unsigned port;
    int fd;

    if (dedup_skip()) {
        return;
    }
    ahci = start("-blockdev null-aio,node-name=disk,latency-ns=5000000000 "
                 "-device ide-hd,drive=disk,bus=ide.0", &fd);
    port = ahci_port_select(ahci);
    ahci_port_clear(ahci, port);
    cmd = ahci_command_create(CMD_READ_DMA);
    ahci_command_adjust(cmd, 0, BUFFER, CHUNK, CHUNK);
    ahci_command_commit(ahci, cmd, port);
    ahci_command_issue_async(ahci, cmd);

    fill(ahci, fd, BUFFER);
    dedup_wait_at_least(ahci->parent->qts, "pages-merged", CHUNK_PAGES);
    dedup_wait_at_least(ahci->parent->qts, "pages-pinned", CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, BUFFER), ==, CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, ELSEWHERE), ==, 0);

    /* The disk wrote nothing: the pages are still equal. */
    ahci_command_wait(ahci, cmd);
    ahci_command_free(cmd);
    dedup_wait_at_least(ahci->parent->qts, "pages-merged", 2 * CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, BUFFER), ==, 0);
    g_assert_cmpint(dedup_figure(ahci->parent->qts, "pages-pinned"), ==, 0);
    stop(ahci, fd);
}

static void test_port(void)
{
    g_autofree AHCIQState *ahci = NULL;
    uint64_t chunk;
    int fd;

    if (dedup_skip()) {
        return;
    }
    ahci = start("", &fd);
    /* All ports were started; what they write to lies close together. */
    chunk = QEMU_ALIGN_DOWN(ahci->port[0].fb, CHUNK);
    g_assert_cmphex(QEMU_ALIGN_DOWN(ahci->port[0].clb, CHUNK), ==, chunk);
    fill(ahci, fd, chunk);
    dedup_wait_at_least(ahci->parent->qts, "pages-merged", 2 * CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, chunk), ==, 0);
    g_assert_cmpint(dedup_figure(ahci->parent->qts, "pages-pinned"), ==, 0);
    stop(ahci, fd);
}

/* A socket for a back end that hangs up: it comes to that if RAM is whole. */
static int listen_at(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
    g_assert_cmpint(bind(fd, (struct sockaddr *)&address, sizeof(address)),
                    ==, 0);
    g_assert_cmpint(listen(fd, 1), ==, 0);
    return fd;
}

#define HANG_SECONDS 20

/*
 * A page of the transfer that hangs was copied, and so cannot be restored: a
 * plug fails, soon.
 */
static void test_hang(void)
{
    g_autofree AHCIQState *ahci = NULL;
    g_autofree char *dir = dedup_tmpdir("/tmp");
    g_autofree char *path = g_strdup_printf("%s/sock", dir);
    g_autofree char *disk = NULL, *desc = NULL;
    int64_t start_us;
    AHCICommand *cmd;
    QTestState *qts;
    unsigned port;
    int fd, listener;

    if (dedup_skip()) {
        return;
    }
    listener = listen_at(path);
    disk = g_strdup_printf("-blockdev null-aio,node-name=disk,"
                           "latency-ns=%d000000000 "
                           "-device ide-hd,drive=disk,bus=ide.0,"
                           /* or they are looked for on the disk */
                           "cyls=16,heads=16,secs=63 "
                           "-device pcie-root-port,id=root "
                           "-chardev socket,id=c0,path=%s",
                           HANG_SECONDS, path);
    ahci = start(disk, &fd);
    close(accept(listener, NULL, NULL));
    qts = ahci->parent->qts;
    fill(ahci, fd, BUFFER);
    dedup_wait_at_least(qts, "pages-merged", 2 * CHUNK_PAGES);
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    dedup_wait_state(qts, "stopped");

    port = ahci_port_select(ahci);
    ahci_port_clear(ahci, port);
    cmd = ahci_command_create(CMD_READ_DMA);
    ahci_command_adjust(cmd, 0, BUFFER, CHUNK, CHUNK);
    ahci_command_commit(ahci, cmd, port);
    ahci_command_issue_async(ahci, cmd);
    qtest_writeb(qts, BUFFER, BYTE);

    start_us = g_get_monotonic_time();
    desc = dedup_error(qts, "{ 'execute': 'device_add', 'arguments': {"
                       " 'driver': 'vhost-user-fs-pci', 'id': 'd0',"
                       " 'bus': 'root', 'tag': 't', 'chardev': 'c0' } }");
    g_test_message("%s", desc);
    g_assert_nonnull(strstr(desc, "a device writes to them"));
    g_assert_cmpint(g_get_monotonic_time() - start_us, <,
                    HANG_SECONDS / 2 * G_USEC_PER_SEC);

    ahci_command_wait(ahci, cmd);
    ahci_command_free(cmd);
    /* Now it fails because nobody is there. */
    g_free(desc);
    desc = dedup_error(qts, "{ 'execute': 'device_add', 'arguments': {"
                       " 'driver': 'vhost-user-fs-pci', 'id': 'd0',"
                       " 'bus': 'root', 'tag': 't', 'chardev': 'c0' } }");
    g_test_message("%s", desc);
    g_assert_null(strstr(desc, "merged"));
    g_assert_cmpint(pages_in_file(fd, BUFFER), ==, CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, ELSEWHERE), ==, CHUNK_PAGES);
    stop(ahci, fd);
    close(listener);
    unlink(path);
    rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qtest_add_func("dedup/dma/read", test_read);
    qtest_add_func("dedup/dma/port", test_port);
    qtest_add_func("dedup/dma/hang", test_hang);
    return g_test_run();
}
