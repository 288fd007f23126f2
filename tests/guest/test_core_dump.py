#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A core dump of QEMU holds all of guest RAM, merged pages included."""

import os
import signal
import struct
import tempfile

import dedup
import host
import resource
import tap
import vm as vms
from host import MIB

PATTERN = '/proc/sys/kernel/core_pattern'
RAM = 160
# Below are holes for the BIOS and for video memory.
START = MIB


def core_file():
    """Where the kernel puts a core dump from now on; put back at the end."""
    path = os.path.join(tempfile.mkdtemp(prefix='qemu-dedup-core-'), 'core')

    def clean():
        if os.path.exists(path):
            os.unlink(path)
        os.rmdir(os.path.dirname(path))
    tap.cleanup(clean)
    host.set_sysctl(PATTERN, path)
    return path


def filter_of(vm):
    """The process's coredump_filter."""
    with open('/proc/%d/coredump_filter' % vm.pid, encoding='ascii') as f:
        return int(f.read(), 16)


def memory_in_core(path, start, size):
    """Bytes of the process's memory; zeros where the dump has none, as
    dump-guest-memory.py has it."""
    data = bytearray(size)
    dumped = 0
    with open(path, 'rb') as f:
        header = f.read(64)
        tap.check(header[:5] == b'\x7fELF\x02', 'not an ELF file')
        phoff, = struct.unpack_from('<Q', header, 32)
        phentsize, phnum = struct.unpack_from('<HH', header, 54)
        if phnum == 0xffff:
            shoff, = struct.unpack_from('<Q', header, 40)
            f.seek(shoff + 44)
            phnum, = struct.unpack('<I', f.read(4))
        f.seek(phoff)
        table = f.read(phentsize * phnum)
        for i in range(phnum):
            (kind, _, offset, vaddr, _, filesz,
             _, _) = struct.unpack_from('<IIQQQQQQ', table, i * phentsize)
            low = max(vaddr, start)
            high = min(vaddr + filesz, start + size)
            if kind == 1 and low < high:
                f.seek(offset + low - vaddr)
                data[low - start:high - start] = f.read(high - low)
                dumped += high - low
    return bytes(data), dumped


def dump(backing):
    """Merge, save what the guest has, die, compare."""
    path = core_file()
    vm = vms.VM('core', ram=RAM, backing=backing, dedup=dedup.FULL_SPEED)
    vm.start().boot()
    vm.agent.ask('alloc d 12000 dup 4')
    vm.agent.ask('alloc u 2000 signed')
    dedup.wait_merged(vm, 10000)
    tap.check(filter_of(vm) & 4, 'filter 0x%x' % filter_of(vm))
    resource.prlimit(vm.pid, resource.RLIMIT_CORE,
                     (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    vm.stop()
    saved = vm.path('saved')
    vm.qmp.command('pmemsave', {'val': START, 'size': RAM * MIB - START,
                                'filename': saved})
    merged = dedup.stats(vm)['pages-merged']
    _, start, _ = vm.ram_range()
    tap.check(merged >= 10000, dedup.summary(vm))
    vm.kill(signal.SIGSEGV)
    if not os.path.exists(path):
        tap.skip('the kernel wrote no core dump')
    got, dumped = memory_in_core(path, start + START, RAM * MIB - START)
    with open(saved, 'rb') as f:
        wanted = f.read()
    bad = [i for i in range(0, len(wanted), host.PAGE)
           if got[i:i + host.PAGE] != wanted[i:i + host.PAGE]]
    tap.note('%d merged, %d MiB of RAM dumped in a file of %d MiB' %
             (merged, dumped // MIB, os.path.getsize(path) // MIB))
    tap.check(not bad, '%d pages are not what the guest had' % len(bad))


@tap.case
def test_plain():
    """anonymous RAM"""
    dump('ram')


@tap.case
def test_memfd():
    """memfd RAM"""
    dump('memfd-shared')


@tap.case
def test_filter():
    """the process's filter is put back, and left alone where it should be"""
    vm = vms.VM('filter', backing='ram', dedup=dedup.FULL_SPEED).start()
    with open('/proc/self/coredump_filter', encoding='ascii') as f:
        before = int(f.read(), 16)
    dedup.wait_until(lambda: filter_of(vm) == before | 4, 'filter to be set')
    dedup.unmerge(vm)
    vm.qmp.command('object-del', {'id': 'ds0'})
    tap.check(filter_of(vm) == before, 'filter 0x%x' % filter_of(vm))
    vm.quit()
    vm = vms.VM('off', backing='ram', dedup=dedup.FULL_SPEED,
                extra=('-machine', 'dump-guest-core=off')).start()
    dedup.stats(vm)
    dedup.wait_scans([vm], 1)
    tap.check(filter_of(vm) == before, 'filter 0x%x' % filter_of(vm))
    vm.quit()


host.prepare()
tap.main()
