#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that is plugged into a running guest is merged, and unplugged."""

import dedup
import host
import tap
import vm as vms
from host import MIB

SIZE = 256


def block(vm, name):
    """The figures of one RAM block, or None."""
    for b in dedup.stats(vm)['blocks']:
        if b['id'].endswith(name):
            return b
    return None


def plug_unplug(backend, properties):
    """Plug, merge, check, unplug; then once more."""
    vm = vms.VM('h', ram=192, hotplug=True, dedup=dedup.FULL_SPEED)
    vm.start().boot()
    vm.agent.ask('alloc s 4000 same 3')
    vm.agent.ask('alloc u 2000 signed')
    vm.agent.ask('loop u start 16')
    for turn in range(2):
        vm.qmp.command('object-add', dict(
            {'qom-type': backend, 'id': 'mem1', 'size': SIZE * MIB},
            **properties))
        vm.qmp.command('device_add', {'driver': 'pc-dimm', 'id': 'dimm1',
                                      'memdev': 'mem1'})
        dedup.wait_online(vm, SIZE)
        # More than the main memory has left.
        vm.agent.ask('alloc d 50000 dup 4')
        dedup.wait_until(
            lambda: (block(vm, 'mem1') or {}).get('pages-merged', 0) > 20000,
            'merged pages in the plugged memory', 90)
        tap.check(block(vm, 'mem1')['eligible'], str(block(vm, 'mem1')))
        vm.agent.ask('touch d 5')
        vm.check_regions('dsu')
        tap.note(dedup.summary(vm))
        vm.agent.ask('drop d')
        if turn:
            dedup.run(vm, False)
        vm.qmp.command('device_del', {'id': 'dimm1'})
        vm.qmp.wait_event('DEVICE_DELETED', 60,
                          lambda data: data.get('device') == 'dimm1')
        vm.qmp.command('object-del', {'id': 'mem1'})
        dedup.wait_until(lambda: block(vm, 'mem1') is None,
                         'end of the unplugged block in the figures', 10)
        vm.check_regions('su')
    dedup.run(vm, True)
    dedup.wait_scans([vm], 1)
    vm.agent.ask('loop u stop')
    vm.check_regions('su')
    vm.quit()


@tap.case
def test_memfd():
    """memory-backend-memfd, share=on"""
    plug_unplug('memory-backend-memfd', {'share': True})


@tap.case
def test_anonymous():
    """memory-backend-ram"""
    plug_unplug('memory-backend-ram', {})


host.prepare()
tap.main()
