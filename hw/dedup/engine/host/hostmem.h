/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the host has left: memory, the memory cgroup's limit, mappings.
 *
 * All files are opened when the object is made, since the process may lose
 * its root directory and its user id later.  Memory cgroups of version 1 and
 * 2 are read, and nothing of them is remembered: the process may be moved to
 * another one, and limits may come and change, at any time.  Functions may be
 * called from any thread.
 */

#ifndef DEDUP_HOSTMEM_H
#define DEDUP_HOSTMEM_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

#include "host/cgroup.h"

typedef struct DedupHostMem DedupHostMem;

/* @proc: where the kernel's files are: "/proc", but for tests. */
DedupHostMem *dedup_hostmem_new(const char *proc);
void dedup_hostmem_free(DedupHostMem *m);

/*
 * MemAvailable of /proc/meminfo in bytes; UINT64_MAX if that is not to be had,
 * 0 if it cannot be read now.
 */
uint64_t dedup_hostmem_available(DedupHostMem *m);
/* MemTotal, likewise. */
uint64_t dedup_hostmem_total(DedupHostMem *m);

/* Those that a member names to the others: its own and four above it. */
#define DEDUP_CGROUP_IDS 5

/* A memory cgroup with a limit: this process's or one above it. */
typedef struct DedupCgroupRoom {
    uint64_t id;              /* inode of its directory */
    uint64_t bytes;           /* until the limit */
    uint64_t limit;
} DedupCgroupRoom;

/* The inodes of our cgroup and of those above it; 0 behind the last. */
void dedup_hostmem_cgroup_ids(DedupHostMem *m,
                              uint64_t ids[DEDUP_CGROUP_IDS]);

/*
 * The room in each of them that has a limit, counting page cache that can be
 * dropped as room; 0 if that cannot be read now (out of descriptors).
 * @rooms: of DEDUP_CGROUP_LEVELS.  Returns how many have a limit.
 */
unsigned dedup_hostmem_cgroup_rooms(DedupHostMem *m,
                                    DedupCgroupRoom *rooms);

/* Mappings of this process, counted; 0 if unknown. */
uint64_t dedup_hostmem_maps(DedupHostMem *m);
/* vm.max_map_count, which may be changed at any time */
uint64_t dedup_hostmem_max_maps(DedupHostMem *m);

#endif /* DEDUP_HOSTMEM_H */
