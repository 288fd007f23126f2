/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A memory cgroup; see bench-cgroup.h.
 */

#include <fcntl.h>
#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bench-cgroup.h"

/* Its last process may be on its way out. */
#define REMOVE_TRIES 500
#define REMOVE_WAIT_US 10000

struct BenchCgroup {
    char *path;
    int usage_fd;
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

static BenchCgroup *make(const char *mount, const char *path,
                         const char *usage)
{
    g_autofree char *dir = g_strdup_printf("%s%s/bench-dedup-%d", mount, path,
                                           getpid());
    g_autofree char *file = g_strdup_printf("%s/%s", dir, usage);
    BenchCgroup *c;
    int fd;

    if (mkdir(dir, 0755) < 0) {
        return NULL;
    }
    fd = open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        rmdir(dir);
        return NULL;
    }
    c = g_new0(BenchCgroup, 1);
    c->path = g_steal_pointer(&dir);
    c->usage_fd = fd;
    return c;
}

BenchCgroup *bench_cgroup_new(void)
{
    g_autofree char *v1 = own_path("memory");
    g_autofree char *v2 = own_path("");
    BenchCgroup *c = NULL;

    if (v1) {
        c = make("/sys/fs/cgroup/memory", v1, "memory.usage_in_bytes");
        /* in a container our own path may not be there */
        c = c ? c : make("/sys/fs/cgroup/memory", "", "memory.usage_in_bytes");
    } else if (v2) {
        c = make("/sys/fs/cgroup", v2, "memory.current");
        c = c ? c : make("/sys/fs/cgroup", "", "memory.current");
    }
    return c;
}

void bench_cgroup_free(BenchCgroup *c)
{
    close(c->usage_fd);
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
