/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The device's side of a split ring, for tests
 *
 * It demands what the specification gives a device the right to: that every
 * descriptor lies in a region of the table, that a chain has an end, that no
 * part to read follows one to write.
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "vhost-user-backend.h"
#include <poll.h>

uint8_t *vub_at(const VubTable *t, uint64_t gpa, uint64_t len)
{
    unsigned i;

    for (i = 0; i < t->n; i++) {
        const VubRegion *r = &t->regions[i];

        if (gpa >= r->gpa && len <= r->size &&
            gpa - r->gpa <= r->size - len) {
            return t->host[i] + (gpa - r->gpa);
        }
    }
    return NULL;
}

/* Where the driver's used_event and our avail_event are. */
static uint16_t *used_event(VubRing *r)
{
    return &r->avail->ring[r->num];
}

static uint16_t *avail_event(VubRing *r)
{
    return (uint16_t *)&r->used->ring[r->num];
}

static void add_segment(VubRequest *req, GArray *segs,
                        const struct vring_desc *d)
{
    VubSegment s = {
        .gpa = le64_to_cpu(d->addr),
        .len = le32_to_cpu(d->len),
    };

    s.host = vub_at(req->ring->table, s.gpa, s.len);
    if (!s.host) {
        g_error("descriptor 0x%" PRIx64 " + %u is not in the table", s.gpa,
                s.len);
    }
    if (le16_to_cpu(d->flags) & VRING_DESC_F_WRITE) {
        req->nin++;
        req->in_len += s.len;
    } else {
        g_assert_cmpuint(req->nin, ==, 0);
        req->nout++;
        req->out_len += s.len;
    }
    g_array_append_val(segs, s);
}

/* Follow a chain in a table of @n descriptors. */
static void walk(VubRequest *req, GArray *segs, const struct vring_desc *d,
                 unsigned n, unsigned i)
{
    unsigned seen = 0;

    for (;;) {
        g_assert_cmpuint(i, <, n);
        g_assert_cmpuint(++seen, <=, n);
        g_assert_false(le16_to_cpu(d[i].flags) & VRING_DESC_F_INDIRECT);
        add_segment(req, segs, &d[i]);
        if (!(le16_to_cpu(d[i].flags) & VRING_DESC_F_NEXT)) {
            return;
        }
        i = le16_to_cpu(d[i].next);
    }
}

static VubRequest *request_at(VubRing *r, uint16_t head)
{
    VubRequest *req = g_new0(VubRequest, 1);
    GArray *segs = g_array_new(false, false, sizeof(VubSegment));
    struct vring_desc *d;

    g_assert_cmpuint(head, <, r->num);
    req->ring = r;
    req->head = head;
    d = &r->desc[head];
    req->indirect = le16_to_cpu(d->flags) & VRING_DESC_F_INDIRECT;
    if (req->indirect) {
        uint32_t len = le32_to_cpu(d->len);
        void *table = vub_at(r->table, le64_to_cpu(d->addr), len);

        g_assert_nonnull(table);
        g_assert_false(le16_to_cpu(d->flags) & VRING_DESC_F_NEXT);
        g_assert_cmpuint(len, >, 0);
        g_assert_cmpuint(len % sizeof(*d), ==, 0);
        walk(req, segs, table, len / sizeof(*d), 0);
    } else {
        walk(req, segs, r->desc, r->num, head);
    }
    req->seg = (VubSegment *)g_array_free(segs, false);
    return req;
}

VubRequest *vub_try_pop(VubRing *r)
{
    uint16_t idx = le16_to_cpu(qatomic_load_acquire(&r->avail->idx));
    uint16_t head;

    if (idx == r->last_avail) {
        return NULL;
    }
    g_assert_cmpuint((uint16_t)(idx - r->last_avail), <=, r->num);
    head = le16_to_cpu(r->avail->ring[r->last_avail % r->num]);
    qatomic_set(&r->last_avail, r->last_avail + 1);
    return request_at(r, head);
}

VubRequest *vub_pop_timeout(VubRing *r, int64_t timeout_us)
{
    int64_t end = g_get_monotonic_time() + timeout_us;
    struct pollfd p = { .fd = r->kick, .events = POLLIN };
    VubRequest *req;
    uint64_t n;

    for (;;) {
        int64_t left = end - g_get_monotonic_time();

        if (r->event_idx) {
            *avail_event(r) = cpu_to_le16(r->last_avail);
            /* Then look: whoever adds does it the other way round. */
            smp_mb();
        }
        req = vub_try_pop(r);
        if (req || left <= 0) {
            return req;
        }
        if (poll(&p, 1, left / 1000 + 1) > 0 &&
            read(r->kick, &n, sizeof(n)) < 0) {
            g_assert_cmpint(errno, ==, EAGAIN);
        }
    }
}

VubRequest *vub_pop(VubRing *r)
{
    VubRequest *req = vub_pop_timeout(r, VUB_TIMEOUT_US);

    if (!req) {
        g_error("queue %u: no request came", r->queue);
    }
    return req;
}

void vub_request_free(VubRequest *req)
{
    g_free(req->seg);
    g_free(req);
}

enum Way { TO_BUFFER, FROM_BUFFER, SET };

/* Go over [offset, offset + len) of @n segments. */
static void copy(const VubSegment *s, unsigned n, size_t offset, uint8_t *buf,
                 size_t len, enum Way way)
{
    for (; n && len; n--, s++) {
        size_t step;

        if (offset >= s->len) {
            offset -= s->len;
            continue;
        }
        step = MIN(len, s->len - offset);
        switch (way) {
        case TO_BUFFER:
            memcpy(buf, s->host + offset, step);
            break;
        case FROM_BUFFER:
            memcpy(s->host + offset, buf, step);
            break;
        case SET:
            memset(s->host + offset, *buf, step);
            break;
        }
        if (way != SET) {
            buf += step;
        }
        len -= step;
        offset = 0;
    }
    g_assert_cmpuint(len, ==, 0);
}

void vub_read(const VubRequest *req, size_t offset, void *buf, size_t len)
{
    copy(req->seg, req->nout, offset, buf, len, TO_BUFFER);
}

void vub_write(const VubRequest *req, size_t offset, const void *buf,
               size_t len)
{
    copy(req->seg + req->nout, req->nin, offset, (uint8_t *)buf, len,
         FROM_BUFFER);
}

void vub_fill(const VubRequest *req, size_t offset, int byte, size_t len)
{
    uint8_t value = byte;

    copy(req->seg + req->nout, req->nin, offset, &value, len, SET);
}

void vub_peek(const VubRequest *req, size_t offset, void *buf, size_t len)
{
    copy(req->seg + req->nout, req->nin, offset, buf, len, TO_BUFFER);
}

void vub_add_used(VubRing *r, uint32_t id, uint32_t len)
{
    struct vring_used_elem *e = &r->used->ring[r->used_idx % r->num];

    e->id = cpu_to_le32(id);
    e->len = cpu_to_le32(len);
    vub_set_used_idx(r, r->used_idx + 1);
}

void vub_set_used_idx(VubRing *r, uint16_t idx)
{
    r->used_idx = idx;
    qatomic_store_release(&r->used->idx, cpu_to_le16(idx));
    /* Before it is read whether the driver wants to hear of it. */
    smp_mb();
}

void vub_call(VubRing *r)
{
    uint64_t one = 1;

    if (r->call >= 0) {
        g_assert_cmpint(write(r->call, &one, sizeof(one)), ==, sizeof(one));
    }
}

void vub_complete(VubRequest *req, uint32_t len)
{
    VubRing *r = req->ring;
    uint16_t event;

    vub_add_used(r, req->head, len);
    if (r->event_idx) {
        event = le16_to_cpu(qatomic_read(used_event(r)));
        if (event == (uint16_t)(r->used_idx - 1)) {
            vub_call(r);
        }
    } else if (!(le16_to_cpu(qatomic_read(&r->avail->flags)) &
                 VRING_AVAIL_F_NO_INTERRUPT)) {
        vub_call(r);
    }
}

void vub_done(VubRequest *req, uint32_t len)
{
    vub_complete(req, len);
    vub_request_free(req);
}
