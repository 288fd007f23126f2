/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Our cgroup, and those above it, since any of them may carry the limit that
 * binds.  Of version 1 or 2, whichever has the controller that is asked for.
 *
 * Thread: one at a time; the owner's lock.
 */

#ifndef DEDUP_CGROUP_H
#define DEDUP_CGROUP_H

#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/* How many are looked at: our own and those above it. */
#define DEDUP_CGROUP_LEVELS 16

typedef struct DedupCgroups {
    const char *controller;   /* a literal */
    char *proc;
    int cgroup_fd;            /* /proc/self/cgroup */
    int point_fd;             /* where the hierarchy is mounted; or -1 */
    char *root;               /* which part of it is mounted there */
    bool v2;
    char *cgroups;            /* what cgroup_fd said when they were opened */
    bool unknown;             /* something could not be opened: try again */
    unsigned nlevels;
    int level_fd[DEDUP_CGROUP_LEVELS]; /* the cgroup, then its ancestors */
    uint64_t level_id[DEDUP_CGROUP_LEVELS]; /* inodes of their directories */
} DedupCgroups;

/* @proc: where the kernel's files are: "/proc", but for tests. */
void dedup_cgroups_init(DedupCgroups *c, const char *proc,
                        const char *controller);
void dedup_cgroups_clear(DedupCgroups *c);

/* Are we where we were at the last look?  If not, look there. */
void dedup_cgroups_refresh(DedupCgroups *c);

/*
 * A small text file of a level; NULL and errno if it cannot be read.  The
 * caller frees it.
 */
char *dedup_cgroup_read(int level_fd, const char *name);
/* With that errno: it is not there, as no such file, or the cgroup is gone. */
bool dedup_cgroup_is_absent(int error);
/* The number behind @name at the start of a line; false if absent. */
bool dedup_find_number(const char *text, const char *name, uint64_t *value);

#endif /* DEDUP_CGROUP_H */
