#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest tests' own tools see what they are meant to see.

No scanner here: damage is done on purpose from outside, and must be found.
"""

import os
import struct

import host
import tap
import vm as vms
from host import MIB, PAGE

MASK = (1 << 64) - 1


def pg_key(a, b):
    """The same as pg_key() of pagegen.h."""
    x = (a * 0x9e3779b97f4a7c15 + b + 0x632be59bd9b4e019) & MASK
    x ^= x >> 30
    x = x * 0xbf58476d1ce4e5b9 & MASK
    x ^= x >> 27
    x = x * 0x94d049bb133111eb & MASK
    x ^= x >> 31
    return x or 1


def pg_next(x):
    """The same as pg_next() of pagegen.h."""
    return (x * 6364136223846793005 + 1442695040888963407) & MASK


@tap.case
def test_regions():
    """every kind of RAM boots, and a flipped bit in a page is found"""
    for backing in vms.BACKINGS:
        vm = vms.VM(backing, ram=128, backing=backing).start().boot()
        vm.agent.ask('alloc s 2000 same 5')
        vm.agent.ask('alloc m 4000 mixed')
        vm.check_regions('sm')
        key = pg_key(pg_key(5, 0), 1234)
        pid, start, end = vm.ram_range()
        at = host.find_page(pid, start, end,
                            struct.pack('<QQ', key, pg_next(key)))
        byte = host.peek(pid, at + 4001, 1)
        host.poke(pid, at + 4001, bytes([byte[0] ^ 4]))
        got = vm.agent.get('verify s')
        tap.check(got['bad'] == 1 and got['page'] == 1234 and
                  got['offset'] == 4000, '%s: %s' % (backing, got))
        vm.quit()


@tap.case
def test_loop():
    """a page that falls back to its former content is found by the loop"""
    vm = vms.VM('loop', ram=128).start().boot()
    vm.agent.ask('alloc s 64 same 5')
    pid, start, end = vm.ram_range()
    key = pg_key(pg_key(5, 0), 33)
    at = host.find_page(pid, start, end,
                        struct.pack('<QQ', key, pg_next(key)))
    old = host.peek(pid, at, PAGE)
    vm.agent.ask('rewrite s 1')
    host.poke(pid, at, old)
    vm.agent.ask('loop s start 1000000')
    got = vm.agent.get('loop s stop')
    while got['passes'] == 0:
        vm.agent.ask('loop s start 1000000')
        got = vm.agent.get('loop s stop')
    tap.check(got['errors'] == 1 and got['page'] == 33, str(got))
    vm.quit()


@tap.case
def test_dio():
    """O_DIRECT reads are right with each aio, and a wrong block is found"""
    disk = os.path.join(vms.scratch(), 'disk')
    host.make_disk(disk, 2048, 9, 500)
    for aio in ('threads', 'native', 'io_uring'):
        vm = vms.VM(aio, ram=128, disk=disk, aio=aio).start().boot()
        vm.agent.ask('dio-start /dev/vda 9 500 2048 4 16 4')
        got = {'rounds': 0}
        while got['rounds'] < 20:
            got = vm.agent.get('dio-stat')
        tap.check(got['errors'] == 0, '%s: %s' % (aio, got))
        tap.note('%s: %s' % (aio, got))
        if aio == 'io_uring':
            with open(disk, 'r+b') as f:
                f.seek(1000 * PAGE + 17)
                f.write(b'#')
            while got['errors'] == 0:
                got = vm.agent.get('dio-stat')
            tap.check(got['block'] == 1000 and got['lost'] == 0, str(got))
        vm.agent.ask('dio-stop')
        vm.quit()


@tap.case
def test_cache():
    """a file stays in the page cache, and a wrong byte there is found"""
    disk = os.path.join(vms.scratch(), 'disk')
    host.make_disk(disk, 2048, 9, 2048)
    vm = vms.VM('cache', ram=128, disk=disk).start().boot()
    got = vm.agent.get('cache /dev/vda 9 2048 2048')
    tap.check(got['bad'] == 0 and got['cached'] < 2048, str(got))
    pid, start, end = vm.ram_range()
    key = pg_key(9 ^ 0xd15c, 1500)
    at = host.find_page(pid, start, end,
                        struct.pack('<QQ', key, pg_next(key)))
    byte = host.peek(pid, at + 4001, 1)
    host.poke(pid, at + 4001, bytes([byte[0] ^ 4]))
    got = vm.agent.get('cache /dev/vda 9 2048 2048')
    tap.check(got['bad'] == 1 and got['first'] == 1500 and
              got['cached'] == 2048, str(got))
    vm.quit()


@tap.case
def test_count():
    """the offline count agrees with contents that are known"""
    a = vms.VM('a', ram=128, backing='file-shared').start().boot()
    b = vms.VM('b', ram=128, backing='ram').start().boot()
    a.agent.ask('alloc x 4000 same 3 nohuge')
    b.agent.ask('alloc x 4000 same 3 nohuge')
    a.agent.ask('alloc z 3000 zero 0 nohuge')
    b.agent.ask('alloc d 3000 dup 3 nohuge')
    counts = [vms.count_saveable([a, b])]

    def step(vm, command, distinct, zero):
        """Contents change in known ways; the memory stays what it is.  The
        guest's kernel changes some pages meanwhile."""
        vm.agent.ask(command)
        counts.append(vms.count_saveable([a, b]))
        old, new = counts[-2:]
        tap.note('%s: %s' % (command, new))
        tap.check(abs(new['physical'] - old['physical']) < 200 and
                  abs(new['distinct'] - old['distinct'] - distinct) < 200 and
                  abs(new['zero'] - old['zero'] - zero) < 200,
                  '%s: %s, before %s' % (command, new, old))

    step(a, 'rewrite z 1', 3000, -3000)     # unique pages that were zero
    step(b, 'rewrite x 1', 4000, 0)         # the guests' copies differ
    step(a, 'rewrite x 1', -4000, 0)        # and agree again
    step(a, 'rewrite z 2', -3000, 3000)
    for vm in (a, b):
        pid, start, end = vm.ram_range()
        rss = host.smaps(pid, start, end)['Rss']
        one = host.count_pages([(pid, start, end)])
        # The count also has file pages that no page table maps: QEMU's loader
        # wrote none of them.
        tap.check(abs(one['physical'] * PAGE - rss) < 2 * MIB,
                  '%s: rss %d, %s' % (vm.name, rss, one))
        vm.check_regions('x')
        vm.quit()


@tap.case
def test_cgroup():
    """a VM's memory is charged to its cgroup, and gone after SIGKILL"""
    cgroup = host.Cgroup()
    vm = vms.VM('c', ram=512, cgroup=cgroup).start().boot()
    # What the guest touched while it booted is used again first: most of it
    # by "x", and what is left of it, which differs, by "y".
    vm.agent.ask('alloc x 20480 signed')
    before = cgroup.usage()
    shmem = cgroup.shmem()
    vm.agent.ask('alloc y 20480 signed')
    grown = cgroup.shmem() - shmem
    tap.check(60 * MIB < grown < 84 * MIB, 'shmem grew by %d' % grown)
    usage = cgroup.usage() - before
    tap.check(abs(usage - grown) < 6 * MIB, 'usage grew by %d, shmem by %d' % (
        usage, grown))
    vm.kill()
    tap.check(cgroup.shmem() < MIB, 'shmem left: %d' % cgroup.shmem())


@tap.case
def test_bare():
    """the bare guest runs under KVM and finds a flipped bit"""
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        tap.skip('no /dev/kvm')
    vm = vms.VM('bare', ram=6, accel='kvm', bios=host.image('bare.rom'))
    vm.start()
    serial = vm.serial_port
    tap.check(serial.line(60) == 'ready 1024', 'not ready')
    tap.check(serial.line(60) == 'round 1 errors 0', 'first round')
    serial.sock.sendall(b'q')
    while not serial.line(60).startswith('round 3 '):
        pass
    vm.stop()
    pid, start, _ = vm.ram_range()
    # A word of page 500 that is no mark: only a full check sees each of them.
    page = host.peek(pid, start + 2 * MIB + 500 * PAGE, PAGE)
    at = next(i for i in range(PAGE - 8, 0, -4) if page[i:i + 4] == b'\0' * 4)
    host.poke(pid, start + 2 * MIB + 500 * PAGE + at, b'\1')
    serial.sock.sendall(b'v')
    vm.cont()
    seen = []
    while not seen or not seen[-1].startswith('verified'):
        seen.append(serial.line(120))
    tap.check(seen[-1] == 'verified errors 1', '\n'.join(seen))
    vm.quit()


host.prepare(scanner=False)
tap.main()
