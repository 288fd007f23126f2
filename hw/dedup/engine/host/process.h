/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the kernel lets this process say and do about its own memory.
 *
 * The descriptors are opened before the process may lose its root directory.
 */

#ifndef DEDUP_PROCESS_H
#define DEDUP_PROCESS_H

#include <stdbool.h>

typedef struct DedupProcess {
    int pagemap_fd;           /* -1: nobody can tell which pages are there */
    int self_pidfd;
    bool has_pagemap_scan;
    bool has_madvise_vector;  /* process_madvise(MADV_DONTNEED) of oneself */
} DedupProcess;

void dedup_process_open(DedupProcess *p);
void dedup_process_close(DedupProcess *p);

#endif /* DEDUP_PROCESS_H */
