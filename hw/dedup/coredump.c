/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: guest RAM in core dumps of QEMU
 *
 * A merged page is part of a private mapping of a file that was never written
 * to.  The kernel leaves such out of a core dump, unless bit 2 of the
 * process's coredump_filter is set (core(5)), and dump-guest-memory.py finds
 * zeros there, without an error.  So the bit is set while the scanner runs,
 * where guest RAM is to be dumped at all (-machine dump-guest-core=on), and
 * put back when it goes.  What the engine maps for itself is MADV_DONTDUMP.
 */

#include "qemu/osdep.h"
#include "hw/boards.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "dedup-internal.h"

#define FILTER "/proc/self/coredump_filter"
/* Private mappings of files */
#define FILTER_MAPPED_PRIVATE (1 << 2)

/* While there is a /proc: -run-with chroot= comes later. */
void dedup_coredump_init(DedupScanner *ds)
{
    ds->coredump_fd = open(FILTER, O_RDWR | O_CLOEXEC);
}

static bool read_filter(int fd, unsigned *filter)
{
    char buf[32];
    ssize_t len = pread(fd, buf, sizeof(buf) - 1, 0);
    const char *end;

    if (len <= 0) {
        return false;
    }
    buf[len] = '\0';
    return qemu_strtoui(buf, &end, 16, filter) == 0;
}

static bool write_filter(int fd, unsigned filter)
{
    g_autofree char *text = g_strdup_printf("0x%x", filter);

    return pwrite(fd, text, strlen(text), 0) == strlen(text);
}

void dedup_coredump_start(DedupScanner *ds)
{
    unsigned filter;

    if (!machine_dump_guest_core(current_machine)) {
        return;
    }
    if (ds->coredump_fd < 0 || !read_filter(ds->coredump_fd, &filter)) {
        warn_report("dedup-scanner: a core dump of QEMU may lack merged "
                    "memory: " FILTER " cannot be read; start QEMU with bit "
                    "2 of it set, or with -machine dump-guest-core=off");
        return;
    }
    if (filter & FILTER_MAPPED_PRIVATE) {
        return;
    }
    ds->coredump_set = write_filter(ds->coredump_fd,
                                    filter | FILTER_MAPPED_PRIVATE);
    if (!ds->coredump_set) {
        warn_report("dedup-scanner: a core dump of QEMU will lack merged "
                    "memory: " FILTER " cannot be written; start QEMU with "
                    "bit 2 of it set, or with -machine dump-guest-core=off");
    }
}

void dedup_coredump_stop(DedupScanner *ds)
{
    unsigned filter;

    if (ds->coredump_set && read_filter(ds->coredump_fd, &filter)) {
        write_filter(ds->coredump_fd, filter & ~FILTER_MAPPED_PRIVATE);
    }
    ds->coredump_set = false;
}

void dedup_coredump_destroy(DedupScanner *ds)
{
    if (ds->coredump_fd >= 0) {
        close(ds->coredump_fd);
    }
}
