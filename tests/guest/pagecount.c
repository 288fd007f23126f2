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
 *            shared file behind the place (a page that was dropped from the
 *            page table, or written through a file descriptor)
 * physical   page frames behind them; a frame mapped in many places is one.
 *            A private read of nothing, which maps the kernel's zero page,
 *            has no memory and is not counted anywhere
 * swapped    places whose contents are in swap; not read, not in the others
 * zero       frames that hold zeros only
 * distinct   different contents among the other frames
 * saveable   physical - distinct: one copy of each content, and no zero page
 *
 * Contents count as equal if their 128-bit XXH3 is equal.  Needs root (page
 * frame numbers).  A file page that no page table maps has no frame number
 * here; it counts as a frame of its own per (file, offset).
 *
 * Copyright (c) 2025 The qemu-dedup developers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGE 4096ull
#define BATCH 512
#define PM_PRESENT (1ull << 63)
#define PM_SWAPPED (1ull << 62)
#define PM_PFN ((1ull << 55) - 1)
#define KPF_ZERO_PAGE 24

/* A frame: its number, or a hash of (file, offset) with the top bit set. */
typedef struct Frame {
    uint64_t frame;
    bool zero;
    XXH128_hash_t hash;
} Frame;

typedef struct Mapping {
    uint64_t start, end, offset;
    bool shared;
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

/* The part of a shared file behind [addr, end) that has data. */
static void count_file(const Mapping *m, int file, uint64_t addr,
                       const uint64_t *pm, unsigned n)
{
    static uint8_t bytes[PAGE];
    struct stat st;

    if (fstat(file, &st)) {
        die("fstat");
    }
    for (unsigned i = 0; i < n; i++) {
        uint64_t offset = m->offset + (addr - m->start) + i * PAGE;
        uint64_t key[3] = { st.st_dev, st.st_ino, offset };

        if (pm[i] & PM_PRESENT) {
            continue;
        }
        if (lseek(file, offset, SEEK_DATA) != (off_t)offset) {
            continue;
        }
        if (pread(file, bytes, PAGE, offset) != (ssize_t)PAGE) {
            die("read of the file behind a mapping");
        }
        add_page(1ull << 63 | XXH3_64bits(key, sizeof(key)) >> 1, bytes);
    }
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

static void count_mapping(int pid, const Mapping *m, uint64_t start,
                          uint64_t end)
{
    int pagemap = open_proc(pid, "pagemap");
    int mem = open_proc(pid, "mem");
    int file = -1;

    if (m->shared) {
        char name[64];

        snprintf(name, sizeof(name), "map_files/%llx-%llx",
                 (unsigned long long)m->start, (unsigned long long)m->end);
        file = open_proc(pid, name);
    }
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
        unsigned long long s, e, offset;
        char perms[5];

        if (sscanf(line, "%llx-%llx %4s %llx", &s, &e, perms, &offset) != 4) {
            continue;
        }
        if (s < end && e > start) {
            Mapping m = { s, e, offset, perms[3] == 's' };

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
