#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 3600
"""What happens to a VM whose vhost-user devices have a relay, under load: it is
paused, its back end dies, it migrates, memory and devices come and go.  Each
time the guest compares every byte that it writes and reads.

RELAY_ROUNDS=60 repeats what is repeated so often.
"""

import os
import subprocess

import backends
import dedup
import host
import relay
import tap
import vm as vms
from host import MIB
from qmp import Timeout

ROUNDS = int(os.environ.get('RELAY_ROUNDS', '10'))
# Of the disk's pools
MERGED = 2000


def guest(kinds=('blk',), backing='plain', merged=MERGED, **kwargs):
    """A guest whose devices are under load and whose memory is merged."""
    g = relay.Guest(backing, [k for k in kinds if relay.have(k)],
                    dedup=dict(dedup.FULL_SPEED), **kwargs)
    g.boot().run_all()
    if relay.RELAY:
        dedup.wait_merged(g.vm, merged)
    return g


def finish(g):
    """All is right, and it has merged meanwhile."""
    g.wait_requests(50)
    tap.note(dedup.summary(g.vm))
    g.end_all()
    g.quit()


@tap.case
def test_stop_cont():
    """stop and cont under load: a disk and two file systems"""
    g = guest(('blk', 'fs', 'fs-c'))
    before = {k: f['ops'] for k, f in g.figures().items()}
    for i in range(ROUNDS):
        g.vm.stop()
        g.vm.cont()
        if i % 4 == 0:
            # All have requests under way again
            g.wait_requests(2)
    after = {k: f['ops'] for k, f in g.figures().items()}
    tap.note('%s to %s; %s' % (before, after, g.relayed()))
    finish(g)


@tap.case
def test_stop_cont_net():
    """stop and cont under TCP: passt may end a stream, but none is wrong"""
    g = guest(('net',), merged=100)
    ended = 0
    for _ in range(ROUNDS):
        g.vm.stop()
        g.vm.cont()
        before = g.figures()['net']
        try:
            dedup.wait_until(lambda: g.figures()['net']['ops'] >
                             before['ops'], 'pieces', 1)
        except Timeout:
            # With plain vhost-user, too: it has waited for an answer in vain.
            tap.check(g.backend['net'].alive(), 'passt has ended')
        got = g.figures()['net']
        tap.check(got['bad'] == 0, str(got))
        if got['err']:
            ended += 1
            got = g.vm.agent.get('net-stop')
            tap.check(got['bad'] == 0, str(got))
            g.run('net')
    tap.note('%d times, %s' % (ended, g.relayed()))
    g.wait_requests(50)
    g.end_all()
    g.quit()


@tap.case
def test_backend_crash_blk():
    """SIGKILL of the disk's back end under load, and a new one"""
    for iothread in False, True:
        g = guest(reconnect=True, iothread=iothread)
        for i in range(max(2, ROUNDS // 4)):
            g.backend['blk'].kill()
            if i % 2:
                # The guest's requests wait; a VM can be paused meanwhile.
                g.vm.stop()
                g.vm.cont()
            g.backend['blk'].start()
            g.wait_requests(20)
        finish(g)


@tap.case
def test_backend_crash_net():
    """SIGKILL of passt: the device goes on with a new one"""
    g = guest(('net',), reconnect=True, merged=100)
    for _ in range(2):
        g.wait_requests(20)
        g.backend['net'].restart()
        # What was connected by it is lost, but not changed.
        got = g.vm.agent.get('net-stop')
        tap.note(str(got))
        tap.check(got['bad'] == 0, str(got))
        g.run('net')
    finish(g)


def migrate(source, target, postcopy=False):
    """Migrate under load; the guest goes on at the target."""
    path = source.vm.path('migrate')
    if postcopy:
        for g in source, target:
            g.vm.qmp.command('migrate-set-capabilities', {'capabilities': [
                {'capability': 'postcopy-ram', 'state': True}]})
    target.vm.qmp.command('migrate-incoming', {'uri': 'unix:' + path})
    source.vm.qmp.command('migrate-set-parameters', {
        'max-bandwidth': 8 * MIB if postcopy else 1 << 33,
        'downtime-limit': 3000})
    source.vm.qmp.command('migrate', {'uri': 'unix:' + path})
    if postcopy:
        wait_migration(source.vm, ['active'])
        source.vm.qmp.command('migrate-start-postcopy')
    wait_migration(source.vm, ['completed'])


def wait_migration(vm, states):
    """Until the migration is there."""
    def there():
        info = vm.qmp.command('query-migrate')
        tap.check(info.get('status') not in ('failed', 'cancelled'),
                  '%s: %s' % (vm.name, info))
        return info.get('status') in states
    dedup.wait_until(there, 'migration %s' % states, 120)


def migration(there, here, backing='memfd-shared', postcopy=False,
              kind='blk', mode=None):
    """From a relay that is @there to one that is @here."""
    source = relay.Guest(backing, [kind], relay=there, name='source',
                         dedup=dict(dedup.FULL_SPEED))
    source.boot().run(kind, mode=mode)
    source.wait_requests(30)
    target = relay.Guest(backing, [kind], relay=here, name='target',
                         existing=source, incoming='defer',
                         dedup=dict(dedup.FULL_SPEED))
    migrate(source, target, postcopy)
    target.running = source.running
    target.wait_requests(100)
    source.vm.kill()
    if here == 'on':
        dedup.wait_merged(target.vm, 500)
    finish(target)


@tap.case
def test_migrate_on_on():
    """precopy, relay to relay, anonymous RAM"""
    migration(relay.RELAY, relay.RELAY, 'plain')


@tap.case
def test_migrate_on_off():
    """precopy, relay to plain vhost-user"""
    migration(relay.RELAY, 'off' if relay.RELAY else None)


@tap.case
def test_migrate_off_on():
    """precopy, plain vhost-user to relay"""
    migration('off' if relay.RELAY else None, relay.RELAY)


@tap.case
def test_postcopy():
    """postcopy, relay to relay: the back end needs to know nothing of it"""
    migration(relay.RELAY, relay.RELAY, 'plain', postcopy=True)


@tap.case
def test_migrate_fs():
    """precopy of a file system, whose back end hands on its state"""
    relay.KINDS['fs']().command()
    # The back end opens files anew: all of them direct or none of them.
    migration(relay.RELAY, relay.RELAY, 'plain', kind='fs', mode='buffered')


@tap.case
def test_snapshot():
    """savevm while stopped under load, and loadvm: the rings go on there"""
    image = os.path.join(vms.scratch(), 'snapshot.qcow2')
    subprocess.run([os.path.join(host.QEMU_DIR, 'bin', 'qemu-img'), 'create',
                    '-q', '-f', 'qcow2', image, '1G'], check=True)
    g = guest(extra=['-drive', 'if=none,format=qcow2,file=' + image])
    for _ in range(3):
        g.vm.stop()
        for command in 'savevm a', 'loadvm a', 'delvm a':
            got = g.vm.qmp.command('human-monitor-command',
                                   {'command-line': command})
            tap.check(not got, '%s: %s' % (command, got))
        g.vm.cont()
        g.wait_requests(20)
    finish(g)


@tap.case
def test_file():
    """the VM is saved to a file under load, and started from it"""
    path = os.path.join(vms.scratch(), 'state')
    source = guest()
    source.vm.qmp.command('migrate-set-parameters', {
        'max-bandwidth': 1 << 33})
    source.vm.qmp.command('migrate', {'uri': 'file:' + path})
    wait_migration(source.vm, ['completed'])
    source.vm.kill()
    target = relay.Guest('plain', ['blk'], name='target', existing=source,
                         incoming='file:' + path,
                         dedup=dict(dedup.FULL_SPEED))
    wait_migration(target.vm, ['completed'])
    if target.vm.qmp.command('query-status')['status'] != 'running':
        target.vm.cont()
    target.running = source.running
    target.wait_requests(50)
    finish(target)


@tap.case
def test_background_snapshot():
    """a background snapshot under load: the guest goes on"""
    path = os.path.join(vms.scratch(), 'snapshot')
    g = guest()
    g.vm.qmp.command('migrate-set-capabilities', {'capabilities': [
        {'capability': 'background-snapshot', 'state': True}]})
    g.vm.qmp.command('migrate', {'uri': 'file:' + path})
    wait_migration(g.vm, ['completed'])
    if g.vm.qmp.command('query-status')['status'] != 'running':
        g.vm.cont()
    dedup.wait_merged(g.vm, MERGED)
    finish(g)


@tap.case
def test_memory_hotplug():
    """memory is plugged and unplugged under load"""
    g = guest(('blk', 'fs'), hotplug=True)
    for _ in range(2):
        g.vm.qmp.command('object-add', {
            'qom-type': 'memory-backend-ram', 'id': 'mem1',
            'size': 128 * MIB})
        g.vm.qmp.command('device_add', {'driver': 'pc-dimm', 'id': 'dimm1',
                                        'memdev': 'mem1'})
        dedup.wait_until(lambda: g.vm.agent.get('online')['blocks'],
                         'plugged memory in the guest')
        # More than the main memory has left: requests come from there, too.
        g.vm.agent.ask('alloc d 24000 dup 4')
        g.wait_requests(30)
        g.vm.check_regions('d')
        g.vm.agent.ask('drop d')
        g.vm.qmp.command('device_del', {'id': 'dimm1'})
        g.vm.qmp.wait_event('DEVICE_DELETED', 60,
                            lambda data: data.get('device') == 'dimm1')
        g.vm.qmp.command('object-del', {'id': 'mem1'})
        g.wait_requests(10)
    finish(g)


@tap.case
def test_device_plug():
    """device_del and device_add of the disk under load"""
    g = relay.Guest('plain', [], dedup=dict(dedup.FULL_SPEED))
    g.boot()
    disk = relay.KINDS['blk'](size=relay.TARGETS['blk'][0]).start()
    g.backend['blk'] = disk
    for turn in range(3):
        disk.plug(g.vm, 'blk', relay.RELAY)
        g.vm.agent.ask('sh until grep -q vda /proc/partitions; '
                       'do usleep 10000; done')
        if turn:
            g.resume('blk')
        else:
            # The kernel forgets the page cache of a disk that goes.
            g.run('blk', mode='direct')
            if relay.RELAY:
                dedup.wait_merged(g.vm, MERGED)
        done = g.figures()['blk']['ops']
        dedup.wait_until(lambda: g.figures()['blk']['ops'] > done + 100,
                         'requests')
        if turn < 2:
            backends.Backend.unplug(g.vm, 'blk')
            got = g.halt('blk')
            tap.note(str(got))
            tap.check(got['bad'] == 0, str(got))
            tap.check(g.relayed() == {}, str(g.relayed()))
    got = g.vm.agent.get('io-stop blk', 300)
    tap.note(str(got))
    # Those under way when the disk went have failed; no others.
    tap.check(got['bad'] == 0, str(got))
    g.quit()


@tap.case
def test_reset():
    """the guest is reset under load, and boots"""
    g = guest(('blk', 'net'))
    g.vm.qmp.command('set-action', {'reboot': 'reset'})
    for _ in range(2):
        g.vm.qmp.command('system_reset')
        g.boot()
        g.running.clear()
        # What it had written is not known any more.
        g.run('blk', 'unknown')
        g.run('net')
        g.wait_requests(100)
    finish(g)


@tap.case
def test_unmerge():
    """dedup-unmerge under load, then it merges again"""
    g = guest(('blk', 'fs', 'net'))
    for _ in range(2):
        dedup.unmerge(g.vm)
        g.wait_requests(20)
        tap.check(dedup.stats(g.vm)['pages-merged'] == 0,
                  dedup.summary(g.vm))
        dedup.run(g.vm, True)
        dedup.wait_merged(g.vm, MERGED)
        g.wait_requests(20)
    finish(g)


@tap.case
def test_balloon():
    """the balloon takes memory and gives it back under load"""
    g = guest(('blk', 'fs'), balloon=True)
    for _ in range(2):
        for size in 176, 256:
            g.vm.qmp.command('balloon', {'value': size * MIB})
            dedup.wait_until(
                lambda: g.vm.qmp.command('query-balloon')['actual'] ==
                size * MIB, 'balloon of %d MiB' % size)
            g.wait_requests(20)
    finish(g)


@tap.case
def test_cgroup_limit():
    """the area is within the limit of the cgroup that bears the RAM"""
    cgroup = host.Cgroup()
    g = guest(('blk', 'fs'), cgroup=cgroup)
    cgroup.limit(256 * MIB + 160 * MIB)
    g.wait_requests(100)
    dedup.unmerge(g.vm)
    g.wait_requests(100)
    tap.note('%d MiB, %d kills' % (cgroup.usage() // MIB, cgroup.kills()))
    tap.check(cgroup.kills() == 0, 'the limit was hit')
    finish(g)


@tap.case
def test_room():
    """what the area may still take is kept for it, by its size"""
    if not relay.RELAY:
        tap.skip('without a relay there is no area')
    for size in 256 * MIB, MIB:
        cgroup = host.Cgroup()
        g = relay.Guest('plain', ['blk'], more={'blk': {'relay-size': size}},
                        dedup=dict(dedup.FULL_SPEED, run='off'),
                        cgroup=cgroup).boot()
        got = dedup.stats(g.vm)
        # All that the guest may still take, and little of the first area
        cgroup.limit(cgroup.usage() + host.PAGE * (
            got['pages-total'] - got['pages-present']) + 32 * MIB)
        dedup.run(g.vm, True)
        got = dedup.wait_state(g.vm, ['limited', 'idle'])
        tap.note('%d MiB: %s' % (size // MIB, dedup.summary(g.vm)))
        tap.check(got['state'] == ('limited' if size > MIB else 'idle'),
                  dedup.summary(g.vm))
        g.quit()


@tap.case
def test_who_blocks():
    """a device without a relay beside one with: it alone is named"""
    if not relay.RELAY:
        tap.skip('no relay')
    g = guest(backing='memfd-shared')
    other = relay.KINDS['blk']().start()
    other.plug(g.vm, 'other', 'off')
    s = dedup.wait_until(
        lambda: (lambda s: s['blocked-reasons'] and s)(dedup.stats(g.vm)),
        'reason')
    details = [b['detail'] for b in s['blocked-reasons']
               if b['reason'] == 'ram-exported']
    tap.note(str(details))
    tap.check(len(details) == 1 and 'c-other' in details[0] and
              'c-blk' not in details[0], str(s['blocked-reasons']))
    tap.check(s['pages-merged'] == 0, dedup.summary(g.vm))
    g.wait_requests(20)
    backends.Backend.unplug(g.vm, 'other')
    dedup.wait_merged(g.vm, MERGED)
    finish(g)


@tap.case
def test_gpu():
    """vhost-user-gpu, whose requests hold guest addresses, is refused"""
    done = subprocess.run(
        [host.QEMU, '-machine', 'none', '-nodefaults', '-display', 'none',
         '-device', 'vhost-user-gpu-pci,help'], capture_output=True,
        text=True, timeout=60 * tap.PATIENCE, check=False)
    if done.returncode:
        tap.skip('vhost-user-gpu is not built')
    backend = relay.KINDS['blk']().start()
    done = subprocess.run(
        [host.QEMU, '-nodefaults', '-display', 'none', '-S'] +
        backend.chardev('gpu') +
        ['-device', 'vhost-user-gpu-pci,chardev=c-gpu,relay=on'],
        capture_output=True, text=True, timeout=60 * tap.PATIENCE,
        check=False)
    tap.note(done.stderr)
    tap.check(done.returncode == 1 and 'relay' in done.stderr, str(done))


relay.prepare()
tap.main()
