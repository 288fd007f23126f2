#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Three Linux guests in one group keep every byte while they are merged.

RAM of three kinds; in each guest a loop writes and checks pages of every
pattern, and O_DIRECT reads through cache=none come in by another aio each.
"""

import os
import time

import dedup
import host
import tap
import vm as vms
from host import MIB

DISK = (4096, 9, 700)           # blocks, seed, distinct
REGIONS = 'umd'


def start_work(vm):
    """Fill the guest and start its loops."""
    vm.boot()
    vm.agent.ask('alloc u 3000 signed')
    vm.agent.ask('alloc m 4000 mixed')
    vm.agent.ask('alloc d 4000 same 11')
    vm.agent.ask('loop u start 16')
    vm.agent.ask('loop m start 64')
    vm.agent.ask('dio-start /dev/vda %d %d %d 4 12 4' %
                 (DISK[1], DISK[2], DISK[0]))


def check_work(vm):
    """Nothing wrong so far, and the loops go on."""
    got = vm.agent.get('dio-stat')
    tap.check(got['errors'] == 0, '%s: dio: %s' % (vm.name, got))
    for name in 'um':
        state = vm.agent.get('loop %s query' % name)
        tap.check(state['errors'] == 0, '%s: %s' % (vm.name, state))
    return got['rounds']


def work_on(vm_list, rounds=3, timeout=100):
    """Let every guest get through so many rounds of reads."""
    target = {vm: check_work(vm) + rounds for vm in vm_list}
    for vm in vm_list:
        dedup.wait_until(lambda: check_work(vm) >= target[vm],
                         'progress of ' + vm.name, timeout, 0.2)
        tap.note(dedup.summary(vm))


def end_work(vm):
    """Stop the loops and check every byte."""
    got = vm.agent.get('dio-stop')
    tap.check(got['errors'] == 0 and got['rounds'] > 0, str(got))
    for name in 'um':
        vm.agent.ask('loop %s stop' % name)
    vm.check_regions(REGIONS)


@tap.case
def test_three_guests():
    """merged at full speed, off and on, unmerged, one killed: all right"""
    group = vms.group_dir()
    cgroup = host.Cgroup()
    disk = os.path.join(vms.scratch(), 'disk')
    host.make_disk(disk, *DISK)
    kinds = [('file-shared', 'threads'), ('memfd-shared', 'native'),
             ('plain', 'io_uring')]
    guests = [vms.VM(kind, ram=160, backing=kind, aio=aio, disk=disk,
                     group=group, cgroup=cgroup, dedup=dedup.FULL_SPEED)
              for kind, aio in kinds]
    for vm in guests:
        vm.start()
    for vm in guests:
        start_work(vm)
    for vm in guests:
        dedup.wait_merged(vm, 3000)
        tap.check(dedup.eligible(vm), vm.name + ': no block is eligible')
    work_on(guests)
    members = dedup.stats(guests[0])['group']['members']
    tap.check(members == 3, '%d members' % members)

    tap.note('off and on')
    for _ in range(3):
        for vm in guests:
            dedup.run(vm, False)
            tap.check(dedup.wait_state(vm, ['stopped'])['pages-merged'] > 0,
                      vm.name + ': run=off gave the merged pages back')
            time.sleep(0.2)     # the guests write into merged pages
            dedup.run(vm, True)
    work_on(guests, 2)

    tap.note('unmerge')
    for vm in guests:
        dedup.unmerge(vm)
        check_work(vm)
    work_on(guests, 2)
    # All segments are gone: what is shared has to be found anew, by all.
    for vm in guests:
        dedup.run(vm, True)
    for vm in guests:
        dedup.wait_merged(vm, 3000)

    tap.note('SIGKILL of one, another joins')
    victim = max(guests, key=lambda v: dedup.stats(v)['pages-merged'])
    guests.remove(victim)
    victim.kill()
    work_on(guests, 2)
    fresh = vms.VM('fresh', ram=160, backing='memfd-shared', disk=disk,
                   group=group, cgroup=cgroup, dedup=dedup.FULL_SPEED)
    guests.append(fresh)
    start_work(fresh.start())
    # Its pages of region d are the others' as well.
    dedup.wait_until(
        lambda: dedup.stats(fresh)['pages-merged-between'] >= 3000,
        'pages that the new member shares')
    work_on(guests, 2)
    for vm in guests:
        end_work(vm)

    tap.note('the last one leaves nothing')
    guests[0].quit()
    guests[1].kill()
    guests[2].kill()
    tap.check(cgroup.shmem() < MIB / 2,
              'shared memory left: %d' % cgroup.shmem())
    left = sum(os.lstat(os.path.join(where, f)).st_blocks * 512
               for where, _, files in os.walk(group) for f in files)
    tap.check(left <= 64 * 1024, '%d bytes in the group directory' % left)


host.prepare()
tap.main()
