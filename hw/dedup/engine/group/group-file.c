/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The shared file of a group: making it, checking one that was received,
 * reading and writing the slots; its layout is in group-internal.h.
 *
 * It is sealed against shrinking, growing and further seals, so a mapping of
 * it cannot be cut off (that would be a SIGBUS); it is not sealed against
 * writing.  Only the header page and the index are mapped; everything else
 * goes through pread() and pwrite(): a hole that is read costs no memory,
 * and a lack of memory is an error code.
 *
 * Thread: the scanner's.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "group/group-internal.h"
#include "host/error.h"
#include "host/memfd.h"
#include "host/sys.h"

#define FILE_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW)

G_STATIC_ASSERT(sizeof(DedupSlot) == 128);
G_STATIC_ASSERT(sizeof(DedupTableEntry) == 16);
G_STATIC_ASSERT(sizeof(DedupSegmentUse) == 72);
G_STATIC_ASSERT(sizeof(DedupFileHeader) <= DEDUP_FILE_INDEX_HEADER);
G_STATIC_ASSERT(DEDUP_FILE_TABLE % DEDUP_PAGE_SIZE == 0);
G_STATIC_ASSERT(DEDUP_FILE_USE % DEDUP_PAGE_SIZE == 0);
G_STATIC_ASSERT(DEDUP_FILE_ROW % DEDUP_PAGE_SIZE == 0);

uint64_t dedup_group_file_size(void)
{
    return DEDUP_FILE_INDEX + dedup_index_table_size();
}

bool dedup_group_file_read(const DedupGroupFile *f, void *data, size_t size,
                           uint64_t offset)
{
    ssize_t n = sys_pread(f->fd, data, size, offset);

    if (n >= 0 && (size_t)n != size) {
        errno = EIO;
    }
    return n >= 0 && (size_t)n == size;
}

bool dedup_group_file_write(const DedupGroupFile *f, const void *data,
                            size_t size, uint64_t offset)
{
    ssize_t n = sys_pwrite(f->fd, data, size, offset);

    if (n >= 0 && (size_t)n != size) {
        errno = ENOSPC;
    }
    return n >= 0 && (size_t)n == size;
}

static void *map_shared(int fd, size_t size, uint64_t offset, GError **error)
{
    void *map = sys_mmap(NULL, size, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_NORESERVE, fd, offset);

    if (map == MAP_FAILED) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY,
                    "cannot map %zu bytes of the group's shared file: %s",
                    size, g_strerror(errno));
        return NULL;
    }
    sys_madvise(map, size, MADV_DONTFORK);
    sys_madvise(map, size, MADV_DONTDUMP);
    return map;
}

/* Maps @fd, which has the right size.  Takes @fd in any case. */
static bool map_file(DedupGroupFile *f, int fd, GError **error)
{
    f->fd = fd;
    f->header = map_shared(fd, DEDUP_PAGE_SIZE, 0, error);
    if (f->header) {
        f->table = map_shared(fd, dedup_index_table_size(), DEDUP_FILE_INDEX,
                              error);
    }
    if (!f->table) {
        dedup_group_file_close(f);
        return false;
    }
    g_assert(DEDUP_FILE_INDEX_HEADER + dedup_index_header_size() <=
             DEDUP_PAGE_SIZE);
    f->index = dedup_index_new((DedupIndexHeader *)((char *)f->header +
                                                    DEDUP_FILE_INDEX_HEADER),
                               f->table, fd, DEDUP_FILE_INDEX);
    return true;
}

bool dedup_group_file_create(DedupGroupFile *f, GError **error)
{
    DedupFileHeader header = {
        .magic = DEDUP_FILE_MAGIC,
        .version = DEDUP_FILE_VERSION,
        .page_size = DEDUP_PAGE_SIZE,
    };
    int fd = dedup_memfd_new("dedup-group");

    f->fd = fd;
    /* The header is written before it is mapped: it has memory then. */
    if (fd < 0 ||
        sys_ftruncate(fd, dedup_group_file_size()) < 0 ||
        sys_fcntl(fd, F_ADD_SEALS, FILE_SEALS) < 0 ||
        sys_fallocate(fd, 0, 0, DEDUP_PAGE_SIZE) < 0 ||
        sys_getrandom(&header.salt, sizeof(header.salt), 0) !=
        sizeof(header.salt) ||
        !dedup_group_file_write(f, &header, sizeof(header), 0)) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY,
                    "cannot create the group's shared file: %s",
                    g_strerror(errno));
        dedup_group_file_close(f);
        return false;
    }
    f->salt = header.salt;
    return map_file(f, fd, error);
}

bool dedup_group_file_accept(DedupGroupFile *f, int fd, GError **error)
{
    DedupFileHeader header;
    const char *wrong = NULL;
    struct statfs fs;
    struct stat st;
    int seals = sys_fcntl(fd, F_GET_SEALS, 0);

    f->fd = fd;
    if (seals < 0 || (seals & FILE_SEALS) != FILE_SEALS ||
        (seals & F_SEAL_WRITE)) {
        wrong = "it is not sealed as it should be";
    } else if (sys_fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
               (uint64_t)st.st_size != dedup_group_file_size()) {
        wrong = "it has another size";
    } else if (sys_fstatfs(fd, &fs) < 0 || fs.f_type != TMPFS_MAGIC) {
        wrong = "it is not on shmem";
    } else if (!dedup_group_file_read(f, &header, sizeof(header), 0) ||
               header.magic != DEDUP_FILE_MAGIC ||
               header.version != DEDUP_FILE_VERSION ||
               header.page_size != DEDUP_PAGE_SIZE) {
        wrong = "its header is of another kind";
    }
    if (wrong) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_GROUP,
                    "shared file received from another member: %s", wrong);
        dedup_group_file_close(f);
        return false;
    }
    f->salt = header.salt;
    return map_file(f, fd, error);
}

void dedup_group_file_close(DedupGroupFile *f)
{
    dedup_index_free(f->index);
    if (f->table) {
        sys_munmap(f->table, dedup_index_table_size());
    }
    if (f->header) {
        sys_munmap(f->header, DEDUP_PAGE_SIZE);
    }
    if (f->fd >= 0) {
        close(f->fd);
    }
    *f = (DedupGroupFile) { .fd = -1 };
}

bool dedup_group_slot_read(const DedupGroup *g, unsigned member,
                           DedupSlot *slot)
{
    if (!dedup_group_file_read(&g->file, slot, sizeof(*slot),
                               DEDUP_FILE_SLOTS + member * sizeof(*slot))) {
        return false;
    }
    slot->rows = MIN(slot->rows, DEDUP_MAX_SEGMENTS);
    return true;
}

bool dedup_group_slot_clear(DedupGroup *g, GError **error)
{
    DedupSlot slot = { .incarnation = 0 };

    /*
     * The use row first: while the slot still has the dead owner's mark,
     * others read zeros there.
     */
    if (sys_fallocate(g->file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      DEDUP_FILE_USE + g->self * DEDUP_FILE_ROW,
                      DEDUP_FILE_ROW) < 0 ||
        sys_getrandom(&slot.incarnation, sizeof(slot.incarnation), 0) !=
        sizeof(slot.incarnation) ||
        !dedup_group_file_write(&g->file, &slot, sizeof(slot),
                                DEDUP_FILE_SLOTS + g->self * sizeof(slot))) {
        g_set_error(error, DEDUP_ERROR, DEDUP_ERROR_MEMORY,
                    "cannot take a member slot of the group: %s",
                    g_strerror(errno));
        return false;
    }
    g->incarnation = slot.incarnation;
    g->rows = 0;
    return true;
}
