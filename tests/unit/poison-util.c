/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Pages that cannot be read any more; see poison-util.h.
 */

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "poison-util.h"

/* What older headers lack. */
struct poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#define POISON _IOWR(UFFDIO, 0x08, struct poison)
#define FEATURE_POISON (1 << 14)

static int open_uffd(void)
{
    struct uffdio_api api = { .api = UFFD_API, .features = FEATURE_POISON };
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

bool poison_pages(void *addr, size_t pages)
{
    struct uffdio_range range = {
        .start = (uintptr_t)addr, .len = pages * FX_PAGE,
    };
    struct uffdio_register reg = {
        .range = range, .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    struct poison poison = { .range = range };
    int fd = open_uffd();
    bool ok;

    if (fd < 0) {
        return false;
    }
    ok = ioctl(fd, UFFDIO_REGISTER, &reg) == 0 &&
         madvise(addr, range.len, MADV_DONTNEED) == 0 &&
         ioctl(fd, POISON, &poison) == 0;
    close(fd); /* ends the registration; what is poisoned stays so */
    return ok;
}

bool poison_is_there(void)
{
    void *page = mmap(NULL, FX_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool ok = page != MAP_FAILED && poison_pages(page, 1);

    munmap(page, FX_PAGE);
    if (!ok) {
        g_test_skip("needs UFFDIO_POISON (Linux 6.6) and a userfaultfd");
    }
    return ok;
}
