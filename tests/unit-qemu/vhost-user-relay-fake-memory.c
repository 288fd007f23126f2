/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The memory of the guest in tests of the relay's queues: see
 * vhost-user-relay-fake.h
 */

#include "qemu/osdep.h"
#include "hw/dedup/qemu-compat.h"
#include "vhost-user-relay-fake.h"

bool fake_in_ram(hwaddr addr, hwaddr len)
{
    return addr >= FAKE_RAM && len <= FAKE_RAM_BYTES &&
           addr - FAKE_RAM <= FAKE_RAM_BYTES - len;
}

static bool in_hole(hwaddr addr, hwaddr len)
{
    return fake.hole && addr < fake.hole + FAKE_PAGE &&
           fake.hole < addr + len;
}

uint8_t *fake_ram(hwaddr addr)
{
    g_assert_true(fake_in_ram(addr, 1));
    return fake.ram + (addr - FAKE_RAM);
}

MemTxResult address_space_rw(AddressSpace *as, hwaddr addr, MemTxAttrs attrs,
                             void *buf, hwaddr len, bool is_write)
{
    g_assert_true(as == &fake.as);
    if (!fake_in_ram(addr, len) || in_hole(addr, len)) {
        return MEMTX_DECODE_ERROR;
    }
    if (is_write) {
        memcpy(fake_ram(addr), buf, len);
    } else {
        memcpy(buf, fake_ram(addr), len);
    }
    return MEMTX_OK;
}

void address_space_unmap(AddressSpace *as, void *buffer, hwaddr len,
                         bool is_write, hwaddr access_len)
{
    g_assert_true(as == &fake.as);
    g_assert_true(buffer);
    /* Nothing was written by way of it. */
    g_assert_cmpuint(access_len, ==, 0);
    g_assert_cmpuint(fake.maps, >, 0);
    fake.maps--;
}

uint16_t address_space_lduw_le(AddressSpace *as, hwaddr addr, MemTxAttrs attrs,
                               MemTxResult *result)
{
    /* A packed ring has no such place. */
    g_assert_true(as == &fake.as);
    g_assert_false(virtio_vdev_has_feature(fake.vdev, VIRTIO_F_RING_PACKED));
    return lduw_le_p(fake_ram(addr));
}

void address_space_stw_le(AddressSpace *as, hwaddr addr, uint16_t val,
                          MemTxAttrs attrs, MemTxResult *result)
{
    g_assert_true(as == &fake.as);
    if (!fake.read_only) {
        stw_le_p(fake_ram(addr), val);
    }
    if (result) {
        *result = fake.read_only ? MEMTX_DECODE_ERROR : MEMTX_OK;
    }
}

MemoryRegion *flatview_translate(FlatView *fv, hwaddr addr, hwaddr *xlat,
                                 hwaddr *len, bool is_write, MemTxAttrs attrs)
{
    static MemoryRegion ram = { .ram = true }, registers;

    return fake_in_ram(addr, *len) ? &ram : &registers;
}
