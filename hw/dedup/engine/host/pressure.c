/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How short memory is; see pressure.h.
 */

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "host/pressure.h"
#include "host/sys.h"

#define MOST 100u
/* In percent of what there is: from here on it is short, or very. */
#define SHORT 25
#define VERY_SHORT 5
/* Percent of the time in which some task waits for memory. */
#define STALLS_MOST 10.0

void dedup_pressure_open(DedupPressure *p, DedupHostMem *hostmem,
                         const char *proc)
{
    g_autofree char *path = g_strconcat(proc, "/pressure/memory", NULL);

    p->hostmem = hostmem;
    p->psi_fd = sys_open(path, O_RDONLY | O_CLOEXEC);
}

void dedup_pressure_close(DedupPressure *p)
{
    if (p->psi_fd >= 0) {
        close(p->psi_fd);
    }
}

static unsigned of_stalls(const DedupPressure *p)
{
    static const char name[] = "some avg10=";
    char text[256];
    ssize_t n = p->psi_fd < 0 ? -1 : sys_pread(p->psi_fd, text,
                                               sizeof(text) - 1, 0);
    const char *at;

    if (n <= 0) {
        return 0; /* booted with psi=0, it is there and cannot be read */
    }
    text[n] = 0;
    at = strstr(text, name);
    return at ? MIN(g_ascii_strtod(at + strlen(name), NULL) * MOST /
                    STALLS_MOST, MOST) : 0;
}

static unsigned of_room(uint64_t left, uint64_t all)
{
    double percent = all ? 100.0 * left / all : 0;

    return CLAMP((SHORT - percent) * MOST / (SHORT - VERY_SHORT), 0, MOST);
}

unsigned dedup_pressure(DedupPressure *p)
{
    uint64_t available = dedup_hostmem_available(p->hostmem);
    uint64_t total = dedup_hostmem_total(p->hostmem);
    DedupCgroupRoom rooms[DEDUP_CGROUP_LEVELS + 1];
    unsigned n = dedup_hostmem_cgroup_rooms(p->hostmem, rooms);
    unsigned most = of_stalls(p);

    if (available != UINT64_MAX && total != UINT64_MAX) {
        most = MAX(most, of_room(available, total));
    }
    for (unsigned i = 0; i < n; i++) {
        most = MAX(most, of_room(rooms[i].bytes, rooms[i].limit));
    }
    return most;
}
