/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Reading memory that may be broken.
 *
 * The kernel takes a page away whose memory is broken (hardware, or
 * soft_offline_page and hard_offline_page of /sys/devices/system/memory), and
 * who reads it gets a SIGBUS.  A guest that does not use the page any more
 * never meets that; we, who read all of its RAM, would, and it would be the end
 * of the VM.  So each read of a page (page.c, and nothing else reads any) may
 * fail: the handler of SIGBUS goes back to where it began.
 *
 * A SIGBUS that comes while nothing is read here goes on to whoever had the
 * signal before: QEMU's own handler tells the guest.
 *
 * What such a signal must not find is a thread that blocks it: then it ends the
 * process.  QEMU's threads do, so each takes it while it reads a page, or some
 * (dedup_reader_enter()); the engine's own always do (dedup_reader_thread()).
 *
 * Thread: any; each has its own.
 */

#ifndef DEDUP_READER_H
#define DEDUP_READER_H

#include <glib.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>

typedef struct DedupReader {
    sigjmp_buf back;          /* where it goes on if a read fails */
    bool reads;               /* it is reading: @back is valid */
    bool takes;               /* the thread takes the signal, */
    bool borrowed;            /* and only until dedup_reader_leave() */
    sigset_t before;          /* another's mask, when it does not read */
} DedupReader;

extern __thread DedupReader dedup_reader;

/* To be called before anything is read; once in a process counts. */
bool dedup_reader_install(GError **error);

/* The calling thread is the engine's, and takes the signal from now on. */
void dedup_reader_thread(void);

/*
 * The calling thread, whoever's it is, reads many pages until leave(): two
 * system calls in all rather than for each of them.  Not nested.
 */
void dedup_reader_enter(void);
void dedup_reader_leave(void);

/* For the next two. */
void dedup_reader_unblock(void);
void dedup_reader_block(void);

static inline void dedup_read_open(void)
{
    if (!dedup_reader.takes) {
        dedup_reader_unblock();
    }
    dedup_reader.reads = true;
    /* the handler, on this thread, sees that before anything is read */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static inline void dedup_read_close(void)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    dedup_reader.reads = false;
    if (!dedup_reader.takes) {
        dedup_reader_block();
    }
}

/*
 * A read begins, or has failed: then it is true, once more.  In both cases
 * dedup_read_close() has to come, in the function that asked; a second read
 * begins after that.
 */
#define DEDUP_READ_FAILS() \
    (dedup_read_open(), sigsetjmp(dedup_reader.back, 0))

#endif /* DEDUP_READER_H */
