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
 * The memory of a builder is allocated with fallocate() before it is written
 * through the mapping: when there is none, that is an error code here, where
 * a store would be a SIGBUS (I9).
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

#include "engine.h"
#include "mutant.h"
#include "segment.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U         /* Linux 6.3 */
#endif

#define ALL_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
#define MAX_SIZE (DEDUP_SEGMENT_PAGES * DEDUP_PAGE_SIZE)

/* Pages allocated at a time: 128 KiB. */
#define STEP 32

struct DedupBuilder {
    int fd;
    uint8_t *map;
    unsigned count;
    unsigned allocated;
};

G_GNUC_PRINTF(2, 3)
static void set_error(GError **error, const char *format, ...)
{
    int err = errno;
    va_list args;
    char *what;

    va_start(args, format);
    what = g_strdup_vprintf(format, args);
    va_end(args);
    g_set_error(error, DEDUP_ERROR,
                err == ENOMEM || err == ENOSPC ? DEDUP_ERROR_MEMORY :
                DEDUP_ERROR_SYSTEM, "segment: %s: %s", what,
                g_strerror(err));
    g_free(what);
}

DedupBuilder *dedup_builder_new(GError **error)
{
    const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    DedupBuilder *b = g_new0(DedupBuilder, 1);
    void *map = MAP_FAILED;

    b->fd = memfd_create("dedup-segment", flags | MFD_NOEXEC_SEAL);
    if (b->fd < 0 && errno == EINVAL) {
        b->fd = memfd_create("dedup-segment", flags);
    }
    if (b->fd < 0) {
        set_error(error, "cannot create a memfd");
        g_free(b);
        return NULL;
    }
    if (ftruncate(b->fd, MAX_SIZE) < 0) {
        set_error(error, "cannot set the size of a memfd");
    } else {
        map = mmap(NULL, MAX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd,
                   0);
        if (map == MAP_FAILED) {
            set_error(error, "cannot map a memfd");
        }
    }
    if (map == MAP_FAILED) {
        close(b->fd);
        g_free(b);
        return NULL;
    }
    madvise(map, MAX_SIZE, MADV_DONTFORK);
    madvise(map, MAX_SIZE, MADV_DONTDUMP);
    b->map = map;
    return b;
}

uint8_t *dedup_builder_next(DedupBuilder *b)
{
    if (b->count == DEDUP_SEGMENT_PAGES) {
        errno = 0;
        return NULL;
    }
    if (b->count == b->allocated) {
        if (fallocate(b->fd, 0, b->allocated * DEDUP_PAGE_SIZE,
                      STEP * DEDUP_PAGE_SIZE) < 0) {
            return NULL;
        }
        b->allocated += STEP;
    }
    return b->map + b->count * DEDUP_PAGE_SIZE;
}

unsigned dedup_builder_commit(DedupBuilder *b)
{
    g_assert(b->count < b->allocated);
    return b->count++;
}

unsigned dedup_builder_count(const DedupBuilder *b)
{
    return b->count;
}

const uint8_t *dedup_builder_page(const DedupBuilder *b, unsigned i)
{
    g_assert(i < b->count);
    return b->map + i * DEDUP_PAGE_SIZE;
}

void dedup_builder_free(DedupBuilder *b)
{
    if (!b) {
        return;
    }
    if (b->map) {
        munmap(b->map, MAX_SIZE);
    }
    if (b->fd >= 0) {
        close(b->fd);
    }
    g_free(b);
}

/* Maps a sealed fd for reading.  Takes @fd in any case. */
static DedupSegment *segment_map(int fd, uint32_t gid, unsigned npages,
                                 GError **error)
{
    size_t size = npages * DEDUP_PAGE_SIZE;
    DedupSegment *s;
    void *map;

    /* Kernels before 6.7 refuse to map a sealed memfd MAP_SHARED. */
    map = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (map == MAP_FAILED) {
        set_error(error, "cannot map the sealed memfd");
        close(fd);
        return NULL;
    }
    madvise(map, size, MADV_DONTFORK);
    madvise(map, size, MADV_DONTDUMP);
    s = g_new0(DedupSegment, 1);
    s->gid = gid;
    s->npages = npages;
    s->fd = fd;
    s->map = map;
    return s;
}

DedupSegment *dedup_builder_finish(DedupBuilder *b, uint32_t gid,
                                   GError **error)
{
    DedupSegment *s = NULL;
    int fd = b->fd;

    if (b->count == 0) {
        errno = ENODATA;
        set_error(error, "nothing to publish");
        goto out;
    }
    /* F_SEAL_WRITE is refused while a writable mapping exists. */
    munmap(b->map, MAX_SIZE);
    b->map = NULL;
    if (ftruncate(fd, b->count * DEDUP_PAGE_SIZE) < 0) {
        set_error(error, "cannot cut the memfd to length");
        goto out;
    }
    if (fcntl(fd, F_ADD_SEALS, ALL_SEALS) < 0) {
        set_error(error, "cannot seal the memfd");
        goto out;
    }
    b->fd = -1;
    s = segment_map(fd, gid, b->count, error);
    if (s) {
        s->mine = true;
        /* its pages are all there; spares a fault for each 16 of them */
        madvise((void *)s->map, s->npages * DEDUP_PAGE_SIZE,
                MADV_POPULATE_READ);
    }
out:
    dedup_builder_free(b);
    return s;
}

DedupSegment *dedup_segment_accept(int fd, uint32_t gid, unsigned npages,
                                   GError **error)
{
    struct statfs fs;
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);

    if (seals < 0) {
        set_error(error, "received file cannot be sealed");
        goto fail;
    }
    errno = EPERM;
    if ((seals & ALL_SEALS) != ALL_SEALS && !DEDUP_MUTANT(NO_SEAL_CHECK)) {
        set_error(error, "received file has seals 0x%x", seals);
        goto fail;
    }
    if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0) {
        set_error(error, "received file cannot be examined");
        goto fail;
    }
    errno = EINVAL;
    if (npages == 0 || npages > DEDUP_SEGMENT_PAGES) {
        set_error(error, "length of %u pages", npages);
        goto fail;
    }
    if (!S_ISREG(st.st_mode) || fs.f_type != TMPFS_MAGIC) {
        set_error(error, "received file is not on shmem");
        goto fail;
    }
    if (st.st_size != npages * DEDUP_PAGE_SIZE) {
        set_error(error, "received file has %lld bytes instead of %zu",
                  (long long)st.st_size, npages * DEDUP_PAGE_SIZE);
        goto fail;
    }
    if ((uint64_t)st.st_blocks * 512 < npages * DEDUP_PAGE_SIZE) {
        /* a hole takes memory when it is read, at our cost */
        set_error(error, "received file has holes");
        goto fail;
    }
    return segment_map(fd, gid, npages, error);

fail:
    close(fd);
    return NULL;
}

void dedup_segment_free(DedupSegment *s)
{
    if (s) {
        munmap((void *)s->map, s->npages * DEDUP_PAGE_SIZE);
        close(s->fd);
        g_free(s);
    }
}
