#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows of docs/devel/dedup-hazards.rst, and experiments from public reports.

No guest runs, but for one: the test writes guest memory itself.  More of the
same with DEDUP_HAZARDS=N: the number of starts, and of pages, is N times as large.
"""
# timeout: 1800

import os
import pwd
import shutil
import signal
import socket
import struct
import tempfile
import threading

import dedup
import host
import tap
import vm as vms
from host import MIB, PAGE
from outside import Machine, Outside, pages

MORE = int(os.environ.get('DEDUP_HAZARDS', '1'))
# Where the pages of a test begin
AT = 16 * MIB
COUNT = 2000


def merged_vm(name, seed=1, user=None, debugged=False, **options):
    """A VM with equal pages, merged, and what they hold."""
    vm = Machine(name, dedup=dict(dedup.FULL_SPEED), **options)
    if debugged:
        # No debugger without vCPUs; they do not run.
        vm.args[vm.args.index('qtest')] = 'tcg,tb-size=8'
        vm.args.append('-S')
    if user:
        # What it saves is its own.
        os.chown(vm.dir, user.pw_uid, user.pw_gid)
        vm.args += ['-run-with', 'user=' + user.pw_name]
    vm.start()
    data = pages(seed, COUNT // 2) * 2
    vm.write(AT, data)
    dedup.wait_merged(vm, COUNT)
    dedup.wait_scans([vm], 2)
    return vm, data


def saved(vm, address, size):
    """Guest memory, as pmemsave writes it."""
    path = vm.path('saved')
    vm.qmp.command('pmemsave', {'val': address, 'size': size,
                                'filename': path})
    with open(path, 'rb') as f:
        return f.read()


def right(vm, data, address=AT):
    """Every byte is."""
    found = saved(vm, address, len(data))
    for i in range(0, len(data), PAGE):
        tap.check(found[i:i + PAGE] == data[i:i + PAGE],
                  '%s: page %d differs' % (vm.name, i // PAGE))


# The process

@tap.case
def test_run_with_user():
    """-run-with user=: two of a group share their pages (F.2)"""
    if os.geteuid():
        tap.skip('needs root')
    group = vms.group_dir()
    nobody = pwd.getpwnam('nobody')
    os.chown(group, nobody.pw_uid, nobody.pw_gid)
    both = [merged_vm(name, user=nobody, backing=backing, group=group)
            for name, backing in (('a', 'plain'), ('b', 'memfd-shared'))]
    for vm, data in both:
        with open('/proc/%d/status' % vm.pid, encoding='ascii') as f:
            tap.check('Uid:\t%d\t' % nobody.pw_uid in f.read(), 'still root')
        tap.check(dedup.stats(vm)['group']['members'] == 2, 'one member')
        dedup.wait_until(lambda vm=vm: dedup.stats(vm)[
            'pages-merged-between'] > 0, 'merging with the other', 120)
    for vm, data in both:
        right(vm, data)
        dedup.unmerge(vm)
        right(vm, data)
        vm.kill()


@tap.case
def test_run_with_chroot():
    """-run-with chroot=: pages are merged and restored (F.2)"""
    if os.geteuid():
        tap.skip('needs root')
    path = tempfile.mkdtemp(prefix='qemu-dedup-root-')
    tap.cleanup(lambda: shutil.rmtree(path, ignore_errors=True))
    vm = Machine('c', backing='memfd-shared', dedup=dict(dedup.FULL_SPEED),
                 extra=['-run-with', 'chroot=' + path]).start()
    data = pages(1, COUNT // 2) * 2
    vm.write(AT, data)
    dedup.wait_merged(vm, COUNT)
    # No path leads from there to a file of ours.
    tap.check(vm.read(AT, len(data)) == data, 'merged: wrong bytes')
    dedup.unmerge(vm)
    tap.check(vm.read(AT, len(data)) == data, 'unmerged: wrong bytes')
    vm.kill()


@tap.case
def test_no_events():
    """userfaultfd: no event is asked for, which nobody would read (G.5)"""
    events = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # fork, remap, remove, unmap
    vm, _ = merged_vm('u', backing='plain')
    found = 0
    for fd in os.listdir('/proc/%d/fd' % vm.pid):
        name = '/proc/%d/fd/%s' % (vm.pid, fd)
        if os.readlink(name) != 'anon_inode:[userfaultfd]':
            continue
        found += 1
        with open('/proc/%d/fdinfo/%s' % (vm.pid, fd), encoding='ascii') as f:
            api = [line for line in f if line.startswith('API:')][0]
        features = int(api.split(':')[-2 if api.count(':') > 2 else -1], 16)
        tap.check(not features & events, api)
    tap.check(found == 1, '%d userfaultfds' % found)
    vm.kill()


# Memory that QEMU throws away by itself

@tap.case
def test_discard_data():
    """discard-data=on: nothing is left in the RAM's file (C.2)"""
    path = os.path.join(vms.shm_scratch(), 'ram')
    vm = Machine('d', backing='plain', dedup=dict(dedup.FULL_SPEED), extra=[
        '-object', 'memory-backend-file,id=extra,size=64M,share=on,'
        'discard-data=on,mem-path=' + path,
        '-device', 'pc-dimm,id=dimm,memdev=extra'], hotplug=True).start()
    base = [d['data']['addr'] for d in
            vm.qmp.command('query-memory-devices')][0]
    vm.write(base, pages(1, 1000) * 2 + pages(2, 1000))
    dedup.wait_merged(vm, 2000)
    tap.check(os.stat(path).st_blocks * 512 >= 900 * PAGE,
              '%d blocks' % os.stat(path).st_blocks)
    vm.quit()
    tap.check(os.stat(path).st_blocks == 0,
              '%d blocks are left' % os.stat(path).st_blocks)


# Experiments from public reports

def gdb_read(path, address, size):
    """Guest memory, as a debugger reads it."""
    found = b''
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.connect(path)
        # Physical addresses, so that no page table is needed
        for text in ['Qqemu.PhyMemMode:1'] + [
                'm%x,%x' % (at, 1024) for at in
                range(address, address + size, 1024)]:
            s.sendall(b'$%s#%02x' % (text.encode(),
                                     sum(text.encode()) & 255))
            reply = b''
            while b'#' not in reply or len(reply) < reply.index(b'#') + 3:
                reply += s.recv(8192)
            s.sendall(b'+')
            body = reply[reply.index(b'$') + 1:reply.index(b'#')]
            if text[0] == 'm':
                found += bytes.fromhex(body.decode())
    return found


@tap.case
def test_reads():
    """reads never unshare: a device, the monitor, a debugger, a dump"""
    vm, data = merged_vm('g', backing='memfd-shared', debugged=True)
    gdb = vm.path('gdb')
    vm.qmp.hmp('gdbserver unix:%s,server=on,wait=off' % gdb)
    before = dedup.stats(vm)
    part = 64 * PAGE
    tap.check(vm.read(AT, part) == data[:part], 'a device')
    vm.qmp.hmp('xp /4096xb 0x%x' % AT)
    tap.check(gdb_read(gdb, AT, part) == data[:part], 'a debugger')
    right(vm, data)
    vm.qmp.command('dump-guest-memory', {
        'paging': False, 'protocol': 'file:' + vm.path('dump')})
    dedup.wait_scans([vm], 2)
    after = dedup.stats(vm)
    for figure in 'pages-merged', 'cow-breaks':
        tap.check(after[figure] == before[figure], '%s: %d, was %d' % (
            figure, after[figure], before[figure]))
    tap.check(Outside(vm).broken == 0, 'a copy was made')
    vm.kill()


@tap.case
def test_overcommit():
    """all equal, all random, only the last 96 bytes differ"""
    group = vms.group_dir()
    count = COUNT * MORE
    both = [Machine(name, backing=backing, group=group,
                    dedup=dict(dedup.FULL_SPEED)).start()
            for name, backing in (('x', 'plain'), ('y', 'memfd-shared'))]
    last = os.urandom(PAGE - 96)
    for phase, merged in ('equal', count), ('random', 0), ('tail', 0):
        for i, vm in enumerate(both):
            if phase == 'equal':
                vm.data = b'\x2a' * (count * PAGE)
            elif phase == 'random':
                vm.data = os.urandom(count * PAGE)
            else:
                vm.data = b''.join(last + struct.pack('<QQ', i, k) * 6
                                   for k in range(count))
            vm.write(AT, vm.data)
        for vm in both:
            if merged:
                dedup.wait_merged(vm, merged)
            else:
                dedup.wait_until(lambda vm=vm: dedup.stats(vm)[
                    'pages-merged'] == 0, 'the end of merging')
            dedup.wait_scans([vm], 2)
            tap.note('%s: %s' % (phase, dedup.summary(vm)))
            right(vm, vm.data)
            tap.check(len(Outside(vm).merged) >= merged, 'not merged')
    for vm in both:
        vm.kill()


@tap.case
def test_smaps_pollers():
    """who reads smaps of many mappings keeps neither scanner nor guest up"""
    count = min(2000 * MORE, 10000)
    vm = Machine('m', backing='memfd-shared',
                 dedup=dict(dedup.FULL_SPEED)).start()
    # Isolated: each equal page has a unique neighbour.
    data = b''.join(pages(1, 1, i % 16) + pages(2, 1, i)
                    for i in range(count))
    vm.write(AT, data)
    ends = threading.Event()
    polls = []

    def poll():
        while not ends.is_set():
            with open('/proc/%d/smaps' % vm.pid, 'rb') as f:
                polls.append(f.read().count(b'VmFlags'))
    pollers = [threading.Thread(target=poll) for _ in range(2)]
    for thread in pollers:
        thread.start()
    try:
        dedup.wait_merged(vm, count, 120)
        for i in range(0, 200, 2):
            page = pages(3, 1, i)
            vm.write(AT + i * PAGE, page)
            data = data[:i * PAGE] + page + data[(i + 1) * PAGE:]
        dedup.wait_scans([vm], 2)
        right(vm, data)
        tap.note('%d polls, at most %d mappings' % (len(polls), max(polls)))
        tap.check(max(polls) > count, 'few mappings')
        dedup.unmerge(vm)
    finally:
        ends.set()
        for thread in pollers:
            thread.join()
    right(vm, data)
    vm.kill()


@tap.case
def test_starts_and_kills():
    """members come and are killed, one after the other, in one group"""
    group = vms.group_dir()
    stays, data = merged_vm('s', backing='memfd-shared', group=group)
    for i in range(5 * MORE):
        vm = Machine('k%d' % i, backing=('plain', 'memfd-shared')[i % 2],
                     group=group, dedup=dict(dedup.FULL_SPEED)).start()
        vm.write(AT, data)
        if i % 3:
            # it dies while it merges, or before
            dedup.wait_merged(vm, COUNT // 4 * (i % 3))
            right(vm, data)
        vm.kill(signal.SIGKILL)
        vm._clean()
        tap.check(stays.alive(), 'the first one is gone')
    right(stays, data)
    dedup.wait_until(lambda: dedup.stats(stays)['pages-merged-between'] == 0,
                     'nobody else')
    tap.check(dedup.stats(stays)['group']['members'] == 1, 'members are left')
    dedup.unmerge(stays)
    right(stays, data)
    stays.kill()


host.prepare()
tap.main()
