/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: what the guest and the back end find
 *
 * Bytes and lengths, order, what a queue that stops puts back, and who is told
 * of what.  vhost-user-relay-fake.h has the guest and the back end.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "standard-headers/linux/virtio_blk.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_ring.h"
#include "vhost-user-relay-fake.h"

#define NUM 16
#define AREA (1u << 20)
#define INDIRECT (1ULL << VIRTIO_RING_F_INDIRECT_DESC)
#define EVENT_IDX (1ULL << VIRTIO_RING_F_EVENT_IDX)
#define IN_ORDER (1ULL << VIRTIO_F_IN_ORDER)
#define PACKED (1ULL << VIRTIO_F_RING_PACKED)

/* Where requests have what the device reads, and what it writes. */
#define OUT(head) (FAKE_DATA + (head) * 4 * FAKE_PAGE)
#define IN(head) (OUT(head) + 2 * FAKE_PAGE)

static uint8_t shadow[FAKE_RAM_BYTES];

static void pop(void)
{
    vhost_user_relay_queue_pop(&fake.q[0]);
}

static void push(void)
{
    vhost_user_relay_queue_push(&fake.q[0]);
}

/* From now on the guest's memory shall be what the test says. */
static void remember(void)
{
    memcpy(shadow, fake.ram, FAKE_RAM_BYTES);
}

static void expect(hwaddr addr, uint8_t byte, size_t len)
{
    memset(shadow + (addr - FAKE_RAM), byte, len);
}

static void assert_ram(void)
{
    g_assert_cmpint(memcmp(shadow, fake.ram, FAKE_RAM_BYTES), ==, 0);
}

static void request(unsigned head, uint32_t out, uint32_t in)
{
    FakeRequest *r = fake_request(0, head);

    if (out) {
        fake_out(r, OUT(head) + 0x10, out);
    }
    if (in) {
        fake_in(r, IN(head) + 0x20, in);
    }
    fake_offer(0, head);
}

static void assert_used(unsigned nth, unsigned head, uint32_t len)
{
    FakeUsed used = fake_used(0, nth);

    g_assert_cmpuint(used.head, ==, head);
    g_assert_cmpuint(used.len, ==, len);
}

static void begin(uint16_t id, uint64_t guest, uint64_t features)
{
    fake_new(AREA, id, guest);
    fake_start(0, NUM, features);
}

/* Nothing is left with the back end: all memory comes back. */
static void end(void)
{
    fake_stop(0, fake.be[0].used_idx);
    g_assert_cmpuint(fake.pool.quarantined, ==, 0);
    g_assert_cmpuint(fake_free_pages(), ==, AREA / FAKE_PAGE);
    fake_free();
}

static void round_trip(uint16_t id, uint64_t features)
{
    static const struct {
        unsigned at, len;
    } out[] = { { 0x7f3, 16 }, { 0xffe, 4 }, { 0x2000, 8192 } },
      in[] = { { 0x6000, 4096 }, { 0x8123, 100 }, { 0x9fff, 1 } };
    g_autofree FakeChain *chain = g_new(FakeChain, 1);
    FakeRequest *r;

    begin(id, 0, features);
    r = fake_request(0, 3);
    for (unsigned i = 0; i < 3; i++) {
        fake_out(r, FAKE_DATA + out[i].at, out[i].len);
    }
    for (unsigned i = 0; i < 3; i++) {
        fake_in(r, FAKE_DATA + in[i].at, in[i].len);
    }
    fake_offer(0, 3);
    remember();
    pop();
    /* Nothing stays mapped while it is in flight. */
    g_assert_cmpuint(fake.maps, ==, 0);

    g_assert_true(fake_get(0, chain));
    g_assert_cmpint(chain->table, ==, features == INDIRECT);
    g_assert_cmpuint(chain->n, ==, 6);
    for (unsigned i = 0; i < 6; i++) {
        unsigned at = i < 3 ? out[i].at : in[i - 3].at;

        g_assert_cmpint(chain->part[i].write, ==, i >= 3);
        g_assert_cmpuint(chain->part[i].len, ==,
                         i < 3 ? out[i].len : in[i - 3].len);
        g_assert_cmpuint((uintptr_t)chain->part[i].ptr % FAKE_PAGE, ==,
                         at % FAKE_PAGE);
        if (i < 3 || id == VIRTIO_ID_BLOCK) {
            g_assert_cmpint(memcmp(chain->part[i].ptr,
                                   fake_ram(FAKE_DATA + at),
                                   chain->part[i].len), ==, 0);
        }
    }
    g_assert_false(fake_get(0, chain));
    push();
    g_assert_cmpuint(fake_n_used(0), ==, 0);

    fake_write(chain, 0xaa, UINT64_MAX);
    assert_ram();
    fake_use(0, chain->head, 4197);
    push();
    for (unsigned i = 0; i < 3; i++) {
        expect(FAKE_DATA + in[i].at, 0xaa, in[i].len);
    }
    assert_ram();
    g_assert_cmpuint(fake_n_used(0), ==, 1);
    assert_used(0, 3, 4197);
    g_assert_cmpuint(stat64_get(&fake.pool.requests), ==, 1);
    g_assert_cmpuint(stat64_get(&fake.pool.bytes_out), ==, 8212);
    g_assert_cmpuint(stat64_get(&fake.pool.bytes_in), ==, 4197);
    end();
}

static void test_round_trip(void)
{
    round_trip(VIRTIO_ID_FS, 0);
    round_trip(VIRTIO_ID_FS, INDIRECT);
    round_trip(VIRTIO_ID_BLOCK, 0);
    round_trip(VIRTIO_ID_BLOCK, INDIRECT);
}

/* One buffer needs no table; a thousand need one that is 4 pages long. */
static void test_table(void)
{
    g_autofree FakeChain *chain = g_new(FakeChain, 1);
    FakeRequest *r;

    begin(VIRTIO_ID_FS, 0, INDIRECT);
    request(0, 100, 0);
    request(1, 0, 100);
    r = fake_request(0, 2);
    for (unsigned i = 0; i < 1024; i++) {
        (i < 1000 ? fake_out : fake_in)(r, FAKE_DATA + 0x100000 + i * 33, 33);
    }
    fake_offer(0, 2);
    pop();
    for (unsigned i = 0; i < 2; i++) {
        g_assert_true(fake_get(0, chain));
        g_assert_false(chain->table);
        g_assert_cmpuint(chain->n, ==, 1);
        fake_use(0, chain->head, 0);
    }
    g_assert_true(fake_get(0, chain));
    g_assert_true(chain->table);
    g_assert_cmpuint(chain->n, ==, 1024);
    for (unsigned i = 0; i < 1000; i++) {
        g_assert_cmpint(memcmp(chain->part[i].ptr,
                               fake_ram(FAKE_DATA + 0x100000 + i * 33), 33),
                        ==, 0);
    }
    fake_write(chain, 0x5c, UINT64_MAX);
    remember();
    fake_use(0, chain->head, 24 * 33);
    push();
    for (unsigned i = 1000; i < 1024; i++) {
        expect(FAKE_DATA + 0x100000 + i * 33, 0x5c, 33);
    }
    assert_ram();
    end();
}

/* @say: the length of which the back end speaks, having written it all. */
static void length(uint16_t id, uint32_t say, uint32_t told, uint32_t copied)
{
    g_autofree FakeChain *chain = g_new(FakeChain, 1);

    begin(id, 0, INDIRECT);
    request(1, 16, 1000);
    remember();
    pop();
    g_assert_true(fake_get(0, chain));
    fake_write(chain, 0x77, UINT64_MAX);
    fake_use(0, chain->head, say);
    push();
    assert_used(0, 1, told);
    expect(IN(1) + 0x20, 0x77, copied);
    assert_ram();
    g_assert_cmpint(fake.pool.clamped, ==, say > 1000);
    g_assert_cmpuint(fake.errors, ==, 0);
    end();
}

static void test_length(void)
{
    length(VIRTIO_ID_FS, 1000, 1000, 1000);
    length(VIRTIO_ID_FS, 999, 999, 999);
    length(VIRTIO_ID_FS, 1, 1, 1);
    length(VIRTIO_ID_FS, 0, 0, 0);
    length(VIRTIO_ID_FS, 1001, 1000, 1000);
    length(VIRTIO_ID_FS, UINT32_MAX, 1000, 1000);
    /* A disk's status is at the end, whatever it says. */
    length(VIRTIO_ID_BLOCK, 1, 1, 1000);
    length(VIRTIO_ID_SCSI, 0, 0, 1000);
    length(VIRTIO_ID_BLOCK, UINT32_MAX, 1000, 1000);
}

/* A request of 5001 bytes to write to, where others have left something. */
static void offer_stale(uint16_t id, uint32_t type, uint32_t header,
                        FakeChain *chain)
{
    begin(id, 0, INDIRECT);
    memset(vhost_user_relay_area_ptr(fake.pool.area, 1), 0xee,
           AREA - FAKE_PAGE);
    stl_le_p(fake_ram(OUT(1) + 0x10), type);
    request(1, header, 5001);
    remember();
    pop();
    g_assert_true(fake_get(0, chain));
}

/* What the device did not write is the guest's own, not what lay there. */
static void test_prefill(void)
{
    g_autofree FakeChain *chain = g_new(FakeChain, 1);

    offer_stale(VIRTIO_ID_SCSI, 0, 16, chain);
    memset(chain->part[1].ptr + 1000, 0x99, 10);
    fake_use(0, chain->head, 0);
    push();
    expect(IN(1) + 0x20 + 1000, 0x99, 10);
    assert_ram();
    end();
}

/* @header: bytes of it; @filled: the back end finds what the guest has. */
static void disk(uint32_t type, uint32_t header, uint8_t status, bool filled)
{
    g_autofree FakeChain *chain = g_new(FakeChain, 1);
    bool all = filled || status == VIRTIO_BLK_S_OK;

    offer_stale(VIRTIO_ID_BLOCK, type, header, chain);
    g_assert_true(!memcmp(chain->part[1].ptr, fake_ram(IN(1) + 0x20), 5001) ==
                  filled);
    memset(chain->part[1].ptr, 0x77, all ? 5000 : 1000);
    chain->part[1].ptr[5000] = status;
    fake_use(0, chain->head, 1);
    push();
    assert_used(0, 1, 1);
    expect(IN(1) + 0x20, 0x77, all ? 5000 : 0);
    expect(IN(1) + 0x20 + 5000, status, 1);
    assert_ram();
    end();
}

/* A read that succeeds is written whole, and one that fails is not. */
static void test_disk(void)
{
    disk(VIRTIO_BLK_T_IN, 16, VIRTIO_BLK_S_OK, false);
    disk(VIRTIO_BLK_T_IN, 16, VIRTIO_BLK_S_IOERR, false);
    disk(VIRTIO_BLK_T_IN, 4, VIRTIO_BLK_S_OK, false);
    disk(VIRTIO_BLK_T_IN, 3, VIRTIO_BLK_S_OK, true);
    disk(VIRTIO_BLK_T_GET_ID, 16, VIRTIO_BLK_S_IOERR, true);
    disk(1u << 24, 16, VIRTIO_BLK_S_OK, true);
}

/*
 * What earlier requests left in the area must not reach the guest, even if the
 * back end says that it wrote what it did not.
 */
static void test_cleared(void)
{
    g_autofree FakeChain *chain = g_new(FakeChain, 1);

    offer_stale(VIRTIO_ID_NET, 0, 16, chain);
    fake_use(0, chain->head, 5001);
    push();
    expect(IN(1) + 0x20, 0, 5001);
    assert_ram();
    end();
}

/* It has done @chain: what lies there now is what the guest shall find. */
static void scribbled_push(const FakeChain *chain, unsigned head, bool all)
{
    uint32_t in = chain->part[1].len;
    uint32_t len = g_test_rand_int_range(0, in + 1);

    memcpy(shadow + (IN(head) + 0x20 - FAKE_RAM), chain->part[1].ptr,
           all ? in : len);
    fake_use(0, chain->head, len);
    push();
    assert_used(fake_n_used(0) - 1, head, len);
    assert_ram();
}

/* The back end has all of the area for itself, at any time. */
static void scribble(uint16_t id, uint64_t features)
{
    g_autofree FakeChain *chain = g_new(FakeChain, NUM / 2);
    unsigned heads[NUM / 2];

    begin(id, 0, features);
    for (unsigned round = 0; round < 20; round++) {
        for (unsigned i = 0; i < NUM / 2; i++) {
            heads[i] = (round + i) % NUM;
            request(heads[i], 1 + i * 300, 1 + i * 200);
            pop();
            g_assert_true(fake_get(0, &chain[i]));
            g_assert_cmpint(memcmp(chain[i].part[0].ptr,
                                   fake_ram(OUT(heads[i]) + 0x10),
                                   1 + i * 300), ==, 0);
            fake_scribble();
        }
        remember();
        for (unsigned n = NUM / 2; n; n--) {
            unsigned i = g_test_rand_int_range(0, n);

            fake_scribble();
            push();
            scribbled_push(&chain[i], heads[i], id == VIRTIO_ID_BLOCK);
            chain[i] = chain[n - 1];
            heads[i] = heads[n - 1];
        }
        g_assert_cmpuint(fake_n_used(0), ==, (round + 1) * NUM / 2);
    }
    g_assert_cmpuint(fake.errors, ==, 0);
    end();
}

static void test_scribble(void)
{
    scribble(VIRTIO_ID_FS, 0);
    scribble(VIRTIO_ID_FS, INDIRECT | EVENT_IDX);
    scribble(VIRTIO_ID_BLOCK, 0);
    scribble(VIRTIO_ID_BLOCK, INDIRECT);
}

/* It breaks the rules by its third answer. */
static void bad(void (*breaks)(const FakeChain *chain), unsigned pushed,
                const char *message)
{
    g_autofree FakeChain *chain = g_new(FakeChain, 4);

    begin(VIRTIO_ID_FS, 0, INDIRECT);
    for (unsigned head = 0; head < 4; head++) {
        request(head, 16, 16);
    }
    pop();
    for (unsigned i = 0; i < 4; i++) {
        g_assert_true(fake_get(0, &chain[i]));
    }
    remember();
    for (unsigned i = 0; i < 2; i++) {
        fake_write(&chain[i], 0x31, 16);
        fake_use(0, chain[i].head, 16);
        expect(IN(i) + 0x20, 0x31, 16);
    }
    breaks(chain);
    push();
    g_assert_true(fake.q[0].broken);
    /* What was right before is the guest's. */
    g_assert_cmpuint(fake_n_used(0), ==, pushed);
    g_assert_cmpuint(fake.vq[0].interrupts, ==, pushed ? 1 : 0);
    if (pushed) {
        assert_ram();
    }
    g_assert_cmpuint(fake.errors, ==, 0);
    fake_main_loop();
    g_assert_cmpuint(fake.errors, ==, 1);
    g_assert_nonnull(strstr(fake.error, message));
    g_assert_nonnull(strstr(fake.error, "fake: queue 0"));

    /* From now on neither side moves it. */
    g_assert_false(vhost_user_relay_queue_can_push(&fake.q[0]));
    request(5, 16, 16);
    g_assert_false(vhost_user_relay_queue_can_pop(&fake.q[0]));
    pop();
    /* Not even if it mends what it did. */
    fake_set_used_idx(0, 2);
    fake_use(0, chain[3].head, 0);
    push();
    fake_main_loop();
    g_assert_cmpuint(fake.errors, ==, 1);
    g_assert_cmpuint(fake_n_used(0), ==, pushed);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 4);
    /*
     * Whoever does that may still write: nothing is used again, although it
     * says that it has begun with nothing more.
     */
    fake_stop(0, fake.q[0].ring.used_idx);
    g_assert_cmpuint(fake.pool.quarantined, >, 0);
    g_assert_cmpuint(fake_free_pages() + fake.pool.quarantined, ==,
                     AREA / FAKE_PAGE);
    fake_free();
}

static void use_twice(const FakeChain *chain)
{
    fake_use(0, chain[1].head, 16);
}

static void use_unknown(const FakeChain *chain)
{
    fake_use(0, NUM - 1, 16);
}

static void use_beyond(const FakeChain *chain)
{
    fake_use(0, UINT32_MAX, 16);
}

static void use_too_many(const FakeChain *chain)
{
    fake_set_used_idx(0, 5);
}

static void test_bad(void)
{
    bad(use_twice, 2, "used it twice");
    bad(use_unknown, 2, "was not given");
    bad(use_beyond, 2, "was not given");
    bad(use_too_many, 0, "more requests than it was given");
}

/* Its answers go to the guest as they come, unless the guest wants order. */
static void test_order(void)
{
    static const unsigned done[] = { 2, 0, 3, 1 };
    static const unsigned at_once[] = { 1, 2, 3, 4 };
    static const unsigned in_turn[] = { 0, 1, 1, 4 };
    static const uint64_t wanted[] = { 0, IN_ORDER, PACKED };
    g_autofree FakeChain *chain = g_new(FakeChain, 4);

    for (unsigned w = 0; w < ARRAY_SIZE(wanted); w++) {
        begin(VIRTIO_ID_FS, wanted[w], INDIRECT);
        for (unsigned i = 0; i < 4; i++) {
            request(7 - i, 16, 16);
        }
        pop();
        remember();
        for (unsigned i = 0; i < 4; i++) {
            g_assert_true(fake_get(0, &chain[i]));
        }
        for (unsigned i = 0; i < 4; i++) {
            fake_write(&chain[done[i]], 0x40 + done[i], 16);
            fake_use(0, chain[done[i]].head, 4 + done[i]);
            push();
            g_assert_cmpuint(fake_n_used(0), ==,
                             w ? in_turn[i] : at_once[i]);
        }
        for (unsigned i = 0; i < 4; i++) {
            unsigned of = w ? i : done[i];

            assert_used(i, 7 - of, 4 + of);
            expect(IN(7 - of) + 0x20, 0x40 + of, 4 + of);
        }
        assert_ram();
        end();
    }
}

/* Who is told, how often, and by what. */
static void test_notify(void)
{
    VhostUserRelayQueue *q;
    EventNotifier masked;
    FakeChain *chain = g_new(FakeChain, 1);

    event_notifier_init(&masked, 0);
    begin(VIRTIO_ID_FS, 0, 0);
    q = &fake.q[0];
    for (unsigned round = 0; round < 3; round++) {
        vhost_user_relay_queue_set_call(
            q, round == 0 ? event_notifier_get_wfd(&fake.vq[0].guest) :
               round == 1 ? event_notifier_get_wfd(&masked) : -1, false);
        for (unsigned head = 0; head < 3; head++) {
            request(head, 8, 8);
        }
        pop();
        g_assert_true(event_notifier_test_and_clear(&q->kick));
        push();
        while (fake_get(0, chain)) {
            fake_use(0, chain->head, 8);
        }
        push();
        push();
        /* Three at a time, once. */
        g_assert_cmpuint(fake_n_used(0), ==, 3 * (round + 1));
        g_assert_cmpuint(fake.vq[0].interrupts, ==, 1);
        g_assert_cmpint(event_notifier_test_and_clear(&masked), ==,
                        round == 1);
        g_assert_false(event_notifier_test_and_clear(&q->kick));
    }
    end();
    event_notifier_cleanup(&masked);
    g_free(chain);
}

/* Popping: what the guest and the back end need not say, and whose turn. */
static void test_pop(void)
{
    VhostUserRelayQueue *q;
    VirtQueue *vq;
    uint8_t *used;

    begin(VIRTIO_ID_FS, 0, INDIRECT);
    q = &fake.q[0];
    vq = &fake.vq[0];
    used = (uint8_t *)q->ring.used;
    pop();
    g_assert_true(vq->notification);
    g_assert_false(event_notifier_test_and_clear(&q->kick));

    /* A queue that is not enabled takes nothing. */
    q->enabled = false;
    request(0, 8, 8);
    g_assert_false(vhost_user_relay_queue_can_pop(q));
    pop();
    g_assert_cmpuint(vq->last_avail_idx, ==, 0);
    q->enabled = true;
    g_assert_true(vhost_user_relay_queue_can_pop(q));

    /* Nor does a device that needs a reset, and it does not wait for one. */
    fake.vdev->broken = true;
    g_assert_false(vhost_user_relay_queue_can_pop(q));
    pop();
    g_assert_cmpuint(vq->last_avail_idx, ==, 0);
    fake.vdev->broken = false;

    /* The back end polls. */
    stw_le_p(used, VRING_USED_F_NO_NOTIFY);
    pop();
    g_assert_cmpuint(vq->last_avail_idx, ==, 1);
    g_assert_false(event_notifier_test_and_clear(&q->kick));
    stw_le_p(used, 0);
    g_assert_true(vq->notification);
    g_assert_false(event_notifier_test_and_clear(&vq->host));

    /* A guest that always has more must not have the thread. */
    fake_stop(0, -1);
    fake_reset(0, NUM, 0);
    fake_start(0, NUM, INDIRECT);
    for (unsigned head = 0; head < NUM; head++) {
        request(head, 8, 8);
    }
    pop();
    g_assert_cmpuint(vq->last_avail_idx, ==, NUM);
    g_assert_true(event_notifier_test_and_clear(&q->kick));
    g_assert_true(event_notifier_test_and_clear(&vq->host));
    pop();
    g_assert_false(event_notifier_test_and_clear(&vq->host));
    g_assert_true(vq->notification);
    fake_stop(0, 0);
    fake_free();
}

int main(int argc, char **argv)
{
    fake_main(&argc, &argv);
    g_test_add_func("/vhost-user-relay/queue/round-trip", test_round_trip);
    g_test_add_func("/vhost-user-relay/queue/table", test_table);
    g_test_add_func("/vhost-user-relay/queue/length", test_length);
    g_test_add_func("/vhost-user-relay/queue/prefill", test_prefill);
    g_test_add_func("/vhost-user-relay/queue/disk", test_disk);
    g_test_add_func("/vhost-user-relay/queue/cleared", test_cleared);
    g_test_add_func("/vhost-user-relay/queue/scribble", test_scribble);
    g_test_add_func("/vhost-user-relay/queue/bad", test_bad);
    g_test_add_func("/vhost-user-relay/queue/order", test_order);
    g_test_add_func("/vhost-user-relay/queue/notify", test_notify);
    g_test_add_func("/vhost-user-relay/queue/pop", test_pop);
    return g_test_run();
}
