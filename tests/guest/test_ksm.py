#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A dedup-scanner for VMs whose memory KSM has merged, at a hard limit.

RAM is taken from KSM page by page, where it is merged anew: what KSM saves is
not taken back first.
"""

import dedup
import host
import tap
import vm as vms
from host import MIB

RAM = 384
PAGES = 70000                   # 273 MiB of it


def start(count, pattern):
    """VMs in one cgroup that KSM has merged."""
    ksm = host.Ksm()
    cgroup = host.Cgroup()
    machines = [vms.VM('vm%d' % i, ram=RAM, backing='ram', cgroup=cgroup)
                for i in range(count)]
    for vm in machines:
        vm.start().boot()
        vm.agent.ask('alloc r %d %s' % (PAGES, pattern))
    before = cgroup.usage()
    ksm.merge([vm.pid for vm in machines])
    tap.note('charged %d MiB, with KSM %d MiB' % (before // MIB,
                                                  cgroup.usage() // MIB))
    tap.check(cgroup.usage() < before * 2 // 3, 'KSM has merged too little')
    return cgroup, machines


def add(machines, group=None):
    """object-add on each."""
    for vm in machines:
        options = dict(dedup.FULL_SPEED)
        if group:
            options['group'] = group
        vm.qmp.command('object-add', dict(options, **{
            'qom-type': 'dedup-scanner', 'id': 'ds0'}))


def watch(cgroup, machines, scans):
    """Wait for full scans; the highest usage that was seen."""
    highest = 0

    def done():
        nonlocal highest
        highest = max(highest, cgroup.usage())
        for vm in machines:
            tap.check(vm.alive(), vm.name + ' is dead')
        return all(dedup.stats(vm)['full-scans'] >= scans for vm in machines)

    dedup.wait_until(done, '%d full scans' % scans, 150, 0.005)
    return highest


def check(cgroup, machines):
    """All live, and every byte is right."""
    for vm in machines:
        tap.note(dedup.summary(vm))
        vm.check_regions('r')
        tap.check(vm.alive(), vm.name + ' is dead')
    tap.check(cgroup.kills() == 0, 'the limit killed a process')
    for vm in machines:
        vm.quit()


@tap.case
def test_short():
    """KSM brought a VM to 30 %, 100 MiB are left: object-add, it lives"""
    cgroup, machines = start(1, 'dup 4')
    usage = cgroup.usage()
    cgroup.limit(usage + 100 * MIB)
    add(machines)
    highest = watch(cgroup, machines, 6)
    tap.note('at most %d MiB more' % ((highest - usage) // MIB))
    state = dedup.stats(machines[0])
    tap.check(state['state'] == 'limited' and
              [b['reason'] for b in state['blocked-reasons']] == ['memory'],
              'not limited by memory')
    check(cgroup, machines)


@tap.case
def test_two():
    """KSM merged two VMs, 60 MiB are left: object-add on both, they live"""
    cgroup, machines = start(2, 'same 3')
    usage = cgroup.usage()
    cgroup.limit(usage + 60 * MIB)
    add(machines, vms.group_dir())
    highest = watch(cgroup, machines, 6)
    tap.note('at most %d MiB more' % ((highest - usage) // MIB))
    check(cgroup, machines)


@tap.case
def test_room():
    """with room for all: merged by us, and KSM's savings are kept"""
    cgroup, machines = start(1, 'dup 4')
    usage = cgroup.usage()
    cgroup.limit(usage + 600 * MIB)
    add(machines)
    highest = watch(cgroup, machines, 6)
    tap.note('at most %d MiB more, then %d MiB more' %
             ((highest - usage) // MIB, (cgroup.usage() - usage) // MIB))
    # A segment has a page that KSM has still, for the copies yet to come.
    tap.check(highest < usage + PAGES * host.PAGE // 4 + 48 * MIB,
              "KSM's savings were taken back")
    tap.check(cgroup.usage() < usage + 40 * MIB, 'less is saved than by KSM')
    tap.check(dedup.stats(machines[0])['pages-merged'] >= PAGES,
              'not all is merged')
    check(cgroup, machines)


host.prepare()
tap.main()
