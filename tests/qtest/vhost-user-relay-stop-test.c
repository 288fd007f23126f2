/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: requests in flight when the device stops
 */

#include "qemu/osdep.h"
#include "relay-vm.h"

typedef struct Kind {
    const char *name, *device, *props, *thread;
    uint64_t features;           /* of the guest, beside VERSION_1 */
    bool mixed;                  /* heads in no order */
    bool often;                  /* tried in every test */
    bool waits;                  /* the back end says what it has taken */
} Kind;

#define INDIRECT VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC)
#define EVENT VUB_BIT(VIRTIO_RING_F_EVENT_IDX)
#define PACKED VUB_BIT(VIRTIO_F_RING_PACKED)
#define IN_ORDER VUB_BIT(VIRTIO_F_IN_ORDER)
#define IO0 ",iothread=io0"

static const Kind kinds[] = {
    { "split", RVM_FS, "", "", INDIRECT },
    { "mixed", RVM_FS, "", "", INDIRECT, true, true },
    { "waits", RVM_FS, "", "", INDIRECT, true, false, true },
    { "chains", RVM_FS, "", "", 0, true },
    { "event-idx", RVM_FS, "", "", INDIRECT | EVENT, true },
    { "packed", RVM_FS, ",packed=on", "", PACKED | INDIRECT, true },
    { "packed-chains", RVM_FS, ",packed=on", "", PACKED, true, true },
    { "in-order", RVM_FS, ",in_order=on", "", IN_ORDER | INDIRECT, false,
      true },
    { "blk", RVM_BLK, "", "", INDIRECT | EVENT, true, true },
    { "iothread", RVM_FS, "", IO0, INDIRECT, true },
    { "iothread-waits", RVM_FS, "", IO0, INDIRECT | EVENT, true, true, true },
    { "iothread-packed", RVM_FS, ",packed=on", IO0, PACKED | EVENT, true,
      true },
    { "iothread-blk", RVM_BLK, "", IO0, INDIRECT, true },
};

/* The guest gets them in the order in which it gave them. */
static bool ordered(const Kind *k)
{
    return k->features & (PACKED | IN_ORDER);
}

typedef struct Machine {
    RelayVm vm;
    const Kind *k;
    unsigned queue;
    VubRing *r;
    unsigned starts;
} Machine;

/* False if the test is to be skipped. */
static bool run(Machine *m, const Kind *k, uint16_t num)
{
    RelayVm *vm = &m->vm;
    static char relay[64];

    if ((ordered(k) || *k->thread) && rvm_skip_plain()) {
        return false;
    }
    rvm_init(vm);
    if (!rvm_plain()) {
        g_snprintf(relay, sizeof(relay), ",relay=on%s", k->thread);
        vm->relay = relay;
    }
    vm->device = k->device;
    vm->props = k->props;
    vm->more = "-object iothread,id=io0";
    vm->wanted = VUB_BIT(VIRTIO_F_VERSION_1) | k->features;
    vm->num = num;
    vm->b->gives_up = !k->waits;
    m->k = k;
    m->queue = 1;
    if (g_str_equal(k->device, RVM_BLK)) {
        vm->b->protocol_features |= VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIG);
        vm->nqueues = 1;
        m->queue = 0;
    }
    rvm_start(vm);
    rvm_drive(vm);
    g_assert_cmphex(vm->features, ==, vm->wanted);
    m->starts = 1;
    m->r = vub_wait_ring(vm->b, m->queue, 1);
    return true;
}

static void stop(Machine *m)
{
    qtest_qmp_assert_success(m->vm.qts, "{ 'execute': 'stop' }");
    g_assert_true(qatomic_read(&m->r->stopped));
}

static void cont(Machine *m)
{
    qtest_qmp_assert_success(m->vm.qts, "{ 'execute': 'cont' }");
    m->r = vub_wait_ring(m->vm.b, m->queue, ++m->starts);
}

static uint16_t send_tag(Machine *m, uint64_t tag)
{
    if (m->k->mixed) {
        m->vm.q[m->queue].high_first = tag * 7 % 3 == 0;
    }
    return rvm_send_tag(&m->vm, m->queue, tag);
}

/* Without a relay it is the back end that would have to know what is left. */
static bool skip_in_flight(void)
{
    return rvm_skip_plain();
}

/*
 * Completed in another order than given; then stopped with the rest in
 * flight.  The rest comes again, each once, in the guest's order.
 */
static void test_in_flight(gconstpointer data)
{
    VubRequest *req[10];
    uint16_t head[10];
    Machine m;
    bool done[10] = { 0 };
    static const unsigned first[] = { 7, 2, 5 };
    unsigned i, n = 0;

    if (skip_in_flight() || !run(&m, data, 32)) {
        return;
    }
    for (i = 0; i < 10; i++) {
        head[i] = send_tag(&m, i);
        req[i] = rvm_expect_tag(m.r, i);
    }
    for (i = 0; i < G_N_ELEMENTS(first); i++) {
        rvm_answer(req[first[i]]);
        if (ordered(m.k)) {
            continue;
        }
        done[first[i]] = true;
        n++;
        rvm_check_answer(&m.vm, m.queue, head[first[i]], first[i]);
    }
    if (ordered(m.k)) {
        /* 0 to 2 are through by this, 5 and 7 have to wait. */
        rvm_answer(req[0]);
        rvm_answer(req[1]);
        for (i = 0; i < 3; i++, n++) {
            done[i] = true;
            rvm_check_answer(&m.vm, m.queue, head[i], i);
        }
    }
    drv_expect_none(&m.vm.q[m.queue]);
    stop(&m);
    drv_expect_none(&m.vm.q[m.queue]);
    g_assert_cmpint(rvm_relay_figure(&m.vm, "unpopped"), ==, 10 - n);
    cont(&m);
    for (i = 0; i < 10; i++) {
        if (!done[i]) {
            rvm_answer(rvm_expect_tag(m.r, i));
            rvm_check_answer(&m.vm, m.queue, head[i], i);
        }
    }
    /* The next one is a new one. */
    head[0] = send_tag(&m, 100);
    rvm_answer(rvm_expect_tag(m.r, 100));
    rvm_check_answer(&m.vm, m.queue, head[0], 100);
    g_assert_null(vub_try_pop(m.r));
    drv_expect_none(&m.vm.q[m.queue]);
    rvm_quit(&m.vm);
}

/*
 * The same many times over, in a ring that wraps: some are completed in a
 * random order, some are taken and not completed, some are not taken.
 */
static void test_rounds(gconstpointer data)
{
    /* The queue's state as the test knows it: tags in the guest's order. */
    g_autoptr(GArray) waiting = g_array_new(false, false, sizeof(uint64_t));
    g_autoptr(GRand) rand = g_rand_new_with_seed(4711);
    uint16_t head_of[1024];
    uint64_t tag = 0, t;
    unsigned round, i, n;
    Machine m;

    if (skip_in_flight() || !run(&m, data, 64)) {
        return;
    }
    for (round = 0; round < 8; round++) {
        VubRequest *req[16];
        unsigned taken, in_order = 0;
        bool answered[16] = { 0 };

        while (waiting->len < 15) {
            head_of[tag % 1024] = send_tag(&m, tag);
            g_array_append_val(waiting, tag);
            tag++;
        }
        taken = g_rand_int_range(rand, 0, waiting->len + 1);
        for (i = 0; i < taken; i++) {
            req[i] = rvm_expect_tag(m.r, g_array_index(waiting, uint64_t, i));
        }
        n = taken ? g_rand_int_range(rand, 0, taken) : 0;
        for (; n; n--) {
            do {
                i = g_rand_int_range(rand, 0, taken);
            } while (answered[i]);
            answered[i] = true;
            rvm_answer(req[i]);
            t = g_array_index(waiting, uint64_t, i);
            if (!ordered(m.k)) {
                rvm_check_answer(&m.vm, m.queue, head_of[t % 1024], t);
            }
        }
        if (ordered(m.k)) {
            for (; in_order < taken && answered[in_order]; in_order++) {
                t = g_array_index(waiting, uint64_t, in_order);
                rvm_check_answer(&m.vm, m.queue, head_of[t % 1024], t);
            }
            for (i = in_order; i < taken; i++) {
                answered[i] = false;
            }
        }
        for (i = taken; i-- > 0;) {
            if (answered[i]) {
                g_array_remove_index(waiting, i);
            }
        }
        stop(&m);
        drv_expect_none(&m.vm.q[m.queue]);
        cont(&m);
    }
    for (i = 0; i < waiting->len; i++) {
        t = g_array_index(waiting, uint64_t, i);
        rvm_answer(rvm_expect_tag(m.r, t));
        rvm_check_answer(&m.vm, m.queue, head_of[t % 1024], t);
    }
    g_assert_null(vub_try_pop(m.r));
    rvm_quit(&m.vm);
}

/*
 * A back end that is at work when QEMU wants to stop, and goes on: all that it
 * has is waited for.  Only then it is told to stop.
 */
static void test_drained(gconstpointer data)
{
    VubRequest *req[4];
    uint16_t head[4];
    Machine m;
    unsigned i;

    if (skip_in_flight() || !run(&m, data, 0)) {
        return;
    }
    for (i = 0; i < 4; i++) {
        head[i] = send_tag(&m, i);
        req[i] = rvm_expect_tag(m.r, i);
    }
    qtest_qmp_send(m.vm.qts, "{ 'execute': 'stop' }");
    for (i = 0; i < 4; i++) {
        /* That it waits for them nobody says. */
        g_usleep(50000);
        g_assert_cmpuint(vub_count(m.vm.b, VUB_GET_VRING_BASE), <=, m.queue);
        rvm_answer(req[i]);
    }
    qobject_unref(qtest_qmp_receive(m.vm.qts));
    for (i = 0; i < 4; i++) {
        rvm_check_answer(&m.vm, m.queue, head[i], i);
    }
    g_assert_cmpint(rvm_relay_figure(&m.vm, "unpopped"), ==, 0);
    cont(&m);
    head[0] = send_tag(&m, 9);
    rvm_answer(rvm_expect_tag(m.r, 9));
    rvm_check_answer(&m.vm, m.queue, head[0], 9);
    rvm_quit(&m.vm);
}

static bool overlap(const VubSegment *a, const VubSegment *b)
{
    return a->gpa < b->gpa + b->len && b->gpa < a->gpa + a->len;
}

/* Nothing of @req lies where something of @old does. */
static void check_elsewhere(const VubRequest *req, const VubRequest *old)
{
    unsigned i, j;

    for (i = 0; i < req->nout + req->nin; i++) {
        for (j = 0; j < old->nout + old->nin; j++) {
            g_assert_false(overlap(&req->seg[i], &old->seg[j]));
        }
    }
}

/*
 * One that goes on for long after: it writes to its old buffers, uses its old
 * ring and calls.  Neither the guest nor the requests that it was given anew
 * notice.
 */
static void test_too_late(gconstpointer data)
{
    VubRequest *old[4], *req[4];
    uint16_t head[4];
    VubRing *before;
    Machine m;
    unsigned i, k;

    if (skip_in_flight() || !run(&m, data, 0)) {
        return;
    }
    m.vm.b->gives_up = false;
    for (i = 0; i < 4; i++) {
        head[i] = send_tag(&m, i);
        old[i] = rvm_expect_tag(m.r, i);
    }
    stop(&m);
    before = m.r;
    cont(&m);
    g_assert_true(before->used != m.r->used);
    for (i = 0; i < 4; i++) {
        req[i] = rvm_expect_tag(m.r, i);
        for (k = 0; k < 4; k++) {
            check_elsewhere(req[i], old[k]);
        }
        rvm_write_in(req[i], 0, i, 16);
    }
    for (i = 0; i < 4; i++) {
        vub_fill(old[i], 0, 0x66, 16);
        memset(old[i]->seg[0].host, 0x66, 8);
        vub_done(old[i], 16);
    }
    vub_call(m.r);
    /* Through the relay and back, so that it has seen the call. */
    k = send_tag(&m, 50);
    rvm_answer(rvm_expect_tag(m.r, 50));
    if (ordered(m.k)) {
        drv_expect_none(&m.vm.q[m.queue]);
    } else {
        rvm_check_answer(&m.vm, m.queue, k, 50);
    }
    for (i = 0; i < 4; i++) {
        g_assert_cmpuint(rvm_tag(req[i]), ==, i);
        vub_done(req[i], 16);
        rvm_check_answer(&m.vm, m.queue, head[i], i);
    }
    if (ordered(m.k)) {
        rvm_check_answer(&m.vm, m.queue, k, 50);
    }
    drv_expect_none(&m.vm.q[m.queue]);
    rvm_quit(&m.vm);
}

/* Reset by the driver, or of the whole machine: the old ones are gone. */
static void reset(Machine *m, bool machine)
{
    RelayVm *vm = &m->vm;
    VubRequest *old[4], *req;
    uint16_t head;
    unsigned i;

    vm->b->gives_up = false;

    for (i = 0; i < 4; i++) {
        send_tag(m, i);
        old[i] = rvm_expect_tag(m->r, i);
    }
    if (machine) {
        qtest_system_reset(vm->qts);
        qvirtio_pci_device_enable(vm->dev);
    }
    rvm_drive_again(vm);
    g_assert_true(qatomic_read(&m->r->stopped));
    m->r = vub_wait_ring(vm->b, m->queue, ++m->starts);
    head = send_tag(m, 77);
    req = rvm_expect_tag(m->r, 77);
    for (i = 0; i < 4; i++) {
        vub_fill(old[i], 0, 0x66, 16);
        vub_done(old[i], 16);
    }
    g_assert_cmpuint(rvm_tag(req), ==, 77);
    rvm_answer(req);
    rvm_check_answer(vm, m->queue, head, 77);
    drv_expect_none(&vm->q[m->queue]);
}

static void test_reset(gconstpointer data)
{
    Machine m;

    if (skip_in_flight() || !run(&m, data, 0)) {
        return;
    }
    reset(&m, false);
    rvm_quit(&m.vm);
}

static void test_system_reset(gconstpointer data)
{
    Machine m;

    if (skip_in_flight() || !run(&m, data, 0)) {
        return;
    }
    reset(&m, true);
    rvm_quit(&m.vm);
}

/* All that is in flight, when QEMU ends. */
static void test_quit(gconstpointer data)
{
    VubRequest *req;
    Machine m;

    if (!run(&m, data, 0)) {
        return;
    }
    send_tag(&m, 1);
    send_tag(&m, 2);
    req = rvm_expect_tag(m.r, 1);
    rvm_quit(&m.vm);
    vub_request_free(req);
}

/* A disk that is not to be waited for when QEMU is killed: since QEMU 10.2. */
#define FORCED "skip-get-vring-base-on-force-shutdown"

static bool can_be_forced(void)
{
    QTestState *qts = qtest_init("-machine none");
    QDict *resp = qtest_qmp(qts, "{ 'execute': 'device-list-properties',"
                            " 'arguments': { 'typename': %s } }", RVM_BLK);
    QListEntry *e;
    bool found = false;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(resp, "return"), e) {
        found |= g_str_equal(qdict_get_str(qobject_to(QDict, e->value),
                                           "name"), FORCED);
    }
    qobject_unref(resp);
    qtest_quit(qts);
    return found;
}

static void test_forced(void)
{
    static const Kind kind = {
        "forced", RVM_BLK, "," FORCED "=on", "", INDIRECT, .waits = true
    };
    VubRequest *req;
    Machine m;

    if (rvm_skip_plain()) {
        return;
    }
    if (!can_be_forced()) {
        g_test_skip("no " FORCED);
        return;
    }
    run(&m, &kind, 0);
    send_tag(&m, 1);
    req = rvm_expect_tag(m.r, 1);
    qtest_qmp_assert_success(m.vm.qts, "{ 'execute': 'quit' }");
    qtest_wait_qemu(m.vm.qts);
    g_assert_cmpuint(vub_count(m.vm.b, VUB_GET_VRING_BASE), ==, 0);
    rvm_quit(&m.vm);
    vub_request_free(req);
}

static void add(const char *name, bool all, GTestDataFunc test)
{
    unsigned i;

    for (i = 0; i < G_N_ELEMENTS(kinds); i++) {
        g_autofree char *path = g_strdup_printf("relay/stop/%s/%s", name,
                                                kinds[i].name);

        if (all || kinds[i].often) {
            qtest_add_data_func(path, &kinds[i], test);
        }
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add("in-flight", true, test_in_flight);
    add("rounds", false, test_rounds);
    add("drained", false, test_drained);
    add("too-late", false, test_too_late);
    add("reset", false, test_reset);
    add("system-reset", false, test_system_reset);
    add("quit", false, test_quit);
    qtest_add_func("relay/stop/forced", test_forced);
    return g_test_run();
}
