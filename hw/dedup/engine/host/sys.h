/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine's system calls, one entry each.
 *
 * Every call that the kernel may refuse goes through here, so that a test can
 * have any of them refused: in a build with CONFIG_DEDUP_MUTANTS
 * dedup_sys_hook is asked before each.  In a release build sys_NAME() is
 * NAME() and nothing else.  tests/check/check_sys.py sees that no file of the
 * engine goes past it.
 *
 * Not here: what cannot fail if its arguments are right (close(), getpid(),
 * clock_gettime(), getrlimit(), sigaction(), ...).
 */

#ifndef DEDUP_SYS_H
#define DEDUP_SYS_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifdef CONFIG_DEDUP_MUTANTS
/**
 * struct DedupSysCall - a call that is about to be made; what it has not is 0
 * @name: of the function
 * @fd: descriptor
 * @addr: memory that it is about
 * @len: how much of it (of process_madvise(): ranges): may be made less
 * @arg: flags, advice, a request or command
 * @data: what the request points to: may be changed
 */
typedef struct DedupSysCall {
    const char *name;
    int fd;
    const void *addr;
    size_t *len;
    unsigned long arg;
    void *data;
} DedupSysCall;

/* Any thread.  Returns the errno with which it fails, or 0: it is made. */
extern int (*dedup_sys_hook)(DedupSysCall *call);

static inline bool dedup_sys_fails(DedupSysCall call)
{
    int error = dedup_sys_hook ? dedup_sys_hook(&call) : 0;

    if (error) {
        errno = error;
    }
    return error;
}

#define DEDUP_SYS_FAILS(what, ...) \
    dedup_sys_fails((DedupSysCall) { .name = #what, __VA_ARGS__ })
#else
#define DEDUP_SYS_FAILS(what, ...) false
#endif

/* sys_NAME(params): @call, or it says @failed. */
#define DEDUP_SYS(type, name, params, call, failed, ...)            \
    static inline type sys_##name params                            \
    {                                                               \
        return DEDUP_SYS_FAILS(name, __VA_ARGS__) ? failed : call;  \
    }

/* ---- memory ---- */

DEDUP_SYS(void *, mmap,
          (void *addr, size_t len, int prot, int flags, int fd, off_t at),
          mmap(addr, len, prot, flags, fd, at), MAP_FAILED,
          .addr = addr, .len = &len, .fd = fd, .arg = flags)
DEDUP_SYS(int, munmap, (void *addr, size_t len), munmap(addr, len), -1,
          .addr = addr)
DEDUP_SYS(void *, mremap,
          (void *addr, size_t old, size_t len, int flags, void *to),
          mremap(addr, old, len, flags, to), MAP_FAILED,
          .addr = to, .len = &len, .arg = flags)
DEDUP_SYS(int, mprotect, (void *addr, size_t len, int prot),
          mprotect(addr, len, prot), -1,
          .addr = addr, .len = &len, .arg = prot)
DEDUP_SYS(int, madvise, (void *addr, size_t len, int advice),
          madvise(addr, len, advice), -1,
          .addr = addr, .len = &len, .arg = advice)
DEDUP_SYS(ssize_t, process_madvise,
          (int pidfd, const struct iovec *iov, size_t n, int advice),
          syscall(SYS_process_madvise, pidfd, iov, n, advice, 0), -1,
          .fd = pidfd, .len = &n, .arg = advice)
DEDUP_SYS(int, mincore, (void *addr, size_t len, unsigned char *vec),
          mincore(addr, len, vec), -1, .addr = addr)

/* ---- files ---- */

DEDUP_SYS(int, open, (const char *path, int flags), open(path, flags), -1,
          .arg = flags)
DEDUP_SYS(int, openat, (int dir, const char *path, int flags, mode_t mode),
          openat(dir, path, flags, mode), -1, .fd = dir, .arg = flags)
DEDUP_SYS(int, memfd_create, (const char *name, unsigned flags),
          memfd_create(name, flags), -1, .arg = flags)
DEDUP_SYS(int, fcntl, (int fd, int command, unsigned long arg),
          fcntl(fd, command, arg), -1, .fd = fd, .arg = command)
DEDUP_SYS(int, fcntl_lock, (int fd, int command, struct flock *lock),
          fcntl(fd, command, lock), -1,
          .fd = fd, .arg = command, .data = lock)
DEDUP_SYS(int, ftruncate, (int fd, off_t size), ftruncate(fd, size), -1,
          .fd = fd)
DEDUP_SYS(int, fallocate, (int fd, int mode, off_t at, off_t len),
          fallocate(fd, mode, at, len), -1, .fd = fd, .arg = mode)
DEDUP_SYS(off_t, lseek, (int fd, off_t at, int whence),
          lseek(fd, at, whence), -1, .fd = fd, .arg = whence)
DEDUP_SYS(ssize_t, read, (int fd, void *buf, size_t len),
          read(fd, buf, len), -1, .fd = fd, .len = &len)
DEDUP_SYS(ssize_t, pread, (int fd, void *buf, size_t len, off_t at),
          pread(fd, buf, len, at), -1, .fd = fd, .len = &len)
DEDUP_SYS(ssize_t, pwrite, (int fd, const void *buf, size_t len, off_t at),
          pwrite(fd, buf, len, at), -1, .fd = fd, .len = &len)
DEDUP_SYS(int, stat, (const char *path, struct stat *st), stat(path, st), -1,
          .data = st)
DEDUP_SYS(int, lstat, (const char *path, struct stat *st), lstat(path, st),
          -1, .data = st)
DEDUP_SYS(int, fstat, (int fd, struct stat *st), fstat(fd, st), -1,
          .fd = fd, .data = st)
DEDUP_SYS(int, fstatat,
          (int dir, const char *path, struct stat *st, int flags),
          fstatat(dir, path, st, flags), -1, .fd = dir, .data = st)
DEDUP_SYS(int, fstatfs, (int fd, struct statfs *fs), fstatfs(fd, fs), -1,
          .fd = fd, .data = fs)
DEDUP_SYS(int, faccessat, (int dir, const char *path, int mode, int flags),
          faccessat(dir, path, mode, flags), -1, .fd = dir, .arg = mode)
DEDUP_SYS(int, mkdirat, (int dir, const char *path, mode_t mode),
          mkdirat(dir, path, mode), -1, .fd = dir)
DEDUP_SYS(int, unlinkat, (int dir, const char *path, int flags),
          unlinkat(dir, path, flags), -1, .fd = dir)
DEDUP_SYS(DIR *, fdopendir, (int fd), fdopendir(fd), NULL, .fd = fd)
DEDUP_SYS(void *, readdir, (void *dir), readdir(dir), NULL, .data = dir)
DEDUP_SYS(ssize_t, getrandom, (void *buf, size_t len, unsigned flags),
          getrandom(buf, len, flags), -1, .len = &len)

/* ---- what waits, and who ---- */

DEDUP_SYS(int, ioctl, (int fd, unsigned long request, void *arg),
          ioctl(fd, request, arg), -1,
          .fd = fd, .arg = request, .data = arg)
DEDUP_SYS(int, userfaultfd, (int flags), syscall(SYS_userfaultfd, flags), -1,
          .arg = flags)
DEDUP_SYS(int, poll, (struct pollfd *fds, nfds_t n, int ms),
          poll(fds, n, ms), -1, .data = fds)
DEDUP_SYS(int, eventfd, (unsigned value, int flags), eventfd(value, flags),
          -1, .arg = flags)
DEDUP_SYS(int, rt_tgsigqueueinfo, (pid_t pid, pid_t tid, siginfo_t *info),
          syscall(SYS_rt_tgsigqueueinfo, pid, tid, info->si_signo, info), -1,
          .data = info)
DEDUP_SYS(long, futex, (uint32_t *word, int op, uint32_t value),
          syscall(SYS_futex, word, op, value, NULL, NULL, 0), -1,
          .addr = word, .arg = op)
DEDUP_SYS(int, pidfd_open, (pid_t pid), syscall(SYS_pidfd_open, pid, 0), -1,
          .data = NULL)
DEDUP_SYS(GThread *, thread_new,
          (const char *name, GThreadFunc fn, void *arg, GError **error),
          g_thread_try_new(name, fn, arg, error), NULL, .data = arg)

/* ---- sockets ---- */

DEDUP_SYS(int, socket, (int domain, int type, int protocol),
          socket(domain, type, protocol), -1, .arg = type)
DEDUP_SYS(int, bind, (int fd, const struct sockaddr *addr, socklen_t len),
          bind(fd, addr, len), -1, .fd = fd)
DEDUP_SYS(int, listen, (int fd, int backlog), listen(fd, backlog), -1,
          .fd = fd)
DEDUP_SYS(int, connect, (int fd, const struct sockaddr *addr, socklen_t len),
          connect(fd, addr, len), -1, .fd = fd)
DEDUP_SYS(int, accept4,
          (int fd, struct sockaddr *addr, socklen_t *len, int flags),
          accept4(fd, addr, len, flags), -1, .fd = fd)
DEDUP_SYS(ssize_t, sendmsg, (int fd, const struct msghdr *msg, int flags),
          sendmsg(fd, msg, flags), -1, .fd = fd)
DEDUP_SYS(ssize_t, recvmsg, (int fd, struct msghdr *msg, int flags),
          recvmsg(fd, msg, flags), -1, .fd = fd, .data = msg)
DEDUP_SYS(int, getsockopt,
          (int fd, int level, int name, void *value, socklen_t *len),
          getsockopt(fd, level, name, value, len), -1, .fd = fd)

#endif /* DEDUP_SYS_H */
