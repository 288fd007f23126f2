#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Who needs memory whole gets it while a disk writes to it without a pause.

Transfers end in QEMU's main loop, which is where a plug and the start of a
migration wait for the pages.
"""

import os
import socket
import threading

import bareguest
import dedup
import host
import tap
import vm as vms
from qmp import QMPError

DISK = (8192, 9, 700)           # blocks, seed, distinct
ROUNDS = 8


def busy_guest(aio):
    """A guest whose disk reads go into pages that are being merged."""
    disk = os.path.join(vms.scratch(), 'disk')
    host.make_disk(disk, *DISK)
    vm = vms.VM('busy', ram=224, disk=disk, aio=aio, backing='file-shared',
                dedup=dedup.FULL_SPEED)
    vm.start().boot()
    vm.agent.ask('alloc d 12000 dup 4')
    vm.agent.ask('dio-start /dev/vda %d %d %d 12 24 2' %
                 (DISK[1], DISK[2], DISK[0]))
    dedup.wait_merged(vm, 8000)
    return vm


def check(vm):
    """Every read has arrived, and nothing else has changed."""
    got = vm.agent.get('dio-stat')
    tap.note('%s; %s' % (got, dedup.summary(vm)))
    tap.check(got['errors'] == 0 and got['lost'] == 0, str(got))
    vm.check_regions('d')


class Peer(threading.Thread):
    """A back end that hangs up when it hears from QEMU: by then the memory
    must be whole."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        self.heard = 0
        self.start()

    def run(self):
        sock = self.listener.accept()[0]
        self.heard = len(sock.recv(12))
        sock.close()
        self.listener.close()


def plug(vm, number):
    """Plug a device that needs the memory whole; its back end hangs up."""
    path = vm.path('vhost%d' % number)
    name = 'c%d' % number
    peer = Peer(path)
    vm.qmp.command('chardev-add', {'id': name, 'backend': {
        'type': 'socket', 'data': {'server': False, 'addr': {
            'type': 'unix', 'data': {'path': path}}}}})
    try:
        vm.qmp.command('device_add', {
            'driver': 'vhost-user-fs-pci', 'id': 'fs%d' % number,
            'tag': 't', 'chardev': name})
    except QMPError as e:
        tap.check('not merged' not in str(e), str(e))
    peer.join(30)
    tap.check(peer.heard, 'the back end was never asked')
    vm.qmp.command('chardev-remove', {'id': name})


@tap.case
def test_plug():
    """device_add of vhost-user-fs under disk reads"""
    for aio in 'threads', 'io_uring':
        vm = busy_guest(aio)
        for i in range(ROUNDS):
            plug(vm, i)
            dedup.wait_merged(vm, 6000)
        check(vm)
        vm.agent.ask('dio-stop')
        vm.quit()


@tap.case
def test_plug_kvm():
    """the same beside a KVM guest that runs and writes, without userfaultfd"""
    vm = bareguest.start('memfd-shared',
                         dedup=dict(dedup.FULL_SPEED,
                                    **{'write-protect': 'mprotect'}))
    for i in range(ROUNDS):
        bareguest.command(vm, b'b' if i % 2 else b'w')
        bareguest.wait_round(vm, 1)
        dedup.wait_merged(vm, 20)
        plug(vm, i)
        bareguest.wait_round(vm, 1)
    bareguest.command(vm, b'q')
    bareguest.wait_round(vm, 1)
    bareguest.wait_verified(vm)
    vm.quit()


@tap.case
def test_ignore_shared():
    """migration that leaves RAM in its file, under disk reads"""
    vm = busy_guest('threads')
    vm.qmp.command('migrate-set-capabilities', {'capabilities': [
        {'capability': 'x-ignore-shared', 'state': True}]})
    for _ in range(ROUNDS):
        vm.qmp.command('migrate', {'uri': 'exec:cat > /dev/null'})
        info = dedup.wait_until(
            lambda: (lambda i: i['status'] in ('failed', 'completed') and i)(
                vm.qmp.command('query-migrate')), 'end of the migration')
        tap.check(info['status'] == 'completed', str(info))
        tap.check(dedup.stats(vm)['pages-merged'] == 0, dedup.summary(vm))
        vm.cont()
        dedup.wait_merged(vm, 6000)
    check(vm)
    vm.agent.ask('dio-stop')
    vm.quit()


host.prepare()
tap.main()
