/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A cgroup; see bench-cgroup.h.
 */

#include <fcntl.h>
#include <glib.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench-cgroup.h"

/* Its last process may be on its way out. */
#define REMOVE_TRIES 500
#define REMOVE_WAIT_US 10000

#define CGROUPS "/sys/fs/cgroup"
#define PERIOD_US 100000

struct BenchCgroup {
    char *path;
    int usage_fd;             /* -1: not one of memory */
};

/* Our own path in the hierarchy that has @controller ("": version 2). */
static char *own_path(const char *controller)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;

    if (!g_file_get_contents("/proc/self/cgroup", &text, NULL, NULL)) {
        return NULL;
    }
    lines = g_strsplit(text, "\n", -1);
    for (char **line = lines; *line; line++) {
        g_auto(GStrv) fields = g_strsplit(*line, ":", 3);
        g_auto(GStrv) names = NULL;

        if (g_strv_length(fields) != 3) {
            continue;
        }
        names = g_strsplit(fields[1], ",", -1);
        if (*controller ? g_strv_contains((const char *const *)names,
                                          controller) : !*fields[1]) {
            return g_strdup(fields[2]);
        }
    }
    return NULL;
}

/* Below our own cgroup of this hierarchy; or, in a container, its root. */
static BenchCgroup *make(const char *mount, const char *own)
{
    const char *parents[] = { own, "" };

    for (unsigned i = 0; i < G_N_ELEMENTS(parents); i++) {
        g_autofree char *dir = g_strdup_printf("%s%s/bench-dedup-XXXXXX",
                                               mount, parents[i]);

        if (mkdtemp(dir)) {
            BenchCgroup *c = g_new0(BenchCgroup, 1);

            c->path = g_steal_pointer(&dir);
            c->usage_fd = -1;
            return c;
        }
    }
    return NULL;
}

/* One with this controller, of whichever version has it. */
static BenchCgroup *make_with(const char *controller, bool *v2)
{
    g_autofree char *own = own_path(controller);
    g_autofree char *unified = own_path("");
    g_autofree char *mount = g_strconcat(CGROUPS "/", controller, NULL);

    *v2 = !own;
    return own ? make(mount, own) : unified ? make(CGROUPS, unified) : NULL;
}

static int open_in(const BenchCgroup *c, const char *name, int flags)
{
    g_autofree char *path = g_strdup_printf("%s/%s", c->path, name);

    return open(path, flags | O_CLOEXEC);
}

BenchCgroup *bench_cgroup_new(void)
{
    bool v2;
    BenchCgroup *c = make_with("memory", &v2);

    if (c) {
        c->usage_fd = open_in(c, v2 ? "memory.current"
                                    : "memory.usage_in_bytes", O_RDONLY);
        if (c->usage_fd < 0) {
            bench_cgroup_free(c);
            c = NULL;
        }
    }
    return c;
}

BenchCgroup *bench_cgroup_new_cpu(unsigned percent)
{
    bool v2;
    BenchCgroup *c = make_with("cpu", &v2);
    g_autofree char *quota = NULL;
    int fd;

    if (!c) {
        return NULL;
    }
    quota = g_strdup_printf(v2 ? "%u %u" : "%u", percent * PERIOD_US / 100,
                            PERIOD_US);
    fd = open_in(c, v2 ? "cpu.max" : "cpu.cfs_quota_us", O_WRONLY);
    if (fd < 0 || write(fd, quota, strlen(quota)) < 0) {
        bench_cgroup_free(c);
        c = NULL;
    }
    if (fd >= 0) {
        close(fd);
    }
    return c;
}

void bench_cgroup_free(BenchCgroup *c)
{
    if (c->usage_fd >= 0) {
        close(c->usage_fd);
    }
    for (unsigned i = 0; rmdir(c->path) < 0 && i < REMOVE_TRIES; i++) {
        g_usleep(REMOVE_WAIT_US);
    }
    g_free(c->path);
    g_free(c);
}

void bench_cgroup_enter(BenchCgroup *c)
{
    g_autofree char *path = g_strdup_printf("%s/cgroup.procs", c->path);
    FILE *f = fopen(path, "we");

    if (!f || fprintf(f, "%d", getpid()) < 0 || fclose(f) != 0) {
        perror(path);
        exit(2);
    }
}

uint64_t bench_cgroup_usage(BenchCgroup *c)
{
    char text[32];
    ssize_t n = pread(c->usage_fd, text, sizeof(text) - 1, 0);

    if (n <= 0) {
        return 0;
    }
    text[n] = 0;
    return g_ascii_strtoull(text, NULL, 10);
}
