/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Pages that somebody holds.  C10: while a pin counter is raised its pages
 * are neither replaced nor dropped, nor restored if they have a copy of their
 * own, which a writer may hold.  C9: pins that last, before
 * and after a merge, stay coherent: pages in a pipe (vmsplice) show what they
 * held, and a fixed buffer of io_uring, which is a pin for writing and so
 * raises the counter, is the guest's page for both sides.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine-fixture.h"
#include "host/mutant.h"

#define PAGES 256
#define CHUNK 16                /* pages that one counter covers */

static void fill(FxRam *ram)
{
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, 1);
        fx_page(ram, i, i % 4 == 3 ? 0 : i % CHUNK + 1);
    }
}

static void pin(FxRam *ram, uint32_t chunk, int by)
{
    __atomic_fetch_add(&ram->pins[chunk], by, __ATOMIC_SEQ_CST);
}

/* All that can be merged is. */
static void merge_and_stop(FxEngine *fe, FxRam *ram)
{
    fill(ram);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_set_run(fe, false);
    fx_wait_state(fe, DEDUP_STATE_STOPPED);
}

static void end(FxEngine *fe, FxRam *ram)
{
    fx_engine_free(fe);
    fx_assert_bytes(ram);
    ram->region = NULL;
    fx_ram_free(ram);
}

static void test_pinned(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autofree uint8_t *resident = g_malloc0(PAGES);
    DedupStats stats;
    FxView view;

    /* raised before: neither merged nor dropped */
    fill(ram);
    pin(ram, 2, 1);
    pin(ram, 5, 1);
    pin(ram, 5, 1);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_settled(fe);
    fx_resident(ram, resident);
    for (uint32_t i = 0; i < CHUNK; i++) {
        g_assert_false(fx_is_merged(ram, 2 * CHUNK + i));
        g_assert_false(fx_is_merged(ram, 5 * CHUNK + i));
        g_assert_cmpuint(resident[2 * CHUNK + i], !=, 0);
        g_assert_cmpuint(resident[5 * CHUNK + i], !=, 0);
    }
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, 2 * CHUNK);
    g_assert_cmpuint(view.segment_pages, ==, (PAGES - 2 * CHUNK) / 4 * 3);
    fx_stats(fe, &stats);
    g_assert_cmpuint(stats.pass.pinned, ==, 2 * CHUNK);
    fx_assert_bytes(ram);

    /* lowered: merged like the rest; one of two does not do */
    pin(ram, 2, -1);
    pin(ram, 5, -1);
    fx_wait_settled(fe);
    g_assert_true(fx_is_merged(ram, 2 * CHUNK));
    g_assert_false(fx_is_merged(ram, 5 * CHUNK));
    pin(ram, 5, -1);
    fx_wait_settled(fe);
    fx_view(ram, &view);
    g_assert_cmpuint(view.own_pages, ==, 0);

    fx_unmerge(fe);
    end(fe, ram);
}

/* The device lets go when a restore has chosen its pages. */
static FxRam *let_go;

static void lets_go(int stage)
{
    if (stage == DEDUP_HOOK_CHOSEN && let_go) {
        pin(let_go, 5, -1);
        let_go = NULL;
    }
}

/*
 * A page that is held when a restore chooses is not taken from KSM.  So it
 * stays out, even if it is not held any more when it is frozen.
 */
static void test_let_go(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autoptr(GError) error = NULL;

    merge_and_stop(fe, ram);
    if (fx_freeze == DEDUP_FREEZE_MPROTECT) {
        g_test_skip("what is pinned is a part of its own");
        end(fe, ram);
        return;
    }
    fx_page(ram, 81, 77);
    pin(ram, 5, 1);
    let_go = ram;
    dedup_mutant_hook = lets_go;
    g_assert_false(dedup_engine_restore_range(fe->e, fx_addr(ram, 64),
                                              64 * FX_PAGE, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_PINNED);
    g_assert_null(let_go);
    dedup_mutant_hook = NULL;
    g_assert_true(fx_is_merged(ram, 81));
    g_assert_false(fx_is_merged(ram, 80));
    fx_assert_bytes(ram);
    g_assert_true(dedup_engine_restore_range(fe->e, fx_addr(ram, 64),
                                             64 * FX_PAGE, NULL));
    g_assert_false(fx_is_merged(ram, 81));
    fx_unmerge(fe);
    end(fe, ram);
}

/*
 * Raised on merged pages, and never lowered again: who unmaps less than it
 * has mapped.  A page that no write has copied is held by nobody and can be
 * restored; of the others the caller is told.
 */
static void test_leaked(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    g_autoptr(GError) error = NULL;
    FxView view;

    merge_and_stop(fe, ram);
    if (fx_freeze == DEDUP_FREEZE_MPROTECT) {
        g_test_skip("what is pinned is never frozen");
        end(fe, ram);
        return;
    }
    for (uint32_t chunk = 4; chunk < 12; chunk++) {
        pin(ram, chunk, 1);
    }
    if (!dedup_engine_restore_range(fe->e, fx_addr(ram, 96), 64 * FX_PAGE,
                                    &error)) {
        fx_fail("leaked pin blocks", "%s: %s", fx_kind_name(ram->kind),
                error->message);
    }
    for (uint32_t i = 96; i < 160; i++) {
        g_assert_false(fx_is_merged(ram, i));
    }
    fx_assert_bytes(ram);

    /* it may be the device that has written these */
    fx_page(ram, 81, 77);
    fx_page(ram, 84, 78);
    fx_restore_begin(fe, true, false);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, 2);
    g_assert_true(fx_is_merged(ram, 81) && fx_is_merged(ram, 84));
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 2);
    fx_assert_bytes(ram);

    /* an unmerge that waits goes on when the I/O ends */
    fx_restore_begin(fe, true, false);
    fx_wait_state(fe, DEDUP_STATE_UNMERGING);
    pin(ram, 5, -1);
    fx_wait_restored(fe);
    g_assert_cmpuint(fe->left, ==, 0);
    fx_view(ram, &view);
    g_assert_cmpuint(view.segment_pages, ==, 0);
    end(fe, ram);
}

typedef struct PageIs {
    FxRam *ram;
    uint32_t page;
} PageIs;

static bool page_is_merged(void *opaque)
{
    PageIs *p = opaque;

    return fx_is_merged(p->ram, p->page);
}

static void splice_page(FxRam *ram, uint32_t page, int fd)
{
    struct iovec iov = { fx_addr(ram, page), FX_PAGE };

    g_assert_cmpint(vmsplice(fd, &iov, 1, 0), ==, FX_PAGE);
}

static void read_spliced(int fd, uint64_t seed)
{
    uint8_t have[FX_PAGE], want[FX_PAGE];
    size_t got = 0;

    fx_content(want, seed);
    while (got < FX_PAGE) {
        ssize_t n = read(fd, have + got, FX_PAGE - got);

        g_assert_cmpint(n, >, 0);
        got += n;
    }
    if (memcmp(have, want, FX_PAGE)) {
        fx_fail("foreign bytes", "in the pipe");
    }
}

/* Pages in a pipe: given before the merge, and after it. */
static void test_vmsplice(gconstpointer data)
{
    FxRam *ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    FxEngine *fe = fx_engine_new(NULL);
    PageIs p = { .ram = ram, .page = 17 };
    int fds[2];

    g_assert_cmpint(pipe(fds), ==, 0);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i % 8 + 1);
    }
    splice_page(ram, 17, fds[1]);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_until(page_is_merged, &p, "not merged");
    fx_page(ram, 17, 99);       /* into the copy */
    read_spliced(fds[0], 17 % 8 + 1);
    fx_assert_bytes(ram);

    p.page = 18;
    fx_wait_until(page_is_merged, &p, "not merged");
    splice_page(ram, 18, fds[1]);
    fx_page(ram, 18, 98);
    fx_unmerge(fe);
    fx_page(ram, 18, 97);
    read_spliced(fds[0], 18 % 8 + 1);
    fx_assert_bytes(ram);
    close(fds[0]);
    close(fds[1]);
    end(fe, ram);
}

/* ---- io_uring, by its system calls ---- */

typedef struct Ring {
    int fd;
    struct io_uring_params params;
    uint8_t *sq;
    uint8_t *cq;
    struct io_uring_sqe *sqes;
} Ring;

static bool ring_open(Ring *r)
{
    memset(r, 0, sizeof(*r));
    r->fd = syscall(SYS_io_uring_setup, 4, &r->params);
    if (r->fd < 0) {
        return false;
    }
    r->sq = mmap(NULL, r->params.sq_off.array + 4 * sizeof(uint32_t),
                 PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
                 IORING_OFF_SQ_RING);
    r->cq = mmap(NULL, r->params.cq_off.cqes + r->params.cq_entries *
                 sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
                 MAP_SHARED, r->fd, IORING_OFF_CQ_RING);
    r->sqes = mmap(NULL, 4 * sizeof(struct io_uring_sqe),
                   PROT_READ | PROT_WRITE, MAP_SHARED, r->fd,
                   IORING_OFF_SQES);
    g_assert_true(r->sq != MAP_FAILED && r->cq != MAP_FAILED &&
                  r->sqes != MAP_FAILED);
    return true;
}

/* One request on the fixed buffer, and its end. */
static void ring_do(Ring *r, unsigned op, int fd, void *buf)
{
    uint32_t *tail = (uint32_t *)(r->sq + r->params.sq_off.tail);
    uint32_t *array = (uint32_t *)(r->sq + r->params.sq_off.array);
    uint32_t *head = (uint32_t *)(r->cq + r->params.cq_off.head);
    uint32_t at = *tail & (r->params.sq_entries - 1);
    struct io_uring_cqe *cqe;

    memset(&r->sqes[at], 0, sizeof(r->sqes[at]));
    r->sqes[at].opcode = op;
    r->sqes[at].fd = fd;
    r->sqes[at].addr = (uintptr_t)buf;
    r->sqes[at].len = FX_PAGE;
    array[at] = at;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    g_assert_cmpint(syscall(SYS_io_uring_enter, r->fd, 1, 1,
                            IORING_ENTER_GETEVENTS, NULL, 0), ==, 1);
    cqe = (struct io_uring_cqe *)(r->cq + r->params.cq_off.cqes) +
          (*head & (r->params.cq_entries - 1));
    g_assert_cmpint(cqe->res, ==, FX_PAGE);
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
}

/* Kernel and guest see one page, both ways, while the scanner runs. */
static void use_fixed(FxEngine *fe, Ring *r, FxRam *ram, uint32_t page)
{
    int file = memfd_create("test-file", MFD_CLOEXEC);
    uint8_t contents[FX_PAGE], seen[FX_PAGE];

    g_assert_cmpint(file, >=, 0);
    for (unsigned i = 0; i < 40; i++) {
        /* the device writes; now and then what all others have */
        uint64_t seed = i % 3 ? 300 + i : page % CHUNK + 1;

        fx_content(contents, seed);
        g_assert_cmpint(pwrite(file, contents, FX_PAGE, 0), ==, FX_PAGE);
        ring_do(r, IORING_OP_READ_FIXED, file, fx_addr(ram, page));
        fx_shadow_page(ram, page, seed);
        fx_assert_bytes(ram);
        if (i % 8 == 0) {
            fx_wait_scans(fe, 3);
            fx_assert_bytes(ram);
        }
        /* the guest writes, the device reads */
        fx_page(ram, page, i % 3 == 1 ? page % CHUNK + 1 : 700 + i);
        if (i % 8 == 4) {
            fx_wait_scans(fe, 3);
        }
        ring_do(r, IORING_OP_WRITE_FIXED, file, fx_addr(ram, page));
        g_assert_cmpint(pread(file, seen, FX_PAGE, 0), ==, FX_PAGE);
        if (memcmp(seen, ram->shadow + page * FX_PAGE, FX_PAGE)) {
            fx_fail("foreign bytes", "the device reads another page");
        }
    }
    close(file);
}

static void register_chunk(Ring *r, FxRam *ram, uint32_t chunk)
{
    struct iovec iov = { fx_addr(ram, chunk * CHUNK), CHUNK * FX_PAGE };

    pin(ram, chunk, 1);         /* before the kernel can pin a page */
    g_assert_cmpint(syscall(SYS_io_uring_register, r->fd,
                            IORING_REGISTER_BUFFERS, &iov, 1), ==, 0);
}

static void unregister_chunk(Ring *r, FxRam *ram, uint32_t chunk)
{
    g_assert_cmpint(syscall(SYS_io_uring_register, r->fd,
                            IORING_UNREGISTER_BUFFERS, NULL, 0), ==, 0);
    pin(ram, chunk, -1);
}

static void test_fixed_buffer(gconstpointer data)
{
    FxRam *ram;
    FxEngine *fe;
    PageIs p;
    Ring r;

    if (!ring_open(&r)) {
        g_test_skip("no io_uring here");
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    fe = fx_engine_new(NULL);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i % CHUNK + 1);
    }
    /* before the merge */
    register_chunk(&r, ram, 3);
    fx_add(fe, ram);
    fx_engine_start(fe);
    p = (PageIs) { .ram = ram, .page = 2 * CHUNK };
    fx_wait_until(page_is_merged, &p, "not merged");
    use_fixed(fe, &r, ram, 3 * CHUNK + 5);
    unregister_chunk(&r, ram, 3);
    p.page = 3 * CHUNK;
    fx_wait_until(page_is_merged, &p, "not merged");

    /* after it: taking the pin copies the pages */
    p.page = 9 * CHUNK + 4;
    fx_wait_until(page_is_merged, &p, "not merged");
    register_chunk(&r, ram, 9);
    use_fixed(fe, &r, ram, 9 * CHUNK + 4);
    unregister_chunk(&r, ram, 9);
    fx_wait_settled(fe);
    fx_assert_bytes(ram);
    close(r.fd);
    fx_unmerge(fe);
    end(fe, ram);
}

/*
 * A device takes a hold of merged pages, which copies them.  They stay while
 * it has them, and what it writes then is the guest's; the pages around are
 * restored.  Readers of merged pages are in nobody's way (see test_vmsplice).
 */
static void test_held(gconstpointer data)
{
    int file = memfd_create("test-file", MFD_CLOEXEC);
    g_autoptr(GError) error = NULL;
    uint8_t contents[FX_PAGE];
    FxEngine *fe;
    FxRam *ram;
    Ring r;

    if (!ring_open(&r)) {
        g_test_skip("no io_uring here");
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    fe = fx_engine_new(NULL);
    merge_and_stop(fe, ram);
    register_chunk(&r, ram, 7);
    dedup_engine_restore_range(fe->e, fx_addr(ram, 96), 64 * FX_PAGE, &error);
    for (uint32_t i = 0; i < CHUNK; i++) {
        uint32_t page = 7 * CHUNK + i;

        fx_content(contents, 500 + i);
        g_assert_cmpint(pwrite(file, contents, FX_PAGE, 0), ==, FX_PAGE);
        ring_do(&r, IORING_OP_READ_FIXED, file, fx_addr(ram, page));
        if (memcmp(fx_addr(ram, page), contents, FX_PAGE)) {
            fx_fail("lost read", "%s page %u", fx_kind_name(ram->kind), page);
        }
        fx_shadow_page(ram, page, 500 + i);
    }
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_PINNED);
    for (uint32_t i = 96; i < 160; i++) {
        g_assert_true(fx_is_merged(ram, i) ==
                      (i / CHUNK == 7 && i % 4 != 3));
    }
    fx_assert_bytes(ram);
    unregister_chunk(&r, ram, 7);
    fx_unmerge(fe);
    fx_assert_bytes(ram);
    close(r.fd);
    close(file);
    end(fe, ram);
}

/*
 * M1: a device gets hold of a page that is chosen already, before the freeze,
 * which does not stop it.  What it writes comes when the window is over.
 */
static struct {
    FxRam *ram;
    Ring ring;
    int holds;              /* atomic */
} writer;

#define WRITER_CHUNK 2          /* in the first window */

static void writer_comes(int stage)
{
    if (stage == DEDUP_HOOK_ADMITTED && !g_atomic_int_get(&writer.holds)) {
        g_atomic_int_set(&writer.holds, 1);
        register_chunk(&writer.ring, writer.ram, WRITER_CHUNK);
    }
}

static void test_late_writer(gconstpointer data)
{
    int file = memfd_create("test-file", MFD_CLOEXEC);
    PageIs p = { .page = (WRITER_CHUNK + 1) * CHUNK };
    uint8_t contents[FX_PAGE];
    FxEngine *fe;
    FxRam *ram;

    if (!ring_open(&writer.ring)) {
        g_test_skip("no io_uring here");
        return;
    }
    ram = fx_ram_new(GPOINTER_TO_INT(data), PAGES);
    for (uint32_t i = 0; i < PAGES; i++) {
        fx_page(ram, i, i % CHUNK + 1);
    }
    writer.ram = p.ram = ram;
    g_atomic_int_set(&writer.holds, 0);
    dedup_mutant_hook = writer_comes;
    fe = fx_engine_new(NULL);
    fx_add(fe, ram);
    fx_engine_start(fe);
    fx_wait_until(page_is_merged, &p, "not merged");
    g_assert_true(g_atomic_int_get(&writer.holds));
    for (uint32_t i = 0; i < CHUNK; i++) {
        uint32_t page = WRITER_CHUNK * CHUNK + i;

        fx_content(contents, 500 + i);
        g_assert_cmpint(pwrite(file, contents, FX_PAGE, 0), ==, FX_PAGE);
        ring_do(&writer.ring, IORING_OP_READ_FIXED, file, fx_addr(ram, page));
        if (memcmp(fx_addr(ram, page), contents, FX_PAGE)) {
            fx_fail("lost read", "%s page %u", fx_kind_name(ram->kind), page);
        }
        fx_shadow_page(ram, page, 500 + i);
    }
    fx_assert_bytes(ram);
    unregister_chunk(&writer.ring, ram, WRITER_CHUNK);
    fx_wait_settled(fe);
    fx_assert_bytes(ram);
    close(file);
    close(writer.ring.fd);
    fx_unmerge(fe);
    end(fe, ram);
    dedup_mutant_hook = NULL;
}

static void add_tests(const char *name, GTestDataFunc test)
{
    for (FxKind kind = 0; kind < FX_KINDS; kind++) {
        g_autofree char *path = g_strdup_printf("/pins/%s/%s", name,
                                                fx_kind_name(kind));

        /* this one takes seconds: the engine waits for I/O to end */
        if (kind == FX_MEMFD || (test != test_leaked &&
                                 (kind == FX_ANON || kind == FX_PRIVATE))) {
            g_test_add_data_func(path, GINT_TO_POINTER(kind), test);
        }
    }
}

int main(int argc, char **argv)
{
    fx_init(&argc, &argv);
    add_tests("counter", test_pinned);
    add_tests("leaked", test_leaked);
    add_tests("held", test_held);
    add_tests("vmsplice", test_vmsplice);
    add_tests("fixed-buffer", test_fixed_buffer);
    add_tests("let-go", test_let_go);
    add_tests("late-writer", test_late_writer);
    return g_test_run();
}
