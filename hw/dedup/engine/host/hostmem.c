/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the host has left; see hostmem.h.
 *
 * Files of /proc are opened once and read from their start each time; cgroups
 * are cgroup.c's.  Everything here is a text file of the kernel's: what is not
 * there counts as "no limit known".  What is there and cannot be read (no
 * descriptor, no memory, a security module) counts as "no room": it may be a
 * limit.
 */

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "host/hostmem.h"
#include "host/sys.h"

struct DedupHostMem {
    int meminfo_fd;
    int maps_fd;
    int max_maps_fd;
    GMutex lock;              /* of what follows */
    DedupCgroups cgroups;     /* of memory */
};

static int proc_open(const char *proc, const char *name)
{
    g_autofree char *path = g_build_filename(proc, name, NULL);

    return sys_open(path, O_RDONLY | O_CLOEXEC);
}

DedupHostMem *dedup_hostmem_new(const char *proc)
{
    DedupHostMem *m = g_new0(DedupHostMem, 1);

    g_mutex_init(&m->lock);
    m->meminfo_fd = proc_open(proc, "meminfo");
    m->maps_fd = proc_open(proc, "self/maps");
    m->max_maps_fd = proc_open(proc, "sys/vm/max_map_count");
    dedup_cgroups_init(&m->cgroups, proc, "memory");
    return m;
}

void dedup_hostmem_free(DedupHostMem *m)
{
    if (!m) {
        return;
    }
    if (m->meminfo_fd >= 0) {
        close(m->meminfo_fd);
    }
    if (m->maps_fd >= 0) {
        close(m->maps_fd);
    }
    if (m->max_maps_fd >= 0) {
        close(m->max_maps_fd);
    }
    dedup_cgroups_clear(&m->cgroups);
    g_mutex_clear(&m->lock);
    g_free(m);
}

/* A number of /proc/meminfo, in bytes; @unknown if it cannot be read. */
static uint64_t meminfo(DedupHostMem *m, const char *name, uint64_t unknown)
{
    char buf[4096];
    uint64_t kib;
    ssize_t len = sys_pread(m->meminfo_fd, buf, sizeof(buf) - 1, 0);

    if (len <= 0) {
        return unknown;
    }
    buf[len] = '\0';
    return dedup_find_number(buf, name, &kib) ? kib * 1024 : unknown;
}

uint64_t dedup_hostmem_available(DedupHostMem *m)
{
    /* without /proc nothing is known for ever; else it is short now */
    return meminfo(m, "MemAvailable", m->meminfo_fd < 0 ? UINT64_MAX : 0);
}

uint64_t dedup_hostmem_total(DedupHostMem *m)
{
    return meminfo(m, "MemTotal", UINT64_MAX);
}

/* Room below one cgroup's @limit; UINT64_MAX if it has none. */
static uint64_t level_room(bool v2, int fd, uint64_t *limit)
{
    g_autofree char *limit_text =
        dedup_cgroup_read(fd, v2 ? "memory.max" : "memory.limit_in_bytes");
    g_autofree char *usage_text = NULL;
    g_autofree char *stat = NULL;
    uint64_t usage, active = 0, inactive = 0;

    if (!limit_text) {
        /* the root has no such file */
        return dedup_cgroup_is_absent(errno) ? UINT64_MAX : 0;
    }
    if (!g_ascii_isdigit(*limit_text)) {
        return UINT64_MAX; /* "max" */
    }
    *limit = g_ascii_strtoull(limit_text, NULL, 10);
    if (*limit >= INT64_MAX / 2) {
        return UINT64_MAX; /* version 1's "none": the largest page count */
    }
    usage_text = dedup_cgroup_read(fd, v2 ? "memory.current" :
                                   "memory.usage_in_bytes");
    stat = usage_text ? dedup_cgroup_read(fd, "memory.stat") : NULL;
    if (!stat) {
        return dedup_cgroup_is_absent(errno) ? UINT64_MAX : 0;
    }
    usage = g_ascii_strtoull(usage_text, NULL, 10);
    /*
     * Page cache of files gives way before the limit kills; shmem is not in
     * these lists (it is on the anonymous ones).
     */
    dedup_find_number(stat, v2 ? "active_file" : "total_active_file",
                      &active);
    dedup_find_number(stat, v2 ? "inactive_file" : "total_inactive_file",
                      &inactive);
    usage -= MIN(usage, active + inactive);
    return *limit > usage ? *limit - usage : 0;
}

void dedup_hostmem_cgroup_ids(DedupHostMem *m,
                              uint64_t ids[DEDUP_CGROUP_IDS])
{
    DedupCgroups *c = &m->cgroups;

    g_mutex_lock(&m->lock);
    dedup_cgroups_refresh(c);
    for (unsigned i = 0; i < DEDUP_CGROUP_IDS; i++) {
        ids[i] = i < c->nlevels ? c->level_id[i] : 0;
    }
    g_mutex_unlock(&m->lock);
}

unsigned dedup_hostmem_cgroup_rooms(DedupHostMem *m, DedupCgroupRoom *rooms)
{
    DedupCgroups *c = &m->cgroups;
    unsigned n = 0;

    g_mutex_lock(&m->lock);
    dedup_cgroups_refresh(c);
    for (unsigned i = 0; i < c->nlevels; i++) {
        uint64_t limit = 0;
        uint64_t bytes = level_room(c->v2, c->level_fd[i], &limit);

        if (bytes != UINT64_MAX) {
            rooms[n++] = (DedupCgroupRoom) { c->level_id[i], bytes, limit };
        }
    }
    if (c->unknown) {
        rooms[n++] = (DedupCgroupRoom) { 0 };
    }
    g_mutex_unlock(&m->lock);
    return n;
}

uint64_t dedup_hostmem_maps(DedupHostMem *m)
{
    char buf[16384];
    uint64_t lines = 0;
    ssize_t len;

    if (sys_lseek(m->maps_fd, 0, SEEK_SET) < 0) {
        return 0;
    }
    while ((len = sys_read(m->maps_fd, buf, sizeof(buf))) > 0) {
        for (char *p = buf; (p = memchr(p, '\n', buf + len - p)); p++) {
            lines++;
        }
    }
    return len < 0 ? 0 : lines;
}

uint64_t dedup_hostmem_max_maps(DedupHostMem *m)
{
    char buf[32];
    ssize_t len = sys_pread(m->max_maps_fd, buf, sizeof(buf) - 1, 0);

    if (len <= 0) {
        return 65530; /* the kernel's default */
    }
    buf[len] = '\0';
    return g_ascii_strtoull(buf, NULL, 10);
}
