/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: where the buffers of a request lie
 *
 * Compiled with hw/virtio/vhost-user-relay-layout.c alone, which is pure.
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "standard-headers/linux/virtio_ring.h"
#include "../../hw/virtio/vhost-user-relay-area.h"
#include "../../hw/virtio/vhost-user-relay-layout.h"

#define PAGE VHOST_USER_RELAY_PAGE
#define RANDOM_LAYOUTS 20000

static VhostUserRelayLayout layout;
static hwaddr addr[VHOST_USER_RELAY_DESCS_MAX];
static struct iovec iov[VHOST_USER_RELAY_DESCS_MAX];
static unsigned n_buffers;

static void buffer(hwaddr a, size_t len)
{
    addr[n_buffers] = a;
    iov[n_buffers++] = (struct iovec) { .iov_len = len };
}

/* Lay out what buffer() has collected: the first @n_out are the device's. */
static void lay_out(unsigned n_out)
{
    vhost_user_relay_layout_init(&layout);
    vhost_user_relay_layout_add(&layout, addr, iov, n_out, false);
    vhost_user_relay_layout_add(&layout, addr + n_out, iov + n_out,
                                n_buffers - n_out, true);
}

static uint64_t offset_of(unsigned i)
{
    return (uintptr_t)iov[i].iov_base;
}

/*
 * What holds for every layout: descriptors and buffers are the same bytes in
 * the same order, each at its offset in a page, none on top of another.
 */
static void assert_sound(unsigned n_out)
{
    const VhostUserRelayDesc *d = layout.descs;
    uint64_t end = 0, in_desc = 0;

    for (unsigned i = 0; i < n_buffers; i++) {
        g_assert_cmpuint(offset_of(i) % PAGE, ==, addr[i] % PAGE);
        g_assert_cmpuint(offset_of(i), >=, end);
        g_assert_cmpuint(offset_of(i), <, end + 2 * PAGE);
        end = offset_of(i) + iov[i].iov_len;

        g_assert_cmpuint(d->gpa + in_desc, ==, offset_of(i));
        g_assert_cmpuint(d->flags, ==, i < n_out ? 0 : VRING_DESC_F_WRITE);
        in_desc += iov[i].iov_len;
        g_assert_cmpuint(in_desc, <=, d->len);
        if (in_desc == d->len) {
            d++;
            in_desc = 0;
        }
    }
    g_assert_cmpuint(in_desc, ==, 0);
    g_assert_cmpuint(d - layout.descs, ==, layout.n);
    g_assert_cmpuint(layout.end, ==, end);
    g_assert_cmpuint(vhost_user_relay_layout_pages(&layout), ==,
                     DIV_ROUND_UP(end, PAGE));
}

static bool whole(const VhostUserRelayDesc *d)
{
    return !(d->gpa % PAGE) && !(d->len % PAGE);
}

/* Nothing is left that could be one descriptor. */
static void assert_joined(void)
{
    for (unsigned i = 1; i < layout.n; i++) {
        const VhostUserRelayDesc *a = &layout.descs[i - 1], *b = a + 1;

        g_assert_false(whole(a) && whole(b) && a->flags == b->flags &&
                       a->gpa + a->len == b->gpa);
    }
}

static void test_one(void)
{
    n_buffers = 0;
    buffer(0x12345678, 100);
    lay_out(1);
    assert_sound(1);
    g_assert_cmpuint(layout.n, ==, 1);
    g_assert_cmpuint(layout.descs[0].gpa, ==, 0x678);
    g_assert_cmpuint(layout.descs[0].len, ==, 100);
    g_assert_cmpuint(vhost_user_relay_layout_pages(&layout), ==, 1);

    /* It crosses the end of a page, and so does its copy. */
    n_buffers = 0;
    buffer(0x1fff, 2);
    lay_out(0);
    assert_sound(0);
    g_assert_cmpuint(layout.descs[0].gpa, ==, 0xfff);
    g_assert_cmpuint(vhost_user_relay_layout_pages(&layout), ==, 2);
}

static void test_two(void)
{
    /* A header, and behind it in the same page of the guest: no gap. */
    n_buffers = 0;
    buffer(0x5010, 16);
    buffer(0x5020, 32);
    lay_out(2);
    assert_sound(2);
    g_assert_cmpuint(layout.n, ==, 2);
    g_assert_cmpuint(layout.descs[1].gpa, ==, 0x20);

    /* Elsewhere in a page: another page, as the offset is kept. */
    n_buffers = 0;
    buffer(0x5010, 16);
    buffer(0x9000, 512);
    buffer(0x5030, 1);
    lay_out(2);
    assert_sound(2);
    g_assert_cmpuint(layout.n, ==, 3);
    g_assert_cmpuint(layout.descs[1].gpa, ==, PAGE);
    g_assert_cmpuint(layout.descs[2].gpa, ==, 2 * PAGE + 0x30);
}

static void test_joins(void)
{
    /* A megabyte from 256 pages that lie anywhere. */
    n_buffers = 0;
    for (unsigned i = 0; i < 256; i++) {
        buffer((hwaddr)((i * 37) % 256 + 3) * PAGE, PAGE);
    }
    lay_out(256);
    assert_sound(256);
    g_assert_cmpuint(layout.n, ==, 1);
    g_assert_cmpuint(layout.descs[0].len, ==, MiB);
    g_assert_cmpuint(vhost_user_relay_layout_pages(&layout), ==, 256);

    /* What the device reads and what it writes are never one. */
    lay_out(128);
    assert_sound(128);
    g_assert_cmpuint(layout.n, ==, 2);
    g_assert_cmpuint(layout.descs[0].len, ==, MiB / 2);

    /* A disk's read: its header, pages, its status. */
    n_buffers = 0;
    buffer(0x7010, 16);
    buffer(0x10000, 2 * PAGE);
    buffer(0x40000, PAGE);
    buffer(0x7020, 1);
    lay_out(1);
    assert_sound(1);
    g_assert_cmpuint(layout.n, ==, 3);
    g_assert_cmpuint(layout.descs[1].len, ==, 3 * PAGE);
}

static void test_stays_apart(void)
{
    /* Not whole pages, although they touch: a back end counts on them. */
    n_buffers = 0;
    buffer(0x1000, 512);
    buffer(0x1200, PAGE - 512);
    buffer(0x2000, PAGE);
    lay_out(3);
    assert_sound(3);
    g_assert_cmpuint(layout.n, ==, 3);
    g_assert_cmpuint(vhost_user_relay_layout_pages(&layout), ==, 2);

    /* Pages long, but not at the beginning of pages. */
    n_buffers = 0;
    buffer(0x1800, PAGE);
    buffer(0x2800, PAGE);
    lay_out(0);
    assert_sound(0);
    g_assert_cmpuint(layout.n, ==, 2);

    /* A whole page first, less after it. */
    n_buffers = 0;
    buffer(0x3000, PAGE);
    buffer(0x9000, PAGE - 1);
    buffer(0x9fff, 1);
    lay_out(0);
    assert_sound(0);
    g_assert_cmpuint(layout.n, ==, 3);
}

static void test_most(void)
{
    n_buffers = 0;
    for (unsigned i = 0; i < VHOST_USER_RELAY_DESCS_MAX; i++) {
        buffer(i * 0x10007ULL, 1 + i % 5000);
    }
    for (unsigned out = 0; out <= n_buffers; out += 256) {
        lay_out(out);
        assert_sound(out);
        g_assert_cmpuint(layout.n, ==, VHOST_USER_RELAY_DESCS_MAX);
    }
}

/* A descriptor has 32 bits for its length: what is joined stays below. */
static void test_large(void)
{
    static const uint64_t sizes[] = { GiB - PAGE, GiB, 2 * GiB, 3 * GiB };

    for (unsigned a = 0; a < ARRAY_SIZE(sizes); a++) {
        for (unsigned b = 0; b < ARRAY_SIZE(sizes); b++) {
            n_buffers = 0;
            buffer(0, sizes[a]);
            buffer(8 * GiB, sizes[b]);
            buffer(4 * GiB, PAGE);
            lay_out(0);
            assert_sound(0);
        }
    }
    /* Up to a gigabyte they are. */
    n_buffers = 0;
    buffer(0, GiB - PAGE);
    buffer(2 * GiB, PAGE);
    buffer(4 * GiB, PAGE);
    lay_out(0);
    assert_sound(0);
    g_assert_cmpuint(layout.n, ==, 2);
    g_assert_cmpuint(layout.descs[0].len, ==, GiB);
}

static void random_buffer(void)
{
    static const unsigned lens[] = { 1, 16, 512, PAGE, 4 * PAGE };
    unsigned kind = g_test_rand_int_range(0, 8);
    hwaddr page = (hwaddr)g_test_rand_int_range(0, 1 << 20) * PAGE;

    if (kind < ARRAY_SIZE(lens)) {
        buffer(page, lens[kind]);
    } else {
        buffer(page + g_test_rand_int_range(0, PAGE),
               g_test_rand_int_range(1, 3 * PAGE));
    }
}

static void test_random(void)
{
    for (unsigned round = 0; round < RANDOM_LAYOUTS; round++) {
        unsigned n = g_test_rand_int_range(1, 20);
        unsigned out = g_test_rand_int_range(0, n + 1);

        n_buffers = 0;
        for (unsigned i = 0; i < n; i++) {
            random_buffer();
        }
        lay_out(out);
        assert_sound(out);
        assert_joined();
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/vhost-user-relay/layout/one", test_one);
    g_test_add_func("/vhost-user-relay/layout/two", test_two);
    g_test_add_func("/vhost-user-relay/layout/joins", test_joins);
    g_test_add_func("/vhost-user-relay/layout/stays-apart", test_stays_apart);
    g_test_add_func("/vhost-user-relay/layout/most", test_most);
    g_test_add_func("/vhost-user-relay/layout/large", test_large);
    g_test_add_func("/vhost-user-relay/layout/random", test_random);
    return g_test_run();
}
