/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Handlers of the signals that a thread gets for an access of its own: ours
 * first, then that of whoever had the signal before.
 */

#ifndef DEDUP_HANDLER_H
#define DEDUP_HANDLER_H

#include <glib.h>
#include <signal.h>
#include <stdbool.h>

typedef void DedupHandlerFn(int number, siginfo_t *info, void *context);

/*
 * Have @handle called, with the mask of whoever had the signal, which is
 * written to @before ahead of that.  For ever: a signal may come late.  False
 * and errno: it cannot be had.
 */
bool dedup_handler_install(int number, DedupHandlerFn *handle,
                           struct sigaction *before);

/* It was not for us: what would have happened without us happens. */
void dedup_handler_pass_on(const struct sigaction *before, int number,
                           siginfo_t *info, void *context);

#endif /* DEDUP_HANDLER_H */
