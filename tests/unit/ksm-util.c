/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel's KSM, at work in a test; see ksm-util.h.
 */

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "ksm-util.h"

#define KSM "/sys/kernel/mm/ksm/"

static const struct {
    const char *name;
    const char *value;
} knobs[] = {
    { "sleep_millisecs", "0" },
    { "pages_to_scan", "20000" },
    { "smart_scan", "0" },
    { "use_zero_pages", "0" },
    { "run", "0" },             /* the last that is put back */
};

static bool set_knob(const char *name, const char *value)
{
    g_autofree char *path = g_strconcat(KSM, name, NULL);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool ok = fd >= 0 && write(fd, value, strlen(value)) > 0;

    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

static char *get_knob(const char *name)
{
    g_autofree char *path = g_strconcat(KSM, name, NULL);
    char *value = NULL;

    return g_file_get_contents(path, &value, NULL, NULL) ? g_strchomp(value)
                                                         : NULL;
}

/* The child: waits for the end of its parent, and of who inherited. */
static void guard_main(int fd, char *const saved[])
{
    char byte;
    sigset_t all;

    setsid();
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    while (read(fd, &byte, 1) > 0) {
        ;
    }
    set_knob("run", "2"); /* it was off: nothing stays merged */
    for (unsigned i = 0; i < G_N_ELEMENTS(knobs); i++) {
        if (saved[i]) {
            set_knob(knobs[i].name, saved[i]);
        }
    }
    _exit(0);
}

bool ksm_begin(void)
{
    static bool begun;
    char *saved[G_N_ELEMENTS(knobs)];
    int null, fds[2], lock;
    pid_t pid;

    if (begun) {
        return true;
    }
    lock = open(KSM "run", O_RDONLY | O_CLOEXEC);
    if (lock < 0 || access(KSM "run", W_OK) < 0) {
        g_test_skip("no KSM here, or its knobs may not be set");
        return false;
    }
    /* the child has it, too: until the knobs are put back */
    g_assert_cmpint(flock(lock, LOCK_EX), ==, 0);
    for (unsigned i = 0; i < G_N_ELEMENTS(knobs); i++) {
        saved[i] = get_knob(knobs[i].name);
    }
    if (g_strcmp0(saved[G_N_ELEMENTS(knobs) - 1], "0")) {
        g_test_skip("KSM is in use on this machine");
        close(lock);
        return false;
    }
    g_assert_cmpint(pipe(fds), ==, 0);
    pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (pid == 0) {
        /* nobody who reads our output shall wait for the child */
        null = open("/dev/null", O_RDWR);
        dup2(null, STDOUT_FILENO);
        dup2(null, STDERR_FILENO);
        close(fds[1]);
        guard_main(fds[0], saved);
    }
    close(fds[0]);
    for (unsigned i = 0; i < G_N_ELEMENTS(knobs); i++) {
        set_knob(knobs[i].name, knobs[i].value);
        g_free(saved[i]);
    }
    begun = true;
    return true;
}

void ksm_run(bool on)
{
    g_assert_true(set_knob("run", on ? "1" : "0"));
}

static uint64_t full_scans(void)
{
    g_autofree char *value = get_knob("full_scans");

    return g_ascii_strtoull(value, NULL, 10);
}

static bool has_scanned(void *opaque)
{
    return full_scans() >= *(uint64_t *)opaque;
}

void ksm_wait_scans(void)
{
    /* the one under way may have passed by already */
    uint64_t target = full_scans() + 3;

    fx_wait_until(has_scanned, &target, "KSM does not scan");
}

uint64_t ksm_pages(void)
{
    g_autofree char *text = NULL;
    uint64_t sum = 0;

    g_assert_true(g_file_get_contents("/proc/self/ksm_stat", &text, NULL,
                                      NULL));
    for (const char *line = text; line && *line;) {
        uint64_t n;

        if (sscanf(line, "ksm_merging_pages %" SCNu64, &n) == 1 ||
            sscanf(line, "ksm_zero_pages %" SCNu64, &n) == 1) {
            sum += n;
        }
        line = strchr(line, '\n');
        line = line ? line + 1 : NULL;
    }
    return sum;
}

void ksm_merge(void *addr, size_t len)
{
    g_assert_cmpint(madvise(addr, len, MADV_MERGEABLE), ==, 0);
    ksm_run(true);
    ksm_wait_scans();
    ksm_run(false);
}

uint64_t ksm_mergeable(const void *addr, size_t len)
{
    FILE *f = fopen("/proc/self/smaps", "re");
    uint64_t start = 0, end = 0, sum = 0;
    uint64_t first = (uintptr_t)addr, last = first + len;
    char line[512];

    g_assert_nonnull(f);
    while (fgets(line, sizeof(line), f)) {
        uint64_t a, b;

        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &a, &b) == 2) {
            start = MAX(a, first);
            end = MIN(b, last);
        } else if (g_str_has_prefix(line, "VmFlags:") &&
                   strstr(line, " mg") && start < end) {
            sum += end - start;
        }
    }
    fclose(f);
    return sum;
}
