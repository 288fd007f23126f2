/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How long it takes, and what it costs, until the memory of guests that once
 * ran is saved: the engine beside the kernel's KSM, on the same images, in the
 * same run.
 *
 * usage: bench-replay [--rounds=N] [--guests=N] [--memory=anon|memfd]
 *                     [--no-ksm] [--defaults] [--engines=N]
 *                     [--max-cpu=PERCENT] [--idle=SECONDS] [--check]
 *                     [--json=FILE] IMAGE...
 *
 * Each image is loaded into a process of its own; all are in one memory
 * cgroup.  What counts is what the cgroup is charged less, against an offline
 * count of equal pages.  Nothing runs in the guests: what is measured is the
 * merging alone, to find out what a change of it brings, in seconds.
 *
 * CPU time is that of all threads of the processes; of ksmd for KSM.
 *
 * --engines: each process has so many, each for a part of its RAM, which are
 * members of one group: what several threads in one process might bring.
 *
 * Counts per saved page do not depend on the machine.  --idle: also what it
 * costs in the seconds that follow, when there is nothing to be found any more;
 * after as many seconds in which that is found out.
 * --check compares counts with bounds, never a time.
 * Exit status: 0, 1 (a bound is exceeded), 2 (it did not work, or bytes were
 * wrong), 77 (it cannot be done here).
 */

#include <glib.h>
#include <glib/gstdio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bench-cgroup.h"
#include "bench-ksm.h"
#include "replay-guest.h"
#include "replay-images.h"

#define PAGE 4096
#define MAX_GUESTS 32
#define POLL_US 2000
#define SHARE_S 30
/* Nothing more is saved for so long: it has come to its end. */
#define QUIET_NS 2000000000ULL
#define QUIET_PAGES 64
#define MOST_NS 60000000000ULL

static const double marks[] = { 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99 };
#define MARKS G_N_ELEMENTS(marks)

/* One measurement; times in s, 0: not reached. */
typedef struct Course {
    double wall[MARKS];
    double cpu[MARKS];
    double saved;             /* of what can be, in the end */
    double idle;              /* then: CPU time of each guest, of a processor */
    double share;             /* of a processor, with --max-cpu */
    double bytes;
    uint64_t counts[BENCH_COUNTS];  /* up to 97 % */
    bool has_counts[BENCH_COUNTS];
    ReplayResult sum;         /* of all guests */
} Course;

static int rounds = 5, guests, idle, engines = 1, max_cpu;
static char *memory_name;
static gboolean without_ksm, defaults, check, by_mprotect;
static char *json;
static char **images;

static uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ULL + ts.tv_nsec;
}

static uint64_t cpu_ns(const ReplayGuest *g, unsigned n, bool ksm)
{
    uint64_t sum = 0;

    if (ksm) {
        return bench_ksm_cpu_ns();
    }
    for (unsigned i = 0; i < n; i++) {
        sum += replay_guest_cpu_ns(&g[i]);
    }
    return sum;
}

static void read_counts(Course *c, const ReplayGuest *g, unsigned n)
{
    for (unsigned k = 0; k < BENCH_COUNTS; k++) {
        c->counts[k] = 0;
        c->has_counts[k] = true;
        for (unsigned i = 0; i < n; i++) {
            c->has_counts[k] &= bench_counters_read(&g[i].counters, k,
                                                    &c->counts[k]);
        }
    }
}

/* Watch the cgroup until nothing changes any more. */
static void watch(Course *c, const ReplayGuest *g, unsigned n, bool ksm,
                  BenchCgroup *cgroup, const ReplayCount *count,
                  uint64_t before, uint64_t wall, uint64_t cpu)
{
    uint64_t now = wall, changed = wall, most = 0;
    unsigned mark = 0;

    while (now - changed < QUIET_NS && now - wall < MOST_NS) {
        uint64_t usage, saved;
        double share;

        g_usleep(POLL_US);
        usage = bench_cgroup_usage(cgroup);
        now = now_ns();
        saved = (before - MIN(usage, before)) / PAGE;
        share = (double)saved / count->saveable;
        if (saved > most + QUIET_PAGES) {
            most = saved;
            changed = now;
        }
        for (; mark < MARKS && share >= marks[mark]; mark++) {
            c->wall[mark] = (now - wall) / 1e9;
            c->cpu[mark] = (cpu_ns(g, n, ksm) - cpu) / 1e9;
            if (marks[mark] <= 0.97) {
                read_counts(c, g, n);
            }
        }
        c->saved = share;
        c->bytes = (double)saved * PAGE;
    }
}

/* What is spent, of a processor, by all together, from the start on. */
static void watch_share(Course *c, const ReplayGuest *g, unsigned n,
                        uint64_t cpu)
{
    uint64_t start = now_ns();

    g_usleep(SHARE_S * G_USEC_PER_SEC);
    c->share = (double)(cpu_ns(g, n, false) - cpu) / (now_ns() - start);
}

static void watch_idle(Course *c, const ReplayGuest *g, unsigned n, bool ksm)
{
    uint64_t cpu, wall;

    /* how long is what is measured */
    g_usleep(idle * G_USEC_PER_SEC);
    cpu = cpu_ns(g, n, ksm);
    wall = now_ns();
    g_usleep(idle * G_USEC_PER_SEC);
    c->idle = (double)(cpu_ns(g, n, ksm) - cpu) / (now_ns() - wall) / n;
}

static void measure(Course *c, bool ksm, ReplayMemory memory,
                    const ReplayCount *count)
{
    char group[] = "/tmp/bench-replay-XXXXXX";
    BenchCgroup *cgroup = bench_cgroup_new();
    ReplayGuest g[MAX_GUESTS];
    uint64_t before, wall, cpu;

    memset(c, 0, sizeof(*c));
    if (!cgroup || !mkdtemp(group)) {
        fprintf(stderr, "bench-replay: no memory cgroup, or no directory\n");
        exit(77);
    }
    for (int i = 0; i < guests; i++) {
        ReplayConfig config = {
            .image = images[i % g_strv_length(images)], .group = group,
            .memory = memory, .who = ksm ? REPLAY_KSM : REPLAY_ENGINE,
            .defaults = defaults, .engines = engines,
            .by_mprotect = by_mprotect,
            .max_cpu = max_cpu, .cgroup = cgroup,
        };

        replay_guest_start(&g[i], &config);
    }
    before = bench_cgroup_usage(cgroup);
    cpu = cpu_ns(g, guests, ksm);
    wall = now_ns();
    for (int i = 0; i < guests; i++) {
        replay_guest_go(&g[i]);
    }
    if (ksm) {
        bench_ksm_run(true);
    }
    if (max_cpu) {
        watch_share(c, g, guests, cpu);
    } else {
        watch(c, g, guests, ksm, cgroup, count, before, wall, cpu);
    }
    if (idle) {
        watch_idle(c, g, guests, ksm);
    }
    if (ksm) {
        bench_ksm_run(false);
    }
    for (int i = 0; i < guests; i++) {
        ReplayResult r;

        replay_guest_end(&g[i], &r);
        c->sum.present += r.present;
        c->sum.scanned += r.scanned;
        c->sum.scans += r.scans;
        c->sum.merged += r.merged;
        c->sum.zero += r.zero;
        c->sum.maps += r.maps;
        c->sum.metadata += r.metadata;
        c->sum.window_max_ns = MAX(c->sum.window_max_ns, r.window_max_ns);
        c->sum.bad += r.bad;
    }
    if (ksm) {
        bench_ksm_forget();
    }
    bench_cgroup_free(cgroup);
    g_autofree char *rm = g_strdup_printf("rm -rf %s", group);
    if (system(rm) != 0 || c->sum.bad) {
        fprintf(stderr, "bench-replay: %" G_GUINT64_FORMAT " pages are wrong\n",
                c->sum.bad);
        exit(2);
    }
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

static double median(const Course *c, size_t offset)
{
    double values[64];
    int n = MIN(rounds, 64);

    for (int i = 0; i < n; i++) {
        values[i] = *(const double *)((const char *)&c[i] + offset);
    }
    qsort(values, n, sizeof(values[0]), compare_doubles);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

#define MEDIAN(c, field) median(c, offsetof(Course, field))

static void print_row(const char *name, const Course *c)
{
    printf("%-12s", name);
    for (unsigned m = 0; m < MARKS; m++) {
        double wall = median(c, offsetof(Course, wall) + m * sizeof(double));
        double cpu = median(c, offsetof(Course, cpu) + m * sizeof(double));

        if (wall > 0) {
            printf(" %5.2f /%5.2f", wall, cpu);
        } else {
            printf("      -      ");
        }
    }
    printf("  %5.1f %%\n", 100 * MEDIAN(c, saved));
    if (max_cpu) {
        printf("  in the first %d s: %.1f %% of a processor\n", SHARE_S,
               100 * MEDIAN(c, share));
    }
    if (idle) {
        printf("  then, idle: %.2f %% of a processor for each guest\n",
               100 * MEDIAN(c, idle));
    }
}

static void print_counts(const Course *c, const ReplayCount *count)
{
    double saved = count->saveable * 0.97;
    const Course *last = &c[rounds - 1];

    printf("  per saved page, up to 97 %%:");
    for (unsigned k = 0; k < BENCH_COUNTS; k++) {
        if (last->has_counts[k]) {
            printf("  %s %.2f", bench_count_names[k],
                   last->counts[k] / saved);
        }
    }
    printf("\n  in the end: hashes per saved page %.2f, passes %"
           G_GUINT64_FORMAT ", merged %" G_GUINT64_FORMAT ", zero %"
           G_GUINT64_FORMAT ", maps %" G_GUINT64_FORMAT
           ", metadata %.1f MiB, longest window %.2f ms\n",
           last->sum.scanned / (last->bytes / PAGE), last->sum.scans,
           last->sum.merged, last->sum.zero, last->sum.maps,
           last->sum.metadata / 1048576.0, last->sum.window_max_ns / 1e6);
}

/* ---- counts that do not depend on the machine ---- */

/*
 * Bounds, per saved page: what was seen on the mix of tests/bench/make-images
 * on a machine that did much else (then more is done in small parts: 0.84
 * system calls, 0.10 faults, 4.5 hashes), and some more.
 */
static const double bounds[BENCH_COUNTS] = {
    [BENCH_SYSCALLS] = 1.0,
    [BENCH_FAULTS] = 0.15,
};
#define HASHES_MOST 5.5
#define SAVED_LEAST 0.95

static bool is_within(const char *what, double value, double bound)
{
    if (value > bound) {
        printf("%s: %.2f per saved page, more than %.2f\n", what, value,
               bound);
    }
    return value <= bound;
}

static bool check_counts(const Course *c, const ReplayCount *count)
{
    double saved = c->bytes / PAGE;
    bool ok = is_within("hashes", c->sum.scanned / saved, HASHES_MOST);

    for (unsigned k = 0; k < BENCH_COUNTS; k++) {
        if (c->has_counts[k] && bounds[k] > 0) {
            ok &= is_within(bench_count_names[k], c->counts[k] / saved,
                            bounds[k]);
        }
    }
    if (c->saved < SAVED_LEAST) {
        printf("saved: %.1f %%, less than %.1f %%\n", 100 * c->saved,
               100 * SAVED_LEAST);
        ok = false;
    }
    return ok;
}

/* ---- for programs ---- */

static void write_courses(FILE *f, const char *name, const Course *c)
{
    fprintf(f, "\"%s\": [", name);
    for (int i = 0; i < rounds; i++) {
        fprintf(f, "%s\n {\"share\": %.4f, \"wall\": {", i ? "," : "",
                c[i].saved);
        for (unsigned m = 0; m < MARKS && c[i].wall[m] > 0; m++) {
            fprintf(f, "%s\"%.2f\": %.4f", m ? ", " : "", marks[m],
                    c[i].wall[m]);
        }
        fprintf(f, "}, \"cpu\": {");
        for (unsigned m = 0; m < MARKS && c[i].wall[m] > 0; m++) {
            fprintf(f, "%s\"%.2f\": %.4f", m ? ", " : "", marks[m],
                    c[i].cpu[m]);
        }
        fprintf(f, "}}");
    }
    fprintf(f, "]");
}

static void write_json(const Course *ours, const Course *ksm,
                       const char *name)
{
    FILE *f = fopen(json, "we");

    if (!f) {
        perror(json);
        exit(2);
    }
    fprintf(f, "{");
    write_courses(f, name, ours);
    if (!without_ksm) {
        fprintf(f, ",\n");
        write_courses(f, "KSM", ksm);
    }
    fprintf(f, "}\n");
    fclose(f);
}

static GOptionEntry entries[] = {
    { "rounds", 0, 0, G_OPTION_ARG_INT, &rounds, "measurements of each", "N" },
    { "guests", 0, 0, G_OPTION_ARG_INT, &guests, "processes", "N" },
    { "memory", 0, 0, G_OPTION_ARG_STRING, &memory_name, "anon or memfd",
      "KIND" },
    { "mprotect", 0, 0, G_OPTION_ARG_NONE, &by_mprotect,
      "the engine without userfaultfd", NULL },
    { "no-ksm", 0, 0, G_OPTION_ARG_NONE, &without_ksm, "the engine alone",
      NULL },
    { "defaults", 0, 0, G_OPTION_ARG_NONE, &defaults,
      "the engine at its default speed", NULL },
    { "engines", 0, 0, G_OPTION_ARG_INT, &engines, "in each process", "N" },
    { "max-cpu", 0, 0, G_OPTION_ARG_INT, &max_cpu, "of the group, and measure"
      " what is spent in 30 s", "PERCENT" },
    { "idle", 0, 0, G_OPTION_ARG_INT, &idle, "measure so long what it costs"
      " when nothing is to be found", "SECONDS" },
    { "check", 0, 0, G_OPTION_ARG_NONE, &check, "compare counts with bounds",
      NULL },
    { "json", 0, 0, G_OPTION_ARG_FILENAME, &json, "the figures, for programs",
      "FILE" },
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
        fprintf(stderr, "bench-replay: %s\n", error->message);
        exit(2);
    }
    if (!images) {
        fprintf(stderr, "bench-replay: no images\n");
        exit(77);
    }
    guests = guests ? guests : (int)g_strv_length(images);
    if (guests < 1 || guests > MAX_GUESTS || rounds < 1 || rounds > 64 ||
        engines < 1 || engines > REPLAY_MAX_ENGINES) {
        fprintf(stderr, "bench-replay: at most %d guests, %d engines, and 64"
                " rounds\n", MAX_GUESTS, REPLAY_MAX_ENGINES);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    g_autofree Course *ours = NULL, *ksm = NULL;
    const char *chosen[MAX_GUESTS];
    const char *why_not = NULL;
    ReplayMemory memory;
    ReplayCount count;

    parse(argc, argv);
    memory = g_strcmp0(memory_name, "memfd") == 0 ? REPLAY_MEMFD : REPLAY_ANON;
    for (int i = 0; i < guests; i++) {
        chosen[i] = images[i % g_strv_length(images)];
    }
    replay_images_count(chosen, guests, &count);
    printf("%d guests: %" G_GUINT64_FORMAT " pages present, %" G_GUINT64_FORMAT
           " can be saved (%" G_GUINT64_FORMAT " zero, %" G_GUINT64_FORMAT
           " contents, %" G_GUINT64_FORMAT " runs)\n", guests, count.present,
           count.saveable, count.zero, count.distinct, count.runs);
    if (!without_ksm) {
        why_not = bench_ksm_begin();
        if (why_not) {
            printf("no KSM: %s\n", why_not);
            without_ksm = true;
        }
    }
    ours = g_new0(Course, rounds);
    ksm = g_new0(Course, rounds);
    for (int i = 0; i < rounds; i++) {
        measure(&ours[i], false, memory, &count);
        if (!without_ksm) {
            measure(&ksm[i], true, REPLAY_ANON, &count);
        }
    }
    bench_ksm_end();
    printf("%-12s", "wall/CPU s");
    for (unsigned m = 0; m < MARKS; m++) {
        printf("    %3.0f %%    ", 100 * marks[m]);
    }
    printf("   end\n");
    print_row(memory == REPLAY_MEMFD ? "engine memfd" : "engine anon", ours);
    if (!without_ksm) {
        print_row("KSM anon", ksm);
    }
    print_counts(ours, &count);
    if (json) {
        write_json(ours, ksm, memory == REPLAY_MEMFD ? "memfd" : "plain");
    }
    return check && !check_counts(&ours[rounds - 1], &count);
}
