/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: every byte of a request, there and back
 */

#include "qemu/osdep.h"
#include "relay-vm.h"

/* Bytes of guest memory that nobody writes to. */
#define GUARD 0xaa
/* What is in a part to be written before anybody writes to it. */
#define OWN 0xee

#define AREA (DRV_DATA + 0x100000)
#define AREA_SIZE 0x200000

/* The request queue of a device. */
static unsigned queue_of(const RelayVm *vm)
{
    return g_str_has_prefix(vm->device, RVM_BLK) ? 0 : 1;
}

static VubRing *ring_of(const RelayVm *vm)
{
    return vub_wait_ring(vm->b, queue_of(vm), 1);
}

static uint16_t submit(RelayVm *vm, const DrvSegment *s, unsigned n)
{
    return drv_send(&vm->q[queue_of(vm)], s, n,
                    vm->features & VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC));
}

/* Offset by offset: where the guest has a byte, and where the back end. */
static void check_alignment(const DrvSegment *g, unsigned n,
                            const VubRequest *req)
{
    unsigned i = 0, j = 0;
    uint64_t in_g = 0, in_r = 0, step;

    while (i < n) {
        g_assert_cmpuint(j, <, req->nout + req->nin);
        g_assert_cmpuint((g[i].addr + in_g) % RVM_PAGE, ==,
                         (req->seg[j].gpa + in_r) % RVM_PAGE);
        g_assert_cmpuint(g[i].write, ==, j >= req->nout);
        step = MIN(g[i].len - in_g, req->seg[j].len - in_r);
        in_g += step;
        in_r += step;
        if (in_g == g[i].len) {
            i++;
            in_g = 0;
        }
        if (in_r == req->seg[j].len) {
            j++;
            in_r = 0;
        }
    }
    g_assert_cmpuint(j, ==, req->nout + req->nin);
    g_assert_cmpuint(in_r, ==, 0);
}

/* No two segments of a request share a byte, nor does its table. */
static void check_disjoint(const VubRequest *req)
{
    unsigned n = req->nout + req->nin, i, j;

    for (i = 0; i < n; i++) {
        for (j = 0; j < i; j++) {
            const VubSegment *a = &req->seg[i], *b = &req->seg[j];

            g_assert_true(a->gpa + a->len <= b->gpa ||
                          b->gpa + b->len <= a->gpa);
        }
    }
}

/* The parts out have patterns, those in OWN, between them is GUARD. */
static void prepare(RelayVm *vm, const DrvSegment *s, unsigned n)
{
    unsigned i;

    qtest_memset(vm->qts, AREA, GUARD, AREA_SIZE);
    for (i = 0; i < n; i++) {
        g_assert_cmpuint(s[i].addr, >, AREA);
        g_assert_cmpuint(s[i].addr + s[i].len, <, AREA + AREA_SIZE);
        if (s[i].write) {
            qtest_memset(vm->qts, s[i].addr, OWN, s[i].len);
        } else {
            rvm_fill(vm, s[i].addr, i, s[i].len);
        }
    }
}

/*
 * What the guest must find in AREA: parts out as they were, the first
 * @written bytes of the in-part of pattern @seed, the rest its own.
 */
static void verify(RelayVm *vm, const DrvSegment *s, unsigned n,
                   unsigned seed, size_t written)
{
    g_autofree uint8_t *want = g_malloc(AREA_SIZE);
    g_autofree uint8_t *got = g_malloc(AREA_SIZE);
    size_t at = 0, k;
    unsigned i;

    memset(want, GUARD, AREA_SIZE);
    for (i = 0; i < n; i++) {
        uint8_t *p = want + (s[i].addr - AREA);

        if (!s[i].write) {
            rvm_pattern(p, i, s[i].len);
            continue;
        }
        for (k = 0; k < s[i].len; k++, at++) {
            p[k] = at < written ? rvm_byte(seed, at) : OWN;
        }
    }
    qtest_bufread(vm->qts, AREA, got, AREA_SIZE);
    for (k = 0; k < AREA_SIZE; k++) {
        if (got[k] != want[k]) {
            g_error("guest memory at AREA + 0x%zx is %02x, not %02x", k,
                    got[k], want[k]);
        }
    }
}

/* There and back: @s is answered in full. */
static void round_trip(RelayVm *vm, VubRing *r, const DrvSegment *s,
                       unsigned n, unsigned max_descs)
{
    static unsigned seed = 1000;
    VubRequest *req;
    size_t offset = 0;
    uint16_t head;
    uint32_t in;
    unsigned i;

    prepare(vm, s, n);
    head = submit(vm, s, n);
    req = vub_pop(r);
    check_alignment(s, n, req);
    check_disjoint(req);
    if (!rvm_plain()) {
        g_assert_cmpuint(req->nout + req->nin, <=, max_descs);
    }
    for (i = 0; i < n && !s[i].write; i++) {
        rvm_check_out(req, offset, i, s[i].len);
        offset += s[i].len;
    }
    in = req->in_len;
    rvm_write_in(req, 0, ++seed, in);
    vub_done(req, in);
    drv_expect_used(&vm->q[queue_of(vm)], head, in);
    verify(vm, s, n, seed, in);
}

/* The kinds of request that each device and ring is tried with. */
static void run_layouts(RelayVm *vm)
{
    static const DrvSegment odd[] = {
        { AREA + 1, 40, false },
        { AREA + 0x1fff, 1, false },
        { AREA + 0x3ffe, 4099, false },
        { AREA + 0x8123, 9000, true },
        { AREA + 0xbfff, 2, true },
        { AREA + 0xd000, 1, true },
    };
    static const DrvSegment out_only[] = { { AREA + 77, 5000, false } };
    static const DrvSegment in_only[] = { { AREA + 0xff3, 5000, true } };
    /* The same page of the guest, twice: once to read, once to write. */
    static const DrvSegment twice[] = {
        { AREA + 0x100, 16, false },
        { AREA + 0x110, 16, true },
    };
    /* Neighbours in the guest, in wrong order. */
    static const DrvSegment backwards[] = {
        { AREA + 0x3000, 4096, false },
        { AREA + 0x2000, 4096, false },
        { AREA + 0x1000, 4096, true },
        { AREA + 0x4000, 4096, true },
    };
    VubRing *r = ring_of(vm);

    round_trip(vm, r, odd, G_N_ELEMENTS(odd), 6);
    round_trip(vm, r, out_only, 1, 1);
    round_trip(vm, r, in_only, 1, 1);
    round_trip(vm, r, twice, 2, 2);
    round_trip(vm, r, backwards, 4, 4);
}

typedef struct Kind {
    const char *name, *device, *props;
    uint64_t features;           /* of the guest, beside VERSION_1 */
    uint64_t no_backend;         /* that the back end does not offer */
} Kind;

#define INDIRECT VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC)
#define EVENT VUB_BIT(VIRTIO_RING_F_EVENT_IDX)
#define PACKED VUB_BIT(VIRTIO_F_RING_PACKED)
#define IN_ORDER VUB_BIT(VIRTIO_F_IN_ORDER)

static const Kind kinds[] = {
    { "fs", RVM_FS, "", INDIRECT },
    { "fs-chains", RVM_FS, "", 0 },
    { "fs-event-idx", RVM_FS, "", INDIRECT | EVENT },
    { "fs-packed", RVM_FS, ",packed=on", INDIRECT | PACKED },
    { "fs-packed-chains", RVM_FS, ",packed=on", PACKED },
    { "fs-packed-event-idx", RVM_FS, ",packed=on", PACKED | EVENT },
    { "fs-in-order", RVM_FS, ",in_order=on", INDIRECT | IN_ORDER },
    { "fs-no-tables", RVM_FS, "", 0, INDIRECT | EVENT },
    { "blk", RVM_BLK, "", INDIRECT },
    { "blk-packed", RVM_BLK, ",packed=on", INDIRECT | PACKED | EVENT },
};

static void run_kind(RelayVm *vm, const Kind *k)
{
    rvm_init(vm);
    vm->device = k->device;
    vm->props = k->props;
    vm->wanted = VUB_BIT(VIRTIO_F_VERSION_1) | k->features;
    vm->b->features &= ~k->no_backend;
    if (g_str_has_prefix(k->device, RVM_BLK)) {
        vm->b->protocol_features |= VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIG);
        vm->nqueues = 1;
    }
    rvm_start(vm);
    rvm_drive(vm);
    g_assert_cmphex(vm->features, ==, vm->wanted);
}

static bool skip_kind(const Kind *k)
{
    /* The fake device's ring is split. */
    return (k->features & (PACKED | IN_ORDER)) && rvm_skip_plain();
}

static void test_layout(gconstpointer data)
{
    RelayVm vm;

    if (skip_kind(data)) {
        return;
    }
    run_kind(&vm, data);
    run_layouts(&vm);
    rvm_quit(&vm);
}

/* Pages in a row become few descriptors, wherever the guest has them. */
static void test_join(void)
{
    DrvSegment s[258];
    unsigned i, n = 0;
    RelayVm vm;

    rvm_run(&vm, RVM_BLK, ",queue-size=512");
    s[n++] = (DrvSegment) { AREA + 0x10, 16, false };
    for (i = 0; i < 256; i++) {
        /* Every page, in an order that has no neighbours. */
        s[n++] = (DrvSegment) {
            AREA + (1 + i * 3 % 256) * RVM_PAGE, RVM_PAGE, true,
        };
    }
    s[n++] = (DrvSegment) { AREA + 0x20, 1, true };
    round_trip(&vm, ring_of(&vm), s, n, 4);
    for (i = 1; i < 257; i++) {
        s[i].write = false;
    }
    round_trip(&vm, ring_of(&vm), s, n, 4);
    rvm_quit(&vm);
}

/* As many segments as a request may have, none of which is next to another. */
static void test_many(gconstpointer data)
{
    g_autofree DrvSegment *s = g_new(DrvSegment, 1024);
    const Kind *k = data;
    RelayVm vm;
    unsigned i;

    if (skip_kind(data)) {
        return;
    }
    rvm_init(&vm);
    vm.device = k->device;
    vm.props = k->props;
    vm.wanted |= k->features;
    vm.nqueues = 2;
    rvm_start(&vm);
    rvm_drive(&vm);
    for (i = 0; i < 1024; i++) {
        s[i] = (DrvSegment) { AREA + 5 + i * 1111, 1000, i >= 512 };
    }
    round_trip(&vm, ring_of(&vm), s, 1024, 1024);
    rvm_quit(&vm);
}

/*
 * How much the back end says that it has written, and what the guest gets.
 * Who reads disks may write less than it says, or more.
 */
static void test_length(gconstpointer data)
{
    static const DrvSegment s[] = {
        { AREA + 0x100, 100, false },
        { AREA + 0x1123, 3000, true },
        { AREA + 0x4000, 1, true },
    };
    static const uint32_t too_long[] = { 3002, 5000, 0x80000000, UINT32_MAX };
    const Kind *k = data;
    bool blk = g_str_has_prefix(k->device, RVM_BLK);
    RelayVm vm;
    VubRequest *req;
    VubRing *r;
    uint16_t head;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    run_kind(&vm, k);
    r = ring_of(&vm);

    /* Short: no more than that for the guest, but for disks all of it. */
    prepare(&vm, s, 3);
    head = submit(&vm, s, 3);
    req = vub_pop(r);
    rvm_write_in(req, 0, 7, 3001);
    vub_done(req, 100);
    drv_expect_used(&vm.q[queue_of(&vm)], head, 100);
    verify(&vm, s, 3, 7, blk ? 3001 : 100);

    /* Nothing at all was written. */
    prepare(&vm, s, 3);
    head = submit(&vm, s, 3);
    vub_done(vub_pop(r), 0);
    drv_expect_used(&vm.q[queue_of(&vm)], head, 0);
    verify(&vm, s, 3, 0, 0);

    /* Too much. */
    for (i = 0; i < G_N_ELEMENTS(too_long); i++) {
        prepare(&vm, s, 3);
        head = submit(&vm, s, 3);
        req = vub_pop(r);
        rvm_write_in(req, 0, i, 3001);
        vub_done(req, too_long[i]);
        drv_expect_used(&vm.q[queue_of(&vm)], head, 3001);
        verify(&vm, s, 3, i, 3001);
    }
    rvm_quit(&vm);
}

/* A disk's back end writes the status alone, and says so or says nothing. */
static void test_prefill(void)
{
    static const DrvSegment s[] = {
        { AREA + 0x100, 16, false },
        { AREA + 0x1000, 8192, true },
        { AREA + 0x8000, 1, true },
    };
    uint8_t seen[8193];
    RelayVm vm;
    VubRequest *req;
    VubRing *r;
    uint16_t head;
    unsigned i, k;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_run(&vm, RVM_BLK, "");
    r = ring_of(&vm);
    for (i = 0; i < 2; i++) {
        /* Leave something in the area. */
        round_trip(&vm, r, (DrvSegment[]) { { AREA + 8, 20000, false } }, 1,
                   1);
        prepare(&vm, s, 3);
        head = submit(&vm, s, 3);
        req = vub_pop(r);
        vub_peek(req, 0, seen, sizeof(seen));
        for (k = 0; k < sizeof(seen); k++) {
            g_assert_cmphex(seen[k], ==, OWN);
        }
        vub_fill(req, 8192, 0, 1);
        vub_done(req, i);
        drv_expect_used(&vm.q[0], head, i);
        rvm_check_byte(&vm, s[1].addr, OWN, 8192);
        rvm_check_byte(&vm, s[2].addr, 0, 1);
    }
    rvm_quit(&vm);
}

/* What is said in query-vhost-user-relays. */
static void test_figures(void)
{
    static const DrvSegment s[] = {
        { AREA + 0x100, 100, false },
        { AREA + 0x1000, 5000, true },
    };
    RelayVm vm;
    VubRing *r;
    QDict *relay;
    unsigned i;

    if (rvm_skip_plain()) {
        return;
    }
    rvm_run(&vm, RVM_FS, "");
    r = ring_of(&vm);
    for (i = 0; i < 5; i++) {
        uint16_t head = submit(&vm, s, 2);
        VubRequest *req = vub_pop(r);

        vub_done(req, 3000);
        drv_expect_used(&vm.q[1], head, 3000);
    }
    relay = rvm_relay(&vm);
    g_assert_cmpstr(qdict_get_str(relay, "chardev"), ==, "c0");
    g_assert_false(qdict_haskey(relay, "iothread"));
    g_assert_cmpint(qdict_get_int(relay, "size"), ==,
                    vub_table(vm.b)->regions[0].size);
    g_assert_cmpint(qdict_get_int(relay, "requests"), ==, 5);
    g_assert_cmpint(qdict_get_int(relay, "bytes-out"), ==, 500);
    g_assert_cmpint(qdict_get_int(relay, "bytes-in"), ==, 15000);
    g_assert_cmpint(qdict_get_int(relay, "waits"), ==, 0);
    g_assert_cmpint(qdict_get_int(relay, "unpopped"), ==, 0);
    g_assert_cmpint(qdict_get_int(relay, "held"), >, 0);
    g_assert_cmpint(qdict_get_int(relay, "held"), <=, 1024 * 1024);
    g_assert_false(qdict_get_bool(relay, "broken"));
    qobject_unref(relay);
    rvm_quit(&vm);
}

int main(int argc, char **argv)
{
    static const Kind many[] = {
        { "many", RVM_FS, ",queue-size=1024", INDIRECT },
        { "many-packed", RVM_FS, ",queue-size=1024,packed=on",
          INDIRECT | PACKED },
    };
    static const Kind length[] = {
        { "length/fs", RVM_FS, "", INDIRECT },
        { "length/fs-packed", RVM_FS, ",packed=on", INDIRECT | PACKED },
        { "length/blk", RVM_BLK, "", INDIRECT },
    };
    unsigned i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < G_N_ELEMENTS(kinds); i++) {
        g_autofree char *path = g_strdup_printf("relay/layout/%s",
                                                kinds[i].name);

        qtest_add_data_func(path, &kinds[i], test_layout);
    }
    for (i = 0; i < G_N_ELEMENTS(many); i++) {
        g_autofree char *path = g_strdup_printf("relay/%s", many[i].name);

        qtest_add_data_func(path, &many[i], test_many);
    }
    for (i = 0; i < G_N_ELEMENTS(length); i++) {
        g_autofree char *path = g_strdup_printf("relay/%s", length[i].name);

        qtest_add_data_func(path, &length[i], test_length);
    }
    qtest_add_func("relay/join", test_join);
    qtest_add_func("relay/prefill", test_prefill);
    qtest_add_func("relay/figures", test_figures);
    return g_test_run();
}
