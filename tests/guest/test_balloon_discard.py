#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""virtio-balloon takes merged pages away: they read zero, the rest is right."""

import dedup
import host
import tap
import vm as vms
from host import MIB, PAGE

RAM = 256
TAKE = 96                       # MiB


def balloon(vm, mib):
    """Set the balloon and wait until the guest has followed."""
    vm.qmp.command('balloon', {'value': mib * MIB})
    dedup.wait_until(
        lambda: vm.qmp.command('query-balloon')['actual'] == mib * MIB,
        'balloon of %d MiB' % mib)


def nonzero(vm):
    """Places of the guest's RAM that hold something."""
    running = dedup.stats(vm)['state'] != 'stopped'
    dedup.run(vm, False)
    dedup.wait_state(vm, ['stopped'])
    count = vms.count_saveable([vm])
    tap.note(count)
    dedup.run(vm, running)
    return count['mapped'] - count['zero']


def inflate_deflate(backing):
    """Free pages that are merged go into the balloon and come back."""
    vm = vms.VM('b', ram=RAM, backing=backing, balloon=True,
                dedup=dedup.FULL_SPEED)
    vm.start().boot()
    vm.agent.ask('alloc m 6000 mixed')
    vm.agent.ask('loop m start 64')
    vm.agent.ask('alloc keep 4000 dup 4 nohuge')
    for turn in range(2):
        # Fill what is free, have it merged, and free it: the guest does not
        # write to a free page, so it stays merged until the balloon takes it.
        vm.agent.ask('alloc d 30000 dup 3')
        dedup.wait_merged(vm, 30000)
        vm.agent.ask('drop d')
        before = nonzero(vm)
        balloon(vm, RAM - TAKE)
        after = nonzero(vm)
        tap.check(before - after >= 0.95 * TAKE * MIB / PAGE,
                  '%d pages in the balloon, but only %d are empty now' %
                  (TAKE * MIB // PAGE, before - after))
        vm.check_regions(['m', 'keep'])
        if turn:
            dedup.unmerge(vm)
            again = nonzero(vm)
            tap.check(again - after < 1000, 'unmerging filled %d pages of '
                      'the balloon' % (again - after))
        else:
            dedup.wait_scans([vm], 2)
        balloon(vm, RAM)
        vm.agent.ask('alloc n 30000 same 5')
        vm.check_regions(['m', 'n', 'keep'])
        vm.agent.ask('drop n')
    vm.agent.ask('loop m stop')
    vm.check_regions(['m', 'keep'])
    vm.quit()


@tap.case
def test_memfd():
    """memory-backend-memfd, share=on"""
    inflate_deflate('memfd-shared')


@tap.case
def test_anonymous():
    """memory-backend-ram"""
    inflate_deflate('ram')


host.prepare()
tap.main()
