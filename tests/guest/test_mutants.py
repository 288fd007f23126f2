#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# alone
"""What the guests' own checks see when a guard is taken out of the engine.

The same run is made without the mutant: it must be right there.
"""

import os
import time

import backends
import dedup
import host
import tap
import vm as vms
from qmp import Timeout

QEMU = os.path.join(host.QEMU_DIR, 'mutants', 'qemu-system-x86_64')
DISK = (4096, 9, 700)           # blocks, seed, distinct
GUARDED_SECONDS = 20


def guest(mutant, way='userfaultfd'):
    """A guest that reads with O_DIRECT into pages that are being merged, and
    rewrites others."""
    disk = os.path.join(vms.scratch(), 'disk')
    host.make_disk(disk, *DISK)
    vm = vms.VM('mutant%d' % mutant, ram=128, qemu=QEMU, disk=disk,
                aio='threads', env={'DEDUP_MUTANT': str(mutant)},
                dedup=dict(dedup.FULL_SPEED, **{'write-protect': way}))
    vm.start().boot()
    # Copies of what the buffers hold while they wait (agent-dio.c).
    vm.agent.ask('dio-start /dev/vda %d %d %d 8 24 2' %
                 (DISK[1], DISK[2], DISK[0]))
    return vm


def wait_errors(vm, patience):
    """Run until the guest finds an error, or so long."""
    try:
        dedup.wait_until(lambda: vm.agent.get('dio-stat')['errors'],
                         'error', GUARDED_SECONDS, 0.2, patience)
    except dedup.Timeout:
        pass
    got = vm.agent.get('dio-stat')
    tap.note('%s; %s' % (got, dedup.summary(vm)))
    return got


@tap.case
def test_guarded():
    """no mutant: every read arrives"""
    vm = guest(0)
    got = wait_errors(vm, 1)
    tap.check(got['errors'] == 0 and got['rounds'] > 0, str(got))
    tap.check(dedup.stats(vm)['cow-breaks'] > 100, 'nothing was merged')
    vm.agent.ask('dio-stop')
    vm.quit()


@tap.case
def test_m1():
    """M1, DMA counters not read after the freeze: a read is lost"""
    vm = guest(1)
    got = wait_errors(vm, 20)
    tap.check(got['lost'] > 0, 'no read was lost: %s' % got)


@tap.case
def test_mprotect_guarded():
    """no mutant, mprotect: every read arrives"""
    vm = guest(0, 'mprotect')
    got = wait_errors(vm, 1)
    tap.check(got['errors'] == 0 and got['rounds'] > 0, str(got))
    tap.check(dedup.stats(vm)['cow-breaks'] > 100, 'nothing was merged')
    vm.agent.ask('dio-stop')
    vm.quit()


@tap.case
def test_m21():
    """M21, a map for DMA does not wait for a window: a read fails"""
    vm = guest(21, 'mprotect')
    got = wait_errors(vm, 20)
    tap.check(got['errors'] > 0, 'no read failed: %s' % got)


def exported(mutant):
    """A guest with a disk by plain vhost-user, whose back end has the guest's
    RAM mapped; the scanner starts when the guest is at work."""
    disk = backends.Storage(size=32).start()
    vm = vms.VM('exported%d' % mutant, ram=192, qemu=QEMU,
                env={'DEDUP_MUTANT': str(mutant)},
                extra=disk.options('disk'),
                dedup=dict(dedup.FULL_SPEED, run='off'))
    vm.start().boot()
    vm.agent.ask('io-start disk /dev/vda 32 512 direct 4 2048 zero')
    dedup.wait_until(lambda: vm.agent.get('io-stat disk')['ops'] > 200,
                     'requests')
    dedup.run(vm, True)
    return vm


@tap.case
def test_exported():
    """no mutant, plain vhost-user: nothing is merged, every byte is right"""
    vm = exported(0)
    before = vm.agent.get('io-stat disk')['ops']
    dedup.wait_until(
        lambda: vm.agent.get('io-stat disk')['ops'] > before + 500,
        'requests')
    got = vm.agent.get('io-stop disk')
    tap.note('%s; %s' % (got, dedup.summary(vm)))
    tap.check(got['bad'] == 0 and got['err'] == 0, str(got))
    tap.check(dedup.stats(vm)['pages-merged'] == 0, dedup.summary(vm))
    vm.quit()


@tap.case
def test_m24():
    """M24, vhost-user does not say that it exports RAM: wrong bytes"""
    for turn in range(3):
        vm = exported(24)
        got = {'bad': 0}
        deadline = time.monotonic() + 60 * tap.PATIENCE
        try:
            while not got['bad'] and time.monotonic() < deadline:
                got = vm.agent.get('io-stat disk', 10)
                time.sleep(0.2)
        except Timeout:
            tap.note('the guest does not answer: its rings are merged, too')
        tap.note('%d: %s; %s' % (turn, got, dedup.summary(vm)))
        tap.check(dedup.stats(vm)['pages-merged'] > 1000, dedup.summary(vm))
        if got['bad']:
            return
        vm.kill()
    tap.check(False, 'no wrong byte')


host.prepare()
if not os.access(QEMU, os.X_OK):
    print('Bail out! %s is not built' % QEMU, flush=True)
    raise SystemExit(1)
tap.main()
