/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How short memory is, on the host and in our cgroups.
 *
 * The file is opened when it is made, since the process may lose its root
 * directory later.  Any thread.
 */

#ifndef DEDUP_PRESSURE_H
#define DEDUP_PRESSURE_H

#include "host/hostmem.h"

typedef struct DedupPressure {
    DedupHostMem *hostmem;
    int psi_fd;               /* /proc/pressure/memory; -1: there is none */
} DedupPressure;

/* @proc: "/proc", but for tests.  @hostmem outlives it. */
void dedup_pressure_open(DedupPressure *p, DedupHostMem *hostmem,
                         const char *proc);
void dedup_pressure_close(DedupPressure *p);

/*
 * 0: there is plenty; 100: tasks wait for memory, or soon will.  The highest
 * of: stalls (PSI, "some avg10", 10 % are 100), what is available of the host's
 * memory and what is left below each limit of our cgroups (a quarter is 0, a
 * twentieth is 100).
 */
unsigned dedup_pressure(DedupPressure *p);

#endif /* DEDUP_PRESSURE_H */
