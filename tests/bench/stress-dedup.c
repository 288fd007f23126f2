/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Merging, dropping zero pages and restoring, all at once and for long, under
 * writers of every kind: does a store ever get lost, does a page ever get
 * bytes that are not its own, does anybody ever hang?
 *
 * usage: stress-dedup [--operations=N] [--pages=N] [--seed=N]
 *
 * Shared and anonymous RAM, one engine for both.  Threads:
 *   scanner   the engine's: merges and drops, without pause
 *   restorer  gives random ranges their own memory back
 *   writers   see stress-writers.c and stress-kvm.c; each has a slot of every
 *             page, and checks it before and after each write
 *   main      watches that all of them make progress
 *
 * An operation is one page merged, dropped or restored, counted where the
 * engine enters it into its ledger (the linker puts our dedup_ledger_set()
 * before the engine's).  In the end every byte is checked, once as it is and
 * once more when everything was unmerged.
 *
 * Speaks TAP.  With a mutant ($DEDUP_MUTANT, see mutant.h) it must fail.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "engine-internal.h"
#include "host/mutant.h"
#include "../unit/patience.h"
#include "space/ledger.h"
#include "stress.h"

/* A thread that does nothing for so long hangs. */
#define DEADLINE_S (30 * test_patience())
#define TICK_US (100 * 1000)
/* The restorer rests while less than this part of all pages is merged. */
#define MERGED_PART 4
#define RESTORE_PAGES 64
#define SCANNER_NICE (-10)

static StressWriter *const writers[] = {
    &stress_user, &stress_read, &stress_direct, &stress_kvm,
};

enum { MERGES, DROPS, RESTORES, OPERATIONS };
static const char *const operation_names[] = {
    "merges", "zero drops", "restores",
};
static uint64_t done[STRESS_RAMS][OPERATIONS];
static Stress stress;
static uint64_t restorer_rounds;

static gint64 wanted = 100000, seed = 1;
static gboolean by_mprotect;
static int pages = 4096;

/* ---- counting ---- */

void __wrap_dedup_ledger_set(DedupRegion *r, uint32_t page, uint32_t entry)
{
    uint32_t before = dedup_entry_at(r, page);
    unsigned ram = r->info.memory == DEDUP_MEMORY_SHARED ? 0 : 1;
    int what = -1;

    if (entry == DEDUP_ZERO) {
        what = DROPS;
    } else if (entry == DEDUP_OWN) {
        what = dedup_entry_is_segment(before) ? RESTORES : -1;
    } else if (!(entry & DEDUP_BROKEN)) {
        what = MERGES;
    }
    if (what >= 0) {
        __atomic_fetch_add(&done[ram][what], 1, __ATOMIC_RELAXED);
    }
    __real_dedup_ledger_set(r, page, entry);
}

static uint64_t operations(void)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < STRESS_RAMS * OPERATIONS; i++) {
        sum += __atomic_load_n(&done[0][0] + i, __ATOMIC_RELAXED);
    }
    return sum;
}

/* ---- failing ---- */

void stress_fail(Stress *s, const char *format, ...)
{
    va_list args;

    g_mutex_lock(&s->lock);
    if (!s->failure) {
        va_start(args, format);
        s->failure = g_strdup_vprintf(format, args);
        va_end(args);
        printf("# FAILED: %s\n", s->failure);
        fflush(stdout);
    }
    __atomic_store_n(&s->stop, true, __ATOMIC_RELAXED);
    g_cond_broadcast(&s->changed);
    g_mutex_unlock(&s->lock);
}

/* Somebody hangs: no thread can be joined any more. */
static void hang(const char *who)
{
    printf("not ok 1 - no hang: %s made no progress for %d s\n", who,
           DEADLINE_S);
    fflush(stdout);
    _exit(1);
}

/* ---- RAM and engine ---- */

static void ram_new(StressRam *ram, const char *name, DedupMemory memory)
{
    size_t size = (size_t)stress.pages * STRESS_PAGE;

    ram->name = name;
    ram->memory = memory;
    ram->fd = -1;
    if (memory == DEDUP_MEMORY_SHARED) {
        ram->fd = memfd_create("stress-ram", MFD_CLOEXEC);
        if (ram->fd < 0 || ftruncate(ram->fd, size) < 0) {
            g_error("no memory for RAM");
        }
    }
    ram->host = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     ram->fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED,
                     ram->fd, 0);
    if (ram->host == MAP_FAILED) {
        g_error("no memory for RAM");
    }
    madvise(ram->host, size, MADV_DONTFORK);
    ram->pins = g_new0(uint16_t, (size >> DEDUP_PIN_SHIFT) + 1);
}

static void ram_add(StressRam *ram, DedupEngine *e)
{
    DedupRegionInfo info = {
        .id = ram->name,
        .host = ram->host,
        .size = (uint64_t)stress.pages * STRESS_PAGE,
        .memory = ram->memory,
        .fd = ram->fd,
        .pins = ram->pins,
        .flags = DEDUP_REGION_DONTFORK,
    };
    g_autoptr(GError) error = NULL;

    ram->region = dedup_region_add(e, &info, &error);
    if (!ram->region) {
        g_error("%s", error->message);
    }
}

static void ram_free(StressRam *ram)
{
    munmap(ram->host, (size_t)stress.pages * STRESS_PAGE);
    if (ram->fd >= 0) {
        close(ram->fd);
    }
    g_free(ram->pins);
}

static gpointer scanner_run(gpointer opaque)
{
    /* the writers would take most of the time; without the right they do */
    setpriority(PRIO_PROCESS, gettid(), SCANNER_NICE);
    dedup_engine_run(opaque);
    return NULL;
}

static bool is_restored;

static void restored(void *opaque, uint64_t left, const GError *error)
{
    if (error) {
        stress_fail(&stress, "unmerge: %s", error->message);
    }
    g_mutex_lock(&stress.lock);
    is_restored = true;
    g_cond_broadcast(&stress.changed);
    g_mutex_unlock(&stress.lock);
}

/* ---- the other threads ---- */

/* Threads that have not ended yet; under stress.lock. */
static unsigned running;

static void started(void)
{
    g_mutex_lock(&stress.lock);
    running++;
    g_mutex_unlock(&stress.lock);
}

static void ended(void)
{
    g_mutex_lock(&stress.lock);
    running--;
    g_cond_broadcast(&stress.changed);
    g_mutex_unlock(&stress.lock);
}

static gpointer restorer_run(gpointer opaque)
{
    DedupEngine *e = opaque;
    uint32_t all = stress.pages * STRESS_RAMS;
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);

    while (stress_go_on(&stress)) {
        StressRam *ram = &stress.rams[g_rand_int(rand) % STRESS_RAMS];
        uint32_t first = g_rand_int(rand) % stress.pages;
        uint32_t n = 1 + g_rand_int(rand) % RESTORE_PAGES;
        DedupStats stats;

        __atomic_fetch_add(&restorer_rounds, 1, __ATOMIC_RELAXED);
        dedup_engine_get_stats(e, &stats, false);
        if (stats.pages_merged < all / MERGED_PART) {
            g_usleep(1000); /* let the scanner get ahead */
            continue;
        }
        n = MIN(n, stress.pages - first);
        /* pages may be pinned: those stay */
        dedup_engine_restore_range(e, ram->host + (size_t)first * STRESS_PAGE,
                                   (uint64_t)n * STRESS_PAGE, NULL);
    }
    ended();
    return NULL;
}

static gpointer writer_run(gpointer opaque)
{
    StressWriter *w = opaque;

    w->run(w);
    ended();
    return NULL;
}

static void writers_open(void)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        StressWriter *w = writers[i];

        w->s = &stress;
        w->random = seed + i;
        w->skip = w->open ? w->open(w) : NULL;
        if (!w->shadow) {
            w->shadow = w->own_shadow =
                g_malloc0(stress.pages * STRESS_RAMS);
        }
    }
}

static void writers_close(void)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        if (!writers[i]->skip && writers[i]->close) {
            writers[i]->close(writers[i]);
        }
        g_free(writers[i]->own_shadow);
    }
}

/* ---- watching ---- */

typedef struct Watch {
    uint64_t last;
    int64_t since;
} Watch;

static void watch(Watch *w, uint64_t now_at, const char *who)
{
    int64_t now = g_get_monotonic_time();

    if (!w->since || now_at != w->last) {
        w->last = now_at;
        w->since = now;
    } else if (now - w->since > DEADLINE_S * G_USEC_PER_SEC) {
        hang(who);
    }
}

/* Until enough was done, something failed, or somebody hangs. */
static void watch_all(DedupEngine *e)
{
    Watch scanner = { 0 }, restorer = { 0 }, all = { 0 };
    Watch of[G_N_ELEMENTS(writers)] = { 0 };
    uint64_t told = 0, n;

    while (stress_go_on(&stress) && (n = operations()) < (uint64_t)wanted) {
        DedupStats stats;

        dedup_engine_get_stats(e, &stats, false);
        watch(&all, n, "merging and restoring");
        watch(&scanner, stats.pages_scanned + stats.full_scans,
              "the scanner");
        watch(&restorer, __atomic_load_n(&restorer_rounds, __ATOMIC_RELAXED),
              "the restorer");
        for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
            if (!writers[i]->skip) {
                watch(&of[i], __atomic_load_n(&writers[i]->writes,
                                              __ATOMIC_RELAXED),
                      writers[i]->name);
            }
        }
        if (n / 1000000 > told) {
            told = n / 1000000;
            printf("# %" G_GUINT64_FORMAT " million operations\n", told);
            fflush(stdout);
        }
        g_usleep(TICK_US);
    }
    __atomic_store_n(&stress.stop, true, __ATOMIC_RELAXED);
}

/* Until @test is true; a thread that waits in a frozen page never ends. */
static void wait_until(bool (*test)(void), const char *who)
{
    int64_t end = g_get_monotonic_time() + DEADLINE_S * G_USEC_PER_SEC;

    g_mutex_lock(&stress.lock);
    while (!test()) {
        if (!g_cond_wait_until(&stress.changed, &stress.lock, end)) {
            hang(who);
        }
    }
    g_mutex_unlock(&stress.lock);
}

static bool all_ended(void)
{
    return !running;
}

static bool was_restored(void)
{
    return is_restored;
}

/* ---- the run ---- */

static void check_all(const char *when)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        for (uint32_t page = 0; page < stress.pages * STRESS_RAMS; page++) {
            if (!stress_check(writers[i], page, when)) {
                return;
            }
        }
    }
}

static void unmerge(DedupEngine *e)
{
    g_autoptr(GError) error = NULL;

    if (!dedup_engine_restore(e, true, true, &error)) {
        stress_fail(&stress, "unmerge: %s", error->message);
        return;
    }
    wait_until(was_restored, "unmerging");
    if (!dedup_engine_is_whole(e)) {
        stress_fail(&stress, "something is still merged after unmerging");
    }
}

static DedupEngine *engine_new(void)
{
    DedupConfig config = {
        .page_size = STRESS_PAGE,
        .params = {
            .run = true, .pages_to_scan = 4096, .zero_pages = true,
            .huge_pages_split = true, .max_maps = 60,
        },
        .freeze = stress.freeze,
        .callbacks.restored = restored,
    };
    g_autoptr(GError) error = NULL;
    DedupEngine *e = dedup_engine_new(&config, &error);

    if (!e) {
        printf("1..0 # SKIP %s\n", error->message);
        exit(0);
    }
    if (DEDUP_MUTANT(TRUST_HASH)) {
        dedup_hash_mask = 3; /* collisions */
    }
    return e;
}

static void run(void)
{
    DedupEngine *e = engine_new();
    GThread *scanner, *restorer;
    DedupParams params;

    ram_new(&stress.rams[0], "shared RAM", DEDUP_MEMORY_SHARED);
    ram_new(&stress.rams[1], "anonymous RAM", DEDUP_MEMORY_ANON);
    writers_open();
    for (unsigned i = 0; i < STRESS_RAMS; i++) {
        ram_add(&stress.rams[i], e);
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        if (!writers[i]->skip) {
            started();
            writers[i]->thread = g_thread_new(writers[i]->name, writer_run,
                                              writers[i]);
        }
    }
    started();
    scanner = g_thread_new("scanner", scanner_run, e);
    restorer = g_thread_new("restorer", restorer_run, e);

    watch_all(e);
    wait_until(all_ended, "a writer or the restorer");
    g_thread_join(restorer);
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        if (writers[i]->thread) {
            g_thread_join(writers[i]->thread);
        }
    }
    if (!stress.failure) {
        /* a last pass may still merge: all of it while nobody writes */
        check_all("in the end");
        dedup_engine_get_params(e, &params);
        params.run = false;
        dedup_engine_set_params(e, &params);
        unmerge(e);
        check_all("when all was unmerged");
    }
    dedup_engine_stop(e);
    g_thread_join(scanner);
    dedup_engine_free(e);
    writers_close();
    for (unsigned i = 0; i < STRESS_RAMS; i++) {
        ram_free(&stress.rams[i]);
    }
}

static void report(double seconds)
{
    unsigned n = 0;

    printf("1..%zu\n", 1 + G_N_ELEMENTS(writers));
    for (unsigned i = 0; i < STRESS_RAMS; i++) {
        printf("# %s:", stress.rams[i].name);
        for (unsigned k = 0; k < OPERATIONS; k++) {
            printf(" %" G_GUINT64_FORMAT " %s", done[i][k],
                   operation_names[k]);
        }
        printf("\n");
    }
    printf("# %" G_GUINT64_FORMAT " operations in %.1f s\n", operations(),
           seconds);
    printf("%sok %u - every byte of RAM is right, nobody hangs\n",
           stress.failure ? "not " : "", ++n);
    for (unsigned i = 0; i < G_N_ELEMENTS(writers); i++) {
        const StressWriter *w = writers[i];

        if (w->skip) {
            printf("ok %u - %s # SKIP %s\n", ++n, w->name, w->skip);
        } else {
            printf("%sok %u - %s: %" G_GUINT64_FORMAT " writes\n",
                   w->writes ? "" : "not ", ++n, w->name, w->writes);
        }
    }
}

int main(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        { "operations", 0, 0, G_OPTION_ARG_INT64, &wanted,
          "stop after N merges, zero drops and restores", "N" },
        { "pages", 0, 0, G_OPTION_ARG_INT, &pages,
          "pages of each RAM", "N" },
        { "mprotect", 0, 0, G_OPTION_ARG_NONE, &by_mprotect,
          "freeze by mprotect()", NULL },
        { "seed", 0, 0, G_OPTION_ARG_INT64, &seed, "of what is random", "N" },
        { NULL }
    };
    g_autoptr(GOptionContext) options = g_option_context_new(NULL);
    g_autoptr(GError) error = NULL;
    int64_t start = g_get_monotonic_time();

    g_option_context_add_main_entries(options, entries, NULL);
    if (!g_option_context_parse(options, &argc, &argv, &error)) {
        fprintf(stderr, "stress-dedup: %s\n", error->message);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    g_mutex_init(&stress.lock);
    g_cond_init(&stress.changed);
    stress.pages = MAX(pages, 64);
    stress.freeze = by_mprotect ? DEDUP_FREEZE_MPROTECT
                                : DEDUP_FREEZE_USERFAULTFD;
    dedup_never_rests = true; /* as much as may be merged again */
    run();
    report((g_get_monotonic_time() - start) / 1e6);
    return stress.failure ? 1 : 0;
}
