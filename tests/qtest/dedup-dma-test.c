/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory that a device has mapped for writing is left alone
 *
 * An AHCI port keeps the areas where it posts its replies mapped for as long
 * as it runs: a DMA mapping that the test can hold as long as it likes.
 * Equal pages around it must stay as they are; the same pages elsewhere are
 * merged.  Once the port is stopped they are merged, too.
 */

#include "qemu/osdep.h"
#include "dedup-qtest.h"
#include "libqos/libqos-pc.h"
#include "libqos/ahci.h"

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

static void test_ahci(void)
{
    g_autofree AHCIQState *ahci = NULL;
    uint64_t chunk;
    int fd, port;

    if (dedup_skip()) {
        return;
    }
    ahci = g_new0(AHCIQState, 1);
    ahci->parent = qtest_pc_boot("-m 64M -machine q35,memory-backend=ram0 "
        "-object memory-backend-memfd,id=ram0,size=64M,share=on "
        "-object dedup-scanner,id=ds0,run=off," DEDUP_FAST);
    ahci->dev = get_ahci_device(ahci->parent->qts, &ahci->fingerprint);
    ahci_pci_enable(ahci);
    ahci_hba_enable(ahci);
    fd = dedup_open_memfd(ahci->parent->qts);

    /* All ports were started; what they write to lies close together. */
    chunk = QEMU_ALIGN_DOWN(ahci->port[0].fb, CHUNK);
    g_assert_cmphex(QEMU_ALIGN_DOWN(ahci->port[0].clb, CHUNK), ==, chunk);
    qtest_memset(ahci->parent->qts, chunk, BYTE, CHUNK);
    qtest_memset(ahci->parent->qts, ELSEWHERE, BYTE, CHUNK);
    g_assert_cmpint(pages_in_file(fd, chunk), ==, CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, ELSEWHERE), ==, CHUNK_PAGES);

    dedup_set_bool(ahci->parent->qts, "/objects/ds0", "run", true);
    dedup_wait_at_least(ahci->parent->qts, "pages-merged", CHUNK_PAGES);
    dedup_wait_at_least(ahci->parent->qts, "pages-pinned", CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, chunk), ==, CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, ELSEWHERE), ==, 0);

    for (port = 0; port < 32; port++) {
        if (ahci->port[port].fb) {
            ahci_px_clr(ahci, port, AHCI_PX_CMD,
                        AHCI_PX_CMD_ST | AHCI_PX_CMD_FRE);
        }
    }
    dedup_wait_at_least(ahci->parent->qts, "pages-merged", 2 * CHUNK_PAGES);
    g_assert_cmpint(pages_in_file(fd, chunk), ==, 0);
    g_assert_cmpint(dedup_figure(ahci->parent->qts, "pages-pinned"), ==, 0);

    close(fd);
    /* The lists of what was allocated were overwritten: forget it. */
    free_ahci_device(ahci->dev);
    qtest_shutdown(ahci->parent);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qtest_add_func("dedup/dma/ahci", test_ahci);
    return g_test_run();
}
