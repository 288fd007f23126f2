/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel's KSM, measured; see bench-ksm.h.
 *
 * ksmd is made to work without pause (sleep_millisecs=0) and without its
 * shortcut of passing over pages that were unique for some scans
 * (smart_scan=0): the engine hashes every page in every pass too.
 *
 * Time is ksmd's CPU time from /proc/PID/schedstat, so that other work on
 * the machine counts for neither side.  KSM tells nobody when it is done: its
 * counters are polled.
 */

#include <fcntl.h>
#include <glib.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench-ksm.h"

#define KSM "/sys/kernel/mm/ksm/"
#define POLL_US 500
/* Give up on a measurement after this many polls: 30 s and more. */
#define MAX_POLLS 60000
/* Wait so long, over all measurements, until others' memory is gone. */
#define MAX_WAIT_US (120 * G_USEC_PER_SEC)
#define WAIT_US 100000
/* Passes over unique pages: those that find all pages known, and unchanged. */
#define SCANS_BEFORE 2
#define SCANS 3

static const char *const knobs[] = {
    "sleep_millisecs", "pages_to_scan", "smart_scan", "use_zero_pages",
    "max_page_sharing", "run",   /* last: it starts ksmd */
};
static char *saved[G_N_ELEMENTS(knobs)];
static int guard_pipe = -1;
static pid_t guard;
static int schedstat_fd = -1;
static int ksmd_pid;
static cpu_set_t ksmd_cpus;

static bool write_file(const char *path, const char *value)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool ok = fd >= 0 && write(fd, value, strlen(value)) > 0;

    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

static bool set_knob(const char *name, const char *value)
{
    g_autofree char *path = g_strconcat(KSM, name, NULL);

    return write_file(path, value);
}

static char *get_knob(const char *name)
{
    g_autofree char *path = g_strconcat(KSM, name, NULL);
    char *value = NULL;

    if (g_file_get_contents(path, &value, NULL, NULL)) {
        g_strchomp(value);
    }
    return value;
}

static uint64_t figure(const char *name)
{
    g_autofree char *value = get_knob(name);

    return value ? g_ascii_strtoull(value, NULL, 10) : 0;
}

static int find_ksmd(void)
{
    GDir *dir = g_dir_open("/proc", 0, NULL);
    const char *name;
    int pid = -1;

    while (dir && pid < 0 && (name = g_dir_read_name(dir))) {
        g_autofree char *path = g_strdup_printf("/proc/%s/comm", name);
        g_autofree char *comm = NULL;

        if (g_ascii_isdigit(name[0]) &&
            g_file_get_contents(path, &comm, NULL, NULL) &&
            strcmp(comm, "ksmd\n") == 0) {
            pid = atoi(name);
        }
    }
    if (dir) {
        g_dir_close(dir);
    }
    return pid;
}

/* Would KSM scan memory of any other process?  (ksm_stat: Linux 6.1, 6.13) */
static bool others_mergeable(void)
{
    GDir *dir = g_dir_open("/proc", 0, NULL);
    const char *name;
    bool found = false;

    while (dir && !found && (name = g_dir_read_name(dir))) {
        g_autofree char *path = g_strdup_printf("/proc/%s/ksm_stat", name);
        g_autofree char *text = NULL;

        found = g_ascii_isdigit(name[0]) && atoi(name) != getpid() &&
                g_file_get_contents(path, &text, NULL, NULL) &&
                (strstr(text, "ksm_mergeable: yes") ||
                 strstr(text, "ksm_merge_any: yes"));
    }
    if (dir) {
        g_dir_close(dir);
    }
    return found;
}

bool bench_ksm_wait(void)
{
    static int64_t waited;
    bool others;

    while ((others = others_mergeable()) && waited < MAX_WAIT_US) {
        g_usleep(WAIT_US);
        waited += WAIT_US;
    }
    return !others;
}

static void restore_knobs(void)
{
    /* it was off: nothing that was merged meanwhile stays merged */
    set_knob("run", "2");
    sched_setaffinity(ksmd_pid, sizeof(ksmd_cpus), &ksmd_cpus);
    for (unsigned i = 0; i < G_N_ELEMENTS(knobs); i++) {
        if (saved[i] && !set_knob(knobs[i], saved[i])) {
            fprintf(stderr, "KSM: cannot put back %s=%s\n", knobs[i],
                    saved[i]);
        }
    }
}

/* The child: waits until nobody holds the pipe's other end any more. */
static void guard_run(int fd)
{
    char byte;
    sigset_t all;

    setsid();
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    while (read(fd, &byte, 1) > 0) {
        ;
    }
    restore_knobs();
    _exit(0);
}

const char *bench_ksm_begin(void)
{
    g_autofree char *path = NULL;
    cpu_set_t cpus;
    int fds[2];

    if (access(KSM "run", F_OK) < 0) {
        return "this kernel has no KSM";
    }
    if (access(KSM "run", W_OK) < 0) {
        return "KSM's knobs may not be set by this user";
    }
    if (figure("run") != 0) {
        return "KSM is in use on this machine (run is not 0)";
    }
    ksmd_pid = find_ksmd();
    path = g_strdup_printf("/proc/%d/schedstat", ksmd_pid);
    schedstat_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (schedstat_fd < 0 ||
        sched_getaffinity(ksmd_pid, sizeof(ksmd_cpus), &ksmd_cpus) < 0) {
        return "ksmd's CPU time cannot be read";
    }
    for (unsigned i = 0; i < G_N_ELEMENTS(knobs); i++) {
        saved[i] = get_knob(knobs[i]);
    }

    if (pipe(fds) < 0) {
        return "no pipe";
    }
    fflush(NULL);
    guard = fork();
    if (guard == 0) {
        close(fds[1]);
        guard_run(fds[0]);
    }
    close(fds[0]);
    if (guard < 0) {
        close(fds[1]);
        return "no process to guard KSM's knobs";
    }
    guard_pipe = fds[1];
    fcntl(guard_pipe, F_SETFD, FD_CLOEXEC);

    set_knob("sleep_millisecs", "0");
    set_knob("pages_to_scan", "2000");
    set_knob("smart_scan", "0");
    set_knob("use_zero_pages", "1"); /* else it takes for ever with many */
    /* it works where we work */
    if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) {
        sched_setaffinity(ksmd_pid, sizeof(cpus), &cpus);
    }
    return NULL;
}

void bench_ksm_end(void)
{
    if (guard_pipe >= 0) {
        close(guard_pipe);
        guard_pipe = -1;
        waitpid(guard, NULL, 0);
        close(schedstat_fd);
        for (unsigned i = 0; i < G_N_ELEMENTS(knobs); i++) {
            g_clear_pointer(&saved[i], g_free);
        }
    }
}

static double ksmd_ns(void)
{
    char text[128];
    ssize_t n = pread(schedstat_fd, text, sizeof(text) - 1, 0);

    if (n <= 0) {
        return 0;
    }
    text[n] = 0;
    return g_ascii_strtod(text, NULL);
}

static double now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1e9 + ts.tv_nsec;
}

/* Nothing of ours is known to KSM any more. */
static void forget(BenchRam *ram)
{
    madvise(ram->host, ram->pages * BENCH_PAGE, MADV_UNMERGEABLE);
    bench_ksm_forget();
}

void bench_ksm_run(bool on)
{
    set_knob("run", on ? "1" : "0");
}

void bench_ksm_forget(void)
{
    set_knob("run", "2");
    set_knob("run", "0");
}

uint64_t bench_ksm_cpu_ns(void)
{
    return ksmd_ns();
}

/* Only our pages may be looked at: at most this many per scan. */
static bool only_ours(const BenchRam *ram)
{
    uint64_t known = figure("pages_shared") + figure("pages_sharing") +
                     figure("pages_unshared") + figure("pages_volatile");

    return known <= ram->pages + ram->pages / 50;
}

bool bench_ksm_merge(BenchRam *ram, BenchCost *cost)
{
    size_t goal = bench_ram_goal(ram);
    uint64_t merged = 0;
    double cpu, wall;
    bool ours;

    if (madvise(ram->host, ram->pages * BENCH_PAGE, MADV_MERGEABLE) < 0) {
        return false;
    }
    cpu = ksmd_ns();
    wall = now_ns();
    set_knob("run", "1");
    for (unsigned i = 0; merged < goal && i < MAX_POLLS; i++) {
        g_usleep(POLL_US);
        merged = figure("pages_shared") + figure("pages_sharing");
    }
    cost->cpu_ns = ksmd_ns() - cpu;
    cost->wall_ns = now_ns() - wall;
    cost->pages = figure("pages_sharing");
    ours = only_ours(ram);
    forget(ram);
    return merged >= goal && ours;
}

bool bench_ksm_scan(BenchRam *ram, BenchCost *cost)
{
    double cpu = 0, wall = 0;
    uint64_t begin, seen, start = 0;
    bool ours;

    if (madvise(ram->host, ram->pages * BENCH_PAGE, MADV_MERGEABLE) < 0) {
        return false;
    }
    begin = figure("full_scans");
    set_knob("run", "1");
    for (unsigned i = 0; i < MAX_POLLS; i++) {
        g_usleep(POLL_US);
        seen = figure("full_scans") - begin;
        if (!start && seen >= SCANS_BEFORE) {
            start = seen;
            cpu = ksmd_ns();
            wall = now_ns();
        }
        if (start && seen >= start + SCANS) {
            break;
        }
    }
    cost->cpu_ns = ksmd_ns() - cpu;
    cost->wall_ns = now_ns() - wall;
    cost->pages = (double)(seen - start) * ram->pages;
    ours = only_ours(ram);
    forget(ram);
    return start && seen >= start + SCANS && ours;
}
