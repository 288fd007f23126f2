/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Each mutant (mutant.h) is caught, by its symptom.
 *
 * A mutant is switched on by $DEDUP_MUTANT in one of the other test programs
 * that stand beside this one: that test must fail, and must say why in the
 * words of the table.  The same tests run without a mutant as tests of their
 * own; a test that cannot run here is skipped here as well.
 *
 * $DEDUP_TEST_FREEZE goes on to them: but for what concerns one way to freeze
 * only, each is caught with both.
 */

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "host/mutant.h"
#include "group/segment.h"

/*
 * A test that does not end is killed: also the one for "hangs" ends.  But it
 * may wait for KSM, which another checkout's tests have.
 */
#define SECONDS (300 * test_patience())

/* With which way to freeze does the mutant do harm? */
typedef enum Way {
    ANY,
    USERFAULTFD,
    MPROTECT,
} Way;

typedef struct Case {
    int mutant;
    const char *program;
    const char *path;
    const char *symptoms;       /* any of them, separated by "|" */
    Way way;
} Case;

static const Case cases[] = {
    { DEDUP_MUTANT_NO_PIN_RECHECK, "test-dedup-pins",
      "/pins/late-writer/memfd", "lost read", USERFAULTFD },
    { DEDUP_MUTANT_NO_PIN_RECHECK, "test-dedup-pins",
      "/pins/late-writer/anon", "lost read", USERFAULTFD },
    { DEDUP_MUTANT_NO_FREEZE, "test-dedup-writers",
      "/writers/counters/memfd", "lost store|zero page|foreign bytes" },
    { DEDUP_MUTANT_NO_FREEZE, "test-dedup-writers",
      "/writers/counters/anon", "lost store|zero page|foreign bytes" },
    { DEDUP_MUTANT_NO_WAKE, "test-dedup-writers",
      "/writers/counters/memfd", "writer hangs" },
    { DEDUP_MUTANT_PUNCH_FIRST, "test-dedup-writers",
      "/writers/counters/memfd", "zero page|lost store" },
    { DEDUP_MUTANT_TRUST_HASH, "test-dedup-merge",
      "/merge/collision/memfd", "foreign bytes" },
    { DEDUP_MUTANT_TRUST_HASH, "test-dedup-merge",
      "/merge/collision/anon", "foreign bytes" },
    { DEDUP_MUTANT_NO_MADVISE, "test-dedup-unmerge",
      "/unmerge/fork/memfd", "child sees the range" },
    { DEDUP_MUTANT_NO_MADVISE, "test-dedup-unmerge",
      "/unmerge/fork/anon", "child sees the range" },
    { DEDUP_MUTANT_NO_PROOF, "test-dedup-liar",
      "/liar/memfd", "liar has a secret" },
    /* what was written after a page of zeros looks like a lost store */
    { DEDUP_MUTANT_NO_LOCK, "test-dedup-writers",
      "/writers/counters/memfd", "zero page|lost store" },
    { DEDUP_MUTANT_NO_HEADROOM, "test-dedup-failures",
      "/failures/publish/memfd", "killed" },
    { DEDUP_MUTANT_PUNCH_HELD, "test-dedup-punch",
      "/punch/reader/huge-tmpfs", "foreign bytes" },
    { DEDUP_MUTANT_NO_FETCH_PROOF, "test-dedup-fetch",
      "/fetch/hostile", "given without proof" },
    { DEDUP_MUTANT_NO_GATE, "test-dedup-room",
      "/room/remove/anon", "killed" },
    { DEDUP_MUTANT_PUNCH_ZEROES, "test-dedup-room",
      "/room/tmpfs/guest", "SIGBUS" },
    { DEDUP_MUTANT_KSM_LEFT, "test-dedup-ksm",
      "/ksm/merge/unsaid/anon", "lost store", USERFAULTFD },
    { DEDUP_MUTANT_KSM_LEFT, "test-dedup-ksm",
      "/ksm/merge/inside/memfd", "lost store", USERFAULTFD },
    { DEDUP_MUTANT_KSM_LEFT, "test-dedup-ksm",
      "/ksm/restore/again/memfd", "lost store", USERFAULTFD },
    { DEDUP_MUTANT_RESTORE_HELD, "test-dedup-pins",
      "/pins/held/memfd", "lost read", USERFAULTFD },
    { DEDUP_MUTANT_RESTORE_HELD, "test-dedup-pins",
      "/pins/held/anon", "lost read", USERFAULTFD },
    { DEDUP_MUTANT_RESTORE_KSM, "test-dedup-ksm",
      "/ksm/beside/anon", "not restored|killed", USERFAULTFD },
    { DEDUP_MUTANT_RESTORE_KSM, "test-dedup-ksm",
      "/ksm/beside/private-memfd", "not restored|killed", USERFAULTFD },
    { DEDUP_MUTANT_SUM_OFF, "test-dedup-merge",
      "/merge/rewrites/memfd", "the ledger is wrong" },
    { DEDUP_MUTANT_UNPROTECT_ALL, "test-dedup-window",
      "/window/batches/anon", "lost store", USERFAULTFD },
    { DEDUP_MUTANT_NO_WAIT, "test-dedup-mprotect",
      "/mprotect/waits", "does not wait", MPROTECT },
    { DEDUP_MUTANT_DMA_NO_WAIT, "test-dedup-kernel",
      "/kernel/writers/memfd", "read failed", MPROTECT },
    { DEDUP_MUTANT_FREEZE_PINNED, "test-dedup-mprotect",
      "/mprotect/pinned/memfd", "read failed", MPROTECT },
    { DEDUP_MUTANT_FREEZE_PINNED, "test-dedup-mprotect",
      "/mprotect/pinned/anon", "read failed", MPROTECT },
    { DEDUP_MUTANT_LOCK_FIRST, "test-dedup-vcpus",
      "/vcpus/discard", "vCPU hangs", MPROTECT },
    /* the harness of test-dedup-kth: a hole is left, a page is gone */
    { DEDUP_MUTANT_NO_PUT_BACK, "test-dedup-kth",
      "/kth/merge/memfd", "lost page|zero page" },
    { DEDUP_MUTANT_NO_PUT_BACK, "test-dedup-kth",
      "/kth/merge/anon", "lost page|zero page" },
    { DEDUP_MUTANT_FD_LEAK, "test-dedup-kth", "/kth/fetch/memfd", "leak" },
};

static char *program_dir;

typedef struct Outcome {
    int status;
    char *output;
} Outcome;

/* Run one test with a mutant; what it printed, and how it ended. */
static void run_test(const Case *c, Outcome *o)
{
    g_autofree char *program = g_build_filename(program_dir, c->program,
                                                NULL);
    g_autofree char *number = g_strdup_printf("%d", c->mutant);
    char *argv[] = { program, (char *)"--tap", (char *)"-p",
                     (char *)c->path, NULL };
    g_auto(GStrv) env = g_environ_setenv(g_get_environ(), "DEDUP_MUTANT",
                                         number, TRUE);
    gint64 end = g_get_monotonic_time() + SECONDS * G_USEC_PER_SEC;
    g_autoptr(GString) text = g_string_new(NULL);
    g_autoptr(GError) error = NULL;
    bool killed = false;
    GPid pid;
    int out;

    if (c->way == MPROTECT) {
        env = g_environ_setenv(env, "DEDUP_TEST_FREEZE", "mprotect", TRUE);
    }
    if (!g_spawn_async_with_pipes(NULL, argv, env,
                                  G_SPAWN_DO_NOT_REAP_CHILD |
                                  G_SPAWN_STDERR_TO_DEV_NULL, NULL, NULL,
                                  &pid, NULL, &out, NULL, &error)) {
        g_error("%s: %s", program, error->message);
    }
    g_assert_cmpint(fcntl(out, F_SETFL, O_NONBLOCK), ==, 0);
    for (;;) {
        char buf[4096];
        ssize_t n = read(out, buf, sizeof(buf));

        if (n > 0) {
            g_string_append_len(text, buf, n);
        } else if (n == 0) {
            break;
        } else if (g_get_monotonic_time() > end && !killed) {
            killed = true;
            kill(pid, SIGKILL);
        } else {
            g_usleep(2000);
        }
    }
    close(out);
    g_assert_cmpint(waitpid(pid, &o->status, 0), ==, pid);
    g_spawn_close_pid(pid);
    o->output = g_strdup(text->str);
}

static bool has_symptom(const char *output, const char *symptoms)
{
    g_auto(GStrv) list = g_strsplit(symptoms, "|", -1);

    for (char **s = list; *s; s++) {
        g_autofree char *line = g_strdup_printf("# SYMPTOM: %s:", *s);
        /* the engine's own checks */
        g_autofree char *abort = g_strdup_printf("FATAL-ERROR: %s:", *s);

        if (strstr(output, line) || strstr(output, abort)) {
            return true;
        }
    }
    return false;
}

static void test_caught(gconstpointer data)
{
    const Case *c = data;
    Outcome o;

    if (c->way == USERFAULTFD && fx_freeze == DEDUP_FREEZE_MPROTECT) {
        g_test_skip("a mapping that is read-only needs no such care");
        return;
    }
    run_test(c, &o);
    if (strstr(o.output, "# SKIP")) {
        g_test_skip("the test that would see it is skipped here");
    } else if (!o.status) {
        fx_fail("mutant survives", "M%d in %s", c->mutant, c->path);
    } else if (!has_symptom(o.output, c->symptoms)) {
        fx_fail("wrong symptom", "M%d in %s: %s", c->mutant, c->path,
                o.output);
    }
    g_free(o.output);
}

/* M7: a segment that is not sealed is refused, or it changes under us. */
static void test_seals(void)
{
    for (int mutant = 0; mutant <= DEDUP_MUTANT_NO_SEAL_CHECK;
         mutant += DEDUP_MUTANT_NO_SEAL_CHECK) {
        int fd = memfd_create("test-unsealed", MFD_CLOEXEC |
                              MFD_ALLOW_SEALING);
        int again = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        uint8_t page[FX_PAGE];
        DedupSegment *s;

        fx_content(page, 1);
        g_assert_cmpint(pwrite(fd, page, FX_PAGE, 0), ==, FX_PAGE);
        /* all but the one that counts */
        g_assert_cmpint(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW),
                        ==, 0);
        dedup_mutant = mutant;
        s = dedup_segment_accept(fd, 1, 1, NULL);
        dedup_mutant = 0;
        if (!mutant) {
            g_assert_null(s);
        } else {
            /* the symptom: a "segment" that its sender can change */
            g_assert_nonnull(s);
            g_assert_cmpint(memcmp(s->map, page, FX_PAGE), ==, 0);
            g_assert_cmpint(pwrite(again, "changed", 7, 0), ==, 7);
            g_assert_cmpint(memcmp(s->map, page, FX_PAGE), !=, 0);
            dedup_segment_free(s);
        }
        close(again);
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    program_dir = g_path_get_dirname(argv[0]);
    for (unsigned i = 0; i < G_N_ELEMENTS(cases); i++) {
        g_autofree char *path = g_strdup_printf("/mutants/M%d%s",
                                                cases[i].mutant,
                                                cases[i].path);

        g_test_add_data_func(path, &cases[i], test_caught);
    }
    g_test_add_func("/mutants/M7/seals", test_seals);
    return g_test_run();
}
