#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Migration of a guest that is merged at full speed, to a second QEMU.

In a precopy nothing that the guest writes is lost, case C24.
"""

import os

import dedup
import host
import tap
import vm as vms


def guest(name, incoming=None, group=None):
    """Source and destination are the same but for -incoming."""
    return vms.VM(name, ram=192, group=group, incoming=incoming,
                  dedup=dedup.FULL_SPEED).start()


def work(vm):
    """Contents to merge, and a loop that dirties some of it."""
    vm.boot()
    vm.agent.ask('alloc d 12000 dup 4')
    vm.agent.ask('alloc m 4000 mixed')
    vm.agent.ask('loop m start 200')
    dedup.wait_merged(vm, 8000)
    tap.note(dedup.summary(vm))


def capability(vm, name):
    """Switch on a migration capability."""
    vm.qmp.command('migrate-set-capabilities', {
        'capabilities': [{'capability': name, 'state': True}]})


def status(vm):
    """Where the migration is; a failed one fails the test."""
    info = vm.qmp.command('query-migrate')
    tap.check(info.get('status') not in ('failed', 'cancelled'),
              '%s: %s' % (vm.name, info))
    return info.get('status')


def wait_status(vm, wanted, timeout=100):
    """Wait for the end, or another state, of the migration."""
    dedup.wait_until(lambda: status(vm) in wanted,
                     'migration %s of %s' % (wanted, vm.name), timeout)


def end_work(vm):
    """Everything is right where the guest runs now."""
    vm.agent.ask('loop m stop')
    vm.check_regions('dm')


@tap.case
def test_precopy():
    """precopy: every byte is right at the destination, and merged there"""
    group = vms.group_dir()
    path = os.path.join(vms.scratch(), 'sock')
    source = guest('source', group=group)
    work(source)
    target = guest('target', 'unix:' + path, group)
    source.qmp.command('migrate-set-parameters', {
        'max-bandwidth': 1 << 33, 'downtime-limit': 3000})
    source.qmp.command('migrate', {'uri': 'unix:' + path})
    wait_status(source, ['completed'])
    tap.check(dedup.wait_state(source, ['blocked'])['blocked-reasons'],
              'no reason for blocked')
    dedup.wait_merged(target, 8000)
    tap.note(dedup.summary(target))
    source.kill()
    end_work(target)
    target.quit()


@tap.case
def test_postcopy():
    """postcopy starts and ends, and every byte is right"""
    path = os.path.join(vms.scratch(), 'sock')
    source = guest('source')
    work(source)
    target = guest('target', 'defer')
    for vm in (source, target):
        capability(vm, 'postcopy-ram')
    target.qmp.command('migrate-incoming', {'uri': 'unix:' + path})
    # Slow, so that much is left when postcopy starts.
    source.qmp.command('migrate-set-parameters', {'max-bandwidth': 8 << 20})
    source.qmp.command('migrate', {'uri': 'unix:' + path})
    wait_status(source, ['active'])
    source.qmp.command('migrate-start-postcopy')
    wait_status(source, ['completed'])
    target.agent.ask('list')
    dedup.wait_merged(target, 8000)
    end_work(target)
    target.quit()


@tap.case
def test_background_snapshot():
    """a background snapshot holds the guest as it was at its start"""
    path = os.path.join(vms.scratch(), 'snapshot')
    source = guest('source')
    work(source)
    capability(source, 'background-snapshot')
    source.qmp.command('migrate', {'uri': 'file:' + path})
    wait_status(source, ['completed'])
    end_work(source)
    source.cont()
    dedup.wait_merged(source, 8000)
    source.quit()
    target = guest('target', 'file:' + path)
    wait_status(target, ['completed'])
    if target.qmp.command('query-status')['status'] != 'running':
        target.cont()
    end_work(target)
    target.quit()


host.prepare()
tap.main()
