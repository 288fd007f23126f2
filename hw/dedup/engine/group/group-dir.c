/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The directory that names a group: which may be one, how it is made and
 * opened, and whether it still is what its members hold open.
 *
 * Files in /run do not live for ever: a boot, a logout or somebody's rm takes
 * them away under live members.  A newcomer would find nobody then and begin a
 * group of its own.  So each member compares what it holds open with what the
 * path leads to, once in a while, and joins again if that is something else
 * (group-join.c).
 *
 * Thread: the scanner's, but for dedup_group_open_path().
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "group/group-internal.h"
#include "host/error.h"
#include "host/sys.h"

static bool same_file(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* File systems whose files are no files. */
static bool is_pseudo(int fd)
{
    static const unsigned types[] = {
        PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP_SUPER_MAGIC,
        CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, TRACEFS_MAGIC, SECURITYFS_MAGIC,
        DEVPTS_SUPER_MAGIC,
    };
    struct statfs fs;

    for (unsigned i = 0; sys_fstatfs(fd, &fs) == 0 && i < G_N_ELEMENTS(types);
         i++) {
        if ((unsigned)fs.f_type == types[i]) {
            return true;
        }
    }
    return false;
}

static bool refuse(const DedupGroup *g, const char *why, GError **error)
{
    g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_GROUP,
                "group directory '%s' %s", g->path, why);
    return false;
}

/* Is it something that nobody can mean by a group?  True if it is fine. */
static bool check_kind(const DedupGroup *g, GError **error)
{
    struct stat st, root;

    if (sys_fstat(g->dirfd, &st) == 0 && sys_stat("/", &root) == 0 &&
        same_file(&st, &root)) {
        return refuse(g, "is the root directory: name one that is for this "
                      "group only", error);
    }
    if (is_pseudo(g->dirfd)) {
        return refuse(g, "is on a file system of the kernel's own, where no "
                      "files can be made: name one on a tmpfs or a disk",
                      error);
    }
    return true;
}

bool dedup_group_open_path(DedupGroup *g, GError **error)
{
    struct stat st;

    if (g->dirfd >= 0) {
        close(g->dirfd);
    }
    g->open_errno = 0;
    g->dirfd = sys_open(g->path,
                        O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (g->dirfd < 0 && errno == ENOENT &&
        sys_mkdirat(AT_FDCWD, g->path, 0700) == 0) {
        g->dirfd = sys_open(g->path,
                            O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    }
    if (g->dirfd >= 0) {
        return check_kind(g, error);
    }
    g->open_errno = errno;
    if (sys_lstat(g->path, &st) == 0 && S_ISLNK(st.st_mode)) {
        return refuse(g, "is a symbolic link: name the directory itself",
                      error);
    }
    if (g->open_errno == ENOTDIR) {
        return refuse(g, "is not a directory", error);
    }
    return true; /* to be said when it is joined: a VM starts all the same */
}

/*
 * Did a look at a name find nothing?  Any other error (no permission, no
 * memory, a disk that fails) says nothing about the name, and leaving a group
 * for it would do harm.
 */
static bool is_missing(int error)
{
    return error == ENOENT || error == ENOTDIR;
}

bool dedup_group_is_replaced(int dirfd, const char *name, int fd)
{
    struct stat now, then;

    if (sys_fstatat(dirfd, name, &now, AT_SYMLINK_NOFOLLOW) < 0) {
        return is_missing(errno);
    }
    return sys_fstat(fd, &then) == 0 && !same_file(&now, &then);
}

/* The inode of our socket's name, or 0 and errno. */
static ino_t socket_ino(const DedupGroup *g)
{
    struct stat st;
    char name[16];

    snprintf(name, sizeof(name), DEDUP_GROUP_SOCKET, g->self);
    if (sys_fstatat(g->subfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0) {
        return 0;
    }
    errno = ENOENT;
    return S_ISSOCK(st.st_mode) ? st.st_ino : 0;
}

void dedup_group_note_socket(DedupGroup *g)
{
    g->socket_ino = socket_ino(g);
}

bool dedup_group_is_socket(const DedupGroup *g)
{
    return g->socket_ino && g->socket_ino == socket_ino(g);
}

static bool is_socket_replaced(const DedupGroup *g)
{
    ino_t ino = socket_ino(g);

    /* we may have failed to note it */
    return ino ? g->socket_ino && ino != g->socket_ino : is_missing(errno);
}

bool dedup_group_is_current(const DedupGroup *g)
{
    struct stat now, then;

    dedup_group_assert_scanner(g);
    if (!g->path || !g->has_slot) {
        return true;
    }
    if (dedup_group_is_replaced(g->dirfd, DEDUP_GROUP_SUBDIR "/slots",
                                g->slots_fd) ||
        is_socket_replaced(g)) {
        return false;
    }
    if (sys_fstat(g->dirfd, &then) < 0) {
        return true;
    }
    if (then.st_nlink == 0) {
        return false;
    }
    /* after chroot() the path may lead nowhere, which says nothing */
    return sys_lstat(g->path, &now) < 0 || same_file(&now, &then);
}

/*
 * Where a member listens: by the path that others see in /proc/net/unix, or
 * systemd-tmpfiles takes the socket for a dead one.  So it is what the kernel
 * calls the directory, which is not what we were told if that has a symbolic
 * link in it (/var/run).  By way of the open directory if the path is too long
 * for a socket, or leads elsewhere from here.
 */
void dedup_group_socket_address(const DedupGroup *g,
                                struct sockaddr_un *addr)
{
    g_autofree char *link = g_strdup_printf("/proc/self/fd/%d", g->subfd);
    g_autofree char *dir = g_file_read_link(link, NULL);
    g_autofree char *path = g_strdup_printf("%s/" DEDUP_GROUP_SOCKET,
                                            dir ? dir : link, g->self);
    struct stat seen, held;

    *addr = (struct sockaddr_un) { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof(addr->sun_path) || !dir ||
        sys_stat(dir, &seen) < 0 || sys_fstat(g->subfd, &held) < 0 ||
        !same_file(&seen, &held)) {
        g_free(path);
        path = g_strdup_printf("%s/" DEDUP_GROUP_SOCKET, link, g->self);
    }
    g_strlcpy(addr->sun_path, path, sizeof(addr->sun_path));
}
