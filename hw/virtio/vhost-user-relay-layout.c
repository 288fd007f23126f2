/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Where the buffers of a request lie in the bounce area: see
 * vhost-user-relay-layout.h
 */

#include "qemu/osdep.h"
#include "standard-headers/linux/virtio_ring.h"
#include "vhost-user-relay-area.h"
#include "vhost-user-relay-layout.h"

/* A descriptor's length has 32 bits. */
#define JOINED_MAX (1u << 30)

void vhost_user_relay_layout_init(VhostUserRelayLayout *layout)
{
    layout->end = 0;
    layout->n = 0;
}

/* May the bytes at @offset be part of the last descriptor? */
static bool joins(const VhostUserRelayLayout *layout, uint64_t offset,
                  size_t len, uint16_t flags)
{
    const VhostUserRelayDesc *last;

    if (!layout->n) {
        return false;
    }
    last = &layout->descs[layout->n - 1];
    return last->flags == flags && offset == layout->end &&
           !(offset % VHOST_USER_RELAY_PAGE) &&
           !(last->len % VHOST_USER_RELAY_PAGE) &&
           !(len % VHOST_USER_RELAY_PAGE) &&
           (uint64_t)last->len + len <= JOINED_MAX;
}

static void add_one(VhostUserRelayLayout *layout, hwaddr addr,
                    struct iovec *iov, uint16_t flags)
{
    unsigned in_page = addr % VHOST_USER_RELAY_PAGE;
    uint64_t offset = layout->end;

    if (offset % VHOST_USER_RELAY_PAGE != in_page) {
        offset = QEMU_ALIGN_UP(offset, VHOST_USER_RELAY_PAGE) + in_page;
    }
    if (joins(layout, offset, iov->iov_len, flags)) {
        layout->descs[layout->n - 1].len += iov->iov_len;
    } else {
        assert(layout->n < VHOST_USER_RELAY_DESCS_MAX);
        layout->descs[layout->n++] = (VhostUserRelayDesc) {
            .gpa = offset,
            .len = iov->iov_len,
            .flags = flags,
        };
    }
    layout->end = offset + iov->iov_len;
    iov->iov_base = (void *)(uintptr_t)offset;
}

void vhost_user_relay_layout_add(VhostUserRelayLayout *layout,
                                 const hwaddr *addr, struct iovec *iov,
                                 unsigned n, bool write)
{
    for (unsigned i = 0; i < n; i++) {
        add_one(layout, addr[i], &iov[i], write ? VRING_DESC_F_WRITE : 0);
    }
}

uint64_t vhost_user_relay_layout_pages(const VhostUserRelayLayout *layout)
{
    return DIV_ROUND_UP(layout->end, VHOST_USER_RELAY_PAGE);
}
