/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Errors: the GErrors of all layers have one domain.  Any thread.
 *
 * Public: engine.h includes it.
 */

#ifndef DEDUP_ERROR_H
#define DEDUP_ERROR_H

#include <glib.h>

G_BEGIN_DECLS

/**
 * enum DedupError - codes of the GErrors that the engine returns, in the
 * domain DEDUP_ERROR
 * @DEDUP_ERROR_USERFAULTFD: no userfaultfd that covers kernel faults
 * @DEDUP_ERROR_GROUP: the group's directory cannot be used
 * @DEDUP_ERROR_MEMORY: the host or the memory cgroup lacks the memory
 * @DEDUP_ERROR_SYSTEM: any other system call that failed
 * @DEDUP_ERROR_STATE: not possible in the state that the engine is in
 * @DEDUP_ERROR_PINNED: a device writes to the pages, and nothing else is wrong
 */
typedef enum DedupError {
    DEDUP_ERROR_USERFAULTFD,
    DEDUP_ERROR_GROUP,
    DEDUP_ERROR_MEMORY,
    DEDUP_ERROR_SYSTEM,
    DEDUP_ERROR_STATE,
    DEDUP_ERROR_PINNED,
} DedupError;

#define DEDUP_ERROR (dedup_error_quark())
GQuark dedup_error_quark(void);

/**
 * dedup_error_errno() - set @error after a system call that failed
 *
 * Its text is what @format gives, ": " and that of errno; its code is
 * DEDUP_ERROR_MEMORY if errno is ENOMEM or ENOSPC, else DEDUP_ERROR_SYSTEM.
 */
void dedup_error_errno(GError **error, const char *format, ...)
    G_GNUC_PRINTF(2, 3);

G_END_DECLS

#endif /* DEDUP_ERROR_H */
