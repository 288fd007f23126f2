/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * dedup-scanner: pages are merged, written, given back; always with the
 * right bytes in them
 *
 * No guest runs: the test writes guest memory itself, through QEMU's own
 * mapping, and reads it back the same way or in the RAM's file.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "dedup-qtest.h"

#define SCANNER "-object dedup-scanner,id=ds0," DEDUP_FAST " "
#define FIRST 0x1000000
#define SECOND 0x2000000
#define PAGES 512

static QTestState *start(const char *backend, const char *more)
{
    return qtest_initf("-machine pc%s -nodefaults -display none "
                       "-m 64M,slots=4,maxmem=1G %s %s",
                       backend ? ",memory-backend=ram0" : "",
                       backend ?: "", more);
}

/* Two copies of the same pages, merged. */
static void fill_and_merge(QTestState *qts)
{
    dedup_fill(qts, FIRST, 1, PAGES);
    dedup_fill(qts, SECOND, 1, PAGES);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
}

static void verify_both(QTestState *qts)
{
    dedup_verify(qts, FIRST, 1, PAGES);
    dedup_verify(qts, SECOND, 1, PAGES);
}

static void unmerge(QTestState *qts)
{
    QDict *event;

    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    event = qtest_qmp_eventwait_ref(qts, "DEDUP_UNMERGE_COMPLETED");
    g_assert_cmpstr(qdict_get_str(qdict_get_qdict(event, "data"), "id"), ==,
                    "ds0");
    g_assert_cmpint(qdict_get_int(qdict_get_qdict(event, "data"),
                                  "pages-left"), ==, 0);
    qobject_unref(event);
}

static void check_kind(const char *backend)
{
    uint8_t page[DEDUP_PAGE] __attribute__((aligned(8))), got[DEDUP_PAGE];
    g_autofree char *desc = NULL;
    QTestState *qts = start(backend, SCANNER);
    int64_t merged = 0;

    g_test_message("%s", backend ?: "-m");
    fill_and_merge(qts);
    verify_both(qts);
    g_assert_cmpint(dedup_figure(qts, "pages-merged-within"), >=, 2 * PAGES);
    g_assert_cmpint(dedup_figure(qts, "pages-merged-between"), ==, 0);
    g_free(dedup_block_reason(qts, backend ? "ram0" : "pc.ram", &merged));
    g_assert_cmpint(merged, >=, 2 * PAGES);

    /* One byte: seen where it was written, and nowhere else. */
    qtest_writeb(qts, SECOND + 7 * DEDUP_PAGE + 5, 0xee);
    dedup_page(page, 1, 7);
    qtest_bufread(qts, FIRST + 7 * DEDUP_PAGE, got, DEDUP_PAGE);
    g_assert_cmpmem(got, DEDUP_PAGE, page, DEDUP_PAGE);
    page[5] = 0xee;
    qtest_bufread(qts, SECOND + 7 * DEDUP_PAGE, got, DEDUP_PAGE);
    g_assert_cmpmem(got, DEDUP_PAGE, page, DEDUP_PAGE);
    dedup_wait_at_least(qts, "cow-breaks", 1);

    /* Off keeps what is merged; deletion is refused until it is not. */
    dedup_set_bool(qts, "/objects/ds0", "run", false);
    dedup_wait_state(qts, "stopped");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), >=, 2 * PAGES - 2);
    desc = dedup_error(qts, "{ 'execute': 'object-del', 'arguments': {"
                       " 'id': 'ds0' } }");
    g_assert_nonnull(strstr(desc, "run dedup-unmerge first"));
    unmerge(qts);
    dedup_wait_state(qts, "stopped");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    dedup_verify(qts, FIRST, 1, PAGES);
    qtest_bufread(qts, SECOND + 7 * DEDUP_PAGE, got, DEDUP_PAGE);
    g_assert_cmpmem(got, DEDUP_PAGE, page, DEDUP_PAGE);

    /* And again: what was unmerged can be merged. */
    dedup_fill(qts, SECOND, 1, PAGES);
    dedup_set_bool(qts, "/objects/ds0", "run", true);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    verify_both(qts);
    unmerge(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'ds0' } }");
    verify_both(qts);
    qtest_quit(qts);
}

static void test_kinds(void)
{
    g_autoptr(DedupFile) file = NULL;
    g_autofree char *private = NULL;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    private = g_strdup_printf("-object memory-backend-file,id=ram0,size=64M,"
                              "share=off,mem-path=%s", file->path);
    check_kind(NULL);
    check_kind("-object memory-backend-ram,id=ram0,size=64M");
    check_kind("-object memory-backend-memfd,id=ram0,size=64M,share=on");
    check_kind("-object memory-backend-memfd,id=ram0,size=64M,share=off");
    check_kind(file->backend);
    check_kind(private);
}

/*
 * When qom-set has returned nothing is merged any more, not even what the
 * scanner was about to: VFIO may come now if nothing was merged before.
 */
static void test_off_at_once(void)
{
    QTestState *qts;
    int64_t merged;
    int i;

    if (dedup_skip()) {
        return;
    }
    qts = start(NULL, SCANNER);
    for (i = 0; i < 40; i++) {
        dedup_fill(qts, FIRST, i, PAGES);
        dedup_fill(qts, SECOND, i, PAGES);
        dedup_set_bool(qts, "/objects/ds0", "run", true);
        g_usleep(i * 200);
        dedup_set_bool(qts, "/objects/ds0", "run", false);
        merged = dedup_figure(qts, "pages-merged");
        dedup_wait_state(qts, "stopped");
        g_assert_cmpint(dedup_figure(qts, "pages-merged"), <=, merged);
    }
    qtest_quit(qts);
}

/* Pages of zeros are dropped, read as zeros, and may be written. */
static void test_zero_pages(void)
{
    uint8_t zero[DEDUP_PAGE] = { 0 }, got[DEDUP_PAGE];
    QTestState *qts;
    int i;

    if (dedup_skip()) {
        return;
    }
    qts = start(NULL, SCANNER);
    qtest_memset(qts, FIRST, 1, PAGES * DEDUP_PAGE);
    qtest_memset(qts, FIRST, 0, PAGES * DEDUP_PAGE);
    dedup_wait_at_least(qts, "zero-pages", PAGES);
    for (i = 0; i < PAGES; i += 64) {
        qtest_bufread(qts, FIRST + i * DEDUP_PAGE, got, DEDUP_PAGE);
        g_assert_cmpmem(got, DEDUP_PAGE, zero, DEDUP_PAGE);
    }
    dedup_fill(qts, FIRST, 2, PAGES);
    dedup_verify(qts, FIRST, 2, PAGES);
    qtest_quit(qts);
}

/*
 * Another process opens the RAM's file.  open() returns when the contents
 * are in the file; from then on what the guest writes is seen there.
 */
static void test_lease(void)
{
    uint8_t page[DEDUP_PAGE] __attribute__((aligned(8)));
    g_autoptr(DedupFile) file = NULL;
    QTestState *qts;
    int fd;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    qts = start(file->backend, SCANNER);
    fill_and_merge(qts);
    /* The first copy of these was given back: it is a hole in the file. */
    fd = open(file->path, O_RDWR | O_CLOEXEC);
    g_assert_cmpint(fd, >=, 0);
    dedup_verify_fd(fd, FIRST, 1, PAGES);
    dedup_verify_fd(fd, SECOND, 1, PAGES);
    dedup_wait_block(qts, "ram0", "opened-elsewhere");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);

    /* Both ways, from now on */
    dedup_fill(qts, FIRST, 3, PAGES);
    dedup_verify_fd(fd, FIRST, 3, PAGES);
    dedup_page(page, 3, 0);
    g_assert_cmpint(pwrite(fd, page, DEDUP_PAGE, SECOND), ==, DEDUP_PAGE);
    dedup_verify(qts, SECOND, 3, 1);
    qtest_quit(qts);
    close(fd);
}

/*
 * A DIMM on a file with a name goes: the file has all of it.  Ejected as the
 * guest's ACPI code would do it.  Contents are put back in the background
 * once it was ejected, or else while object-del waits.
 */
static void check_unplug(bool at_once)
{
    g_autoptr(DedupFile) file = NULL;
    const uint64_t base = 0x100000000;
    QTestState *qts;
    int64_t merged;
    int fd;

    file = dedup_file_new("/dev/shm");
    qts = start(NULL, SCANNER);
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-add', 'arguments': {"
                             " 'qom-type': 'memory-backend-file',"
                             " 'id': 'mem1', 'size': 67108864,"
                             " 'share': true, 'mem-path': %s } }",
                             file->path);
    qtest_qmp_assert_success(qts, "{ 'execute': 'device_add', 'arguments': {"
                             " 'driver': 'pc-dimm', 'id': 'dimm1',"
                             " 'addr': %" PRId64 ", 'memdev': 'mem1' } }",
                             base);
    dedup_wait_block(qts, "mem1", "eligible");
    dedup_fill(qts, base, 4, PAGES);
    dedup_fill(qts, base + FIRST, 4, PAGES);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    dedup_verify(qts, base, 4, PAGES);

    qtest_qmp_assert_success(qts, "{ 'execute': 'device_del', 'arguments': {"
                             " 'id': 'dimm1' } }");
    qtest_outl(qts, 0xa00, 0);
    qtest_outb(qts, 0xa14, 1 << 3);
    qtest_qmp_eventwait(qts, "DEVICE_DELETED");
    if (!at_once) {
        dedup_wait_block(qts, "mem1", "not-mapped");
        do {
            g_usleep(DEDUP_POLL_US);
            g_free(dedup_block_reason(qts, "mem1", &merged));
        } while (merged);
    }
    qtest_qmp_assert_success(qts, "{ 'execute': 'object-del',"
                             " 'arguments': { 'id': 'mem1' } }");
    /* It goes when the last reader of the old memory map has. */
    dedup_wait_block(qts, "mem1", NULL);

    fd = open(file->path, O_RDONLY | O_CLOEXEC);
    g_assert_cmpint(fd, >=, 0);
    dedup_verify_fd(fd, 0, 4, PAGES);
    dedup_verify_fd(fd, FIRST, 4, PAGES);
    close(fd);
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    qtest_quit(qts);
}

static void test_unplug(void)
{
    if (!dedup_skip()) {
        check_unplug(true);
        check_unplug(false);
    }
}

/* x-ignore-shared: the file has everything before the migration starts. */
static void test_ignore_shared(void)
{
    g_autoptr(DedupFile) file = NULL;
    QTestState *qts;
    int fd;

    if (dedup_skip()) {
        return;
    }
    file = dedup_file_new("/dev/shm");
    qts = start(file->backend, SCANNER);
    fill_and_merge(qts);
    dedup_migrate_ignoring_shared(qts);
    dedup_wait_block(qts, "ram0", "exported");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    /* The destination would open it now: no lease is in its way. */
    fd = open(file->path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    g_assert_cmpint(fd, >=, 0);
    dedup_verify_fd(fd, FIRST, 1, PAGES);
    dedup_verify_fd(fd, SECOND, 1, PAGES);
    close(fd);
    while (true) {
        QDict *resp = qtest_qmp(qts, "{ 'execute': 'query-migrate' }");
        bool done = g_str_equal("completed", qdict_get_str(
            qdict_get_qdict(resp, "return"), "status"));

        qobject_unref(resp);
        if (done) {
            break;
        }
        g_usleep(DEDUP_POLL_US);
    }
    dedup_wait_block(qts, "ram0", "exported");
    /* Back here: merged again. */
    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    verify_both(qts);
    qtest_quit(qts);
}

/* direct-io: the disk reads guest RAM, and nobody counts it. */
static void test_direct_io(void)
{
    g_autofree char *dir = NULL, *path = NULL, *uri = NULL;
    QTestState *qts;
    int fd;

    if (dedup_skip()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    path = g_strdup_printf("%s/state", dir);
    fd = open(path, O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600);
    if (fd < 0) {
        g_test_skip("no direct I/O in /tmp");
        dedup_remove_tree(dir);
        return;
    }
    close(fd);
    uri = g_strdup_printf("file:%s", path);
    qts = start(NULL, SCANNER);
    fill_and_merge(qts);
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-set-capabilities',"
                             " 'arguments': { 'capabilities': ["
                             " { 'capability': 'mapped-ram', 'state': true },"
                             " { 'capability': 'multifd', 'state': true }"
                             " ] } }");
    /* It does not end by itself. */
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate-set-parameters',"
                             " 'arguments': { 'direct-io': true,"
                             " 'max-bandwidth': 1024 } }");
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': %s } }", uri);
    dedup_assert_blocked(qts, "migration", "");
    qtest_qmp_assert_success(qts, "{ 'execute': 'migrate_cancel' }");
    dedup_fill(qts, FIRST, 2, PAGES);
    dedup_fill(qts, SECOND, 2, PAGES);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    dedup_verify(qts, FIRST, 2, PAGES);
    dedup_verify(qts, SECOND, 2, PAGES);
    qtest_quit(qts);
    dedup_remove_tree(dir);
}

/* One page in two is unique: each merged page is a mapping of its own. */
static void test_limited(void)
{
    g_autofree char *detail = NULL;
    QTestState *qts;
    int i;

    if (dedup_skip()) {
        return;
    }
    qts = start(NULL, "-object dedup-scanner,id=ds0,max-maps=1," DEDUP_FAST);
    for (i = 0; i < 2 * PAGES; i++) {
        uint8_t page[DEDUP_PAGE] __attribute__((aligned(8)));

        dedup_page(page, i % 2 ? 5 : 6, i % 2 ? i : 0);
        qtest_bufwrite(qts, FIRST + i * DEDUP_PAGE, page, DEDUP_PAGE);
        dedup_page(page, i % 2 ? 7 : 6, i % 2 ? i : i + 1);
        qtest_bufwrite(qts, SECOND + i * DEDUP_PAGE, page, DEDUP_PAGE);
        dedup_page(page, i % 2 ? 8 : 6, i % 2 ? i : i + 1);
        qtest_bufwrite(qts, SECOND + FIRST + i * DEDUP_PAGE, page,
                       DEDUP_PAGE);
    }
    dedup_wait_state(qts, "limited");
    detail = dedup_blocked(qts, "max-maps");
    g_assert_nonnull(detail);
    g_assert_nonnull(strstr(detail, "vm.max_map_count"));
    g_assert_cmpint(dedup_figure(qts, "maps-limit"), >, 0);
    g_assert_cmpint(dedup_figure(qts, "maps-used"), <=,
                    dedup_figure(qts, "maps-limit") + 2 * 64);
    /* A higher limit is used. */
    qtest_qmp_assert_success(qts, "{ 'execute': 'qom-set', 'arguments': {"
                             " 'path': '/objects/ds0', 'property':"
                             " 'max-maps', 'value': 60 } }");
    dedup_wait_at_least(qts, "pages-merged", 3 * PAGES - PAGES / 2);
    unmerge(qts);
    qtest_quit(qts);
}

/* Two VMs: what one merges with the other, and what is left of it. */
static void test_group(void)
{
    g_autofree char *dir = NULL, *options = NULL;
    QTestState *a, *b;
    QDict *info, *group;
    int64_t sum;

    if (dedup_skip()) {
        return;
    }
    dir = dedup_tmpdir("/tmp");
    options = g_strdup_printf("-object dedup-scanner,id=ds0,group=%s,"
                              DEDUP_FAST, dir);
    a = start(NULL, options);
    b = start("-object memory-backend-memfd,id=ram0,size=64M", options);
    dedup_fill(a, FIRST, 1, PAGES);
    dedup_fill(b, SECOND, 1, PAGES);
    dedup_wait_at_least(a, "pages-merged-between", PAGES);
    dedup_wait_at_least(b, "pages-merged-between", PAGES);
    dedup_verify(a, FIRST, 1, PAGES);
    dedup_verify(b, SECOND, 1, PAGES);

    dedup_set_bool(a, "/objects/ds0", "run", false);
    dedup_set_bool(b, "/objects/ds0", "run", false);
    dedup_wait_state(a, "stopped");
    dedup_wait_state(b, "stopped");
    sum = dedup_figure(a, "pages-merged") + dedup_figure(b, "pages-merged");
    info = dedup_info(a);
    group = qdict_get_qdict(info, "group");
    g_assert_cmpstr(qdict_get_str(group, "path"), ==, dir);
    g_assert_cmpint(qdict_get_int(group, "members"), ==, 2);
    g_assert_cmpint(qdict_get_int(group, "members-incompatible"), ==, 0);
    g_assert_cmpint(qdict_get_int(group, "pages-shared"), >=, PAGES);
    g_assert_cmpint(qdict_get_int(group, "pages-shared") +
                    qdict_get_int(group, "pages-sharing"), ==, sum);
    qobject_unref(info);

    /* The one that stays keeps its bytes. */
    qtest_kill_qemu(a);
    dedup_verify(b, SECOND, 1, PAGES);
    unmerge(b);
    dedup_verify(b, SECOND, 1, PAGES);
    qtest_quit(b);
    qtest_quit(a);
    dedup_remove_tree(dir);
}

/* How many mappings of segments there are, and how many say @flag. */
static void count_segment_maps(QTestState *qts, const char *flag, int *maps,
                               int *flagged)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/smaps", qtest_pid(qts));
    g_autofree char *all = NULL;
    g_auto(GStrv) lines = NULL;
    bool segment = false;
    int i;

    g_assert_true(g_file_get_contents(path, &all, NULL, NULL));
    lines = g_strsplit(all, "\n", -1);
    *maps = *flagged = 0;
    for (i = 0; lines[i]; i++) {
        if (g_ascii_isxdigit(lines[i][0]) && strchr(lines[i], '-')) {
            segment = strstr(lines[i], "memfd:dedup-segment") &&
                      strstr(lines[i], "rw-p");
        } else if (segment && g_str_has_prefix(lines[i], "VmFlags:")) {
            ++*maps;
            *flagged += strstr(lines[i], flag) != NULL;
        }
    }
}

/* What a backend's property says is true for merged pages, too. */
static void test_dump(void)
{
    QTestState *qts;
    int maps, flagged;

    if (dedup_skip()) {
        return;
    }
    qts = start("-object memory-backend-ram,id=ram0,size=64M", SCANNER);
    fill_and_merge(qts);
    count_segment_maps(qts, " dd", &maps, &flagged);
    g_assert_cmpint(maps, >, 0);
    g_assert_cmpint(flagged, ==, 0);
    dedup_set_bool(qts, "/objects/ram0", "dump", false);
    dedup_wait_at_least(qts, "pages-merged", 2 * PAGES);
    /* Pages that are new, merged from now on */
    dedup_fill(qts, FIRST + PAGES * DEDUP_PAGE, 2, PAGES);
    dedup_fill(qts, SECOND + PAGES * DEDUP_PAGE, 2, PAGES);
    dedup_wait_at_least(qts, "pages-merged", 4 * PAGES);
    count_segment_maps(qts, " dd", &maps, &flagged);
    g_assert_cmpint(maps, >, 0);
    g_assert_cmpint(flagged, ==, maps);
    verify_both(qts);
    qtest_quit(qts);
}

/* merge=off: what is merged is given back. */
static void test_merge_off(void)
{
    QTestState *qts;
    int maps, flagged;

    if (dedup_skip()) {
        return;
    }
    qts = start("-object memory-backend-memfd,id=ram0,size=64M", SCANNER);
    fill_and_merge(qts);
    dedup_set_bool(qts, "/objects/ram0", "merge", false);
    dedup_wait_block(qts, "ram0", "merge-off");
    qtest_qmp_assert_success(qts, "{ 'execute': 'dedup-unmerge',"
                             " 'arguments': { 'id': 'ds0' } }");
    qtest_qmp_eventwait(qts, "DEDUP_UNMERGE_COMPLETED");
    dedup_wait_state(qts, "stopped");
    g_assert_cmpint(dedup_figure(qts, "pages-merged"), ==, 0);
    count_segment_maps(qts, " ", &maps, &flagged);
    g_assert_cmpint(maps, ==, 0);
    verify_both(qts);
    qtest_quit(qts);
}

/* QEMU exits with merged pages: at once, and without a complaint. */
static void test_exit(void)
{
    QTestState *qts;

    if (dedup_skip()) {
        return;
    }
    qts = start(NULL, SCANNER);
    fill_and_merge(qts);
    qtest_quit(qts);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    qtest_add_func("/dedup/merge/kinds", test_kinds);
    qtest_add_func("/dedup/merge/off-at-once", test_off_at_once);
    qtest_add_func("/dedup/merge/zero-pages", test_zero_pages);
    qtest_add_func("/dedup/merge/lease", test_lease);
    qtest_add_func("/dedup/merge/unplug", test_unplug);
    qtest_add_func("/dedup/merge/ignore-shared", test_ignore_shared);
    qtest_add_func("/dedup/merge/direct-io", test_direct_io);
    qtest_add_func("/dedup/merge/limited", test_limited);
    qtest_add_func("/dedup/merge/group", test_group);
    qtest_add_func("/dedup/merge/dump", test_dump);
    qtest_add_func("/dedup/merge/merge-off", test_merge_off);
    qtest_add_func("/dedup/merge/exit", test_exit);
    return g_test_run();
}
