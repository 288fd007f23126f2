/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel writes to pages while these are merged, dropped and restored at
 * full speed, case C13: read(2) from a pipe, pread() from a file's page
 * cache, and reads with O_DIRECT from a real file system, where the device
 * writes without a page fault and only the pin counters (I5) tell the engine.
 *
 * Each writer has pages of its own.  It brings new contents to a page, looks
 * at once whether they are there, leaves them alone for a while, and looks
 * again before the next.  Contents are few, so most pages are equal.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "engine-fixture.h"

#define PAGES_EACH 64
#define ROUNDS 200              /* of restoring, at the least */
#define VALUES 6                /* contents: seeds 0 (zero) to 5 */

typedef enum Source { PIPE, FILE_CACHE, DIRECT, STORE, SOURCES } Source;

static const char *const source_names[SOURCES] = {
    "read(2) from a pipe", "pread() from a file", "O_DIRECT", "stores",
};

typedef struct Writer {
    FxRam *ram;
    Source source;
    uint32_t first;
    uint8_t value[PAGES_EACH];
    int fd;                     /* the file; -1 */
    int pipe[2];
    uint8_t contents[VALUES][FX_PAGE];
    GThread *thread;
    uint64_t seed;
    uint64_t done;              /* atomic */
    int stop;                   /* atomic */
    int ended;                  /* atomic */
} Writer;

/* A file with the contents one after the other, or -1. */
static int make_file(bool direct)
{
    g_autofree char *path = g_build_filename(g_get_tmp_dir(),
                                             "dedup-dma-XXXXXX", NULL);
    uint8_t *page = mmap(NULL, FX_PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int fd = mkstemp(path);
    struct statfs fs;
    int out = -1;

    g_assert_cmpint(fd, >=, 0);
    for (unsigned v = 0; v < VALUES; v++) {
        fx_content(page, v);
        g_assert_cmpint(write(fd, page, FX_PAGE), ==, FX_PAGE);
    }
    g_assert_cmpint(fsync(fd), ==, 0);
    if (!direct) {
        out = open(path, O_RDONLY | O_CLOEXEC);
    } else if (fstatfs(fd, &fs) == 0 && fs.f_type != TMPFS_MAGIC) {
        /* tmpfs knows O_DIRECT (6.6), and copies all the same */
        out = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
        if (out >= 0 && pread(out, page, FX_PAGE, 0) != FX_PAGE) {
            close(out);
            out = -1;
        }
    }
    unlink(path);
    close(fd);
    munmap(page, FX_PAGE);
    return out;
}

FX_GUEST
static void look(const Writer *w, uint32_t i, const char *when)
{
    const uint64_t *have = (uint64_t *)fx_addr(w->ram, w->first + i);
    const FxWord *p = (const FxWord *)have;
    const uint64_t *want = (const uint64_t *)w->contents[w->value[i]];

    for (unsigned k = 0; k < FX_PAGE / sizeof(*want); k++) {
        uint64_t seen = p[k];

        if (seen != want[k]) {
            unsigned before = (w->value[i] + VALUES - 1) % VALUES;
            bool lost = seen == ((uint64_t *)w->contents[before])[k];

            fx_fail(lost ? "lost read" : seen ? "foreign bytes"
                                              : "zero page",
                    "%s, page %u word %u %s", source_names[w->source], i, k,
                    when);
        }
    }
}

FX_GUEST
static void store_page(uint8_t *to, const uint8_t *from)
{
    for (unsigned k = 0; k < FX_PAGE; k += sizeof(uint64_t)) {
        *(FxWord *)(to + k) = *(const uint64_t *)(from + k);
    }
}

/* The system calls as such: libc's are instrumented as writing to RAM. */
FX_GUEST
static void bring(Writer *w, uint32_t i, uint8_t value)
{
    uint8_t *to = fx_addr(w->ram, w->first + i);
    bool pins = w->source == DIRECT ||
                (w->source != STORE && fx_freeze == DEDUP_FREEZE_MPROTECT);
    ssize_t n = FX_PAGE;

    if (pins) {
        fx_pin(w->ram, w->first + i);
    }
    switch (w->source) {
    case PIPE:
        n = write(w->pipe[1], w->contents[value], FX_PAGE);
        if (n == FX_PAGE) {
            n = syscall(SYS_read, w->pipe[0], to, FX_PAGE);
        }
        break;
    case FILE_CACHE:
        n = syscall(SYS_pread64, w->fd, to, FX_PAGE, value * FX_PAGE);
        break;
    case DIRECT:
        n = syscall(SYS_pread64, w->fd, to, FX_PAGE, value * FX_PAGE);
        break;
    default:
        store_page(to, w->contents[value]);
        break;
    }
    if (pins) {
        fx_unpin(w->ram, w->first + i);
    }
    if (n != FX_PAGE) {
        fx_fail("read failed", "%s: %zd, %s", source_names[w->source], n,
                g_strerror(errno));
    }
}

FX_GUEST
static gpointer writer_main(gpointer opaque)
{
    Writer *w = opaque;

    while (!__atomic_load_n(&w->stop, __ATOMIC_RELAXED)) {
        uint32_t i;

        w->seed ^= w->seed << 13;
        w->seed ^= w->seed >> 7;
        w->seed ^= w->seed << 17;
        i = w->seed % PAGES_EACH;
        look(w, i, "before the next");
        w->value[i] = (w->value[i] + 1) % VALUES;
        bring(w, i, w->value[i]);
        look(w, i, "at once");
        if (__atomic_fetch_add(&w->done, 1, __ATOMIC_RELAXED) % 16 == 0) {
            g_usleep(300);
        }
    }
    __atomic_store_n(&w->ended, 1, __ATOMIC_RELEASE);
    return NULL;
}

static Writer *writer_new(FxRam *ram, unsigned number, Source source, int fd)
{
    Writer *w = g_new0(Writer, 1);

    w->ram = ram;
    w->source = source;
    w->first = number * PAGES_EACH;
    w->fd = fd;
    w->seed = 777 + number * 13;
    g_assert_cmpint(pipe(w->pipe), ==, 0);
    for (unsigned v = 0; v < VALUES; v++) {
        fx_content(w->contents[v], v);
    }
    for (uint32_t i = 0; i < PAGES_EACH; i++) {
        w->value[i] = i % VALUES;
        fx_page(ram, w->first + i, i % VALUES);
    }
    return w;
}

static void writer_end(Writer *w)
{
    gint64 end = g_get_monotonic_time() + fx_hang_us();

    __atomic_store_n(&w->stop, 1, __ATOMIC_RELAXED);
    while (!__atomic_load_n(&w->ended, __ATOMIC_ACQUIRE)) {
        if (g_get_monotonic_time() > end) {
            fx_fail("writer hangs", "%s after %" G_GUINT64_FORMAT " pages",
                    source_names[w->source],
                    __atomic_load_n(&w->done, __ATOMIC_RELAXED));
        }
        g_usleep(1000);
    }
    g_thread_join(w->thread);
    for (uint32_t i = 0; i < PAGES_EACH; i++) {
        look(w, i, "at the end");
    }
}

static void writer_free(Writer *w)
{
    close(w->pipe[0]);
    close(w->pipe[1]);
    g_free(w);
}

static FxEngine *engine_at_full_speed(void)
{
    FxEngine *fe = fx_engine_new(NULL);
    DedupParams params;

    dedup_engine_get_params(fe->e, &params);
    params.sleep_millisecs = 0;
    dedup_engine_set_params(fe->e, &params);
    return fe;
}

/* As long as it takes for pages enough to be merged and written again. */
static void run_writers(FxEngine *fe, Writer **w, unsigned n)
{
    gint64 start = g_get_monotonic_time();
    DedupStats stats;

    for (unsigned i = 0; i < n; i++) {
        w[i]->thread = g_thread_new("writer", writer_main, w[i]);
    }
    for (unsigned round = 0; ; round++) {
        g_usleep(3000);
        /* may fail: what is pinned stays merged */
        dedup_engine_restore_range(fe->e, fx_addr(w[0]->ram, round * 37 %
                                                  (n * PAGES_EACH)),
                                   (round % 50 + 1) * FX_PAGE, NULL);
        fx_stats(fe, &stats);
        if (stats.cow_breaks >= 1000 && round >= ROUNDS) {
            break;
        }
        if (g_get_monotonic_time() - start > FX_DEADLINE * G_USEC_PER_SEC) {
            fx_fail("too few merges", "%" G_GUINT64_FORMAT,
                    stats.cow_breaks);
        }
    }
    for (unsigned i = 0; i < n; i++) {
        writer_end(w[i]);
        g_test_message("%s: %" G_GUINT64_FORMAT " pages",
                       source_names[w[i]->source], w[i]->done);
        g_assert_cmpuint(w[i]->done, >, 100);
    }
}

static void test_writers(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), SOURCES * PAGES_EACH);
    FxEngine *fe = engine_at_full_speed();
    int cached = make_file(false);
    int direct = make_file(true);
    Writer *w[SOURCES];

    if (direct < 0) {
        g_test_message("no O_DIRECT in %s: that writer stores instead",
                       g_get_tmp_dir());
    }
    for (Source s = 0; s < SOURCES; s++) {
        Source real = s == DIRECT && direct < 0 ? STORE : s;

        w[s] = writer_new(ram, s, real, real == DIRECT ? direct : cached);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    run_writers(fe, w, SOURCES);
    fx_unmerge(fe);
    for (Source s = 0; s < SOURCES; s++) {
        for (uint32_t i = 0; i < PAGES_EACH; i++) {
            look(w[s], i, "after the unmerge");
        }
        writer_free(w[s]);
    }
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    close(cached);
    close(direct);
}

/* Two writers of O_DIRECT alone: what M1 has to be seen by. */
static void test_direct(gconstpointer data)
{
    int direct = make_file(true);
    FxRam *ram;
    FxEngine *fe;
    Writer *w[2];

    if (direct < 0) {
        g_test_skip("no file system with O_DIRECT in the temporary directory");
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), 2 * PAGES_EACH);
    fe = engine_at_full_speed();
    for (unsigned i = 0; i < 2; i++) {
        w[i] = writer_new(ram, i, DIRECT, direct);
    }
    fx_add(fe, ram);
    fx_engine_start(fe);
    run_writers(fe, w, 2);
    for (unsigned i = 0; i < 2; i++) {
        writer_free(w[i]);
    }
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
    close(direct);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/kernel/%s/%s", name,
                                                fx_kind_name(kind));

        if (test == test_writers || kind == FX_MEMFD || kind == FX_ANON) {
            g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
        }
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("writers", test_writers);
    add_tests("direct", test_direct);
    return g_test_run();
}
