/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay for vhost-user: a back end that does anything
 *
 * Requests at random, and a back end that at random does what it should, or
 * lies, or writes all over the area, in half of the rounds from a thread of
 * its own at the same time.  After each step:
 *
 *   - of the guest's memory nothing has changed but what a request that came
 *     back allowed, and no more of it than the length that the guest is told
 *   - each request is with the back end, held, or came back, once
 *   - nobody waits for what is there, or for what will never come
 *   - a queue is broken only if the back end has lied, or by the request
 *   - a queue that stops puts back what is left in the guest's order
 *
 * It goes on for VHOST_USER_RELAY_FUZZ_SECONDS.  If it fails it names the seed
 * of the round: VHOST_USER_RELAY_FUZZ_SEED begins with that.  A round with a
 * thread cannot be had again to the letter.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "standard-headers/linux/virtio_ids.h"
#include "vhost-user-relay-fake.h"

#define QUEUES 3
#define STEPS 1500
#define MAX_NUM 64
#define PARTS 10

/* What the device reads lies below, what it writes above. */
#define OUT_BASE FAKE_DATA
#define IN_BASE (FAKE_RAM + FAKE_RAM_BYTES / 2)
#define DATA_PAGES 100

typedef struct Queue {
    /* Requests that the guest has offered, by head; NULL: it has it. */
    FakeRequest *offered[MAX_NUM];
    unsigned n_seen;              /* of what came back */
    /* Heads that the back end knows, as it got them. */
    uint16_t heads[MAX_NUM];
    unsigned n_heads;
    unsigned pending;             /* used, and not looked at yet */
    bool lied;
} Queue;

static Queue queues[QUEUES];
static uint8_t shadow[FAKE_RAM_BYTES];
static uint64_t seed;
static bool racing;
static struct {
    uint64_t steps, rounds, pushed, unpopped, broken, waited;
} figures;

/* The thread of the back end */

static QemuThread racer;
static int racer_stop;                           /* atomic */

static bool is_ring(uint64_t page)
{
    for (unsigned i = 0; i < QUEUES; i++) {
        unsigned at = qatomic_read(&fake.q[i].ring_page);

        if (page >= at && page < at + 2) {
            return true;
        }
    }
    return false;
}

static void *race(void *opaque)
{
    uint64_t pages = vhost_user_relay_area_size(fake.pool.area) / FAKE_PAGE;
    uint8_t *area = vhost_user_relay_area_ptr(fake.pool.area, 0);
    uint64_t x = seed;

    while (!qatomic_read(&racer_stop)) {
        uint64_t page;

        x = x * 6364136223846793005ULL + 1442695040888963407ULL;
        page = (x >> 33) % pages;
        /* Rings seldom: or nothing would ever get further. */
        if (!is_ring(page) || !(x >> 10 & 0xfffff)) {
            qatomic_set((uint32_t *)(area + page * FAKE_PAGE) +
                        (x >> 50 & 1023), (uint32_t)(x >> 11));
        }
    }
    return NULL;
}

/* The guest */

static void random_parts(FakeRequest *r, unsigned num)
{
    unsigned n = 1 + fake_random(MIN(num, PARTS));
    unsigned n_in = fake_random(6) ? fake_random(n) : n, n_out = n - n_in;

    for (unsigned i = 0; i < n_out + n_in; i++) {
        bool pages = fake_random(2);
        hwaddr at = (hwaddr)fake_random(DATA_PAGES) * FAKE_PAGE;
        uint32_t len = (1 + fake_random(fake_random(30) ? 2 : 24)) * FAKE_PAGE;

        if (!pages) {
            at += fake_random(FAKE_PAGE);
            len = 1 + fake_random(3 * FAKE_PAGE);
        }
        (i < n_out ? fake_out : fake_in)(r, (i < n_out ? OUT_BASE : IN_BASE) +
                                         at, len);
    }
}

static void offer(unsigned i)
{
    unsigned head = fake_random(fake.vq[i].num);
    hwaddr ring = i * FAKE_PAGE;

    if (queues[i].offered[head]) {
        return;
    }
    queues[i].offered[head] = g_new0(FakeRequest, 1);
    random_parts(queues[i].offered[head], fake.vq[i].num);
    *fake_request(i, head) = *queues[i].offered[head];
    fake_offer(i, head);
    memcpy(shadow + ring, fake.ram + ring, FAKE_PAGE);
}

static void allow(unsigned q, const FakeRequest *r, uint32_t len)
{
    uint64_t left = 0;

    for (unsigned i = r->n_out; i < r->n_out + r->n_in; i++) {
        left += r->part[i].len;
    }
    g_assert_cmpuint(len, <=, left);
    left = vhost_user_relay_request_stores(fake.q[q].initial) ? left : len;
    for (unsigned i = r->n_out; i < r->n_out + r->n_in; i++) {
        uint32_t n = MIN(left, r->part[i].len);
        hwaddr at = r->part[i].addr - FAKE_RAM;

        memcpy(shadow + at, fake.ram + at, n);
        left -= n;
    }
}

/* What came back, and what that allows. */
static void see(unsigned i)
{
    Queue *m = &queues[i];

    while (m->n_seen < fake_n_used(i)) {
        FakeUsed used = fake_used(i, m->n_seen++);

        g_assert_nonnull(m->offered[used.head]);
        allow(i, m->offered[used.head], used.len);
        g_clear_pointer(&m->offered[used.head], g_free);
        figures.pushed++;
    }
}

/* The back end */

static void assert_copied(const FakeChain *chain, const FakeRequest *r)
{
    unsigned p = 0;
    uint64_t in_part = 0;

    for (unsigned i = 0; i < r->n_out + r->n_in; i++) {
        g_assert_cmpuint(p, <, chain->n);
        g_assert_cmpint(chain->part[p].write, ==, i >= r->n_out);
        g_assert_cmpuint((uintptr_t)(chain->part[p].ptr + in_part) % FAKE_PAGE,
                         ==, r->part[i].addr % FAKE_PAGE);
        if (i < r->n_out) {
            g_assert_cmpint(memcmp(chain->part[p].ptr + in_part,
                                   fake_ram(r->part[i].addr),
                                   r->part[i].len), ==, 0);
        }
        in_part += r->part[i].len;
        g_assert_cmpuint(in_part, <=, chain->part[p].len);
        if (in_part == chain->part[p].len) {
            in_part = 0;
            p++;
        }
    }
    g_assert_cmpuint(p, ==, chain->n);
}

/* It takes all that was added; nothing has been written there since. */
static void get_all(unsigned i)
{
    static FakeChain chain;
    Queue *m = &queues[i];
    VhostUserRelayQueue *q = &fake.q[i];

    while (fake.be[i].avail_idx != q->ring.avail_idx) {
        VhostUserRelayRequest *r;

        if (racing) {
            unsigned slot = fake.be[i].avail_idx++ % fake.be[i].num;

            chain.head = lduw_le_p(&q->ring.avail->ring[slot]);
        } else {
            g_assert_true(fake_get(i, &chain));
            r = q->by_head[chain.head];
            assert_copied(&chain, m->offered[r->elem.index]);
        }
        m->heads[m->n_heads++ % MAX_NUM] = chain.head;
        m->n_heads = MIN(m->n_heads, MAX_NUM);
    }
}

static void use_one(unsigned i)
{
    Queue *m = &queues[i];
    unsigned at;

    if (!fake.be[i].started || !m->n_heads) {
        return;
    }
    at = fake_random(m->n_heads);
    fake_use(i, m->heads[at],
             fake_random(2) ? fake_random(5000) : fake_random(UINT32_MAX));
    m->heads[at] = m->heads[--m->n_heads];
    m->pending++;
}

static void lie(unsigned i)
{
    queues[i].lied = true;
    switch (fake_random(4)) {
    case 0:
        fake_use(i, fake_random(fake.be[i].num), fake_random(UINT32_MAX));
        break;
    case 1:
        fake_use(i, fake_random(UINT32_MAX), 0);
        break;
    case 2:
        fake_set_used_idx(i, fake_random(65536));
        break;
    case 3:
        fake_set_used_idx(i, fake.be[i].used_idx + fake_random(5) - 2);
        break;
    }
}

static void push(unsigned i)
{
    vhost_user_relay_queue_push(&fake.q[i]);
    queues[i].pending = 0;
    /* Others may have been given what had to wait. */
    for (unsigned j = 0; j < QUEUES; j++) {
        if (fake.be[j].started) {
            get_all(j);
        }
    }
}

static void scribble(void)
{
    for (unsigned i = 0; i < QUEUES; i++) {
        if (queues[i].pending && fake_random(8)) {
            push(i);
        }
        queues[i].lied |= queues[i].pending > 0;
    }
    fake_scribble();
}

static void poke(void)
{
    uint64_t size = vhost_user_relay_area_size(fake.pool.area);

    for (unsigned i = 0; i < QUEUES; i++) {
        queues[i].lied = true;
    }
    for (unsigned n = fake_random(100); n; n--) {
        uint8_t *p = vhost_user_relay_area_ptr(fake.pool.area, 0);

        p[fake_random(size)] = fake_random(256);
    }
}

/* While a queue stops.  All but a moment of the time that it waits is over. */
static int64_t jumping_clock(void)
{
    static int64_t now;

    use_one(fake_random(QUEUES));
    return now += VHOST_USER_RELAY_DRAIN_LEAST_MS * 1000 - 1000;
}

/* Steps */

static bool start(unsigned i)
{
    static const uint64_t features[] = {
        0, 1ULL << VIRTIO_RING_F_INDIRECT_DESC,
        1ULL << VIRTIO_RING_F_EVENT_IDX,
        1ULL << VIRTIO_RING_F_INDIRECT_DESC | 1ULL << VIRTIO_RING_F_EVENT_IDX,
    };
    unsigned num = fake.vq[i].num;

    /* The area may be full, of what may be written to late. */
    if (!vhost_user_relay_queue_start(&fake.q[i], num,
                                      features[fake_random(4)], NULL)) {
        return false;
    }
    fake.q[i].enabled = true;
    fake.be[i] = (FakeBackend) { .started = true, .num = num };
    queues[i].n_heads = queues[i].pending = 0;
    queues[i].lied = racing;
    return true;
}

static int random_taken(unsigned i)
{
    switch (fake_random(4)) {
    case 0:
        return fake.be[i].used_idx;
    case 1:
        return fake.q[i].ring.avail_idx;
    case 2:
        return fake_random(65536);
    default:
        return -1;
    }
}

static bool came_back(unsigned i, unsigned from, unsigned head)
{
    while (from < fake_n_used(i) && fake_used(i, from).head != head) {
        from++;
    }
    return from < fake_n_used(i);
}

static void stop(unsigned i)
{
    VirtQueue *vq = &fake.vq[i];
    g_autofree unsigned *popped = g_memdup2(vq->popped->data,
                                            vq->popped->len *
                                            sizeof(unsigned));
    unsigned n = vq->popped->len, from = fake_n_used(i);
    hwaddr ring = i * FAKE_PAGE;
    uint16_t idx;

    figures.broken += fake.q[i].broken;
    fake_drain(i, fake_random(2));
    fake_stop(i, random_taken(i));
    idx = vq->last_avail_idx;
    for (unsigned j = 0; j < n; j++) {
        if (!came_back(i, from, popped[j])) {
            g_assert_cmpuint(fake_avail(i, idx), ==, popped[j]);
            idx++;
            figures.unpopped++;
        }
    }
    g_assert_cmpuint(vq->popped->len, ==, 0);
    g_assert_cmpuint(vq->inuse, ==, 0);
    memcpy(shadow + ring, fake.ram + ring, FAKE_PAGE);
}

/* False if too much may be written to late: then there is another area. */
static bool restart(unsigned i)
{
    stop(i);
    return start(i) && fake.pool.quarantined * FAKE_PAGE <
                       vhost_user_relay_area_size(fake.pool.area) / 3;
}

/* False if it cannot go on. */
static bool step(unsigned i)
{
    if (fake.q[i].broken && !fake_random(8)) {
        /* The guest resets it. */
        return restart(i);
    }
    switch (fake_random(racing ? 70 : 76)) {
    case 0 ... 24:
        offer(i);
        break;
    case 25 ... 39:
        vhost_user_relay_queue_pop(&fake.q[i]);
        break;
    case 40 ... 59:
        use_one(i);
        break;
    case 60 ... 66:
        push(i);
        break;
    case 67:
        fake.q[i].enabled = fake_random(4);
        vhost_user_relay_queue_pop(&fake.q[i]);
        break;
    case 68:
        vhost_user_relay_area_shrink(fake.pool.area);
        break;
    case 69:
        if (fake_random(3)) {
            break;
        }
        return restart(i);
    case 70:
        if (!fake_random(4)) {
            lie(i);
        }
        break;
    case 71:
        if (!fake_random(20)) {
            poke();
        }
        break;
    case 72:
        fake.hole = fake_random(8) ? 0 :
                    OUT_BASE + fake_random(DATA_PAGES) * FAKE_PAGE;
        break;
    default:
        scribble();
        break;
    }
    return true;
}

/* Every request is where it should be. */
static unsigned count(unsigned i)
{
    VhostUserRelayQueue *q = &fake.q[i];
    VhostUserRelayRequest *r;
    unsigned n = 0, in_flight = 0, fillers = 0;

    QTAILQ_FOREACH(r, &q->requests, next) {
        n++;
        if (vhost_user_relay_request_is_filler(r)) {
            fillers += r->pages;
        } else {
            in_flight++;
        }
    }
    g_assert_cmpuint(fillers, ==, q->filler_pages);
    g_assert_cmpuint(n + !!q->held, ==, fake.vq[i].popped->len);
    g_assert_true(!q->waits || q->held);
    if (q->broken && !queues[i].lied) {
        /* Then it is the request's fault. */
        g_assert_nonnull(q->held);
    }
    if (q->held && !q->waits && !q->broken && q->enabled) {
        /* What it waits for is its own to give. */
        g_assert_cmpuint(n, >, 0);
    }
    return in_flight;
}

/* The first of those who wait has no reason not to be served. */
static void assert_waits_rightly(void)
{
    static VhostUserRelayLayout layout;
    VhostUserRelayQueue *q = QTAILQ_FIRST(&fake.pool.waiters);
    unsigned first, pages;

    if (!q) {
        return;
    }
    figures.waited++;
    g_assert_false(q->broken);
    g_assert_cmpuint(fake.pool.in_flight, >, 0);
    pages = vhost_user_relay_request_lay_out(q->held, &layout, q->indirect);
    g_assert_false(vhost_user_relay_area_alloc(fake.pool.area, pages, &first));
}

static void check(unsigned n_step)
{
    unsigned in_flight = 0;

    for (unsigned i = 0; i < QUEUES; i++) {
        if (fake.be[i].started) {
            get_all(i);
            in_flight += count(i);
        }
        see(i);
    }
    g_assert_cmpuint(in_flight, ==, fake.pool.in_flight);
    assert_waits_rightly();
    if (!(n_step % 64)) {
        fake_main_loop();
        g_assert_cmpint(memcmp(shadow, fake.ram, FAKE_RAM_BYTES), ==, 0);
    }
}

static void begin_round(void)
{
    static const uint16_t ids[] = { VIRTIO_ID_FS, VIRTIO_ID_BLOCK };
    static const uint64_t guest[] = {
        0, 0, 1ULL << VIRTIO_F_IN_ORDER, 1ULL << VIRTIO_F_RING_PACKED,
    };

    fake_seed(seed);
    racing = fake_random(2);
    fake_new((100 + fake_random(300)) * FAKE_PAGE, ids[fake_random(2)],
             guest[fake_random(4)]);
    fake.clock = jumping_clock;
    /* That lengths are cut need not be said each time. */
    fake.pool.clamped = true;
    for (unsigned i = 0; i < QUEUES; i++) {
        queues[i] = (Queue) { .n_seen = 0 };
        fake_reset(i, 1 << fake_random(7), fake_random(65536));
        g_assert_true(start(i));
    }
    memcpy(shadow, fake.ram, FAKE_RAM_BYTES);
    if (racing) {
        qatomic_set(&racer_stop, 0);
        qemu_thread_create(&racer, "racer", race, NULL, QEMU_THREAD_JOINABLE);
    }
}

static void end_round(void)
{
    if (racing) {
        qatomic_set(&racer_stop, 1);
        qemu_thread_join(&racer);
    }
    for (unsigned i = 0; i < QUEUES; i++) {
        if (fake.be[i].started) {
            stop(i);
        }
        see(i);
    }
    fake_main_loop();
    g_assert_cmpint(memcmp(shadow, fake.ram, FAKE_RAM_BYTES), ==, 0);
    g_assert_cmpuint(fake_free_pages() + fake.pool.quarantined, ==,
                     vhost_user_relay_area_size(fake.pool.area) / FAKE_PAGE);
    for (unsigned i = 0; i < QUEUES; i++) {
        for (unsigned head = 0; head < MAX_NUM; head++) {
            g_free(queues[i].offered[head]);
        }
    }
    fake_free();
}

static void one_round(void)
{
    bool goes_on = true;

    begin_round();
    for (unsigned n = 0; n < STEPS && goes_on; n++) {
        goes_on = step(fake_random(QUEUES));
        check(n);
        figures.steps++;
    }
    end_round();
    figures.rounds++;
}

static void say_seed(int sig)
{
    dprintf(STDERR_FILENO, "test-vhost-user-relay-fuzz: "
            "VHOST_USER_RELAY_FUZZ_SEED=%" PRIu64 "%s\n", seed,
            racing ? " (with a thread)" : "");
}

static void test_fuzz(void)
{
    const char *seconds = getenv("VHOST_USER_RELAY_FUZZ_SECONDS");
    const char *from = getenv("VHOST_USER_RELAY_FUZZ_SEED");
    struct sigaction act = { .sa_handler = say_seed, .sa_flags = SA_RESETHAND };
    int64_t end = get_clock() + (seconds ? atoi(seconds) : 2) *
                  NANOSECONDS_PER_SECOND;

    seed = get_clock_realtime();
    if (from) {
        g_assert_cmpint(qemu_strtou64(from, NULL, 10, &seed), ==, 0);
    }
    g_test_message("seed %" PRIu64, seed);
    sigaction(SIGABRT, &act, NULL);
    do {
        one_round();
        seed++;
    } while (get_clock() < end);
    g_test_message("%" PRIu64 " rounds, %" PRIu64 " steps, %" PRIu64
                   " requests came back, %" PRIu64 " were put back, %" PRIu64
                   " queues broke, %" PRIu64 " steps with a queue that waited",
                   figures.rounds, figures.steps, figures.pushed,
                   figures.unpopped, figures.broken, figures.waited);
    g_assert_cmpuint(figures.pushed, >, figures.rounds);
    if (figures.rounds > 20) {
        g_assert_cmpuint(figures.unpopped, >, 0);
        g_assert_cmpuint(figures.broken, >, 0);
        g_assert_cmpuint(figures.waited, >, 0);
    }
}

int main(int argc, char **argv)
{
    fake_main(&argc, &argv);
    g_test_add_func("/vhost-user-relay/fuzz", test_fuzz);
    return g_test_run();
}
