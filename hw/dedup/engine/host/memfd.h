/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Files in memory that can be sealed.  Any thread.
 */

#ifndef DEDUP_MEMFD_H
#define DEDUP_MEMFD_H

/*
 * A new one, empty: it can be sealed, is closed on exec() and, from Linux 6.3
 * on, cannot be executed.  Returns its descriptor, which is the caller's; -1
 * and errno on failure.
 */
int dedup_memfd_new(const char *name);

#endif /* DEDUP_MEMFD_H */
