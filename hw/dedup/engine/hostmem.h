/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the host has left: memory, the memory cgroup's limit, mappings.
 *
 * All files are opened when the object is made, since the process may lose
 * its root directory and its user id later.  Memory cgroups of version 1 and
 * 2 are read.  Functions may be called from any thread.
 */

#ifndef DEDUP_HOSTMEM_H
#define DEDUP_HOSTMEM_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

typedef struct DedupHostMem DedupHostMem;

/* @proc: where the kernel's files are: "/proc", but for tests. */
DedupHostMem *dedup_hostmem_new(const char *proc);
void dedup_hostmem_free(DedupHostMem *m);

/* MemAvailable of /proc/meminfo in bytes; UINT64_MAX if unknown. */
uint64_t dedup_hostmem_available(DedupHostMem *m);

/*
 * Room until the tightest limit of our memory cgroup and its ancestors, in
 * bytes, counting page cache that can be dropped as room; UINT64_MAX if
 * there is no limit, 0 if it cannot be read now (out of descriptors).
 * @cgroup_id: inode of the cgroup that sets it.
 */
uint64_t dedup_hostmem_cgroup_room(DedupHostMem *m, uint64_t *cgroup_id);

/* Mappings of this process, counted; 0 if unknown. */
uint64_t dedup_hostmem_maps(DedupHostMem *m);
/* vm.max_map_count */
uint64_t dedup_hostmem_max_maps(DedupHostMem *m);

#endif /* DEDUP_HOSTMEM_H */
