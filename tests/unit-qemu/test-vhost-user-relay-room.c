/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: queues that share an area which is too small
 *
 * Who has to wait, who comes next, what is never going to fit, and what
 * happens to the others when one of those who wait breaks.
 */

#include "qemu/osdep.h"
#include "standard-headers/linux/virtio_ids.h"
#include "vhost-user-relay-fake.h"

#define NUM 16
#define AREA (1u << 20)
#define PAGES (AREA / FAKE_PAGE)
/* Each queue's ring takes one. */
#define QUEUES 3
#define ROOM (PAGES - QUEUES)
#define FILLERS VHOST_USER_RELAY_FILLER_PAGES
#define INDIRECT (1ULL << VIRTIO_RING_F_INDIRECT_DESC)

static void begin(unsigned num, uint64_t features)
{
    fake_new(AREA, VIRTIO_ID_FS, 0);
    for (unsigned i = 0; i < QUEUES; i++) {
        fake_start(i, num, features);
    }
    g_assert_cmpuint(fake_free_pages(), ==,
                     PAGES - QUEUES * fake.q[0].ring_pages);
}

static void end(void)
{
    for (unsigned i = 0; i < QUEUES; i++) {
        fake_stop(i, fake.be[i].used_idx);
    }
    g_assert_cmpuint(fake_free_pages() + fake.pool.quarantined, ==, PAGES);
    fake_free();
}

/* A request of queue @i that needs so many pages; its name is its head. */
static void request(unsigned i, unsigned head, unsigned pages)
{
    FakeRequest *r = fake_request(i, head);

    fake_out(r, FAKE_DATA, pages * FAKE_PAGE);
    fake_offer(i, head);
    vhost_user_relay_queue_pop(&fake.q[i]);
}

static void filler(unsigned i, unsigned head, unsigned pages)
{
    FakeRequest *r = fake_request(i, head);

    fake_in(r, FAKE_DATA, pages * FAKE_PAGE);
    fake_offer(i, head);
    vhost_user_relay_queue_pop(&fake.q[i]);
}

/* What the back end has of queue @i since it was last asked: its pages. */
static unsigned gets(unsigned i, uint16_t *head)
{
    g_autofree FakeChain *chain = g_new(FakeChain, 1);
    unsigned bytes = 0;

    if (!fake_get(i, chain)) {
        return 0;
    }
    for (unsigned p = 0; p < chain->n; p++) {
        bytes += chain->part[p].len;
    }
    if (head) {
        *head = chain->head;
    }
    return bytes / FAKE_PAGE;
}

static void use(unsigned i, uint16_t head)
{
    fake_use(i, head, 0);
    vhost_user_relay_queue_push(&fake.q[i]);
}

static uint64_t waits(void)
{
    return stat64_get(&fake.pool.waits);
}

static void assert_error(const char *message)
{
    fake_main_loop();
    g_assert_cmpuint(fake.errors, ==, message ? 1 : 0);
    if (message) {
        g_assert_nonnull(strstr(fake.error, message));
    }
}

/* First come, first served: who needs little does not overtake. */
static void test_fifo(void)
{
    uint16_t head[3];

    begin(NUM, INDIRECT);
    request(0, 0, 200);
    g_assert_cmpuint(gets(0, &head[0]), ==, 200);
    request(1, 0, 100);
    request(2, 0, 10);
    g_assert_cmpuint(gets(1, NULL), ==, 0);
    g_assert_cmpuint(gets(2, NULL), ==, 0);
    g_assert_cmpuint(waits(), ==, 2);
    /* The guest need not kick meanwhile, and if it does it is of no use. */
    g_assert_false(fake.vq[2].notification);
    g_assert_false(vhost_user_relay_queue_can_pop(&fake.q[2]));
    vhost_user_relay_queue_pop(&fake.q[2]);
    request(2, 1, 1);
    g_assert_cmpuint(gets(2, NULL), ==, 0);
    g_assert_cmpuint(waits(), ==, 2);
    event_notifier_test_and_clear(&fake.q[1].kick);
    event_notifier_test_and_clear(&fake.q[2].kick);

    use(0, head[0]);
    g_assert_cmpuint(gets(1, &head[1]), ==, 100);
    g_assert_cmpuint(gets(2, &head[2]), ==, 10);
    g_assert_cmpuint(gets(2, NULL), ==, 1);
    g_assert_true(event_notifier_test_and_clear(&fake.q[1].kick));
    g_assert_true(event_notifier_test_and_clear(&fake.q[2].kick));
    g_assert_true(fake.vq[2].notification);
    g_assert_true(QTAILQ_EMPTY(&fake.pool.waiters));
    end();
}

/* The order of waiting, not that of queues; and each is served in its turn. */
static void test_turns(void)
{
    uint16_t head;

    begin(NUM, INDIRECT);
    request(1, 0, 250);
    gets(1, &head);
    request(2, 0, 250);
    request(0, 0, 250);
    use(1, head);
    g_assert_cmpuint(gets(0, NULL), ==, 0);
    g_assert_cmpuint(gets(2, &head), ==, 250);
    request(1, 1, 250);
    g_assert_cmpuint(gets(1, NULL), ==, 0);
    use(2, head);
    g_assert_cmpuint(gets(1, NULL), ==, 0);
    g_assert_cmpuint(gets(0, &head), ==, 250);
    use(0, head);
    g_assert_cmpuint(gets(1, &head), ==, 250);
    g_assert_cmpuint(waits(), ==, 3);
    end();
}

/* Two queues that are never idle do not keep a third from what it needs. */
static void test_starvation(void)
{
    uint16_t head[2][2], big;

    begin(NUM, INDIRECT);
    for (unsigned i = 0; i < 2; i++) {
        for (unsigned h = 0; h < 2; h++) {
            request(i, h, 60);
            g_assert_cmpuint(gets(i, &head[i][h]), ==, 60);
        }
    }
    request(2, 0, ROOM);
    for (unsigned i = 0; i < 2; i++) {
        for (unsigned h = 0; h < 2; h++) {
            g_assert_cmpuint(gets(2, &big), ==, 0);
            request(i, 2 + h, 60);
            g_assert_cmpuint(gets(i, NULL), ==, 0);
            use(i, head[i][h]);
        }
    }
    g_assert_cmpuint(gets(2, &big), ==, ROOM);
    use(2, big);
    for (unsigned i = 0; i < 2; i++) {
        for (unsigned h = 0; h < 2; h++) {
            g_assert_cmpuint(gets(i, NULL), ==, 60);
        }
    }
    end();
}

/* The first of those who wait stops: it keeps nobody. */
static void test_waiter_stops(void)
{
    begin(NUM, INDIRECT);
    request(0, 0, 100);
    g_assert_cmpuint(gets(0, NULL), ==, 100);
    request(1, 0, 200);
    request(2, 0, 100);
    g_assert_cmpuint(gets(2, NULL), ==, 0);
    fake_stop(1, 0);
    g_assert_cmpuint(fake.vq[1].last_avail_idx, ==, 0);
    g_assert_cmpuint(gets(2, NULL), ==, 100);
    fake_start(1, NUM, INDIRECT);
    end();

    /* Who has what they wait for stops. */
    begin(NUM, INDIRECT);
    request(0, 0, 200);
    request(1, 0, 200);
    request(2, 0, 50);
    fake_stop(0, 0);
    g_assert_cmpuint(gets(1, NULL), ==, 200);
    g_assert_cmpuint(gets(2, NULL), ==, 50);
    fake_start(0, NUM, INDIRECT);
    end();
}

/* The first of those who wait cannot be served: the next one is. */
static void test_waiter_fails(void)
{
    uint16_t head;

    begin(NUM, INDIRECT);
    request(0, 0, 200);
    gets(0, &head);
    request(1, 0, 100);
    request(2, 0, 100);
    fake.hole = FAKE_DATA + 50 * FAKE_PAGE;
    /* That one does not lie in the hole. */
    fake.q[2].held->elem.out_addr[0] += 60 * FAKE_PAGE;
    use(0, head);
    assert_error("queue 1: a request's buffers cannot be read");
    g_assert_cmpuint(gets(1, NULL), ==, 0);
    g_assert_cmpuint(gets(2, NULL), ==, 100);
    fake.hole = 0;
    end();
}

/* The back end breaks the rules on a queue that waits: others go on. */
static void test_waiter_breaks(void)
{
    uint16_t head;

    begin(NUM, INDIRECT);
    request(0, 0, 150);
    gets(0, &head);
    request(1, 0, 10);
    request(1, 1, 200);
    request(2, 0, 80);
    g_assert_cmpuint(gets(2, NULL), ==, 0);
    fake_use(1, NUM, 0);
    vhost_user_relay_queue_push(&fake.q[1]);
    assert_error("queue 1: the vhost-user back end used a request");
    g_assert_cmpuint(gets(2, NULL), ==, 80);
    /* Nor is anything more given to it. */
    g_assert_cmpuint(gets(1, NULL), ==, 10);
    use(0, head);
    g_assert_cmpuint(gets(1, NULL), ==, 0);
    end();
}

/* What fits only beside what may stay for ever does not fit. */
static void test_too_large(void)
{
    uint16_t head;

    begin(NUM, INDIRECT);
    request(0, 0, ROOM);
    g_assert_cmpuint(gets(0, &head), ==, ROOM);
    use(0, head);
    assert_error(NULL);
    request(0, 1, PAGES + 1);
    assert_error("KiB finds no room");
    g_assert_cmpuint(fake_free_pages(), ==, ROOM);
    g_assert_cmpuint(gets(0, NULL), ==, 0);
    end();

    begin(NUM, INDIRECT);
    request(0, 0, ROOM + 1);
    assert_error("make relay-size larger");
    end();

    /* It waits while there is something to wait for. */
    begin(NUM, INDIRECT);
    filler(1, 0, 20);
    request(2, 0, 20);
    gets(2, &head);
    request(0, 0, ROOM - 10);
    assert_error(NULL);
    use(2, head);
    assert_error("KiB finds no room");
    end();

    /* More descriptors than the ring has, and no tables. */
    begin(2, 0);
    {
        FakeRequest *r = fake_request(0, 0);

        for (unsigned i = 0; i < 3; i++) {
            fake_out(r, FAKE_DATA + i * 0x2100, 10);
        }
        fake_offer(0, 0);
        vhost_user_relay_queue_pop(&fake.q[0]);
    }
    assert_error("KiB finds no room");
    g_assert_cmpuint(fake_free_pages(), ==, ROOM);
    end();
}

/* It cannot be read: no page is lost, and the guest is told. */
static void test_unreadable(void)
{
    for (unsigned i = 0; i < 2; i++) {
        fake_new(AREA, i ? VIRTIO_ID_BLOCK : VIRTIO_ID_FS, 0);
        for (unsigned j = 0; j < QUEUES; j++) {
            fake_start(j, NUM, INDIRECT);
        }
        fake.hole = FAKE_DATA + 3 * FAKE_PAGE;
        if (i) {
            filler(0, 0, 5);
        } else {
            /* What is only written to, is not read. */
            filler(1, 0, 5);
            assert_error(NULL);
            request(0, 0, 5);
        }
        assert_error("queue 0: a request's buffers cannot be read");
        g_assert_cmpuint(fake_free_pages(), ==, ROOM - (i ? 0 : 5));
        end();
    }
}

/* Buffers that the guest has put there to receive into. */
static void test_fillers(void)
{
    uint16_t head = -1;

    begin(256, INDIRECT);
    g_assert_cmpuint(fake.q[0].ring_pages, ==, 2);
    /* One of them may be as large as it likes. */
    fake_stop(1, 0);
    fake_stop(2, 0);
    filler(0, 0, FILLERS + 20);
    g_assert_cmpuint(gets(0, &head), ==, FILLERS + 20);
    filler(0, 1, 1);
    g_assert_cmpuint(gets(0, NULL), ==, 0);
    use(0, head);
    g_assert_cmpuint(gets(0, &head), ==, 1);
    use(0, head);

    /* Of small ones, so many; then as many as come back. */
    for (unsigned i = 0; i < FILLERS + 50; i++) {
        filler(0, i, 1);
    }
    for (unsigned i = 0; i < FILLERS; i++) {
        g_assert_cmpuint(gets(0, &head), ==, 1);
    }
    for (unsigned i = 0; i < 50; i++) {
        g_assert_cmpuint(gets(0, NULL), ==, 0);
        g_assert_cmpuint(fake.q[0].filler_pages, ==, FILLERS);
        use(0, head);
        g_assert_cmpuint(gets(0, &head), ==, 1);
    }
    use(0, head);
    g_assert_cmpuint(gets(0, NULL), ==, 0);
    g_assert_cmpuint(fake.q[0].filler_pages, ==, FILLERS - 1);
    /* Nobody waited: that is not for want of pages. */
    g_assert_cmpuint(waits(), ==, 0);
    fake_start(1, NUM, INDIRECT);
    fake_start(2, NUM, INDIRECT);
    end();
}

/* No tables, and a small ring: what does not fit into it is held. */
static void test_ring_full(void)
{
    uint16_t head[2];

    begin(4, 0);
    for (unsigned h = 0; h < 4; h++) {
        FakeRequest *r = fake_request(0, h);

        fake_out(r, FAKE_DATA, FAKE_PAGE);
        fake_out(r, FAKE_DATA + 0x3010, 16);
        fake_offer(0, h);
        vhost_user_relay_queue_pop(&fake.q[0]);
    }
    g_assert_cmpuint(gets(0, &head[0]), ==, 1);
    g_assert_cmpuint(gets(0, &head[1]), ==, 1);
    g_assert_cmpuint(gets(0, NULL), ==, 0);
    g_assert_cmpuint(waits(), ==, 0);
    use(0, head[1]);
    g_assert_cmpuint(gets(0, &head[1]), ==, 1);
    g_assert_cmpuint(gets(0, NULL), ==, 0);
    use(0, head[0]);
    g_assert_cmpuint(gets(0, NULL), ==, 1);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 4);
    end();
}

int main(int argc, char **argv)
{
    fake_main(&argc, &argv);
    g_test_add_func("/vhost-user-relay/room/fifo", test_fifo);
    g_test_add_func("/vhost-user-relay/room/turns", test_turns);
    g_test_add_func("/vhost-user-relay/room/starvation", test_starvation);
    g_test_add_func("/vhost-user-relay/room/waiter-stops", test_waiter_stops);
    g_test_add_func("/vhost-user-relay/room/waiter-fails", test_waiter_fails);
    g_test_add_func("/vhost-user-relay/room/waiter-breaks",
                    test_waiter_breaks);
    g_test_add_func("/vhost-user-relay/room/too-large", test_too_large);
    g_test_add_func("/vhost-user-relay/room/unreadable", test_unreadable);
    g_test_add_func("/vhost-user-relay/room/fillers", test_fillers);
    g_test_add_func("/vhost-user-relay/room/ring-full", test_ring_full);
    return g_test_run();
}
