/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory deduplication: who else opens a RAM file, and the worker thread
 *
 * The worker gives memory back: it takes regions from the engine, contents
 * restored, which may last seconds and so must not happen under the BQL.
 * Blocks come to it in two ways.
 *
 * - DedupBlock.leaving: the block is not eligible any more.
 * - Its file's lease is being broken.  A file on a tmpfs that has a name may
 *   be opened by anybody who may read or write it, and its contents are not
 *   in it where pages are merged.  So a write lease (fcntl(2), F_SETLEASE)
 *   is held on it.  Whoever opens the file waits in open(2) until the block
 *   was restored and the lease is released, or the sysctl
 *   fs.lease-break-time (45 s) is over.
 *
 * The kernel announces a break by a signal, which it sends to the worker
 * alone, where it is blocked and read from a signalfd.  The signal only wakes
 * the worker: F_GETLEASE says which leases are being broken, so that merged
 * or lost signals do no harm.
 *
 * The worker never takes the BQL, because an open() of ours may wait for it
 * with the BQL held.
 */

#include "qemu/osdep.h"
#include <poll.h>
#include <sys/signalfd.h>
#include "exec/cpu-common.h"
#include "hw/dedup/qemu-compat.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "dedup-internal.h"
#include "trace.h"

/*
 * A signal that nobody else in QEMU uses.  Real-time signals queue; when the
 * queue is full the kernel sends SIGIO instead.
 */
#define DEDUP_LEASE_SIGNAL (SIGRTMIN + 8)

/*
 * Restoring fails when the memory lacks, and while a device transfers data
 * from or to the block.  The latter is over in a moment: it is not reported
 * before so many attempts, so long apart.
 */
#define DEDUP_BUSY_TRIES 100
#define DEDUP_BUSY_MS 10
/* How long to wait before it is tried again after that */
#define DEDUP_RETRY_MS 1000

/* Might others open its file? */
static bool needs_lease(const DedupBlock *block)
{
    return (block->rb->flags & RAM_NAMED_FILE) &&
           qemu_ram_is_shared(block->rb);
}

/*
 * Was mem-path the name of somebody's memfd, like /proc/PID/fd/5?  Then that
 * somebody may map it, and a lease does not tell: a memfd's first opening is
 * not counted.
 */
static bool is_foreign_memfd(const DedupBlock *block)
{
    g_autofree char *link = g_strdup_printf("/proc/self/fd/%d",
                                            block->rb->fd);
    g_autofree char *name = g_file_read_link(link, NULL);

    return !name || g_str_has_prefix(name, "/memfd:");
}

/* Does the file outlive us?  A directory as mem-path leads to one without. */
static bool is_named(const DedupBlock *block)
{
    struct stat st;

    return fstat(block->rb->fd, &st) == 0 && st.st_nlink > 0;
}

/* 0 or a negative errno.  Lock held. */
static int lease_take(DedupScanner *ds, DedupBlock *block)
{
    struct f_owner_ex owner = {
        .type = F_OWNER_TID,
        .pid = ds->ram.worker_tid,
    };
    int fd = block->rb->fd;

    if (block->leased) {
        return 0;
    }
    if (fcntl(fd, F_SETSIG, DEDUP_LEASE_SIGNAL) < 0 ||
        fcntl(fd, F_SETOWN_EX, &owner) < 0 ||
        fcntl(fd, F_SETLEASE, F_WRLCK) < 0) {
        return -errno;
    }
    block->leased = true;
    trace_dedup_lease_take(block->id);
    return 0;
}

/*
 * The worker sees who breaks a lease, and then it is never taken again, lest
 * a tool that looks every minute has us restore all of it every minute.
 */
bool dedup_block_secure(DedupScanner *ds, DedupBlock *block,
                        DedupBlockReason *reason)
{
    int err;

    if (!needs_lease(block) || dedup_scanner_estimates(ds)) {
        return true;
    }
    block->named = is_named(block);
    err = block->opened || is_foreign_memfd(block) ? -EAGAIN
                                                   : lease_take(ds, block);
    if (err) {
        *reason = err == -EAGAIN ? DEDUP_BLOCK_REASON_OPENED_ELSEWHERE
                                 : DEDUP_BLOCK_REASON_LEASE_DENIED;
    }
    return !err;
}

/* On the worker; lock held. */
static void lease_release(DedupBlock *block)
{
    if (block->leased) {
        block->leased = false;
        if (fcntl(block->rb->fd, F_SETLEASE, F_UNLCK) < 0) {
            warn_report("dedup-scanner: cannot release the lease on a RAM "
                        "file: %s", strerror(errno));
        }
        trace_dedup_lease_release(block->id);
    }
}

/* Does the kernel want the lease back? */
static bool lease_is_breaking(const DedupBlock *block)
{
    return block->leased &&
           fcntl(block->rb->fd, F_GETLEASE) != F_WRLCK;
}

/*
 * Find a block to work on, or say in *@timeout when to look again.  On the
 * worker; lock held.
 */
static DedupBlock *worker_next(DedupRam *ram, int *timeout)
{
    int64_t now = g_get_monotonic_time() / 1000;
    DedupBlock *block;

    *timeout = -1;
    QTAILQ_FOREACH(block, &ram->blocks, next) {
        if (lease_is_breaking(block) && !block->opened) {
            trace_dedup_lease_break(block->id);
            block->opened = true;
            block->leaving = true;
        }
        if (!block->leaving || (ram->draining && !block->drained)) {
            continue;
        }
        if (now >= block->retry_ms) {
            return block;
        }
        if (*timeout < 0 || block->retry_ms - now < *timeout) {
            *timeout = block->retry_ms - now;
        }
    }
    return NULL;
}

/* On the worker; lock held. */
static void restore_failed(DedupBlock *block, GError *error)
{
    bool pinned = g_error_matches(error, DEDUP_ERROR, DEDUP_ERROR_PINNED);
    bool busy = (pinned ||
                 g_error_matches(error, DEDUP_ERROR, DEDUP_ERROR_STATE)) &&
                ++block->tries < DEDUP_BUSY_TRIES;

    /* A transfer that a drain did not end may be over by itself. */
    block->pinned = pinned && !block->drained;
    block->retry_ms = g_get_monotonic_time() / 1000 +
                      (busy ? DEDUP_BUSY_MS : DEDUP_RETRY_MS);
    if (busy) {
        g_error_free(error);
        return;
    }
    if (!block->error) {
        /* Not with each attempt */
        warn_report("dedup-scanner: memory '%s'%s cannot be restored yet: %s",
                    block->id, block->opened ?
                    ", whose file another process has opened," : "",
                    error->message);
    }
    g_clear_error(&block->error);
    block->error = error;
}

/* Remove a region with its contents.  On the worker; lock held, released. */
static void worker_restore(DedupScanner *ds, DedupBlock *block)
{
    DedupRam *ram = &ds->ram;
    DedupRegion *region = block->region;
    GError *error = NULL;
    bool ok = true;

    if (region) {
        block->pages_merged = dedup_region_pages_merged(region);
        block->region = NULL;
        block->busy = true;
        qemu_mutex_unlock(&ram->lock);
        ok = dedup_region_remove(region, true, &error);
        qemu_mutex_lock(&ram->lock);
        block->busy = false;
        trace_dedup_block_restore(block->id, ok);
    }
    if (ok) {
        g_clear_error(&block->error);
        block->leaving = false;
        block->closed = false;
        block->pinned = false;
        block->tries = 0;
        lease_release(block);
    } else {
        restore_failed(block, error);
        /* Still merged; the engine does not merge it further. */
        block->region = region;
        block->closed = true;
    }
    block->drained = false;
    qemu_cond_broadcast(&ram->changed);
    qemu_bh_schedule(ds->update_bh);
}

void dedup_worker_try_pinned(DedupScanner *ds, bool last)
{
    DedupRam *ram = &ds->ram;
    DedupBlock *block;

    QTAILQ_FOREACH(block, &ram->blocks, next) {
        if (dedup_block_is_pinned(block)) {
            block->drained = true;
            block->retry_ms = 0;
            if (last) {
                block->tries = DEDUP_BUSY_TRIES;
            }
        }
    }
    dedup_worker_kick(ds);
    QTAILQ_FOREACH(block, &ram->blocks, next) {
        while (block->drained) {
            qemu_cond_wait(&ram->changed, &ram->lock);
        }
    }
}

/* A signalfd reads the signals of the thread that reads it. */
int dedup_worker_signalfd(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, DEDUP_LEASE_SIGNAL);
    sigaddset(&set, SIGIO);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void worker_wait(struct pollfd *fds, int timeout)
{
    struct signalfd_siginfo info;
    uint64_t count;

    if (RETRY_ON_EINTR(poll(fds, 2, timeout)) <= 0) {
        return;
    }
    while (read(fds[0].fd, &count, sizeof(count)) == sizeof(count)) {
        continue;
    }
    while (read(fds[1].fd, &info, sizeof(info)) == sizeof(info)) {
        continue;
    }
}

static void *worker_run(void *opaque)
{
    DedupScanner *ds = opaque;
    DedupRam *ram = &ds->ram;
    struct pollfd fds[2] = {
        { .fd = ram->kick_fd, .events = POLLIN },
        { .fd = ram->signal_fd, .events = POLLIN },
    };
    DedupBlock *block;
    int timeout;

    rcu_register_thread();
    /* The signals are blocked here as in every thread of QEMU's. */
    ram->worker_tid = qemu_get_thread_id();
    qemu_sem_post(&ram->worker_ready);

    qemu_mutex_lock(&ram->lock);
    while (!ram->stop) {
        block = worker_next(ram, &timeout);
        if (block) {
            worker_restore(ds, block);
            continue;
        }
        qemu_mutex_unlock(&ram->lock);
        worker_wait(fds, timeout);
        qemu_mutex_lock(&ram->lock);
    }
    qemu_mutex_unlock(&ram->lock);

    rcu_unregister_thread();
    return NULL;
}

void dedup_worker_kick(DedupScanner *ds)
{
    uint64_t one = 1;
    ssize_t ret;

    ret = write(ds->ram.kick_fd, &one, sizeof(one));
    /* Only if it was kicked 2^64 times and did not look. */
    assert(ret == sizeof(one));
}

void dedup_worker_start(DedupScanner *ds)
{
    DedupRam *ram = &ds->ram;

    ram->stop = false;
    qemu_thread_create(&ram->worker, "dedup-worker", worker_run, ds,
                       QEMU_THREAD_JOINABLE);
    qemu_sem_wait(&ram->worker_ready);
}

void dedup_worker_stop(DedupScanner *ds)
{
    DedupRam *ram = &ds->ram;
    DedupBlock *block;

    WITH_QEMU_LOCK_GUARD(&ram->lock) {
        ram->stop = true;
        QTAILQ_FOREACH(block, &ram->blocks, next) {
            if (block->busy) {
                /* When QEMU exits: one window is waited for, not all. */
                dedup_engine_cancel_restore(ds->engine, block->rb->host);
            }
        }
    }
    dedup_worker_kick(ds);
    qemu_thread_join(&ram->worker);
    ram->worker_tid = 0;
}
