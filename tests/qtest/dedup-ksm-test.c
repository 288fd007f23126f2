/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory that dedup-scanner takes from KSM comes back, if its owner wants
 *
 * Whether KSM may merge memory is a flag of each mapping, "mg" in smaps.
 */

#include "qemu/osdep.h"
#include <sys/prctl.h>
#include "qemu/cutils.h"
#include "dedup-qtest.h"

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

#define FIRST 0x1000000
#define SECOND 0x2000000
#define PAGES 512
#define RAM_KB (64 * 1024)

/* How much memory KSM may merge, in KiB. */
static uint64_t mergeable(QTestState *qts)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/smaps", qtest_pid(qts));
    g_autofree char *all = NULL;
    g_auto(GStrv) lines = NULL;
    uint64_t size = 0, sum = 0;
    const char *value;
    int i;

    g_assert_true(g_file_get_contents(path, &all, NULL, NULL));
    lines = g_strsplit(all, "\n", -1);
    for (i = 0; lines[i]; i++) {
        if (strstart(lines[i], "Size:", &value)) {
            size = g_ascii_strtoull(value, NULL, 10);
        } else if (g_str_has_prefix(lines[i], "VmFlags:") &&
                   strstr(lines[i], " mg")) {
            sum += size;
        }
    }
    return sum;
}

/* A machine with merged RAM, or NULL: then the test is skipped. */
static QTestState *start(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return NULL;
    }
    qts = qtest_init("-machine pc,memory-backend=ram0 -nodefaults "
                     "-display none -m 64M "
                     "-object memory-backend-ram,id=ram0,size=64M "
                     "-object dedup-scanner,id=ds0,run=off," DEDUP_FAST);
    if (mergeable(qts) < RAM_KB) {
        g_test_skip("the kernel has no KSM");
        qtest_quit(qts);
        return NULL;
    }
    dedup_fill(qts, FIRST, 1, PAGES);
    dedup_fill(qts, SECOND, 1, PAGES);
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    g_assert_cmpuint(mergeable(qts), <, RAM_KB);
    return qts;
}

static void unmerge(QTestState *qts)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
}

static void test_object_del(void)
{
    QTestState *qts = start();

    if (!qts) {
        return;
    }
    unmerge(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del', 'arguments': {"
                             " 'id': 'ds0' } }");
    g_assert_cmpuint(mergeable(qts), >=, RAM_KB);
    qtest_quit(qts);
}

/* The owner wants no merging at all; later, it does. */
static void test_merge_off(void)
{
    QTestState *qts = start();

    if (!qts) {
        return;
    }
    dedup_set_bool(qts, "/objects/ram0", "merge", false);
    dedup_wait_block(qts, "ram0", "merge-off");
    unmerge(qts);
    dedup_wait_state(qts, "stopped");
    dedup_wait_none(qts, "pages-total"); /* the worker has let go, too */
    g_assert_cmpuint(mergeable(qts), <, RAM_KB / 2);
    dedup_set_bool(qts, "/objects/ram0", "merge", true);
    dedup_wait_block(qts, "ram0", "eligible");
    g_assert_cmpuint(mergeable(qts), >=, RAM_KB);
    qtest_quit(qts);
}

/* A block that leaves for another reason */
static void test_prealloc(void)
{
    QTestState *qts = start();

    if (!qts) {
        return;
    }
    dedup_set_bool(qts, "/objects/ram0", "prealloc", true);
    dedup_wait_block(qts, "ram0", "prealloc");
    unmerge(qts);
    dedup_wait_state(qts, "stopped");
    dedup_wait_none(qts, "pages-total");
    g_assert_cmpuint(mergeable(qts), >=, RAM_KB);
    qtest_quit(qts);
}

/* As with MemoryKSM=yes in the systemd unit that starts QEMU */
static void test_process(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) < 0) {
        g_test_skip("this kernel cannot let KSM merge all of a process");
        return;
    }
    qts = qtest_init("-machine pc -nodefaults -display none -m 64M "
                     "-object dedup-scanner,id=ds0," DEDUP_FAST);
    g_assert_cmpint(prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0), ==, 0);
    if (mergeable(qts) < RAM_KB) {
        g_test_skip("this kernel forgets it when a program is started");
    } else {
        dedup_assert_blocked(qts, "memory-ksm", "MemoryKSM=no");
    }
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    qtest_add_func("/dedup/ksm/object-del", test_object_del);
    qtest_add_func("/dedup/ksm/merge-off", test_merge_off);
    qtest_add_func("/dedup/ksm/prealloc", test_prealloc);
    qtest_add_func("/dedup/ksm/process", test_process);
    return g_test_run();
}
