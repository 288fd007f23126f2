/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The k-th system call fails, for each k, in each way, in each scenario, on
 * each kind of RAM: every byte is right, nobody waits for ever, nothing leaks,
 * and the engine goes on when the fault has ended.  kth.h has the terms.
 *
 * Trials run in a child, one after the other; should it die or hang, the next
 * child goes on behind the trial that it was at.
 *
 *   DEDUP_KTH=all      every trial
 *   DEDUP_KTH=paths    all, but of calls that are made by the same path (as in
 *                      a loop) only the first three
 *   DEDUP_KTH=N        so many of each scenario and kind, chosen by a seed; or
 *                      a few if nothing is said
 *   DEDUP_KTH_SEED=N   the seed, as it was printed
 *   DEDUP_KTH_ONLY=K:ERRNO:WAY:REACH   one trial, in this process
 *
 * With $DEDUP_TEST_FREEZE=mprotect windows are frozen in that way.
 */

#include <dirent.h>
#include <execinfo.h>
#include <malloc.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host/mutant.h"
#include "kth.h"

#define CALLS_MOST 8192
#define SAMPLE 16               /* trials of each scenario and kind */
#define FAULTS_MOST 10          /* that are reported of each */
/* A leak is there each time. */
#define LEAK_TRIES 3

typedef struct Test {
    const KthScenario *scenario;
    FxKind kind;
} Test;

/* What parent and child share. */
typedef struct Shared {
    unsigned ncalls;
    KthCall calls[CALLS_MOST];
    unsigned at;            /* trial that is under way */
    uint64_t failures;      /* calls that failed */
    unsigned reached;       /* trials in which one did */
    void *where[KTH_FRAMES];
} Shared;

static Shared *shared;
static GRand *choice;
static uint64_t all_trials, all_possible, all_failures;

/* ---- what there is to try ---- */

static void add_trials(GArray *trials, unsigned k, const KthCall *call)
{
    for (KthWay way = 0; way < KTH_WAYS; way++) {
        const int *errnos = kth_errnos(call);
        bool has_errno = way < KTH_SHORT;

        if (!kth_has_way(call, way)) {
            continue;
        }
        for (unsigned e = 0; has_errno ? errnos[e] != 0 : e < 1; e++) {
            for (KthReach reach = 0; reach < KTH_REACHES; reach++) {
                KthFault f = {
                    .k = k, .error = has_errno ? errnos[e] : 0, .way = way,
                    .reach = reach,
                };

                if (reach != KTH_ALL ||
                    (way == KTH_REFUSED && kth_is_condition(f.error))) {
                    g_array_append_val(trials, f);
                }
            }
        }
    }
}

/* Some of them, in their order. */
static void choose(GArray *trials, unsigned n)
{
    unsigned kept = 0;

    for (unsigned i = 0; i < trials->len; i++) {
        if (g_rand_int_range(choice, 0, trials->len - i) <
            (int)(n - MIN(kept, n))) {
            g_array_index(trials, KthFault, kept++) =
                g_array_index(trials, KthFault, i);
        }
    }
    g_array_set_size(trials, kept);
}

/* ---- what a trial leaves behind ---- */

typedef struct Left {
    uint64_t maps;
    uint64_t fds;
    uint64_t heap;
} Left;

static Left look(void)
{
    DIR *dir = opendir("/proc/self/fd");
    Left left = { .maps = fx_maps(), .heap = mallinfo2().uordblks };

    while (readdir(dir)) {
        left.fds++;
    }
    closedir(dir);
    return left;
}

static void try_and_look(const Test *t, const KthFault *fault)
{
    Left before, after;
    unsigned tries = 0;

    do {
        before = look();
        kth_try(t->scenario, t->kind, fault);
        after = look();
        if (!tries) {
            shared->failures += kth_failures();
            shared->reached += kth_failures() > 0;
        }
        if (kth_kept_mappings()) {
            after.maps = before.maps;
        }
    } while ((after.maps > before.maps || after.fds > before.fds ||
              after.heap > before.heap) && ++tries < LEAK_TRIES);
    if (tries < LEAK_TRIES) {
        return;
    }
    fx_fail("leak", "%d mappings, %d descriptors, %d bytes",
            (int)(after.maps - before.maps), (int)(after.fds - before.fds),
            (int)(after.heap - before.heap));
}

/* ---- children ---- */

typedef struct Batch {
    const Test *test;
    GArray *trials;         /* NULL: only count the calls */
    unsigned from;
} Batch;

static void run_batch(void *opaque)
{
    const KthFault none = { 0 };
    Batch *b = opaque;

    kth_note_where(shared->where);
    if (!b->trials) {
        /* once before: what is made on first use is there then */
        kth_try(b->test->scenario, b->test->kind, &none);
        kth_record(shared->calls, CALLS_MOST);
        shared->ncalls = kth_try(b->test->scenario, b->test->kind, &none);
        return;
    }
    kth_try(b->test->scenario, b->test->kind, &none);
    for (unsigned i = b->from; i < b->trials->len; i++) {
        __atomic_store_n(&shared->at, i, __ATOMIC_SEQ_CST);
        memset(shared->where, 0, sizeof(shared->where));
        try_and_look(b->test, &g_array_index(b->trials, KthFault, i));
    }
    __atomic_store_n(&shared->at, b->trials->len, __ATOMIC_SEQ_CST);
}

/* Its wait status; SIGKILL: it hung. */
static int run_child(Batch *b)
{
    gint64 moved = g_get_monotonic_time();
    unsigned at = UINT_MAX;
    pid_t pid = fx_fork(run_batch, b);
    int status;

    while (waitpid(pid, &status, WNOHANG) == 0) {
        unsigned now = __atomic_load_n(&shared->at, __ATOMIC_SEQ_CST);

        if (now != at) {
            at = now;
            moved = g_get_monotonic_time();
        }
        if (g_get_monotonic_time() - moved > fx_hang_us()) {
            kill(pid, SIGKILL);
        }
        g_usleep(1000);
    }
    return status;
}

static void report(const Test *t, const KthFault *f, int status)
{
    const KthCall *call = &shared->calls[f->k - 1];

    printf("# SYMPTOM: %s: call %u, %s(0x%lx), %s, way %d, reach %d\n",
           WTERMSIG(status) == SIGKILL ? "hangs" :
           WTERMSIG(status) == SIGABRT ? "wrong" : strsignal(WTERMSIG(status)),
           f->k, call->name,
           call->arg, f->error ? g_strerror(f->error) : "less", f->way,
           f->reach);
    printf("# again: DEDUP_KTH_ONLY=%u:%d:%d:%d tests/unit/test-dedup-kth"
           " -p /kth/%s/%s\n# addr2line -spfe tests/unit/test-dedup-kth", f->k,
           f->error, f->way, f->reach, t->scenario->name,
           fx_kind_name(t->kind));
    for (unsigned i = 0; shared->where[i]; i++) {
        printf(" %p", shared->where[i]);
    }
    printf("\n");
}

/* Returns how many went wrong. */
static unsigned run_trials(const Test *t, GArray *trials)
{
    Batch b = { .test = t, .trials = trials };
    unsigned faults = 0;

    while (b.from < trials->len && faults < FAULTS_MOST) {
        int status = run_child(&b);

        if (!status) {
            break;
        }
        b.from = shared->at + 1;
        faults++;
        report(t, &g_array_index(trials, KthFault, shared->at), status);
        if (dedup_mutant) {
            break;
        }
    }
    return faults;
}

/* ---- tests ---- */

static const char *wish(void)
{
    const char *text = g_getenv("DEDUP_KTH");

    return text ? text : "";
}

/* How many of each; UINT_MAX: all. */
static unsigned sample_size(void)
{
    return dedup_mutant || !strcmp(wish(), "all") || !strcmp(wish(), "paths") ?
           UINT_MAX : *wish() ? atoi(wish()) : SAMPLE;
}

/* Of calls that are made by the same path. */
static unsigned path_most(void)
{
    return dedup_mutant ? 1 : !strcmp(wish(), "paths") ? 3 : UINT_MAX;
}

static bool is_one_more(unsigned k)
{
    unsigned before = 0;

    for (unsigned i = 0; i < k; i++) {
        before += shared->calls[i].path == shared->calls[k].path;
    }
    return before >= path_most();
}

static bool try_only(const Test *t)
{
    const char *only = g_getenv("DEDUP_KTH_ONLY");
    KthFault f = { 0 }, none = { 0 };

    if (!only) {
        return false;
    }
    g_assert_cmpint(sscanf(only, "%u:%d:%u:%u", &f.k, &f.error, &f.way,
                           &f.reach), ==, 4);
    kth_note_where(shared->where);
    kth_try(t->scenario, t->kind, &none);
    try_and_look(t, &f);
    g_test_message("%u calls failed", kth_failures());
    return true;
}

static void test_kth(gconstpointer data)
{
    const Test *t = data;
    g_autoptr(GArray) trials = g_array_new(false, false, sizeof(KthFault));
    Batch count = { .test = t };
    unsigned possible, faults;

    if (try_only(t)) {
        return;
    }
    *shared = (Shared) { 0 };
    if (run_child(&count) != 0) {
        fx_fail("wrong", "no call has failed yet");
    }
    g_assert_cmpuint(shared->ncalls, <, CALLS_MOST);
    for (unsigned k = 0; k < shared->ncalls; k++) {
        if (!is_one_more(k)) {
            add_trials(trials, k + 1, &shared->calls[k]);
        }
    }
    possible = trials->len;
    if (possible > sample_size()) {
        choose(trials, sample_size());
    }
    faults = run_trials(t, trials);
    g_test_message("%u calls, %u trials of %u, a call failed in %u of them, "
                   "%" G_GUINT64_FORMAT " in all; %u faults", shared->ncalls,
                   trials->len, possible, shared->reached, shared->failures,
                   faults);
    all_trials += trials->len;
    all_possible += possible;
    all_failures += shared->failures;
    if (faults) {
        g_test_fail();
    }
}

static void test_sum(void)
{
    g_test_message("%" G_GUINT64_FORMAT " trials of %" G_GUINT64_FORMAT ", %"
                   G_GUINT64_FORMAT " calls failed", all_trials, all_possible,
                   all_failures);
}

/*
 * Every byte that is allocated is to be seen in mallinfo2(): no caches, one
 * arena.  The C library and GLib take that from the environment at the start.
 */
static void restart_without_caches(char **argv)
{
    if (!g_getenv("G_SLICE")) {
        g_setenv("G_SLICE", "always-malloc", true);
        g_setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:"
                 "glibc.malloc.arena_max=1:glibc.malloc.mxfast=0", true);
        execv("/proc/self/exe", argv);
    }
}

int main(int argc, char **argv)
{
    const char *seed = g_getenv("DEDUP_KTH_SEED");
    void *first[1];
    uint32_t number = seed ? atoll(seed) : g_random_int();

    restart_without_caches(argv);
    fx_init(&argc, &argv);
    if (getenv("DEDUP_MUTANT")) {
        dedup_mutant = atoi(getenv("DEDUP_MUTANT"));
    }
    g_assert_cmpint(backtrace(first, 1), ==, 1); /* it loads what it needs */
    choice = g_rand_new_with_seed(number);
    printf("# DEDUP_KTH_SEED=%u\n", number);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g_assert_true(shared != MAP_FAILED);
    for (unsigned i = 0; i < kth_nscenarios; i++) {
        for (FxKind kind = 0; kind < FX_KINDS; kind++) {
            g_autofree char *path = g_strdup_printf("/kth/%s/%s",
                                                    kth_scenarios[i].name,
                                                    fx_kind_name(kind));
            Test *t = g_new(Test, 1);

            *t = (Test) { &kth_scenarios[i], kind };
            g_test_add_data_func_full(path, t, test_kth, g_free);
        }
    }
    g_test_add_func("/kth/sum", test_sum);
    return g_test_run();
}
