/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A virtual machine whose RAM is vast and hardly used: what is not there
 * costs nothing, neither memory nor system calls; and what comes to be there
 * is found.
 *
 * System calls are counted, not timed: the kernel's answers about RAM come
 * through functions that this program puts in the place of libc's.
 */

#include <fcntl.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "engine-internal.h"
#include "space/space-internal.h"

#define GIB (1u << 18)                  /* in pages */
#define PAGES (256 * GIB)
#define CHUNK 512

/* Questions about RAM since the start, by all threads. */
static uint64_t asked;
static FxRam *watched;

static void count_question(bool about_ram)
{
    __atomic_fetch_add(&asked, about_ram, __ATOMIC_RELAXED);
}

static bool is_ram(const void *addr)
{
    const FxRam *ram = __atomic_load_n(&watched, __ATOMIC_ACQUIRE);

    return ram && (const uint8_t *)addr >= ram->host &&
           (const uint8_t *)addr < fx_addr(ram, ram->npages);
}

int mincore(void *addr, size_t length, unsigned char *vec)
{
    count_question(is_ram(addr));
    return syscall(SYS_mincore, addr, length, vec);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    void *arg;

    va_start(args, request);
    arg = va_arg(args, void *);
    va_end(args);
    /* PAGEMAP_SCAN: nobody else's ioctl has this letter here */
    count_question(_IOC_TYPE(request) == 'f');
    return syscall(SYS_ioctl, fd, request, arg);
}

off_t lseek(int fd, off_t offset, int whence)
{
    const FxRam *ram = __atomic_load_n(&watched, __ATOMIC_ACQUIRE);

    count_question(ram && fd == ram->fd);
    return syscall(SYS_lseek, fd, offset, whence);
}

/* On the average; two passes may be under way at the ends. */
static uint64_t questions_per_pass(FxEngine *fe)
{
    uint64_t before, scans;
    DedupStats stats;

    fx_wait_scans(fe, 1);
    fx_stats(fe, &stats);
    scans = stats.full_scans;
    before = __atomic_load_n(&asked, __ATOMIC_RELAXED);
    fx_wait_scans(fe, 8);
    fx_stats(fe, &stats);
    return (__atomic_load_n(&asked, __ATOMIC_RELAXED) - before) /
           (stats.full_scans - scans + 1);
}

/* Private memory of this process, and what is in the group's file. */
static uint64_t metadata(FxEngine *fe)
{
    DedupStats stats;

    fx_stats(fe, &stats);
    return stats.metadata_bytes;
}

/* Where the few pages are: both ends, edges of chunks, far apart. */
static const uint32_t places[] = {
    0, CHUNK - 1, CHUNK, 5 * GIB + 77, 64 * GIB - 1, 64 * GIB,
    200 * GIB + 3 * CHUNK, PAGES - CHUNK - 1, PAGES - 1,
};

static void wait_merged(FxEngine *fe, const FxRam *ram)
{
    fx_wait_settled(fe);
    for (unsigned i = 0; i < G_N_ELEMENTS(places); i++) {
        if (!fx_is_merged(ram, places[i])) {
            fx_fail("not found", "page %u", places[i]);
        }
    }
}

static void assert_places(const FxRam *ram)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(places); i++) {
        fx_assert_page(ram, places[i],
                       ram->shadow + (size_t)places[i] * FX_PAGE);
    }
}

static void fill(FxRam *ram, uint64_t seed)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(places); i++) {
        fx_page(ram, places[i], seed);
    }
}

/* As a balloon does, and of more than the places. */
static void discard(FxEngine *fe, FxRam *ram, uint32_t first, uint32_t n)
{
    bool shared = ram->kind == FX_MEMFD;
    size_t len = (size_t)n * FX_PAGE;

    g_assert_true(dedup_engine_discard_begin(fe->e, fx_addr(ram, first),
                                             len));
    g_assert_cmpint(madvise(fx_addr(ram, first), len,
                            shared ? MADV_REMOVE : MADV_DONTNEED), ==, 0);
    dedup_engine_discard_end(fe->e);
    for (unsigned i = 0; i < G_N_ELEMENTS(places); i++) {
        if (places[i] - first < n) {
            fx_shadow_page(ram, places[i], 0);
        }
    }
}

/*
 * One question for each GiB of private memory; a file says at once where its
 * data is.  And a few for each chunk with something in it.
 */
static uint64_t most_questions(const FxRam *ram, unsigned chunks)
{
    return (ram->kind == FX_MEMFD ? 2 : PAGES / GIB + 2) + 6 * chunks;
}

/* How often others than the scanner had the remap lock. */
static uint64_t visits_of(FxEngine *fe)
{
    uint64_t visits;

    dedup_space_lock(fe->e->space);
    visits = fe->e->space->lock.strangers;
    dedup_space_unlock(fe->e->space);
    return visits;
}

static void test_vast(gconstpointer data)
{
    FxRam *ram = fx_ram_new_vast(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    unsigned chunks = G_N_ELEMENTS(places);
    uint64_t anon, before, visits;
    DedupStats stats;

    __atomic_store_n(&watched, ram, __ATOMIC_RELEASE);
    fx_engine_start(fe);
    fx_wait_state(fe, DEDUP_STATE_SCANNING);
    anon = fx_status("RssAnon");
    before = metadata(fe);
    fx_add_flags(fe, ram, DEDUP_REGION_DONTFORK | DEDUP_REGION_NORESERVE);

    /* nothing is there */
    fx_wait_scans(fe, 3);
    g_assert_cmpuint(questions_per_pass(fe), <=, most_questions(ram, 0));
    g_assert_cmpuint(metadata(fe) - before, <=, 1 << 20);
    if (!FX_SANITIZED) {
        g_assert_cmpuint(fx_status("RssAnon") - anon, <=, 2 << 20);
    }
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_total, ==, PAGES);
    g_assert_cmpuint(stats.pages_present, ==, 0);

    /* a little comes to be */
    fill(ram, 1);
    wait_merged(fe, ram);
    assert_places(ram);
    fx_wait_scans(fe, 2);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_merged, ==, chunks);
    g_assert_cmpuint(stats.pages_present, ==, chunks);
    g_assert_cmpuint(questions_per_pass(fe), <=,
                     most_questions(ram, chunks));
    g_assert_cmpuint(metadata(fe) - before, <=, 2 << 20);

    /* is written to: copies that no file has */
    fill(ram, 2);
    wait_merged(fe, ram);
    assert_places(ram);
    fx_stats(fe, &stats);
    /* one that waits between the kernel's copy and its store breaks twice */
    g_assert_cmpuint(stats.cow_breaks, >=, chunks);
    g_assert_cmpuint(stats.cow_breaks, <=, 2 * chunks);

    /* is thrown away, with all around it */
    discard(fe, ram, 0, PAGES / 2);
    fx_wait_scans(fe, 2);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_present, ==, chunks - 6);
    assert_places(ram);
    fill(ram, 3);
    wait_merged(fe, ram);
    assert_places(ram);

    /* and becomes zero, is dropped, and is there once more */
    fill(ram, 0);
    fx_wait_settled(fe);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.zero_pages, ==, chunks);
    g_assert_cmpuint(stats.pages_present, ==, 0);
    fill(ram, 4);
    wait_merged(fe, ram);
    assert_places(ram);

    /* is lost without a word; nobody was told of it */
    fx_page(ram, 100 * GIB, 1000);
    fx_wait_scans(fe, 2);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_present, ==, chunks + 1);
    g_assert_cmpint(madvise(fx_addr(ram, 100 * GIB), FX_PAGE,
                            ram->kind == FX_MEMFD ? MADV_REMOVE
                                                  : MADV_DONTNEED), ==, 0);
    fx_wait_scans(fe, 2);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pages_present, ==, chunks);

    /* whoever needs a range whole takes the lock for what is not */
    visits = visits_of(fe);
    g_assert_true(dedup_engine_restore_range(fe->e, ram->host,
                                             (size_t)PAGES / 2 * FX_PAGE,
                                             NULL));
    g_assert_cmpuint(visits_of(fe) - visits, <=, 100);
    assert_places(ram);
    fx_unmerge(fe);
    assert_places(ram);
    g_assert_cmpuint(metadata(fe) - before, <=, 2 << 20);
    fx_engine_free(fe);
    __atomic_store_n(&watched, NULL, __ATOMIC_RELEASE);
    ram->region = NULL;
    fx_ram_free(ram);
}

/* C16: what is on swap is not void: it is counted, and left where it is. */
static void test_swapped(gconstpointer data)
{
    FxRam *ram = fx_ram_new_vast(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    DedupStats stats;

    fill(ram, 1);
    for (unsigned i = 0; i < G_N_ELEMENTS(places); i++) {
        madvise(fx_addr(ram, places[i]), FX_PAGE, MADV_PAGEOUT);
    }
    fx_add_flags(fe, ram, DEDUP_REGION_DONTFORK | DEDUP_REGION_NORESERVE);
    fx_engine_start(fe);
    fx_wait_scans(fe, 4);
    fx_stats(fe, &stats);
    if (stats.pages_merged == G_N_ELEMENTS(places)) {
        g_test_skip("the host swaps nothing out when asked");
    } else {
        g_assert_cmpuint(stats.pass.swapped, ==, G_N_ELEMENTS(places));
        g_assert_cmpuint(stats.pages_merged, ==, 0);
    }
    assert_places(ram);
    fx_engine_free(fe);
    ram->region = NULL;
    fx_ram_free(ram);
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_data_func("/void/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_vast);
    g_test_add_data_func("/void/anon", GINT_TO_POINTER(FX_ANON), test_vast);
    g_test_add_data_func("/void/swapped/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_swapped);
    g_test_add_data_func("/void/swapped/anon", GINT_TO_POINTER(FX_ANON),
                         test_swapped);
    return g_test_run();
}
