/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A group's directory: who may use it, how to join and leave, and who lives.
 *
 *   DIR/v1-4k/       one sub-group per protocol version and page size
 *     lock           locked (byte 0) while somebody joins
 *     slots          member k holds a lock on byte k as long as it lives;
 *                    another byte is the lock of the table of segments
 *     m<k>.sock      where member k listens
 *
 * What the locks are, group-locks.c says.  A name of a socket whose slot is not
 * locked is stale and removed by who joins next.
 *
 * A joiner holds the join lock from before it looks for members until it
 * listens.  So there is never more than one that finds nobody and makes a
 * new file, and whoever holds a slot can be asked.  Where somebody takes the
 * file of that lock away meanwhile, who holds the old one gives up in the end.
 *
 * Thread: the scanner's.
 */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "group/group-internal.h"
#include "host/error.h"
#include "host/sys.h"

#define SUBDIR DEDUP_GROUP_SUBDIR

/* A join gives up after this: somebody was stopped in the middle of it. */
#define JOIN_TIMEOUT_MS 3000
#define JOIN_RETRY_US 10000

/* Names of the directory that are looked at: an enemy can make a million. */
#define NAMES_MOST 256

G_GNUC_PRINTF(3, 4)
static bool group_error(const DedupGroup *g, GError **error,
                        const char *format, ...)
{
    va_list args;

    va_start(args, format);
    g_propagate_error(error, g_error_new_valist(DEDUP_ERROR,
                                                DEDUP_ERROR_GROUP, format,
                                                args));
    va_end(args);
    g_prefix_error(error, "group directory '%s': ", g->path);
    return false;
}

/*
 * The directory must be safe from others: they could replace the socket and
 * the locks in it.
 */
static bool check_owner(const DedupGroup *g, int fd, const char *name,
                        GError **error)
{
    struct stat st;

    if (sys_fstat(fd, &st) < 0) {
        return group_error(g, error, "cannot examine %s: %s", name,
                           g_strerror(errno));
    }
    if (st.st_uid != geteuid() && st.st_uid != 0) {
        return group_error(g, error, "%s belongs to user %u, but this process"
                           " runs as user %u: make user %u its owner (chown),"
                           " or choose a directory of its own", name,
                           (unsigned)st.st_uid, (unsigned)geteuid(),
                           (unsigned)geteuid());
    }
    if (st.st_mode & (S_IWGRP | S_IWOTH)) {
        return group_error(g, error, "%s (owner %u, mode %04o) is writable"
                           " for others than its owner: take that away"
                           " (chmod go-w)", name, (unsigned)st.st_uid,
                           st.st_mode & 07777);
    }
    return true;
}

static bool open_directory(DedupGroup *g, GError **error)
{
    struct stat held, seen;

    /* somebody may have made it, or put another in its place */
    if (g->dirfd < 0 || sys_fstat(g->dirfd, &held) < 0 || !held.st_nlink ||
        (sys_lstat(g->path, &seen) == 0 && (seen.st_dev != held.st_dev ||
                                            seen.st_ino != held.st_ino))) {
        if (!dedup_group_open_path(g, error)) {
            return false;
        }
    }
    if (g->open_errno == ENOENT) {
        return group_error(g, error, "it is not there and cannot be made:"
                           " run mkdir -p -m 700 %s as user %u", g->path,
                           (unsigned)geteuid());
    }
    if (g->open_errno) {
        return group_error(g, error, "cannot open it as user %u: %s",
                           (unsigned)geteuid(), g_strerror(g->open_errno));
    }
    if (!check_owner(g, g->dirfd, "it", error)) {
        return false;
    }
    if (sys_mkdirat(g->dirfd, SUBDIR, 0700) < 0 && errno != EEXIST) {
        return group_error(g, error, "cannot create '" SUBDIR "' in it as"
                           " user %u: %s", (unsigned)geteuid(),
                           g_strerror(errno));
    }
    g->subfd = sys_openat(g->dirfd, SUBDIR,
                          O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
    if (g->subfd < 0) {
        return group_error(g, error, "cannot open '" SUBDIR "' in it as user"
                           " %u: %s", (unsigned)geteuid(),
                           g_strerror(errno));
    }
    if (sys_faccessat(AT_FDCWD, "/proc/self/fd", F_OK, 0) < 0) {
        return group_error(g, error, "it is reached by way of /proc/self/fd,"
                           " which is not there: mount /proc where"
                           " -run-with chroot= leads");
    }
    return check_owner(g, g->subfd, "'" SUBDIR "' in it", error);
}

static int open_file(DedupGroup *g, const char *name, GError **error)
{
    int fd = sys_openat(g->subfd, name,
                        O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC,
                        0600);

    if (fd < 0) {
        group_error(g, error, "cannot open '" SUBDIR "/%s' in it as user %u:"
                    " %s", name, (unsigned)geteuid(), g_strerror(errno));
    }
    return fd;
}

/* Who joins waits for others: until when, and may it? */
typedef struct Patience {
    int64_t deadline;
    const DedupGroupOps *ops;
    void *opaque;
} Patience;

static bool is_over(const Patience *p)
{
    return g_get_monotonic_time() > p->deadline ||
           (p->ops->is_stopping && p->ops->is_stopping(p->opaque));
}

/* Returns a descriptor that holds the join lock, or -1. */
static int join_lock(DedupGroup *g, const Patience *patience, GError **error)
{
    int fd = open_file(g, "lock", error);
    int err;

    if (fd < 0) {
        return -1;
    }
    while ((err = dedup_group_byte_lock(fd, F_WRLCK, 0)) != 0) {
        if (err != EAGAIN && err != EACCES) {
            group_error(g, error, "cannot lock '" SUBDIR "/lock' in it: %s",
                        g_strerror(err));
        } else if (is_over(patience)) {
            group_error(g, error, "another process has been joining the"
                        " group for more than %d seconds; is it stopped?",
                        JOIN_TIMEOUT_MS / 1000);
        } else {
            g_usleep(JOIN_RETRY_US);
            continue;
        }
        close(fd);
        return -1;
    }
    return fd;
}

static void socket_name(char *name, size_t size, unsigned member)
{
    snprintf(name, size, DEDUP_GROUP_SOCKET, member);
}

/*
 * Is there a member that holds no lock that we see?  Its "slots" was deleted,
 * and it has not noticed yet.
 */
static bool is_hidden(const DedupGroup *g, unsigned member)
{
    struct stat st;
    char name[16];

    socket_name(name, sizeof(name), member);
    return sys_fstatat(g->subfd, name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
           dedup_peer_is_listening(g->subfd, member);
}

/*
 * Take the shared file from the first living member that answers.  Returns
 * true with @file open, or true without it when nobody lives.
 */
static bool find_file(DedupGroup *g, const Patience *patience,
                      GError **error)
{
    bool refused[DEDUP_MAX_MEMBERS] = { false };

    for (;;) {
        bool locked[DEDUP_MAX_MEMBERS];
        GError *local = NULL;
        unsigned live = 0;
        bool left = false;

        if (!dedup_group_locked_slots(g->slots_fd, locked)) {
            return group_error(g, error, "cannot see who has locked '" SUBDIR
                               "/slots' in it: %s", g_strerror(errno));
        }
        for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
            int64_t ms = (patience->deadline - g_get_monotonic_time()) /
                         G_TIME_SPAN_MILLISECOND;
            DedupPeer peer = DEDUP_PEER_INIT;
            int fd = -1;

            if (!locked[k] && !is_hidden(g, k)) {
                continue;
            }
            live++;
            if (refused[k] || ms <= 0 || is_over(patience)) {
                continue;
            }
            ms = MIN(ms, DEDUP_PEER_TIMEOUT_MS);
            if (dedup_peer_connect(&peer, g->subfd, k, ms)) {
                fd = dedup_peer_hello(&peer, ms);
                dedup_peer_close(&peer);
            }
            if (fd < 0) {
                left = true;    /* slow, or just leaving: ask again */
                continue;
            }
            if (dedup_group_file_accept(&g->file, fd, &local)) {
                return true;
            }
            refused[k] = true;
            if (g_error_matches(local, DEDUP_ERROR, DEDUP_ERROR_MEMORY)) {
                g_propagate_error(error, local);
                return false;
            }
            g_clear_error(&local);
        }
        if (live == 0) {
            return true;
        }
        if (!left || is_over(patience)) {
            return group_error(g, error, "it has %u live member%s, and none"
                               " answered properly; are they stopped?",
                               live, live == 1 ? "" : "s");
        }
        g_usleep(JOIN_RETRY_US);
    }
}

/* Take slot @k, and remove what a dead member left there. */
static bool try_slot(DedupGroup *g, unsigned k)
{
    char name[16];

    if (dedup_group_byte_lock(g->slots_fd, F_WRLCK, k) != 0) {
        return false;
    }
    if (is_hidden(g, k)) {
        dedup_group_byte_lock(g->slots_fd, F_UNLCK, k);
        return false;
    }
    socket_name(name, sizeof(name), k);
    sys_unlinkat(g->subfd, name, 0);
    g->self = k;
    return true;
}

/* Names that dead members left. */
static void remove_stale(DedupGroup *g)
{
    bool locked[DEDUP_MAX_MEMBERS];

    if (!dedup_group_locked_slots(g->slots_fd, locked)) {
        return; /* who joins next does it */
    }
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        char name[16];

        if (k != g->self && !locked[k] && !is_hidden(g, k)) {
            socket_name(name, sizeof(name), k);
            sys_unlinkat(g->subfd, name, 0);
        }
    }
}

static bool take_slot(DedupGroup *g, GError **error)
{
    bool taken = g->kept.resumed && try_slot(g, g->kept.self);

    g->kept.resumed = taken;
    for (unsigned k = 0; !taken && k < DEDUP_MAX_MEMBERS; k++) {
        taken = try_slot(g, k);
    }
    if (!taken) {
        return group_error(g, error, "the group is full (%u members)",
                           DEDUP_MAX_MEMBERS);
    }
    remove_stale(g);
    return true;
}

/*
 * The shared file: another member's, or the one that we had before our files
 * went, or a new one.
 */
static bool get_file(DedupGroup *g, const Patience *patience, GError **error)
{
    struct stat kept, found;

    g->kept.resumed = false;
    if (!find_file(g, patience, error)) {
        return false;
    }
    if (g->kept.file.fd < 0) {
        return g->file.fd >= 0 || dedup_group_file_create(&g->file, error);
    }
    if (g->file.fd < 0) {
        g->kept.resumed = true;
    } else if (sys_fstat(g->kept.file.fd, &kept) == 0 &&
               sys_fstat(g->file.fd, &found) == 0) {
        g->kept.resumed = kept.st_ino == found.st_ino &&
                     kept.st_dev == found.st_dev;
    }
    if (g->kept.resumed) {
        /* what the index is mapped at is in use */
        dedup_group_file_close(&g->file);
        g->file = g->kept.file;
        g->kept.file = (DedupGroupFile) { .fd = -1 };
    }
    return true;
}

static int listen_socket(DedupGroup *g, GError **error)
{
    struct sockaddr_un addr;
    int fd = sys_socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC,
                        0);

    dedup_group_socket_address(g, &addr);
    if (fd < 0 ||
        sys_bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 ||
        sys_listen(fd, DEDUP_MAX_MEMBERS) < 0) {
        group_error(g, error, "cannot listen in it as user %u: %s",
                    (unsigned)geteuid(), g_strerror(errno));
        if (fd >= 0) {
            close(fd);
        }
        return -1;
    }
    dedup_group_note_socket(g);
    return fd;
}

bool dedup_group_join_directory(DedupGroup *g, const DedupGroupOps *ops,
                                void *opaque, GError **error)
{
    const Patience patience = {
        .deadline = g_get_monotonic_time() +
                    JOIN_TIMEOUT_MS * G_TIME_SPAN_MILLISECOND,
        .ops = ops,
        .opaque = opaque,
    };
    int lock = -1, sock = -1;
    bool ok = false;

    if (!open_directory(g, error)) {
        goto out;
    }
    lock = join_lock(g, &patience, error);
    if (lock < 0) {
        goto out;
    }
    g->slots_fd = open_file(g, "slots", error);
    if (g->slots_fd < 0 || !get_file(g, &patience, error) ||
        !take_slot(g, error)) {
        goto out;
    }
    g->has_slot = true;
    if (!g->kept.resumed && !dedup_group_slot_clear(g, error)) {
        goto out;
    }
    sock = listen_socket(g, error);
    if (sock < 0) {
        goto out;
    }
    if (dedup_group_is_replaced(g->subfd, "lock", lock)) {
        group_error(g, error, "its files were deleted or replaced while this"
                    " process joined it");
        close(sock);
        goto out;
    }
    g->server = dedup_peer_server_new(sock, g->file.fd, g->self, ops, opaque,
                                      &g->cpu_ns, error);
    ok = g->server != NULL;
    if (ok) {
        dedup_group_file_close(&g->kept.file);
    }
out:
    if (!ok) {
        if (g->has_slot && g->kept.resumed) {
            /* for the next try */
            dedup_group_detach(g);
        }
        dedup_group_leave_directory(g);
    }
    if (lock >= 0) {
        close(lock);
    }
    return ok;
}

void dedup_group_leave_directory(DedupGroup *g)
{
    dedup_peer_server_free(g->server);
    g->server = NULL;
    if (g->has_slot) {
        DedupSlot none = { .incarnation = 0 };
        char name[16];

        /* All before the slot is given back: then it may be another's. */
        socket_name(name, sizeof(name), g->self);
        if (dedup_group_is_socket(g)) {
            sys_unlinkat(g->subfd, name, 0);
        }
        if (g->file.fd >= 0) {
            dedup_group_file_write(&g->file, &none, sizeof(none),
                                   DEDUP_FILE_SLOTS +
                                   g->self * sizeof(none));
            sys_fallocate(g->file.fd,
                          FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          DEDUP_FILE_USE + g->self * DEDUP_FILE_ROW,
                          DEDUP_FILE_ROW);
        }
        g->has_slot = false;
    }
    if (g->slots_fd >= 0) {
        close(g->slots_fd);
        g->slots_fd = -1;
    }
    if (g->subfd >= 0) {
        close(g->subfd);
        g->subfd = -1;
    }
    dedup_group_file_close(&g->file);
}

bool dedup_group_resumed(const DedupGroup *g)
{
    dedup_group_assert_scanner(g);
    return g->kept.resumed;
}

void dedup_group_detach(DedupGroup *g)
{
    dedup_group_assert_scanner(g);
    g_assert(g->has_slot && g->kept.file.fd < 0);
    /* who is looking at the others has seen them; nobody looks any more */
    g_mutex_lock(&g->lock);
    __atomic_store_n(&g->joined, false, __ATOMIC_RELEASE);
    g_mutex_unlock(&g->lock);
    g->kept.file = g->file;
    g->kept.self = g->self;
    g->file = (DedupGroupFile) { .fd = -1 };
    for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
        dedup_peer_close(&g->client[k].peer);
        __atomic_store_n(&g->alive[k], false, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&g->members, 0, __ATOMIC_RELAXED);
    dedup_group_leave_directory(g);
}

unsigned dedup_group_count_incompatible(const DedupGroup *g)
{
    int fd = sys_openat(g->dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    DIR *dir = fd < 0 ? NULL : sys_fdopendir(fd);
    struct dirent *d;
    unsigned n = 0;

    if (!dir) {
        if (fd >= 0) {
            close(fd);
        }
        return 0;
    }
    for (unsigned i = 0; i < NAMES_MOST && (d = sys_readdir(dir)); i++) {
        char *name;
        struct stat st;
        int slots;

        if (d->d_name[0] != 'v' || !strchr(d->d_name, '-') ||
            strcmp(d->d_name, SUBDIR) == 0) {
            continue;
        }
        name = g_strdup_printf("%s/slots", d->d_name);
        slots = sys_openat(g->dirfd, name,
                           O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0);
        g_free(name);
        if (slots < 0) {
            continue;
        }
        if (sys_fstat(slots, &st) == 0 && S_ISREG(st.st_mode)) {
            bool locked[DEDUP_MAX_MEMBERS];

            /* what it finds until it fails is there */
            dedup_group_locked_slots(slots, locked);
            for (unsigned k = 0; k < DEDUP_MAX_MEMBERS; k++) {
                n += locked[k];
            }
        }
        close(slots);
    }
    closedir(dir);
    return n;
}
