/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The relay of vhost-user: a back end that does anything at any time
 *
 * One thread is the back end.  It writes to all of its memory at random, uses
 * requests rightly most of the time, and calls.  The guest goes on meanwhile,
 * stops, continues, and resets the device whenever it asks for it.  Nothing
 * that a device may not write to must change.
 *
 * RELAY_FUZZ_SECONDS and RELAY_FUZZ_SEED in the environment: how long each
 * kind is tried, and with what; the seed is said.  It decides what is done, but
 * not when, as the threads race.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "relay-vm.h"

#define SECONDS 3

/* Parts out; never written to by a device. */
#define OUT DRV_DATA
#define OUT_SIZE 0x10000
#define OUT_SEED 5
/* Parts in, each in a slot of its own with a guard around it. */
#define IN (DRV_DATA + 0x800000)
#define SLOT 0x6000
#define SLOTS 24
#define GUARD 0xa5
#define IN_MAX 0x5000

typedef struct Kind {
    const char *name, *device, *props, *relay;
    uint64_t features;
    bool no_tables;              /* the back end knows no indirect ones */
} Kind;

#define INDIRECT VUB_BIT(VIRTIO_RING_F_INDIRECT_DESC)
#define EVENT VUB_BIT(VIRTIO_RING_F_EVENT_IDX)
#define PACKED VUB_BIT(VIRTIO_F_RING_PACKED)

static const Kind kinds[] = {
    { "fs", RVM_FS, "", ",relay=on,relay-size=2M", INDIRECT },
    { "fs-packed", RVM_FS, ",packed=on", ",relay=on,relay-size=2M",
      PACKED | INDIRECT | EVENT },
    { "fs-chains", RVM_FS, "", ",relay=on,relay-size=1M", 0, true },
    { "blk-iothread", RVM_BLK, "", ",relay=on,relay-size=2M,iothread=io0",
      INDIRECT | EVENT },
    { "fs-iothread-packed", RVM_FS, ",packed=on",
      ",relay=on,relay-size=1M,iothread=io0", PACKED },
};

typedef struct Hostile {
    VubBackend *b;
    unsigned queue;
    GRand *rand;
    bool quit;
    unsigned completions;
} Hostile;

static bool chance(GRand *rand, unsigned percent)
{
    return g_rand_int_range(rand, 0, 100) < percent;
}

/* The ring that runs, or was the last one to. */
static VubRing *last_ring(Hostile *h)
{
    VubBackend *b = h->b;
    VubRing *r = NULL;

    g_mutex_lock(&b->lock);
    if (b->starts[h->queue]->len) {
        r = g_ptr_array_index(b->starts[h->queue],
                              b->starts[h->queue]->len - 1);
        /* Now and then one that was stopped. */
        if (chance(h->rand, 5)) {
            r = g_ptr_array_index(b->starts[h->queue],
                                  g_rand_int_range(h->rand, 0,
                                                   b->starts[h->queue]->len));
        }
    }
    g_mutex_unlock(&b->lock);
    return r;
}

/* The next one, as if all were well; its bytes are of no interest. */
static void complete(Hostile *h, VubRing *r)
{
    uint16_t idx = le16_to_cpu(qatomic_read(&r->avail->idx));
    uint16_t head;

    if (idx == r->last_avail ||
        (uint16_t)(idx - r->last_avail) > r->num) {
        return;
    }
    head = le16_to_cpu(r->avail->ring[r->last_avail++ % r->num]);
    vub_add_used(r, head, g_rand_int_range(h->rand, 0, IN_MAX + 100));
    h->completions++;
}

static void scribble(GRand *rand, uint8_t *p, size_t size)
{
    size_t at = g_rand_int_range(rand, 0, size);
    size_t n = MIN(size - at, 1u << g_rand_int_range(rand, 0, 14));
    int byte = chance(rand, 50) ? 0xff : g_rand_int_range(rand, 0, 256);

    memset(p + at, byte, n);
}

static void act(Hostile *h, VubRing *r)
{
    const VubTable *t = r->table;
    GRand *rand = h->rand;
    unsigned i;

    switch (g_rand_int_range(rand, 0, 1000)) {
    case 0 ... 849:
        complete(h, r);
        break;
    case 850 ... 889:
        scribble(rand, t->host[0], t->regions[0].size);
        break;
    case 890 ... 929:
        /* Where descriptors and the available ring are: nobody reads that. */
        scribble(rand, (uint8_t *)r->desc, r->num * 16 + r->num * 2 + 6);
        break;
    case 930 ... 949:
        i = g_rand_int_range(rand, 0, r->num);
        r->desc[i].addr = cpu_to_le64(g_rand_int(rand));
        r->desc[i].len = cpu_to_le32(g_rand_int(rand));
        break;
    case 950 ... 951:
        vub_add_used(r, g_rand_int_range(rand, 0, r->num), IN_MAX);
        break;
    case 952 ... 953:
        vub_add_used(r, g_rand_int(rand), g_rand_int(rand));
        break;
    case 954:
        vub_set_used_idx(r, g_rand_int(rand));
        break;
    case 955:
        scribble(rand, (uint8_t *)r->used, r->num * 8 + 6);
        break;
    case 956 ... 959:
        r->used->flags = g_rand_int(rand);
        break;
    default:
        break;
    }
    vub_call(r);
}

static void *hostile_thread(void *opaque)
{
    Hostile *h = opaque;

    while (!qatomic_read(&h->quit)) {
        VubRing *r = last_ring(h);

        if (!r) {
            g_usleep(100);
            continue;
        }
        act(h, r);
        if (chance(h->rand, 30)) {
            g_usleep(g_rand_int_range(h->rand, 1, 300));
        }
    }
    return NULL;
}

typedef struct Guest {
    RelayVm vm;
    unsigned queue;
    GRand *rand;
    /* By head: how long its in-part is. */
    uint32_t in_len[DRV_MAX];
    uint64_t in_at[DRV_MAX];
    unsigned in_flight, sent, used, resets, stops;
} Guest;

static unsigned next_slot(Guest *g)
{
    return g->sent % SLOTS;
}

static void send_one(Guest *g)
{
    DrvSegment s[6];
    unsigned n = 0, outs = g_rand_int_range(g->rand, 0, 4), i, ins;
    uint64_t at = IN + next_slot(g) * SLOT + g_rand_int_range(g->rand, 16, 512);
    uint32_t total = 0;
    uint16_t head;

    for (i = 0; i < outs; i++) {
        uint32_t len = 1u << g_rand_int_range(g->rand, 0, 15);

        s[n++] = (DrvSegment) {
            OUT + g_rand_int_range(g->rand, 0, OUT_SIZE - len), len, false,
        };
    }
    ins = g_rand_int_range(g->rand, outs ? 0 : 1, 3);
    for (i = 0; i < ins; i++) {
        uint32_t len = g_rand_int_range(g->rand, 1, IN_MAX / 2);

        s[n++] = (DrvSegment) { at + total, len, true };
        total += len;
    }
    head = drv_add(&g->vm.q[g->queue], s, n,
                   g->vm.features & INDIRECT && chance(g->rand, 80));
    g->in_len[head] = total;
    g->in_at[head] = at;
    g->in_flight++;
    g->sent++;
    drv_kick(&g->vm.q[g->queue]);
}

/* Around the in-parts of the requests that were under way, all is guard. */
static void check_guards(Guest *g, const bool *mine)
{
    g_autofree uint8_t *buf = g_malloc(SLOT * SLOTS);
    size_t i;

    qtest_bufread(g->vm.qts, IN, buf, SLOT * SLOTS);
    for (i = 0; i < SLOT * SLOTS; i++) {
        if (!mine[i] && buf[i] != GUARD) {
            g_error("byte 0x%zx of the parts in is %02x: written by nobody's "
                    "leave", i, buf[i]);
        }
    }
}

static void collect(Guest *g, bool *mine)
{
    uint16_t id;
    uint32_t len;

    while (drv_get_used(&g->vm.q[g->queue], &id, &len)) {
        g_assert_cmpuint(len, <=, g->in_len[id]);
        memset(mine + (g->in_at[id] - IN), true, g->in_len[id]);
        g->in_flight--;
        g->used++;
    }
}

static void verify(Guest *g, bool *mine)
{
    DrvQueue *q = &g->vm.q[g->queue];
    unsigned i;

    /* Also those that are still there may have been written to. */
    for (i = 0; i < q->num; i++) {
        if (q->chain[i]) {
            memset(mine + (g->in_at[i] - IN), true, g->in_len[i]);
        }
    }
    check_guards(g, mine);
    rvm_check(&g->vm, OUT, OUT_SEED, OUT_SIZE);
    memset(mine, false, SLOT * SLOTS);
    qtest_memset(g->vm.qts, IN, GUARD, SLOT * SLOTS);
}

static void reset(Guest *g, bool *mine)
{
    /* From the reset on nothing is written for what was before. */
    rvm_reset(&g->vm);
    collect(g, mine);
    verify(g, mine);
    rvm_drive_again(&g->vm);
    g->in_flight = 0;
    g->resets++;
}

static void stop_and_cont(Guest *g, bool *mine)
{
    qtest_qmp_assert_success(g->vm.qts, "{ 'execute': 'stop' }");
    collect(g, mine);
    qtest_qmp_assert_success(g->vm.qts, "{ 'execute': 'cont' }");
    g->stops++;
}

static void step(Guest *g, bool *mine)
{
    DrvQueue *q = &g->vm.q[g->queue];

    if (rvm_status(&g->vm) & VIRTIO_CONFIG_S_NEEDS_RESET) {
        reset(g, mine);
    }
    if (g->in_flight < 12 && !q->busy[q->num - 8]) {
        send_one(g);
    }
    collect(g, mine);
    switch (g_rand_int_range(g->rand, 0, 400)) {
    case 0:
        stop_and_cont(g, mine);
        break;
    case 1:
        reset(g, mine);
        break;
    case 2 ... 6:
        qobject_unref(rvm_relay(&g->vm));
        break;
    }
    /* It may have swallowed one: that is its right. */
    if (g->in_flight >= 12 && chance(g->rand, 5)) {
        reset(g, mine);
    }
}

static unsigned env_number(const char *name, unsigned otherwise)
{
    const char *value = g_getenv(name);

    return value ? g_ascii_strtoull(value, NULL, 10) : otherwise;
}

static void test_fuzz(gconstpointer data)
{
    const Kind *k = data;
    unsigned seed = env_number("RELAY_FUZZ_SEED", g_random_int());
    int64_t end;
    g_autofree bool *mine = g_new0(bool, SLOT * SLOTS);
    Guest *g = g_new0(Guest, 1);
    RelayVm *vm = &g->vm;
    Hostile h = { 0 };
    GThread *thread;

    if (rvm_skip_plain()) {
        g_free(g);
        return;
    }
    g_test_message("%s: seed %u", k->name, seed);
    rvm_init(vm);
    vm->device = k->device;
    vm->props = k->props;
    vm->relay = k->relay;
    vm->more = "-object iothread,id=io0";
    vm->wanted = VUB_BIT(VIRTIO_F_VERSION_1) | k->features;
    vm->b->gives_up = seed & 1;
    if (k->no_tables) {
        vm->b->features &= ~INDIRECT;
    }
    g->queue = 1;
    if (g_str_equal(k->device, RVM_BLK)) {
        vm->b->protocol_features |= VUB_BIT(VHOST_USER_PROTOCOL_F_CONFIG);
        vm->nqueues = 1;
        g->queue = 0;
    }
    rvm_start(vm);
    rvm_drive(vm);
    rvm_fill(vm, OUT, OUT_SEED, OUT_SIZE);
    qtest_memset(vm->qts, IN, GUARD, SLOT * SLOTS);
    g->rand = g_rand_new_with_seed(seed);
    h = (Hostile) {
        .b = vm->b,
        .queue = g->queue,
        .rand = g_rand_new_with_seed(seed + 1),
    };
    thread = g_thread_new("hostile", hostile_thread, &h);

    end = g_get_monotonic_time() +
          env_number("RELAY_FUZZ_SECONDS", SECONDS) * G_USEC_PER_SEC;
    while (g_get_monotonic_time() < end) {
        step(g, mine);
    }
    qatomic_set(&h.quit, true);
    g_thread_join(thread);
    reset(g, mine);
    g_test_message("%u sent, %u completed, %u used, %u resets, %u stops",
                   g->sent, h.completions, g->used, g->resets, g->stops);
    /* Else nothing was tried. */
    g_assert_cmpuint(g->used, >, 20);
    g_assert_cmpuint(g->resets, >, 2);
    g_rand_free(h.rand);
    g_rand_free(g->rand);
    rvm_quit(vm);
    g_free(g);
}

int main(int argc, char **argv)
{
    unsigned i;

    g_test_init(&argc, &argv, NULL);
    for (i = 0; i < G_N_ELEMENTS(kinds); i++) {
        g_autofree char *path = g_strdup_printf("relay/fuzz/%s",
                                                kinds[i].name);

        qtest_add_data_func(path, &kinds[i], test_fuzz);
    }
    return g_test_run();
}
