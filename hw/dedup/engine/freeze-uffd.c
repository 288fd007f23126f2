/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Freezing by userfaultfd's write protection.
 *
 * A range is registered for the length of one window only: that is cheap
 * (under a microsecond), while a standing registration of a whole block
 * costs as much as the block has maps, and would exclude everybody else who
 * needs a userfaultfd (postcopy, background snapshots).
 *
 * No event is ever read.  A writer that meets a protected page queues itself
 * in the kernel and sleeps; dedup_freeze_end() lifts the protection and
 * wakes the range.  KVM, vhost-net and system calls wait in the same queue,
 * because the descriptor covers faults of the kernel.
 *
 * Facts of the kernel that the code leans on (Linux 5.19 to 6.18):
 * - WRITEPROTECT flushes the TLB before it returns.
 * - REGISTER works mapping by mapping and does not undo what it did when it
 *   fails with ENOMEM; registering again adds modes.
 * - UNREGISTER clears the protection of all pages of the range that are
 *   still registered (Linux 6.0) and passes over what was mapped there
 *   meanwhile; it does not wake.
 * - WAKE works on any range, registered or not.
 * - close() clears and wakes everything.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "engine.h"
#include "freeze.h"
#include "mutant.h"
#include "page.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif

/* Linux before 6.1: UNREGISTER may leave pages protected. */
static bool thaw_each;

static bool kernel_is_older(unsigned major, unsigned minor)
{
    struct utsname name;
    unsigned has_major, has_minor;

    if (uname(&name) < 0 ||
        sscanf(name.release, "%u.%u", &has_major, &has_minor) != 2) {
        return true;
    }
    return has_major < major || (has_major == major && has_minor < minor);
}

static int uffd_open(void)
{
    int dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int fd = -1;

    if (dev >= 0) {
        fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(dev);
    }
    if (fd < 0) {
        /* without UFFD_USER_MODE_ONLY: CAP_SYS_PTRACE or the sysctl */
        fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    }
    return fd;
}

int dedup_freeze_open(GError **error)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP |
                    UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    };
    int fd = uffd_open();

    if (fd < 0) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_USERFAULTFD,
                    "no userfaultfd that covers kernel faults: %s",
                    g_strerror(errno));
        return -1;
    }
    if (ioctl(fd, UFFDIO_API, &api) < 0) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_USERFAULTFD,
                    "userfaultfd cannot write-protect shared memory "
                    "(Linux 5.19 or newer is needed): %s",
                    g_strerror(errno));
        close(fd);
        return -1;
    }
    thaw_each = kernel_is_older(6, 1);
    return fd;
}

static bool uffd_writeprotect(int uffd, void *addr, size_t len, bool on)
{
    struct uffdio_writeprotect wp = {
        .range = { .start = (uintptr_t)addr, .len = len },
        .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP
                   : UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
    };
    int ret;

    /* EAGAIN: the process's mappings are changing (a fork event) */
    do {
        ret = ioctl(uffd, UFFDIO_WRITEPROTECT, &wp);
    } while (ret < 0 && errno == EAGAIN);
    return ret == 0;
}

/*
 * Linux before 6.3 refuses a range of more than one mapping; then every page
 * is protected on its own.
 */
static bool uffd_protect_each(int uffd, uint8_t *addr, size_t len)
{
    for (size_t off = 0; off < len; off += DEDUP_PAGE_SIZE) {
        if (!uffd_writeprotect(uffd, addr + off, DEDUP_PAGE_SIZE, true)) {
            return false;
        }
    }
    return true;
}

static bool uffd_register(int uffd, void *addr, size_t len, bool missing)
{
    struct uffdio_register reg = {
        .range = { .start = (uintptr_t)addr, .len = len },
        .mode = UFFDIO_REGISTER_MODE_WP |
                (missing ? UFFDIO_REGISTER_MODE_MISSING : 0),
    };

    return ioctl(uffd, UFFDIO_REGISTER, &reg) == 0;
}

bool dedup_freeze_begin(int *uffd, void *addr, size_t len, bool missing)
{
    int saved;

    if (DEDUP_MUTANT(NO_FREEZE)) {
        return true;
    }
    if (!uffd_register(*uffd, addr, len, missing)) {
        saved = errno;
        if (saved == ENOMEM) {
            /* some of its mappings may be registered already */
            dedup_freeze_end(uffd, addr, len);
        }
        errno = saved;
        return false;
    }
    if (uffd_writeprotect(*uffd, addr, len, true) ||
        (errno == ENOENT && uffd_protect_each(*uffd, addr, len))) {
        return true;
    }
    saved = errno;
    dedup_freeze_end(uffd, addr, len);
    errno = saved;
    return false;
}

bool dedup_freeze_readers(int uffd, void *addr, size_t len)
{
    return DEDUP_MUTANT(NO_FREEZE) || uffd_register(uffd, addr, len, true);
}

void dedup_freeze_unprotect(int uffd, void *addr, size_t len)
{
    if (!DEDUP_MUTANT(NO_FREEZE)) {
        /* what it leaves protected, dedup_freeze_end() does not */
        uffd_writeprotect(uffd, addr, DEDUP_FAIL(UNPROTECT) ? DEDUP_PAGE_SIZE
                                                            : len, false);
    }
}

/* Old kernels: lift the protection wherever our registration survives. */
static void uffd_thaw_each(int uffd, uint8_t *addr, size_t len)
{
    if (uffd_writeprotect(uffd, addr, len, false)) {
        return;
    }
    for (size_t off = 0; off < len; off += DEDUP_PAGE_SIZE) {
        /* ENOENT: something else is mapped there now */
        uffd_writeprotect(uffd, addr + off, DEDUP_PAGE_SIZE, false);
    }
}

void dedup_freeze_end(int *uffd, void *addr, size_t len)
{
    struct uffdio_range range = { .start = (uintptr_t)addr, .len = len };

    if (DEDUP_MUTANT(NO_FREEZE)) {
        return;
    }
    if (thaw_each) {
        uffd_thaw_each(*uffd, addr, len);
    }
    if (DEDUP_FAIL(UNREGISTER) ||
        ioctl(*uffd, UFFDIO_UNREGISTER, &range) < 0) {
        /*
         * Out of kernel memory while VMAs are joined.  Closing needs none,
         * thaws all and wakes all; there are no windows until the engine has
         * got another one.
         */
        close(*uffd);
        *uffd = -1;
        return;
    }
    if (!DEDUP_MUTANT(NO_WAKE)) {
        /* cannot fail on a range that was registered */
        ioctl(*uffd, UFFDIO_WAKE, &range);
    }
}

bool dedup_freeze_refill(int uffd, void *addr, const void *content)
{
    struct uffdio_copy copy = {
        .dst = (uintptr_t)addr,
        .src = (uintptr_t)content,
        .len = DEDUP_PAGE_SIZE,
    };
    int ret;

    do {
        copy.copy = 0;
        ret = ioctl(uffd, UFFDIO_COPY, &copy);
    } while (ret < 0 && (errno == EAGAIN || errno == ENOMEM));
    return ret == 0;
}
