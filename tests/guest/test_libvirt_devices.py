#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What virsh changes of a domain that is merged: balloon, DIMM, disk; and
what a domain's XML has that keeps it from being merged.

As libvirt-qemu, at full speed.
"""

import os

import dedup
import host as machine
import tap
import virsh
import virthost
from host import MIB

RAM = 192
TAKE = 64
DIMM = ("<memory model='dimm'><target><size unit='MiB'>128</size>"
        '<node>0</node></target></memory>')
DISK = 2048, 9, 2048            # arguments of host.make_disk()


def running(host, **kwargs):
    """A domain with something that is merged."""
    vm = virsh.Domain(host, 'devices', group='web', **kwargs).start().boot()
    vm.agent.ask('alloc keep 4000 dup 4')
    vm.agent.ask('alloc m 2000 mixed')
    dedup.wait_merged(vm, 3000)
    return vm


def memstat(vm, name):
    """A figure of dommemstat in bytes."""
    for line in vm.virsh('dommemstat', '@').splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1]) * 1024
    raise LookupError(name)


@tap.case
def test_setmem():
    """setmem takes merged pages away and gives them back"""
    vm = running(virsh.prepared_host())
    # Freed pages stay merged until the balloon takes them.
    vm.agent.ask('alloc d 20000 dup 3')
    dedup.wait_merged(vm, 20000)
    vm.agent.ask('drop d')
    before = dedup.stats(vm)['pages-merged']
    for size in RAM - TAKE, RAM:
        vm.virsh('setmem', '@', '%dM' % size, '--live')
        dedup.wait_until(lambda: memstat(vm, 'actual') == size * MIB,
                         'balloon of %d MiB' % size)
        vm.check_regions(['keep', 'm'])
        if size != RAM:
            after = dedup.stats(vm)['pages-merged']
            tap.note('merged: %d, with the balloon %d' % (before, after))
            tap.check(after < before - 5000, 'the balloon took none')
    vm.agent.ask('alloc n 15000 dup 5')
    dedup.wait_merged(vm, 15000)
    vm.check_regions(['keep', 'm', 'n'])
    tap.check(memstat(vm, 'rss') > 0, 'no rss')


def block(vm, name):
    """The figures of one RAM block, or None."""
    for b in dedup.stats(vm)['blocks']:
        if b['id'].endswith(name):
            return b
    return None


@tap.case
def test_dimm():
    """attach-device and detach-device of a DIMM"""
    host = virsh.prepared_host()
    vm = running(host, slots=True)
    path = '/var/lib/libvirt/dimm.xml'
    with open(host.path(path), 'w', encoding='utf-8') as f:
        f.write(DIMM)
    vm.virsh('attach-device', '@', path, '--live')
    dedup.wait_until(lambda: vm.agent.get('online')['blocks'],
                     'plugged memory in the guest')
    # More than the main memory has left
    vm.agent.ask('alloc d 35000 dup 4')
    dedup.wait_until(lambda: (block(vm, 'dimm0') or
                              {}).get('pages-merged', 0) > 5000,
                     'merged pages in the DIMM')
    vm.check_regions(['keep', 'm', 'd'])
    tap.note(dedup.summary(vm))
    vm.agent.ask('drop d')
    vm.virsh('detach-device', '@', path, '--live')
    dedup.wait_until(lambda: 'dimm' not in vm.virsh('dumpxml', '@'),
                     'end of the DIMM')
    dedup.wait_until(lambda: block(vm, 'dimm0') is None,
                     'end of its block in the figures')
    vm.check_regions(['keep', 'm'])


@tap.case
def test_blockcopy():
    """blockcopy under a guest that reads into pages that are merged"""
    host = virsh.prepared_host()
    os.makedirs(host.path(virthost.IMAGES))
    disk = virthost.IMAGES + '/devices.raw'
    copy = virthost.IMAGES + '/copy.qcow2'
    machine.make_disk(host.path(disk), *DISK)
    vm = running(host, disk=disk, format='raw')
    vm.agent.ask('dio-start /dev/vda %d %d %d 2 16 4'
                 % (DISK[1], DISK[2], DISK[0]))
    vm.virsh('blockcopy', '@', 'vda', '--dest', copy, '--format', 'qcow2',
             '--transient-job', '--wait', '--pivot')
    tap.check(copy in vm.virsh('domblklist', '@'), vm.virsh('domblklist', '@'))
    reads = vm.agent.get('dio-stat')['reads']
    dedup.wait_scans([vm], 2)
    dedup.wait_until(lambda: vm.agent.get('dio-stat')['reads'] > reads,
                     'reads from the copy')
    got = vm.agent.get('dio-stop')
    tap.note(got)
    tap.check(got['errors'] == 0 and got['lost'] == 0, got)
    vm.check_regions(['keep', 'm'])


def blocked(vm, reason, *texts):
    """It runs, blocked for this, and the detail says what to change."""
    dedup.wait_state(vm, ['blocked'])
    found = [b['detail'] for b in dedup.stats(vm)['blocked-reasons']
             if b['reason'] == reason]
    tap.check(found and all(t in found[0] for t in texts),
              dedup.stats(vm)['blocked-reasons'])
    tap.check('dedup-scanner is blocked (%s)' % reason in vm.log(), vm.log())
    vm.virsh('destroy', '@')


@tap.case
def test_locked():
    """<locked/> is named as what keeps it from being merged"""
    host = virsh.prepared_host()
    vm = virsh.Domain(host, 'locked', ram=64, backing='<locked/>', more=(
        "<memtune><hard_limit unit='MiB'>1024</hard_limit></memtune>"))
    try:
        vm.start('--paused')
    except virthost.Failed as e:
        if 'cannot limit locked memory' in str(e):
            tap.skip('libvirtd may not raise a limit: no CAP_SYS_RESOURCE')
        raise
    blocked(vm, 'mem-lock', '<locked/>')


@tap.case
def test_forbidden():
    """<nosharepages/>, a file on a disk: each is named"""
    host = virsh.prepared_host()
    vm = virsh.Domain(host, 'nosharepages', ram=64, backing='<nosharepages/>')
    blocked(vm.start('--paused'), 'mem-merge-off', '<nosharepages/>')
    host.umount(virsh.RAM_DIR)
    vm = virsh.Domain(host, 'disk', ram=64, memory='file')
    blocked(vm.start('--paused'), 'no-eligible-memory', 'memory_backing_dir',
            "<source type='memfd'/>")


machine.prepare()
tap.main()
