/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A driver of virtqueues for tests
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "libqtest.h"
#include "vring-driver.h"
#include "standard-headers/linux/pci_regs.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_pci.h"

#define DESC 16
#define F_AVAIL (1 << 7)
#define F_USED (1 << 15)

static void common_writew(QVirtioPCIDevice *dev, unsigned field,
                          uint16_t value)
{
    qpci_io_writew(dev->pdev, dev->bar, dev->common_cfg_offset + field,
                   value);
}

static uint16_t common_readw(QVirtioPCIDevice *dev, unsigned field)
{
    return qpci_io_readw(dev->pdev, dev->bar, dev->common_cfg_offset + field);
}

void drv_setup(DrvQueue *q, QVirtioPCIDevice *dev, unsigned index,
               uint16_t num, uint64_t features, uint64_t iova)
{
    const QVirtioBus *bus = dev->vdev.bus;

    g_assert_cmpuint(index, <, DRV_QUEUES);
    *q = (DrvQueue) {
        .qts = dev->pdev->bus->qts,
        .dev = dev,
        .index = index,
        .packed = features & (1ULL << VIRTIO_F_RING_PACKED),
        .event_idx = features & (1ULL << VIRTIO_RING_F_EVENT_IDX),
        .iova = iova,
        .desc = DRV_RINGS + index * DRV_RING_SIZE,
        .tables = DRV_TABLES + index * DRV_TABLES_SIZE,
        .wrap = true,
        .used_wrap = true,
    };
    q->avail = q->desc + DRV_RING_SIZE / 2;
    q->used = q->avail + DRV_RING_SIZE / 4;
    qtest_memset(q->qts, q->desc, 0, DRV_RING_SIZE);

    bus->queue_select(&dev->vdev, index);
    q->num = bus->get_queue_size(&dev->vdev);
    g_assert_cmpuint(q->num, >, 0);
    if (num) {
        g_assert_cmpuint(num, <=, q->num);
        q->num = num;
        common_writew(dev, offsetof(struct virtio_pci_common_cfg, queue_size),
                      num);
    }
    g_assert_cmpuint(q->num, <=, DRV_MAX);
    q->vq.vq = (QVirtQueue) {
        .vdev = &dev->vdev,
        .index = index,
        .size = q->num,
        .desc = q->desc + iova,
        .avail = q->avail + iova,
        .used = q->used + iova,
    };
    q->vq.msix_entry = -1;
    bus->set_queue_address(&dev->vdev, &q->vq.vq);
    q->vq.notify_offset = dev->notify_cfg_offset +
        dev->notify_off_multiplier *
        common_readw(dev, offsetof(struct virtio_pci_common_cfg,
                                   queue_notify_off));
    common_writew(dev, offsetof(struct virtio_pci_common_cfg, queue_enable),
                  1);
}

/* Each vector stores into a word of RAM of its own. */
static uint64_t msix_word(DrvQueue *q)
{
    return DRV_MSIX + q->vq.msix_entry * 4;
}

static void msix_write(DrvQueue *q, unsigned field, uint32_t value)
{
    QPCIDevice *pdev = q->dev->pdev;

    qpci_io_writel(pdev, pdev->msix_table_bar, pdev->msix_table_off +
                   q->vq.msix_entry * PCI_MSIX_ENTRY_SIZE + field, value);
}

void drv_msix(DrvQueue *q, uint16_t entry)
{
    q->vq.msix_entry = entry;
    qtest_writel(q->qts, msix_word(q), 0);
    msix_write(q, PCI_MSIX_ENTRY_LOWER_ADDR, msix_word(q));
    msix_write(q, PCI_MSIX_ENTRY_UPPER_ADDR, 0);
    msix_write(q, PCI_MSIX_ENTRY_DATA, 0x1234);
    drv_msix_mask(q, false);
    q->dev->vdev.bus->queue_select(&q->dev->vdev, q->index);
    common_writew(q->dev, offsetof(struct virtio_pci_common_cfg,
                                   queue_msix_vector), entry);
    g_assert_cmpuint(common_readw(q->dev,
                                  offsetof(struct virtio_pci_common_cfg,
                                           queue_msix_vector)), ==, entry);
}

void drv_msix_mask(DrvQueue *q, bool mask)
{
    msix_write(q, PCI_MSIX_ENTRY_VECTOR_CTRL,
               mask ? PCI_MSIX_ENTRY_CTRL_MASKBIT : 0);
}

bool drv_interrupted(DrvQueue *q)
{
    QVirtioPCIDevice *dev = q->dev;

    if (!dev->pdev->msix_enabled) {
        return qpci_io_readb(dev->pdev, dev->bar, dev->isr_cfg_offset) & 1;
    }
    if (qtest_readl(q->qts, msix_word(q)) == 0) {
        return false;
    }
    qtest_writel(q->qts, msix_word(q), 0);
    return true;
}

void drv_wait_interrupt(DrvQueue *q)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

    while (!drv_interrupted(q)) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

uint16_t drv_next_head(const DrvQueue *q)
{
    unsigned i;

    for (i = 0; i < q->num; i++) {
        uint16_t id = q->high_first ? q->num - 1 - i : i;

        if (!q->busy[id]) {
            return id;
        }
    }
    g_error("queue %u: no free descriptor", q->index);
}

static uint16_t take_free(DrvQueue *q)
{
    uint16_t id = drv_next_head(q);

    q->busy[id] = true;
    return id;
}

static void put_desc(uint8_t *p, uint64_t addr, uint32_t len, uint16_t third,
                     uint16_t fourth)
{
    stq_le_p(p, addr);
    stl_le_p(p + 8, len);
    stw_le_p(p + 12, third);
    stw_le_p(p + 14, fourth);
}

/* A table for @head; where it is. */
static uint64_t write_table(DrvQueue *q, uint16_t head, const DrvSegment *s,
                            unsigned n)
{
    g_autofree uint8_t *table = g_malloc(n * DESC);
    /* Each head has a place of its own; large tables, one of few. */
    uint64_t stride = DRV_TABLES_SIZE / q->num;
    uint64_t addr = q->tables + head * stride;
    unsigned i;

    if (n * DESC > stride) {
        stride = DRV_MAX * DESC;
        addr = q->tables + head % (DRV_TABLES_SIZE / stride) * stride;
    }
    g_assert_cmpuint(n * DESC, <=, stride);
    for (i = 0; i < n; i++) {
        uint16_t flags = s[i].write ? VRING_DESC_F_WRITE : 0;

        if (q->packed) {
            put_desc(table + i * DESC, s[i].addr + q->iova, s[i].len, 0,
                     flags);
        } else {
            bool last = i == n - 1;

            put_desc(table + i * DESC, s[i].addr + q->iova, s[i].len,
                     flags | (last ? 0 : VRING_DESC_F_NEXT),
                     last ? 0 : i + 1);
        }
    }
    qtest_bufwrite(q->qts, addr, table, n * DESC);
    return addr;
}

static void write_desc(DrvQueue *q, unsigned i, uint64_t addr, uint32_t len,
                       uint16_t third, uint16_t fourth)
{
    uint8_t d[DESC];

    put_desc(d, addr + q->iova, len, third, fourth);
    qtest_bufwrite(q->qts, q->desc + i * DESC, d, DESC);
}

static uint16_t add_split(DrvQueue *q, const DrvSegment *s, unsigned n,
                          bool indirect)
{
    uint16_t head = take_free(q), at = head;
    unsigned i;

    q->chain[head] = indirect ? 1 : n;
    if (indirect) {
        write_desc(q, head, write_table(q, head, s, n), n * DESC,
                   VRING_DESC_F_INDIRECT, 0);
    } else {
        for (i = 0; i < n; i++) {
            uint16_t flags = s[i].write ? VRING_DESC_F_WRITE : 0;

            q->next[at] = 0;
            if (i < n - 1) {
                q->next[at] = take_free(q);
                flags |= VRING_DESC_F_NEXT;
            }
            write_desc(q, at, s[i].addr, s[i].len, flags, q->next[at]);
            at = q->next[at];
        }
    }
    q->pending[q->unpublished++] = head;
    return head;
}

/* The flags that make a descriptor of a packed ring available. */
static uint16_t packed_avail(DrvQueue *q)
{
    return q->wrap ? F_AVAIL : F_USED;
}

static void packed_step(DrvQueue *q)
{
    if (++q->avail_idx == q->num) {
        q->avail_idx = 0;
        q->wrap = !q->wrap;
    }
}

static void packed_slot(DrvQueue *q, uint64_t addr, uint32_t len, uint16_t id,
                        uint16_t flags)
{
    flags |= packed_avail(q);
    if (q->unpublished == 0) {
        /* The first one is shown last: as if it were used, for now. */
        q->first_slot = q->avail_idx;
        q->first_flags = flags;
        flags ^= F_AVAIL;
    }
    write_desc(q, q->avail_idx, addr, len, id, flags);
    q->unpublished++;
    packed_step(q);
}

static uint16_t add_packed(DrvQueue *q, const DrvSegment *s, unsigned n,
                           bool indirect)
{
    uint16_t id = take_free(q);
    unsigned i;

    q->chain[id] = indirect ? 1 : n;
    if (indirect) {
        packed_slot(q, write_table(q, id, s, n), n * DESC, id,
                    VRING_DESC_F_INDIRECT);
        return id;
    }
    for (i = 0; i < n; i++) {
        packed_slot(q, s[i].addr, s[i].len, id,
                    (s[i].write ? VRING_DESC_F_WRITE : 0) |
                    (i < n - 1 ? VRING_DESC_F_NEXT : 0));
    }
    return id;
}

uint16_t drv_add(DrvQueue *q, const DrvSegment *s, unsigned n, bool indirect)
{
    return q->packed ? add_packed(q, s, n, indirect)
                     : add_split(q, s, n, indirect);
}

/* Entries of the available ring from the @i-th pending one up to its end. */
static unsigned write_avail(DrvQueue *q, unsigned i)
{
    unsigned at = q->avail_idx % q->num;
    unsigned n = MIN(q->unpublished - i, q->num - at), k;
    uint16_t entries[DRV_MAX];

    for (k = 0; k < n; k++) {
        entries[k] = cpu_to_le16(q->pending[i + k]);
    }
    qtest_bufwrite(q->qts, q->avail + 4 + at * 2, entries, n * 2);
    q->avail_idx += n;
    return n;
}

void drv_publish(DrvQueue *q)
{
    unsigned i;

    if (q->packed) {
        if (q->unpublished) {
            qtest_writew(q->qts, q->desc + q->first_slot * DESC + 14,
                         q->first_flags);
        }
    } else {
        for (i = 0; i < q->unpublished;) {
            i += write_avail(q, i);
        }
        qtest_writew(q->qts, q->avail + 2, q->avail_idx);
    }
    q->unpublished = 0;
}

void drv_resend(DrvQueue *q, const uint16_t *heads, unsigned n)
{
    unsigned i;

    g_assert_false(q->packed);
    for (i = 0; i < n; i++) {
        g_assert_false(q->busy[heads[i]]);
        q->busy[heads[i]] = true;
        q->chain[heads[i]] = 1;
        q->pending[q->unpublished++] = heads[i];
    }
}

void drv_notify(DrvQueue *q)
{
    q->dev->vdev.bus->virtqueue_kick(&q->dev->vdev, &q->vq.vq);
}

/* Does the device want to hear of what was published since @old? */
bool drv_wants_kick(DrvQueue *q, uint16_t old)
{
    uint16_t event, flags;

    if (q->packed) {
        flags = qtest_readw(q->qts, q->used + 2);
        /* 2: at a certain descriptor; to notify too often is no fault. */
        return flags != 1;
    }
    if (q->event_idx) {
        event = qtest_readw(q->qts, q->used + 4 + q->num * 8);
        return (uint16_t)(q->avail_idx - event - 1) <
               (uint16_t)(q->avail_idx - old);
    }
    return !(qtest_readw(q->qts, q->used) & VRING_USED_F_NO_NOTIFY);
}

void drv_kick(DrvQueue *q)
{
    uint16_t old = q->avail_idx;

    drv_publish(q);
    if (drv_wants_kick(q, old)) {
        drv_notify(q);
    }
}

uint16_t drv_send(DrvQueue *q, const DrvSegment *s, unsigned n, bool indirect)
{
    uint16_t head = drv_add(q, s, n, indirect);

    drv_kick(q);
    return head;
}

static void release(DrvQueue *q, uint16_t id)
{
    uint16_t n = q->chain[id], at = id;

    g_assert_cmpuint(id, <, q->num);
    g_assert_true(q->busy[id]);
    g_assert_cmpuint(n, >, 0);
    q->chain[id] = 0;
    if (q->packed) {
        q->busy[id] = false;
        q->last_used += n;
        if (q->last_used >= q->num) {
            q->last_used -= q->num;
            q->used_wrap = !q->used_wrap;
        }
        return;
    }
    while (n--) {
        q->busy[at] = false;
        at = q->next[at];
    }
    q->last_used++;
}

bool drv_get_used(DrvQueue *q, uint16_t *id, uint32_t *len)
{
    uint8_t d[DESC];
    uint16_t flags, got;

    if (q->packed) {
        qtest_bufread(q->qts, q->desc + q->last_used * DESC, d, DESC);
        flags = lduw_le_p(d + 14);
        if (!!(flags & F_AVAIL) != q->used_wrap ||
            !!(flags & F_USED) != q->used_wrap) {
            return false;
        }
        /* Read again: it is whole only now. */
        qtest_bufread(q->qts, q->desc + q->last_used * DESC, d, DESC);
        got = lduw_le_p(d + 12);
        *len = ldl_le_p(d + 8);
    } else {
        if (qtest_readw(q->qts, q->used + 2) == q->last_used) {
            return false;
        }
        qtest_bufread(q->qts, q->used + 4 + q->last_used % q->num * 8, d, 8);
        g_assert_cmpuint(ldl_le_p(d), <, q->num);
        got = ldl_le_p(d);
        *len = ldl_le_p(d + 4);
    }
    *id = got;
    release(q, got);
    return true;
}

void drv_wait_used(DrvQueue *q, uint16_t *id, uint32_t *len)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;

    while (!drv_get_used(q, id, len)) {
        if (g_get_monotonic_time() > end) {
            g_error("queue %u: nothing is used", q->index);
        }
    }
}

void drv_expect_used(DrvQueue *q, uint16_t id, uint32_t len)
{
    uint16_t got;
    uint32_t got_len;

    drv_wait_used(q, &got, &got_len);
    g_assert_cmpuint(got, ==, id);
    g_assert_cmpuint(got_len, ==, len);
}

void drv_skip_used(DrvQueue *q, const uint16_t *heads, unsigned n)
{
    int64_t end = g_get_monotonic_time() + DRV_TIMEOUT_US;
    unsigned i;

    g_assert_false(q->packed);
    while ((uint16_t)(qtest_readw(q->qts, q->used + 2) - q->last_used) < n) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    for (i = 0; i < n; i++) {
        release(q, heads[i]);
    }
}

void drv_expect_none(DrvQueue *q)
{
    uint16_t id;
    uint32_t len;

    g_assert_false(drv_get_used(q, &id, &len));
}

void drv_no_interrupt(DrvQueue *q, bool none)
{
    if (q->packed) {
        qtest_writew(q->qts, q->avail + 2, none);
    } else {
        qtest_writew(q->qts, q->avail,
                     none ? VRING_AVAIL_F_NO_INTERRUPT : 0);
    }
}

/* Split: after used entry @event.  Packed: after slot @event of this lap. */
void drv_set_used_event(DrvQueue *q, uint16_t event)
{
    if (q->packed) {
        qtest_writew(q->qts, q->avail, event | q->used_wrap << 15);
        qtest_writew(q->qts, q->avail + 2, 2);
    } else {
        qtest_writew(q->qts, q->avail + 4 + q->num * 2, event);
    }
}
