/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Our cgroup, and those above it; see cgroup.h.
 *
 * Each is kept as a directory descriptor.  They are opened below the
 * hierarchy's mount point, which is kept open: its path may lead nowhere after
 * chroot().  The process may be moved to another cgroup at any time (libvirt,
 * Kata and cgrulesengd do so after QEMU has started), so /proc/self/cgroup is
 * read again at each look; the descriptors are opened anew if it says something
 * else.
 */

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host/cgroup.h"
#include "host/sys.h"

/* ---- files ---- */

char *dedup_cgroup_read(int level_fd, const char *name)
{
    char buf[16384];
    ssize_t len;
    int fd = sys_openat(level_fd, name, O_RDONLY | O_CLOEXEC, 0);
    int saved;

    if (fd < 0) {
        return NULL;
    }
    len = sys_read(fd, buf, sizeof(buf) - 1);
    saved = errno;
    close(fd);
    errno = saved;
    if (len <= 0) {
        errno = len ? errno : EIO; /* none of them is empty */
        return NULL;
    }
    return g_strndup(buf, len);
}

bool dedup_cgroup_is_absent(int error)
{
    return error == ENOENT || error == ENODEV;
}

bool dedup_find_number(const char *text, const char *name, uint64_t *value)
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

/* ---- where we are ---- */

/*
 * The path of our cgroup below the hierarchy's mount point.  A line
 * of /proc/self/cgroup is "0::PATH" (version 2) or "N:CONTROLLERS:PATH".
 */
static char *path_of(const char *text, const char *controller, bool v2)
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

            if (g_strv_contains((const char * const *)names, controller)) {
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
static char *mount_of(const char *text, const char *controller, bool v2,
                      char **root)
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
                g_strv_contains((const char * const *)options, controller)) {
                *root = g_strdup(f[3]);
                return g_strdup(f[4]);
            }
        }
    }
    return NULL;
}

/* May it be another time?  Then we have a limit that we do not see. */
static bool is_passing(int error)
{
    return error == ENOMEM || error == EMFILE || error == ENFILE ||
           error == EINTR || error == EAGAIN || error == EIO;
}

/* Find where the hierarchy with the controller is mounted. */
static bool find_mount(DedupCgroups *c, const char *cgroups,
                       const char *mounts, bool v2)
{
    g_autofree char *path = path_of(cgroups, c->controller, v2);
    g_autofree char *root = NULL;
    g_autofree char *point = mount_of(mounts, c->controller, v2, &root);

    if (!path || !point) {
        return false;
    }
    c->point_fd = sys_open(point, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (c->point_fd < 0) {
        c->unknown |= is_passing(errno);
        return false;
    }
    c->root = g_steal_pointer(&root);
    c->v2 = v2;
    return true;
}

static char *proc_read(const DedupCgroups *c, const char *name)
{
    g_autofree char *path = g_build_filename(c->proc, name, NULL);
    int fd = sys_open(path, O_RDONLY | O_CLOEXEC);
    GString *text = g_string_new(NULL);
    char buf[4096];
    ssize_t len = -1;
    int saved;

    while (fd >= 0 && (len = sys_read(fd, buf, sizeof(buf))) > 0) {
        g_string_append_len(text, buf, len);
    }
    saved = errno;
    if (fd >= 0) {
        close(fd);
    }
    errno = saved;
    return g_string_free(text, len < 0);
}

/* What is needed to see our cgroups; what of it fails is tried again. */
static void find(DedupCgroups *c)
{
    g_autofree char *path = g_build_filename(c->proc, "self/cgroup", NULL);
    g_autofree char *cgroups = NULL, *mounts = NULL;

    if (c->cgroup_fd < 0) {
        c->cgroup_fd = sys_open(path, O_RDONLY | O_CLOEXEC);
    }
    cgroups = c->cgroup_fd < 0 ? NULL : proc_read(c, "self/cgroup");
    mounts = cgroups ? proc_read(c, "self/mountinfo") : NULL;
    c->unknown = !mounts && is_passing(errno);
    /* a hybrid host has both; then version 1 has the controller */
    if (mounts && !find_mount(c, cgroups, mounts, false) && !c->unknown) {
        find_mount(c, cgroups, mounts, true);
    }
}

static void close_levels(DedupCgroups *c)
{
    while (c->nlevels) {
        close(c->level_fd[--c->nlevels]);
    }
}

/* Open the cgroup that @cgroups names, and those above it. */
static void open_levels(DedupCgroups *c, const char *cgroups)
{
    g_autofree char *path = path_of(cgroups, c->controller, c->v2);
    g_autofree char *below = NULL;
    size_t len = strlen(c->root);
    bool is_part = path && strcmp(c->root, "/") != 0 &&
                   g_str_has_prefix(path, c->root) &&
                   (!path[len] || path[len] == '/');
    char *slash;

    close_levels(c);
    c->unknown = false;
    if (!path) {
        return;
    }
    /* a container sees its own part */
    below = g_strconcat(".", is_part ? path + len : path, NULL);
    do {
        struct stat st;
        int fd = sys_openat(c->point_fd, below,
                            O_PATH | O_DIRECTORY | O_CLOEXEC, 0);

        if (fd >= 0 && sys_fstat(fd, &st) == 0) {
            c->level_id[c->nlevels] = st.st_ino;
            c->level_fd[c->nlevels++] = fd;
        } else {
            c->unknown |= !dedup_cgroup_is_absent(errno);
            if (fd >= 0) {
                close(fd);
            }
        }
        slash = strrchr(below, '/');
        if (slash) {
            *slash = '\0';
        }
    } while (slash && c->nlevels < DEDUP_CGROUP_LEVELS - 1);
}

void dedup_cgroups_refresh(DedupCgroups *c)
{
    char buf[16384];
    ssize_t len;

    if (c->point_fd < 0 && c->unknown) {
        find(c);
    }
    if (c->point_fd < 0) {
        return;
    }
    len = sys_pread(c->cgroup_fd, buf, sizeof(buf) - 1, 0);
    if (len <= 0) {
        /* where we were is the best guess, if that was ever known */
        c->unknown |= !c->cgroups;
        return;
    }
    buf[len] = '\0';
    if (c->unknown || g_strcmp0(buf, c->cgroups) != 0) {
        open_levels(c, buf);
        g_free(c->cgroups);
        c->cgroups = g_strdup(buf);
    }
}

/* ---- life ---- */

void dedup_cgroups_init(DedupCgroups *c, const char *proc,
                        const char *controller)
{
    *c = (DedupCgroups) {
        .controller = controller,
        .proc = g_strdup(proc),
        .point_fd = -1,
        .cgroup_fd = -1,
        .unknown = true,
    };
    dedup_cgroups_refresh(c); /* while there are descriptors */
}

void dedup_cgroups_clear(DedupCgroups *c)
{
    if (c->cgroup_fd >= 0) {
        close(c->cgroup_fd);
    }
    close_levels(c);
    if (c->point_fd >= 0) {
        close(c->point_fd);
    }
    g_free(c->proc);
    g_free(c->cgroups);
    g_free(c->root);
}
