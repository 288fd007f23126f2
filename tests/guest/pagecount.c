/*
 * Count from outside what merging equal pages could save
 *
 * pagecount PID:START-END...  (addresses in hex, of paused processes)
 *
 * Looks at every page that has memory of its own in the given ranges, without
 * making any page present, and prints one line:
 *
 *   mapped=N physical=N swapped=N zero=N distinct=N saveable=N
 *
 * mapped     places that have memory: a page table entry, or data in the
 *            file behind the place that nobody has touched through it yet
 * physical   page frames behind them; a frame mapped in many places is one.
 *            A private read of nothing, which maps the kernel's zero page,
 *            has no memory and is not counted anywhere
 * swapped    places whose contents are in swap; not read, not in the others
 * zero       frames that hold zeros only
 * distinct   different contents among the other frames
 * saveable   physical - distinct: one copy of each content, and no zero page
 *
 * Contents count as equal if their 128-bit XXH3 is equal.  Needs root (page
 * frame numbers).
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGE 4096ull
#define BATCH 512
#define PM_PRESENT (1ull << 63)
#define PM_SWAPPED (1ull << 62)
#define PM_PFN ((1ull << 55) - 1)
#define KPF_ZERO_PAGE 24

typedef struct Frame {
    uint64_t frame;
    bool zero;
    XXH128_hash_t hash;
} Frame;

typedef struct Mapping {
    uint64_t start, end, offset;
    bool file;
} Mapping;

static Frame *frames;
static size_t frames_used, frames_room;
static uint64_t mapped, swapped;
static int kpageflags;

static void die(const char *what)
{
    fprintf(stderr, "pagecount: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_proc(int pid, const char *name)
{
    char path[96];
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        die(path);
    }
    return fd;
}

static bool is_zero_frame(uint64_t pfn)
{
    uint64_t flags;

    if (pread(kpageflags, &flags, 8, pfn * 8) != 8) {
        die("kpageflags");
    }
    return flags >> KPF_ZERO_PAGE & 1;
}

static void add_page(uint64_t frame, const uint8_t *bytes)
{
    static const uint8_t zeros[PAGE];
    Frame *f;

    if (frames_used == frames_room) {
        frames_room = frames_room ? 2 * frames_room : 1 << 16;
        frames = realloc(frames, frames_room * sizeof(*frames));
        if (!frames) {
            die("memory");
        }
    }
    f = &frames[frames_used++];
    f->frame = frame;
    f->zero = !memcmp(bytes, zeros, PAGE);
    f->hash = XXH3_128bits(bytes, PAGE);
    mapped++;
}

/*
 * Places without a page table entry whose contents are in the file behind the
 * mapping.  A page of our own map of the file tells the frame; only where the
 * file has data, as touching a hole would fill it.
 */
static void count_file(const Mapping *m, int file, uint64_t addr,
                       const uint64_t *pm, unsigned n)
{
    uint64_t offset = m->offset + (addr - m->start);
    int own = -1;
    uint8_t *map;

    map = mmap(NULL, n * PAGE, PROT_READ, MAP_SHARED, file, offset);
    if (map == MAP_FAILED) {
        die("mmap of the file behind a mapping");
    }
    for (unsigned i = 0; i < n; i++) {
        off_t at = offset + i * PAGE;
        uint64_t entry;

        if ((pm[i] & (PM_PRESENT | PM_SWAPPED)) ||
            lseek(file, at, SEEK_DATA) != at) {
            continue;
        }
        if (own < 0) {
            own = open_proc(getpid(), "pagemap");
        }
        (void)*(volatile uint8_t *)(map + i * PAGE); /* bring it in */
        if (pread(own, &entry, 8, (uintptr_t)(map + i * PAGE) / PAGE * 8) != 8
            || !(entry & PM_PRESENT)) {
            die("own pagemap");
        }
        add_page(entry & PM_PFN, map + i * PAGE);
    }
    if (own >= 0) {
        close(own);
    }
    munmap(map, n * PAGE);
}

static void count_range(int pagemap, int mem, const Mapping *m, int file,
                        uint64_t addr, unsigned n)
{
    static uint8_t bytes[BATCH * PAGE];
    uint64_t pm[BATCH];
    unsigned i, j;

    if (pread(pagemap, pm, n * 8, addr / PAGE * 8) != (ssize_t)(n * 8)) {
        die("pagemap");
    }
    for (i = 0; i < n; i = j) {
        j = i + 1;
        if (pm[i] & PM_SWAPPED) {
            swapped++;
            continue;
        }
        if (!(pm[i] & PM_PRESENT)) {
            continue;
        }
        while (j < n && (pm[j] & PM_PRESENT)) {
            j++;
        }
        if (pread(mem, bytes, (j - i) * PAGE, addr + i * PAGE) !=
            (ssize_t)((j - i) * PAGE)) {
            die("mem");
        }
        for (unsigned k = i; k < j; k++) {
            uint64_t pfn = pm[k] & PM_PFN;

            if (!pfn) {
                errno = EPERM;
                die("page frame numbers");
            }
            if (!is_zero_frame(pfn)) {
                add_page(pfn, bytes + (k - i) * PAGE);
            }
        }
    }
    if (file >= 0) {
        count_file(m, file, addr, pm, n);
    }
}

/*
 * A descriptor of the file behind a mapping: the process's own, duplicated.
 * RAM in a named file must not be opened anew: the process may hold a lease on
 * it, by which it learns of that.  A file that the process has closed is a
 * segment, and may be opened.
 */
static int file_behind(int pid, const Mapping *m)
{
    char path[96], name[64];
    struct stat want, st;
    struct dirent *e;
    int found = -1;
    DIR *d;

    snprintf(name, sizeof(name), "map_files/%llx-%llx",
             (unsigned long long)m->start, (unsigned long long)m->end);
    snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
    if (stat(path, &want)) {
        die(path);
    }
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    d = opendir(path);
    if (!d) {
        die(path);
    }
    while (found < 0 && (e = readdir(d))) {
        int number, pidfd;

        if (fstatat(dirfd(d), e->d_name, &st, 0) ||
            st.st_dev != want.st_dev || st.st_ino != want.st_ino ||
            sscanf(e->d_name, "%d", &number) != 1) {
            continue;
        }
        pidfd = syscall(SYS_pidfd_open, pid, 0);
        found = syscall(SYS_pidfd_getfd, pidfd, number, 0);
        if (found < 0) {
            die("pidfd_getfd");
        }
        close(pidfd);
    }
    closedir(d);
    return found < 0 ? open_proc(pid, name) : found;
}

static void count_mapping(int pid, const Mapping *m, uint64_t start,
                          uint64_t end)
{
    int pagemap = open_proc(pid, "pagemap");
    int mem = open_proc(pid, "mem");
    int file = m->file ? file_behind(pid, m) : -1;

    for (uint64_t a = start; a < end; a += BATCH * PAGE) {
        uint64_t left = (end - a) / PAGE;

        count_range(pagemap, mem, m, file, a, left < BATCH ? left : BATCH);
    }
    if (file >= 0) {
        close(file);
    }
    close(mem);
    close(pagemap);
}

static void count_process(int pid, uint64_t start, uint64_t end)
{
    char line[512];
    FILE *f = fdopen(open_proc(pid, "maps"), "r");

    while (f && fgets(line, sizeof(line), f)) {
        unsigned long long s, e, offset, inode;

        if (sscanf(line, "%llx-%llx %*s %llx %*s %llu", &s, &e, &offset,
                   &inode) != 4) {
            continue;
        }
        if (s < end && e > start) {
            Mapping m = { s, e, offset, inode != 0 };

            count_mapping(pid, &m, s > start ? s : start, e < end ? e : end);
        }
    }
    if (f) {
        fclose(f);
    }
}

static int by_frame(const void *a, const void *b)
{
    const Frame *x = a, *y = b;

    return (x->frame > y->frame) - (x->frame < y->frame);
}

static int by_content(const void *a, const void *b)
{
    const Frame *x = a, *y = b;

    return x->zero != y->zero ? x->zero - y->zero
                              : XXH128_cmp(&x->hash, &y->hash);
}

int main(int argc, char **argv)
{
    uint64_t physical = 0, zero = 0, distinct = 0;

    kpageflags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
    if (kpageflags < 0) {
        die("/proc/kpageflags");
    }
    for (int i = 1; i < argc; i++) {
        unsigned long long start, end;
        int pid;

        if (sscanf(argv[i], "%d:%llx-%llx", &pid, &start, &end) != 3) {
            fprintf(stderr, "usage: pagecount PID:START-END...\n");
            return 2;
        }
        count_process(pid, start, end);
    }
    qsort(frames, frames_used, sizeof(*frames), by_frame);
    for (size_t i = 0; i < frames_used; i++) {
        if (!physical || frames[physical - 1].frame != frames[i].frame) {
            frames[physical++] = frames[i];
        }
    }
    qsort(frames, physical, sizeof(*frames), by_content);
    for (size_t i = 0; i < physical; i++) {
        if (frames[i].zero) {
            zero++;
        } else if (!i || frames[i - 1].zero ||
                   !XXH128_isEqual(frames[i - 1].hash, frames[i].hash)) {
            distinct++;
        }
    }
    printf("mapped=%llu physical=%llu swapped=%llu zero=%llu distinct=%llu "
           "saveable=%llu\n", (unsigned long long)mapped,
           (unsigned long long)physical, (unsigned long long)swapped,
           (unsigned long long)zero, (unsigned long long)distinct,
           (unsigned long long)(physical - distinct));
    return 0;
}
