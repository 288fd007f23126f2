#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A KVM vCPU has firmware read and write a disk by the relay, into pages that
are merged and from them: disk-boot.S."""

import os
import random
import struct

import backends
import dedup
import host
import tap
import vm as vms
from host import PAGE

# As in disk-boot.S
BLOCKS = 8
BLOCK = 64 * 512
FIRST = 8 * 512
ROUNDS = 5


def contents():
    """Blocks whose pages are equal to those of others, but for one each."""
    rng = random.Random(1)
    common = [rng.randbytes(PAGE) for _ in range(BLOCK // PAGE - 1)]
    return [b''.join(common[b:] + common[:b]) + rng.randbytes(PAGE)
            for b in range(BLOCKS)]


def sum_of(block):
    """The sum that the guest makes."""
    total = 0
    for word in struct.unpack('<%dI' % (len(block) // 4), block):
        total = ((total << 1 | total >> 31) + word) & 0xffffffff
    return '%08x' % total


def disk():
    """The boot sector, the blocks, and room for their copies."""
    path = os.path.join(vms.scratch(), 'boot-disk')
    with open(host.image('disk-boot'), 'rb') as f:
        sector = f.read()
    with open(path, 'wb') as f:
        f.write(sector.ljust(FIRST, b'\0') + b''.join(contents()))
        f.truncate(FIRST + 2 * BLOCKS * BLOCK)
    return path


def firmware_reads(iothread):
    """Every sum is right, and so are the copies in the end."""
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        tap.skip('no /dev/kvm')
    image = disk()
    extra = ['-object', 'iothread,id=io0'] if iothread else []
    vm = vms.VM('firmware', ram=16, backing='plain', accel='kvm',
                bios='bios-256k.bin', dedup=dict(dedup.FULL_SPEED, run='off'),
                extra=extra + backends.Storage(image=image).start().options(
                    'blk', 'on', 'io0' if iothread else None, bootindex=1))
    vm.start()
    sums = [sum_of(block) for block in contents()]
    for turn in range(ROUNDS):
        for want in sums + ['round']:
            line = vm.serial_port.line(60)
            tap.check(line == want, 'round %d: %s, not %s' % (turn, line,
                                                              want))
        if turn % 4 == 0:
            # All that was read is at rest: it is merged, then read into again.
            vm.stop()
            dedup.run(vm, True)
            dedup.wait_merged(vm, (BLOCKS - 1) * (BLOCK // PAGE - 1) // 2)
            vm.cont()
    got = dedup.stats(vm)
    tap.note('%s; %s' % (dedup.summary(vm), backends.relays(vm)))
    tap.check(got['cow-breaks'] >= ROUNDS // 4 * BLOCKS, dedup.summary(vm))
    vm.stop()
    with open(image, 'rb') as f:
        f.seek(FIRST + BLOCKS * BLOCK)
        tap.check(f.read(BLOCKS * BLOCK) == b''.join(contents()),
                  'what was written is wrong')
    vm.quit()


@tap.case
def test_kvm():
    """KVM, the relay in the main loop"""
    firmware_reads(False)


@tap.case
def test_kvm_iothread():
    """KVM, the relay in an iothread"""
    firmware_reads(True)


host.prepare()
tap.main()
