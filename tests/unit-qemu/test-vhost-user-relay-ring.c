/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: the driver's side of a ring, and hostile devices
 *
 * Compiled with hw/virtio/vhost-user-relay-ring.c alone; the device is that of
 * vhost-user-relay-device.h.
 */

#include "qemu/osdep.h"
#include "vhost-user-relay-device.h"

#define RANDOM_OPS 1000000
#define MODEL_NUM 64

static void test_offsets(void)
{
    for (unsigned num = 1; num <= 32768; num *= 2) {
        size_t avail = vhost_user_relay_ring_avail_offset(num);
        size_t used = vhost_user_relay_ring_used_offset(num);

        g_assert_cmpuint(avail, ==, 16 * num);
        g_assert_cmpuint(used, >=, avail + 6 + 2 * num);
        g_assert_cmpuint(used % 4, ==, 0);
        g_assert_cmpuint(vhost_user_relay_ring_bytes(num), ==,
                         used + 6 + 8 * num);
        start(num, true);
        for (size_t i = 0; i < shared_bytes; i++) {
            g_assert_cmphex(shared[i], ==, 0);
        }
        end();
    }
}

static void test_add(void)
{
    const VhostUserRelayDesc descs[] = {
        { .gpa = 0x10203040506070, .len = 0x11223344, .flags = 0 },
        { .gpa = 0x20, .len = 1, .flags = VRING_DESC_F_WRITE },
        { .gpa = 0x30, .len = 4096, .flags = VRING_DESC_F_WRITE },
    };
    const uint8_t first[] = {
        0x70, 0x60, 0x50, 0x40, 0x30, 0x20, 0x10, 0, 0x44, 0x33, 0x22, 0x11,
        VRING_DESC_F_NEXT, 0,
    };
    uint16_t head, at;
    const uint8_t *desc;

    start(8, false);
    at = add(1);
    g_assert_cmpuint(dev_avail_idx(), ==, 1);
    g_assert_cmpuint(dev_avail(0), ==, at);
    g_assert_cmpuint(lduw_le_p(shared + 16 * at + 12), ==, 0);

    g_assert_true(vhost_user_relay_ring_add(&ring, descs, 3, &head));
    g_assert_cmpuint(dev_avail_idx(), ==, 2);
    g_assert_cmpuint(dev_avail(1), ==, head);
    g_assert_cmpuint(head, !=, at);
    desc = shared + 16 * head;
    g_assert_cmpint(memcmp(desc, first, sizeof(first)), ==, 0);
    for (unsigned i = 1; i < 3; i++) {
        desc = shared + 16 * lduw_le_p(desc + 14);
        g_assert_cmphex(ldq_le_p(desc), ==, descs[i].gpa);
        g_assert_cmpuint(ldl_le_p(desc + 8), ==, descs[i].len);
        g_assert_cmphex(lduw_le_p(desc + 12), ==,
                        VRING_DESC_F_WRITE | (i < 2 ? VRING_DESC_F_NEXT : 0));
    }
    end();
}

static void test_full(void)
{
    uint16_t a, b;

    start(8, false);
    g_assert_true(cannot_add(9));
    a = add(5);
    g_assert_true(cannot_add(4));
    b = add(3);
    g_assert_true(cannot_add(1));
    dev_use(b, 0);
    assert_taken(b, 0);
    g_assert_true(cannot_add(4));
    b = add(3);
    g_assert_true(cannot_add(1));
    dev_use(a, 0);
    dev_use(b, 0);
    assert_taken(a, 0);
    assert_taken(b, 0);
    assert_nothing();
    add(8);
    g_assert_true(cannot_add(1));
    end();
    /* The smallest there is. */
    start(1, false);
    a = add(1);
    g_assert_true(cannot_add(1));
    dev_use(a, 1);
    assert_taken(a, 1);
    add(1);
    end();
}

/* Out of order, and any number for the length: that is for others to judge. */
static void test_take(void)
{
    uint16_t head[4];

    start(16, false);
    assert_nothing();
    for (unsigned i = 0; i < 4; i++) {
        head[i] = add(i + 1);
    }
    assert_nothing();
    dev_use(head[2], 0);
    assert_taken(head[2], 0);
    assert_nothing();
    dev_use(head[0], UINT32_MAX);
    dev_use(head[3], 0x80000000);
    assert_taken(head[0], UINT32_MAX);
    assert_taken(head[3], 0x80000000);
    assert_nothing();
    dev_use(head[1], 7);
    assert_taken(head[1], 7);
    g_assert_cmpuint(ring.n_free, ==, 16);
    end();
}

static void test_bad_id(void)
{
    static const uint32_t beyond[] = {
        8, 9, 0x7fff, 0xffff, 0x10000, 0x80000000, UINT32_MAX,
    };
    uint16_t head;

    for (unsigned i = 0; i < ARRAY_SIZE(beyond); i++) {
        start(8, false);
        add(1);
        dev_use(beyond[i], 0);
        assert_bad();
        end();
    }
    /* Right in its low 16 bits. */
    start(8, false);
    head = add(2);
    dev_use(0x10000 | head, 0);
    assert_bad();
    end();
    /* Not a head: in the middle of a chain, and at its end. */
    for (unsigned i = 1; i < 3; i++) {
        start(8, false);
        head = add(3);
        dev_use(i == 1 ? ring.next[head] : ring.next[ring.next[head]], 0);
        assert_bad();
        end();
    }
}

static void test_bad_twice(void)
{
    uint16_t a, b;

    start(8, false);
    a = add(2);
    b = add(2);
    dev_use(a, 0);
    dev_use(a, 0);
    assert_taken(a, 0);
    assert_bad();
    end();
    /* With something else in between. */
    start(8, false);
    a = add(2);
    b = add(2);
    add(1);
    dev_use(a, 0);
    dev_use(b, 0);
    assert_taken(a, 0);
    assert_taken(b, 0);
    dev_use(a, 0);
    assert_bad();
    end();
    /* Never given, although others were. */
    start(8, false);
    a = add(1);
    dev_use(a ? 0 : 7, 0);
    assert_bad();
    end();
    /* The same name is right once it was given again. */
    start(1, false);
    a = add(1);
    dev_use(a, 1);
    assert_taken(a, 1);
    g_assert_cmpuint(add(1), ==, a);
    dev_use(a, 2);
    assert_taken(a, 2);
    assert_nothing();
    end();
}

static void jump(unsigned added, unsigned taken, int by)
{
    uint16_t head[8];

    start(8, false);
    for (unsigned i = 0; i < added; i++) {
        head[i] = add(1);
        dev_use_at(i, head[i], 0);
    }
    dev_set_used_idx(taken);
    for (unsigned i = 0; i < taken; i++) {
        assert_taken(head[i], 0);
    }
    dev_set_used_idx(taken + by);
    assert_bad();
    end();
}

/* More than it has, more than the ring, and backwards. */
static void test_bad_index(void)
{
    jump(0, 0, 1);
    jump(3, 0, 4);
    jump(3, 3, 1);
    jump(3, 1, 3);
    jump(8, 0, 9);
    jump(8, 8, 1);
    jump(8, 4, 32767);
    jump(8, 4, 32768);
    jump(8, 4, 65535);
    jump(8, 0, -1);
    jump(3, 2, -1);
    jump(3, 2, -2);
    jump(3, 2, -32768);
}

/* One step of index after the other, far past 65535, ring full or empty. */
static void wrap(unsigned num, bool event_idx, bool full)
{
    uint16_t *head = g_new(uint16_t, num);
    unsigned n = full ? num : 1;

    start(num, event_idx);
    for (unsigned done = 0; done < 3 * 65536 + 5; done += n) {
        for (unsigned i = 0; i < n; i++) {
            head[i] = add(1);
            g_assert_cmpuint(dev_avail(done + i), ==, head[i]);
        }
        g_assert_cmpuint(dev_avail_idx(), ==, (uint16_t)(done + n));
        g_assert_true(!full || cannot_add(1));
        for (unsigned i = n; i--;) {
            dev_use(head[i], done + i);
        }
        for (unsigned i = n; i--;) {
            assert_taken(head[i], done + i);
        }
        assert_nothing();
    }
    end();
    g_free(head);
}

static void test_wrap(void)
{
    for (int event_idx = 0; event_idx < 2; event_idx++) {
        for (int full = 0; full < 2; full++) {
            wrap(1, event_idx, full);
            wrap(4, event_idx, full);
            wrap(1024, event_idx, full);
            wrap(32768, event_idx, full);
        }
    }
    /* And what is bad is bad there, too. */
    start(4, false);
    for (unsigned i = 0; i < 65535; i++) {
        uint16_t head = add(1);

        dev_use(head, 0);
        assert_taken(head, 0);
    }
    add(1);
    add(1);
    dev_set_used_idx(2);
    assert_bad();
    end();
}

/* Nothing that it writes changes what we know of ours. */
static void test_scribble(void)
{
    uint16_t head[MODEL_NUM];

    start(MODEL_NUM, true);
    for (unsigned round = 0; round < 2000; round++) {
        unsigned n = 0, i;

        while (ring.n_free >= 3) {
            dev_scribble();
            head[n++] = add(1 + round % 3);
            g_assert_cmpuint(dev_avail(ring.avail_idx - 1), ==, head[n - 1]);
        }
        g_assert_cmpuint(n, >=, (MODEL_NUM - 2) / (1 + round % 3));
        while (n) {
            dev_scribble();
            vhost_user_relay_ring_kick(&ring);
            vhost_user_relay_ring_set_call(&ring, n % 2);
            assert_nothing();
            i = g_test_rand_int_range(0, n);
            dev_use(head[i], n);
            assert_taken(head[i], n);
            head[i] = head[--n];
        }
        dev_scribble();
        assert_nothing();
        g_assert_cmpuint(ring.n_free, ==, MODEL_NUM);
    }
    end();
}

typedef struct Model {
    unsigned length[MODEL_NUM];      /* of the chain of this head, or 0 */
    bool busy[MODEL_NUM];            /* the descriptor is in a chain */
    uint16_t chain[MODEL_NUM][MODEL_NUM];
    uint16_t heads[MODEL_NUM];
    unsigned n_heads, n_free;
} Model;

static void model_add(Model *m)
{
    unsigned n = g_test_rand_int_range(1, g_test_rand_bit() ? 3 : 12);
    uint16_t head, at;

    if (n > m->n_free) {
        g_assert_true(cannot_add(n));
        return;
    }
    at = head = add(n);
    g_assert_cmpuint(dev_avail(dev_avail_idx() - 1), ==, head);
    /* As the device finds it: by its own way, before it scribbles. */
    for (unsigned i = 0; i < n; i++) {
        uint16_t flags = lduw_le_p(shared + 16 * at + 12);

        g_assert_cmpuint(at, <, MODEL_NUM);
        g_assert_false(m->busy[at]);
        m->busy[at] = true;
        m->chain[head][i] = at;
        g_assert_cmpint(flags & VRING_DESC_F_NEXT, ==,
                        i + 1 < n ? VRING_DESC_F_NEXT : 0);
        at = lduw_le_p(shared + 16 * at + 14);
    }
    m->length[head] = n;
    m->heads[m->n_heads++] = head;
    m->n_free -= n;
}

static void model_use(Model *m)
{
    unsigned i = g_test_rand_int_range(0, m->n_heads);
    uint16_t head = m->heads[i];
    uint32_t len = g_test_rand_int();

    dev_use(head, len);
    assert_taken(head, len);
    for (unsigned j = 0; j < m->length[head]; j++) {
        m->busy[m->chain[head][j]] = false;
    }
    m->n_free += m->length[head];
    m->length[head] = 0;
    m->heads[i] = m->heads[--m->n_heads];
}

static void test_model(void)
{
    g_autofree Model *m = g_new0(Model, 1);

    m->n_free = MODEL_NUM;
    start(MODEL_NUM, false);
    for (unsigned op = 0; op < RANDOM_OPS; op++) {
        if (m->n_heads && g_test_rand_bit()) {
            model_use(m);
        } else {
            model_add(m);
        }
        g_assert_cmpuint(ring.n_free, ==, m->n_free);
        if (!(op % 16)) {
            dev_scribble();
        }
    }
    while (m->n_heads) {
        model_use(m);
    }
    g_assert_cmpuint(ring.n_free, ==, MODEL_NUM);
    add(MODEL_NUM);
    end();
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/vhost-user-relay/ring/offsets", test_offsets);
    g_test_add_func("/vhost-user-relay/ring/add", test_add);
    g_test_add_func("/vhost-user-relay/ring/full", test_full);
    g_test_add_func("/vhost-user-relay/ring/take", test_take);
    g_test_add_func("/vhost-user-relay/ring/bad/id", test_bad_id);
    g_test_add_func("/vhost-user-relay/ring/bad/twice", test_bad_twice);
    g_test_add_func("/vhost-user-relay/ring/bad/index", test_bad_index);
    g_test_add_func("/vhost-user-relay/ring/wrap", test_wrap);
    g_test_add_func("/vhost-user-relay/ring/scribble", test_scribble);
    g_test_add_func("/vhost-user-relay/ring/model", test_model);
    return g_test_run();
}
