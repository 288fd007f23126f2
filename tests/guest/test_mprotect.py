#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Merging without a userfaultfd: write-protect=mprotect, and auto where the
host grants none.

What is compared with a run that has a userfaultfd: what is saved.  What must
hold besides: every byte, while the guest writes, while disk reads go into
pages that are being merged (by each of QEMU's ways to read), while all is
given back, and when it is saved to a file.
"""

# timeout: 1200

import os
import re

import bareguest
import dedup
import host
import tap
import vm as vms
from host import PAGE

# Of what is saved with a userfaultfd, at least so much is.
SHARE = 0.97
SCANS = 4
DISK = (8192, 9, 700)           # blocks, seed, distinct
# As root, and yet without one: no node, and not the capability.
NO_UFFD = ('unshare', '-m', 'sh', '-c', 'mount --bind /dev/null '
           '/dev/userfaultfd && exec setpriv --bounding-set=-sys_ptrace "$@"',
           'sh')
# Stops after which it is known whether they are long (space/exclusive.c).
KNOWN = 64
LONG_NS = 200000
MPROTECT = {'write-protect': 'mprotect'}
# Nobody who is not root is granted one, unless the sysctl says so.
SYSCTL = '/proc/sys/vm/unprivileged_userfaultfd'


def check_way(vm, way):
    """The object says how it keeps pages from changing; and it is so."""
    said = dedup.stats(vm)['write-protect']
    tap.check(said == way, 'write-protect is ' + said)
    base = '/proc/%d/fd' % vm.pid
    uffd = [fd for fd in os.listdir(base)
            if os.readlink('%s/%s' % (base, fd)) ==
            'anon_inode:[userfaultfd]']
    tap.check(bool(uffd) == (way == 'userfaultfd'), str(uffd))


def saved_by(way, backing, share):
    """What two guests save, as their cgroup sees it: a share of all that can
    be, @share if they get so far."""
    cgroup = host.Cgroup()
    group = vms.group_dir()
    guests = [vms.VM('%s%d' % (way, i), ram=192, backing=backing, group=group,
                     cgroup=cgroup,
                     dedup=dict(dedup.FULL_SPEED, run='off',
                                **{'write-protect': way}))
              for i in range(2)]
    for vm in guests:
        vm.start()
    for vm in guests:
        vm.boot()
        for ask in ('alloc s 12288 same 3', 'alloc u 4096 signed',
                    'alloc z 4096 zero', 'drop z'):
            vm.agent.ask(ask)
        check_way(vm, way)
    for vm in guests:
        vm.stop()
    want = host.count_pages([r for vm in guests for r in vm.count_ranges()])
    before = cgroup.usage()
    for vm in guests:
        vm.cont()
        vm.agent.ask('loop u start 32')
        dedup.run(vm, True)
    dedup.wait_scans(guests, SCANS)
    want = want['saveable'] * PAGE
    saved = dedup.wait_saved(cgroup.usage, before, share * want)
    for vm in guests:
        vm.agent.ask('loop u stop')
        vm.check_regions('su')
        tap.note(dedup.summary(vm))
        dedup.unmerge(vm)
        vm.check_regions('su')
        vm.quit()
    return saved / want


def compare(backing):
    """Both ways, on the same guests."""
    shares = {'userfaultfd': saved_by('userfaultfd', backing, SHARE)}
    shares['mprotect'] = saved_by('mprotect', backing,
                                  SHARE * shares['userfaultfd'])
    tap.note('%s: saved %.1f %% of the count with a userfaultfd, %.1f %% '
             'with mprotect' % (backing, 100 * shares['userfaultfd'],
                                100 * shares['mprotect']))
    tap.check(shares['mprotect'] >= SHARE * shares['userfaultfd'],
              str(shares))


@tap.case
def test_anonymous():
    """plain -m: as much as with a userfaultfd, with guests that write"""
    compare('plain')


@tap.case
def test_memfd():
    """memfd, share=on: the same"""
    compare('memfd-shared')


def disk_reads(aio):
    """Disk reads into pages that are merged at that time."""
    disk = os.path.join(vms.scratch(), 'disk')
    host.make_disk(disk, *DISK)
    vm = vms.VM('disk', ram=224, disk=disk, aio=aio, backing='memfd-shared',
                dedup=dict(dedup.FULL_SPEED, **MPROTECT))
    vm.start().boot()
    vm.agent.ask('alloc d 12000 dup 4')
    vm.agent.ask('dio-start /dev/vda %d %d %d 12 24 2' %
                 (DISK[1], DISK[2], DISK[0]))
    dedup.wait_merged(vm, 8000)
    for _ in range(3):
        dedup.unmerge(vm)
        dedup.run(vm, True)
        dedup.wait_merged(vm, 8000)
    got = vm.agent.get('dio-stat')
    tap.note('%s: %s; %s' % (aio, got, dedup.summary(vm)))
    tap.check(got['errors'] == 0 and got['lost'] == 0 and got['reads'] > 0,
              str(got))
    vm.check_regions('d')
    # The same VM, saved and loaded: what is merged is read by the kernel.
    vm.qmp.command('migrate', {'uri': 'exec:cat > /dev/null'})
    dedup.wait_until(lambda: vm.qmp.command('query-migrate').get('status') in
                     ('completed', 'failed'), 'end of migration', 120)
    tap.check(vm.qmp.command('query-migrate')['status'] == 'completed',
              str(vm.qmp.command('query-migrate')))
    vm.cont()
    vm.check_regions('d')


@tap.case
def test_threads():
    """disk reads by threads (preadv)"""
    disk_reads('threads')


@tap.case
def test_native():
    """disk reads by Linux's native AIO, O_DIRECT"""
    disk_reads('native')


@tap.case
def test_io_uring():
    """disk reads by io_uring"""
    disk_reads('io_uring')


@tap.case
def test_auto():
    """auto, as a user to whom the host grants no userfaultfd"""
    if os.getuid() != 0:
        tap.skip('not root: cannot run QEMU as another user')
    with open(SYSCTL, encoding='ascii') as f:
        if f.read().strip() != '0':
            tap.skip('vm.unprivileged_userfaultfd is set')
    vm = vms.VM('nobody', ram=192, backing='plain', user=65534,
                dedup=dedup.FULL_SPEED)
    vm.start().boot()
    check_way(vm, 'mprotect')
    tap.check(not dedup.stats(vm)['blocked-reasons'],
              str(dedup.stats(vm)['blocked-reasons']))
    vm.agent.ask('alloc s 8192 same 3')
    vm.agent.ask('alloc u 4096 dup 4')
    vm.agent.ask('loop u start 32')
    dedup.wait_merged(vm, 8192 // 2)
    vm.agent.ask('loop u stop')
    vm.check_regions('su')
    tap.note(dedup.summary(vm))


def stops(vm):
    """How long vCPUs were held up each time, in ns, as QEMU's trace says."""
    with open(vm.path('stderr'), encoding='ascii', errors='replace') as f:
        return [int(n) for n in re.findall(
            r'dedup_exclusive (\d+) ns, vCPUs held up: 1', f.read())]


def give_back(vm):
    """Unmerge; a VM that is blocked stays so."""
    vm.qmp.command('dedup-unmerge', {'id': 'ds0'})
    event = vm.qmp.wait_event('DEDUP_UNMERGE_COMPLETED', 60)
    tap.check(event['data']['pages-left'] == 0, str(event))


def is_blocked(vm):
    """Is it, by what is known of stops?"""
    return dedup.stats(vm)['state'] == 'blocked'


def kvm_guest(backing):
    """A vCPU of KVM writes while pages are merged and given back."""
    vm = bareguest.start(backing, dedup=dict(dedup.FULL_SPEED, **MPROTECT))
    check_way(vm, 'mprotect')
    for cycle in range(3):
        bareguest.command(vm, b'bw'[cycle % 2:][:1])
        bareguest.wait_round(vm, 2)
        dedup.wait_merged(vm, 20)
        tap.note(dedup.summary(vm))
        dedup.unmerge(vm)
        bareguest.wait_round(vm, 1)
        vm.stop()
        dedup.run(vm, True)
        dedup.wait_merged(vm, 20)
        vm.cont()
    bareguest.command(vm, b'q')
    bareguest.wait_round(vm, 2)
    dedup.wait_merged(vm, bareguest.PAGES // 4)
    bareguest.wait_verified(vm)
    tap.check(vm.qmp.command('query-status')['status'] == 'running',
              'the vCPU met a window')
    tap.check(dedup.stats(vm)['cow-breaks'] > 0, 'no page was ever written')
    vm.quit()


@tap.case
def test_kvm_auto():
    """KVM, auto: goes on while vCPUs are held for short; else only paused"""
    if os.getuid() != 0:
        tap.skip('not root: cannot hide /dev/userfaultfd')
    vm = bareguest.start('plain', dedup=dedup.FULL_SPEED, prefix=NO_UFFD,
                         extra=('-trace', 'dedup_exclusive*'))
    check_way(vm, 'mprotect')
    # Each time all is merged and given back vCPUs are stopped.
    bareguest.command(vm, b'q')
    while len(stops(vm)) < 2 * KNOWN and not is_blocked(vm):
        dedup.wait_until(lambda: is_blocked(vm) or
                         dedup.stats(vm)['pages-merged'] >= 20, 'merging')
        give_back(vm)
        dedup.run(vm, True)
    s = dedup.stats(vm)
    times = stops(vm)
    long = sum(n > LONG_NS for n in times)
    tap.note('%d stops, %d long, state %s' % (len(times), long, s['state']))
    # A few more than may be: the engine's own clock says a little more.
    tap.check(s['state'] == 'blocked' or long <= 4 + len(times) // 50,
              'goes on')
    tap.check(s['state'] != 'blocked' or long > 0, 'blocked for nothing')
    if s['state'] == 'blocked':
        why, = s['blocked-reasons']
        tap.check(why['reason'] == 'userfaultfd' and
                  'longer than 200 us' in why['detail'] and
                  'write-protect=mprotect' in why['detail'], str(why))
        before = s['pages-merged']
        vm.stop()
        dedup.wait_merged(vm, max(before, 1))
        dedup.wait_state(vm, ['scanning', 'idle'])
        vm.cont()
        tap.check(dedup.stats(vm)['state'] == 'blocked', 'not while it runs')
    # What is merged can be given back all the same.
    give_back(vm)
    bareguest.command(vm, b'q')
    bareguest.wait_round(vm, 2)
    bareguest.wait_verified(vm)
    vm.quit()


@tap.case
def test_kvm_memfd():
    """KVM: vCPUs are kept out of windows; memfd, share=on"""
    kvm_guest('memfd-shared')


@tap.case
def test_kvm_anonymous():
    """KVM: the same, plain -m"""
    kvm_guest('plain')


host.prepare()
tap.main()
