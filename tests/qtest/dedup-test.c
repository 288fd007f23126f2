/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: the object, its properties, its errors, its figures
 */

#include "qemu/osdep.h"
#include "dedup-qtest.h"
#include <sys/ptrace.h>

static void check_object(QTestState *qts, int max_maps)
{
    g_autofree char *state = dedup_state(qts);
    QDict *resp;

    g_assert_cmpstr(state, !=, "blocked");
    resp = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': {"
                     " 'path': '/objects/ds0', 'property': 'max-maps' } }");
    g_assert_cmpint(qdict_get_int(resp, "return"), ==, max_maps);
    qobject_unref(resp);
    dedup_wait_block(qts, "pc.ram", "eligible");
}

static void test_option(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-object dedup-scanner,id=ds0,max-maps=41");
    check_object(qts, 41);
    qtest_quit(qts);
}

static void test_json(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-object '{\"qom-type\":\"dedup-scanner\","
                     "\"id\":\"ds0\",\"max-maps\":42}'");
    check_object(qts, 42);
    qtest_quit(qts);
}

static void test_qmp(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE);
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'qom-type': 'dedup-scanner', 'id': 'ds0',"
                             " 'max-maps': 43, 'run': false } }");
    check_object(qts, 43);
    dedup_wait_state(qts, "stopped");
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    dedup_wait_at_least(qts, "full-scans", 1);
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    dedup_wait_state(qts, "stopped");
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_quit(qts);
}

/*
 * An unmerge that is cancelled when nothing is left to do: its end was not
 * said, because the scanner's thread is held up.  No page is left, so there
 * is no reason why.
 */
static void test_cancel(void)
{
    QTestState *qts;
    QDict *event, *data;
    pid_t tid;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-object dedup-scanner,id=ds0,run=off");
    dedup_wait_state(qts, "stopped");
    tid = dedup_figure(qts, "thread-id");
    /* It sleeps until it is told to do something. */
    g_usleep(100000);
    if (ptrace(PTRACE_SEIZE, tid, NULL, NULL) < 0) {
        g_test_skip("may not trace a thread of QEMU's");
        qtest_quit(qts);
        return;
    }
    g_assert_cmpint(ptrace(PTRACE_INTERRUPT, tid, NULL, NULL), ==, 0);
    g_assert_cmpint(waitpid(tid, NULL, __WALL), ==, tid);
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    event = qtest_qmp_eventwait_ref(qts, "DEDUP_UNMERGE_COMPLETED");
    data = qdict_get_qdict(event, "data");
    g_assert_cmpint(qdict_get_int(data, "pages-left"), ==, 0);
    g_assert_false(qdict_haskey(data, "reason"));
    qobject_unref(event);
    g_assert_cmpint(ptrace(PTRACE_DETACH, tid, NULL, NULL), ==, 0);
    dedup_wait_at_least(qts, "full-scans", 1);
    qtest_quit(qts);
}

static void test_hmp(void)
{
    g_autofree char *out = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE);
    out = qtest_hmp(qts, "object_add dedup-scanner,id=ds0,max-maps=44");
    g_assert_cmpstr(out, ==, "");
    check_object(qts, 44);
    g_free(out);
    out = qtest_hmp(qts, "info dedup");
    g_assert_nonnull(strstr(out, "ds0: "));
    g_assert_nonnull(strstr(out, "  saved: "));
    g_assert_nonnull(strstr(out, " % of 16384 pages"));
    g_assert_nonnull(strstr(out, "block pc.ram: 16384 pages"));
    g_free(out);
    out = qtest_hmp(qts, "dedup_unmerge -f ds0");
    g_assert_nonnull(strstr(out, "Unmerging"));
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    g_free(out);
    out = qtest_hmp(qts, "dedup_unmerge");
    g_assert_nonnull(strstr(out, "Unmerging"));
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    g_free(out);
    out = qtest_hmp(qts, "info stats vm * dedup");
    g_assert_nonnull(strstr(out, "pages-total"));
    qtest_quit(qts);
}

/* -object dedup-scanner,help: every property is there and described. */
static void test_help(void)
{
    static const char *const names[] = {
        "group", "run", "write-protect", "pages-to-scan", "sleep-millisecs",
        "zero-pages", "huge-pages", "max-maps", "thread-context", "advisor",
        "target-scan-time", "max-cpu", "max-cpu-vm",
        "advisor-min-pages-to-scan", "advisor-max-pages-to-scan", "mode",
    };
    g_autofree char *command = NULL, *out = NULL;
    g_auto(GStrv) lines = NULL;
    g_autoptr(GError) err = NULL;
    int status, i, found = 0;

    command = g_strdup_printf("%s -object dedup-scanner,help",
                              g_getenv("QTEST_QEMU_BINARY"));
    g_spawn_command_line_sync(command, &out, NULL, &status, &err);
    g_assert_no_error(err);
    g_assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    lines = g_strsplit(out, "\n", -1);
    for (i = 1; lines[i] && *lines[i]; i++) {
        const char *description = strstr(lines[i], " - ");
        int j;

        g_test_message("%s", lines[i]);
        g_assert_nonnull(description);
        /* nothing stands for "none" */
        g_assert_true(strstr(lines[i], "(default: ") ||
                      strstr(lines[i], "group") ||
                      strstr(lines[i], "thread-context"));
        g_assert_cmpint(strlen(description), >, 10);
        for (j = 0; j < ARRAY_SIZE(names); j++) {
            g_autofree char *start = g_strdup_printf("  %s=<", names[j]);

            found += g_str_has_prefix(lines[i], start);
        }
    }
    g_assert_cmpint(i - 1, ==, ARRAY_SIZE(names));
    g_assert_cmpint(found, ==, ARRAY_SIZE(names));
}

/* Each value read back, each refusal understood; before and at run time. */
static void test_properties(void)
{
    static const struct {
        const char *name;
        int64_t good;
        int64_t bad;
        const char *error;
    } numbers[] = {
        { "pages-to-scan", 1, 0, "between 1 and 2147483648" },
        { "pages-to-scan", 2147483648, 2147483649,
          "between 1 and 2147483648" },
        { "sleep-millisecs", 60000, 60001, "between 0 and 60000" },
        { "sleep-millisecs", 0, 99999, "between 0 and 60000" },
        { "target-scan-time", 1, 0, "between 1 and 86400" },
        { "target-scan-time", 86400, 86401, "between 1 and 86400" },
        { "max-cpu", 0, -1, "between 0 and 100000" },
        { "max-cpu", 100000, 100001, "between 0 and 100000" },
        { "max-cpu-vm", 0, -1, "between 0 and 100" },
        { "max-cpu-vm", 100, 101, "between 0 and 100" },
        { "advisor-min-pages-to-scan", 2147483648, -1,
          "between 0 and 2147483648" },
        { "advisor-max-pages-to-scan", 0, 2147483649,
          "between 0 and 2147483648" },
        { "max-maps", 1, 0, "between 1 and 90" },
        { "max-maps", 90, 91, "between 1 and 90" },
        { "max-maps", 90, -1, "between 1 and 90" },
        { "max-maps", 90, 1LL << 40, "between 1 and 90" },
    };
    QTestState *qts;
    QDict *resp;
    int i;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-object dedup-scanner,id=ds0,run=off");
    for (i = 0; i < ARRAY_SIZE(numbers); i++) {
        g_autofree char *desc = NULL;

        qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                                 " 'path': '/objects/ds0', 'property': %s,"
                                 " 'value': %" PRId64 " } }",
                                 numbers[i].name, numbers[i].good);
        desc = dedup_error(qts, "{ 'execute': 'qom-set', 'arguments': {"
                           " 'path': '/objects/ds0', 'property': %s,"
                           " 'value': %" PRId64 " } }",
                           numbers[i].name, numbers[i].bad);
        g_assert_nonnull(strstr(desc, numbers[i].name));
        g_assert_nonnull(strstr(desc, numbers[i].error));
        resp = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': {"
                         " 'path': '/objects/ds0', 'property': %s } }",
                         numbers[i].name);
        g_assert_cmpint(qdict_get_int(resp, "return"), ==, numbers[i].good);
        qobject_unref(resp);
    }

    dedup_set_bool(qts, "/objects/ds0", "zero-pages", false);
    resp = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': {"
                     " 'path': '/objects/ds0', 'property': 'zero-pages' } }");
    g_assert_false(qdict_get_bool(resp, "return"));
    qobject_unref(resp);

    qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                             " 'path': '/objects/ds0', 'property':"
                             " 'huge-pages', 'value': 'keep' } }");
    resp = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': {"
                     " 'path': '/objects/ds0', 'property': 'huge-pages' } }");
    g_assert_cmpstr(qdict_get_str(resp, "return"), ==, "keep");
    qobject_unref(resp);
    qtest_quit(qts);
}

static char *get_advisor(QTestState *qts)
{
    QDict *resp = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': {"
                            " 'path': '/objects/ds0',"
                            " 'property': 'advisor' } }");
    char *advisor = g_strdup(qdict_get_str(resp, "return"));

    qobject_unref(resp);
    return advisor;
}

/* Who says how fast to scan wants no advice, but if he says so. */
static void test_advisor(void)
{
    static const struct {
        const char *options;
        const char *advisor;
    } cases[] = {
        { "", "scan-time" },
        { ",max-cpu=10,target-scan-time=60", "scan-time" },
        { ",pages-to-scan=100", "none" },
        { ",sleep-millisecs=0", "none" },
        { ",advisor=pressure", "pressure" },
        { ",advisor=scan-time,pages-to-scan=100", "scan-time" },
        { ",sleep-millisecs=5,advisor=scan-time", "scan-time" },
    };
    int i;

    if (dedup_skip()) {
        return;
    }
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        QTestState *qts = qtest_initf(DEDUP_MACHINE "-object dedup-scanner,"
                                      "id=ds0%s", cases[i].options);
        g_autofree char *first = get_advisor(qts), *then = NULL;

        g_assert_cmpstr(first, ==, cases[i].advisor);
        qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                                 " 'path': '/objects/ds0', 'property':"
                                 " 'advisor', 'value': 'pressure' } }");
        then = get_advisor(qts);
        g_assert_cmpstr(then, ==, "pressure");
        qtest_quit(qts);
    }
}

static void test_fixed_properties(void)
{
    static const struct {
        const char *name;
        const char *value;
    } fixed[] = {
        { "group", "x" },
        { "write-protect", "userfaultfd" },
        { "thread-context", "" },
    };
    QTestState *qts;
    int i;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-object dedup-scanner,id=ds0");
    for (i = 0; i < ARRAY_SIZE(fixed); i++) {
        g_autofree char *desc = NULL;

        desc = dedup_error(qts, "{ 'execute': 'qom-set', 'arguments': {"
                           " 'path': '/objects/ds0', 'property': %s,"
                           " 'value': %s } }", fixed[i].name, fixed[i].value);
        g_assert_nonnull(strstr(desc, fixed[i].name));
        g_assert_nonnull(strstr(desc, "cannot be changed"));
    }
    qtest_quit(qts);
}

static void test_second(void)
{
    g_autofree char *desc = NULL;
    QTestState *qts;
    QDict *resp;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-object dedup-scanner,id=ds0");
    desc = dedup_error(qts, "{ 'execute': 'object-add', 'arguments': {"
                       " 'qom-type': 'dedup-scanner', 'id': 'ds1' } }");
    g_assert_cmpstr(desc, ==, "only one dedup-scanner is possible per virtual "
                    "machine, and 'ds0' exists");
    check_object(qts, 60);
    /* Another one may follow when the first is gone. */
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'ds0' } }");
    resp = qtest_qmp(qts, "{ 'execute': 'query-dedup-stats' }");
    g_assert_true(qlist_empty(qdict_get_qlist(resp, "return")));
    qobject_unref(resp);
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'qom-type': 'dedup-scanner', 'id': 'ds1' } }");
    dedup_wait_block(qts, "pc.ram", "eligible");
    qtest_quit(qts);
}

/* One clear message each, on the command line. */
static void test_errors(void)
{
    static const struct {
        const char *options;
        const char *error;
        const char *hint;
    } cases[] = {
        { "max-maps=91", "property 'max-maps' must be between 1 and 90", "" },
        { "max-maps=0", "property 'max-maps' must be between 1 and 90", "" },
        { "max-maps=-1", "property 'max-maps' must be between 1 and 90", "" },
        { "pages-to-scan=4294967296",
          "property 'pages-to-scan' must be between 1 and 2147483648", "" },
        { "pages-to-scan=0",
          "property 'pages-to-scan' must be between 1 and 2147483648", "" },
        { "sleep-millisecs=60001",
          "property 'sleep-millisecs' must be between 0 and 60000", "" },
        { "write-protect=none", "does not accept value 'none'",
          "Accepted values: auto userfaultfd mprotect" },
        { "huge-pages=on", "does not accept value 'on'",
          "Accepted values: split keep" },
        { "mode=half", "does not accept value 'half'",
          "Accepted values: full zero estimate" },
        { "mode=zero,zero-pages=off",
          "mode=zero with zero-pages=off would do nothing: set zero-pages=on",
          "" },
        { "group=a/b", "group 'a/b' is neither an absolute path nor a name",
          "" },
        { "group=..", "group '..' is neither an absolute path nor a name",
          "" },
        { "group=", "group '' is neither an absolute path nor a name: a name "
          "has no '/'", "" },
        { "group=/", "'/' is the root directory", "" },
        { "group=/proc/tty", "on a file system of the kernel's own", "" },
        { "group=/dev/null", "is not a directory", "" },
    };
    int i;

    if (dedup_skip()) {
        return;
    }
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autofree char *args = NULL, *err = NULL;
        g_auto(GStrv) lines = NULL;

        args = g_strdup_printf("-machine none -object dedup-scanner,id=ds0,%s",
                               cases[i].options);
        err = dedup_run_failing("env XDG_RUNTIME_DIR=/nowhere", args);
        g_test_message("%s", err);
        g_assert_nonnull(strstr(err, cases[i].error));
        g_assert_nonnull(strstr(err, cases[i].hint));
        /* One line, and a hint at most */
        lines = g_strsplit(g_strchomp(err), "\n", -1);
        g_assert_cmpint(g_strv_length(lines), ==, 1 + !!*cases[i].hint);
    }
}

/* No object: an empty list, and no crash; with a machine and without. */
static void check_without_object(const char *machine)
{
    g_autofree char *out = NULL;
    QTestState *qts = qtest_init(machine);
    QDict *resp;

    resp = qtest_qmp(qts, "{ 'execute': 'query-dedup-stats' }");
    g_assert_true(qlist_empty(qdict_get_qlist(resp, "return")));
    qobject_unref(resp);
    resp = qtest_qmp(qts, "{ 'execute': 'query-stats', 'arguments': {"
                     " 'target': 'vm', 'providers': ["
                     " { 'provider': 'dedup' } ] } }");
    g_assert_true(qlist_empty(qdict_get_qlist(resp, "return")));
    qobject_unref(resp);
    resp = qtest_qmp(qts, "{ 'execute': 'dedup-unmerge',"
                     " 'arguments': { 'id': 'ds0' } }");
    g_assert_cmpstr(qdict_get_str(qdict_get_qdict(resp, "error"), "class"),
                    ==, "DeviceNotFound");
    qobject_unref(resp);
    out = qtest_hmp(qts, "info dedup");
    g_assert_nonnull(strstr(out, "No dedup-scanner object"));
    g_free(out);
    out = qtest_hmp(qts, "dedup_unmerge");
    g_assert_nonnull(strstr(out, "no dedup-scanner object"));
    g_free(out);
    out = qtest_hmp(qts, "dedup_unmerge ds0");
    g_assert_nonnull(strstr(out, "'ds0' not found"));
    qtest_quit(qts);
}

static void test_no_object(void)
{
    check_without_object(DEDUP_MACHINE);
    check_without_object("-machine none");
}

static void test_machine_none(void)
{
    g_autofree char *out = NULL;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init("-machine none -object dedup-scanner,id=ds0");
    g_assert_cmpint(dedup_figure(qts, "pages-total"), ==, 0);
    out = qtest_hmp(qts, "info dedup");
    g_assert_nonnull(strstr(out, "ds0: blocked"));
    g_assert_nonnull(strstr(out, "has no RAM"));
    /* no screen of zeros */
    g_assert_null(strstr(out, "pages merged"));
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_quit(qts);
}

/* query-stats: the same figures under the same names; the filter works. */
static void test_stats_provider(void)
{
    QTestState *qts;
    QDict *resp, *result, *info;
    QListEntry *e;
    QList *stats;
    int schema = 0, equal = 0;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE "-object dedup-scanner,id=ds0,run=off");
    dedup_wait_block(qts, "pc.ram", "eligible");
    resp = qtest_qmp(qts, "{ 'execute': 'query-stats-schemas',"
                     " 'arguments': { 'provider': 'dedup' } }");
    result = qobject_to(QDict, qlist_peek(qdict_get_qlist(resp, "return")));
    g_assert_cmpstr(qdict_get_str(result, "target"), ==, "vm");
    schema = qlist_size(qdict_get_qlist(result, "stats"));
    qobject_unref(resp);

    info = dedup_info(qts);
    resp = qtest_qmp(qts, "{ 'execute': 'query-stats', 'arguments': {"
                     " 'target': 'vm', 'providers': ["
                     " { 'provider': 'dedup' } ] } }");
    result = qobject_to(QDict, qlist_peek(qdict_get_qlist(resp, "return")));
    g_assert_cmpstr(qdict_get_str(result, "qom-path"), ==, "/objects/ds0");
    stats = qdict_get_qlist(result, "stats");
    g_assert_cmpint(qlist_size(stats), ==, schema);
    QLIST_FOREACH_ENTRY(stats, e) {
        QDict *stat = qobject_to(QDict, qlist_entry_obj(e));
        const char *name = qdict_get_str(stat, "name");

        g_assert_true(qdict_haskey(info, name));
        equal += qdict_get_int(info, name) == qdict_get_int(stat, "value");
    }
    g_assert_cmpint(qdict_get_int(info, "pages-total"), ==, 16384);
    /* The processor time and the maximum of the window move on. */
    g_assert_cmpint(equal, >=, schema - 3);
    qobject_unref(resp);
    qobject_unref(info);

    resp = qtest_qmp(qts, "{ 'execute': 'query-stats', 'arguments': {"
                     " 'target': 'vm', 'providers': [ { 'provider': 'dedup',"
                     " 'names': [ 'pages-total', 'no-such' ] } ] } }");
    result = qobject_to(QDict, qlist_peek(qdict_get_qlist(resp, "return")));
    stats = qdict_get_qlist(result, "stats");
    g_assert_cmpint(qlist_size(stats), ==, 1);
    result = qobject_to(QDict, qlist_peek(stats));
    g_assert_cmpstr(qdict_get_str(result, "name"), ==, "pages-total");
    g_assert_cmpint(qdict_get_int(result, "value"), ==, 16384);
    qobject_unref(resp);

    resp = qtest_qmp(qts, "{ 'execute': 'query-stats', 'arguments': {"
                     " 'target': 'vcpu', 'providers': ["
                     " { 'provider': 'dedup' } ] } }");
    g_assert_true(qlist_empty(qdict_get_qlist(resp, "return")));
    qobject_unref(resp);
    qtest_quit(qts);
}

/* The thread exists, bears its name, and inherits the context's affinity. */
static void test_thread(void)
{
    g_autofree char *path = NULL, *name = NULL;
    QTestState *qts;
    cpu_set_t set;
    int64_t tid;

    if (dedup_skip()) {
        return;
    }
    qts = qtest_init(DEDUP_MACHINE
                     "-name dedup,debug-threads=on "
                     "-object thread-context,id=tc0,cpu-affinity=0 "
                     "-object dedup-scanner,id=ds0,thread-context=tc0");
    dedup_wait_at_least(qts, "thread-id", 1);
    tid = dedup_figure(qts, "thread-id");
    path = g_strdup_printf("/proc/%d/task/%" PRId64 "/comm", qtest_pid(qts),
                           tid);
    g_assert_true(g_file_get_contents(path, &name, NULL, NULL));
    g_assert_cmpstr(g_strchomp(name), ==, "dedup-scanner");
    g_assert_cmpint(sched_getaffinity(tid, sizeof(set), &set), ==, 0);
    g_assert_cmpint(CPU_COUNT(&set), ==, 1);
    g_assert_true(CPU_ISSET(0, &set));
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    qtest_add_func("/dedup/object/option", test_option);
    qtest_add_func("/dedup/object/json", test_json);
    qtest_add_func("/dedup/object/qmp", test_qmp);
    qtest_add_func("/dedup/object/cancel", test_cancel);
    qtest_add_func("/dedup/object/hmp", test_hmp);
    qtest_add_func("/dedup/object/second", test_second);
    qtest_add_func("/dedup/object/thread", test_thread);
    qtest_add_func("/dedup/properties/help", test_help);
    qtest_add_func("/dedup/properties/run-time", test_properties);
    qtest_add_func("/dedup/properties/advisor", test_advisor);
    qtest_add_func("/dedup/properties/fixed", test_fixed_properties);
    qtest_add_func("/dedup/properties/errors", test_errors);
    qtest_add_func("/dedup/figures/no-object", test_no_object);
    qtest_add_func("/dedup/figures/machine-none", test_machine_none);
    qtest_add_func("/dedup/figures/provider", test_stats_provider);
    return g_test_run();
}
