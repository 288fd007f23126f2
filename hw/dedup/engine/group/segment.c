/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Segments: making, sealing and checking the memfds that hold the shared
 * copies; see segment.h.
 *
 * A segment is trusted because of what the kernel says about its file, and
 * for no other reason: all four seals (nobody can write to it, cut it,
 * lengthen it or add a seal), its size, and that it is on shmem (a page of
 * hugetlbfs cannot be mapped by 4 KiB).  After F_SEAL_WRITE the kernel also
 * refuses to punch holes, so no byte of it changes for anybody, ever (I2).
 *
 * A builder's pages are written with pwrite(), some at a time: when there is no
 * memory, that is an error code, where a store to a mapping would be a SIGBUS
 * (I9).  It is also half the work of faulting each page in.  The mapping of
 * the builder is for reading only and private, so that it does not stand in
 * the way of F_SEAL_WRITE: it becomes the segment's.
 *
 * Thread: the scanner's.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "group/segment.h"
#include "host/error.h"
#include "host/memfd.h"
#include "host/mutant.h"
#include "host/sys.h"

#define ALL_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
#define MAX_SIZE (DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE)

/* Pages that are written at a time. */
#define STAGED_PAGES 16

struct DedupBuilder {
    int fd;
    uint8_t *map;             /* of MAX_SIZE bytes, for reading */
    unsigned written;         /* pages of the file */
    unsigned nstaged;         /* and those that come behind them */
    uint8_t *staged;          /* mapped, so that malloc() does not keep it */
};

#define STAGED_SIZE (STAGED_PAGES * DEDUP_PAGE_SIZE)

/* A view of a segment's file; MAP_FAILED and @error on failure. */
static uint8_t *map_file(int fd, size_t size, GError **error)
{
    /* Kernels before 6.7 refuse to map a sealed memfd MAP_SHARED. */
    void *map = sys_mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd,
                         0);

    if (map == MAP_FAILED) {
        dedup_error_errno(error, "segment: cannot map the memfd");
        return map;
    }
    sys_madvise(map, size, MADV_DONTFORK);
    sys_madvise(map, size, MADV_DONTDUMP);
    return map;
}

static int memfd_new(const char *name, GError **error)
{
    int fd = dedup_memfd_new(name);

    if (fd < 0) {
        dedup_error_errno(error, "segment: cannot create a memfd");
    }
    return fd;
}

DedupBuilder *dedup_builder_new(GError **error)
{
    DedupBuilder *b = g_new0(DedupBuilder, 1);

    b->fd = memfd_new("dedup-segment", error);
    if (b->fd < 0) {
        g_free(b);
        return NULL;
    }
    b->map = map_file(b->fd, MAX_SIZE, error);
    if (b->map == MAP_FAILED) {
        b->map = NULL;
        dedup_builder_free(b);
        return NULL;
    }
    b->staged = sys_mmap(NULL, STAGED_SIZE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->staged == MAP_FAILED) {
        b->staged = NULL;
        dedup_error_errno(error, "segment: cannot map a buffer");
        dedup_builder_free(b);
        return NULL;
    }
    return b;
}

/* False and errno: not all of it could be written. */
static bool write_staged(DedupBuilder *b)
{
    size_t size = b->nstaged * DEDUP_PAGE_SIZE;
    ssize_t n;

    errno = ENOSPC;
    n = size ? sys_pwrite(b->fd, b->staged, size, b->written * DEDUP_PAGE_SIZE)
             : 0;
    b->nstaged = 0;
    b->written += MAX(n, 0) / DEDUP_PAGE_SIZE;
    return n == (ssize_t)size;
}

int dedup_builder_append(DedupBuilder *b, const void *page)
{
    if (dedup_builder_count(b) == DEDUP_SEGMENT_PAGES) {
        errno = ENOSPC;
        return -1;
    }
    memcpy(b->staged + b->nstaged++ * DEDUP_PAGE_SIZE, page,
           DEDUP_PAGE_SIZE);
    return b->nstaged < STAGED_PAGES || write_staged(b) ?
           (int)dedup_builder_count(b) - 1 : -1;
}

unsigned dedup_builder_count(const DedupBuilder *b)
{
    return b->written + b->nstaged;
}

unsigned dedup_builder_flush(DedupBuilder *b)
{
    write_staged(b);
    return b->written;
}

void dedup_builder_free(DedupBuilder *b)
{
    if (!b) {
        return;
    }
    if (b->staged) {
        sys_munmap(b->staged, STAGED_SIZE);
    }
    if (b->map) {
        sys_munmap(b->map, MAX_SIZE);
    }
    if (b->fd >= 0) {
        close(b->fd);
    }
    g_free(b);
}

/* Takes @fd and its view. */
static DedupSegment *segment_new(int fd, uint8_t *map, uint32_t gid,
                                 unsigned npages)
{
    DedupSegment *s = g_new0(DedupSegment, 1);

    s->gid = gid;
    s->npages = npages;
    s->fd = fd;
    s->map = map;
    return s;
}

DedupSegment *dedup_builder_finish(DedupBuilder *b, uint32_t gid,
                                   GError **error)
{
    size_t size = b->written * DEDUP_PAGE_SIZE;
    DedupSegment *s = NULL;

    g_assert(!b->nstaged);
    if (size == 0) {
        errno = ENODATA;
        dedup_error_errno(error, "segment: nothing to publish");
        goto out;
    }
    /* a write that came to nothing may have left a part behind the end */
    if (sys_ftruncate(b->fd, size) < 0) {
        dedup_error_errno(error, "segment: cannot cut the memfd to length");
        goto out;
    }
    if (sys_fcntl(b->fd, F_ADD_SEALS, ALL_SEALS) < 0) {
        dedup_error_errno(error, "segment: cannot seal the memfd");
        goto out;
    }
    if (size < MAX_SIZE) {
        sys_munmap(b->map + size, MAX_SIZE - size);
    }
    /* its pages are all there; spares a fault for each 16 of them */
    sys_madvise(b->map, size, MADV_POPULATE_READ);
    s = segment_new(b->fd, b->map, gid, b->written);
    s->mine = true;
    b->fd = -1;
    b->map = NULL;
out:
    dedup_builder_free(b);
    return s;
}

DedupSegment *dedup_segment_new_zeroes(GError **error)
{
    int fd = memfd_new("dedup-zeroes", error);
    DedupSegment *s = NULL;
    uint8_t *map;

    if (fd < 0) {
        return NULL;
    }
    if (sys_ftruncate(fd, MAX_SIZE) < 0 ||
        sys_fcntl(fd, F_ADD_SEALS, ALL_SEALS) < 0) {
        dedup_error_errno(error, "segment: cannot seal the memfd");
        close(fd);
        return NULL;
    }
    map = map_file(fd, MAX_SIZE, error);
    if (map == MAP_FAILED) {
        close(fd);
        return NULL;
    }
    s = segment_new(fd, map, 0, DEDUP_SEGMENT_PAGES);
    s->zeroes = true;
    return s;
}

DedupSegment *dedup_segment_accept(int fd, uint32_t gid, unsigned npages,
                                   GError **error)
{
    struct statfs fs;
    struct stat st;
    int seals = sys_fcntl(fd, F_GET_SEALS, 0);
    uint8_t *map;

    if (seals < 0) {
        dedup_error_errno(error, "segment: received file cannot be sealed");
        goto fail;
    }
    errno = EPERM;
    if ((seals & ALL_SEALS) != ALL_SEALS && !DEDUP_MUTANT(NO_SEAL_CHECK)) {
        dedup_error_errno(error, "segment: received file has seals 0x%x",
                          seals);
        goto fail;
    }
    if (sys_fstat(fd, &st) < 0 || sys_fstatfs(fd, &fs) < 0) {
        dedup_error_errno(error, "segment: received file cannot be examined");
        goto fail;
    }
    errno = EINVAL;
    if (npages == 0 || npages > DEDUP_SEGMENT_PAGES) {
        dedup_error_errno(error, "segment: length of %u pages", npages);
        goto fail;
    }
    if (!S_ISREG(st.st_mode) || fs.f_type != TMPFS_MAGIC) {
        dedup_error_errno(error, "segment: received file is not on shmem");
        goto fail;
    }
    if (st.st_size != npages * DEDUP_PAGE_SIZE) {
        dedup_error_errno(error, "segment: received file has %lld bytes"
                          " instead of %zu", (long long)st.st_size,
                          npages * DEDUP_PAGE_SIZE);
        goto fail;
    }
    if (sys_lseek(fd, 0, SEEK_HOLE) != st.st_size) {
        /* a hole takes memory when it is read, at our cost */
        dedup_error_errno(error, "segment: received file has holes");
        goto fail;
    }
    map = map_file(fd, npages * DEDUP_PAGE_SIZE, error);
    if (map != MAP_FAILED) {
        return segment_new(fd, map, gid, npages);
    }

fail:
    if (!DEDUP_MUTANT(FD_LEAK)) {
        close(fd);
    }
    return NULL;
}

void dedup_segment_tidy(const DedupSegment *s)
{
    /* nobody has written to it: it is all still in the file */
    sys_madvise((void *)s->map, s->npages * DEDUP_PAGE_SIZE, MADV_DONTNEED);
}

void dedup_segment_free(DedupSegment *s)
{
    if (s) {
        sys_munmap((void *)s->map, s->npages * DEDUP_PAGE_SIZE);
        close(s->fd);
        g_free(s);
    }
}
