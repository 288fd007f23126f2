/*
 * Guest agent: the page cache
 *
 * Guests that run from the same files hold the same bytes in their page
 * caches.  Here the file is a disk that mkdisk made; it is mapped rather than
 * read, so that what is checked is the page cache itself, not a copy of it.
 *
 * The last close of a disk empties its cache, so the disk stays open.
 *
 * Threads: commands run on the main thread.
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "agent.h"
#include "pagegen.h"

/*
 * cache PATH SEED DISTINCT BLOCKS: check every block through the page cache,
 * which holds them from then on; "cached" were there already
 */
int cache_check(int argc, char **argv, char *reply)
{
    uint64_t seed, distinct, blocks, cached = 0, bad = 0, first = 0;
    unsigned char *resident;
    static int fd = -1;
    uint8_t *mem;

    if (argc != 5 || agent_number(argv[2], &seed) ||
        agent_number(argv[3], &distinct) || !distinct ||
        agent_number(argv[4], &blocks) || !blocks) {
        strcpy(reply, "usage: cache PATH SEED DISTINCT BLOCKS, "
               "always the same PATH");
        return -1;
    }
    if (fd < 0) {
        fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    }
    if (fd < 0) {
        snprintf(reply, AGENT_REPLY, "%s: %s", argv[1], strerror(errno));
        return -1;
    }
    /* Shorter than asked for: a page beyond the end would be a signal. */
    if (lseek(fd, 0, SEEK_END) < (off_t)(blocks * PG_SIZE)) {
        snprintf(reply, AGENT_REPLY, "%s is too short", argv[1]);
        return -1;
    }
    mem = mmap(NULL, blocks * PG_SIZE, PROT_READ, MAP_SHARED, fd, 0);
    resident = malloc(blocks);
    if (mem == MAP_FAILED || !resident ||
        mincore(mem, blocks * PG_SIZE, resident)) {
        strcpy(reply, strerror(errno));
        if (mem != MAP_FAILED) {
            munmap(mem, blocks * PG_SIZE);
        }
        free(resident);
        return -1;
    }
    for (uint64_t b = 0; b < blocks; b++) {
        cached += resident[b] & 1;
        if (pg_check(mem + b * PG_SIZE, pg_disk_key(seed, b, distinct)) >= 0 &&
            bad++ == 0) {
            first = b;
        }
    }
    munmap(mem, blocks * PG_SIZE);
    free(resident);
    snprintf(reply, AGENT_REPLY, "pages=%llu cached=%llu bad=%llu first=%llu",
             (unsigned long long)blocks, (unsigned long long)cached,
             (unsigned long long)bad, (unsigned long long)first);
    return 0;
}
