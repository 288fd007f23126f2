/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Memory that is taken on somebody's behalf: what is not there is refused
 * with the figures and changes nothing, on a memory cgroup at its limit and on
 * a tmpfs that somebody else has filled.  And the guest, whose pages were
 * given back, never pays for that: it may store to all of them.
 *
 * Each test runs in a process of its own: inside a memory cgroup, or with a
 * mount of its own.
 */

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "space/space-internal.h"

#define MIB (1u << 20)
/* "Cannot be had here", as automake's test driver has it. */
#define EXIT_SKIP 77

static void expect_end(int status, const char *where)
{
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS) {
        fx_fail("SIGBUS", "%s", where);
    }
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
        fx_fail("killed", "%s", where);
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_SKIP) {
        g_test_skip("a tmpfs cannot be mounted here");
    } else if (status) {
        fx_fail("process failed", "wait status 0x%x", status);
    }
}

/* ---- a tmpfs with a size ---- */

#define RAM_PAGES 8192          /* 32 MiB */
#define FS_BYTES (48u * MIB)

static char *mount_dir;

/* In a mount namespace of our own, which ends with the process. */
static void mount_small(void)
{
    g_autofree char *options = g_strdup_printf("size=%u", FS_BYTES);

    /* a sanitizer would turn it into an exit status of its own */
    signal(SIGBUS, SIG_DFL);
    if (unshare(CLONE_NEWNS) < 0 ||
        mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", mount_dir, "tmpfs", 0, options) < 0) {
        _exit(EXIT_SKIP);
    }
}

static int open_there(const char *name)
{
    g_autofree char *path = g_build_filename(mount_dir, name, NULL);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

    g_assert_cmpint(fd, >=, 0);
    return fd;
}

/* Somebody else's file takes all that is left. */
static int fill_up(void)
{
    static const uint8_t page[FX_PAGE] = { 1 };
    int fd = open_there("other");

    while (write(fd, page, sizeof(page)) == sizeof(page)) {
        ;
    }
    g_assert_cmpint(errno, ==, ENOSPC);
    return fd;
}

static void make_room(int fd)
{
    g_assert_cmpint(ftruncate(fd, 0), ==, 0);
    close(fd);
}

/*
 * A third is zero, a third is 8 contents, a third is unique; all of it has its
 * place in the file.
 */
static FxEngine *merged_on_tmpfs(FxRam **ram)
{
    FxEngine *fe;
    DedupStats stats;

    mount_small();
    *ram = fx_ram_new_file(FX_TMPFS, RAM_PAGES, open_there("ram"));
    for (uint32_t i = 0; i < RAM_PAGES; i++) {
        fx_page(*ram, i, 1);
        fx_page(*ram, i, i % 3 == 0 ? 0 : i % 3 == 1 ? 1 + i % 8 : 1000 + i);
    }
    fe = fx_engine_new(NULL);
    fx_add(fe, *ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.zero_pages, ==, (RAM_PAGES + 2) / 3);
    g_assert_cmpuint(stats.pages_merged, >, RAM_PAGES / 3 - 8);
    g_assert_cmpuint(stats.limits, ==, 0);
    return fe;
}

static bool file_limited(void *opaque)
{
    DedupStats stats;

    fx_stats(opaque, &stats);
    return stats.state == DEDUP_STATE_LIMITED &&
           (stats.limits & DEDUP_LIMIT_FILE);
}

static void free_all(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* The place of the dropped pages is taken: the guest stores to them. */
static void guest_on_full(void *opaque)
{
    FxRam *ram;
    FxEngine *fe = merged_on_tmpfs(&ram);
    int other = fill_up();
    DedupStats stats;
    FxView view;

    for (uint32_t i = 0; i < RAM_PAGES; i += 2) {
        fx_byte(ram, i, i % FX_PAGE, i % 255 + 1); /* may be the end of us */
    }
    fx_assert_bytes(ram);
    /* nothing more is dropped, and it says so */
    for (uint32_t i = 1; i < RAM_PAGES; i += 2) {
        fx_page(ram, i, 1 + i % 8);
    }
    fx_wait_until(file_limited, fe, "file system not looked at");
    fx_wait_scans(fe, 3);
    fx_assert_bytes(ram);

    make_room(other);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.limits, ==, 0);
    g_assert_cmpuint(stats.pages_merged, >, RAM_PAGES / 2 - 8);
    fx_assert_bytes(ram);
    fx_unmerge(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    g_assert_cmpuint(view.maps, ==, 1);
    fx_assert_bytes(ram);
    free_all(fe, ram);
}

static void assert_same_view(const FxRam *ram, const FxView *before)
{
    FxView after;

    fx_view(ram, &after);
    g_assert_cmpuint(after.segment_pages, ==, before->segment_pages);
    g_assert_cmpuint(after.copied, ==, before->copied);
    g_assert_cmpuint(after.own_pages, ==, before->own_pages);
    g_assert_cmpuint(after.maps, ==, before->maps);
}

/* An unmerge there is refused; forced, it says what is lacking. */
static void unmerge_on_full(void *opaque)
{
    FxRam *ram;
    FxEngine *fe = merged_on_tmpfs(&ram);
    g_autoptr(GError) error = NULL;
    DedupStats before, after;
    FxView view;
    int other;

    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
    other = fill_up();
    fx_stats(fe, &before);
    fx_view(ram, &view);
    g_assert_false(dedup_engine_restore(fe->e, true, false, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY);
    g_test_message("%s", error->message);
    g_assert_nonnull(strstr(error->message, "takes 22 MiB"));
    g_assert_nonnull(strstr(error->message,
                            "the file system of memory 'tmpfs' has only 0 "
                            "MiB"));
    assert_same_view(ram, &view);
    g_clear_error(&error);
    g_assert_false(dedup_region_remove(ram->region, true, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY);
    assert_same_view(ram, &view);
    dedup_region_open(ram->region);

    fx_restore_begin(fe, true, true);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, before.pages_merged + before.zero_pages);
    g_test_message("%s", fe->message);
    g_assert_nonnull(strstr(fe->message, "file system of the RAM's file"));
    fx_stats(fe, &after);
    g_assert_cmpuint(after.pages_merged, ==, before.pages_merged);
    g_assert_cmpuint(after.zero_pages, ==, before.zero_pages);
    g_assert_cmpuint(after.pages_present, ==, before.pages_present);
    fx_assert_bytes(ram);

    make_room(other);
    fx_unmerge(fe);
    fx_stats(fe, &after);
    g_assert_cmpuint(after.pages_present, ==, RAM_PAGES);
    g_assert_cmpuint(after.zero_pages, ==, 0);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, RAM_PAGES);
    free_all(fe, ram);
}

static void run_on_tmpfs(void (*body)(void *opaque))
{
    g_autoptr(GError) error = NULL;
    int status;

    mount_dir = g_dir_make_tmp("dedup-test-XXXXXX", &error);
    g_assert_no_error(error);
    status = fx_in_child(body, NULL, FX_DEADLINE);
    rmdir(mount_dir);
    g_clear_pointer(&mount_dir, g_free);
    expect_end(status, "on a full tmpfs");
}

static void test_guest_on_full(void)
{
    run_on_tmpfs(guest_on_full);
}

static void test_unmerge_on_full(void)
{
    run_on_tmpfs(unmerge_on_full);
}

/* ---- a memory cgroup: RAM without a shadow, it would be charged ---- */

#define PAGES 32768             /* 128 MiB of 4 MiB of contents */
#define CONTENTS 1024
#define HALF (PAGES / 2)

typedef struct InCgroup {
    FxCgroup *cg;
    FxKind kind;
} InCgroup;

static void check_contents(const FxRam *ram)
{
    uint8_t page[FX_PAGE];

    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_content(page, 1 + i % CONTENTS);
        fx_assert_page(ram, i, page);
    }
}

static FxRam *new_ram(FxKind kind, uint32_t npages)
{
    FxRam *ram = fx_ram_new(kind, npages);

    for (uint32_t i = 0; i < npages; i++) {
        fx_content(fx_addr(ram, i), 1 + i % CONTENTS);
    }
    return ram;
}

static FX_GUEST void store_page(FxRam *ram, uint32_t page, uint64_t seed)
{
    fx_content(fx_addr(ram, page), seed);
}

/*
 * Somebody needs a region whole, for which there is no room: refused before
 * anything is changed; so are two, where there is room for one.
 */
static void remove_in_cgroup(void *opaque)
{
    InCgroup *in = opaque;
    FxRam *ram[2];
    DedupRegion *regions[2];
    g_autoptr(GError) error = NULL;
    FxView before[2], view;
    FxEngine *fe;

    g_assert_true(fx_cgroup_enter(in->cg));
    fe = fx_engine_new(NULL);
    for (unsigned i = 0; i < 2; i++) {
        ram[i] = new_ram(in->kind, HALF);
        fx_add(fe, ram[i]);
        regions[i] = ram[i]->region;
    }
    fx_engine_start(fe);
    fx_wait_settled(fe);
    for (unsigned i = 0; i < 2; i++) {
        fx_view(ram[i], &before[i]);
        g_assert_cmpuint(before[i].segment_pages, ==, HALF);
    }

    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  60 * MIB));
    g_assert_false(dedup_region_remove(regions[0], true, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY);
    g_test_message("%s", error->message);
    g_assert_nonnull(strstr(error->message, "takes 64 MiB"));
    assert_same_view(ram[0], &before[0]);
    g_assert_cmpuint(__atomic_load_n(&fe->e->room.reserved,
                                     __ATOMIC_RELAXED), ==, 0);

    g_clear_error(&error);
    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  90 * MIB));
    g_assert_false(dedup_engine_check_room(fe->e, regions, 2, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY);
    g_assert_nonnull(strstr(error->message, "takes 128 MiB"));
    g_clear_error(&error);
    g_assert_true(dedup_engine_check_room(fe->e, regions, 1, &error));

    /* it stays closed: its owner wants it back */
    store_page(ram[0], 7, 99);
    store_page(ram[1], 7, 99);
    store_page(ram[1], 9, 99);
    fx_wait_scans(fe, 4);
    g_assert_true(fx_is_merged(ram[1], 7) && fx_is_merged(ram[1], 9));
    fx_view(ram[0], &view);
    g_assert_cmpuint(view.segment_pages - view.copied, <=, HALF - 1);
    dedup_region_open(regions[0]);
    fx_wait_settled(fe);
    fx_view(ram[0], &view);
    g_assert_cmpuint(view.segment_pages - view.copied, ==, HALF);
    store_page(ram[0], 7, 1 + 7);
    store_page(ram[1], 7, 1 + 7);
    store_page(ram[1], 9, 1 + 9);

    g_assert_true(fx_cgroup_limit(in->cg, fx_cgroup_usage(in->cg) +
                                  80 * MIB));
    fx_remove(ram[0], true);
    fx_view(ram[0], &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    check_contents(ram[0]);
    check_contents(ram[1]);
    fx_engine_free(fe);
}

static void test_remove(gconstpointer data)
{
    InCgroup in = { .cg = fx_cgroup_new(), .kind = GPOINTER_TO_INT(data) };
    int status;

    if (!in.cg) {
        return;
    }
    status = fx_in_child(remove_in_cgroup, &in, FX_DEADLINE);
    fx_cgroup_free(in.cg);
    expect_end(status, "at the limit of its memory cgroup");
}

/* Who wants the region gone ends a restore of it, and changes nothing. */
static void test_cancel(void)
{
    FxRam *ram = fx_ram_new(FX_MEMFD, 2048);
    FxEngine *fe = fx_engine_new(NULL);
    g_autoptr(GError) error = NULL;
    FxView view;

    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_page(ram, i, i % 32 + 1);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    dedup_engine_cancel_restore(fe->e, ram->host + FX_PAGE); /* no region's */
    dedup_engine_cancel_restore(fe->e, ram->host);
    g_assert_false(dedup_region_remove(ram->region, true, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_STATE);
    assert_same_view(ram, &view);
    fx_assert_bytes(ram);
    dedup_region_open(ram->region);
    fx_remove(ram, true);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    fx_assert_bytes(ram);
    /* gone */
    dedup_engine_cancel_restore(fe->e, ram->host);
    fx_engine_free(fe);
    fx_ram_free(ram);
}

/* ---- requests that overtake each other ---- */

typedef struct Askers {
    FxEngine *fe;
    bool stop;
} Askers;

/* Ask, and take it back, at any moment. */
static gpointer ask(gpointer opaque)
{
    Askers *a = opaque;

    while (!__atomic_load_n(&a->stop, __ATOMIC_RELAXED)) {
        dedup_engine_restore(a->fe->e, true, false, NULL);
        g_usleep(g_random_int_range(0, 2000));
        if (g_random_boolean()) {
            fx_set_run(a->fe, true);
        }
    }
    return NULL;
}

static bool nothing_reserved(void *opaque)
{
    FxEngine *fe = opaque;

    return !__atomic_load_n(&fe->e->room.reserved, __ATOMIC_SEQ_CST);
}

static void test_reservations(void)
{
    FxRam *ram = fx_ram_new(FX_MEMFD, 2048);
    FxEngine *fe = fx_engine_new(NULL);
    Askers askers = { .fe = fe };
    GThread *threads[3];

    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_page(ram, i, i % 32 + 1);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    for (unsigned i = 0; i < G_N_ELEMENTS(threads); i++) {
        threads[i] = g_thread_new("asker", ask, &askers);
    }
    for (unsigned i = 0; i < 200; i++) {
        /* a region's owner takes a part at the same time */
        dedup_engine_restore_range(fe->e, fx_addr(ram, i % 16 * 128),
                                   128 * FX_PAGE, NULL);
        g_usleep(1000);
    }
    __atomic_store_n(&askers.stop, true, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < G_N_ELEMENTS(threads); i++) {
        g_thread_join(threads[i]);
    }
    fx_unmerge(fe);
    fx_wait_until(nothing_reserved, fe, "reservation leaked");
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_func("/room/tmpfs/guest", test_guest_on_full);
    g_test_add_func("/room/tmpfs/unmerge", test_unmerge_on_full);
    g_test_add_data_func("/room/remove/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_remove);
    g_test_add_data_func("/room/remove/anon", GINT_TO_POINTER(FX_ANON),
                         test_remove);
    g_test_add_func("/room/cancel", test_cancel);
    g_test_add_func("/room/reservations", test_reservations);
    return g_test_run();
}
