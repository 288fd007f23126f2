/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Which call can fail how, and having it fail; see kth.h.
 *
 * The errnos are those of the manual pages, without what only a wrong argument
 * gives (EBADF, EFAULT, ENOTSOCK, ...), and without answers: an errno by which
 * the kernel says how things are (nothing is mapped there: mincore(),
 * ENOMEM; no data behind: lseek(), ENXIO; a page is there already: UFFDIO_COPY,
 * EEXIST; nobody listens: connect(), ECONNREFUSED).  To give it where it is not
 * so would be a kernel that lies.
 */

#include <execinfo.h>
#include <linux/userfaultfd.h>
#include <string.h>

#include "host/pagemap.h"
#include "kth.h"

/* A kernel refuses for a while, not for ever: then the fault ends. */
#define FAILURES_MOST 400
/* And a hole that it left can be closed after so many. */
#define HOLES_MOST 50

#define FX_MADV_POPULATE_WRITE 23

typedef struct Page {
    const char *name;
    unsigned long arg;      /* 0: any */
    int errnos[20];
} Page;

static const Page pages[] = {
    { "mmap", 0, { ENOMEM, EAGAIN, EACCES, ENFILE, ENODEV, EPERM, EOVERFLOW,
                   EINVAL } },
    { "munmap", 0, { ENOMEM, EINVAL } },
    { "mremap", 0, { ENOMEM, EAGAIN, EINVAL } },
    { "mprotect", 0, { ENOMEM, EACCES, EINVAL } },
    /* all others say what a store would meet */
    { "madvise", FX_MADV_POPULATE_WRITE, { ENOMEM, EAGAIN } },
    { "madvise", 0, { ENOMEM, EAGAIN, EACCES, EBUSY, EINVAL, EIO, EPERM,
                      EHWPOISON } },
    { "process_madvise", 0, { ENOMEM, EINTR, EINVAL, EPERM, ESRCH } },
    { "mincore", 0, { EAGAIN, EINVAL } },
    { "open", 0, { ENOMEM, EMFILE, ENFILE, EACCES, EINTR, ELOOP, ENOENT,
                   ENODEV, EPERM, EBUSY, ENXIO } },
    { "openat", 0, { ENOMEM, EMFILE, ENFILE, ENOSPC, EACCES, EINTR, ELOOP,
                     ENOENT, EPERM, EROFS, EDQUOT, EISDIR, ENOTDIR } },
    { "memfd_create", 0, { ENOMEM, EMFILE, ENFILE, EINVAL, EPERM } },
    { "fcntl", 0, { EMFILE, ENOLCK, EINTR, EBUSY, EPERM, EINVAL } },
    { "fcntl_lock", 0, { ENOLCK, EAGAIN, EACCES, EINTR, EDEADLK, EINVAL } },
    { "ftruncate", 0, { EFBIG, EINTR, EINVAL, EIO, EPERM } },
    { "fallocate", 0, { ENOSPC, EINTR, EFBIG, EIO, ENODEV, EOPNOTSUPP, EPERM,
                        ENOSYS, EINVAL } },
    { "lseek", 0, { EINVAL, EOVERFLOW, ESPIPE } },
    { "read", 0, { ENOMEM, EAGAIN, EINTR, EIO, EINVAL } },
    { "pread", 0, { ENOMEM, EAGAIN, EINTR, EIO, ENXIO, EOVERFLOW, ESPIPE,
                    EINVAL } },
    { "pwrite", 0, { ENOMEM, ENOSPC, EDQUOT, EINTR, EFBIG, EIO, EPERM,
                     EINVAL } },
    { "stat", 0, { ENOMEM, EACCES, ELOOP, ENOENT, ENOTDIR, EOVERFLOW } },
    { "lstat", 0, { ENOMEM, EACCES, ELOOP, ENOENT, ENOTDIR, EOVERFLOW } },
    { "fstat", 0, { ENOMEM, EOVERFLOW } },
    { "fstatat", 0, { ENOMEM, EACCES, ELOOP, ENOENT, ENOTDIR, EOVERFLOW } },
    { "fstatfs", 0, { ENOMEM, EINTR, EIO, ENOSYS, EOVERFLOW } },
    { "faccessat", 0, { ENOMEM, EACCES, EIO, ELOOP, ENOENT, EROFS } },
    { "mkdirat", 0, { ENOMEM, ENOSPC, EACCES, EDQUOT, ELOOP, EMLINK, ENOENT,
                      EPERM, EROFS } },
    { "unlinkat", 0, { ENOMEM, EACCES, EBUSY, EIO, ELOOP, ENOENT, EPERM,
                       EROFS } },
    { "fdopendir", 0, { ENOMEM, EMFILE, ENFILE, ENOENT } },
    { "readdir", 0, { ENOENT, EIO } },
    { "getrandom", 0, { EAGAIN, EINTR, ENOSYS, EINVAL } },
    { "ioctl", USERFAULTFD_IOC_NEW, { ENOMEM, EMFILE, ENFILE, EINVAL } },
    { "ioctl", UFFDIO_API, { EINVAL, EPERM } },
    { "ioctl", UFFDIO_REGISTER, { ENOMEM, EBUSY, EINVAL, EPERM } },
    { "ioctl", UFFDIO_UNREGISTER, { ENOMEM, EINVAL } },
    { "ioctl", UFFDIO_WAKE, { EAGAIN, EINVAL } },
    { "ioctl", UFFDIO_WRITEPROTECT, { EAGAIN, EINVAL, ENOENT, EFAULT } },
    { "ioctl", UFFDIO_COPY, { ENOMEM, EAGAIN, EINVAL, ENOENT, ENOSPC,
                              ESRCH } },
    { "ioctl", FX_UFFDIO_MOVE, { ENOMEM, EAGAIN, EBUSY, EINVAL, ENOENT,
                                 ESRCH } },
    { "ioctl", FX_UFFDIO_POISON, { ENOMEM, EAGAIN, EINVAL, ENOENT,
                                        ESRCH } },
    { "ioctl", PAGEMAP_SCAN, { ENOMEM, EINTR, EINVAL } },
    { "userfaultfd", 0, { ENOMEM, EMFILE, ENFILE, EPERM, EINVAL } },
    { "poll", 0, { ENOMEM, EINTR, EINVAL } },
    { "eventfd", 0, { ENOMEM, EMFILE, ENFILE, ENODEV } },
    { "futex", 0, { EAGAIN, EINTR, ENOSYS } },
    { "pidfd_open", 0, { ENOMEM, EMFILE, ENFILE, ENODEV, ESRCH, EINVAL } },
    { "thread_new", 0, { EAGAIN } },
    { "socket", 0, { ENOMEM, EMFILE, ENFILE, ENOBUFS, EACCES,
                     EAFNOSUPPORT } },
    { "bind", 0, { ENOMEM, EACCES, EADDRINUSE, EADDRNOTAVAIL, ELOOP, ENOENT,
                   ENOTDIR, EROFS } },
    { "listen", 0, { EADDRINUSE, EOPNOTSUPP } },
    { "connect", 0, { EAGAIN, EACCES, EINTR, ENOENT, EPERM, EPROTOTYPE,
                      ETIMEDOUT } },
    { "accept4", 0, { ENOMEM, EMFILE, ENFILE, ENOBUFS, EAGAIN, ECONNABORTED,
                      EINTR, EPERM } },
    { "sendmsg", 0, { ENOMEM, ENOBUFS, EAGAIN, ECONNRESET, EINTR, EMSGSIZE,
                      EPIPE, ENOTCONN, ETOOMANYREFS } },
    { "recvmsg", 0, { ENOMEM, EAGAIN, ECONNRESET, EINTR, ENOTCONN } },
    { "getsockopt", 0, { ENOPROTOOPT, EINVAL } },
};

static const Page *page_of(const char *name, unsigned long arg)
{
    for (unsigned i = 0; i < G_N_ELEMENTS(pages); i++) {
        if (strcmp(pages[i].name, name) == 0 &&
            (!pages[i].arg || pages[i].arg == arg)) {
            return &pages[i];
        }
    }
    return NULL;
}

static bool lists(const Page *page, int error)
{
    for (const int *e = page->errnos; *e; e++) {
        if (*e == error) {
            return true;
        }
    }
    return false;
}

const int *kth_errnos(const KthCall *call)
{
    const Page *page = page_of(call->name, call->arg);

    if (!page) {
        fx_fail("no errnos", "%s(0x%lx) is not in the table of kth-faults.c",
                call->name, call->arg);
    }
    return page->errnos;
}

bool kth_is_condition(int error)
{
    return error == ENOMEM || error == EMFILE || error == ENFILE ||
           error == ENOSPC || error == EINTR;
}

bool kth_has_way(const KthCall *call, KthWay way)
{
    const char *name = call->name;

    switch (way) {
    case KTH_REFUSED:
        return true;
    case KTH_HALF:
        return g_str_equal(name, "mprotect") || g_str_equal(name, "madvise") ||
               (g_str_equal(name, "ioctl") &&
                (call->arg == UFFDIO_REGISTER ||
                 call->arg == UFFDIO_WRITEPROTECT));
    case KTH_HOLE:
        return call->fixed;
    case KTH_SHORT:
        return g_str_equal(name, "read") || g_str_equal(name, "pread") ||
               g_str_equal(name, "pwrite") ||
               g_str_equal(name, "getrandom") ||
               g_str_equal(name, "process_madvise");
    case KTH_NOTHING:
        return g_str_equal(name, "read") || g_str_equal(name, "pread") ||
               g_str_equal(name, "pwrite");
    case KTH_WAYS:
        break;
    }
    return false;
}

/* ---- at each call; any thread ---- */

static struct {
    GMutex lock;
    KthFault fault;
    KthCall *calls;
    unsigned most;
    unsigned n;             /* calls */
    unsigned failures;
    bool is_on;
    KthCall first;          /* that failed */
    void **where;
    const void *page;       /* it stays mapped */
    bool poisoned;
    bool kept;              /* a mapping that was to go */
} state;

static KthCall describe(const DedupSysCall *c)
{
    KthCall call = {
        .arg = c->arg,
        .fixed = (fx_is_call(c, "mmap") && (c->arg & MAP_FIXED)) ||
                 fx_is_call(c, "mremap"),
    };

    g_strlcpy(call.name, c->name, sizeof(call.name));
    return call;
}

static bool is_same_kind(const KthCall *a, const KthCall *b)
{
    return strcmp(a->name, b->name) == 0 && page_of(a->name, a->arg) ==
           page_of(b->name, b->arg) &&
           (a->arg == b->arg || strcmp(a->name, "madvise"));
}

static uint32_t hash_path(void)
{
    void *frames[KTH_FRAMES];
    uint32_t hash = 0;

    for (int i = backtrace(frames, KTH_FRAMES) - 1; i > 0; i--) {
        hash = (hash ^ GPOINTER_TO_UINT(frames[i])) * 0x9e3779b1 + i;
    }
    return hash;
}

/* Does a guest store there at any time?  In a hole that is its end. */
static bool is_kept(const DedupSysCall *c)
{
    const uint8_t *page = state.page;
    const uint8_t *start = c->addr;

    return page >= start && page < start + *c->len;
}

static void do_half(DedupSysCall *c)
{
    if (fx_is_call(c, "mprotect")) {
        mprotect((void *)c->addr, *c->len / 2 & -FX_PAGE, c->arg);
    } else if (fx_is_call(c, "madvise")) {
        madvise((void *)c->addr, *c->len / 2 & -FX_PAGE, c->arg);
    } else if (fx_is_ioctl(c, UFFDIO_REGISTER)) {
        struct uffdio_register reg = *(struct uffdio_register *)c->data;

        reg.range.len = reg.range.len / 2 & -FX_PAGE;
        ioctl(c->fd, UFFDIO_REGISTER, &reg);
    } else {
        struct uffdio_writeprotect wp =
            *(struct uffdio_writeprotect *)c->data;

        wp.range.len = wp.range.len / 2 & -FX_PAGE;
        ioctl(c->fd, UFFDIO_WRITEPROTECT, &wp);
    }
}

static int go_wrong(DedupSysCall *c)
{
    KthWay way = state.fault.way;

    state.failures++;
    if (state.failures > (way == KTH_HOLE ? HOLES_MOST : FAILURES_MOST)) {
        state.is_on = false;
        return 0;
    }
    switch (way) {
    case KTH_SHORT:
    case KTH_NOTHING:
        *c->len = way == KTH_SHORT ? *c->len / 2 : 0;
        return 0;
    case KTH_HALF:
        do_half(c);
        break;
    case KTH_HOLE:
        if (!is_kept(c)) {
            fx_leave_hole(c);
        }
        break;
    case KTH_REFUSED:
    case KTH_WAYS:
        break;
    }
    return state.fault.error;
}

/* The k-th call, or the next that can go wrong like this: orders differ. */
static bool is_due(const KthCall *call)
{
    const KthFault *f = &state.fault;
    const Page *page = page_of(call->name, call->arg);
    bool can = kth_has_way(call, f->way) &&
               (!f->error || (page && lists(page, f->error)));

    if (!f->k || state.n < f->k || !can) {
        return false;
    }
    if (!state.failures) {
        state.is_on = f->reach != KTH_ONCE;
        state.first = *call;
        return true;
    }
    return state.is_on &&
           (f->reach == KTH_ALL || is_same_kind(call, &state.first));
}

static int hook(DedupSysCall *c)
{
    KthCall call = describe(c);
    int error = 0;

    g_mutex_lock(&state.lock);
    if (state.n < state.most) {
        call.path = hash_path();
        state.calls[state.n] = call;
    }
    state.n++;
    if (is_due(&call)) {
        if (!state.failures && state.where) {
            int n = backtrace(state.where, KTH_FRAMES - 1);

            for (int i = 0; i < n; i++) {
                state.where[i] = (void *)((char *)state.where[i] -
                                          __executable_start);
            }
            state.where[n] = NULL;
        }
        error = go_wrong(c);
    }
    state.kept |= error && fx_is_call(c, "munmap");
    state.poisoned |= !error && fx_is_ioctl(c, FX_UFFDIO_POISON);
    g_mutex_unlock(&state.lock);
    return error;
}

void kth_begin(const KthFault *fault)
{
    g_mutex_lock(&state.lock);
    state.fault = *fault;
    state.n = state.failures = 0;
    state.is_on = state.poisoned = state.kept = false;
    g_mutex_unlock(&state.lock);
    __atomic_store_n(&dedup_sys_hook, hook, __ATOMIC_SEQ_CST);
}

void kth_record(KthCall *calls, unsigned most)
{
    state.calls = calls;
    state.most = most;
}

unsigned kth_end(void)
{
    unsigned n;

    __atomic_store_n(&dedup_sys_hook, NULL, __ATOMIC_SEQ_CST);
    g_mutex_lock(&state.lock);
    state.fault.k = 0;
    n = state.n;
    g_mutex_unlock(&state.lock);
    return n;
}

unsigned kth_failures(void)
{
    return state.failures;
}

bool kth_poisoned(void)
{
    return state.poisoned;
}

bool kth_kept_mappings(void)
{
    return state.kept;
}

void kth_keep_mapped(const void *page)
{
    state.page = page;
}

void kth_note_where(void **where)
{
    state.where = where;
}
