/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner beside a VFIO device, which pins all guest RAM
 *
 * What the device has mapped is where the pages were: a page that is replaced
 * later, or that is a merged one when it is mapped, is wrong for one of the
 * two, and nobody would notice.
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "dedup-qtest.h"
#include "vfio-fake.h"

#define RAM (64 * MiB)
#define START (1 * MiB)
#define PAGES 1024
#define LENGTH (PAGES * DEDUP_PAGE)
#define SEED 3

static QTestState *start(const char *more)
{
    return qtest_initf(DEDUP_MACHINE "-object dedup-scanner,id=ds0,"
                       DEDUP_FAST " %s", more);
}

/* Each page of a series twice */
static void fill(QTestState *qts)
{
    dedup_fill(qts, START, SEED, PAGES);
    dedup_fill(qts, START + LENGTH, SEED, PAGES);
}

static void verify(QTestState *qts)
{
    dedup_verify(qts, START, SEED, PAGES);
    dedup_verify(qts, START + LENGTH, SEED, PAGES);
}

static void assert_blocked(QTestState *qts)
{
    dedup_assert_blocked(qts, "discard-disabled", "VFIO");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
}

/* A VM that is started with the device */
static void test_first(void)
{
    g_autofree char *device = NULL;
    QTestState *qts;
    int64_t scans;

    if (dedup_skip_unless_root() || !vfio_fake_start()) {
        return;
    }
    device = g_strdup_printf("-device vfio-pci,id=v0,enable-migration=off,"
                             "sysfsdev=%s", vfio_fake_sysfsdev());
    qts = start(device);
    g_assert_cmpuint(vfio_fake_mapped(), >=, RAM);
    assert_blocked(qts);
    fill(qts);
    scans = dedup_figure(qts, "full-scans");
    /* Nothing happens, which no event can tell: give it time to happen. */
    g_usleep(G_USEC_PER_SEC / 2);
    g_assert_cmpint(dedup_figure(qts, "full-scans"), ==, scans);
    assert_blocked(qts);
    verify(qts);
    qtest_quit(qts);
}

/*
 * A device that is plugged while pages are merged is refused, before it has
 * mapped anything; afterwards it is taken, and nothing is merged until it has
 * gone.
 */
static void test_plug(void)
{
    g_autofree char *err = NULL, *detail = NULL;
    QTestState *qts;

    if (dedup_skip_unless_root() || !vfio_fake_start()) {
        return;
    }
    qts = start("");
    fill(qts);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    err = dedup_error(qts, "{ 'execute': 'device_add', 'arguments': {"
                      " 'driver': 'vfio-pci', 'id': 'v0',"
                      " 'enable-migration': 'off', 'sysfsdev': %s } }",
                      vfio_fake_sysfsdev());
    g_test_message("%s", err);
    g_assert_nonnull(strstr(err, "Cannot set discarding of RAM broken"));
    g_assert_cmpuint(vfio_fake_mapped(), ==, 0);
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), >=, 2 * PAGES);
    verify(qts);

    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_add', 'arguments': {"
                             " 'driver': 'vfio-pci', 'id': 'v0',"
                             " 'enable-migration': 'off',"
                             " 'sysfsdev': %s } }", vfio_fake_sysfsdev());
    g_assert_cmpuint(vfio_fake_mapped(), >=, RAM);
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    dedup_wait_state(qts, "blocked");
    assert_blocked(qts);
    verify(qts);

    /* Unplugging is finished by the reset: there is no guest to agree. */
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_del', 'arguments': {"
                             " 'id': 'v0' } }");
    qtest_qmp_assert_success(qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(qts, "DEVICE_DELETED");
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    detail = dedup_blocked(qts, "discard-disabled");
    g_assert_null(detail);
    g_assert_cmpuint(vfio_fake_mapped(), ==, 0);
    verify(qts);
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    int ret;

    g_test_init(&argc, &argv, NULL);
    if (qtest_has_device("vfio-pci")) {
        qtest_add_func("/dedup/vfio/first", test_first);
        qtest_add_func("/dedup/vfio/plug", test_plug);
    }
    ret = g_test_run();
    vfio_fake_stop();
    return ret;
}
