/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Threads that write to pages while these are merged, dropped and restored
 * at full speed: no store is lost, no page has foreign bytes, nobody hangs.
 * Case C11: a lock and a counter inside each page, compared with a shadow.
 *
 * A page is a lock (its first word) and 511 words that all follow from the
 * page's counter, which runs from 0 to VALUES - 1 and over again: so pages
 * are often equal, and with 0 all zero.  A writer takes the lock in the
 * page, compares the whole page with the counter's shadow, writes the page
 * for the next value, and unlocks.  A store that was lost shows at the next
 * visit.  The last pages are never written: a reader compares them all the
 * time.
 *
 * The test's main thread meanwhile restores ranges, discards nothing, turns
 * scanning off and on.
 *
 * $DEDUP_STRESS: go on until at least so many pages were merged and written
 * again, or restored (default: 3000, and at least one second).
 */

#include <errno.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "host/mutant.h"

#define PAGES 512
#define CONSTANT 64             /* at the end: equal, never written */
#define WRITTEN (PAGES - CONSTANT)
#define WORDS (FX_PAGE / sizeof(uint64_t))
#define VALUES 6
#define WRITERS 2

typedef struct Run {
    FxRam *ram;
    FxEngine *fe;
    uint8_t value[WRITTEN];     /* shadow of the counters; by the page lock */
    int stop;                   /* atomic */
    uint64_t restored;
} Run;

typedef struct Worker {
    Run *run;
    GThread *thread;
    uint64_t seed;
    uint64_t done;              /* atomic; pages visited */
    int ended;                  /* atomic */
} Worker;

static uint64_t word_of(uint8_t value, unsigned i)
{
    return value ? value * 0x9e3779b97f4a7c15u + i : 0;
}

static uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

FX_GUEST
static void compare(const FxWord *page, uint8_t value,
                    uint32_t number)
{
    bool zero = true;

    for (unsigned i = 1; i < WORDS; i++) {
        uint64_t seen = page[i];

        if (seen == word_of(value, i)) {
            continue;
        }
        for (unsigned k = 1; k < WORDS; k++) {
            zero &= page[k] == 0;
        }
        if (seen == word_of((value + VALUES - 1) % VALUES, i) &&
            number < WRITTEN) {
            fx_fail("lost store", "page %u word %u is that of the value "
                    "before %u", number, i, value);
        }
        fx_fail(zero ? "zero page" : "foreign bytes",
                "page %u word %u is %" G_GINT64_MODIFIER "x", number, i,
                seen);
    }
}

FX_GUEST
static void lock_page(uint64_t *lock)
{
    uint64_t none = 0;

    while (!__atomic_compare_exchange_n(lock, &none, 1, false,
                                        __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
        none = 0;
        sched_yield();
    }
}

FX_GUEST
static void visit(Run *run, uint32_t number)
{
    uint64_t *page = (uint64_t *)fx_addr(run->ram, number);
    FxWord *word = page;
    uint8_t next;

    lock_page(page);
    compare(page, run->value[number], number);
    next = (run->value[number] + 1) % VALUES;
    for (unsigned i = 1; i < WORDS; i++) {
        word[i] = word_of(next, i);
    }
    run->value[number] = next;
    __atomic_store_n(page, 0, __ATOMIC_SEQ_CST);
}

static gpointer writer(gpointer opaque)
{
    Worker *w = opaque;

    while (!__atomic_load_n(&w->run->stop, __ATOMIC_RELAXED)) {
        visit(w->run, next_random(&w->seed) % WRITTEN);
        __atomic_fetch_add(&w->done, 1, __ATOMIC_RELAXED);
        if (w->done % 64 == 0) {
            g_usleep(500);      /* let pages settle, and others run */
        }
    }
    __atomic_store_n(&w->ended, 1, __ATOMIC_RELEASE);
    return NULL;
}

FX_GUEST
static void look(Run *run, uint32_t number)
{
    compare((uint64_t *)fx_addr(run->ram, number), 1, number);
}

static gpointer reader(gpointer opaque)
{
    Worker *w = opaque;

    while (!__atomic_load_n(&w->run->stop, __ATOMIC_RELAXED)) {
        look(w->run, WRITTEN + w->done % CONSTANT);
        __atomic_fetch_add(&w->done, 1, __ATOMIC_RELAXED);
        if (w->done % 256 == 0) {
            sched_yield();
        }
    }
    __atomic_store_n(&w->ended, 1, __ATOMIC_RELEASE);
    return NULL;
}

FX_GUEST
static void fill(Run *run)
{
    for (uint32_t n = 0; n < PAGES; n++) {
        FxWord *page = (uint64_t *)fx_addr(run->ram, n);
        uint8_t value = n < WRITTEN ? n % VALUES : 1;

        page[0] = n < WRITTEN ? 0 : 7;
        for (unsigned i = 1; i < WORDS; i++) {
            page[i] = word_of(value, i);
        }
        if (n < WRITTEN) {
            run->value[n] = value;
        }
    }
}

static void restore_some(Run *run, uint64_t *seed)
{
    uint64_t before = dedup_region_pages_merged(run->ram->region);
    uint32_t first = next_random(seed) % PAGES;
    uint32_t n = next_random(seed) % 3 ? next_random(seed) % 64 + 1 : PAGES;
    uint64_t after;

    /* what is pinned or at the limit of maps may stay; nothing is here */
    if (!dedup_engine_restore_range(run->fe->e, fx_addr(run->ram, first),
                                    (uint64_t)MIN(n, PAGES - first) *
                                    FX_PAGE, NULL)) {
        fx_fail("restore refused", "pages %u+%u", first, n);
    }
    after = dedup_region_pages_merged(run->ram->region);
    run->restored += before - MIN(before, after);
}

static void watch(Worker *workers, unsigned n, uint64_t *last,
                  gint64 *progress)
{
    gint64 now = g_get_monotonic_time();

    for (unsigned i = 0; i < n; i++) {
        uint64_t done = __atomic_load_n(&workers[i].done, __ATOMIC_RELAXED);

        if (done != last[i]) {
            last[i] = done;
            progress[i] = now;
        } else if (now - progress[i] > fx_hang_us()) {
            fx_fail("writer hangs", "thread %u after %" G_GUINT64_FORMAT
                    " pages", i, done);
        }
    }
}

/* A thread that hangs cannot be joined: look before. */
static void join(Worker *w)
{
    gint64 end = g_get_monotonic_time() + fx_hang_us();

    while (!__atomic_load_n(&w->ended, __ATOMIC_ACQUIRE)) {
        if (g_get_monotonic_time() > end) {
            fx_fail("writer hangs", "after %" G_GUINT64_FORMAT " pages",
                    __atomic_load_n(&w->done, __ATOMIC_RELAXED));
        }
        g_usleep(1000);
    }
    g_thread_join(w->thread);
}

static uint64_t events(Run *run)
{
    DedupStats stats;

    fx_stats(run->fe, &stats);
    return stats.cow_breaks + run->restored;
}

static void test_counters(gconstpointer data)
{
    const char *stress = g_getenv("DEDUP_STRESS");
    uint64_t wanted = stress ? g_ascii_strtoull(stress, NULL, 10) : 3000;
    Run run = { .ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES) };
    Worker workers[WRITERS + 1] = { { NULL } };
    uint64_t last[WRITERS + 1] = { 0 };
    gint64 progress[WRITERS + 1];
    gint64 start = g_get_monotonic_time();
    uint64_t seed = 88172645463325252u;
    DedupParams params;
    DedupStats stats;

    run.fe = fx_engine_new(NULL);
    dedup_engine_get_params(run.fe->e, &params);
    params.sleep_millisecs = 0;
    dedup_engine_set_params(run.fe->e, &params);
    fill(&run);
    fx_add(run.fe, run.ram);
    fx_engine_start(run.fe);
    for (unsigned i = 0; i <= WRITERS; i++) {
        workers[i].run = &run;
        workers[i].seed = 12345 + i * 77777;
        workers[i].thread = g_thread_new("worker", i < WRITERS ? writer
                                                               : reader,
                                         &workers[i]);
        progress[i] = start;
    }
    for (unsigned round = 0; events(&run) < wanted ||
         g_get_monotonic_time() - start < G_USEC_PER_SEC; round++) {
        g_usleep(2000);
        restore_some(&run, &seed);
        if (round % 50 == 49) {
            fx_restore_begin(run.fe, round % 100 == 99, false);
            fx_wait_restored(run.fe);
            fx_set_run(run.fe, true);
        }
        watch(workers, WRITERS + 1, last, progress);
        if (!stress && g_get_monotonic_time() - start >
            FX_DEADLINE * G_USEC_PER_SEC) {
            fx_fail("too few merges", "%" G_GUINT64_FORMAT " of %"
                    G_GUINT64_FORMAT, events(&run), wanted);
        }
    }
    __atomic_store_n(&run.stop, 1, __ATOMIC_RELAXED);
    for (unsigned i = 0; i <= WRITERS; i++) {
        join(&workers[i]);
        g_assert_cmpuint(workers[i].done, >, 100);
    }
    fx_stats(run.fe, &stats);
    g_test_message("%s: %" G_GUINT64_FORMAT " merged pages written, %"
                   G_GUINT64_FORMAT " restored, %" G_GUINT64_FORMAT
                   " visits, longest window %" G_GUINT64_FORMAT " us",
                   fx_kind_name(run.ram->kind), stats.cow_breaks,
                   run.restored, workers[0].done + workers[1].done,
                   stats.window_max_ns / 1000);
    /* every page once more, by its shadow, merged and restored */
    for (uint32_t i = 0; i < WRITTEN; i++) {
        visit(&run, i);
    }
    fx_unmerge(run.fe);
    for (uint32_t i = 0; i < WRITTEN; i++) {
        visit(&run, i);
    }
    fx_engine_free(run.fe);
    run.ram->region = NULL;
    fx_ram_free(run.ram);
}

static bool one_in_five(unsigned *calls)
{
    return __atomic_fetch_add(calls, 1, __ATOMIC_RELAXED) % 5 == 2;
}

/* One in five of what a window asks of the kernel is refused. */
static int sometimes(DedupSysCall *c)
{
    static unsigned maps, drops, ends; /* atomic */

    if (fx_maps_segment(c)) {
        return one_in_five(&maps) ? ENOMEM : 0;
    }
    if (fx_is_call(c, "process_madvise") && one_in_five(&drops)) {
        *c->len -= *c->len / 2; /* only some */
    }
    if (fx_is_ioctl(c, UFFDIO_WRITEPROTECT)) {
        struct uffdio_writeprotect *wp = c->data;

        if (!(wp->mode & UFFDIO_WRITEPROTECT_MODE_WP) && one_in_five(&ends)) {
            wp->range.len = FX_PAGE;
        }
    }
    return 0;
}

static void test_refused(gconstpointer data)
{
    dedup_sys_hook = sometimes;
    test_counters(data);
    dedup_sys_hook = NULL;
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    g_test_add_data_func("/writers/refused/memfd", GINT_TO_POINTER(FX_MEMFD),
                         test_refused);
    g_test_add_data_func("/writers/refused/anon", GINT_TO_POINTER(FX_ANON),
                         test_refused);
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/writers/counters/%s",
                                                fx_kind_name(kind));

        g_test_add_data_func(path, GINT_TO_POINTER(kind), test_counters);
    }
    return g_test_run();
}
