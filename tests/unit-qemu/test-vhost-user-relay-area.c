/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: runs of pages, and memory given back
 *
 * Compiled with hw/virtio/vhost-user-relay-area.c alone.  What the host has
 * given is asked of the host: st_blocks of the memfd.
 */

#include "qemu/osdep.h"
#include <sys/mman.h>
#include "qapi/error.h"
#include "qemu/units.h"
#include "../../hw/virtio/vhost-user-relay-area.h"

#define PAGE VHOST_USER_RELAY_PAGE
#define IDLE VHOST_USER_RELAY_IDLE_PAGES
#define RANDOM_STEPS 200000

static VhostUserRelayArea *area;

static void area_new(uint64_t size)
{
    area = vhost_user_relay_area_new(size, &error_abort);
}

static void area_free(void)
{
    g_clear_pointer(&area, vhost_user_relay_area_free);
}

static unsigned take(unsigned pages)
{
    unsigned first = -1;

    g_assert_true(vhost_user_relay_area_alloc(area, pages, &first));
    return first;
}

static bool cannot_take(unsigned pages)
{
    unsigned first;

    return !vhost_user_relay_area_alloc(area, pages, &first);
}

static void give(unsigned first, unsigned pages)
{
    vhost_user_relay_area_release(area, first, pages);
}

static uint8_t pattern(unsigned page, unsigned i)
{
    return page * 7 + i / 64 + 1;
}

static void fill(unsigned first, unsigned pages)
{
    for (unsigned p = first; p < first + pages; p++) {
        uint8_t *at = vhost_user_relay_area_ptr(area, p);

        for (unsigned i = 0; i < PAGE; i++) {
            at[i] = pattern(p, i);
        }
    }
}

static void assert_filled(unsigned first, unsigned pages)
{
    for (unsigned p = first; p < first + pages; p++) {
        const uint8_t *at = vhost_user_relay_area_ptr(area, p);

        for (unsigned i = 0; i < PAGE; i++) {
            g_assert_cmphex(at[i], ==, pattern(p, i));
        }
    }
}

/* Pages that the host has given. */
static unsigned host_pages(void)
{
    struct stat st;

    g_assert_cmpint(fstat(vhost_user_relay_area_fd(area), &st), ==, 0);
    return st.st_blocks * 512 / PAGE;
}

static unsigned held_pages(void)
{
    return vhost_user_relay_area_held(area) / PAGE;
}

static void test_new(void)
{
    int fd, seals;
    void *again;

    area_new(4 * MiB);
    fd = vhost_user_relay_area_fd(area);
    g_assert_cmpuint(vhost_user_relay_area_size(area), ==, 4 * MiB);
    g_assert_cmpuint(vhost_user_relay_area_gpa(3), ==, (1ULL << 40) + 3 * PAGE);
    g_assert_cmpuint(held_pages(), ==, 0);
    g_assert_cmpuint(host_pages(), ==, 0);

    /* Whoever has it can make no hole for us to fall into. */
    seals = fcntl(fd, F_GET_SEALS);
    g_assert_cmphex(seals, ==, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    g_assert_cmpint(ftruncate(fd, MiB), ==, -1);
    g_assert_cmpint(errno, ==, EPERM);
    g_assert_cmpint(ftruncate(fd, 8 * MiB), ==, -1);
    g_assert_cmpint(errno, ==, EPERM);

    /* It is one memory with what the file shows. */
    again = mmap(NULL, 4 * MiB, PROT_READ, MAP_SHARED, fd, 0);
    g_assert_true(again != MAP_FAILED);
    memset(vhost_user_relay_area_ptr(area, 5), 0x5a, PAGE);
    g_assert_cmphex(((uint8_t *)again)[5 * PAGE], ==, 0x5a);
    munmap(again, 4 * MiB);
    area_free();
    g_assert_cmpint(fcntl(fd, F_GETFD), ==, -1);
}

static void test_lowest(void)
{
    area_new(MiB);
    g_assert_cmpuint(take(3), ==, 0);
    g_assert_cmpuint(take(2), ==, 3);
    g_assert_cmpuint(take(4), ==, 5);
    give(0, 3);
    /* Not in the gap that is too small; then in it. */
    g_assert_cmpuint(take(4), ==, 9);
    g_assert_cmpuint(take(1), ==, 0);
    g_assert_cmpuint(take(2), ==, 1);
    /* Neighbours that are free are one run. */
    give(3, 2);
    give(5, 4);
    g_assert_cmpuint(take(6), ==, 3);
    area_free();
}

static void test_full(void)
{
    area_new(MiB);
    g_assert_true(cannot_take(257));
    g_assert_true(cannot_take(UINT_MAX));
    g_assert_cmpuint(take(256), ==, 0);
    g_assert_true(cannot_take(1));
    give(255, 1);
    g_assert_true(cannot_take(2));
    g_assert_cmpuint(take(1), ==, 255);
    give(0, 256);
    g_assert_cmpuint(take(255), ==, 0);
    g_assert_true(cannot_take(2));
    area_free();
}

static void test_fragmented(void)
{
    area_new(MiB);
    for (unsigned i = 0; i < 256; i++) {
        g_assert_cmpuint(take(1), ==, i);
    }
    for (unsigned i = 1; i < 256; i += 2) {
        give(i, 1);
    }
    /* Half of it is free, in pieces of one page. */
    g_assert_true(cannot_take(2));
    for (unsigned i = 1; i < 256; i += 2) {
        g_assert_cmpuint(take(1), ==, i);
    }
    g_assert_true(cannot_take(1));
    give(100, 1);
    give(101, 1);
    g_assert_cmpuint(take(2), ==, 100);
    area_free();
}

/* What is there stays: nobody clears it behind the back of a late write. */
static void test_contents(void)
{
    area_new(MiB);
    take(8);
    fill(0, 8);
    give(2, 3);
    g_assert_cmpuint(take(3), ==, 2);
    assert_filled(0, 8);
    area_free();
}

/* The first fit of a plain array. */
static bool model_fits(const uint8_t *used, unsigned n, unsigned pages,
                       unsigned *first)
{
    unsigned run = 0;

    for (unsigned i = 0; i < n; i++) {
        run = used[i] ? 0 : run + 1;
        if (run == pages) {
            *first = i + 1 - pages;
            return true;
        }
    }
    return false;
}

static void random_step(uint8_t *used, unsigned n)
{
    unsigned pages = g_test_rand_int_range(1, g_test_rand_bit() ? 4 : 40);
    unsigned at = g_test_rand_int_range(0, n), first, expected;
    bool fits;

    if (used[at]) {
        /* A part of a run may go: runs are the caller's. */
        for (pages = 0; at + pages < n && pages < 24 && used[at + pages];
             pages++) {
            used[at + pages] = 0;
        }
        give(at, pages);
        return;
    }
    fits = model_fits(used, n, pages, &expected);
    g_assert_cmpint(vhost_user_relay_area_alloc(area, pages, &first), ==,
                    fits);
    if (fits) {
        g_assert_cmpuint(first, ==, expected);
        memset(used + first, 1, pages);
    }
}

static void test_random(void)
{
    uint8_t used[256] = { 0 };
    unsigned touched;

    area_new(MiB);
    for (unsigned i = 0; i < RANDOM_STEPS; i++) {
        random_step(used, 256);
        if (!(i % 1000)) {
            vhost_user_relay_area_shrink(area);
            touched = held_pages();
            g_assert_cmpuint(touched, <=, 256);
        }
    }
    area_free();
}

/* A burst of requests, of which some are still under way. */
static void test_shrink_used(void)
{
    area_new(16 * MiB);
    g_assert_cmpuint(take(4096), ==, 0);
    fill(0, 4096);
    g_assert_cmpuint(held_pages(), ==, 4096);
    g_assert_cmpuint(host_pages(), ==, 4096);
    give(10, 990);
    give(1005, 995);
    give(2100, 1990);
    /* In use: 0-9, 1000-1004, 2000-2099, 4090-4095. */

    /* So many were needed a moment ago. */
    g_assert_true(vhost_user_relay_area_shrink(area));
    g_assert_cmpuint(held_pages(), ==, 4096);
    g_assert_cmpuint(host_pages(), ==, 4096);

    g_assert_false(vhost_user_relay_area_shrink(area));
    g_assert_cmpuint(held_pages(), ==, IDLE);
    g_assert_cmpuint(host_pages(), ==, IDLE);
    assert_filled(0, 10);
    assert_filled(1000, 5);
    assert_filled(2000, 100);
    assert_filled(4090, 6);
    /* The highest went: what is left of the free is the lowest. */
    assert_filled(0, IDLE - 5 - 100 - 6);

    /* What comes next is memory again, and counted. */
    g_assert_cmpuint(take(990), ==, 10);
    fill(10, 990);
    g_assert_cmpuint(host_pages(), ==, 1000 + 5 + 100 + 6);
    g_assert_cmpuint(held_pages(), ==, host_pages());
    assert_filled(0, 1005);
    area_free();
}

static void test_shrink_idle(void)
{
    area_new(16 * MiB);
    take(4096);
    fill(0, 4096);
    give(0, 4096);
    g_assert_true(vhost_user_relay_area_shrink(area));
    g_assert_false(vhost_user_relay_area_shrink(area));
    g_assert_cmpuint(held_pages(), ==, IDLE);
    g_assert_cmpuint(host_pages(), ==, IDLE);
    assert_filled(0, IDLE);
    /* Nothing more goes. */
    g_assert_false(vhost_user_relay_area_shrink(area));
    g_assert_cmpuint(host_pages(), ==, IDLE);
    area_free();

    /* So little never goes. */
    area_new(4 * MiB);
    take(IDLE);
    fill(0, IDLE);
    give(0, IDLE);
    for (unsigned i = 0; i < 3; i++) {
        g_assert_false(vhost_user_relay_area_shrink(area));
        g_assert_cmpuint(host_pages(), ==, IDLE);
    }
    area_free();
}

/* More is in use than an idle area may hold: only the rest goes. */
static void test_shrink_busy(void)
{
    area_new(16 * MiB);
    take(4096);
    fill(0, 4096);
    give(0, 1000);
    vhost_user_relay_area_shrink(area);
    g_assert_false(vhost_user_relay_area_shrink(area));
    g_assert_cmpuint(held_pages(), ==, 3096);
    g_assert_cmpuint(host_pages(), ==, 3096);
    assert_filled(1000, 3096);
    area_free();
}

/* What was needed between two calls stays, however short it was. */
static void test_shrink_peak(void)
{
    area_new(16 * MiB);
    take(4096);
    fill(0, 4096);
    give(0, 4096);
    vhost_user_relay_area_shrink(area);
    for (unsigned i = 0; i < 3; i++) {
        g_assert_cmpuint(take(700), ==, 0);
        give(0, 700);
        g_assert_true(vhost_user_relay_area_shrink(area));
        g_assert_cmpuint(held_pages(), ==, 700);
        g_assert_cmpuint(host_pages(), ==, 700);
        assert_filled(0, 700);
    }
    g_assert_false(vhost_user_relay_area_shrink(area));
    g_assert_cmpuint(host_pages(), ==, IDLE);
    area_free();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/vhost-user-relay/area/new", test_new);
    g_test_add_func("/vhost-user-relay/area/lowest", test_lowest);
    g_test_add_func("/vhost-user-relay/area/full", test_full);
    g_test_add_func("/vhost-user-relay/area/fragmented", test_fragmented);
    g_test_add_func("/vhost-user-relay/area/contents", test_contents);
    g_test_add_func("/vhost-user-relay/area/random", test_random);
    g_test_add_func("/vhost-user-relay/area/shrink/used", test_shrink_used);
    g_test_add_func("/vhost-user-relay/area/shrink/idle", test_shrink_idle);
    g_test_add_func("/vhost-user-relay/area/shrink/busy", test_shrink_busy);
    g_test_add_func("/vhost-user-relay/area/shrink/peak", test_shrink_peak);
    return g_test_run();
}
