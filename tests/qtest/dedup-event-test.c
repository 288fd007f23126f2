/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: DEDUP_STATE_CHANGED
 */

#include "qemu/osdep.h"
#include "dedup-qtest.h"
#include <sys/stat.h>

#define EVENT "DEDUP_STATE_CHANGED"

static QTestState *start(const char *options, bool run)
{
    QTestState *qts = qtest_initf("-nodefaults -display none -m 64M "
                                  "-machine pc%s", options);

    /* Events that come before a monitor is there are lost. */
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'qom-type': 'dedup-scanner', 'id': 'ds0',"
                             " 'pages-to-scan': 65536, 'sleep-millisecs': 1,"
                             " 'run': %i } }", run);
    return qts;
}

/*
 * The next event must say this.  One that tells of @passing is left out: it
 * depends on the moment whether that state was seen.
 */
static void expect(QTestState *qts, const char *state, const char *reason,
                   const char *text, const char *passing)
{
    QDict *event, *data;
    const char *got;

    for (;;) {
        event = qtest_qmp_eventwait_ref(qts, EVENT);
        data = qdict_get_qdict(event, "data");
        got = qdict_get_str(data, "state");
        g_assert_cmpstr(qdict_get_str(data, "id"), ==, "ds0");
        if (g_strcmp0(got, passing)) {
            break;
        }
        g_assert_cmpint(qdict_size(data), ==, 2);
        qobject_unref(event);
    }
    g_assert_cmpstr(got, ==, state);
    g_assert_cmpstr(qdict_get_try_str(data, "reason"), ==, reason);
    if (reason) {
        g_assert_nonnull(strstr(qdict_get_str(data, "detail"), text));
    }
    g_assert_cmpint(qdict_size(data), ==, reason ? 4 : 2);
    qobject_unref(event);
}

static void test_states(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = start("", false);
    expect(qts, "stopped", NULL, NULL, "scanning");
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    /* Nothing is there to be merged. */
    expect(qts, "idle", NULL, NULL, "scanning");
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    expect(qts, "stopped", NULL, NULL, NULL);
    /* What the event said is what a query says. */
    dedup_wait_state(qts, "stopped");
    qtest_quit(qts);
}

static void test_blocked(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = start(",mem-merge=off", true);
    expect(qts, "blocked", "mem-merge-off", "-machine mem-merge=on", NULL);
    dedup_assert_blocked(qts, "mem-merge-off", "-machine mem-merge=on");
    qtest_quit(qts);
}

/* It stays blocked, for another reason; and nobody asks meanwhile. */
static void test_reason(void)
{
    g_autofree char *dir = dedup_tmpdir("/tmp");
    QTestState *qts;

    if (dedup_skip()) {
        rmdir(dir);
        return;
    }
    g_assert_cmpint(chmod(dir, 0777), ==, 0);
    qts = qtest_init("-nodefaults -display none -m 64M -machine pc");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'qom-type': 'dedup-scanner', 'id': 'ds0',"
                             " 'pages-to-scan': 65536, 'sleep-millisecs': 1,"
                             " 'group': %s } }", dir);
    expect(qts, "blocked", "group", dir, "scanning");
    g_assert_cmpint(chmod(dir, 0700), ==, 0);
    expect(qts, "idle", NULL, NULL, "scanning");
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': 'exec:cat > /dev/null' } }");
    expect(qts, "blocked", "migration", "wait until the migration", NULL);
    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    expect(qts, "idle", NULL, NULL, "scanning");
    qtest_quit(qts);
    dedup_remove_tree(dir);
}

/* However often it changes: twice a second, and the last word is right. */
static void test_rate(void)
{
    g_autofree char *last = g_strdup("stopped");
    QTestState *qts;
    QDict *event;
    int64_t begin;
    int i, seen = 0, bound;

    if (dedup_skip()) {
        return;
    }
    qts = start("", false);
    expect(qts, "stopped", NULL, NULL, "scanning");
    begin = g_get_monotonic_time();
    for (i = 0; i < 50 ||
                g_get_monotonic_time() - begin < 2 * G_USEC_PER_SEC; i++) {
        dedup_set_bool(qts, "/objects/ds0", "run", true);
        dedup_wait_state(qts, "idle");
        dedup_set_bool(qts, "/objects/ds0", "run", false);
        dedup_wait_state(qts, "stopped");
    }
    bound = (g_get_monotonic_time() - begin) / (G_USEC_PER_SEC / 2) + 1;
    while ((event = qtest_qmp_event_ref(qts, EVENT))) {
        g_free(last);
        last = g_strdup(qdict_get_str(qdict_get_qdict(event, "data"),
                                      "state"));
        qobject_unref(event);
        seen++;
    }
    g_test_message("%d changes, %d events, at most %d; the last: %s", 2 * i,
                   seen, bound, last);
    g_assert_cmpint(seen, >, 0);
    g_assert_cmpint(seen, <=, bound);
    if (!g_str_equal(last, "stopped")) {
        expect(qts, "stopped", NULL, NULL, NULL);
    }
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    qtest_add_func("/dedup/event/states", test_states);
    qtest_add_func("/dedup/event/blocked", test_blocked);
    qtest_add_func("/dedup/event/reason", test_reason);
    qtest_add_func("/dedup/event/rate", test_rate);
    return g_test_run();
}
