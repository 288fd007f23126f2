/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Counts of a process; see bench-counts.h.
 */

#include <glib.h>
#include <linux/perf_event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench-counts.h"

const char *const bench_count_names[BENCH_COUNTS] = {
    [BENCH_SYSCALLS] = "system calls",
    [BENCH_FAULTS] = "page faults",
    [BENCH_TLB_FLUSHES] = "TLB flushes",
    [BENCH_SWITCHES] = "context switches",
};

static const char *const tracepoints[BENCH_COUNTS] = {
    [BENCH_SYSCALLS] = "raw_syscalls/sys_enter",
    [BENCH_TLB_FLUSHES] = "tlb/tlb_flush",
};

/* The number of a tracepoint, below a mount of tracefs; 0: not there. */
static uint64_t id_below(const char *mount, const char *tracepoint)
{
    g_autofree char *path = g_strdup_printf("%s/events/%s/id", mount,
                                            tracepoint);
    g_autofree char *text = NULL;

    return g_file_get_contents(path, &text, NULL, NULL) ?
           g_ascii_strtoull(text, NULL, 10) : 0;
}

/* Where tracefs is not mounted it is, for a moment, in a place of our own. */
static uint64_t tracepoint_id(const char *tracepoint)
{
    char dir[] = "/tmp/bench-tracefs-XXXXXX";
    uint64_t id = id_below("/sys/kernel/tracing", tracepoint);

    if (!id) {
        id = id_below("/sys/kernel/debug/tracing", tracepoint);
    }
    if (!id && mkdtemp(dir)) {
        if (mount("tracefs", dir, "tracefs", 0, NULL) == 0) {
            id = id_below(dir, tracepoint);
            umount2(dir, MNT_DETACH);
        }
        rmdir(dir);
    }
    return id;
}

static int event_open(BenchCount which, pid_t pid)
{
    struct perf_event_attr attr = {
        .size = sizeof(attr), .disabled = 1, .inherit = 1,
        .type = PERF_TYPE_SOFTWARE,
        .config = which == BENCH_FAULTS ? PERF_COUNT_SW_PAGE_FAULTS
                                        : PERF_COUNT_SW_CONTEXT_SWITCHES,
    };

    if (tracepoints[which]) {
        attr.type = PERF_TYPE_TRACEPOINT;
        attr.config = tracepoint_id(tracepoints[which]);
        if (!attr.config) {
            return -1;
        }
    }
    return syscall(SYS_perf_event_open, &attr, pid, -1, -1,
                   PERF_FLAG_FD_CLOEXEC);
}

void bench_counters_open(BenchCounters *c, pid_t pid)
{
    for (unsigned i = 0; i < BENCH_COUNTS; i++) {
        c->fd[i] = event_open(i, pid);
    }
}

void bench_counters_start(BenchCounters *c)
{
    for (unsigned i = 0; i < BENCH_COUNTS; i++) {
        if (c->fd[i] >= 0) {
            ioctl(c->fd[i], PERF_EVENT_IOC_ENABLE, 0);
        }
    }
}

bool bench_counters_read(const BenchCounters *c, BenchCount which,
                         uint64_t *value)
{
    uint64_t n;

    if (c->fd[which] < 0 || read(c->fd[which], &n, sizeof(n)) != sizeof(n)) {
        return false;
    }
    *value += n;
    return true;
}

void bench_counters_close(BenchCounters *c)
{
    for (unsigned i = 0; i < BENCH_COUNTS; i++) {
        if (c->fd[i] >= 0) {
            close(c->fd[i]);
        }
    }
}
