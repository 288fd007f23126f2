/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The process's own page table, and calls about its own memory; process.h.
 */

#include <fcntl.h>
#include <unistd.h>

#include "host/process.h"
#include "host/sys.h"

void dedup_process_open(DedupProcess *p)
{
    p->pagemap_fd = sys_open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    p->has_pagemap_scan = true;
    p->self_pidfd = sys_pidfd_open(getpid());
    p->has_madvise_vector = p->self_pidfd >= 0;
}

void dedup_process_close(DedupProcess *p)
{
    if (p->self_pidfd >= 0) {
        close(p->self_pidfd);
    }
    if (p->pagemap_fd >= 0) {
        close(p->pagemap_fd);
    }
}
