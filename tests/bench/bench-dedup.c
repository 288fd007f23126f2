/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How fast the engine merges, scans and restores, beside the kernel's KSM on
 * the same memory in the same run.
 *
 * usage: bench-dedup [--quick] [--rounds=N] [--pages=N] [--run=N] [--no-ksm]
 *
 * Each round measures everything once, engine and KSM in turn, so that both
 * meet the same machine; a figure is the median over the rounds.  "alone": no
 * other thread of the process runs; "busy": one computes all the time, as a
 * vCPU does, and so every change of a page table has to be told to its
 * processor.
 *
 * Costs are CPU time of the thread that does the work (this thread or the
 * scanner's; for KSM: ksmd), per page of memory that is saved, or scanned:
 *
 *   windows     merging onto copies that are shared already, by windows alone
 *   end to end  everything from the first look at the memory on: scanning it
 *               twice, publishing one copy of each content, merging
 *   KSM         the same, by KSM
 *
 * Windows compared with all of KSM's work are what a further VM costs which has
 * what others share already.  Exit status: 0, 2 (it did not work).
 */

#include <glib.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

#include "bench-engine.h"
#include "bench-ksm.h"

#define MAX_ROUNDS 25
#define COPIES 2
/* Isolated pages take two maps each, and vm.max_map_count is 65,530. */
#define MAX_PAGES_RUN_1 36864
/* Repeat a KSM measurement that others disturbed. */
#define KSM_TRIES 3

typedef struct Samples {
    double value[MAX_ROUNDS];
    unsigned n;
} Samples;

static double median(Samples *s);

static void add(Samples *s, double value)
{
    if (s->n < MAX_ROUNDS) {
        s->value[s->n++] = value;
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

static double median(Samples *s)
{
    if (!s->n) {
        return 0;
    }
    qsort(s->value, s->n, sizeof(s->value[0]), compare);
    return s->n % 2 ? s->value[s->n / 2]
                    : (s->value[s->n / 2 - 1] + s->value[s->n / 2]) / 2;
}

/* CPU and wall time per page in us. */
typedef struct Pair {
    Samples cpu;
    Samples wall;
} Pair;

static void add_cost(Pair *p, const BenchCost *cost)
{
    add(&p->cpu, cost->cpu_ns / cost->pages / 1000);
    add(&p->wall, cost->wall_ns / cost->pages / 1000);
}

/* One kind of memory, load and run length. */
typedef struct Case {
    bool shared;
    bool busy;
    unsigned run;             /* 0: no equal pages, a scan */
    Pair window;
    Pair whole;               /* end to end, or the scan */
    Pair ksm;
    Pair restore;
    Samples first_read;
    Samples first_write;
    Samples longest;
} Case;

static Case cases[] = {
    { .run = 1 },
    { .run = 4 },
    { .run = 16 },
    { .run = 64 },
    { .run = 1, .busy = true },
    { .run = 4, .busy = true },
    { .run = 16, .busy = true },
    { .run = 64, .busy = true },
    { .run = 1, .shared = true },
    { .run = 4, .shared = true },
    { .run = 16, .shared = true },
    { .run = 64, .shared = true },
    { .run = 1, .shared = true, .busy = true },
    { .run = 4, .shared = true, .busy = true },
    { .run = 16, .shared = true, .busy = true },
    { .run = 64, .shared = true, .busy = true },
    { .run = 0 },
    { .run = 0, .shared = true },
};

static gboolean quick, without_ksm;
static int rounds, pages, only = -1;
static bool have_ksm;

/*
 * ---- the other thread ----
 *
 * It has the last processor to itself, as far as it may, and all else (KSM,
 * too) keeps off it: so it runs while the others work, however much runs on
 * the machine.
 */

static int busy_cpu = -1;
static int busy_stop;

static bool busy_prepare(void)
{
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof(set), &set) < 0 || CPU_COUNT(&set) < 2) {
        return false;
    }
    for (busy_cpu = CPU_SETSIZE - 1; !CPU_ISSET(busy_cpu, &set); busy_cpu--) {
        ;
    }
    CPU_CLR(busy_cpu, &set);
    return sched_setaffinity(0, sizeof(set), &set) == 0;
}

static gpointer busy_run(gpointer opaque)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(busy_cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
    /* on Linux a thread has a priority of its own */
    setpriority(PRIO_PROCESS, 0, -15);
    while (!__atomic_load_n(&busy_stop, __ATOMIC_RELAXED)) {
        ;
    }
    return NULL;
}

static GThread *busy_start(void)
{
    __atomic_store_n(&busy_stop, 0, __ATOMIC_RELAXED);
    return g_thread_new("busy", busy_run, NULL);
}

static void busy_end(GThread *thread)
{
    __atomic_store_n(&busy_stop, 1, __ATOMIC_RELAXED);
    g_thread_join(thread);
}

/* ---- measuring ---- */

static size_t case_pages(const Case *c)
{
    return c->run == 1 ? MIN(pages, MAX_PAGES_RUN_1) : pages;
}

static void measure_ksm(Case *c)
{
    for (unsigned try = 0; try < KSM_TRIES; try++) {
        BenchRam *ram = bench_ram_new(case_pages(c), c->run, COPIES, false);
        GThread *busy = NULL;
        BenchCost cost;
        bool ok = bench_ksm_wait();

        if (ok) {
            busy = c->busy ? busy_start() : NULL;
            ok = c->run ? bench_ksm_merge(ram, &cost)
                        : bench_ksm_scan(ram, &cost);
        }
        if (busy) {
            busy_end(busy);
        }
        bench_ram_free(ram);
        if (ok) {
            add_cost(&c->ksm, &cost);
            return;
        }
    }
}

static void measure_engine(Case *c)
{
    BenchRam *ram = bench_ram_new(case_pages(c), c->run, COPIES, c->shared);
    GThread *busy = c->busy ? busy_start() : NULL;
    BenchCost cost, restore;

    if (c->run) {
        bench_engine_merge(ram, &cost, &restore);
        add_cost(&c->restore, &restore);
    } else {
        bench_engine_scan(ram, &cost);
    }
    add_cost(&c->whole, &cost);
    if (c->run) {
        BenchAfter after;
        double longest;

        bench_engine_windows(ram, &cost, &after, &longest);
        add_cost(&c->window, &cost);
        add(&c->first_read, after.first_read_ns);
        add(&c->first_write, after.first_write_ns);
        add(&c->longest, longest);
    }
    if (busy) {
        busy_end(busy);
    }
    bench_ram_free(ram);
}

/* ---- telling ---- */

static double mib_per_s(double us)
{
    return us > 0 ? BENCH_PAGE / us / 1.048576 : 0;
}

static void print_cell(double us)
{
    if (us > 0) {
        printf(" %7.2f (%5.0f)", us, mib_per_s(us));
    } else {
        printf(" %15s", "-");
    }
}

static void print_ratio(double ksm, double us)
{
    if (ksm > 0 && us > 0) {
        printf(" %6.1f", ksm / us);
    } else {
        printf(" %6s", "-");
    }
}

static Case *ksm_of(const Case *c)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        if (!cases[i].shared && cases[i].run == c->run &&
            cases[i].busy == c->busy) {
            return &cases[i];
        }
    }
    return NULL;
}

static void report_merge(void)
{
    printf("\nMerging: us of CPU per page saved (MiB/s); KSM on anonymous "
           "memory\n\n"
           "memory load   run  windows         end to end      KSM       "
           "      KSM/win KSM/end\n");
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        Case *c = &cases[i];
        double ksm, window, whole;

        if (!c->run || !c->whole.cpu.n) {
            continue;
        }
        ksm = median(&ksm_of(c)->ksm.cpu);
        window = median(&c->window.cpu);
        whole = median(&c->whole.cpu);
        printf("%-6s %-5s %4u", c->shared ? "shared" : "anon",
               c->busy ? "busy" : "alone", c->run);
        print_cell(window);
        print_cell(whole);
        print_cell(c->shared ? 0 : ksm);
        print_ratio(ksm, window);
        printf(" ");
        print_ratio(ksm, whole);
        printf("\n");
    }
}

static void report_scan(void)
{
    printf("\nScanning unique pages, all known and unchanged: us of CPU per "
           "page (MiB/s)\n\n"
           "memory         engine          KSM              ratio\n");
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        Case *c = &cases[i];
        double ksm, whole;

        if (c->run || !c->whole.cpu.n) {
            continue;
        }
        ksm = median(&ksm_of(c)->ksm.cpu);
        whole = median(&c->whole.cpu);
        printf("%-13s", c->shared ? "shared" : "anon");
        print_cell(whole);
        print_cell(c->shared ? 0 : ksm);
        print_ratio(ksm, whole);
        printf("\n");
    }
}

/* How dear is it to change a page table under a thread that runs? */
static double flush_us(void)
{
    const unsigned n = 20000;
    uint8_t *page = mmap(NULL, BENCH_PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct timespec from, to;

    if (page == MAP_FAILED) {
        return 0;
    }
    *page = 1;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
    for (unsigned i = 0; i < n; i++) {
        mprotect(page, BENCH_PAGE, i % 2 ? PROT_READ | PROT_WRITE
                                         : PROT_READ);
    }
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
    munmap(page, BENCH_PAGE);
    return ((to.tv_sec - from.tv_sec) * 1e6 +
            (to.tv_nsec - from.tv_nsec) / 1e3) / n;
}

static void print_flush(void)
{
    double alone = flush_us(), busy;
    GThread *thread;

    if (busy_cpu < 0) {
        return;
    }
    thread = busy_start();
    g_usleep(10000); /* let it come to run: it says nothing */
    busy = flush_us();
    busy_end(thread);
    printf("\nmprotect() of a page: %.1f us alone, %.1f us busy; KSM tells "
           "the other processor four times\nfor each pair of pages, the "
           "engine three times for each window\n", alone, busy);
}

static void report_rest(void)
{
    double hit, miss;

    printf("\nWall time, restoring, and what follows\n\n"
           "memory load   run  end to end   KSM          restore      read  "
           "  write   longest window\n"
           "                     MiB/s wall   MiB/s wall   MiB/s wall   "
           "us      us      us\n");
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        Case *c = &cases[i];

        if (!c->run || !c->whole.cpu.n) {
            continue;
        }
        printf("%-6s %-5s %4u  %10.0f   %10.0f   %10.0f   %5.2f   %5.2f   "
               "%7.0f\n",
               c->shared ? "shared" : "anon", c->busy ? "busy" : "alone",
               c->run, mib_per_s(median(&c->whole.wall)),
               c->shared ? 0 : mib_per_s(median(&c->ksm.wall)),
               mib_per_s(median(&c->restore.wall)),
               median(&c->first_read) / 1000,
               median(&c->first_write) / 1000, median(&c->longest) / 1000);
    }
    print_flush();
    bench_engine_index(1 << 20, &hit, &miss);
    printf("\nIndex of %u entries, no prefetch: a hit %.0f ns, a miss %.0f "
           "ns\n", 1 << 20, hit, miss);
}

int main(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        { "quick", 0, 0, G_OPTION_ARG_NONE, &quick,
          "anonymous memory only, few rounds", NULL },
        { "rounds", 0, 0, G_OPTION_ARG_INT, &rounds, "measure N times", "N" },
        { "no-ksm", 0, 0, G_OPTION_ARG_NONE, &without_ksm,
          "the engine alone", NULL },
        { "run", 0, 0, G_OPTION_ARG_INT, &only,
          "only runs of N pages; 0: only the scan", "N" },
        { "pages", 0, 0, G_OPTION_ARG_INT, &pages, "on N pages", "N" },
        { NULL }
    };
    g_autoptr(GOptionContext) options = g_option_context_new(NULL);
    g_autoptr(GError) error = NULL;
    const char *no_ksm;
    bool two_cpus;

    g_option_context_add_main_entries(options, entries, NULL);
    if (!g_option_context_parse(options, &argc, &argv, &error)) {
        fprintf(stderr, "bench-dedup: %s\n", error->message);
        return 2;
    }
    rounds = rounds > 0 ? MIN(rounds, MAX_ROUNDS) : quick ? 2 : 5;
    pages = pages > 0 ? MAX(pages, 1024) : 65536;

    two_cpus = busy_prepare();
    if (!two_cpus) {
        printf("one processor: not measured with a busy thread\n");
    }
    no_ksm = without_ksm ? "--no-ksm" : bench_ksm_begin();
    have_ksm = !no_ksm;
    if (no_ksm) {
        printf("not compared with KSM: %s\n", no_ksm);
    }
    printf("%d rounds on %d MiB\n", rounds, pages / 256);
    fflush(stdout);

    for (int r = 0; r < rounds; r++) {
        for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
            if ((cases[i].shared && quick) || (cases[i].busy && !two_cpus) ||
                (only >= 0 && cases[i].run != only)) {
                continue;
            }
            measure_engine(&cases[i]);
            if (have_ksm && !cases[i].shared) {
                measure_ksm(&cases[i]);
            }
        }
    }
    bench_ksm_end();

    report_merge();
    report_scan();
    report_rest();
    return 0;
}
