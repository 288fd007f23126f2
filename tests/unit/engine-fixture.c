/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * RAM, engines and waiting for the engine's tests; see engine-fixture.h.
 * The view from outside is in engine-outside.c.
 */

#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "host/freeze.h"
#include "host/mutant.h"

#define HUGE (2u << 20)

/* The group's directory that is in use, or NULL: removed on failure too. */
static char *group_dir;

static void remove_tree(const char *path)
{
    GDir *dir = g_dir_open(path, 0, NULL);
    const char *name;

    while (dir && (name = g_dir_read_name(dir))) {
        g_autofree char *child = g_build_filename(path, name, NULL);

        if (g_file_test(child, G_FILE_TEST_IS_DIR)) {
            remove_tree(child);
        } else {
            unlink(child);
        }
    }
    if (dir) {
        g_dir_close(dir);
    }
    rmdir(path);
}

void fx_fail(const char *symptom, const char *format, ...)
{
    g_autofree char *text = NULL;
    va_list args;

    va_start(args, format);
    text = g_strdup_vprintf(format, args);
    va_end(args);
    printf("# SYMPTOM: %s: %s\n", symptom, text);
    fflush(stdout);
    if (group_dir) {
        remove_tree(group_dir);
    }
    /* other threads may be stuck in a frozen page: no clean-up is safe */
    abort();
}

gint64 fx_hang_us(void)
{
    /* with a mutant it is expected: do not take all day */
    return (dedup_mutant ? 3 : 60) * test_patience() * G_USEC_PER_SEC;
}

DedupFreezeHow fx_freeze;
DedupExclusiveFn *fx_exclusive;

void fx_init(int *argc, char ***argv)
{
    struct rlimit none = { 0, 0 };
    g_autoptr(GError) error = NULL;
    DedupFreezer freezer;

    setrlimit(RLIMIT_CORE, &none);
    setvbuf(stdout, NULL, _IOLBF, 0);
    g_test_init(argc, argv, NULL);
    dedup_never_rests = true; /* but for who tests it */
    if (g_strcmp0(g_getenv("DEDUP_TEST_FREEZE"), "mprotect") == 0) {
        fx_freeze = DEDUP_FREEZE_MPROTECT;
    }
    if (!dedup_freezer_open(&freezer, fx_freeze, -1, &error)) {
        /* an unprivileged user on most hosts: nothing can be merged */
        printf("1..0 # SKIP %s\n", error->message);
        exit(0);
    }
    dedup_freezer_close(&freezer);
}

/* ---- RAM ---- */

const char *fx_kind_name(FxKind kind)
{
    static const char *const names[FX_KINDS] = {
        [FX_MEMFD] = "memfd",
        [FX_TMPFS] = "tmpfs",
        [FX_ANON] = "anon",
        [FX_ANON_THP] = "anon-thp",
        [FX_PRIVATE] = "private-memfd",
    };

    return names[kind];
}

static int tmpfs_file(void)
{
    char path[] = "/dev/shm/dedup-test-XXXXXX";
    int fd = mkstemp(path);

    g_assert_cmpint(fd, >=, 0);
    unlink(path);
    return fd;
}

int fx_huge_tmpfs_file(void)
{
    g_autofree char *dir = g_dir_make_tmp("dedup-test-XXXXXX", NULL);
    int fd = -1;

    g_assert_nonnull(dir);
    if (mount("dedup-test", dir, "tmpfs", 0, "huge=always") == 0) {
        fd = open(dir, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600);
        umount2(dir, MNT_DETACH);
    }
    rmdir(dir);
    return fd;
}

static int file_for(FxKind kind)
{
    return kind == FX_ANON || kind == FX_ANON_THP ? -1
           : kind == FX_TMPFS ? tmpfs_file()
                              : memfd_create("test-ram", MFD_CLOEXEC);
}

static FxRam *ram_new(FxKind kind, uint32_t npages, int fd, int flags)
{
    FxRam *ram = g_new0(FxRam, 1);
    size_t size = (size_t)npages * FX_PAGE;

    flags |= kind == FX_MEMFD || kind == FX_TMPFS ? MAP_SHARED : MAP_PRIVATE;
    ram->kind = kind;
    ram->npages = npages;
    ram->fd = fd;
    if (kind == FX_ANON || kind == FX_ANON_THP) {
        flags |= MAP_ANONYMOUS;
    } else {
        g_assert_cmpint(ram->fd, >=, 0);
        g_assert_cmpint(ftruncate(ram->fd, size), ==, 0);
    }
    /* guard pages around it: no map of ours joins another */
    ram->map_size = size + 2 * HUGE;
    ram->map = mmap(NULL, ram->map_size, PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g_assert_true(ram->map != MAP_FAILED);
    ram->host = (uint8_t *)(((uintptr_t)ram->map + HUGE) &
                            ~(uintptr_t)(HUGE - 1));
    ram->host = mmap(ram->host, size, PROT_READ | PROT_WRITE,
                     flags | MAP_FIXED, ram->fd, 0);
    g_assert_true(ram->host != MAP_FAILED);
    g_assert_cmpint(madvise(ram->host, size, MADV_DONTFORK), ==, 0);
    if (ram->fd < 0) {
        madvise(ram->host, size, kind == FX_ANON_THP ? MADV_HUGEPAGE
                                                     : MADV_NOHUGEPAGE);
    }
    ram->shadow = mmap(NULL, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g_assert_true(ram->shadow != MAP_FAILED);
    madvise(ram->shadow, size, MADV_NOHUGEPAGE);
    ram->pins = g_new0(uint16_t, (size >> DEDUP_PIN_SHIFT) + 1);
    ram->readers = g_new0(uint16_t, (size >> DEDUP_PIN_SHIFT) + 1);
    return ram;
}

FxRam *fx_ram_new(FxKind kind, uint32_t npages)
{
    return ram_new(kind, npages, file_for(kind), 0);
}

FxRam *fx_ram_new_file(FxKind kind, uint32_t npages, int fd)
{
    return ram_new(kind, npages, fd, 0);
}

FxRam *fx_ram_new_vast(FxKind kind, uint32_t npages)
{
    return ram_new(kind, npages, file_for(kind), MAP_NORESERVE);
}

void fx_ram_free(FxRam *ram)
{
    g_assert_null(ram->region);
    munmap(ram->map, ram->map_size);
    munmap(ram->shadow, (size_t)ram->npages * FX_PAGE);
    if (ram->fd >= 0) {
        close(ram->fd);
    }
    g_free(ram->pins);
    g_free(ram->readers);
    g_free(ram);
}

FX_GUEST
void fx_content(void *page, uint64_t seed)
{
    FxWord *word = page;

    for (unsigned i = 0; i < FX_PAGE / sizeof(*word); i++) {
        word[i] = seed ? (seed + i) * 0x9e3779b97f4a7c15u | 1 : 0;
    }
}

void fx_shadow_page(FxRam *ram, uint32_t page, uint64_t seed)
{
    fx_content(ram->shadow + (size_t)page * FX_PAGE, seed);
}

void fx_page(FxRam *ram, uint32_t page, uint64_t seed)
{
    fx_content(fx_addr(ram, page), seed);
    fx_shadow_page(ram, page, seed);
}

FX_GUEST
void fx_byte(FxRam *ram, uint32_t page, uint32_t at, uint8_t value)
{
    *(FxByte *)(fx_addr(ram, page) + at) = value;
    ram->shadow[(size_t)page * FX_PAGE + at] = value;
}

/* The first byte that differs, or FX_PAGE; *@zero: all of @page is zero. */
FX_GUEST
static uint32_t difference(const void *page, const void *expected,
                           bool *zero)
{
    const FxByte *p = page;
    const FxByte *q = expected;
    const FxWord *word = page;
    const FxWord *other = expected;
    uint32_t i;

    *zero = true;
    for (i = 0; i < FX_PAGE / sizeof(*word); i++) {
        if (word[i] != other[i]) {
            break;
        }
    }
    if (i == FX_PAGE / sizeof(*word)) {
        return FX_PAGE;
    }
    for (i = 0; i < FX_PAGE / sizeof(*word); i++) {
        *zero &= word[i] == 0;
    }
    for (i = 0; i < FX_PAGE && p[i] == q[i]; i++) {
        ;
    }
    /* mended while we looked at it */
    return i;
}

void fx_assert_page(const FxRam *ram, uint32_t page, const void *expected)
{
    bool zero;
    uint32_t at = difference(fx_addr(ram, page), expected, &zero);

    if (at < FX_PAGE) {
        fx_fail(zero ? "zero page" : "foreign bytes",
                "%s page %u differs from byte %u on",
                fx_kind_name(ram->kind), page, at);
    }
}

void fx_assert_bytes(const FxRam *ram)
{
    for (uint32_t i = 0; i < ram->npages; i++) {
        fx_assert_page(ram, i, ram->shadow + (size_t)i * FX_PAGE);
    }
}

/* ---- engine ---- */

static void on_state(void *opaque, DedupState state)
{
    FxEngine *fe = opaque;

    g_mutex_lock(&fe->lock);
    fe->state = state;
    g_cond_broadcast(&fe->cond);
    g_mutex_unlock(&fe->lock);
}

static void on_restored(void *opaque, uint64_t left, const GError *error)
{
    FxEngine *fe = opaque;

    g_mutex_lock(&fe->lock);
    fe->restored = true;
    fe->left = left;
    g_free(fe->message);
    fe->message = error ? g_strdup(error->message) : NULL;
    g_cond_broadcast(&fe->cond);
    g_mutex_unlock(&fe->lock);
}

FxEngine *fx_engine_new(const char *dir)
{
    return fx_engine_new_mode(dir, DEDUP_MODE_FULL);
}

FxEngine *fx_engine_try(const char *dir, DedupMode mode, GError **error)
{
    FxEngine *fe = g_new0(FxEngine, 1);
    DedupConfig config = {
        .page_size = FX_PAGE,
        .group_dir = dir,
        .params = {
            .mode = mode,
            .run = true,
            .pages_to_scan = 1u << 20,
            .sleep_millisecs = 1,
            .zero_pages = true,
            .huge_pages_split = true,
            .max_maps = 60,
        },
        .freeze = fx_freeze,
        .callbacks = {
            .state_changed = on_state, .restored = on_restored,
            .exclusive = fx_exclusive,
        },
        .opaque = fe,
    };

    fe->e = dedup_engine_new(&config, error);
    if (!fe->e) {
        g_free(fe);
        return NULL;
    }
    g_mutex_init(&fe->lock);
    g_cond_init(&fe->cond);
    fe->state = DEDUP_STATE_SCANNING;
    return fe;
}

FxEngine *fx_engine_new_mode(const char *dir, DedupMode mode)
{
    g_autoptr(GError) error = NULL;
    FxEngine *fe = fx_engine_try(dir, mode, &error);

    if (!fe) {
        fx_fail("no engine", "%s", error->message);
    }
    return fe;
}

static gpointer run(gpointer opaque)
{
    sigset_t all;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    dedup_engine_run(opaque);
    return NULL;
}

void fx_engine_start(FxEngine *fe)
{
    g_assert_null(fe->thread);
    fe->thread = g_thread_new("scanner", run, fe->e);
}

void fx_engine_stop(FxEngine *fe)
{
    if (fe->thread) {
        dedup_engine_stop(fe->e);
        g_thread_join(fe->thread);
        fe->thread = NULL;
    }
}

void fx_engine_free(FxEngine *fe)
{
    fx_engine_stop(fe);
    dedup_engine_free(fe->e);
    g_mutex_clear(&fe->lock);
    g_cond_clear(&fe->cond);
    g_free(fe->message);
    g_free(fe);
}

unsigned fx_flags(const FxRam *ram)
{
    return DEDUP_REGION_DONTFORK |
           (ram->kind == FX_ANON_THP ? DEDUP_REGION_HUGEPAGE : 0);
}

bool fx_try_add(FxEngine *fe, FxRam *ram, unsigned flags, GError **error)
{
    static const DedupMemory memory[FX_KINDS] = {
        [FX_MEMFD] = DEDUP_MEMORY_SHARED,
        [FX_TMPFS] = DEDUP_MEMORY_SHARED,
        [FX_ANON] = DEDUP_MEMORY_ANON,
        [FX_ANON_THP] = DEDUP_MEMORY_ANON,
        [FX_PRIVATE] = DEDUP_MEMORY_PRIVATE_FILE,
    };
    DedupRegionInfo info = {
        .id = fx_kind_name(ram->kind),
        .host = ram->host,
        .size = (uint64_t)ram->npages * FX_PAGE,
        .memory = memory[ram->kind],
        .fd = ram->fd,
        .pins = ram->pins,
        .readers = ram->readers,
        .flags = flags,
    };

    ram->region = dedup_region_add(fe->e, &info, error);
    return ram->region;
}

void fx_add_flags(FxEngine *fe, FxRam *ram, unsigned flags)
{
    g_autoptr(GError) error = NULL;

    if (!fx_try_add(fe, ram, flags, &error)) {
        fx_fail("region refused", "%s", error->message);
    }
}

void fx_add(FxEngine *fe, FxRam *ram)
{
    fx_add_flags(fe, ram, fx_flags(ram));
}

void fx_remove(FxRam *ram, bool keep_contents)
{
    g_autoptr(GError) error = NULL;

    if (!dedup_region_remove(ram->region, keep_contents, &error)) {
        fx_fail("region stays", "%s", error->message);
    }
    ram->region = NULL;
}

void fx_stats(FxEngine *fe, DedupStats *stats)
{
    dedup_engine_get_stats(fe->e, stats, false);
}

void fx_set_run(FxEngine *fe, bool on)
{
    DedupParams params;

    dedup_engine_get_params(fe->e, &params);
    params.run = on;
    dedup_engine_set_params(fe->e, &params);
}

void fx_wait_until(bool (*test)(void *opaque), void *opaque,
                   const char *what)
{
    gint64 end = g_get_monotonic_time() + FX_DEADLINE * G_USEC_PER_SEC;

    while (!test(opaque)) {
        if (g_get_monotonic_time() > end) {
            fx_fail(what, "after %d seconds", FX_DEADLINE);
        }
        g_usleep(1000);
    }
}

typedef struct Scans {
    FxEngine *fe;
    uint64_t target;
    bool idle;
} Scans;

static bool scans_done(void *opaque)
{
    Scans *s = opaque;
    DedupStats stats;

    fx_stats(s->fe, &stats);
    return stats.full_scans >= s->target &&
           (!s->idle || stats.state == DEDUP_STATE_IDLE);
}

void fx_wait_scans(FxEngine *fe, unsigned n)
{
    DedupStats stats;
    Scans s = { .fe = fe };

    fx_stats(fe, &stats);
    s.target = stats.full_scans + n + 1; /* one may be under way */
    fx_wait_until(scans_done, &s, "no full scan");
}

void fx_wait_settled(FxEngine *fe)
{
    DedupStats stats;
    Scans s = { .fe = fe, .idle = true };

    fx_stats(fe, &stats);
    /* seen, found stable, found published, two that find nothing */
    s.target = stats.full_scans + 6;
    fx_wait_until(scans_done, &s, "never idle");
}

void fx_wait_state(FxEngine *fe, DedupState state)
{
    gint64 end = g_get_monotonic_time() + FX_DEADLINE * G_USEC_PER_SEC;

    g_mutex_lock(&fe->lock);
    while (fe->state != state) {
        if (!g_cond_wait_until(&fe->cond, &fe->lock, end)) {
            fx_fail("state not reached", "%s, but is %s",
                    dedup_state_str(state), dedup_state_str(fe->state));
        }
    }
    g_mutex_unlock(&fe->lock);
}

void fx_restore_begin(FxEngine *fe, bool unmerge, bool force)
{
    g_autoptr(GError) error = NULL;

    g_mutex_lock(&fe->lock);
    fe->restored = false;
    g_mutex_unlock(&fe->lock);
    if (!dedup_engine_restore(fe->e, unmerge, force, &error)) {
        fx_fail("unmerge refused", "%s", error->message);
    }
}

void fx_wait_restored(FxEngine *fe)
{
    gint64 end = g_get_monotonic_time() + FX_DEADLINE * G_USEC_PER_SEC;

    g_mutex_lock(&fe->lock);
    while (!fe->restored) {
        if (!g_cond_wait_until(&fe->cond, &fe->lock, end)) {
            fx_fail("unmerge hangs", "after %d seconds", FX_DEADLINE);
        }
    }
    g_mutex_unlock(&fe->lock);
}

void fx_unmerge(FxEngine *fe)
{
    fx_restore_begin(fe, true, false);
    fx_wait_restored(fe);
    if (fe->left) {
        fx_fail("unmerge incomplete", "%" G_GUINT64_FORMAT " pages: %s",
                fe->left, fe->message);
    }
}

/* ---- a group's directory ---- */

char *fx_group_dir(void)
{
    g_autoptr(GError) error = NULL;
    char *dir = g_dir_make_tmp("dedup-test-XXXXXX", &error);

    g_assert_no_error(error);
    group_dir = dir;
    return dir;
}

void fx_group_dir_free(char *dir)
{
    group_dir = NULL;
    remove_tree(dir);
    g_free(dir);
}
