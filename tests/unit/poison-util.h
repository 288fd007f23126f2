/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Pages that cannot be read any more, as after a memory error: by
 * UFFDIO_POISON (Linux 6.6), for this process alone.
 */

#ifndef POISON_UTIL_H
#define POISON_UTIL_H

#include <stdbool.h>
#include <stddef.h>

/*
 * Poison mapped pages: who reads or writes one gets a SIGBUS.  A page of a file
 * stays in the file.  False: this kernel cannot.  Any thread.
 */
bool poison_pages(void *addr, size_t pages);

/* Can it be done here?  If not the test is marked as skipped. */
bool poison_is_there(void);

#endif /* POISON_UTIL_H */
