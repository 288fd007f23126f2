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
 * in the kernel and sleeps; the end of the window lifts the protection and
 * wakes the range.  KVM, vhost-net and system calls wait in the same queue,
 * because the descriptor covers faults of the kernel.
 *
 * Facts of the kernel that the code leans on (Linux 6.1 to 6.18):
 * - WRITEPROTECT flushes the TLB before it returns.
 * - REGISTER works mapping by mapping and does not undo what it did when it
 *   fails with ENOMEM; registering again replaces the modes, and what is
 *   protected stays so.
 * - UNREGISTER clears the protection of all pages of the range that are
 *   still registered and passes over what was mapped there meanwhile; it does
 *   not wake who waits for a protected page.
 * - WAKE works on any range, registered or not.
 * - close() ends all registrations and wakes everybody, when the last copy of
 *   the descriptor is gone (a child may have one until it executes).
 *
 * Linux before 6.1 is refused: there a protected page of shared memory could
 * become writable when it was migrated.  Linux 6.12 to 6.17 may lose the
 * protection of a page of zeros when the large folio that it is part of is
 * split (mended in the stable releases of October 2025), which
 * uffd_survives_split() looks for.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "host/error.h"
#include "host/freeze-ops.h"
#include "host/mutant.h"
#include "host/page.h"
#include "host/pagemap.h"
#include "host/sys.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#define HUGE_SIZE (2UL << 20)

#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif

/* Linux 6.8 and 6.6; who drops pages in a window runs 6.16 or newer. */
struct dedup_uffdio_move {
    __u64 dst;
    __u64 src;
    __u64 len;
    __u64 mode;
    __s64 move;
};
#define DEDUP_UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct dedup_uffdio_move)

struct dedup_uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define DEDUP_UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct dedup_uffdio_poison)

/* How often the kernel is asked to fill a page, in vain. */
#define FILL_TRIES 16
/* Not even a mark could be put there: how long until all is tried again. */
#define FILL_PAUSE_NS 1000000

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

#define DEVICE "/dev/userfaultfd"

/* Why the device gives none, and what to do about it. */
static char *device_error(int error)
{
    switch (error) {
    case ENOENT:
        return g_strdup(DEVICE " is not there: make it visible to QEMU "
                        "(libvirt: cgroup_device_acl in qemu.conf)");
    case EACCES:
    case EPERM:
        return g_strdup_printf(DEVICE " may not be opened by user %u: give "
                               "it the right to read and write it, and allow "
                               "it in the device cgroup",
                               (unsigned)geteuid());
    default:
        return g_strdup_printf(DEVICE ": %s", g_strerror(error));
    }
}

/* The same for the system call. */
static char *call_error(int error)
{
    switch (error) {
    case EPERM:
        return g_strdup("the system call is not permitted: give QEMU "
                        "CAP_SYS_PTRACE, or set the sysctl "
                        "vm.unprivileged_userfaultfd to 1");
    case ENOSYS:
        return g_strdup("the system call is not there: the kernel lacks "
                        "CONFIG_USERFAULTFD, or a seccomp filter hides it");
    default:
        return g_strdup_printf("the system call: %s", g_strerror(error));
    }
}

static int new_uffd(GError **error)
{
    g_autofree char *device = NULL, *call = NULL;
    int dev = sys_open(DEVICE, O_RDWR | O_CLOEXEC);
    int fd = -1;

    if (dev >= 0) {
        fd = sys_ioctl(dev, USERFAULTFD_IOC_NEW,
                       GINT_TO_POINTER(O_CLOEXEC | O_NONBLOCK));
    }
    device = fd < 0 ? device_error(errno) : NULL;
    if (dev >= 0) {
        close(dev);
    }
    if (fd < 0) {
        /* without UFFD_USER_MODE_ONLY: CAP_SYS_PTRACE or the sysctl */
        fd = sys_userfaultfd(O_CLOEXEC | O_NONBLOCK);
    }
    if (fd < 0) {
        call = call_error(errno);
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_USERFAULTFD,
                    "no userfaultfd that covers kernel faults can be had. "
                    "Either: %s. Or: %s", device, call);
    }
    return fd;
}

static bool uffd_open(DedupFreezer *f, GError **error)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP |
                    UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
                    UFFD_FEATURE_MINOR_SHMEM,
    };
    int fd;

    if (kernel_is_older(6, 1)) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_USERFAULTFD,
                    "Linux 6.1 or newer is needed to write-protect shared "
                    "memory");
        return false;
    }
    fd = new_uffd(error);
    if (fd < 0) {
        return false;
    }
    if (sys_ioctl(fd, UFFDIO_API, &api) < 0) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_USERFAULTFD,
                    "userfaultfd cannot write-protect shared memory: %s",
                    g_strerror(errno));
        close(fd);
        return false;
    }
    f->uffd = fd;
    return true;
}

static void uffd_close(DedupFreezer *f)
{
    if (f->uffd >= 0) {
        close(f->uffd);
        f->uffd = -1;
    }
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
        ret = sys_ioctl(uffd, UFFDIO_WRITEPROTECT, &wp);
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

static bool uffd_register(int uffd, void *addr, size_t len, uint64_t mode)
{
    struct uffdio_register reg = {
        .range = { .start = (uintptr_t)addr, .len = len },
        .mode = UFFDIO_REGISTER_MODE_WP | mode,
    };

    return sys_ioctl(uffd, UFFDIO_REGISTER, &reg) == 0;
}

static void uffd_end(DedupFrozen *z)
{
    DedupFreezer *f = z->freezer;
    struct uffdio_range range = { .start = (uintptr_t)z->addr,
                                  .len = z->len };

    if (sys_ioctl(f->uffd, UFFDIO_UNREGISTER, &range) < 0) {
        /*
         * Out of kernel memory while VMAs are joined.  Closing needs none,
         * thaws all and wakes all; there are no windows until the engine has
         * got another one.  By hand as well, in case a child has it, too.
         */
        for (size_t off = 0; off < z->len; off += DEDUP_PAGE_SIZE) {
            /* ENOENT: something else is mapped there now */
            uffd_writeprotect(f->uffd, z->addr + off, DEDUP_PAGE_SIZE,
                              false);
        }
        sys_ioctl(f->uffd, UFFDIO_WAKE, &range);
        uffd_close(f);
        __atomic_store_n(&f->lost, true, __ATOMIC_RELAXED);
        return;
    }
    if (!DEDUP_MUTANT(NO_WAKE)) {
        /* cannot fail on a range that was registered */
        sys_ioctl(f->uffd, UFFDIO_WAKE, &range);
    }
}

static bool uffd_begin(DedupFrozen *z, bool missing)
{
    int uffd = z->freezer->uffd;
    int saved;

    if (!uffd_register(uffd, z->addr, z->len,
                       missing ? UFFDIO_REGISTER_MODE_MISSING : 0)) {
        saved = errno;
        if (saved == ENOMEM) {
            /* some of its mappings may be registered already */
            uffd_end(z);
        }
        errno = saved;
        return false;
    }
    if (uffd_writeprotect(uffd, z->addr, z->len, true) ||
        (errno == ENOENT && uffd_protect_each(uffd, z->addr, z->len))) {
        return true;
    }
    saved = errno;
    uffd_end(z);
    errno = saved;
    return false;
}

static bool uffd_readers(DedupFrozen *z, bool shared)
{
    return uffd_register(z->freezer->uffd, z->addr, z->len,
                         shared ? UFFDIO_REGISTER_MODE_MINOR
                                : UFFDIO_REGISTER_MODE_MISSING);
}

static bool uffd_is_waited_for(const DedupFrozen *z)
{
    /* as nobody reads events, each who waits is one */
    struct pollfd pfd = { .fd = z->freezer->uffd, .events = POLLIN };

    return sys_poll(&pfd, 1, 0) == 1 && (pfd.revents & POLLIN);
}

static void uffd_unprotect(DedupFrozen *z, void *addr, size_t len)
{
    /* what it leaves protected, the end does not */
    uffd_writeprotect(z->freezer->uffd, addr, len, false);
}

/* True: contents are there, those or others.  Does not try for ever. */
static bool uffd_fill(int uffd, unsigned long request, void *arg)
{
    for (unsigned i = 0; i < FILL_TRIES; i++) {
        if (sys_ioctl(uffd, request, arg) == 0 || errno == EEXIST) {
            return true;
        }
        if (errno != EAGAIN && errno != EBUSY && errno != ENOMEM) {
            return false;
        }
    }
    return false;
}

static bool uffd_copy(int uffd, void *addr, const void *content)
{
    struct uffdio_copy copy = {
        .dst = (uintptr_t)addr,
        .src = (uintptr_t)content,
        .len = DEDUP_PAGE_SIZE,
    };

    return uffd_fill(uffd, UFFDIO_COPY, &copy);
}

static bool uffd_move(int uffd, void *addr, void *page)
{
    struct dedup_uffdio_move move = {
        .dst = (uintptr_t)addr,
        .src = (uintptr_t)page,
        .len = DEDUP_PAGE_SIZE,
    };

    return uffd_fill(uffd, DEDUP_UFFDIO_MOVE, &move);
}

static bool uffd_poison(int uffd, void *addr)
{
    struct dedup_uffdio_poison poison = {
        .range = { .start = (uintptr_t)addr, .len = DEDUP_PAGE_SIZE },
    };

    return uffd_fill(uffd, DEDUP_UFFDIO_POISON, &poison);
}

static bool uffd_refill(DedupFrozen *z, void *addr, const void *content,
                        void *spare)
{
    const struct timespec pause = { .tv_nsec = FILL_PAUSE_NS };
    int uffd = z->freezer->uffd;

    for (;;) {
        if (uffd_copy(uffd, addr, content)) {
            return true;
        }
        if (dedup_page_copy(spare, content) && uffd_move(uffd, addr, spare)) {
            return true;
        }
        if (uffd_poison(uffd, addr)) {
            return false;
        }
        /* if the window ended now there would be zeros: let them wait */
        nanosleep(&pause, NULL);
    }
}

/* Is the page at @addr write-protected?  False if that cannot be told. */
static bool is_protected(int pagemap_fd, const void *addr)
{
    uint64_t entry;
    off_t at = ((uintptr_t)addr >> DEDUP_PAGE_SHIFT) * sizeof(entry);

    return sys_pread(pagemap_fd, &entry, sizeof(entry), at) == sizeof(entry) &&
           (entry & PM_UFFD_WP);
}

/* Is it the kernel's page of zeros that is mapped at @addr? */
static bool is_zeropage(int pagemap_fd, const void *addr)
{
    struct page_region region;
    struct pm_scan_arg arg = {
        .size = sizeof(arg),
        .start = (uintptr_t)addr,
        .end = (uintptr_t)addr + DEDUP_PAGE_SIZE,
        .vec = (uintptr_t)&region,
        .vec_len = 1,
        .category_mask = PAGE_IS_PFNZERO,
        .return_mask = PAGE_IS_PFNZERO,
    };

    return sys_ioctl(pagemap_fd, PAGEMAP_SCAN, &arg) == 1;
}

/*
 * Protects half of a huge page at @huge and has it split: what was zero is
 * the kernel's page of zeros then, and must be protected still.
 */
static bool survives_split(int uffd, int pagemap_fd, uint8_t *huge)
{
    const uint8_t *zero = huge + DEDUP_PAGE_SIZE;

    huge[0] = 1; /* makes all of it, if there is a huge page to be had */
    return uffd_register(uffd, huge, HUGE_SIZE, false) &&
           uffd_writeprotect(uffd, huge, HUGE_SIZE / 2, true) &&
           sys_madvise(huge, DEDUP_PAGE_SIZE, MADV_COLD) == 0 &&
           is_zeropage(pagemap_fd, zero) && is_protected(pagemap_fd, zero);
}

bool dedup_uffd_probe_split(int uffd, int pagemap_fd)
{
    struct uffdio_range range;
    uint8_t *map, *huge;
    bool survives;

    map = sys_mmap(NULL, 2 * HUGE_SIZE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) {
        return false;
    }
    huge = (uint8_t *)(((uintptr_t)map + HUGE_SIZE - 1) &
                       ~(uintptr_t)(HUGE_SIZE - 1));
    sys_madvise(huge, HUGE_SIZE, MADV_HUGEPAGE);
    survives = survives_split(uffd, pagemap_fd, huge);
    range = (struct uffdio_range) { (uintptr_t)huge, HUGE_SIZE };
    sys_ioctl(uffd, UFFDIO_UNREGISTER, &range);
    sys_munmap(map, 2 * HUGE_SIZE);
    return survives;
}

static bool uffd_survives_split(DedupFreezer *f, int pagemap_fd)
{
    return kernel_is_older(6, 12) || !kernel_is_older(6, 18) ||
           dedup_uffd_probe_split(f->uffd, pagemap_fd);
}

const DedupFreezeOps dedup_freeze_uffd = {
    .drops = true,
    .open = uffd_open,
    .close = uffd_close,
    .survives_split = uffd_survives_split,
    .begin = uffd_begin,
    .readers = uffd_readers,
    .is_waited_for = uffd_is_waited_for,
    .unprotect = uffd_unprotect,
    .end = uffd_end,
    .refill = uffd_refill,
};
