/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel's KSM, at work in a test.
 *
 * KSM is one for the whole machine: who uses it holds a lock, so that tests
 * take turns, and its knobs are put back by a child process when the test's
 * process is gone, however it ends.
 *
 * Thread: the test's main thread, unless a comment says otherwise.
 */

#ifndef KSM_UTIL_H
#define KSM_UTIL_H

#include <glib.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Take the lock and save the knobs; ksmd is off then, and quick once it is
 * on.  No thread may exist.  False: no KSM here, or it is in use: then the
 * test was marked as skipped.  For the rest of the process's life.
 */
bool ksm_begin(void);

/* Switch ksmd on or off; any thread. */
void ksm_run(bool on);

/* ksmd is on: wait until it has looked at everything twice; any thread. */
void ksm_wait_scans(void);

/* KSM's pages of this process, those of zeros included; any thread. */
uint64_t ksm_pages(void);

/* Have KSM merge memory, as much of it as it can, and switch it off. */
void ksm_merge(void *addr, size_t len);

/* Bytes of a range in mappings that KSM may work on ("mg" in smaps). */
uint64_t ksm_mergeable(const void *addr, size_t len);

#endif /* KSM_UTIL_H */
