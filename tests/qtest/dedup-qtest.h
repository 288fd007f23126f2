/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the qtests of dedup-scanner share: a machine, its figures, its host
 */

#ifndef DEDUP_QTEST_H
#define DEDUP_QTEST_H

#include "libqtest.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "qobject/qnum.h"
#include "qobject/qstring.h"
#include <sys/mount.h>
#include <sched.h>
#include <sys/mman.h>

#define DEDUP_PAGE 4096
#define DEDUP_MACHINE \
    "-machine pc -nodefaults -display none -m 64M,slots=4,maxmem=1G "
#define DEDUP_FAST "pages-to-scan=65536,sleep-millisecs=1"

/* Poll this often for what nobody announces, at most this long. */
#define DEDUP_POLL_US 20000
#define DEDUP_TIMEOUT_US (180 * G_USEC_PER_SEC)

static inline bool dedup_have_userfaultfd(void)
{
    g_autofree char *all = NULL;

    return access("/dev/userfaultfd", R_OK | W_OK) == 0 ||
           (g_file_get_contents("/proc/sys/vm/unprivileged_userfaultfd",
                                &all, NULL, NULL) && *all == '1');
}

/* Skips the test and returns true if the host cannot run a scanner. */
static inline bool dedup_skip(void)
{
    if (!dedup_have_userfaultfd()) {
        g_test_skip("the host grants no userfaultfd");
        return true;
    }
    return false;
}

static inline bool dedup_skip_unless_root(void)
{
    if (geteuid() != 0) {
        g_test_skip("needs root");
        return true;
    }
    return dedup_skip();
}

/* The figures; the caller frees them. */
static inline QDict *dedup_info(QTestState *qts)
{
    QDict *resp = qtest_qmp(qts, "{ 'execute': 'query-dedup-stats' }");
    QList *list = qdict_get_qlist(resp, "return");
    QDict *info;

    g_assert_nonnull(list);
    g_assert_cmpint(qlist_size(list), ==, 1);
    info = qobject_to(QDict, qlist_pop(list));
    qobject_unref(resp);
    return info;
}

static inline char *dedup_state(QTestState *qts)
{
    QDict *info = dedup_info(qts);
    char *state = g_strdup(qdict_get_str(info, "state"));

    qobject_unref(info);
    return state;
}

static inline int64_t dedup_figure(QTestState *qts, const char *name)
{
    QDict *info = dedup_info(qts);
    int64_t value = qdict_get_int(info, name);

    qobject_unref(info);
    return value;
}

/* "reason: detail" of a reason in blocked-reasons, or NULL. */
static inline char *dedup_blocked(QTestState *qts, const char *reason)
{
    QDict *info = dedup_info(qts);
    QListEntry *e;
    char *detail = NULL;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(info, "blocked-reasons"), e) {
        QDict *blocked = qobject_to(QDict, qlist_entry_obj(e));

        if (g_str_equal(qdict_get_str(blocked, "reason"), reason)) {
            detail = g_strdup(qdict_get_str(blocked, "detail"));
        }
    }
    qobject_unref(info);
    return detail;
}

/* The state is blocked for this one reason, and the detail says @text. */
static inline void dedup_assert_blocked(QTestState *qts, const char *reason,
                                        const char *text)
{
    g_autofree char *state = dedup_state(qts);
    g_autofree char *detail = dedup_blocked(qts, reason);

    g_assert_cmpstr(state, ==, "blocked");
    g_assert_nonnull(detail);
    if (!strstr(detail, text)) {
        g_test_message("detail: %s", detail);
    }
    g_assert_nonnull(strstr(detail, text));
}

/*
 * One RAM block: its reason ("eligible" if it has none), or NULL if there is
 * no such block.  To be freed.
 */
static inline char *dedup_block_reason(QTestState *qts, const char *id,
                                       int64_t *merged)
{
    QDict *info = dedup_info(qts);
    QListEntry *e;
    char *reason = NULL;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(info, "blocks"), e) {
        QDict *block = qobject_to(QDict, qlist_entry_obj(e));
        const char *name = qdict_get_str(block, "id");

        /* Backends may be named by a QOM path. */
        if (!g_str_has_suffix(name, id)) {
            continue;
        }
        g_assert_cmpint(qdict_get_bool(block, "eligible"), ==,
                        !qdict_haskey(block, "reason"));
        reason = g_strdup(qdict_get_try_str(block, "reason")
                          ?: "eligible");
        if (merged) {
            *merged = qdict_get_int(block, "pages-merged");
        }
    }
    qobject_unref(info);
    return reason;
}

/* Blocks are looked at in a bottom half: wait for it. */
static inline void dedup_wait_block(QTestState *qts, const char *id,
                                    const char *expected)
{
    int64_t end = g_get_monotonic_time() + DEDUP_TIMEOUT_US;

    for (;;) {
        g_autofree char *reason = dedup_block_reason(qts, id, NULL);

        if (!g_strcmp0(reason, expected)) {
            return;
        }
        if (g_get_monotonic_time() > end) {
            g_assert_cmpstr(reason, ==, expected);
        }
        g_usleep(DEDUP_POLL_US);
    }
}

static inline void dedup_wait_state(QTestState *qts, const char *expected)
{
    int64_t end = g_get_monotonic_time() + DEDUP_TIMEOUT_US;

    for (;;) {
        g_autofree char *state = dedup_state(qts);

        if (g_str_equal(state, expected)) {
            return;
        }
        if (g_get_monotonic_time() > end) {
            g_assert_cmpstr(state, ==, expected);
        }
        g_usleep(DEDUP_POLL_US);
    }
}

static inline void dedup_wait_at_least(QTestState *qts, const char *name,
                                       int64_t value)
{
    int64_t end = g_get_monotonic_time() + DEDUP_TIMEOUT_US;

    for (;;) {
        int64_t now = dedup_figure(qts, name);

        if (now >= value) {
            return;
        }
        if (g_get_monotonic_time() > end) {
            g_test_message("%s", name);
            g_assert_cmpint(now, >=, value);
        }
        g_usleep(DEDUP_POLL_US);
    }
}

/* Until a figure is 0 */
static inline void dedup_wait_none(QTestState *qts, const char *name)
{
    int64_t end = g_get_monotonic_time() + DEDUP_TIMEOUT_US;

    while (dedup_figure(qts, name)) {
        if (g_get_monotonic_time() > end) {
            g_error("%s is not 0", name);
        }
        g_usleep(DEDUP_POLL_US);
    }
}

/* The description of an error, to be freed; the command must fail. */
G_GNUC_PRINTF(2, 3)
static inline char *dedup_error(QTestState *qts, const char *fmt, ...)
{
    va_list ap;
    QDict *resp;
    char *desc;

    va_start(ap, fmt);
    resp = qtest_vqmp(qts, fmt, ap);
    va_end(ap);
    g_assert_true(qdict_haskey(resp, "error"));
    desc = g_strdup(qdict_get_str(qdict_get_qdict(resp, "error"), "desc"));
    qobject_unref(resp);
    return desc;
}

static inline void dedup_set_bool(QTestState *qts, const char *path,
                                  const char *property, bool value)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                             " 'path': %s, 'property': %s, 'value': %i } }",
                             path, property, value);
}

/*
 * A private mount namespace, in which @with stands in the place of @path for
 * this test and the QEMU processes that it starts.  False if not possible.
 */
static inline bool dedup_mount_over(const char *with, const char *path)
{
    static bool unshared;

    if (!unshared) {
        if (unshare(CLONE_NEWNS) < 0 ||
            mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0) {
            g_test_skip("no private mount namespace");
            return false;
        }
        unshared = true;
    }
    if (mount(with, path, NULL, MS_BIND, NULL) < 0) {
        g_test_skip("cannot mount over a file");
        return false;
    }
    return true;
}

/* Run QEMU, which must fail; its standard error, to be freed. */
static inline char *dedup_run_failing(const char *prefix, const char *args)
{
    g_autofree char *command = NULL;
    const char *binary = g_getenv("QTEST_QEMU_BINARY");
    g_autoptr(GError) err = NULL;
    char *output = NULL;
    int status;

    command = g_strdup_printf("%s %s -display none -nodefaults -accel qtest "
                              "%s", prefix, binary, args);
    g_spawn_command_line_sync(command, NULL, &output, &status, &err);
    g_assert_no_error(err);
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, 1);
    return output;
}

/* The file behind a memory-backend-memfd, opened anew; there must be one. */
static inline int dedup_open_memfd(QTestState *qts)
{
    g_autofree char *dir = g_strdup_printf("/proc/%d/fd", qtest_pid(qts));
    g_autoptr(GDir) d = g_dir_open(dir, 0, NULL);
    const char *name;
    int fd = -1;

    g_assert_nonnull(d);
    while (fd < 0 && (name = g_dir_read_name(d))) {
        g_autofree char *path = g_strdup_printf("%s/%s", dir, name);
        g_autofree char *target = g_file_read_link(path, NULL);

        if (target && g_str_has_prefix(target,
                                       "/memfd:memory-backend-memfd")) {
            fd = open(path, O_RDONLY);
        }
    }
    g_assert_cmpint(fd, >=, 0);
    return fd;
}

/* A directory for one test. */
static inline char *dedup_tmpdir(const char *parent)
{
    char *dir = g_strdup_printf("%s/dedup-test-XXXXXX", parent);

    g_assert_nonnull(g_mkdtemp(dir));
    return dir;
}

/* Migrate to nowhere, until the VM has stopped; shared RAM is not sent. */
static inline void dedup_migrate_ignoring_shared(QTestState *qts)
{
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-set-capabilities',"
                             " 'arguments': { 'capabilities': [ {"
                             " 'capability': 'x-ignore-shared',"
                             " 'state': true } ] } }");
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': 'exec:cat > /dev/null' } }");
    qtest_qmp_eventwait(qts, "STOP");
}

/* A file for RAM in a directory of its own, and a memory backend on it. */
typedef struct DedupFile {
    char *dir;
    char *path;
    char *backend;            /* the option, share=on, for ram0 */
} DedupFile;

static inline DedupFile *dedup_file_new(const char *parent)
{
    DedupFile *f = g_new0(DedupFile, 1);

    f->dir = dedup_tmpdir(parent);
    f->path = g_strdup_printf("%s/ram", f->dir);
    f->backend = g_strdup_printf("-object memory-backend-file,id=ram0,"
                                 "size=64M,share=on,mem-path=%s", f->path);
    return f;
}

/* Removes the file, too. */
static inline void dedup_file_free(DedupFile *f)
{
    unlink(f->path);
    rmdir(f->dir);
    g_free(f->dir);
    g_free(f->path);
    g_free(f->backend);
    g_free(f);
}

G_DEFINE_AUTOPTR_CLEANUP_FUNC(DedupFile, dedup_file_free)

/* A group's directory, with what its members left in it. */
static inline void dedup_remove_tree(const char *dir)
{
    const char *argv[] = { "rm", "-rf", "--", dir, NULL };

    g_spawn_sync(NULL, (char **)argv, NULL, G_SPAWN_SEARCH_PATH, NULL, NULL,
                 NULL, NULL, NULL, NULL);
}

/*
 * Guest memory: page @i of @seed, the same wherever it is written, unlike
 * any other.
 */
static inline void dedup_page(uint8_t *page, unsigned seed, unsigned i)
{
    uint64_t *words = (uint64_t *)page;
    int w;

    for (w = 0; w < DEDUP_PAGE / 8; w++) {
        words[w] = ((uint64_t)seed << 48) + ((uint64_t)i << 16) + w +
                   0x5a00000000000000;
    }
}

static inline void dedup_fill(QTestState *qts, uint64_t addr, unsigned seed,
                              unsigned pages)
{
    g_autofree uint8_t *buf = g_malloc(pages * DEDUP_PAGE);
    unsigned i;

    for (i = 0; i < pages; i++) {
        dedup_page(buf + i * DEDUP_PAGE, seed, i);
    }
    qtest_bufwrite(qts, addr, buf, pages * DEDUP_PAGE);
}

static inline void dedup_verify_buffer(const uint8_t *buf, unsigned seed,
                                       unsigned pages)
{
    uint8_t page[DEDUP_PAGE] __attribute__((aligned(8)));
    unsigned i;

    for (i = 0; i < pages; i++) {
        dedup_page(page, seed, i);
        g_assert_cmpmem(buf + i * DEDUP_PAGE, DEDUP_PAGE, page, DEDUP_PAGE);
    }
}

static inline void dedup_verify(QTestState *qts, uint64_t addr, unsigned seed,
                                unsigned pages)
{
    g_autofree uint8_t *buf = g_malloc(pages * DEDUP_PAGE);

    qtest_bufread(qts, addr, buf, pages * DEDUP_PAGE);
    dedup_verify_buffer(buf, seed, pages);
}

/* The same, as whoever opens the RAM's file sees it. */
static inline void dedup_verify_fd(int fd, uint64_t offset, unsigned seed,
                                   unsigned pages)
{
    g_autofree uint8_t *buf = g_malloc(pages * DEDUP_PAGE);

    g_assert_cmpint(pread(fd, buf, pages * DEDUP_PAGE, offset), ==,
                    pages * DEDUP_PAGE);
    dedup_verify_buffer(buf, seed, pages);
}

#endif /* DEDUP_QTEST_H */
