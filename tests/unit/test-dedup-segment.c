/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of segments: what is built is what is read, nobody can change it
 * afterwards, and what is not sealed against every change is refused (M7).
 */

#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"
#include "host/mutant.h"
#include "group/segment.h"

#define ALL_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 0x0004U
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21u << 26)
#endif

static void fill(uint8_t *page, unsigned seed)
{
    for (size_t i = 0; i < DEDUP_PAGE_SIZE; i++) {
        page[i] = (seed * 131 + i * 7 + (i >> 8)) & 0xff;
    }
}

static void assert_page(const uint8_t *page, unsigned seed)
{
    uint8_t want[DEDUP_PAGE_SIZE];

    fill(want, seed);
    g_assert_cmpmem(page, DEDUP_PAGE_SIZE, want, DEDUP_PAGE_SIZE);
}

static DedupBuilder *build(unsigned npages)
{
    g_autoptr(GError) error = NULL;
    DedupBuilder *b = dedup_builder_new(&error);

    g_assert_no_error(error);
    for (unsigned i = 0; i < npages; i++) {
        uint8_t page[DEDUP_PAGE_SIZE];

        fill(page, i);
        g_assert_cmpint(dedup_builder_append(b, page), ==, i);
    }
    return b;
}

static DedupSegment *finish(DedupBuilder *b, uint32_t gid)
{
    g_autoptr(GError) error = NULL;
    DedupSegment *s;

    dedup_builder_flush(b);
    s = dedup_builder_finish(b, gid, &error);
    g_assert_no_error(error);
    g_assert_nonnull(s);
    return s;
}

/* Every length at an edge. */
static void test_build(void)
{
    static const unsigned lengths[] = { 1, 2, 16, 17, 64, 511, 512 };
    static const uint8_t page[DEDUP_PAGE_SIZE];

    for (unsigned l = 0; l < G_N_ELEMENTS(lengths); l++) {
        unsigned n = lengths[l];
        DedupBuilder *b = build(n);
        DedupSegment *s;
        struct stat st;

        g_assert_cmpuint(dedup_builder_count(b), ==, n);
        if (n == DEDUP_SEGMENT_PAGES) {
            g_assert_cmpint(dedup_builder_append(b, page), ==, -1);
            g_assert_cmpint(errno, ==, ENOSPC);
        }
        s = finish(b, 100 + l);
        g_assert_cmpuint(s->npages, ==, n);
        g_assert_cmpuint(s->gid, ==, 100 + l);
        g_assert_true(s->mine);
        for (unsigned i = 0; i < n; i++) {
            assert_page(s->map + i * DEDUP_PAGE_SIZE, i);
        }
        g_assert_cmpint(fstat(s->fd, &st), ==, 0);
        g_assert_cmpint(st.st_size, ==, n * DEDUP_PAGE_SIZE);
        g_assert_cmpint(st.st_blocks * 512, ==, n * DEDUP_PAGE_SIZE);
        dedup_segment_free(s);
    }
}

/* Append pages [from, to); the last one finds no room if @fails. */
static void append(DedupBuilder *b, unsigned from, unsigned to, bool fails)
{
    for (unsigned i = from; i < to; i++) {
        uint8_t page[DEDUP_PAGE_SIZE];

        fill(page, i);
        g_assert_cmpint(dedup_builder_append(b, page), ==,
                        fails && i + 1 == to ? -1 : (int)i);
    }
}

static void assert_finished(DedupBuilder *b, unsigned npages)
{
    DedupSegment *s = finish(b, 7);
    struct stat st;

    g_assert_cmpuint(s->npages, ==, npages);
    g_assert_cmpint(fstat(s->fd, &st), ==, 0);
    g_assert_cmpint(st.st_size, ==, npages * DEDUP_PAGE_SIZE);
    for (unsigned i = 0; i < npages; i++) {
        assert_page(s->map + i * DEDUP_PAGE_SIZE, i);
    }
    dedup_segment_free(s);
}

/*
 * No room for a page, or for a part of one: what was there before counts, and
 * if there is room again it goes on where it was.
 */
static void test_no_room(void)
{
    struct rlimit old, some;

    signal(SIGXFSZ, SIG_IGN);
    g_assert_cmpint(getrlimit(RLIMIT_FSIZE, &old), ==, 0);
    some = old;
    for (unsigned half = 0; half < 2; half++) {
        DedupBuilder *b = build(16);

        some.rlim_cur = 18 * DEDUP_PAGE_SIZE + half * DEDUP_PAGE_SIZE / 2;
        g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &some), ==, 0);
        append(b, 16, 32, true);
        g_assert_cmpuint(dedup_builder_count(b), ==, 18);
        g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &old), ==, 0);
        append(b, 18, 40, false);
        assert_finished(b, 40);

        /* at the end */
        b = build(16);
        append(b, 16, 20, false);
        g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &some), ==, 0);
        assert_finished(b, 18);
        g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &old), ==, 0);
    }
}

/* Not even for the first one. */
static void test_no_room_at_all(void)
{
    g_autoptr(GError) error = NULL;
    struct rlimit old, none;
    DedupBuilder *b = build(1);

    g_assert_cmpint(getrlimit(RLIMIT_FSIZE, &old), ==, 0);
    none = old;
    none.rlim_cur = 0;
    g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &none), ==, 0);
    g_assert_cmpuint(dedup_builder_flush(b), ==, 0);
    g_assert_null(dedup_builder_finish(b, 7, &error));
    g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &old), ==, 0);
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM);
}

static void test_nothing(void)
{
    g_autoptr(GError) error = NULL;

    g_assert_null(dedup_builder_finish(build(0), 1, &error));
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM);
    dedup_builder_free(build(3));
    dedup_builder_free(NULL);
}

/* No way in for anybody who has the fd (I2). */
static void test_immutable(void)
{
    DedupSegment *s = finish(build(4), 7);
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", s->fd);
    uint8_t byte = 0xff;
    int again = open(path, O_RDWR | O_CLOEXEC);

    g_assert_cmpint(fcntl(s->fd, F_GET_SEALS) & ALL_SEALS, ==, ALL_SEALS);
    for (unsigned i = 0; i < 2; i++) {
        int fd = i ? again : s->fd;

        if (fd < 0) {
            continue;
        }
        g_assert_cmpint(pwrite(fd, &byte, 1, 0), <, 0);
        g_assert_cmpint(ftruncate(fd, DEDUP_PAGE_SIZE), <, 0);
        g_assert_cmpint(ftruncate(fd, 9 * DEDUP_PAGE_SIZE), <, 0);
        g_assert_cmpint(fallocate(fd, FALLOC_FL_PUNCH_HOLE |
                                  FALLOC_FL_KEEP_SIZE, 0, DEDUP_PAGE_SIZE),
                        <, 0);
        g_assert_true(mmap(NULL, DEDUP_PAGE_SIZE, PROT_READ | PROT_WRITE,
                           MAP_SHARED, fd, 0) == MAP_FAILED);
    }
    if (again >= 0) {
        close(again);
    }
    for (unsigned i = 0; i < 4; i++) {
        assert_page(s->map + i * DEDUP_PAGE_SIZE, i);
    }
    dedup_segment_free(s);
}

/* A private mapping of a page: a write stays with the writer (C2). */
static void test_private_write(void)
{
    DedupSegment *s = finish(build(2), 7);
    uint8_t *map = mmap(NULL, 2 * DEDUP_PAGE_SIZE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_NORESERVE, s->fd, 0);

    g_assert_true(map != MAP_FAILED);
    map[DEDUP_PAGE_SIZE + 5] ^= 1;
    assert_page(s->map + DEDUP_PAGE_SIZE, 1);
    assert_page(map, 0);
    /* The mapping outlives the segment. */
    dedup_segment_free(s);
    map[DEDUP_PAGE_SIZE + 5] ^= 1;
    assert_page(map, 0);
    assert_page(map + DEDUP_PAGE_SIZE, 1);
    munmap(map, 2 * DEDUP_PAGE_SIZE);
}

static void test_accept(void)
{
    g_autoptr(GError) error = NULL;
    DedupSegment *s = finish(build(5), 9), *got;

    got = dedup_segment_accept(fcntl(s->fd, F_DUPFD_CLOEXEC, 0), 9, 5,
                               &error);
    g_assert_no_error(error);
    g_assert_nonnull(got);
    g_assert_false(got->mine);
    g_assert_cmpuint(got->gid, ==, 9);
    g_assert_cmpuint(got->npages, ==, 5);
    dedup_segment_free(s);
    for (unsigned i = 0; i < 5; i++) {
        assert_page(got->map + i * DEDUP_PAGE_SIZE, i);
    }
    dedup_segment_free(got);
}

static int memfd(unsigned npages, int seals)
{
    int fd = memfd_create("test-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    uint8_t page[DEDUP_PAGE_SIZE];

    g_assert_cmpint(fd, >=, 0);
    for (unsigned i = 0; i < npages; i++) {
        fill(page, i);
        g_assert_cmpint(write(fd, page, sizeof(page)), ==, sizeof(page));
    }
    if (seals) {
        g_assert_cmpint(fcntl(fd, F_ADD_SEALS, seals), ==, 0);
    }
    return fd;
}

/* Takes @fd; checks that it was closed. */
static void assert_refused(int fd, unsigned npages)
{
    g_autoptr(GError) error = NULL;

    g_assert_null(dedup_segment_accept(fd, 1, npages, &error));
    g_assert_nonnull(error);
    g_assert_true(error->domain == DEDUP_ERROR);
    if (fd >= 0) {
        g_assert_cmpint(fcntl(fd, F_GETFD), <, 0);
        g_assert_cmpint(errno, ==, EBADF);
    }
}

static void test_seals(void)
{
    g_autoptr(GError) error = NULL;
    DedupSegment *s;

    for (int seals = 0; seals < ALL_SEALS; seals++) {
        assert_refused(memfd(3, seals), 3);
    }
    /* F_SEAL_FUTURE_WRITE is no F_SEAL_WRITE: old mappings still write. */
    assert_refused(memfd(3, 0x10 | (ALL_SEALS & ~F_SEAL_WRITE)), 3);
    s = dedup_segment_accept(memfd(3, ALL_SEALS), 1, 3, &error);
    g_assert_no_error(error);
    dedup_segment_free(s);
}

static void test_size(void)
{
    int fd;

    assert_refused(memfd(3, ALL_SEALS), 2);
    assert_refused(memfd(3, ALL_SEALS), 4);
    assert_refused(memfd(3, ALL_SEALS), 0);
    assert_refused(memfd(0, ALL_SEALS), 0);
    assert_refused(memfd(DEDUP_SEGMENT_PAGES + 1, ALL_SEALS),
                   DEDUP_SEGMENT_PAGES + 1);
    assert_refused(memfd(3, ALL_SEALS), UINT_MAX);
    fd = memfd(3, 0);
    g_assert_cmpint(ftruncate(fd, 3 * DEDUP_PAGE_SIZE - 1), ==, 0);
    g_assert_cmpint(fcntl(fd, F_ADD_SEALS, ALL_SEALS), ==, 0);
    assert_refused(fd, 3);
}

static void test_holes(void)
{
    int fd = memfd(3, 0);

    g_assert_cmpint(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                              DEDUP_PAGE_SIZE, DEDUP_PAGE_SIZE), ==, 0);
    g_assert_cmpint(fcntl(fd, F_ADD_SEALS, ALL_SEALS), ==, 0);
    assert_refused(fd, 3);

    /* as much memory as a whole one has, but behind its end */
    fd = memfd_create("test-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    g_assert_cmpint(ftruncate(fd, 3 * DEDUP_PAGE_SIZE), ==, 0);
    g_assert_cmpint(fallocate(fd, FALLOC_FL_KEEP_SIZE, 3 * DEDUP_PAGE_SIZE,
                              3 * DEDUP_PAGE_SIZE), ==, 0);
    g_assert_cmpint(fcntl(fd, F_ADD_SEALS, ALL_SEALS), ==, 0);
    assert_refused(fd, 3);
}

static void test_kind(void)
{
    int pipefd[2];

    assert_refused(-1, 1);
    assert_refused(open("/dev/zero", O_RDWR | O_CLOEXEC), 1);
    assert_refused(open("/proc/self/exe", O_RDONLY | O_CLOEXEC), 1);
    g_assert_cmpint(pipe(pipefd), ==, 0);
    assert_refused(pipefd[0], 1);
    close(pipefd[1]);
}

/* The size of a huge page is within bounds: the file system tells. */
static void test_hugetlb(void)
{
    int fd = memfd_create("test-huge", MFD_CLOEXEC | MFD_ALLOW_SEALING |
                          MFD_HUGETLB | MFD_HUGE_2MB);
    g_autoptr(GError) error = NULL;

    if (fd < 0) {
        g_test_skip("this host makes no memfd of 2 MiB huge pages");
        return;
    }
    /* A sparse one needs no huge page in reserve. */
    g_assert_cmpint(ftruncate(fd, DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE), ==,
                    0);
    g_assert_cmpint(fcntl(fd, F_ADD_SEALS, ALL_SEALS), ==, 0);
    g_assert_null(dedup_segment_accept(fd, 1, DEDUP_SEGMENT_PAGES, &error));
    g_assert_nonnull(error);
    g_assert_nonnull(strstr(error->message, "not on shmem"));
}

/*
 * M7: without the check of the seals an unsealed file is taken, and its
 * owner changes what we have mapped.  This is what the check is for.
 */
static void test_mutant_no_seal_check(void)
{
    g_autoptr(GError) error = NULL;
    int fd = memfd(2, 0);
    int ours = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    uint8_t page[DEDUP_PAGE_SIZE];
    DedupSegment *s;

    dedup_mutant = DEDUP_MUTANT_NO_SEAL_CHECK;
    s = dedup_segment_accept(ours, 1, 2, &error);
    dedup_mutant = 0;
    g_assert_no_error(error);
    g_assert_nonnull(s);
    assert_page(s->map, 0);
    fill(page, 99);
    g_assert_cmpint(pwrite(fd, page, sizeof(page), 0), ==, sizeof(page));
    assert_page(s->map, 99);
    dedup_segment_free(s);
    close(fd);
}

/* No descriptor left: an error, and nothing leaks. */
static void test_no_fds(void)
{
    struct rlimit old, none;
    g_autoptr(GError) error = NULL;
    DedupBuilder *b;

    g_assert_cmpint(getrlimit(RLIMIT_NOFILE, &old), ==, 0);
    none = old;
    none.rlim_cur = 3;
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &none), ==, 0);
    b = dedup_builder_new(&error);
    g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &old), ==, 0);
    g_assert_null(b);
    g_assert_error(error, DEDUP_ERROR, DEDUP_ERROR_SYSTEM);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/segment/build", test_build);
    g_test_add_func("/segment/no-room", test_no_room);
    g_test_add_func("/segment/no-room-at-all", test_no_room_at_all);
    g_test_add_func("/segment/nothing", test_nothing);
    g_test_add_func("/segment/immutable", test_immutable);
    g_test_add_func("/segment/private-write", test_private_write);
    g_test_add_func("/segment/accept", test_accept);
    g_test_add_func("/segment/seals", test_seals);
    g_test_add_func("/segment/size", test_size);
    g_test_add_func("/segment/holes", test_holes);
    g_test_add_func("/segment/kind", test_kind);
    g_test_add_func("/segment/hugetlb", test_hugetlb);
    g_test_add_func("/segment/mutant-no-seal-check",
                    test_mutant_no_seal_check);
    g_test_add_func("/segment/no-fds", test_no_fds);
    return g_test_run();
}
