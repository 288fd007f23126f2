/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A slice: what the kernel lets a thread run before it gives the processor to
 * others that wait for it.
 *
 * Who is preempted while a range is frozen has all its writers wait for
 * milliseconds.  So whoever is about to freeze one gives the processor up first
 * if its slice is old: what follows begins on a fresh one.  Where nobody else
 * wants the processor that is a system call in a millisecond.
 *
 * Thread: any; each has its own.
 */

#ifndef DEDUP_SLICE_H
#define DEDUP_SLICE_H

#include <stdint.h>

/* As long as the shortest slice that kernels give by default is sure to be. */
#define DEDUP_SLICE_NS INT64_C(700000)

/* With no lock held.  Returns the time, in ns. */
int64_t dedup_slice_renew(void);

#endif /* DEDUP_SLICE_H */
