/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Descriptors that an enemy may hand over; see fuzz-file.h. */

#include <linux/memfd.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "fuzz-file.h"
#include "group/group-internal.h"

#define ALL_SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

enum Kind {
    KIND_SEGMENT,               /* as it should be */
    KIND_MEMFD,                 /* in any shape */
    KIND_SHARED,                /* the size of a group's file */
    KIND_HUGETLB,
    KIND_UNSEALABLE,
    KIND_PIPE,
    KIND_SOCKET,
    KIND_EVENTFD,
    KIND_EPOLL,
    KIND_NAMED,                 /* one of names[] */
    KIND_TMPFS,
    KINDS
};

void fuzz_file_page(uint8_t *page, unsigned i)
{
    memset(page, 1 + i % 251, DEDUP_PAGE_SIZE);
    memcpy(page, &i, sizeof(i));
}

static void fill(int fd, unsigned first, unsigned n)
{
    uint8_t page[DEDUP_PAGE_SIZE];

    for (unsigned i = first; i < first + n; i++) {
        fuzz_file_page(page, i);
        if (pwrite(fd, page, sizeof(page), (off_t)i * sizeof(page)) < 0) {
            return;
        }
    }
}

/* Another description of the same file. */
static int reopen(int fd, int flags)
{
    char name[32];
    int other;

    snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
    other = open(name, flags | O_CLOEXEC);
    if (other < 0) {
        return fd;
    }
    close(fd);
    return other;
}

static int any_memfd(FuzzInput *in, unsigned *npages)
{
    static const int modes[] = { O_RDONLY, O_WRONLY, O_PATH, O_RDWR };
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    unsigned flags = fuzz_u8(in);
    unsigned n = fuzz_u8(in);
    unsigned first = fuzz_u8(in);
    int cut = fuzz_u8(in);

    *npages = n;
    fill(fd, flags & 1 ? first : 0, flags & 1 ? 1 : n);
    if (ftruncate(fd, (off_t)n * DEDUP_PAGE_SIZE + (flags & 2 ? cut : 0)) < 0 ||
        (flags & 4 &&
         fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                   (off_t)first * DEDUP_PAGE_SIZE, DEDUP_PAGE_SIZE) < 0) ||
        (flags & 8 &&
         fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)n * DEDUP_PAGE_SIZE,
                   DEDUP_PAGE_SIZE) < 0)) {
        return fd;
    }
    fcntl(fd, F_ADD_SEALS, flags & 16 ? fuzz_u8(in) & 31 : ALL_SEALS);
    return flags & 32 ? reopen(fd, modes[fuzz_u8(in) % 4]) : fd;
}

static int any_shared(FuzzInput *in)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    unsigned flags = fuzz_u8(in);
    DedupFileHeader h = {
        .magic = DEDUP_FILE_MAGIC, .version = DEDUP_FILE_VERSION,
        .page_size = DEDUP_PAGE_SIZE, .segments = fuzz_u32(in),
    };

    if (flags & 1) {
        fuzz_bytes(in, (char *)&h + fuzz_u8(in) % 24, 4);
    }
    if (ftruncate(fd, dedup_group_file_size() + (flags & 2 ? 1 : 0)) < 0 ||
        pwrite(fd, &h, sizeof(h), 0) < 0) {
        return fd;
    }
    fcntl(fd, F_ADD_SEALS, flags & 4 ? fuzz_u8(in) & 31 :
          F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW);
    return fd;
}

static int one_of(int fd[2])
{
    close(fd[1]);
    return fd[0];
}

static int named(FuzzInput *in)
{
    static const char *const names[] = {
        "/", "/dev/zero", "/dev/null", "/proc/self/exe", "/proc/self/maps",
        "/proc/self/mem", "/dev/fuse", "/dev/userfaultfd", "/dev/kvm",
    };

    return open(names[fuzz_u8(in) % G_N_ELEMENTS(names)],
                O_RDONLY | O_NONBLOCK | O_CLOEXEC);
}

static int other_kind(FuzzInput *in, unsigned kind)
{
    int fd[2], one = -1;

    switch (kind) {
    case KIND_HUGETLB:
        one = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING |
                           MFD_HUGETLB | MFD_HUGE_2MB);
        if (one >= 0 && ftruncate(one, 2 << 20) == 0) {
            fcntl(one, F_ADD_SEALS, ALL_SEALS);
        }
        break;
    case KIND_UNSEALABLE:
        one = memfd_create("fuzz", MFD_CLOEXEC);
        break;
    case KIND_PIPE:
        one = pipe2(fd, O_CLOEXEC) < 0 ? -1 : one_of(fd);
        break;
    case KIND_SOCKET:
        one = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) < 0 ?
              -1 : one_of(fd);
        break;
    case KIND_EVENTFD:
        one = eventfd(0, EFD_CLOEXEC);
        break;
    case KIND_EPOLL:
        one = epoll_create1(EPOLL_CLOEXEC);
        break;
    case KIND_TMPFS:
        one = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        if (one >= 0) {
            fill(one, 0, 1);
        }
        break;
    default:
        one = named(in);
    }
    return one;
}

int fuzz_file(FuzzInput *in, unsigned *npages)
{
    unsigned kind = fuzz_u8(in) % KINDS;
    int fd;

    *npages = 1;
    if (kind == KIND_SEGMENT) {
        *npages = 1 + fuzz_u8(in) % 8;
        fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        fill(fd, 0, *npages);
        fcntl(fd, F_ADD_SEALS, ALL_SEALS);
    } else if (kind == KIND_MEMFD) {
        fd = any_memfd(in, npages);
    } else if (kind == KIND_SHARED) {
        fd = any_shared(in);
    } else {
        fd = other_kind(in, kind);
    }
    return fd >= 0 ? fd : eventfd(0, EFD_CLOEXEC);
}

void fuzz_file_attack(FuzzInput *in, int fd)
{
    unsigned how = fuzz_u8(in);
    off_t at = (off_t)(how >> 4) * DEDUP_PAGE_SIZE;
    void *map;

    switch (how & 7) {
    case 0:
        (void)!pwrite(fd, "enemy", 5, at);
        break;
    case 1:
        (void)!ftruncate(fd, at);
        break;
    case 2:
        (void)!ftruncate(fd, at + (1 << 20));
        break;
    case 3:
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at,
                  DEDUP_PAGE_SIZE);
        break;
    case 4:
        fcntl(fd, F_ADD_SEALS, fuzz_u8(in) & 31);
        break;
    case 5:
        map = mmap(NULL, DEDUP_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
                   fd, at);
        if (map != MAP_FAILED) {
            munmap(map, DEDUP_PAGE_SIZE);
        }
        break;
    case 6:
        fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 0, DEDUP_PAGE_SIZE);
        break;
    default:
        fallocate(fd, FALLOC_FL_ZERO_RANGE, at, DEDUP_PAGE_SIZE);
    }
}
