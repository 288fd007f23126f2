#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is blocked hears of it on stderr, where libvirt's log has it: once, for
as long as it lasts.

No guest runs.
"""

import os
import socket
import tempfile

import dedup
import host
import tap
import vm as vms
from outside import Machine
from qmp import QMPError


def warnings(vm):
    """The lines about deduplication."""
    with open(vm.path('stderr'), encoding='utf-8') as f:
        return [line.strip() for line in f if 'dedup-scanner' in line]


@tap.case
def test_not_tmpfs():
    """file RAM on a disk: one warning that says what to change"""
    with tempfile.TemporaryDirectory(dir='/var/tmp') as where:
        vm = Machine('disk', backing='file-shared', dedup={},
                     ram_path=os.path.join(where, 'ram')).start()
        dedup.wait_until(lambda: warnings(vm), 'warning')
        for _ in range(3):
            dedup.run(vm, False)
            dedup.wait_state(vm, ['stopped'])
            dedup.run(vm, True)
            dedup.wait_state(vm, ['blocked'])
        got = warnings(vm)
        tap.note(got)
        tap.check(len(got) == 1 and 'no-eligible-memory' in got[0] and
                  "'ram0'" in got[0] and 'tmpfs' in got[0], str(got))
        vm.quit()


@tap.case
def test_group():
    """a group that may not be used: one warning with the group"""
    group = vms.group_dir()
    os.chmod(group, 0o777)
    vm = Machine('group', backing='ram', dedup={}, group=group).start()
    dedup.wait_until(lambda: warnings(vm), 'warning')
    dedup.wait_until(lambda: dedup.stats(vm)['state'] == 'blocked', 'state')
    got = warnings(vm)
    tap.note(got)
    tap.check(len(got) == 1 and '(group)' in got[0] and group in got[0],
              str(got))
    os.chmod(group, 0o700)
    dedup.wait_until(lambda: dedup.stats(vm)['state'] != 'blocked', 'state')
    tap.check(len(warnings(vm)) == 1, str(warnings(vm)))
    vm.quit()


def blocked_by_export(vm):
    """Does a device keep RAM from being merged?"""
    return any(b['reason'] == 'ram-exported'
               for b in dedup.stats(vm)['blocked-reasons'])


@tap.case
def test_plug():
    """a device whose plug fails: each time it is tried there is a warning"""
    vm = Machine('plug', backing='memfd-shared', dedup={}).start()
    dedup.wait_scans([vm], 1)
    for i in range(3):
        with socket.socket(socket.AF_UNIX) as listener:
            path = vm.path('vhost%d' % i)
            listener.bind(path)
            listener.listen(1)
            vm.qmp.command('chardev-add', {'id': 'c%d' % i, 'backend': {
                'type': 'socket', 'data': {'server': False, 'addr': {
                    'type': 'unix', 'data': {'path': path}}}}})
            listener.accept()[0].close()
        try:
            vm.qmp.command('device_add', {
                'driver': 'vhost-user-fs-pci', 'id': 'fs', 'tag': 't',
                'chardev': 'c%d' % i})
            tap.check(False, 'the plug did not fail')
        except QMPError as e:
            tap.note(str(e))
        dedup.wait_until(lambda: not blocked_by_export(vm), 'end of export')
        got = [w for w in warnings(vm) if '(ram-exported)' in w]
        tap.check(len(got) == i + 1 and "chardev 'c%d'" % i in got[i],
                  str(warnings(vm)))
    vm.quit()


@tap.case
def test_healthy():
    """a machine that merges, and one that waits for a migration: none"""
    vm = Machine('good', backing='memfd-shared', dedup={}).start()
    dedup.wait_scans([vm], 2)
    tap.check(not warnings(vm), str(warnings(vm)))
    vm.quit()
    vm = Machine('incoming', backing='memfd-shared', dedup={},
                 incoming='defer').start()
    dedup.wait_state(vm, ['blocked'])
    tap.check(not warnings(vm), str(warnings(vm)))
    vm.quit()


host.prepare()
tap.main()
