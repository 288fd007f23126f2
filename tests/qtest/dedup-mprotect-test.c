/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner without a userfaultfd: write-protect=mprotect, and auto for a
 * user to whom the host grants none
 *
 * No guest runs: the test writes guest memory through QEMU's own mapping, from
 * its main loop, which waits in the handler.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "dedup-qtest.h"

#define FIRST 0x1000000
#define SECOND 0x2000000
#define PAGES 512

static QTestState *start(const char *backend)
{
    return qtest_initf("-machine pc%s -nodefaults -display none -m 64M %s "
                       "-object dedup-scanner,id=ds0,write-protect=mprotect,"
                       DEDUP_FAST, backend ? ",memory-backend=ram0" : "",
                       backend ?: "");
}

static void assert_way(QTestState *qts, const char *expected)
{
    QDict *info = dedup_info(qts);

    g_assert_cmpstr(qdict_get_str(info, "write-protect"), ==, expected);
    qobject_unref(info);
}

static void unmerge(QTestState *qts)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
}

/* Written again and again, while it is merged: nothing is lost. */
static void check_kind(const char *backend)
{
    QTestState *qts = start(backend);
    int i;

    g_test_message("%s", backend ?: "-m");
    assert_way(qts, "mprotect");
    for (i = 0; i < 4; i++) {
        dedup_fill(qts, FIRST, i, PAGES);
        dedup_fill(qts, SECOND, i, PAGES);
        dedup_verify(qts, FIRST, i, PAGES);
        dedup_verify(qts, SECOND, i, PAGES);
    }
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    dedup_verify(qts, FIRST, i - 1, PAGES);
    dedup_verify(qts, SECOND, i - 1, PAGES);
    unmerge(qts);
    dedup_verify(qts, FIRST, i - 1, PAGES);
    dedup_verify(qts, SECOND, i - 1, PAGES);
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_quit(qts);
}

static void test_kinds(void)
{
    check_kind(NULL);
    check_kind("-object memory-backend-memfd,id=ram0,size=64M,share=on");
}

/* A device that cannot be had leaves no trace. */
static void test_vhost_fails(void)
{
    g_autofree char *desc = NULL;
    QTestState *qts = start(NULL);

    desc = dedup_error(qts, "{ 'execute': 'device_add', 'arguments': {"
                       " 'driver': 'vhost-vsock-pci', 'id': 'v0',"
                       " 'guest-cid': '3', 'vhostfd': '0' } }");
    g_test_message("%s", desc);
    g_assert_null(dedup_blocked(qts, "userfaultfd"));
    dedup_fill(qts, FIRST, 1, PAGES);
    dedup_fill(qts, SECOND, 1, PAGES);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    qtest_quit(qts);
}

/* Threads of the kernel write, and cannot wait: nothing is merged. */
static void test_vhost(void)
{
    g_autofree char *state = NULL;
    QTestState *qts;

    if (access("/dev/vhost-vsock", R_OK | W_OK) < 0) {
        g_test_skip("the host has no /dev/vhost-vsock");
        return;
    }
    qts = start(NULL);
    dedup_fill(qts, FIRST, 1, PAGES);
    dedup_fill(qts, SECOND, 1, PAGES);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_add', 'arguments': {"
                             " 'driver': 'vhost-vsock-pci', 'id': 'v0',"
                             " 'guest-cid': '4711' } }");
    dedup_assert_blocked(qts, "userfaultfd", "vhost in the kernel");
    dedup_assert_blocked(qts, "userfaultfd", "vm.unprivileged_userfaultfd");
    /* What is merged stays, and is given back when the device has gone. */
    dedup_verify(qts, FIRST, 1, PAGES);
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), >=, 2 * PAGES);
    qtest_qmp_device_del_send(qts, "v0");
    qtest_outl(qts, 0xae08, 1 << 3); /* as the guest ejects it */
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    dedup_verify(qts, SECOND, 1, PAGES);
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qtest_add_func("dedup-mprotect/kinds", test_kinds);
    qtest_add_func("dedup-mprotect/vhost/fails", test_vhost_fails);
    qtest_add_func("dedup-mprotect/vhost", test_vhost);
    return g_test_run();
}
