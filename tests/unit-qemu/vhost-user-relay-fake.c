/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A guest and a back end for tests of the relay's queues: see
 * vhost-user-relay-fake.h
 */

#include "qemu/osdep.h"
#include "block/aio.h"
#include "hw/dedup/qemu-compat.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "standard-headers/linux/virtio_ring.h"
#include "vhost-user-relay-fake.h"

Fake fake;
static bool in_main_loop;
static uint64_t random_state;
static struct {
    const uint8_t *data;
    size_t size;
} fed;

void fake_feed(const uint8_t *data, size_t size)
{
    fed.data = data;
    fed.size = size;
}

bool fake_is_fed(void)
{
    return fed.size > 0;
}

static uint64_t next_random(void)
{
    uint64_t x = random_state += 0x9e3779b97f4a7c15ULL;


    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

void fake_seed(uint64_t seed)
{
    random_state = seed;
}

uint32_t fake_random(uint32_t n)
{
    uint32_t x;

    if (fed.size < 2) {
        fed.size = 0;
        return next_random() % n;
    }
    x = lduw_le_p(fed.data);
    fed.data += 2;
    fed.size -= 2;
    return x % n;
}

static bool packed(void)
{
    return virtio_vdev_has_feature(fake.vdev, VIRTIO_F_RING_PACKED);
}

/* hw/virtio/virtio.c */

static hwaddr avail_slot(const VirtQueue *vq, uint16_t idx)
{
    return FAKE_RAM + vq->index * FAKE_PAGE + 4 + 2 * (idx % vq->num);
}

hwaddr virtio_queue_get_avail_addr(VirtIODevice *vdev, int n)
{
    return FAKE_RAM + n * FAKE_PAGE;
}

/* Only the avail ring is anywhere. */
hwaddr virtio_queue_get_desc_addr(VirtIODevice *vdev, int n)
{
    return FAKE_RAM + fake.moved;
}

hwaddr virtio_queue_get_used_addr(VirtIODevice *vdev, int n)
{
    return FAKE_RAM;
}

hwaddr virtio_queue_get_desc_size(VirtIODevice *vdev, int n)
{
    return 1;
}

hwaddr virtio_queue_get_avail_size(VirtIODevice *vdev, int n)
{
    return FAKE_PAGE;
}

hwaddr virtio_queue_get_used_size(VirtIODevice *vdev, int n)
{
    return 1;
}

VirtQueue *virtio_get_queue(VirtIODevice *vdev, int n)
{
    return &fake.vq[n];
}

int virtio_queue_get_num(VirtIODevice *vdev, int n)
{
    return fake.vq[n].num;
}

unsigned int virtio_queue_get_last_avail_idx(VirtIODevice *vdev, int n)
{
    return fake.vq[n].last_avail_idx;
}

EventNotifier *virtio_queue_get_host_notifier(VirtQueue *vq)
{
    return &vq->host;
}

EventNotifier *virtio_queue_get_guest_notifier(VirtQueue *vq)
{
    return &vq->guest;
}

void virtio_queue_set_notification(VirtQueue *vq, int enable)
{
    vq->notification = enable;
}

/* As QEMU 10.2 for packed rings, this does not look at vdev->broken. */
int virtio_queue_empty(VirtQueue *vq)
{
    return vq->last_avail_idx == vq->avail_idx;
}

void virtio_notify_irqfd(VirtIODevice *vdev, VirtQueue *vq)
{
    vq->interrupts++;
}

void virtio_error(VirtIODevice *vdev, const char *fmt, ...)
{
    va_list ap;

    /* It interrupts the guest, which is for the main loop to do. */
    g_assert_true(in_main_loop);
    fake.errors++;
    g_free(fake.error);
    va_start(ap, fmt);
    fake.error = g_strdup_vprintf(fmt, ap);
    va_end(ap);
}

static bool ordered(void)
{
    return packed() || virtio_vdev_has_feature(fake.vdev, VIRTIO_F_IN_ORDER);
}

static unsigned ndescs(const VirtQueue *vq, unsigned head)
{
    const FakeRequest *r = vq->table[head];

    return packed() ? r->n_out + r->n_in : 1;
}

static void map_part(const FakeRequest *r, unsigned i, hwaddr *addr,
                     struct iovec *iov)
{
    hwaddr at = r->part[i].addr;

    *addr = at;
    iov->iov_base = fake_in_ram(at, 1) ? fake_ram(at) : fake.ram;
    iov->iov_len = r->part[i].len;
    fake.maps++;
}

void *virtqueue_pop(VirtQueue *vq, size_t sz)
{
    VirtQueueElement *elem;
    FakeRequest *r;
    unsigned head, n;

    if (fake.vdev->broken || virtio_queue_empty(vq)) {
        return NULL;
    }
    g_assert_cmpuint(vq->popped->len, <, vq->num);
    head = lduw_le_p(fake_ram(avail_slot(vq, vq->last_avail_idx++)));
    g_assert_cmpuint(head, <, vq->num);
    r = vq->table[head];
    g_assert_true(r);
    n = r->n_out + r->n_in;
    sz = QEMU_ALIGN_UP(sz, sizeof(hwaddr));
    elem = g_malloc(sz + n * (sizeof(hwaddr) + sizeof(struct iovec)));
    memset(elem, 0xee, sz);
    elem->index = head;
    elem->ndescs = ndescs(vq, head);
    elem->out_num = r->n_out;
    elem->in_num = r->n_in;
    elem->out_addr = (void *)elem + sz;
    elem->in_addr = elem->out_addr + r->n_out;
    elem->out_sg = (struct iovec *)(elem->out_addr + n);
    elem->in_sg = elem->out_sg + r->n_out;
    for (unsigned i = 0; i < n; i++) {
        map_part(r, i, &elem->out_addr[i], &elem->out_sg[i]);
    }
    vq->inuse += elem->ndescs;
    g_array_append_val(vq->popped, head);
    return elem;
}

static unsigned popped_at(const VirtQueue *vq, unsigned i)
{
    return g_array_index(vq->popped, unsigned, i);
}

void virtqueue_fill(VirtQueue *vq, const VirtQueueElement *elem,
                    unsigned int len, unsigned int idx)
{
    FakeUsed used = { .head = elem->index, .len = len };
    unsigned i = 0;

    /* That would unmap what is unmapped. */
    g_assert_cmpuint(elem->in_num + elem->out_num, ==, 0);
    g_assert_cmpuint(idx, ==, vq->filled->len);
    while (i < vq->popped->len && popped_at(vq, i) != elem->index) {
        i++;
    }
    g_assert_cmpuint(i, <, vq->popped->len);
    g_assert_true(!ordered() || i == 0);
    g_array_remove_index(vq->popped, i);
    g_array_append_val(vq->filled, used);
}

void virtqueue_flush(VirtQueue *vq, unsigned int count)
{
    g_assert_cmpuint(count, ==, vq->filled->len);
    for (unsigned i = 0; i < count; i++) {
        FakeUsed *used = &g_array_index(vq->filled, FakeUsed, i);

        vq->inuse -= ndescs(vq, used->head);
        g_clear_pointer(&vq->table[used->head], g_free);
        g_array_append_val(vq->used, *used);
    }
    g_array_set_size(vq->filled, 0);
}

bool virtqueue_rewind(VirtQueue *vq, unsigned int num)
{
    unsigned n = 0, head;

    if (num > vq->inuse) {
        return false;
    }
    g_assert_cmpuint(vq->filled->len, ==, 0);
    vq->inuse -= num;
    while (num) {
        g_assert_cmpuint(vq->popped->len, >, 0);
        head = popped_at(vq, vq->popped->len - 1);
        g_assert_cmpuint(ndescs(vq, head), <=, num);
        num -= ndescs(vq, head);
        g_array_set_size(vq->popped, vq->popped->len - 1);
        n++;
    }
    vq->last_avail_idx -= n;
    return true;
}

/* Of glib; the relay asks for it when a queue stops. */
gint64 g_get_monotonic_time(void)
{
    return fake.clock ? fake.clock() : get_clock() / 1000;
}

static const TypeInfo vdev_type = {
    .name = TYPE_VIRTIO_DEVICE,
    .parent = TYPE_OBJECT,
    .instance_size = sizeof(VirtIODevice),
};

void fake_main(int *argc, char ***argv)
{
    g_test_init(argc, argv, NULL);
    fake_seed(g_test_rand_int());
    module_call_init(MODULE_INIT_QOM);
    type_register_static(&vdev_type);
    qemu_init_main_loop(&error_abort);
}

void fake_main_loop(void)
{
    in_main_loop = true;
    while (aio_poll(qemu_get_aio_context(), false)) {
        /* again */
    }
    in_main_loop = false;
}

void fake_new(uint64_t area_bytes, uint16_t id, uint64_t features)
{
    fake = (Fake) {
        .vdev = VIRTIO_DEVICE(object_new(TYPE_VIRTIO_DEVICE)),
        .ram = g_malloc(FAKE_RAM_BYTES),
    };
    for (unsigned i = 0; i < FAKE_RAM_BYTES; i++) {
        fake.ram[i] = i * 31 + i / FAKE_PAGE;
    }
    fake.vdev->name = "fake";
    fake.vdev->device_id = id;
    fake.vdev->guest_features = features;
    fake.vdev->dma_as = &fake.as;
    vhost_user_relay_pool_init(&fake.pool);
    fake.pool.area = vhost_user_relay_area_new(area_bytes, &error_abort);
    for (unsigned i = 0; i < FAKE_QUEUES; i++) {
        VirtQueue *vq = &fake.vq[i];
        VhostUserRelayQueue *q = &fake.q[i];

        vq->index = i;
        vq->popped = g_array_new(false, false, sizeof(unsigned));
        vq->filled = g_array_new(false, false, sizeof(FakeUsed));
        vq->used = g_array_new(false, false, sizeof(FakeUsed));
        event_notifier_init(&vq->host, 0);
        event_notifier_init(&vq->guest, 0);
        q->pool = &fake.pool;
        q->vdev = fake.vdev;
        q->vq = vq;
        q->index = i;
        q->guest_call = event_notifier_get_wfd(&vq->guest);
        event_notifier_init(&q->kick, 0);
        event_notifier_init(&q->call, 0);
    }
}

static void forget_requests(VirtQueue *vq)
{
    for (unsigned i = 0; i < vq->num; i++) {
        g_free(vq->table[i]);
    }
    g_clear_pointer(&vq->table, g_free);
    g_array_set_size(vq->popped, 0);
}

void fake_free(void)
{
    fake_main_loop();
    g_assert_cmpuint(fake.maps, ==, 0);
    g_assert_cmpuint(fake.pool.in_flight, ==, 0);
    g_assert_true(QTAILQ_EMPTY(&fake.pool.waiters));
    for (unsigned i = 0; i < FAKE_QUEUES; i++) {
        VirtQueue *vq = &fake.vq[i];

        g_assert_false(fake.be[i].started);
        forget_requests(vq);
        g_array_free(vq->popped, true);
        g_array_free(vq->filled, true);
        g_array_free(vq->used, true);
        event_notifier_cleanup(&vq->host);
        event_notifier_cleanup(&vq->guest);
        event_notifier_cleanup(&fake.q[i].kick);
        event_notifier_cleanup(&fake.q[i].call);
    }
    vhost_user_relay_area_free(fake.pool.area);
    g_free(fake.ram);
    g_free(fake.error);
    g_assert_cmpuint(OBJECT(fake.vdev)->ref, ==, 1);
    object_unref(OBJECT(fake.vdev));
}

void fake_reset(unsigned i, unsigned num, uint16_t idx)
{
    VirtQueue *vq = &fake.vq[i];

    forget_requests(vq);
    vq->num = num;
    vq->table = g_new0(FakeRequest *, num);
    vq->avail_idx = vq->last_avail_idx = idx;
    vq->inuse = 0;
    g_array_set_size(vq->used, 0);
    vq->interrupts = 0;
    memset(fake.ram + i * FAKE_PAGE, 0xff, FAKE_PAGE);
}

void fake_start(unsigned i, unsigned num, uint64_t features)
{
    g_assert_false(fake.be[i].started);
    if (!fake.vq[i].num) {
        fake_reset(i, num, 0);
    }
    g_assert_true(vhost_user_relay_queue_start(&fake.q[i], num, features,
                                               &error_abort));
    fake.q[i].enabled = true;
    vhost_user_relay_queue_set_call(
        &fake.q[i], event_notifier_get_wfd(&fake.vq[i].guest), false);
    fake.be[i] = (FakeBackend) { .started = true, .num = num };
}

void fake_drain(unsigned i, int64_t limit_ms)
{
    vhost_user_relay_queue_drain(&fake.q[i], limit_ms);
}

void fake_stop(unsigned i, int taken)
{
    vhost_user_relay_queue_stop(&fake.q[i], taken);
    fake.be[i].started = false;
}

/* The guest */

FakeRequest *fake_request(unsigned i, unsigned head)
{
    VirtQueue *vq = &fake.vq[i];

    g_assert_null(vq->table[head]);
    vq->table[head] = g_new0(FakeRequest, 1);
    return vq->table[head];
}

static void add_part(FakeRequest *r, hwaddr addr, uint32_t len)
{
    unsigned n = r->n_out + r->n_in;

    g_assert_cmpuint(n, <, VHOST_USER_RELAY_DESCS_MAX);
    r->part[n].addr = addr;
    r->part[n].len = len;
}

void fake_out(FakeRequest *r, hwaddr addr, uint32_t len)
{
    g_assert_cmpuint(r->n_in, ==, 0);
    add_part(r, addr, len);
    r->n_out++;
}

void fake_in(FakeRequest *r, hwaddr addr, uint32_t len)
{
    add_part(r, addr, len);
    r->n_in++;
}

void fake_offer(unsigned i, unsigned head)
{
    VirtQueue *vq = &fake.vq[i];

    stw_le_p(fake_ram(avail_slot(vq, vq->avail_idx++)), head);
}

unsigned fake_avail(unsigned i, uint16_t idx)
{
    return lduw_le_p(fake_ram(avail_slot(&fake.vq[i], idx)));
}

unsigned fake_n_used(unsigned i)
{
    return fake.vq[i].used->len;
}

FakeUsed fake_used(unsigned i, unsigned nth)
{
    g_assert_cmpuint(nth, <, fake_n_used(i));
    return g_array_index(fake.vq[i].used, FakeUsed, nth);
}

/* The back end */

static uint8_t *ring_at(unsigned i, size_t offset)
{
    return (uint8_t *)vhost_user_relay_area_ptr(fake.pool.area,
                                                fake.q[i].ring_page) + offset;
}

static uint8_t *used_at(unsigned i, size_t offset)
{
    return ring_at(i, vhost_user_relay_ring_used_offset(fake.be[i].num) +
                      offset);
}

/* What @gpa is in the only region of its table. */
static uint8_t *translate(uint64_t gpa, uint32_t len)
{
    uint64_t size = vhost_user_relay_area_size(fake.pool.area);

    g_assert_cmphex(gpa, >=, VHOST_USER_RELAY_GPA);
    gpa -= VHOST_USER_RELAY_GPA;
    g_assert_cmpuint(len, >, 0);
    g_assert_cmpuint(len, <=, size);
    g_assert_cmphex(gpa, <=, size - len);
    return (uint8_t *)vhost_user_relay_area_ptr(fake.pool.area, 0) + gpa;
}

static void read_chain(FakeChain *chain, const uint8_t *table, unsigned num,
                       unsigned at)
{
    unsigned flags;

    do {
        const uint8_t *d = table + 16 * at;
        uint32_t len = ldl_le_p(d + 8);
        bool write;

        g_assert_cmpuint(at, <, num);
        g_assert_cmpuint(chain->n, <, VHOST_USER_RELAY_DESCS_MAX);
        flags = lduw_le_p(d + 12);
        if (flags & VRING_DESC_F_INDIRECT) {
            g_assert_true(flags == VRING_DESC_F_INDIRECT && !chain->table);
            g_assert_cmpuint(len % 16, ==, 0);
            chain->table = true;
            read_chain(chain, translate(ldq_le_p(d), len), len / 16, 0);
            return;
        }
        write = flags & VRING_DESC_F_WRITE;
        g_assert_true(write || !chain->n || !chain->part[chain->n - 1].write);
        chain->part[chain->n].ptr = translate(ldq_le_p(d), len);
        chain->part[chain->n].len = len;
        chain->part[chain->n++].write = write;
        at = lduw_le_p(d + 14);
    } while (flags & VRING_DESC_F_NEXT);
}

bool fake_get(unsigned i, FakeChain *chain)
{
    FakeBackend *be = &fake.be[i];
    const uint8_t *avail = ring_at(i, 16 * be->num);

    if (lduw_le_p(avail + 2) == be->avail_idx) {
        return false;
    }
    chain->head = lduw_le_p(avail + 4 + 2 * (be->avail_idx++ % be->num));
    chain->n = 0;
    chain->table = false;
    read_chain(chain, ring_at(i, 0), be->num, chain->head);
    return true;
}

void fake_set_used_idx(unsigned i, uint16_t idx)
{
    fake.be[i].used_idx = idx;
    stw_le_p(used_at(i, 2), idx);
}

void fake_use(unsigned i, uint32_t id, uint32_t len)
{
    FakeBackend *be = &fake.be[i];
    unsigned slot = be->used_idx % be->num;

    stl_le_p(used_at(i, 4 + 8 * slot), id);
    stl_le_p(used_at(i, 8 + 8 * slot), len);
    fake_set_used_idx(i, be->used_idx + 1);
}

void fake_write(const FakeChain *chain, uint8_t byte, uint64_t len)
{
    for (unsigned i = 0; i < chain->n; i++) {
        if (chain->part[i].write) {
            uint32_t n = MIN(len, chain->part[i].len);

            memset(chain->part[i].ptr, byte, n);
            len -= n;
        }
    }
}

void fake_scribble(void)
{
    uint64_t *p = vhost_user_relay_area_ptr(fake.pool.area, 0);
    uint64_t n = vhost_user_relay_area_size(fake.pool.area) / sizeof(*p);

    for (uint64_t i = 0; i < n; i++) {
        p[i] = next_random();
    }
    for (unsigned i = 0; i < FAKE_QUEUES; i++) {
        if (fake.be[i].started) {
            fake_set_used_idx(i, fake.be[i].used_idx);
        }
    }
}

unsigned fake_free_pages(void)
{
    uint64_t all = vhost_user_relay_area_size(fake.pool.area) / FAKE_PAGE;
    g_autofree unsigned *got = g_new(unsigned, all);
    unsigned n = 0;

    while (vhost_user_relay_area_alloc(fake.pool.area, 1, &got[n])) {
        n++;
    }
    for (unsigned i = 0; i < n; i++) {
        vhost_user_relay_area_release(fake.pool.area, got[i], 1);
    }
    return n;
}
