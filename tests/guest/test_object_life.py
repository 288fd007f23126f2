#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The object comes and goes, again and again, under a guest that works.

The guest stores to memory and does I/O without a pause, so that its vCPU is
often found in QEMU, waiting for the lock that object-del holds.
"""

import os

import bareguest
import dedup
import host
import tap
import vm as vms
from qmp import QMPError

ROUNDS = 50
DISK = (4096, 9, 700)           # blocks, seed, distinct
ANSWER = 60                     # seconds in which QEMU answers, or hangs


def add(vm):
    """A late object-add."""
    vm.qmp.command('object-add', dict(
        {'qom-type': 'dedup-scanner', 'id': 'ds0'}, **dedup.FULL_SPEED),
        ANSWER)


def refuse(vm, what, properties):
    """A late object-add that fails."""
    try:
        vm.qmp.command('object-add', dict(
            {'qom-type': 'dedup-scanner', 'id': 'ds1'}, **properties), ANSWER)
    except QMPError as e:
        if what not in str(e):
            raise
        return
    tap.check(False, 'not refused: %s' % properties)


def come_and_go(vm, at_least):
    """unmerge, object-del, object-add; and what fails in between."""
    for i in range(ROUNDS):
        dedup.wait_merged(vm, at_least)
        if i % 5 == 0:
            refuse(vm, 'only one dedup-scanner', {})
        dedup.unmerge(vm)
        vm.qmp.command('object-del', {'id': 'ds0'}, ANSWER)
        if i % 5 == 1:
            refuse(vm, 'write-protect', {'write-protect': 'none'})
            refuse(vm, 'group', {'group': 'no/such'})
        tap.check(vm.qmp.command('query-status', timeout=ANSWER)['running'],
                  'the guest does not run')
        add(vm)
    tap.note(dedup.summary(vm))


@tap.case
def test_tcg():
    """a Linux guest with stores and disk reads, TCG"""
    disk = os.path.join(vms.scratch(), 'disk')
    host.make_disk(disk, *DISK)
    vm = vms.VM('life', ram=160, disk=disk, dedup=dedup.FULL_SPEED)
    vm.start().boot()
    vm.agent.ask('alloc d 8000 dup 4')
    vm.agent.ask('alloc u 2000 signed')
    vm.agent.ask('loop u start 16')
    vm.agent.ask('dio-start /dev/vda %d %d %d 4 24 2' %
                 (DISK[1], DISK[2], DISK[0]))
    come_and_go(vm, 4000)
    got = vm.agent.get('dio-stat')
    tap.check(got['errors'] == 0 and got['lost'] == 0, str(got))
    vm.agent.ask('dio-stop')
    vm.agent.ask('loop u stop')
    vm.check_regions('du')
    vm.quit()


@tap.case
def test_kvm():
    """a bare guest that stores and prints, KVM"""
    vm = bareguest.start('memfd-shared', dedup=dedup.FULL_SPEED)
    bareguest.command(vm, b'w')
    come_and_go(vm, 1)
    bareguest.wait_round(vm, 2)
    bareguest.wait_verified(vm)
    vm.quit()


@tap.case
def test_late_boot():
    """with the defaults, of a VM that is started paused as libvirt does"""
    vm = vms.VM('late', ram=384, backing='plain', dedup={}, extra=('-S',))
    vm.start()
    dedup.wait_until(lambda: dedup.stats(vm)['full-scans'] >= 3,
                     'passes over an empty guest')
    vm.cont()
    vm.boot()
    vm.agent.ask('alloc d 40000 dup 4')
    # At the pace of a pass over nothing it would take minutes: this is the
    # time that is tried, on a busy host as well.
    dedup.wait_until(lambda: dedup.stats(vm)['pages-merged'] >= 20000,
                     'merging at full speed', 60, patience=1)
    tap.note(dedup.summary(vm))
    vm.check_regions('d')


host.prepare()
tap.main()
