/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: a queue that stops
 *
 * What the back end has not done is the guest's again, in the order in which
 * the guest gave it; what the back end may still write to is not used again.
 * The clock is the test's: each time that the relay looks at it, the back end
 * may do something.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "standard-headers/linux/virtio_ids.h"
#include "vhost-user-relay-fake.h"

#define NUM 16
#define AREA (1u << 20)
#define PAGES (AREA / FAKE_PAGE)
#define INDIRECT (1ULL << VIRTIO_RING_F_INDIRECT_DESC)
#define IN_ORDER (1ULL << VIRTIO_F_IN_ORDER)
#define PACKED (1ULL << VIRTIO_F_RING_PACKED)
#define NEVER 1000

/* Heads, as the guest gives them. */
static const unsigned given[] = { 5, 1, 7, 0, 12, 3, 15, 2 };

static FakeChain chains[ARRAY_SIZE(given)];
static unsigned n_chains;
static unsigned clock_reads;
static int64_t clock_us;

static void begin(uint64_t guest, uint64_t features, uint16_t idx)
{
    fake_new(AREA, VIRTIO_ID_FS, guest);
    fake_reset(0, NUM, idx);
    fake_start(0, NUM, features);
    n_chains = 0;
    clock_reads = 0;
    clock_us = 1000000;
}

static void pop(void)
{
    vhost_user_relay_queue_pop(&fake.q[0]);
    while (n_chains < ARRAY_SIZE(given) && fake_get(0, &chains[n_chains])) {
        n_chains++;
    }
}

static void push(void)
{
    vhost_user_relay_queue_push(&fake.q[0]);
}

/* A request whose first byte says which it is. */
static void request(unsigned head, unsigned pages)
{
    FakeRequest *r = fake_request(0, head);
    hwaddr at = FAKE_DATA + head * 50 * FAKE_PAGE;

    *fake_ram(at) = head;
    fake_out(r, at, pages * FAKE_PAGE);
    fake_in(r, at + 49 * FAKE_PAGE, 100);
    fake_offer(0, head);
}

static void filler(unsigned head)
{
    FakeRequest *r = fake_request(0, head);

    fake_in(r, FAKE_DATA + head * FAKE_PAGE, 100);
    fake_offer(0, head);
}

static void give_all(void)
{
    for (unsigned i = 0; i < ARRAY_SIZE(given); i++) {
        request(given[i], 1);
    }
    pop();
    g_assert_cmpuint(n_chains, ==, ARRAY_SIZE(given));
}

static void use(unsigned i)
{
    fake_use(0, chains[i].head, 1);
}

/*
 * Another start finds in the guest's ring what @heads says, and nothing else;
 * and the guest gets all of it, once.
 */
static void assert_comes_again(const unsigned *heads, unsigned n,
                               uint64_t features)
{
    unsigned before = fake_n_used(0);

    n_chains = 0;
    fake_start(0, NUM, features);
    do {
        unsigned from = n_chains;

        pop();
        g_assert_cmpuint(n_chains, >, from);
        for (unsigned i = from; i < n_chains; i++) {
            g_assert_cmpuint(*chains[i].part[0].ptr, ==, heads[i]);
            use(i);
        }
        push();
    } while (fake_n_used(0) < before + n);
    g_assert_cmpuint(n_chains, ==, n);
    g_assert_false(vhost_user_relay_queue_can_pop(&fake.q[0]));
    for (unsigned i = 0; i < n; i++) {
        g_assert_cmpuint(fake_used(0, before + i).head, ==, heads[i]);
    }
    fake_stop(0, fake.be[0].used_idx);
}

static void end(unsigned quarantined)
{
    g_assert_cmpuint(fake.pool.quarantined, ==, quarantined);
    g_assert_cmpuint(fake_free_pages(), ==, PAGES - quarantined);
    fake_free();
}

/* Some in the middle are done. */
static void unpop(uint16_t idx, uint64_t features)
{
    static const unsigned left[] = { 5, 7, 0, 3, 2 };
    unsigned before[NUM];

    begin(0, features, idx);
    give_all();
    for (unsigned i = 0; i < NUM; i++) {
        before[i] = fake_avail(0, idx + i);
    }
    use(6);
    use(1);
    use(4);
    push();
    g_assert_cmpuint(fake_n_used(0), ==, 3);

    fake_stop(0, 3);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, (uint16_t)(idx + 3));
    g_assert_cmpuint(fake.vq[0].inuse, ==, 0);
    for (unsigned i = 0; i < NUM; i++) {
        unsigned want = i >= 3 && i < 8 ? left[i - 3] : before[i];

        g_assert_cmpuint(fake_avail(0, idx + i), ==, want);
    }
    g_assert_cmpuint(stat64_get(&fake.pool.unpopped), ==, 5);
    assert_comes_again(left, 5, features);
    end(0);
}

static void test_unpop(void)
{
    unpop(0, 0);
    unpop(0, INDIRECT);
    unpop(11, INDIRECT);
    /* Across the end of the index, and of the ring. */
    for (unsigned idx = 65520; idx < 65536; idx++) {
        unpop(idx, INDIRECT);
    }
}

/* None is done, or all. */
static void test_unpop_all(void)
{
    begin(0, INDIRECT, 65530);
    give_all();
    fake_stop(0, 0);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 65530);
    assert_comes_again(given, 8, INDIRECT);
    end(0);

    begin(0, INDIRECT, 7);
    give_all();
    for (unsigned i = 0; i < 8; i++) {
        use(7 - i);
    }
    /* It takes what is used, itself. */
    fake_stop(0, 8);
    g_assert_cmpuint(fake_n_used(0), ==, 8);
    g_assert_cmpuint(fake.vq[0].interrupts, ==, 1);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 15);
    end(0);
}

/* The last one that was popped had found no room: it comes last again. */
static void test_unpop_held(void)
{
    static const unsigned left[] = { 5, 1, 0, 12, 3, 15, 2 };

    begin(0, INDIRECT, 65533);
    for (unsigned i = 0; i < 8; i++) {
        request(given[i], 45);
    }
    pop();
    g_assert_cmpuint(n_chains, ==, 5);
    g_assert_true(fake.q[0].held && fake.q[0].waits);
    use(2);
    push();
    pop();
    g_assert_cmpuint(n_chains, ==, 6);
    g_assert_true(fake.q[0].held);

    fake_stop(0, 1);
    g_assert_true(QTAILQ_EMPTY(&fake.pool.waiters));
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, (uint16_t)(65533 + 1));
    assert_comes_again(left, 7, INDIRECT);
    end(0);
}

/* The guest wants order: what was done out of turn was not pushed. */
static void test_unpop_ordered(void)
{
    static const uint64_t wanted[] = { IN_ORDER, PACKED, IN_ORDER | PACKED };
    g_autofree uint8_t *before = g_malloc(FAKE_DATA - FAKE_RAM);

    for (unsigned w = 0; w < ARRAY_SIZE(wanted); w++) {
        begin(wanted[w], INDIRECT, 65531);
        give_all();
        use(0);
        use(2);
        use(3);
        use(1);
        use(6);
        push();
        g_assert_cmpuint(fake_n_used(0), ==, 4);
        memcpy(before, fake.ram, FAKE_DATA - FAKE_RAM);
        fake_stop(0, 5);
        g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 65535);
        g_assert_cmpuint(fake.vq[0].inuse, ==, 0);
        /* Nothing is written there: a packed ring has no such place. */
        g_assert_cmpint(memcmp(before, fake.ram, FAKE_DATA - FAKE_RAM), ==, 0);
        assert_comes_again(given + 4, 4, INDIRECT);
        end(0);
    }
}

/* The guest has taken its ring away. */
static void test_unpop_fails(void)
{
    for (unsigned out_of_order = 0; out_of_order < 2; out_of_order++) {
        begin(0, INDIRECT, 0);
        give_all();
        use(out_of_order);
        push();
        fake.read_only = true;
        fake_stop(0, 1);
        fake_main_loop();
        /* It will reset the device, and an error then would stay. */
        g_assert_cmpuint(fake.errors, ==, 0);
        fake_free();
    }
}

/* Each look at the clock is a moment of the back end's. */
static unsigned moments[8];
static unsigned n_moments;
static int64_t step_us;

static int64_t back_end_clock(void)
{
    unsigned now = clock_reads++;

    if (now < n_moments && moments[now] != NEVER) {
        use(moments[now]);
        event_notifier_set(&fake.q[0].call);
    }
    if (now) {
        clock_us += step_us;
    }
    return clock_us;
}

static void at_moments(int64_t step, unsigned n, ...)
{
    va_list ap;

    va_start(ap, n);
    for (unsigned i = 0; i < n; i++) {
        moments[i] = va_arg(ap, unsigned);
    }
    va_end(ap);
    n_moments = n;
    step_us = step;
    fake.clock = back_end_clock;
}

/* It is let do all that it has, and nothing more is taken from the guest. */
static void test_drain(void)
{
    begin(0, INDIRECT, 0);
    give_all();
    request(4, 1);
    use(1);
    at_moments(1000, 7, 4, 0, 2, 7, 3, 5, 6);
    fake_drain(0, 10000);
    g_assert_cmpuint(fake_n_used(0), ==, 8);
    g_assert_cmpuint(clock_reads, ==, 7);
    fake_stop(0, 8);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 8);
    fake.clock = NULL;
    assert_comes_again((unsigned[]) { 4 }, 1, INDIRECT);
    end(0);
}

/* The time is that of all queues, but each has a little of its own. */
static void test_drain_together(void)
{
    begin(0, INDIRECT, 0);
    give_all();
    at_moments(600000, 0);
    fake_drain(0, 1000);
    g_assert_cmpuint(clock_reads, ==, 3);
    fake_drain(0, 1000);
    g_assert_cmpuint(clock_reads, ==, 5);
    fake.clock = NULL;
    fake_stop(0, 0);
    end(0);
}

/*
 * It never does what it has begun with.  Its late writes harm nobody: the
 * pages are not used again, nor is the ring.
 */
static void test_too_late(void)
{
    unsigned ring, quarantined;

    begin(0, INDIRECT, 0);
    give_all();
    use(1);
    at_moments(600000, 0);
    fake_drain(0, 1000);
    /* For so long it was waited for, and no longer. */
    g_assert_cmpuint(clock_reads, ==, 3);
    fake.clock = NULL;
    fake_stop(0, 3);
    g_assert_cmpuint(fake_n_used(0), ==, 1);
    /* Which two it was nobody knows: table, one page out and one in; 7. */
    quarantined = fake.pool.quarantined;
    g_assert_cmpuint(quarantined, ==, 7 * 3 + fake.q[0].ring_pages);
    g_assert_cmpuint(fake_free_pages(), ==, PAGES - quarantined);

    ring = fake.q[0].ring_page;
    for (unsigned i = 0; i < n_chains; i++) {
        memset(chains[i].part[0].ptr, 0xbd, FAKE_PAGE);
        memset(chains[i].part[1].ptr, 0xbd, 100);
    }
    memset(vhost_user_relay_area_ptr(fake.pool.area, ring), 0xff, FAKE_PAGE);
    assert_comes_again((unsigned[]) { 5, 7, 0, 12, 3, 15, 2 }, 7, INDIRECT);
    g_assert_cmpuint(fake.q[0].ring_page, !=, ring);
    end(quarantined);
}

/* @taken is answered: are the pages free after it? */
static void stop_with(int taken, bool quarantines)
{
    begin(0, INDIRECT, 0);
    give_all();
    use(0);
    use(1);
    fake_stop(0, taken);
    g_assert_cmpint(!!fake.pool.quarantined, ==, quarantines);
    g_assert_cmpuint(fake_n_used(0), ==, 2);
    end(fake.pool.quarantined);
}

static void test_taken(void)
{
    stop_with(-1, true);
    stop_with(2, false);
    stop_with(3, true);
    stop_with(8, true);
    /* More than it was given; less than it has done. */
    stop_with(9, true);
    stop_with(30000, true);
    stop_with(1, false);
    stop_with(0, false);
    stop_with(65535, false);
}

/* What may stay with it for ever is not waited for. */
static void test_fillers(void)
{
    begin(0, INDIRECT, 0);
    for (unsigned i = 0; i < 4; i++) {
        filler(i);
    }
    pop();
    at_moments(600000, 0);
    fake_drain(0, 1000);
    g_assert_cmpuint(clock_reads, ==, 1);
    fake_stop(0, 4);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 0);
    end(4 + 1);
}

/* While it is waited for it breaks the rules. */
static void test_late_and_bad(void)
{
    begin(0, INDIRECT, 0);
    give_all();
    use(0);
    at_moments(1000, 2, NEVER, 0);
    fake_drain(0, 10000);
    g_assert_cmpuint(clock_reads, ==, 2);
    fake_main_loop();
    g_assert_cmpuint(fake.errors, ==, 1);
    fake_stop(0, 8);
    g_assert_cmpuint(fake.vq[0].last_avail_idx, ==, 1);
    g_assert_cmpuint(fake.pool.quarantined, ==, 7 * 3 + 1);
    end(fake.pool.quarantined);
}

/* What is said of it when it was reset meanwhile would break its new life. */
static void test_bad_at_stop(void)
{
    begin(0, INDIRECT, 0);
    give_all();
    use(0);
    use(0);
    fake_stop(0, 8);
    fake_main_loop();
    g_assert_cmpuint(fake.errors, ==, 0);
    end(fake.pool.quarantined);
}

/*
 * The guest says that its rings are elsewhere, in registers of this device
 * perhaps: nothing is pushed there, by whatever way.
 */
static void test_moved(void)
{
    for (unsigned way = 0; way < 4; way++) {
        begin(0, INDIRECT, 0);
        give_all();
        use(0);
        fake.moved = FAKE_PAGE;
        if (way == 0) {
            vhost_user_relay_queue_pop(&fake.q[0]);
        } else if (way == 1) {
            push();
        } else if (way == 2) {
            fake_drain(0, 10000);
        }
        g_assert_cmpint(fake.q[0].broken, ==, way < 3);
        fake_main_loop();
        g_assert_cmpuint(fake.errors, ==, way < 3);
        fake_stop(0, 8);
        g_assert_cmpuint(fake_n_used(0), ==, 0);
        g_assert_cmpuint(fake.vq[0].inuse, ==, 0);
        fake_main_loop();
        g_assert_cmpuint(fake.errors, ==, way < 3);
        end(fake.pool.quarantined);
    }
}

/* There is no room for a ring: it is said, and nothing is taken. */
static void test_start_fails(void)
{
    Error *err = NULL;
    unsigned first;

    fake_new(AREA, VIRTIO_ID_FS, 0);
    fake_reset(0, NUM, 0);
    g_assert_true(vhost_user_relay_area_alloc(fake.pool.area, PAGES, &first));
    g_assert_false(vhost_user_relay_queue_start(&fake.q[0], NUM, 0, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "relay-size"));
    error_free(err);
    vhost_user_relay_area_release(fake.pool.area, 0, PAGES);
    end(0);
}

int main(int argc, char **argv)
{
    fake_main(&argc, &argv);
    g_test_add_func("/vhost-user-relay/stop/unpop", test_unpop);
    g_test_add_func("/vhost-user-relay/stop/unpop-all", test_unpop_all);
    g_test_add_func("/vhost-user-relay/stop/unpop-held", test_unpop_held);
    g_test_add_func("/vhost-user-relay/stop/unpop-ordered",
                    test_unpop_ordered);
    g_test_add_func("/vhost-user-relay/stop/unpop-fails", test_unpop_fails);
    g_test_add_func("/vhost-user-relay/stop/drain", test_drain);
    g_test_add_func("/vhost-user-relay/stop/drain-together",
                    test_drain_together);
    g_test_add_func("/vhost-user-relay/stop/bad-at-stop", test_bad_at_stop);
    g_test_add_func("/vhost-user-relay/stop/too-late", test_too_late);
    g_test_add_func("/vhost-user-relay/stop/taken", test_taken);
    g_test_add_func("/vhost-user-relay/stop/fillers", test_fillers);
    g_test_add_func("/vhost-user-relay/stop/late-and-bad", test_late_and_bad);
    g_test_add_func("/vhost-user-relay/stop/moved", test_moved);
    g_test_add_func("/vhost-user-relay/stop/start-fails", test_start_fails);
    return g_test_run();
}
