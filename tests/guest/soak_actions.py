# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU is asked to do in a soak; a function for each.

A function gets the soak and a VM, and fails by raising.  It raises tap.Skip
where the VM is not one for it, or not now.
"""

import os

import dedup
import tap
from host import MIB
from qmp import QMPError


def run_off_on(soak, vm):
    """run=off, run=on"""
    dedup.run(vm, False)
    dedup.wait_state(vm, ['stopped', 'blocked'])
    soak.work(0.5)
    dedup.run(vm, True)


def pace(soak, vm):
    """another pace"""
    dedup.set_property(vm, 'sleep-millisecs', soak.random.choice([0, 0, 5]))
    dedup.set_property(vm, 'pages-to-scan',
                       soak.random.choice([1 << 20, 20000]))


def unmerge(soak, vm):
    """dedup-unmerge, run=on"""
    if dedup.stats(vm)['state'] in ('blocked', 'stopped'):
        tap.skip('nothing is merged now')
    soak.count(vm)
    dedup.unmerge(vm)
    soak.count(vm)
    dedup.run(vm, True)


def new_object(soak, vm):
    """unmerge, object-del, object-add"""
    unmerge(soak, vm)
    dedup.unmerge(vm)
    vm.qmp.command('object-del', {'id': 'ds0'})
    soak.forget(vm)
    vm.qmp.command('object-add', dict(vm.dedup, **{
        'qom-type': 'dedup-scanner', 'id': 'ds0'}))


def rewrite(soak, vm):
    """all pages of a region are written anew"""
    vm.agent.ask('rewrite d %d' % soak.random.randrange(1, 1000))


def churn(soak, vm):
    """memory is used and freed: the guest reports it free"""
    pages = soak.random.choice([2000, 4000, 8000])
    vm.agent.ask('alloc f %d %s' % (pages, soak.random.choice(
        ['dup 3', 'same 5', 'signed', 'mixed'])))
    soak.work(0.5)
    vm.check_regions('f')
    vm.agent.ask('drop f')


def balloon(soak, vm):
    """the balloon takes 48 MiB, and gives them back"""
    most = vm.ram + vm.dimm
    for size in most - 48, most:
        vm.qmp.command('balloon', {'value': size * MIB})
        dedup.wait_until(lambda: vm.qmp.command('query-balloon')['actual'] ==
                         size * MIB, 'balloon of %d MiB' % size)
        soak.work(0.3)


def dimm(_, vm):
    """plug a DIMM, and use it"""
    if vm.dimm:
        tap.skip('there is one')
    # Whatever comes now, it is plugged.
    vm.dimm = 128
    vm.qmp.command('object-add', {'qom-type': 'memory-backend-memfd',
                                  'id': 'mem1', 'size': 128 * MIB,
                                  'share': True})
    vm.qmp.command('device_add', {'driver': 'pc-dimm', 'id': 'dimm1',
                                  'memdev': 'mem1'})
    dedup.wait_online(vm, 128)
    vm.agent.ask('alloc p 16000 dup 4')


def undimm(_, vm):
    """unplug the DIMM"""
    if not vm.dimm:
        tap.skip('there is none')
    vm.check_regions('p')
    vm.agent.ask('drop p')
    vm.qmp.command('device_del', {'id': 'dimm1'})
    vm.qmp.wait_event('DEVICE_DELETED', 120,
                      lambda data: data.get('device') == 'dimm1')
    vm.qmp.command('object-del', {'id': 'mem1'})
    vm.dimm = 0


def device(soak, vm):
    """plug a disk, unplug it"""
    vm.qmp.command('blockdev-add', {'driver': 'null-co', 'size': 16 * MIB,
                                    'read-zeroes': True,
                                    'node-name': 'null0'})
    vm.qmp.command('device_add', {'driver': 'virtio-blk-pci', 'id': 'x0',
                                  'drive': 'null0'})
    soak.work(0.5)
    gone(vm, 'x0')
    vm.qmp.command('blockdev-del', {'node-name': 'null0'})


def gone(vm, name):
    """Unplug; the guest has to see the device first, and may say no."""
    def asked():
        try:
            vm.qmp.command('device_del', {'id': name})
        except QMPError as e:
            # It is under way, or it is done.
            return 'already' not in str(e)
        return False
    dedup.wait_until(asked, 'end of ' + name, 60, 0.5)
    vm.qmp.wait_event('DEVICE_DELETED', 60,
                      lambda data: data.get('device') == name)


def whole(soak, vm):
    """plug a vhost-user device: all RAM has to be whole"""
    if vm.backing == 'plain' or vm.net:
        tap.skip('no shared RAM, or the next disk would be another')
    soak.storage.restart()
    soak.count(vm)
    soak.storage.plug(vm, 'vu')
    tap.check(dedup.stats(vm)['pages-merged'] == 0, dedup.summary(vm))
    soak.count(vm)
    soak.work(0.5)
    gone(vm, 'vu')
    vm.qmp.command('chardev-remove', {'id': 'c-vu'})


def needs_quiet(vm):
    """For what a device by vhost-user or a DIMM would be in the way."""
    if vm.net or vm.dimm:
        tap.skip('not with a network or a DIMM')


def hmp(vm, line):
    """A human monitor command that says nothing if all is well."""
    said = vm.qmp.hmp(line, 300)
    tap.check(not said.strip(), '%s: %s: %s' % (vm.name, line, said))


def snapshot(soak, vm):
    """savevm, work, loadvm"""
    needs_quiet(vm)
    hmp(vm, 'savevm s1')
    soak.work(0.5)
    vm.agent.ask('touch d 3')
    soak.count(vm)
    hmp(vm, 'loadvm s1')
    soak.forget(vm)
    vm.check_regions('d')
    hmp(vm, 'delvm s1')


def capabilities(vm, on, *names):
    """Switch migration capabilities."""
    vm.qmp.command('migrate-set-capabilities', {'capabilities': [
        {'capability': n, 'state': on} for n in names]})


def wait_migrated(vm):
    """Until it is over."""
    def over():
        info = vm.qmp.command('query-migrate')
        tap.check(info.get('status') not in ('failed', 'cancelled'),
                  '%s: %s' % (vm.name, info))
        return info.get('status') == 'completed'
    dedup.wait_until(over, 'end of the migration', 120, 0.1)


def background(_, vm):
    """a background snapshot"""
    needs_quiet(vm)
    path = vm.path('snapshot')
    capabilities(vm, True, 'background-snapshot')
    try:
        vm.qmp.command('migrate', {'uri': 'file:' + path})
        wait_migrated(vm)
    finally:
        if os.path.exists(path):
            os.unlink(path)
    capabilities(vm, False, 'background-snapshot')
    vm.cont()


def ignore_shared(soak, vm):
    """a migration that leaves RAM in its file, and goes on here"""
    if vm.backing != 'file-shared':
        tap.skip('no file')
    needs_quiet(vm)
    soak.count(vm)
    capabilities(vm, True, 'x-ignore-shared')
    vm.qmp.command('migrate', {'uri': 'exec:cat > /dev/null'})
    wait_migrated(vm)
    tap.check(dedup.stats(vm)['pages-merged'] == 0, dedup.summary(vm))
    soak.count(vm)
    capabilities(vm, False, 'x-ignore-shared')
    vm.cont()


def migrate(soak, vm):
    """precopy or postcopy to another QEMU, which goes on in its place"""
    needs_quiet(vm)
    post = soak.random.random() < 0.4
    path = os.path.join(soak.scratch, 'migrate')
    new = soak.build(vm.place, vm.data, 'defer')
    new.start()
    for one in vm, new:
        if post:
            capabilities(one, True, 'postcopy-ram')
    if os.path.exists(path):
        os.unlink(path)
    new.qmp.command('migrate-incoming', {'uri': 'unix:' + path})
    vm.qmp.command('migrate-set-parameters', {
        'max-bandwidth': 32 << 20 if post else 1 << 33,
        'downtime-limit': 3000})
    vm.qmp.command('migrate', {'uri': 'unix:' + path})
    if post:
        dedup.wait_until(lambda: vm.qmp.command('query-migrate').get(
            'status') in ('active', 'completed'), 'migration', 60)
        try:
            vm.qmp.command('migrate-start-postcopy')
        except QMPError:
            pass                # it was quick
    wait_migrated(vm)
    soak.replace(vm, new)


def newcomer(soak, vm):
    """SIGKILL; another VM joins"""
    if soak.random.random() < 0.5:
        tap.skip('not this time')
    vm.kill()
    new = soak.build(vm.place)
    new.start()
    soak.replace(vm, new)
    new.load(soak)


# How often each comes, in parts.
ALL = {run_off_on: 4, pace: 2, unmerge: 6, new_object: 2, rewrite: 6,
       churn: 6, balloon: 4, dimm: 3, undimm: 3, device: 3, whole: 3,
       snapshot: 3, background: 2, ignore_shared: 2, migrate: 4, newcomer: 1}
