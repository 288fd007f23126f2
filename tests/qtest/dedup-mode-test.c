/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: what its modes count and change, and what they leave alone
 *
 * No guest runs: the test writes guest memory itself, through QEMU's own
 * mapping, and reads it back the same way or in the RAM's file.
 */

#include "qemu/osdep.h"
#include "dedup-qtest.h"

#define FIRST 0x1000000
#define SECOND 0x2000000
#define PAGES 512
/* Written with zeros: present, and all zero */
#define ZERO 0x3000000
#define ZEROES 128

/* RAM is a memfd. */
static QTestState *start(const char *more)
{
    return qtest_initf("-machine pc,memory-backend=ram0 -nodefaults "
                       "-display none -m 64M,slots=4,maxmem=1G "
                       "-object memory-backend-memfd,id=ram0,size=64M,share=on"
                       " %s", more);
}

/* Two copies of the same pages, and pages of zeros. */
static void fill(QTestState *qts)
{
    dedup_fill(qts, FIRST, 1, PAGES);
    dedup_fill(qts, SECOND, 1, PAGES);
    qtest_memset(qts, ZERO, 0, ZEROES * DEDUP_PAGE);
}

static void verify(QTestState *qts)
{
    g_autofree uint8_t *zeroes = g_malloc(ZEROES * DEDUP_PAGE);
    int i;

    dedup_verify(qts, FIRST, 1, PAGES);
    dedup_verify(qts, SECOND, 1, PAGES);
    qtest_bufread(qts, ZERO, zeroes, ZEROES * DEDUP_PAGE);
    for (i = 0; i < ZEROES * DEDUP_PAGE; i++) {
        g_assert_cmphex(zeroes[i], ==, 0);
    }
}

static int64_t estimate(QTestState *qts, const char *name)
{
    QDict *info = dedup_info(qts);
    int64_t value = qdict_get_int(qdict_get_qdict(info, "estimate"), name);

    qobject_unref(info);
    return value;
}

static void wait_scans(QTestState *qts, int n)
{
    dedup_wait_at_least(qts, "full-scans",
                        dedup_figure(qts, "full-scans") + n);
}

/* Has QEMU a userfaultfd? */
static bool has_userfaultfd(QTestState *qts)
{
    g_autofree char *dir = g_strdup_printf("/proc/%d/fd", qtest_pid(qts));
    g_autoptr(GDir) d = g_dir_open(dir, 0, NULL);
    const char *name;
    bool found = false;

    g_assert_nonnull(d);
    while ((name = g_dir_read_name(d))) {
        g_autofree char *path = g_strdup_printf("%s/%s", dir, name);
        g_autofree char *target = g_file_read_link(path, NULL);

        found = found || (target && strstr(target, "userfaultfd"));
    }
    return found;
}

static void set_mode(QTestState *qts, const char *mode)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                             " 'path': '/objects/ds0', 'property': 'mode',"
                             " 'value': %s } }", mode);
}

/*
 * Even where nothing may be merged.  What is counted is what is merged
 * afterwards, without an unmerge before.
 */
static void test_estimate(void)
{
    g_autofree char *hmp = NULL, *write_protect = NULL, *desc = NULL;
    QTestState *qts = start("-overcommit mem-lock=on -object dedup-scanner,"
                            "id=ds0,mode=estimate," DEDUP_FAST);
    int64_t within, zero;
    QDict *info;
    int fd;

    fill(qts);
    fd = dedup_open_memfd(qts);
    wait_scans(qts, 3);
    within = estimate(qts, "pages-within");
    zero = estimate(qts, "zero-pages");
    /* locked memory is all there: what was never written is zero */
    g_assert_cmpint(within, >=, PAGES);
    g_assert_cmpint(within, <, 2 * PAGES);
    g_assert_cmpint(zero, >=, ZEROES);
    g_assert_cmpint(estimate(qts, "pages-between"), ==, 0);
    g_assert_cmpint(estimate(qts, "bytes"), >=,
                    (PAGES + ZEROES) * DEDUP_PAGE);

    info = dedup_info(qts);
    write_protect = g_strdup(qdict_get_str(info, "write-protect"));
    g_assert_cmpstr(write_protect, ==, "auto");
    g_assert_true(qlist_empty(qdict_get_qlist(info, "blocked-reasons")));
    g_assert_cmpint(qdict_get_int(info, "pages-merged"), ==, 0);
    g_assert_cmpint(qdict_get_int(info, "zero-pages"), ==, 0);
    qobject_unref(info);
    hmp = qtest_hmp(qts, "info dedup");
    g_assert_nonnull(strstr(hmp, "would be saved: "));
    g_assert_false(has_userfaultfd(qts));
    verify(qts);
    dedup_verify_fd(fd, FIRST, 1, PAGES);
    dedup_verify_fd(fd, SECOND, 1, PAGES);

    desc = dedup_error(qts, "{ 'execute': 'qom-set', 'arguments': {"
                       " 'path': '/objects/ds0', 'property': 'mode',"
                       " 'value': 'full' } }");
    g_assert_nonnull(strstr(desc, "remove it with object-del"));
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del', 'arguments': {"
                             " 'id': 'ds0' } }");
    close(fd);
    qtest_quit(qts);
}

/* What needs RAM whole may come while it is estimated. */
static void test_export(void)
{
    QTestState *qts = start("-object dedup-scanner,id=ds0,mode=estimate,"
                            DEDUP_FAST);
    QDict *info;

    fill(qts);
    wait_scans(qts, 2);
    dedup_migrate_ignoring_shared(qts);
    info = dedup_info(qts);
    g_assert_cmpint(qdict_get_int(info, "pages-merged"), ==, 0);
    qobject_unref(info);
    verify(qts);
    qtest_quit(qts);
}

/* An object that estimates, then one that merges: it finds what was said. */
static void test_then_full(void)
{
    QTestState *qts = start("-object dedup-scanner,id=ds0,mode=estimate,"
                            DEDUP_FAST);
    int64_t said;

    if (dedup_skip()) {
        qtest_quit(qts);
        return;
    }
    fill(qts);
    wait_scans(qts, 3);
    said = estimate(qts, "zero-pages");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del', 'arguments': {"
                             " 'id': 'ds0' } }");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'qom-type': 'dedup-scanner', 'id': 'ds0',"
                             " 'pages-to-scan': 65536,"
                             " 'sleep-millisecs': 1 } }");
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    dedup_wait_at_least(qts, "zero-pages", said);
    verify(qts);
    qtest_quit(qts);
}

static void test_zero(void)
{
    g_autofree char *desc = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = start("-object dedup-scanner,id=ds0,mode=zero," DEDUP_FAST);
    fill(qts);
    dedup_wait_at_least(qts, "zero-pages", ZEROES);
    wait_scans(qts, 3);
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    verify(qts);

    desc = dedup_error(qts, "{ 'execute': 'qom-set', 'arguments': {"
                       " 'path': '/objects/ds0', 'property': 'zero-pages',"
                       " 'value': false } }");
    g_assert_nonnull(strstr(desc, "mode=zero with zero-pages=off"));
    g_free(desc);
    desc = dedup_error(qts, "{ 'execute': 'qom-set', 'arguments': {"
                       " 'path': '/objects/ds0', 'property': 'mode',"
                       " 'value': 'estimate' } }");
    g_assert_nonnull(strstr(desc, "remove it with object-del"));

    set_mode(qts, "full");
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    set_mode(qts, "zero");
    wait_scans(qts, 3);
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), >=, 2 * PAGES);
    verify(qts);
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qtest_add_func("/dedup/mode/estimate", test_estimate);
    qtest_add_func("/dedup/mode/export", test_export);
    qtest_add_func("/dedup/mode/then-full", test_then_full);
    qtest_add_func("/dedup/mode/zero", test_zero);
    return g_test_run();
}
