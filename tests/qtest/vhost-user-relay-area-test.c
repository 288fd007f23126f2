/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: when its memory is too small, and how small it is
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "relay-vm.h"

#define PART (300 * KiB)
#define BUFFERS DRV_DATA

/* A request of @len bytes out, with a byte in; number @i. */
static uint16_t send_large(RelayVm *vm, unsigned queue, unsigned i,
                           uint32_t len)
{
    uint64_t at = BUFFERS + (queue * 16 + i) * MiB;

    rvm_fill(vm, at, i, len);
    qtest_writeb(vm->qts, at + MiB - 1, 0xee);
    return drv_send(&vm->q[queue], (DrvSegment[]) {
        { at, len, false },
        { at + MiB - 1, 1, true },
    }, 2, true);
}

static void answer_large(RelayVm *vm, VubRequest *req, unsigned queue,
                         unsigned i, uint16_t head)
{
    rvm_check_out(req, 0, i, req->out_len);
    vub_fill(req, 0, i, 1);
    vub_done(req, 1);
    drv_expect_used(&vm->q[queue], head, 1);
    g_assert_cmpuint(qtest_readb(vm->qts, BUFFERS +
                                 (queue * 16 + i + 1) * MiB - 1), ==, i);
}

static void wait_figure(RelayVm *vm, const char *name, int64_t least)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

    while (rvm_relay_figure(vm, name) < least) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
    }
}

static const char *const threads[] = { "", ",iothread=io0" };

/* 1 MiB of memory, of which the rings take some, behind @thread. */
static void run_small(RelayVm *vm, const char *thread, const char *props)
{
    static char relay[64];

    rvm_init(vm);
    vm->more = "-object iothread,id=io0";
    g_snprintf(relay, sizeof(relay), ",relay=on,relay-size=1M%s", thread);
    vm->relay = relay;
    vm->props = props;
    rvm_start(vm);
    rvm_drive(vm);
    g_assert_cmpuint(vub_table(vm->b)->regions[0].size, ==, MiB);
}

/* Requests that do not fit beside each other come one after the other. */
static void test_wait(gconstpointer thread)
{
    uint16_t head[9];
    VubRequest *req[9];
    RelayVm vm;
    VubRing *r;
    unsigned i, there = 0;

    if (rvm_skip_plain()) {
        return;
    }
    run_small(&vm, thread, "");
    r = vub_wait_ring(vm.b, 1, 1);
    for (i = 0; i < 9; i++) {
        head[i] = send_large(&vm, 1, i, PART);
    }
    for (; there < 3; there++) {
        req[there] = vub_pop(r);
    }
    wait_figure(&vm, "waits", 1);
    g_assert_null(vub_try_pop(r));
    for (i = 0; i < 9; i++) {
        answer_large(&vm, req[i], 1, i, head[i]);
        if (there < 9) {
            req[there++] = vub_pop(r);
            g_assert_null(vub_try_pop(r));
        }
    }
    g_assert_cmpint(rvm_relay_figure(&vm, "requests"), ==, 9);
    rvm_quit(&vm);
}

/* The same on two queues, each of which gets its turn. */
static void test_wait_two(gconstpointer thread)
{
    unsigned sent[2] = { 0 }, done[2] = { 0 };
    uint16_t head[2][4];
    VubRing *r[2];
    RelayVm vm;
    unsigned q, i;

    if (rvm_skip_plain()) {
        return;
    }
    run_small(&vm, thread, "");
    r[0] = vub_wait_ring(vm.b, 0, 1);
    r[1] = vub_wait_ring(vm.b, 1, 1);
    for (i = 0; i < 4; i++) {
        for (q = 0; q < 2; q++) {
            head[q][sent[q]++] = send_large(&vm, q, i, 600 * KiB);
        }
    }
    /* There is room for one at a time. */
    for (i = 0; i < 8; i++) {
        VubRequest *req = NULL;
        int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

        for (q = 0; !req; q = !q) {
            req = vub_try_pop(r[q]);
            if (req) {
                break;
            }
            g_assert_cmpint(g_get_monotonic_time(), <, end);
        }
        g_assert_null(vub_try_pop(r[0]));
        g_assert_null(vub_try_pop(r[1]));
        answer_large(&vm, req, q, done[q], head[q][done[q]]);
        done[q]++;
        /* None has to wait until the other one is through. */
        g_assert_cmpint(abs((int)done[0] - (int)done[1]), <=, 2);
    }
    g_assert_cmpuint(done[0], ==, 4);
    g_assert_cmpuint(done[1], ==, 4);
    rvm_quit(&vm);
}

/* Stopped while requests wait for room. */
static void test_wait_stop(gconstpointer thread)
{
    uint16_t head[5];
    VubRequest *req[5];
    RelayVm vm;
    VubRing *r;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    run_small(&vm, thread, "");
    r = vub_wait_ring(vm.b, 1, 1);
    for (i = 0; i < 5; i++) {
        head[i] = send_large(&vm, 1, i, PART);
    }
    for (i = 0; i < 3; i++) {
        req[i] = vub_pop(r);
    }
    wait_figure(&vm, "waits", 1);
    /* Those that it has begun with; else their pages would be given up. */
    for (i = 0; i < 3; i++) {
        answer_large(&vm, req[i], 1, i, head[i]);
    }
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
    r = vub_wait_ring(vm.b, 1, 2);
    for (i = 3; i < 5; i++) {
        answer_large(&vm, vub_pop(r), 1, i, head[i]);
    }
    g_assert_null(vub_try_pop(r));
    rvm_quit(&vm);
}

/* One that can never fit: the device says so, and is well after a reset. */
static void test_too_large(gconstpointer thread)
{
    VubRequest *req;
    RelayVm vm;
    VubRing *r;
    uint16_t head;

    if (rvm_skip_plain()) {
        return;
    }
    run_small(&vm, thread, "");
    vub_wait_ring(vm.b, 1, 1);
    drv_send(&vm.q[1], (DrvSegment[]) {
        { BUFFERS, 2 * MiB, false },
        { BUFFERS + 3 * MiB, 1, true },
    }, 2, true);
    rvm_wait_needs_reset(&vm);
    rvm_wait_stderr(&vm, "relay-size");
    drv_notify(&vm.q[1]);
    drv_notify(&vm.q[0]);
    drv_expect_none(&vm.q[1]);

    rvm_drive_again(&vm);
    r = vub_wait_ring(vm.b, 1, 2);
    head = send_large(&vm, 1, 0, PART);
    req = vub_pop(r);
    answer_large(&vm, req, 1, 0, head);
    rvm_quit(&vm);
}

/*
 * More than fits because of what is stuck: requests that nobody answers keep
 * their room, and a stop takes all of it back.
 */
static void test_stop_frees(gconstpointer thread)
{
    uint16_t head[3];
    RelayVm vm;
    VubRing *r;
    unsigned i, round;

    if (rvm_skip_plain()) {
        return;
    }
    run_small(&vm, thread, "");
    r = vub_wait_ring(vm.b, 1, 1);
    for (i = 0; i < 3; i++) {
        head[i] = send_large(&vm, 1, i, PART);
    }
    /*
     * Each round leaves as much behind as there is.  It has begun with none:
     * what it had begun with it might still write to.
     */
    for (round = 2; round < 4; round++) {
        qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
        qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
        r = vub_wait_ring(vm.b, 1, round);
    }
    for (i = 0; i < 3; i++) {
        answer_large(&vm, vub_pop(r), 1, i, head[i]);
    }
    rvm_quit(&vm);
}

/* A device that idles holds next to nothing. */
static void test_shrink(gconstpointer thread)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;
    g_autofree char *relay = g_strdup_printf(",relay=on%s",
                                             (const char *)thread);
    VubRequest *req[8];
    uint16_t head[8];
    struct stat st;
    RelayVm vm;
    VubRing *r;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_init(&vm);
    vm.more = "-object iothread,id=io0";
    vm.relay = relay;
    rvm_start(&vm);
    rvm_drive(&vm);
    r = vub_wait_ring(vm.b, 1, 1);
    for (i = 0; i < 8; i++) {
        head[i] = send_large(&vm, 1, i, 1000 * KiB);
    }
    for (i = 0; i < 8; i++) {
        req[i] = vub_pop(r);
    }
    g_assert_cmpint(rvm_relay_figure(&vm, "held"), >=, 8 * 1000 * KiB);
    for (i = 0; i < 8; i++) {
        answer_large(&vm, req[i], 1, i, head[i]);
    }
    while (rvm_relay_figure(&vm, "held") > 1 * MiB) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(10000);
    }
    /* What the host says. */
    g_assert_cmpint(fstat(vub_message(vm.b, VUB_SET_MEM_TABLE, 0)->fds[0],
                          &st), ==, 0);
    g_assert_cmpint(st.st_blocks * 512, <=, 1 * MiB);
    /* And it goes on. */
    head[0] = send_large(&vm, 1, 0, 1000 * KiB);
    answer_large(&vm, vub_pop(r), 1, 0, head[0]);
    rvm_quit(&vm);
}

static void add(const char *name, GTestDataFunc test)
{
    unsigned i;

    for (i = 0; i < G_N_ELEMENTS(threads); i++) {
        g_autofree char *path = g_strdup_printf("relay/area/%s%s", name,
                                                i ? "/iothread" : "");

        qtest_add_data_func(path, threads[i], test);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add("wait", test_wait);
    add("wait-two", test_wait_two);
    add("wait-stop", test_wait_stop);
    add("too-large", test_too_large);
    add("stop-frees", test_stop_frees);
    add("shrink", test_shrink);
    return g_test_run();
}
