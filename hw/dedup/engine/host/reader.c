/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Reading memory that may be broken; see reader.h.
 *
 * The handler leaves by siglongjmp(), on the thread that read, out of code that
 * takes no lock and has nothing to give back: page.c, and XXH3.
 */

#include <pthread.h>
#include <ucontext.h>
#include <unistd.h>

#include "host/error.h"
#include "host/handler.h"
#include "host/reader.h"
#include "host/sys.h"

__thread DedupReader dedup_reader;

static GMutex install_lock;
static bool installed;          /* install_lock: for ever */
static struct sigaction before; /* written before the handler is there */

static void change_mask(int how, sigset_t *old)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(how, &set, old);
}

void dedup_reader_unblock(void)
{
    change_mask(SIG_UNBLOCK, &dedup_reader.before);
}

void dedup_reader_block(void)
{
    if (sigismember(&dedup_reader.before, SIGBUS)) {
        change_mask(SIG_BLOCK, NULL);
    }
}

void dedup_reader_thread(void)
{
    change_mask(SIG_UNBLOCK, NULL);
    dedup_reader.takes = true;
}

void dedup_reader_enter(void)
{
    if (!dedup_reader.takes) {
        dedup_reader_unblock();
        dedup_reader.takes = dedup_reader.borrowed = true;
    }
}

void dedup_reader_leave(void)
{
    if (dedup_reader.borrowed) {
        dedup_reader.takes = dedup_reader.borrowed = false;
        dedup_reader_block();
    }
}

/* For an access of the thread's own?  Not what tells of an error elsewhere. */
static bool is_synchronous(const siginfo_t *info)
{
    return info->si_code > 0 && info->si_code != BUS_MCEERR_AO;
}

/*
 * The thread has it blocked when it does not read, as its signals are read from
 * a signalfd: there it shall come.
 */
static bool put_off(siginfo_t *info, ucontext_t *context)
{
    if ((dedup_reader.takes ? !dedup_reader.borrowed : !dedup_reader.reads) ||
        !sigismember(&dedup_reader.before, SIGBUS)) {
        return false;
    }
    /* blocked from here on: each read that is to come takes it for itself */
    dedup_reader.takes = dedup_reader.borrowed = false;
    sigaddset(&context->uc_sigmask, SIGBUS);
    return sys_rt_tgsigqueueinfo(getpid(), gettid(), info) == 0;
}

static void handle(int number, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;

    if (!is_synchronous(info)) {
        if (!put_off(info, uc)) {
            dedup_handler_pass_on(&before, number, info, context);
        }
    } else if (dedup_reader.reads) {
        /* in the handler it is blocked, and what we go back to is not */
        pthread_sigmask(SIG_SETMASK, &uc->uc_sigmask, NULL);
        siglongjmp(dedup_reader.back, 1);
    } else {
        dedup_handler_pass_on(&before, number, info, context);
    }
}

bool dedup_reader_install(GError **error)
{
    bool ok;

    g_mutex_lock(&install_lock);
    ok = installed || dedup_handler_install(SIGBUS, handle, &before);
    if (!ok) {
        dedup_error_errno(error, "cannot handle SIGBUS");
    }
    installed = ok;
    g_mutex_unlock(&install_lock);
    return ok;
}
