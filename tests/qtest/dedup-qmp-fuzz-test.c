/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: arguments at random
 *
 * The object and its commands are given values of any type and size.  Each is
 * answered by a result or by an error that says something; what was refused
 * has changed nothing; QEMU goes on, and its RAM holds what it held.
 *
 * It goes on for DEDUP_QMP_FUZZ_SECONDS.  If it fails it names the seed:
 * DEDUP_QMP_FUZZ_SEED begins with that.
 */

#include "qemu/osdep.h"
#include "dedup-qtest.h"
#include "qobject/qbool.h"
#include "qobject/qnull.h"
#include "qemu/cutils.h"

#define RAM_AT 0x1000000
#define RAM_PAGES 64

static GRand *rng;

static unsigned below(unsigned n)
{
    return g_rand_int_range(rng, 0, n);
}

static const char *any_name(void)
{
    static const char *const names[] = {
        "run", "zero-pages", "target-scan-time", "max-cpu", "max-cpu-vm",
        "advisor-min-pages-to-scan", "advisor-max-pages-to-scan",
        "pages-to-scan", "sleep-millisecs", "max-maps", "group", "mode",
        "write-protect", "huge-pages", "advisor", "thread-context", "type",
        "id", "force", "", "no-such",
    };

    return names[below(ARRAY_SIZE(names))];
}

static QObject *any_string(void)
{
    static const char *const strings[] = {
        "", "on", "off", "full", "zero", "estimate", "auto", "userfaultfd",
        "mprotect", "split", "keep", "none", "scan-time", "pressure", "..",
        ".", "/", "a/b", "/proc/tty", "/dev/null", "/no/such/directory",
        "%s%n", "\xc3\xa4\xf0\x9f\x90\xa7", "ds0", "1", "-1",
        "18446744073709551616",
    };
    unsigned i = below(ARRAY_SIZE(strings) + 2);

    if (i < ARRAY_SIZE(strings)) {
        return QOBJECT(qstring_from_str(strings[i]));
    } else {
        g_autofree char *lots = g_strnfill(1 << (i - ARRAY_SIZE(strings) + 10),
                                           'x');

        return QOBJECT(qstring_from_str(lots));
    }
}

static QObject *any_number(void)
{
    static const int64_t edges[] = {
        0, 1, -1, 2, 90, 91, 100, 101, 60000, 60001, 86400, 86401, 100000,
        INT32_MAX, 1LL << 31, (1LL << 31) + 1, UINT32_MAX, 1LL << 32,
        INT64_MAX, INT64_MIN,
    };
    unsigned i = below(ARRAY_SIZE(edges) + 3);

    if (i < ARRAY_SIZE(edges)) {
        return QOBJECT(qnum_from_int(edges[i]));
    } else if (i == ARRAY_SIZE(edges)) {
        return QOBJECT(qnum_from_uint(UINT64_MAX));
    }
    return QOBJECT(qnum_from_double((below(2000) - 1000.0) * 1e15 / 7));
}

static QObject *any_value(unsigned depth)
{
    QDict *dict;
    QList *list;

    switch (below(depth ? 6 : 8)) {
    case 0:
        return QOBJECT(qbool_from_bool(below(2)));
    case 1:
        return QOBJECT(qnull());
    case 2:
    case 3:
        return any_string();
    case 4:
    case 5:
        return any_number();
    case 6:
        dict = qdict_new();
        qdict_put_obj(dict, any_name(), any_value(depth + 1));
        return QOBJECT(dict);
    default:
        list = qlist_new();
        qlist_append_obj(list, any_value(depth + 1));
        return QOBJECT(list);
    }
}

/* A group that is there, or can be made, would not be ours. */
static QObject *no_group(void)
{
    static const char *const groups[] = {
        "", ".", "..", "/", "a/b", "/proc/tty", "/dev/null", "/no/such/one",
    };

    return QOBJECT(qstring_from_str(groups[below(ARRAY_SIZE(groups))]));
}

static void put_any(QDict *dict, const char *key, const char *name)
{
    qdict_put_obj(dict, key, any_value(0));
    if (g_str_equal(name, "group") &&
        qobject_type(qdict_get(dict, key)) == QTYPE_QSTRING) {
        qdict_put_obj(dict, key, no_group());
    }
}

/* True if it was done; else the error says something. */
static bool command(QTestState *qts, const char *name, QDict *arguments)
{
    QDict *resp = qtest_qmp(qts, "{ 'execute': %s, 'arguments': %p }", name,
                            arguments ?: qdict_new());
    bool ok = qdict_haskey(resp, "return");

    if (!ok) {
        QDict *error = qdict_get_qdict(resp, "error");

        g_assert_nonnull(error);
        g_assert_cmpstr(qdict_get_str(error, "desc"), !=, "");
    }
    qobject_unref(resp);
    return ok;
}

static void add(QTestState *qts)
{
    QDict *args = qdict_new();

    qdict_put_str(args, "qom-type", "dedup-scanner");
    for (unsigned i = below(4); i > 0; i--) {
        const char *name = any_name();

        put_any(args, name, name);
    }
    if (below(8)) {
        qdict_put_str(args, "id", "ds0");
    }
    command(qts, "object-add", args);
}

/* The values of all properties, or NULL: there is no such object. */
static QDict *all_values(QTestState *qts)
{
    QDict *resp = qtest_qmp(qts, "{ 'execute': 'qom-list', 'arguments': {"
                            " 'path': '/objects/ds0' } }");
    QList *list = qdict_get_qlist(resp, "return");
    const QListEntry *e;
    QDict *all = list ? qdict_new() : NULL;

    for (e = list ? qlist_first(list) : NULL; e; e = qlist_next(e)) {
        QDict *entry = qobject_to(QDict, qlist_entry_obj(e));
        const char *name = qdict_get_str(entry, "name");
        QDict *value = qtest_qmp(qts, "{ 'execute': 'qom-get', 'arguments': {"
                                 " 'path': '/objects/ds0', 'property': %s } }",
                                 name);

        if (qdict_haskey(value, "return")) {
            qdict_put_obj(all, name, qobject_ref(qdict_get(value, "return")));
        }
        qobject_unref(value);
    }
    qobject_unref(resp);
    return all;
}

static void set(QTestState *qts)
{
    QDict *before = all_values(qts), *after;
    QDict *args = qdict_new();
    const char *name = any_name();
    bool ok;

    qdict_put_str(args, "path", "/objects/ds0");
    qdict_put_str(args, "property", name);
    put_any(args, "value", name);
    ok = command(qts, "qom-set", args);
    after = all_values(qts);
    g_assert_true(ok || qobject_is_equal(QOBJECT(before), QOBJECT(after)));
    qobject_unref(before);
    qobject_unref(after);
}

static void unmerge(QTestState *qts)
{
    QDict *args = qdict_new();

    if (below(4)) {
        qdict_put_str(args, "id", "ds0");
    }
    if (below(2)) {
        qdict_put_obj(args, below(4) ? "force" : any_name(), any_value(0));
    }
    command(qts, "dedup-unmerge", args);
}

static void look(QTestState *qts)
{
    static const char *const lines[] = {
        "info dedup", "info dedup -h", "info dedup %n", "dedup_unmerge",
        "dedup_unmerge ds0", "dedup_unmerge -f ds0", "dedup_unmerge -f x y",
    };
    QDict *args = qdict_new();

    command(qts, "query-dedup-stats", NULL);
    qdict_put_str(args, "command-line", lines[below(ARRAY_SIZE(lines))]);
    command(qts, "human-monitor-command", args);
}

static void fill(QTestState *qts, uint8_t *page, unsigned i)
{
    memset(page, i % 7, DEDUP_PAGE);
}

static void check_ram(QTestState *qts)
{
    g_autofree uint8_t *want = g_malloc(DEDUP_PAGE);
    g_autofree uint8_t *have = g_malloc(DEDUP_PAGE);

    for (unsigned i = 0; i < RAM_PAGES; i++) {
        fill(qts, want, i);
        qtest_memread(qts, RAM_AT + i * DEDUP_PAGE, have, DEDUP_PAGE);
        g_assert_cmpmem(want, DEDUP_PAGE, have, DEDUP_PAGE);
    }
}

static void test_any(void)
{
    const char *seconds = g_getenv("DEDUP_QMP_FUZZ_SECONDS");
    const char *given = g_getenv("DEDUP_QMP_FUZZ_SEED");
    uint32_t seed = given ? atoi(given) : g_random_int();
    int64_t end = g_get_monotonic_time() +
                  (seconds ? atoi(seconds) : 4) * G_USEC_PER_SEC;
    g_autofree uint8_t *page = g_malloc(DEDUP_PAGE);
    unsigned done = 0;
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    g_test_message("DEDUP_QMP_FUZZ_SEED=%" PRIu32, seed);
    rng = g_rand_new_with_seed(seed);
    qts = qtest_init(DEDUP_MACHINE);
    for (unsigned i = 0; i < RAM_PAGES; i++) {
        fill(qts, page, i);
        qtest_memwrite(qts, RAM_AT + i * DEDUP_PAGE, page, DEDUP_PAGE);
    }
    for (; g_get_monotonic_time() < end; done++) {
        switch (below(8)) {
        case 0:
        case 1:
            add(qts);
            break;
        case 2:
            unmerge(qts);
            break;
        case 3:
            command(qts, "object-del",
                    qdict_from_jsonf_nofail("{ 'id': 'ds0' }"));
            break;
        case 4:
            look(qts);
            break;
        default:
            set(qts);
        }
    }
    check_ram(qts);
    g_test_message("%u commands", done);
    g_assert_true(command(qts, "query-status", NULL));
    qtest_quit(qts);
    g_rand_free(rng);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qtest_add_func("/dedup/qmp-fuzz/any", test_any);
    return g_test_run();
}
