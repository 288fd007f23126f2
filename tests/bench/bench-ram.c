/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * RAM with a known share of equal pages; see bench-ram.h.
 */

#include <glib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench-ram.h"

#define WORDS (BENCH_PAGE / sizeof(uint64_t))

static void die(const char *what)
{
    perror(what);
    exit(2);
}

bool bench_ram_is_equal(const BenchRam *ram, size_t i)
{
    size_t place;

    if (!ram->run || i >= ram->copies * ram->copy_pages) {
        return false;
    }
    place = i % ram->copy_pages;
    return place % (ram->run + 1) < ram->run;
}

size_t bench_ram_equals(const BenchRam *ram)
{
    size_t n = 0;

    for (size_t i = 0; i < ram->pages; i++) {
        n += bench_ram_is_equal(ram, i);
    }
    return n;
}

size_t bench_ram_goal(const BenchRam *ram)
{
    size_t equals = bench_ram_equals(ram);

    return equals - equals / 100;
}

void bench_ram_content(const BenchRam *ram, size_t i, uint64_t *words)
{
    bool equal = bench_ram_is_equal(ram, i);
    uint64_t seed = equal ? i % ram->copy_pages : (1ULL << 32) + i;
    uint64_t v = (seed + 1) * 0x9e3779b97f4a7c15ULL;

    /* the first word differs from page to page, as in most real memory */
    for (size_t k = 0; k < WORDS; k++) {
        v ^= v << 13;
        v ^= v >> 7;
        v ^= v << 17;
        words[k] = v;
    }
}

BenchRam *bench_ram_new(size_t pages, unsigned run, unsigned copies,
                        bool shared)
{
    BenchRam *ram = g_new0(BenchRam, 1);
    size_t size = pages * BENCH_PAGE;

    ram->fd = -1;
    if (shared) {
        ram->fd = memfd_create("bench-ram", MFD_CLOEXEC);
        if (ram->fd < 0 || ftruncate(ram->fd, size) < 0) {
            die("memfd");
        }
    }
    ram->host = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS,
                     ram->fd, 0);
    if (ram->host == MAP_FAILED) {
        die("mmap");
    }
    madvise(ram->host, size, MADV_NOHUGEPAGE);
    madvise(ram->host, size, MADV_DONTFORK);
    ram->pages = pages;
    ram->run = run;
    ram->copies = copies;
    if (run) {
        ram->copy_pages = pages / copies / (run + 1) * (run + 1);
    }
    for (size_t i = 0; i < pages; i++) {
        bench_ram_content(ram, i, (uint64_t *)(ram->host + i * BENCH_PAGE));
    }
    return ram;
}

void bench_ram_free(BenchRam *ram)
{
    munmap(ram->host, ram->pages * BENCH_PAGE);
    if (ram->fd >= 0) {
        close(ram->fd);
    }
    g_free(ram);
}

bool bench_ram_verify(const BenchRam *ram)
{
    uint64_t words[WORDS];

    for (size_t i = 0; i < ram->pages; i++) {
        bench_ram_content(ram, i, words);
        if (memcmp(words, ram->host + i * BENCH_PAGE, BENCH_PAGE)) {
            return false;
        }
    }
    return true;
}
