#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Bare guests of one group, in what an outer guest may do to its own system:
swap, namespaces, another root.

They write and check all of their pages without an end, and after each step
check every word.
"""

import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), 'guest'))

# pylint: disable=wrong-import-position
import bareguest                                             # noqa: E402
import dedup                                                 # noqa: E402
import host                                                  # noqa: E402
import tap                                                   # noqa: E402
import vm as vms                                             # noqa: E402
from bareguest import PAGES, command, wait_round, wait_verified  # noqa: E402
from host import MIB                                         # noqa: E402

# What a bare guest repeats comes again after so many pages.
RUN = 64


def start(name, backing, group, **kwargs):
    """A bare guest of the group."""
    return bareguest.start(backing, name, group=group,
                           dedup=dedup.FULL_SPEED, **kwargs)


def share(guests):
    """All of them merge with each other while nothing changes; then they write,
    and nobody has a wrong word."""
    for vm in guests:
        command(vm, b'q')
    for vm in guests:
        wait_round(vm, 1)
        dedup.wait_merged(vm, PAGES // 2)
        dedup.wait_until(
            lambda: dedup.stats(vm)['pages-merged-between'] >= RUN // 2,
            'pages of %s that are shared with another' % vm.name, 60)
        wait_verified(vm)
        tap.note(dedup.summary(vm))
    tap.check(dedup.stats(guests[0])['group']['members'] == len(guests),
              dedup.group_summary(guests[0]))
    for vm in guests:
        command(vm, b'b')
    for vm in guests:
        wait_round(vm, 2)
        wait_verified(vm)


def end(guests):
    """They are unmerged, right, and end well."""
    for vm in guests:
        dedup.unmerge(vm)
        wait_verified(vm)
        vm.qmp.command('quit')
        vm.process.wait(30 * tap.PATIENCE)
        tap.check(vm.process.returncode == 0, '%s: status %s' %
                  (vm.name, vm.process.returncode))


@tap.case
def test_tcg():
    """two guests under TCG, one of each kind of RAM"""
    group = vms.group_dir()
    guests = [start('memfd', 'memfd-shared', group, accel='tcg'),
              start('plain', 'plain', group, accel='tcg')]
    share(guests)
    end(guests)


@tap.case
def test_kvm():
    """the same under the KVM of this kernel"""
    group = vms.group_dir()
    guests = [start('memfd', 'memfd-shared', group),
              start('plain', 'plain', group)]
    share(guests)
    end(guests)


@tap.case
def test_mprotect():
    """two guests under TCG, without a userfaultfd"""
    group = vms.group_dir()
    guests = [bareguest.start(
        backing, backing, accel='tcg', group=group,
        dedup=dict(dedup.FULL_SPEED, **{'write-protect': 'mprotect'}))
              for backing in ('memfd-shared', 'plain')]
    share(guests)
    end(guests)


@tap.case
def test_namespaces():
    """one in a user and a PID namespace of its own, one in neither"""
    group = vms.group_dir()
    guests = [start('inside', 'memfd-shared', group, accel='tcg',
                    prefix=('unshare', '-U', '-r', '-p', '-f')),
              start('outside', 'plain', group, accel='tcg')]
    share(guests)
    end(guests)


def new_root(with_proc):
    """A directory to be the root of a process."""
    root = tempfile.mkdtemp()
    tap.cleanup(lambda: os.rmdir(root))
    if with_proc:
        proc = os.path.join(root, 'proc')
        os.mkdir(proc)
        tap.cleanup(lambda: os.rmdir(proc))
        subprocess.run(['mount', '-t', 'proc', 'none', proc], check=True)
        tap.cleanup(lambda: subprocess.run(['umount', proc], check=True))
    return ['-run-with', 'chroot=' + root]


@tap.case
def test_chroot():
    """one in another root, which has a /proc: it is of the group"""
    group = vms.group_dir()
    guests = [start('inside', 'memfd-shared', group, accel='tcg',
                    extra=new_root(True)),
              start('outside', 'plain', group, accel='tcg')]
    share(guests)
    end(guests)


@tap.case
def test_chroot_bare():
    """one in another root, which has none: it says so, and is right"""
    vm = start('inside', 'memfd-shared', vms.group_dir(), accel='tcg',
               extra=new_root(False))
    state = dedup.wait_state(vm, ('blocked',))
    tap.check([b['reason'] for b in state['blocked-reasons']] == ['group'],
              str(state['blocked-reasons']))
    wait_verified(vm)
    vm.quit()


def push_out(cgroup, size):
    """Have the kernel take memory from the cgroup; it may find less."""
    try:
        cgroup.write('memory.reclaim', size)
    except OSError:
        pass


@tap.case
def test_swap():
    """C16: own and merged pages go to swap and come back, again and again"""
    with open('/proc/swaps', encoding='ascii') as f:
        if len(f.readlines()) < 2:
            tap.skip('no swap')
    group = vms.group_dir()
    cgroup = host.Cgroup()
    guests = [start('memfd', 'memfd-shared', group, accel='tcg',
                    cgroup=cgroup),
              start('plain', 'plain', group, accel='tcg', cgroup=cgroup)]
    for _ in range(3):
        share(guests)
        swapped = 0
        for _ in range(3):
            push_out(cgroup, 64 * MIB)
            swapped = max(swapped, int(cgroup.read('memory.swap.current')))
            for vm in guests:
                wait_round(vm, 1)
        tap.note('%d KiB on swap; %s' % (swapped // 1024,
                                         dedup.summary(guests[0])))
        tap.check(swapped, 'nothing went to swap')
    end(guests)


tap.main()
