/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Handlers of signals that are passed on; see handler.h.
 */

#include "host/handler.h"

bool dedup_handler_install(int number, DedupHandlerFn *handle,
                           struct sigaction *before)
{
    struct sigaction action = { .sa_sigaction = handle };

    if (sigaction(number, NULL, before) < 0) {
        return false;
    }
    action.sa_mask = before->sa_mask;
    action.sa_flags = SA_SIGINFO | SA_RESTART | (before->sa_flags & SA_ONSTACK);
    return sigaction(number, &action, NULL) == 0;
}

void dedup_handler_pass_on(const struct sigaction *before, int number,
                           siginfo_t *info, void *context)
{
    if (before->sa_flags & SA_SIGINFO) {
        before->sa_sigaction(number, info, context);
    } else if (before->sa_handler != SIG_DFL &&
               before->sa_handler != SIG_IGN) {
        before->sa_handler(number);
    } else {
        /* it comes again, and ends the process as if we were not there */
        sigaction(number, &(struct sigaction) { .sa_handler = SIG_DFL }, NULL);
        if (info->si_code <= 0) {
            raise(number); /* somebody has sent it: it does not */
        }
    }
}
