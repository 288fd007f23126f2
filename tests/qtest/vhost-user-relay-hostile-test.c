/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: a back end that does what it must not
 *
 * Whatever it does, QEMU lives, the guest's memory outside the parts that a
 * device may write to stays as it is, and a reset makes all well again.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "relay-vm.h"

static const char *const threads[] = { ",relay=on", ",relay=on,iothread=io0" };

static void run(RelayVm *vm, const char *relay, const char *props)
{
    rvm_init(vm);
    vm->more = "-object iothread,id=io0";
    vm->relay = relay;
    vm->props = props;
    vm->b->gives_up = true;
    rvm_start(vm);
    rvm_drive(vm);
}

/* QEMU still answers, and its device works when it was reset. */
static void check_revives(RelayVm *vm, unsigned start)
{
    VubRequest *req;
    VubRing *r;
    uint16_t head;

    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'query-status' }");
    rvm_drive_again(vm);
    g_assert_cmphex(rvm_status(vm) & VIRTIO_CONFIG_S_NEEDS_RESET, ==, 0);
    r = vub_wait_ring(vm->b, 1, start);
    head = rvm_send_tag(vm, 1, 99);
    req = rvm_expect_tag(r, 99);
    rvm_answer(req);
    rvm_check_answer(vm, 1, head, 99);
    if (!rvm_plain()) {
        QDict *relay = rvm_relay(vm);

        g_assert_false(qdict_get_bool(relay, "broken"));
        qobject_unref(relay);
    }
}

typedef enum Crime {
    ID_IS_NUM,
    ID_IS_HUGE,
    ID_IS_WRAPPED,        /* right in 16 bits */
    ID_WAS_USED,
    ID_TWICE_AT_ONCE,
    ID_IS_FREE,
    IDX_JUMPS,            /* beyond what was made available */
    IDX_JUMPS_FAR,
    IDX_GOES_BACK,
    CRIMES,
} Crime;

static const char *const crimes[CRIMES] = {
    [ID_IS_NUM] = "id-num",
    [ID_IS_HUGE] = "id-huge",
    [ID_IS_WRAPPED] = "id-wrapped",
    [ID_WAS_USED] = "id-was-used",
    [ID_TWICE_AT_ONCE] = "id-twice",
    [ID_IS_FREE] = "id-free",
    [IDX_JUMPS] = "idx-jumps",
    [IDX_JUMPS_FAR] = "idx-jumps-far",
    [IDX_GOES_BACK] = "idx-goes-back",
};

typedef struct Case {
    Crime crime;
    const char *relay;
} Case;

static void commit(Crime crime, VubRing *r, const VubRequest *in_flight,
                   uint16_t free_head)
{
    unsigned i;

    g_assert_cmpuint(in_flight->head, <, r->num / 2);
    switch (crime) {
    case ID_IS_NUM:
        vub_add_used(r, r->num, 16);
        break;
    case ID_IS_HUGE:
        vub_add_used(r, UINT32_MAX, 16);
        break;
    case ID_IS_WRAPPED:
        vub_add_used(r, in_flight->head | 0x10000, 16);
        break;
    case ID_WAS_USED:
        vub_add_used(r, free_head, 16);
        break;
    case ID_TWICE_AT_ONCE:
        /* Two in flight, so that it is not the index that tells. */
        r->used->ring[r->used_idx % r->num].id = cpu_to_le32(in_flight->head);
        r->used->ring[r->used_idx % r->num].len = 0;
        r->used_idx++;
        vub_add_used(r, in_flight->head, 0);
        break;
    case ID_IS_FREE:
        vub_add_used(r, r->num - 1, 16);
        break;
    case IDX_JUMPS:
        for (i = 0; i < r->num; i++) {
            r->used->ring[i].id = cpu_to_le32(in_flight->head);
        }
        vub_set_used_idx(r, r->used_idx + 3);
        break;
    case IDX_JUMPS_FAR:
        vub_set_used_idx(r, r->used_idx + r->num + 1);
        break;
    case IDX_GOES_BACK:
        vub_set_used_idx(r, r->used_idx - 1);
        break;
    default:
        g_assert_not_reached();
    }
    vub_call(r);
}

static void test_crime(gconstpointer data)
{
    const Case *c = data;
    g_autofree char *said = NULL;
    VubRequest *req[3];
    uint16_t head, free_head;
    RelayVm vm;
    VubRing *r;
    QDict *relay;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, c->relay, "");
    r = vub_wait_ring(vm.b, 1, 1);
    /* One that is through, and two in flight. */
    head = rvm_send_tag(&vm, 1, 0);
    rvm_send_tag(&vm, 1, 1);
    rvm_send_tag(&vm, 1, 2);
    for (i = 0; i < 3; i++) {
        req[i] = rvm_expect_tag(r, i);
    }
    free_head = req[0]->head;
    rvm_answer(req[0]);
    rvm_check_answer(&vm, 1, head, 0);
    commit(c->crime, r, req[1], free_head);
    rvm_wait_needs_reset(&vm);
    rvm_wait_stderr(&vm, "queue 1: the vhost-user back end used");
    relay = rvm_relay(&vm);
    g_assert_true(qdict_get_bool(relay, "broken"));
    qobject_unref(relay);
    if (c->crime >= IDX_JUMPS) {
        /* What such an index speaks of is not looked at. */
        drv_expect_none(&vm.q[1]);
    }
    /* A right one of a ring that is broken: no more comes of it. */
    drv_notify(&vm.q[1]);
    vub_done(req[2], 16);
    vub_call(r);
    check_revives(&vm, 2);
    drv_expect_none(&vm.q[1]);
    vub_request_free(req[1]);
    rvm_quit(&vm);
}

/* Broken, then stopped and continued, migrated to nowhere, and reset. */
static void test_broken_stop(gconstpointer relay)
{
    VubRequest *req;
    RelayVm vm;
    VubRing *r;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, relay, "");
    r = vub_wait_ring(vm.b, 1, 1);
    rvm_send_tag(&vm, 1, 1);
    req = rvm_expect_tag(r, 1);
    vub_add_used(r, 12345, 0);
    vub_call(r);
    rvm_wait_needs_reset(&vm);
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
    vub_request_free(req);
    check_revives(&vm, vub_starts(vm.b, 1) + 1);
    rvm_quit(&vm);
}

/*
 * What the relay has put into the area is not what it goes by: with the table
 * of descriptors, the ring of descriptors and all else overwritten but what is
 * the device's to write, a request that is then completed writes to its own
 * in-part and nowhere else.
 */
static void put(VubRing *const rings[2], size_t at, uint8_t byte)
{
    uint8_t *p = rings[0]->table->host[0] + at;
    unsigned i;

    for (i = 0; i < 2; i++) {
        uint8_t *used = (uint8_t *)rings[i]->used;

        if (p >= used && p < used + 6 + rings[i]->num * 8) {
            return;
        }
    }
    *p = byte;
}

static void overwrite(VubRing *const rings[2], const VubRequest *req,
                      GRand *rand, uint64_t victim)
{
    VubRing *r = rings[1];
    const VubTable *t = r->table;
    struct vring_desc *d = NULL;
    size_t i;
    unsigned k;

    if (req->indirect) {
        d = (void *)vub_at(t, le64_to_cpu(r->desc[req->head].addr), 16);
    }
    switch (g_rand_int_range(rand, 0, 4)) {
    case 0:
        /* Descriptors that look right and lead to somebody else. */
        for (k = 0; d && k < 3; k++) {
            d[k].addr = cpu_to_le64(victim);
            d[k].len = cpu_to_le32(4096);
            d[k].flags = cpu_to_le16(VRING_DESC_F_WRITE | VRING_DESC_F_NEXT);
            d[k].next = cpu_to_le16(0);
        }
        break;
    case 1:
        for (k = 0; k < r->num; k++) {
            r->desc[k].addr = cpu_to_le64(victim);
            r->desc[k].len = cpu_to_le32(UINT32_MAX);
            r->desc[k].flags = cpu_to_le16(VRING_DESC_F_WRITE);
            r->avail->ring[k] = cpu_to_le16(g_rand_int(rand));
        }
        r->avail->idx = cpu_to_le16(g_rand_int(rand));
        break;
    case 2:
        for (i = 0; i < t->regions[0].size; i++) {
            put(rings, i, 0xff);
        }
        break;
    default:
        for (i = 0; i < 4096; i++) {
            put(rings, g_rand_int_range(rand, 0, t->regions[0].size),
                g_rand_int(rand));
        }
    }
}

#define IN 0x10007
#define AROUND 0x20000

static void test_overwrite(gconstpointer relay)
{
    g_autofree uint8_t *memory = g_malloc(AROUND);
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);
    g_autofree char *small = g_strdup_printf("%s,relay-size=2M",
                                             (const char *)relay);
    const uint64_t base = DRV_DATA;
    RelayVm vm;
    VubRing *r[2];
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, small, "");
    for (i = 0; i < 40; i++) {
        uint32_t len = g_rand_int_range(rand, 1, 20000);
        VubRequest *req;
        uint16_t head, id;
        uint32_t got, k;

        rvm_fill(&vm, base, i, AROUND);
        head = drv_send(&vm.q[1], (DrvSegment[]) {
            { base + 0x123, 500, false },
            { base + IN, len, true },
        }, 2, i & 1);
        r[0] = vub_wait_ring(vm.b, 0, i + 1);
        r[1] = vub_wait_ring(vm.b, 1, i + 1);
        req = vub_pop(r[1]);
        overwrite(r, req, rand, base + 0x8000);
        vub_add_used(r[1], req->head, g_rand_int(rand));
        vub_call(r[1]);
        vub_request_free(req);
        drv_wait_used(&vm.q[1], &id, &got);
        g_assert_cmpuint(id, ==, head);
        g_assert_cmpuint(got, <=, len);
        /* All around the in-part. */
        qtest_bufread(vm.qts, base, memory, AROUND);
        for (k = 0; k < AROUND; k++) {
            if (k < IN || k >= IN + len) {
                g_assert_cmphex(memory[k], ==, rvm_byte(i, k));
            }
        }
        /* The ring itself may be of no use to us now: have a new one. */
        rvm_drive_again(&vm);
        g_assert_cmphex(rvm_status(&vm) & VIRTIO_CONFIG_S_NEEDS_RESET, ==, 0);
    }
    rvm_quit(&vm);
}

/*
 * What is wrong is seen only when the device is reset: that is over then, and
 * the device that comes after it works.
 */
static void test_bad_at_reset(gconstpointer relay)
{
    RelayVm vm;
    VubRing *r;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, relay, "");
    for (i = 0; i < 10; i++) {
        r = vub_wait_ring(vm.b, 1, i + 1);
        rvm_send_tag(&vm, 1, 1);
        vub_request_free(rvm_expect_tag(r, 1));
        vub_add_used(r, 12345, 0);
        if (i & 1) {
            /* It may be seen before the reset. */
            vub_call(r);
        }
        check_revives(&vm, i + 2);
    }
    rvm_quit(&vm);
}

/* It closes what it should not, says nonsense on the socket, or hangs up. */
static void test_hang_up(gconstpointer relay)
{
    VubRequest *req;
    RelayVm vm;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, relay, "");
    rvm_send_tag(&vm, 1, 1);
    req = rvm_expect_tag(vub_wait_ring(vm.b, 1, 1), 1);
    vub_disconnect(vm.b, true);
    vub_done(req, 16);
    rvm_send_tag(&vm, 1, 2);
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
    rvm_reset(&vm);
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'query-status' }");
    rvm_quit(&vm);
}

/* The area cannot be made smaller, which would kill QEMU. */
static void test_truncate(gconstpointer relay)
{
    RelayVm vm;
    int fd;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, relay, "");
    fd = vub_wait_message(vm.b, VUB_SET_MEM_TABLE, 1)->fds[0];
    g_assert_cmpint(ftruncate(fd, 0), ==, -1);
    g_assert_cmpint(errno, ==, EPERM);
    /* It may be emptied, though. */
    g_assert_cmpint(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                              0, vub_table(vm.b)->regions[0].size), ==, 0);
    check_revives(&vm, 2);
    rvm_quit(&vm);
}

/*
 * The guest's part in it: buffers that are no RAM, in a request that is there
 * when the device starts.  Whoever reads registers needs QEMU's big lock, and
 * whoever waits for that thread has it: so they are not read.
 */
#define HPET 0xfed00000

static void test_mmio(gconstpointer relay)
{
    RelayVm vm;

    if (rvm_skip_plain()) {
        return;
    }
    run(&vm, relay, "");
    vub_wait_ring(vm.b, 1, 1);
    vm.b->gives_up = false;
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
    drv_add(&vm.q[1], (DrvSegment[]) {
        { HPET, 8, false },
        { HPET + 0xf0, 8, true },
    }, 2, true);
    drv_publish(&vm.q[1]);
    /* A deadlock would have us wait for ever. */
    alarm(DRV_TIMEOUT_US / G_USEC_PER_SEC);
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
    vub_wait_ring(vm.b, 1, 2);
    rvm_wait_needs_reset(&vm);
    rvm_wait_stderr(&vm, "cannot be read");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'stop' }");
    qtest_qmp_assert_success(vm.qts, "{ 'execute': 'cont' }");
    alarm(0);
    check_revives(&vm, 4);
    rvm_quit(&vm);
}

static void add(const char *name, GTestDataFunc test)
{
    unsigned i;

    for (i = 0; i < G_N_ELEMENTS(threads); i++) {
        g_autofree char *path = g_strdup_printf("relay/hostile/%s%s", name,
                                                i ? "/iothread" : "");

        qtest_add_data_func(path, threads[i], test);
    }
}

int main(int argc, char **argv)
{
    static Case cases[CRIMES * 2];
    unsigned i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < G_N_ELEMENTS(cases); i++) {
        Case *c = &cases[i];
        g_autofree char *path = NULL;

        c->crime = i / 2;
        c->relay = threads[i % 2];
        path = g_strdup_printf("relay/hostile/%s%s", crimes[c->crime],
                               i % 2 ? "/iothread" : "");
        qtest_add_data_func(path, c, test_crime);
    }
    add("broken-stop", test_broken_stop);
    add("overwrite", test_overwrite);
    add("bad-at-reset", test_bad_at_reset);
    add("hang-up", test_hang_up);
    add("truncate", test_truncate);
    add("mmio", test_mmio);
    return g_test_run();
}
