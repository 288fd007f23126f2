/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Writers of this process: stores, read(2), and O_DIRECT reads of a real file
 * system, whose data a device writes to memory without a page fault.
 *
 * The O_DIRECT writer keeps some reads in flight.  It raises the pin counters
 * of the memory around each, as QEMU does around a DMA mapping: before the
 * system call that pins the pages, until the data is there.
 *
 * Thread: each writer's own.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "stress.h"

/* Slots that one O_DIRECT read fills, and reads in flight. */
#define BATCH 8
#define DEPTH 4

STRESS_GUEST
static void store(StressWriter *w, uint32_t page, uint8_t value)
{
    StressWord *word = (StressWord *)stress_slot(w, page);

    for (unsigned k = 0; k < STRESS_WORDS; k++) {
        word[k] = stress_word(w->slot, value, k);
    }
}

/* What a slot holds instead of @want: a symptom. */
STRESS_GUEST
static const char *symptom(StressWriter *w, uint32_t page, uint8_t want)
{
    StressWord *word = (StressWord *)stress_slot(w, page);

    for (unsigned v = 0; v < STRESS_VALUES; v++) {
        unsigned k = 0;

        while (k < STRESS_WORDS && word[k] == stress_word(w->slot, v, k)) {
            k++;
        }
        if (k == STRESS_WORDS) {
            return v == want ? "wrong for a moment" :
                   v == 0 ? "zeros" : "another value: lost write or another "
                                      "page's bytes";
        }
    }
    return "a mixture of values";
}

STRESS_GUEST
bool stress_check(StressWriter *w, uint32_t page, const char *when)
{
    StressWord *word = (StressWord *)stress_slot(w, page);
    uint8_t want = w->shadow[page];

    for (unsigned k = 0; k < STRESS_WORDS; k++) {
        uint32_t got = word[k];

        if (got != stress_word(w->slot, want, k)) {
            stress_fail(w->s, "%s, %s: page %u of %s: word %u is 0x%x instead "
                        "of 0x%x; the slot holds %s", w->name, when,
                        page % w->s->pages,
                        w->s->rams[page / w->s->pages].name, k, got,
                        stress_word(w->slot, want, k),
                        symptom(w, page, want));
            return false;
        }
    }
    return true;
}

static uint32_t any_page(StressWriter *w)
{
    return stress_random(w) % (w->s->pages * STRESS_RAMS);
}

static void count(StressWriter *w, unsigned n)
{
    __atomic_fetch_add(&w->writes, n, __ATOMIC_RELAXED);
}

/*
 * The system call itself: the library's function is known to the thread
 * sanitizer, which would take the guest's memory for ours.
 */
static ssize_t guest_read(int fd, void *to, uint64_t offset)
{
    return syscall(SYS_pread64, fd, to, STRESS_SLOT, offset);
}

/* ---- stores ---- */

static void user_run(StressWriter *w)
{
    while (stress_go_on(w->s)) {
        uint32_t page = any_page(w);
        uint8_t value = stress_next_value(w->shadow[page], page,
                                          stress_random(w));

        if (!stress_check(w, page, "before a store")) {
            return;
        }
        store(w, page, value);
        w->shadow[page] = value;
        stress_check(w, page, "after a store");
        count(w, 1);
    }
}

StressWriter stress_user = { .name = "stores", .slot = 0, .run = user_run };

/* ---- read(2) ---- */

/* A file with each value's slot, BATCH times over. */
static bool fill(StressWriter *w, int fd)
{
    uint32_t words[STRESS_WORDS];

    for (unsigned v = 0; v < STRESS_VALUES; v++) {
        for (unsigned k = 0; k < STRESS_WORDS; k++) {
            words[k] = stress_word(w->slot, v, k);
        }
        for (unsigned i = 0; i < BATCH; i++) {
            if (pwrite(fd, words, sizeof(words),
                       (v * BATCH + i) * STRESS_SLOT) != sizeof(words)) {
                return false;
            }
        }
    }
    return true;
}

/* The counter of the 64 KiB around a page. */
static uint16_t *pin_of(StressWriter *w, uint32_t page)
{
    Stress *s = w->s;

    return &s->rams[page / s->pages].pins[
        ((uint64_t)(page % s->pages) * STRESS_PAGE) >> DEDUP_PIN_SHIFT];
}

/* Writing to it would fail while it is frozen, or bypasses page tables. */
static void begin_write(StressWriter *w, uint32_t page)
{
    __atomic_fetch_add(pin_of(w, page), 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(dedup_engine_windows(), __ATOMIC_SEQ_CST)) {
        dedup_engine_wait_window(stress_slot(w, page), STRESS_SLOT);
    }
}

static void end_write(StressWriter *w, uint32_t page)
{
    __atomic_fetch_sub(pin_of(w, page), 1, __ATOMIC_SEQ_CST);
}

static const char *read_open(StressWriter *w)
{
    int fd = memfd_create("stress", MFD_CLOEXEC);

    if (fd < 0 || !fill(w, fd)) {
        return "no memory for a file";
    }
    w->data = GINT_TO_POINTER(fd);
    return NULL;
}

static void file_close(StressWriter *w)
{
    close(GPOINTER_TO_INT(w->data));
}

static void read_run(StressWriter *w)
{
    int fd = GPOINTER_TO_INT(w->data);

    while (stress_go_on(w->s)) {
        uint32_t page = any_page(w);
        uint8_t value = stress_next_value(w->shadow[page], page,
                                          stress_random(w));
        ssize_t n;

        if (!stress_check(w, page, "before a read")) {
            return;
        }
        if (w->s->freeze == DEDUP_FREEZE_MPROTECT) {
            begin_write(w, page);
        }
        n = guest_read(fd, stress_slot(w, page),
                       value * BATCH * STRESS_SLOT);
        if (w->s->freeze == DEDUP_FREEZE_MPROTECT) {
            end_write(w, page);
        }
        if (n != STRESS_SLOT) {
            stress_fail(w->s, "read(2) into RAM: %zd, %s", n,
                        g_strerror(errno));
            return;
        }
        w->shadow[page] = value;
        stress_check(w, page, "after a read");
        count(w, 1);
    }
}

StressWriter stress_read = {
    .name = "read(2)", .slot = 1,
    .open = read_open, .run = read_run, .close = file_close,
};

/* ---- O_DIRECT ---- */

/* A read in flight. */
typedef struct Request {
    struct iocb cb;
    struct iovec iov[BATCH];
    uint32_t pages[BATCH];
    uint8_t value;
} Request;

typedef struct Direct {
    int fd;
    aio_context_t context;
    uint8_t *busy;            /* a byte per page: being read to */
    Request requests[DEPTH];
    unsigned in_flight;
} Direct;

static int direct_file(StressWriter *w, const char **why)
{
    /* /tmp is often a tmpfs, whose O_DIRECT pins nothing */
    char path[] = "/var/tmp/stress-dedup-XXXXXX";
    int fd = mkstemp(path);
    struct statfs fs;
    bool ok = fd >= 0 && fstatfs(fd, &fs) == 0 && fill(w, fd) &&
              fsync(fd) == 0;
    int direct = ok ? open(path, O_RDONLY | O_DIRECT | O_CLOEXEC) : -1;
    void *probe = NULL;
    ssize_t n = 0;

    if (fd >= 0) {
        unlink(path);
        close(fd);
    }
    *why = "no file in /var/tmp";
    if (ok && fs.f_type == TMPFS_MAGIC) {
        *why = "/var/tmp is not on a disk";
    } else if (ok) {
        *why = "the file system in /var/tmp has no O_DIRECT by 1 KiB";
        if (direct >= 0 &&
            posix_memalign(&probe, STRESS_PAGE, STRESS_PAGE) == 0) {
            n = pread(direct, (char *)probe + STRESS_SLOT, STRESS_SLOT,
                      STRESS_SLOT);
            free(probe);
        }
    }
    if (n != STRESS_SLOT) {
        if (direct >= 0) {
            close(direct);
        }
        return -1;
    }
    return direct;
}

static void direct_close(StressWriter *w)
{
    Direct *d = w->data;

    syscall(SYS_io_destroy, d->context);
    close(d->fd);
    g_free(d->busy);
    g_free(d);
}

static const char *direct_open(StressWriter *w)
{
    const char *why;
    Direct *d;
    int fd = direct_file(w, &why);

    if (fd < 0) {
        return why;
    }
    d = g_new0(Direct, 1);
    d->fd = fd;
    d->busy = g_malloc0(w->s->pages * STRESS_RAMS);
    w->data = d;
    if (syscall(SYS_io_setup, DEPTH, &d->context) < 0) {
        direct_close(w);
        return "no asynchronous I/O";
    }
    return NULL;
}

/* Pages to read to; if they are easily found, none that holds the value. */
static void choose(StressWriter *w, Direct *d, Request *r)
{
    r->value = stress_random(w) % 2 ? 0 : stress_random(w) % STRESS_VALUES;
    for (unsigned i = 0, tries = 0; i < BATCH; tries++) {
        uint32_t page = any_page(w);

        if (!d->busy[page] &&
            (tries > 4 * BATCH ||
             (w->shadow[page] != r->value &&
              !(r->value && stress_mostly_zero(page))))) {
            d->busy[page] = 1;
            r->pages[i++] = page;
        }
    }
}

static bool submit(StressWriter *w, Direct *d, Request *r)
{
    struct iocb *list = &r->cb;

    choose(w, d, r);
    for (unsigned i = 0; i < BATCH; i++) {
        if (!stress_check(w, r->pages[i], "before a direct read")) {
            return false;
        }
        r->iov[i].iov_base = stress_slot(w, r->pages[i]);
        r->iov[i].iov_len = STRESS_SLOT;
    }
    r->cb = (struct iocb) {
        .aio_data = (uintptr_t)r,
        .aio_lio_opcode = IOCB_CMD_PREADV,
        .aio_fildes = d->fd,
        .aio_buf = (uintptr_t)r->iov,
        .aio_nbytes = BATCH,
        .aio_offset = r->value * BATCH * STRESS_SLOT,
    };
    for (unsigned i = 0; i < BATCH; i++) {
        begin_write(w, r->pages[i]);
    }
    if (syscall(SYS_io_submit, d->context, 1, &list) != 1) {
        stress_fail(w->s, "io_submit: %s", g_strerror(errno));
        return false;
    }
    d->in_flight++;
    return true;
}

static void complete(StressWriter *w, Direct *d, Request *r, int64_t result)
{
    d->in_flight--;
    for (unsigned i = 0; i < BATCH; i++) {
        end_write(w, r->pages[i]);
    }
    if (result != BATCH * STRESS_SLOT) {
        stress_fail(w->s, "direct read into RAM: %" G_GINT64_FORMAT, result);
        return;
    }
    for (unsigned i = 0; i < BATCH; i++) {
        w->shadow[r->pages[i]] = r->value;
        d->busy[r->pages[i]] = 0;
        stress_check(w, r->pages[i], "after a direct read");
    }
    count(w, BATCH);
}

static void direct_run(StressWriter *w)
{
    Direct *d = w->data;
    struct io_event events[DEPTH];
    bool ok = true;

    for (unsigned i = 0; i < DEPTH && ok; i++) {
        ok = submit(w, d, &d->requests[i]);
    }
    while (d->in_flight) {
        long n = syscall(SYS_io_getevents, d->context, 1, DEPTH, events,
                         NULL);

        for (long i = 0; i < n; i++) {
            Request *r = (Request *)(uintptr_t)events[i].data;

            complete(w, d, r, events[i].res);
            ok = ok && stress_go_on(w->s) && submit(w, d, r);
        }
    }
}

StressWriter stress_direct = {
    .name = "O_DIRECT", .slot = 2,
    .open = direct_open, .run = direct_run, .close = direct_close,
};
