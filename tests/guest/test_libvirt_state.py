#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What virsh saves of a domain whose memory is merged is right, and merged
again where it is restored.

As libvirt-qemu, at full speed, while the guest writes.
"""

import os
import struct

import dedup
import host as machine
import tap
import virsh
import virthost

MERGED = 8000
FIRST = machine.MIB             # where RAM alone begins


def working(host, **kwargs):
    """A domain that is merged and writes to a part of it."""
    vm = virsh.Domain(host, 'state', group='web', **kwargs).start().boot()
    vm.agent.ask('alloc d 12000 dup 4')
    vm.agent.ask('alloc m 4000 mixed')
    vm.agent.ask('loop m start 200')
    dedup.wait_merged(vm, MERGED)
    return vm


def check_restored(vm):
    """Every byte is what it was, the guest goes on, and it is merged."""
    vm.connect()
    vm.check_regions('dm')
    dedup.wait_merged(vm, MERGED)
    vm.agent.ask('touch d 3')
    vm.check_regions('dm')
    tap.note(dedup.summary(vm))


def check_merged_still(vm):
    """It was not stopped by what was done, and all is right."""
    dedup.wait_merged(vm, MERGED)
    vm.check_regions('dm')


@tap.case
def test_save():
    """save, restore, managedsave, suspend"""
    host = virsh.prepared_host()
    vm = working(host, memory='memfd')
    path = '/var/lib/libvirt/qemu/state.save'
    vm.virsh('save', '@', path)
    tap.check(vm.state() == 'shut off', vm.state())
    # Merged pages are no holes in it.
    size = os.stat(host.path(path)).st_size
    tap.check(size > 16000 * machine.PAGE, '%d bytes' % size)
    host.virsh('restore', path)
    check_restored(vm)

    vm.virsh('managedsave', '@')
    tap.check('Managed save:   yes' in vm.virsh('dominfo', '@'),
              vm.virsh('dominfo', '@'))
    vm.virsh('start', '@')
    check_restored(vm)

    vm.virsh('suspend', '@')
    tap.check(vm.state() == 'paused', vm.state())
    dedup.wait_scans([vm], 2)
    vm.virsh('resume', '@')
    check_merged_still(vm)
    vm.agent.ask('loop m stop')
    vm.check_regions('dm')


@tap.case
def test_snapshot_internal():
    """an internal snapshot with memory, and back to it"""
    host = virsh.prepared_host()
    vm = working(host, disk=virsh.make_disk(host, 'state', 64))
    vm.virsh('snapshot-create-as', '@', 'before')
    check_merged_still(vm)
    # This is to be gone, and the pages that it took as they were.
    vm.agent.ask('alloc after 4000 dup 4')
    dedup.wait_scans([vm], 3)
    vm.virsh('snapshot-revert', '@', 'before')
    check_restored(vm)
    tap.check('after' not in vm.agent.ask('list').split(),
              vm.agent.ask('list'))
    tap.check('before' in vm.virsh('snapshot-list', '@', '--name'), 'list')
    vm.virsh('snapshot-delete', '@', 'before')


@tap.case
def test_snapshot_external():
    """an external snapshot with memory, of a guest that goes on"""
    host = virsh.prepared_host()
    vm = working(host, memory='file',
                 disk=virsh.make_disk(host, 'state', 64))
    memory = '/var/lib/libvirt/qemu/state.mem'
    vm.virsh('snapshot-create-as', '@', 'outside', '--live',
             '--memspec', 'snapshot=external,file=' + memory,
             '--diskspec', 'vda,snapshot=external,file=%s/overlay.qcow2'
             % virthost.IMAGES)
    check_merged_still(vm)
    vm.virsh('destroy', '@')
    host.virsh('restore', memory)
    check_restored(vm)


def segments(path):
    """(guest address, bytes) of an ELF core file's memory."""
    with open(path, 'rb') as f:
        header = f.read(64)
        tap.check(header[:5] == b'\x7fELF\x02', 'not an ELF file')
        phoff, = struct.unpack_from('<Q', header, 32)
        size, count = struct.unpack_from('<HH', header, 54)
        for i in range(count):
            f.seek(phoff + i * size)
            kind, _, offset, _, paddr, filesz = struct.unpack(
                '<IIQQQQ', f.read(40))
            if kind == 1:
                f.seek(offset)
                yield paddr, f.read(filesz)


@tap.case
def test_dump():
    """dump --memory-only has every byte, merged or not"""
    host = virsh.prepared_host()
    vm = working(host)
    vm.virsh('suspend', '@')
    dedup.run(vm, False)
    dedup.wait_state(vm, ['stopped'])
    merged = dedup.stats(vm)['pages-merged']
    path = '/var/lib/libvirt/qemu/state.dump'
    vm.virsh('dump', '@', path, '--memory-only', '--format', 'elf')
    tap.check(dedup.stats(vm)['pages-merged'] == merged, dedup.summary(vm))
    pid, start, end = vm.ram_range()
    compared = 0
    for paddr, data in segments(host.path(path)):
        # Below, something else than RAM may be shown.
        data = data[max(0, FIRST - paddr):]
        paddr = max(FIRST, paddr)
        if data and paddr + len(data) <= end - start:
            tap.check(machine.peek(pid, start + paddr, len(data)) == data,
                      'differs from 0x%x on' % paddr)
            compared += len(data)
    tap.check(compared == end - start - FIRST,
              '%d bytes in the dump' % compared)
    vm.virsh('resume', '@')
    check_merged_still(vm)


machine.prepare()
tap.main()
