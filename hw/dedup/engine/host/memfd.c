/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Files in memory that can be sealed; see memfd.h.
 */

#include <errno.h>
#include <sys/mman.h>

#include "host/memfd.h"
#include "host/sys.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U         /* Linux 6.3 */
#endif

int dedup_memfd_new(const char *name)
{
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int fd = sys_memfd_create(name, flags | MFD_NOEXEC_SEAL);

    if (fd < 0 && errno == EINVAL) {
        fd = sys_memfd_create(name, flags);
    }
    return fd;
}
