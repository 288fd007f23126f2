/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the host has left; see hostmem.h.
 *
 * Files of /proc are opened once and read from their start each time.  A
 * memory cgroup is kept as one directory descriptor for it and each of its
 * nearest ancestors, since any of them may carry the limit that binds.  The
 * process may be moved to another cgroup at any time (libvirt, Kata and
 * cgrulesengd do so after QEMU has started), so /proc/self/cgroup is read
 * again at each look; the descriptors are opened anew if it says something
 * else.  They are opened below the hierarchy's mount point, which is kept
 * open: its path may lead nowhere after chroot().
 * Everything here is a text file of the kernel's: numbers are parsed with
 * g_ascii_strtoull(), and what is not there counts as "no limit known".  What
 * is there and cannot be read (no descriptor, no memory, a security module)
 * counts as "no room": it may be a limit.
 */

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host/hostmem.h"

struct DedupHostMem {
    int meminfo_fd;
    int maps_fd;
    int max_maps_fd;
    int cgroup_fd;            /* /proc/self/cgroup */
    int point_fd;             /* where the hierarchy is mounted; or -1 */
    char *root;               /* which part of it is mounted there */
    bool v2;

    GMutex lock;              /* of what follows */
    char *cgroups;            /* what cgroup_fd said when they were opened */
    bool unknown;             /* one could not be opened: try again */
    unsigned nlevels;
    int level_fd[DEDUP_CGROUP_LEVELS]; /* the cgroup, then its ancestors */
    uint64_t level_id[DEDUP_CGROUP_LEVELS];
};

/* Read a small text file; NULL and errno if it cannot be read. */
static char *read_at(int dirfd, const char *name)
{
    char buf[16384];
    ssize_t len;
    int fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC);
    int saved;

    if (fd < 0) {
        return NULL;
    }
    len = read(fd, buf, sizeof(buf) - 1);
    saved = errno;
    close(fd);
    errno = saved;
    if (len < 0) {
        return NULL;
    }
    return g_strndup(buf, len);
}

/* What could not be read is not there: no such file, the cgroup removed. */
static bool is_absent(int error)
{
    return error == ENOENT || error == ENODEV;
}

/* The number behind "name" at the start of a line; false if absent. */
static bool find_number(const char *text, const char *name, uint64_t *value)
{
    size_t len = strlen(name);

    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, len) == 0 &&
            (line[len] == ' ' || line[len] == ':')) {
            line += len;
            line += strspn(line, ": \t");
            *value = g_ascii_strtoull(line, NULL, 10);
            return true;
        }
    }
    return false;
}

/*
 * The path of our memory cgroup below the hierarchy's mount point.  A line
 * of /proc/self/cgroup is "0::PATH" (version 2) or "N:CONTROLLERS:PATH".
 */
static char *cgroup_path(const char *text, bool v2)
{
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);

    for (char **l = lines; *l; l++) {
        g_auto(GStrv) f = g_strsplit(*l, ":", 3);

        if (g_strv_length(f) != 3) {
            continue;
        }
        if (v2) {
            if (!strcmp(f[0], "0") && !*f[1]) {
                return g_strdup(f[2]);
            }
        } else {
            g_auto(GStrv) names = g_strsplit(f[1], ",", -1);

            if (g_strv_contains((const char * const *)names, "memory")) {
                return g_strdup(f[2]);
            }
        }
    }
    return NULL;
}

/*
 * The mount point of the hierarchy and the path that is mounted there.  A
 * line of mountinfo is "ID PARENT DEV ROOT POINT OPTIONS... - TYPE SOURCE
 * SUPEROPTIONS".
 */
static char *cgroup_mount(const char *text, bool v2, char **root)
{
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);

    for (char **l = lines; *l; l++) {
        const char *tail = strstr(*l, " - ");
        g_auto(GStrv) f = g_strsplit(*l, " ", 6);
        g_auto(GStrv) t = tail ? g_strsplit(tail + 3, " ", 3) : NULL;

        if (g_strv_length(f) < 6 || !t || g_strv_length(t) < 3) {
            continue;
        }
        if (v2 ? !strcmp(t[0], "cgroup2") : !strcmp(t[0], "cgroup")) {
            g_auto(GStrv) options = g_strsplit(t[2], ",", -1);

            if (v2 ||
                g_strv_contains((const char * const *)options, "memory")) {
                *root = g_strdup(f[3]);
                return g_strdup(f[4]);
            }
        }
    }
    return NULL;
}

/* Find where the hierarchy with the memory controller is mounted. */
static bool cgroup_find(DedupHostMem *m, const char *cgroups,
                        const char *mounts, bool v2)
{
    g_autofree char *path = cgroup_path(cgroups, v2);
    g_autofree char *root = NULL;
    g_autofree char *point = cgroup_mount(mounts, v2, &root);

    if (!path || !point) {
        return false;
    }
    m->point_fd = open(point, O_PATH | O_DIRECTORY | O_CLOEXEC);
    m->root = g_steal_pointer(&root);
    m->v2 = v2;
    return m->point_fd >= 0;
}

static void close_levels(DedupHostMem *m)
{
    while (m->nlevels) {
        close(m->level_fd[--m->nlevels]);
    }
}

/* Open the cgroup that @cgroups names, and those above it.  Lock held. */
static void open_levels(DedupHostMem *m, const char *cgroups)
{
    g_autofree char *path = cgroup_path(cgroups, m->v2);
    g_autofree char *below = NULL;
    size_t len = strlen(m->root);
    bool is_part = path && strcmp(m->root, "/") != 0 &&
                   g_str_has_prefix(path, m->root) &&
                   (!path[len] || path[len] == '/');
    char *slash;

    close_levels(m);
    m->unknown = false;
    if (!path) {
        return;
    }
    /* a container sees its own part */
    below = g_strconcat(".", is_part ? path + len : path, NULL);
    do {
        struct stat st;
        int fd = openat(m->point_fd, below, O_PATH | O_DIRECTORY | O_CLOEXEC);

        if (fd >= 0 && fstat(fd, &st) == 0) {
            m->level_id[m->nlevels] = st.st_ino;
            m->level_fd[m->nlevels++] = fd;
        } else if (fd >= 0) {
            close(fd);
        } else {
            m->unknown |= !is_absent(errno);
        }
        slash = strrchr(below, '/');
        if (slash) {
            *slash = '\0';
        }
    } while (slash && m->nlevels < DEDUP_CGROUP_LEVELS - 1);
}

/* Are we where we were at the last look?  Lock held. */
static void refresh_levels(DedupHostMem *m)
{
    char buf[16384];
    ssize_t len;

    if (m->point_fd < 0) {
        return;
    }
    len = pread(m->cgroup_fd, buf, sizeof(buf) - 1, 0);
    if (len < 0) {
        return; /* where we were is the best guess */
    }
    buf[len] = '\0';
    if (m->unknown || g_strcmp0(buf, m->cgroups) != 0) {
        open_levels(m, buf);
        g_free(m->cgroups);
        m->cgroups = g_strdup(buf);
    }
}

static int proc_open(const char *proc, const char *name)
{
    g_autofree char *path = g_build_filename(proc, name, NULL);

    return open(path, O_RDONLY | O_CLOEXEC);
}

static char *proc_read(const char *proc, const char *name)
{
    g_autofree char *path = g_build_filename(proc, name, NULL);
    char *text = NULL;

    return g_file_get_contents(path, &text, NULL, NULL) ? text : NULL;
}

DedupHostMem *dedup_hostmem_new(const char *proc)
{
    DedupHostMem *m = g_new0(DedupHostMem, 1);
    g_autofree char *cgroups = proc_read(proc, "self/cgroup");
    g_autofree char *mounts = proc_read(proc, "self/mountinfo");

    g_mutex_init(&m->lock);
    m->point_fd = -1;
    m->cgroup_fd = proc_open(proc, "self/cgroup");
    m->meminfo_fd = proc_open(proc, "meminfo");
    m->maps_fd = proc_open(proc, "self/maps");
    m->max_maps_fd = proc_open(proc, "sys/vm/max_map_count");
    if (cgroups && mounts) {
        /* a hybrid host has both; then version 1 has the controller */
        if (!cgroup_find(m, cgroups, mounts, false)) {
            cgroup_find(m, cgroups, mounts, true);
        }
    }
    refresh_levels(m); /* while there are descriptors */
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
    if (m->cgroup_fd >= 0) {
        close(m->cgroup_fd);
    }
    close_levels(m);
    if (m->point_fd >= 0) {
        close(m->point_fd);
    }
    g_free(m->cgroups);
    g_free(m->root);
    g_mutex_clear(&m->lock);
    g_free(m);
}

/* A number of /proc/meminfo, in bytes; UINT64_MAX if unknown. */
static uint64_t meminfo(DedupHostMem *m, const char *name)
{
    char buf[4096];
    uint64_t kib;
    ssize_t len = pread(m->meminfo_fd, buf, sizeof(buf) - 1, 0);

    if (len <= 0) {
        return UINT64_MAX;
    }
    buf[len] = '\0';
    return find_number(buf, name, &kib) ? kib * 1024 : UINT64_MAX;
}

uint64_t dedup_hostmem_available(DedupHostMem *m)
{
    return meminfo(m, "MemAvailable");
}

uint64_t dedup_hostmem_total(DedupHostMem *m)
{
    return meminfo(m, "MemTotal");
}

/* Room below one cgroup's @limit; UINT64_MAX if it has none. */
static uint64_t level_room(DedupHostMem *m, int fd, uint64_t *limit)
{
    g_autofree char *limit_text = read_at(fd, m->v2 ? "memory.max" :
                                          "memory.limit_in_bytes");
    g_autofree char *usage_text = NULL;
    g_autofree char *stat = NULL;
    uint64_t usage, active = 0, inactive = 0;

    if (!limit_text) {
        return is_absent(errno) ? UINT64_MAX : 0; /* the root has no file */
    }
    if (!g_ascii_isdigit(*limit_text)) {
        return UINT64_MAX; /* "max" */
    }
    *limit = g_ascii_strtoull(limit_text, NULL, 10);
    if (*limit >= INT64_MAX / 2) {
        return UINT64_MAX; /* version 1's "none": the largest page count */
    }
    usage_text = read_at(fd, m->v2 ? "memory.current" :
                         "memory.usage_in_bytes");
    stat = usage_text ? read_at(fd, "memory.stat") : NULL;
    if (!stat) {
        return is_absent(errno) ? UINT64_MAX : 0;
    }
    usage = g_ascii_strtoull(usage_text, NULL, 10);
    /*
     * Page cache of files gives way before the limit kills; shmem is not in
     * these lists (it is on the anonymous ones).
     */
    find_number(stat, m->v2 ? "active_file" : "total_active_file", &active);
    find_number(stat, m->v2 ? "inactive_file" : "total_inactive_file",
                &inactive);
    usage -= MIN(usage, active + inactive);
    return *limit > usage ? *limit - usage : 0;
}

void dedup_hostmem_cgroup_ids(DedupHostMem *m,
                              uint64_t ids[DEDUP_CGROUP_IDS])
{
    g_mutex_lock(&m->lock);
    refresh_levels(m);
    for (unsigned i = 0; i < DEDUP_CGROUP_IDS; i++) {
        ids[i] = i < m->nlevels ? m->level_id[i] : 0;
    }
    g_mutex_unlock(&m->lock);
}

unsigned dedup_hostmem_cgroup_rooms(DedupHostMem *m, DedupCgroupRoom *rooms)
{
    unsigned n = 0;

    g_mutex_lock(&m->lock);
    refresh_levels(m);
    for (unsigned i = 0; i < m->nlevels; i++) {
        uint64_t limit = 0;
        uint64_t bytes = level_room(m, m->level_fd[i], &limit);

        if (bytes != UINT64_MAX) {
            rooms[n++] = (DedupCgroupRoom) { m->level_id[i], bytes, limit };
        }
    }
    if (m->unknown) {
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

    if (lseek(m->maps_fd, 0, SEEK_SET) < 0) {
        return 0;
    }
    while ((len = read(m->maps_fd, buf, sizeof(buf))) > 0) {
        for (char *p = buf; (p = memchr(p, '\n', buf + len - p)); p++) {
            lines++;
        }
    }
    return len < 0 ? 0 : lines;
}

uint64_t dedup_hostmem_max_maps(DedupHostMem *m)
{
    char buf[32];
    ssize_t len = pread(m->max_maps_fd, buf, sizeof(buf) - 1, 0);

    if (len <= 0) {
        return 65530; /* the kernel's default */
    }
    buf[len] = '\0';
    return g_ascii_strtoull(buf, NULL, 10);
}
