#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever gives merged pages their own memory, where there is not enough.

The guest has more merged than the memory cgroup, or the tmpfs of the RAM's
file, has left.  Each operation that needs its memory whole fails with the
figures, or comes to pass when there is room; nobody is killed, and every byte
in the guest is right.
"""

import os
import re
import socket
import subprocess
import tempfile

import dedup
import host
import tap
import vm as vms
from host import MIB
from qmp import QMPError

ROOM = 60                       # MiB that are left
PAGES = 48000                   # merged: about 190 MiB
RAM = 448
LEASE_BREAK = '/proc/sys/fs/lease-break-time'


def merged_vm(backing, cgroup=None, **kwargs):
    """A running guest with much to restore, which goes on writing."""
    vm = vms.VM('room', ram=RAM, backing=backing, cgroup=cgroup,
                dedup=dedup.FULL_SPEED, extra=kwargs.pop('extra', ()),
                **kwargs)
    vm.start().boot()
    vm.agent.ask('alloc d %d dup 8' % PAGES)
    vm.agent.ask('alloc u 2000 signed')
    vm.agent.ask('loop u start 16')
    dedup.wait_merged(vm, PAGES * 0.8, 120)
    dedup.wait_scans([vm], 2)
    tap.note(dedup.summary(vm))
    return vm


def limit(cgroup):
    """Leave ROOM in the cgroup."""
    cgroup.limit(cgroup.usage() + ROOM * MIB)


def lives(vm, cgroup, what):
    """Nobody was killed, and the guest has its bytes."""
    tap.check(vm.alive() and (not cgroup or cgroup.kills() == 0),
              'killed by ' + what)
    vm.check_regions('u')


def refused(call, text):
    """The operation fails, and its error has the figures."""
    try:
        call()
    except QMPError as e:
        tap.note(str(e))
        tap.check(re.search(r'takes \d+ MiB, but .*%s.* has only \d+ MiB'
                            % text, str(e)), str(e))
        return
    tap.check(False, 'not refused')


class Peer:
    """The other end of a vhost-user chardev; says nothing."""

    def __init__(self, vm):
        path = vm.path('vhost')
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        vm.qmp.command('chardev-add', {'id': 'c0', 'backend': {
            'type': 'socket', 'data': {'server': False, 'addr': {
                'type': 'unix', 'data': {'path': path}}}}})
        self.sock = listener.accept()[0]
        listener.close()


def plug(vm):
    """A device that needs all memory in its place."""
    vm.qmp.command('device_add', {'driver': 'vhost-user-fs-pci', 'id': 'fs0',
                                  'tag': 't', 'chardev': 'c0'})


def migrate(vm):
    """A migration whose destination maps the RAM's file."""
    vm.qmp.command('migrate-set-capabilities', {'capabilities': [
        {'capability': 'x-ignore-shared', 'state': True}]})
    vm.qmp.command('migrate', {'uri': 'exec:cat > /dev/null'})
    info = dedup.wait_until(
        lambda: (lambda i: i['status'] in ('failed', 'completed') and i)(
            vm.qmp.command('query-migrate')), 'end of the migration')
    if info['status'] == 'failed':
        raise QMPError({'class': 'GenericError', 'desc': info['error-desc']})


def merged(vm):
    """Pages that would have to be restored."""
    return dedup.stats(vm)['pages-merged']


def refuse_all(vm, cgroup, who):
    """Everything that can be refused, and changes nothing."""
    dedup.run(vm, False)
    dedup.wait_state(vm, ['stopped'])
    before = merged(vm)
    peer = Peer(vm)
    calls = [('dedup-unmerge',
              lambda: vm.qmp.command('dedup-unmerge', {'id': 'ds0'})),
             ('device_add', lambda: plug(vm))]
    if vm.ram_file:
        # Other memory is sent, and to read a hole of a memfd takes memory.
        calls.append(('migrate', lambda: migrate(vm)))
    for what, call in calls:
        refused(call, who)
        lives(vm, cgroup, what)
        # Only the guest changes them, where it writes
        tap.check(merged(vm) >= before - 2000,
                  '%s took %d pages' % (what, before - merged(vm)))
    peer.sock.close()


def restore_late(vm, cgroup):
    """There is room again: all of it is given back."""
    if cgroup:
        cgroup.limit(4 * RAM * MIB)
    dedup.unmerge(vm)
    vm.agent.ask('loop u stop')
    vm.check_regions('du')
    vm.quit()


@tap.case
def test_cgroup():
    """file, memfd: cgroup at usage + 60 MiB: unmerge, device_add, migrate"""
    for backing in 'file-shared', 'memfd-shared':
        cgroup = host.Cgroup()
        vm = merged_vm(backing, cgroup)
        limit(cgroup)
        refuse_all(vm, cgroup, 'memory cgroup')
        restore_late(vm, cgroup)


@tap.case
def test_cgroup_anonymous():
    """anonymous RAM, cgroup at usage + 60 MiB: merge=off, unmerge"""
    cgroup = host.Cgroup()
    vm = merged_vm('ram', cgroup)
    limit(cgroup)
    refused(lambda: vm.qmp.command('dedup-unmerge', {'id': 'ds0'}),
            'memory cgroup')
    # At rest: segments that save nothing are left when passes end.
    dedup.run(vm, False)
    dedup.wait_state(vm, ['stopped'])
    before = merged(vm)
    vm.qmp.command('qom-set', {'path': '/objects/ram0', 'property': 'merge',
                               'value': False})

    def warned():
        with open(vm.path('stderr'), encoding='utf-8') as f:
            return 'cannot be restored yet' in f.read()
    dedup.wait_until(warned, 'warning on stderr')
    # Nor does a scanner that runs leave any, as it cannot merge there.
    dedup.run(vm, True)
    dedup.wait_scans([vm], 20)
    lives(vm, cgroup, 'merge=off')
    tap.check(merged(vm) >= before - 2000,
              'merge=off took %d pages' % (before - merged(vm)))
    cgroup.limit(4 * RAM * MIB)
    dedup.wait_until(lambda: merged(vm) == 0, 'restore after merge=off')
    vm.agent.ask('loop u stop')
    vm.check_regions('du')
    vm.quit()


@tap.case
def test_opener():
    """file, cgroup at usage + 60 MiB: somebody opens the RAM's file"""
    host.set_sysctl(LEASE_BREAK, '3')
    cgroup = host.Cgroup()
    vm = merged_vm('file-shared', cgroup)
    limit(cgroup)
    subprocess.run(['head', '-c1', vm.ram_file], check=True, timeout=300,
                   stdout=subprocess.DEVNULL)
    lives(vm, cgroup, 'an opener of the file')
    tap.check(merged(vm) > PAGES * 0.7, dedup.summary(vm))
    cgroup.limit(4 * RAM * MIB)
    dedup.wait_until(lambda: merged(vm) == 0, 'restore for the opener')
    vm.agent.ask('loop u stop')
    vm.check_regions('du')
    vm.quit()


def small_tmpfs(size):
    """A tmpfs of its own."""
    path = tempfile.mkdtemp(prefix='qemu-dedup-tmpfs-')
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=%dM' % size,
                           'tmpfs', path], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        os.rmdir(path)
        tap.skip('cannot mount a tmpfs: ' + done.stderr.strip())

    def unmount():
        subprocess.run(['umount', '-l', path], check=True)
        os.rmdir(path)
    tap.cleanup(unmount)
    return path


def fill(path):
    """Somebody else's file takes all that is left."""
    name = os.path.join(path, 'other')
    with open(name, 'wb', buffering=0) as f:
        try:
            while True:
                f.write(b'x' * MIB)
        except OSError as e:
            tap.note('the tmpfs is full: %s' % e)
    return name


@tap.case
def test_tmpfs():
    """a full tmpfs: the guest writes to what was dropped, and all is refused"""
    path = small_tmpfs(RAM + 32)
    ram = os.path.join(path, 'ram')
    # All of it has its place, also what the guest never wrote to: that QEMU
    # would run short of with or without us.
    with open(ram, 'wb') as f:
        os.posix_fallocate(f.fileno(), 0, RAM * MIB)
    vm = merged_vm('file-shared', ram_path=ram)
    vm.agent.ask('alloc z 12000 zero')
    dedup.wait_until(lambda: dedup.stats(vm)['zero-pages'] > 11000,
                     'dropped pages')
    other = fill(path)
    # What was dropped has no place in the file any more.
    vm.agent.ask('rewrite z 1')
    vm.agent.ask('touch d 3')
    lives(vm, None, 'a full tmpfs')
    vm.check_regions('zd')
    # Others' room, given back once more and taken, is not counted on.
    reasons = dedup.wait_until(
        lambda: dedup.stats(vm)['blocked-reasons'], 'reason')
    tap.check([r['reason'] for r in reasons] == ['file-system-full'],
              str(reasons))
    refuse_all(vm, None, 'file system of memory')
    os.unlink(other)
    dedup.run(vm, True)
    # Isolated pages may have used up the mappings by now.
    dedup.wait_until(
        lambda: 'file-system-full' not in
        [r['reason'] for r in dedup.stats(vm)['blocked-reasons']],
        'end of the reason')
    vm.check_regions('zd')
    restore_late(vm, None)


@tap.case
def test_late_cgroup():
    """moved to a cgroup when it runs: it does not publish beyond the limit"""
    cgroup = host.Cgroup()
    group = vms.group_dir()
    vm = vms.VM('late', ram=256, backing='ram', group=group,
                dedup=dict(dedup.FULL_SPEED, run='off'))
    vm.start().boot()
    partner = vms.VM('partner', ram=192, group=group, dedup=dedup.FULL_SPEED)
    partner.start().boot()
    partner.agent.ask('alloc s 24000 same 3')
    dedup.wait_scans([partner], 2)
    cgroup.enter(vm.pid)
    vm.agent.ask('alloc s 24000 same 3')
    # 94 MiB of it are charged; 60 more are not enough to publish them all
    # and have them written.
    cgroup.limit(cgroup.usage() + ROOM * MIB)
    dedup.run(vm, True)
    dedup.wait_scans([vm, partner], 4)
    tap.note(dedup.summary(vm))
    vm.agent.ask('rewrite s 1')
    vm.agent.ask('rewrite s 2')
    tap.check(vm.alive() and cgroup.kills() == 0, 'killed')
    vm.check_regions('s')
    partner.check_regions('s')
    vm.quit()


host.prepare()
tap.main()
