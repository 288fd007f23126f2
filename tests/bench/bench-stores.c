/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How long a guest's stores take while its memory is merged: beside the
 * kernel's KSM, and beside the same with nobody that merges.
 *
 * usage: bench-stores [--rounds=N] [--seconds=N] [--memory=anon|memfd]
 *                     [--beside=N] [--quota=PERCENT] [--loop | --all]
 *                     [--after=SECONDS] [--defaults] [--no-ksm] IMAGE...
 *
 * Each image is loaded into a process of its own (replay-guest.h).  A thread of
 * it stores to one page in twenty, in bursts, and each store is timed; the
 * worst process counts.  What it stores is what is there already.
 * --loop: without pauses: how much of its time does a guest lose that is bound
 * by its memory?
 * --all: to every page, and a pause of 5 ms after each round.
 * --after: stores count only from then on.
 * --beside: so many threads that only take time run on each processor beside
 * them.
 * --quota: each process is in a cgroup that may use so many percent of one
 * processor.
 *
 * It reports, and fails only if it does not work: exit status 0, 2 (also: bytes
 * were wrong), 77 (it cannot be done here).
 */

#include <glib.h>
#include <glib/gstdio.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench-cgroup.h"
#include "bench-ksm.h"
#include "replay-guest.h"

#define MAX_GUESTS 16
#define MAX_ROUNDS 64
#define MAX_BUSY 256

/* The worst of a measurement. */
typedef struct Waits {
    uint64_t p99_ns;
    uint64_t p999_ns;
    uint64_t most_ns;
    uint64_t stores;
    uint64_t done;            /* pages that the engine merged or dropped */
    uint64_t breaks;          /* and that were written then */
    uint64_t window_max_ns;
} Waits;

static const char *const names[] = {
    [REPLAY_NOBODY] = "nobody", [REPLAY_ENGINE] = "engine",
    [REPLAY_KSM] = "KSM",
};

static int rounds = 5, seconds = 3, after, beside, quota;
static char *memory_name;
static gboolean defaults, without_ksm, loop, all;
static char **images;

/* ---- what else runs ---- */

static unsigned start_busy(pid_t *busy)
{
    unsigned n = MIN(beside * g_get_num_processors(), MAX_BUSY);

    for (unsigned i = 0; i < n; i++) {
        busy[i] = fork();
        if (busy[i] < 0) {
            perror("fork");
            return i;
        }
        if (!busy[i]) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            /* volatile: the compiler must not see that nothing is done */
            for (volatile uint64_t sum = 0;; sum++) {
                ;
            }
        }
    }
    return n;
}

static void end_busy(const pid_t *busy, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        kill(busy[i], SIGKILL);
        waitpid(busy[i], NULL, 0);
    }
}

/* ---- a measurement ---- */

static void add(Waits *w, const ReplayResult *r)
{
    if (r->bad) {
        fprintf(stderr, "bench-stores: %" G_GUINT64_FORMAT " pages are wrong\n",
                r->bad);
        exit(2);
    }
    w->p99_ns = MAX(w->p99_ns, r->p99_ns);
    w->p999_ns = MAX(w->p999_ns, r->p999_ns);
    w->most_ns = MAX(w->most_ns, r->most_ns);
    w->window_max_ns = MAX(w->window_max_ns, r->window_max_ns);
    w->stores += r->stores;
    w->done += r->merged + r->zero;
    w->breaks += r->breaks;
}

static void measure(Waits *w, ReplayWho who)
{
    unsigned n = g_strv_length(images), nbusy;
    g_autofree char *group = g_dir_make_tmp("bench-stores-XXXXXX", NULL);
    g_autofree char *rm = g_strdup_printf("rm -rf %s", group);
    BenchCgroup *cgroups[MAX_GUESTS] = { NULL };
    ReplayGuest g[MAX_GUESTS];
    pid_t busy[MAX_BUSY];

    *w = (Waits) { 0 };
    for (unsigned i = 0; i < n; i++) {
        ReplayConfig config = {
            .image = images[i], .group = group, .who = who,
            .memory = g_strcmp0(memory_name, "memfd") == 0 ? REPLAY_MEMFD
                                                           : REPLAY_ANON,
            .defaults = defaults, .after_s = after,
            .writes = all ? REPLAY_ROUNDS : loop ? REPLAY_LOOP
                                                 : REPLAY_BURSTS,
        };

        if (quota) {
            config.cgroup = cgroups[i] = bench_cgroup_new_cpu(quota);
            if (!cgroups[i]) {
                fprintf(stderr, "bench-stores: no cgroup with a quota\n");
                exit(77);
            }
        }
        replay_guest_start(&g[i], &config);
    }
    nbusy = start_busy(busy);
    for (unsigned i = 0; i < n; i++) {
        replay_guest_go(&g[i]);
    }
    if (who == REPLAY_KSM) {
        bench_ksm_run(true);
    }
    g_usleep((after + seconds) * G_USEC_PER_SEC);
    end_busy(busy, nbusy);
    if (who == REPLAY_KSM) {
        bench_ksm_run(false);
    }
    for (unsigned i = 0; i < n; i++) {
        ReplayResult r;

        replay_guest_end(&g[i], &r);
        add(w, &r);
        if (cgroups[i]) {
            bench_cgroup_free(cgroups[i]);
        }
    }
    if (who == REPLAY_KSM) {
        bench_ksm_forget();
    }
    if (system(rm) != 0) {
        perror(group);
    }
}

/* ---- the report ---- */

static int compare_numbers(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

static double median(const Waits *w, size_t offset)
{
    uint64_t values[MAX_ROUNDS];

    for (int i = 0; i < rounds; i++) {
        values[i] = *(const uint64_t *)((const char *)&w[i] + offset);
    }
    qsort(values, rounds, sizeof(values[0]), compare_numbers);
    return values[rounds / 2];
}

#define MEDIAN_MS(w, field) (median(w, offsetof(Waits, field)) / 1e6)

static void print_row(ReplayWho who, const Waits *w)
{
    uint64_t most = 0;

    for (int i = 0; i < rounds; i++) {
        most = MAX(most, w[i].most_ns);
    }
    printf("%-8s %8.3f %8.3f %8.2f %8.2f %9.0f", names[who],
           MEDIAN_MS(w, p99_ns), MEDIAN_MS(w, p999_ns), MEDIAN_MS(w, most_ns),
           most / 1e6, median(w, offsetof(Waits, stores)));
    if (who == REPLAY_ENGINE) {
        printf(" %8.0f %8.0f %8.2f", median(w, offsetof(Waits, done)),
               median(w, offsetof(Waits, breaks)),
               MEDIAN_MS(w, window_max_ns));
    }
    printf("\n");
}

static GOptionEntry entries[] = {
    { "rounds", 0, 0, G_OPTION_ARG_INT, &rounds, "measurements of each", "N" },
    { "seconds", 0, 0, G_OPTION_ARG_INT, &seconds, "how long each takes", "N" },
    { "after", 0, 0, G_OPTION_ARG_INT, &after, "and after how long it begins",
      "SECONDS" },
    { "loop", 0, 0, G_OPTION_ARG_NONE, &loop, "store without pauses", NULL },
    { "all", 0, 0, G_OPTION_ARG_NONE, &all, "store to every page", NULL },
    { "memory", 0, 0, G_OPTION_ARG_STRING, &memory_name, "anon or memfd",
      "KIND" },
    { "beside", 0, 0, G_OPTION_ARG_INT, &beside, "busy threads for each"
      " processor", "N" },
    { "quota", 0, 0, G_OPTION_ARG_INT, &quota, "of a processor, for each"
      " process", "PERCENT" },
    { "defaults", 0, 0, G_OPTION_ARG_NONE, &defaults,
      "the engine at its default speed", NULL },
    { "no-ksm", 0, 0, G_OPTION_ARG_NONE, &without_ksm, "leave KSM out", NULL },
    { G_OPTION_REMAINING, 0, 0, G_OPTION_ARG_FILENAME_ARRAY, &images,
      "RAM of guests", "IMAGE..." },
    { NULL }
};

static void parse(int argc, char **argv)
{
    g_autoptr(GOptionContext) context = g_option_context_new(NULL);
    g_autoptr(GError) error = NULL;

    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &error)) {
        fprintf(stderr, "bench-stores: %s\n", error->message);
        exit(2);
    }
    if (!images) {
        fprintf(stderr, "bench-stores: no images\n");
        exit(77);
    }
    if (g_strv_length(images) > MAX_GUESTS || rounds < 1 ||
        rounds > MAX_ROUNDS || seconds < 1 || after < 0 || beside < 0 ||
        quota < 0) {
        fprintf(stderr, "bench-stores: at most %d images and %d rounds, no"
                " number below 0\n", MAX_GUESTS, MAX_ROUNDS);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    Waits waits[G_N_ELEMENTS(names)][MAX_ROUNDS];
    const char *why_not;

    parse(argc, argv);
    why_not = without_ksm ? NULL : bench_ksm_begin();
    if (why_not) {
        printf("no KSM: %s\n", why_not);
        without_ksm = true;
    }
    for (int i = 0; i < rounds; i++) {
        measure(&waits[REPLAY_NOBODY][i], REPLAY_NOBODY);
        measure(&waits[REPLAY_ENGINE][i], REPLAY_ENGINE);
        if (!without_ksm) {
            measure(&waits[REPLAY_KSM][i], REPLAY_KSM);
        }
    }
    bench_ksm_end();
    printf("ms a store      99 %%   99.9 %%  longest  of all    stores   merged"
           "   broken  longest window\n");
    print_row(REPLAY_NOBODY, waits[REPLAY_NOBODY]);
    print_row(REPLAY_ENGINE, waits[REPLAY_ENGINE]);
    if (!without_ksm) {
        print_row(REPLAY_KSM, waits[REPLAY_KSM]);
    }
    return 0;
}
