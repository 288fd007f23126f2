#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Members that serve segments are killed (C19), one after the other.

Each time the survivor keeps every byte, and a new member still shares with it
what the dead one had published.
"""

import os

import dedup
import host
import tap
import vm as vms
from host import MIB

PAGES = 8192


def member(name, group, cgroup):
    """A guest with contents that every member has, and some of its own."""
    vm = vms.VM(name, ram=160, group=group, cgroup=cgroup,
                dedup=dedup.FULL_SPEED)
    vm.start().boot()
    vm.agent.ask('alloc s %d same 3' % PAGES)
    vm.agent.ask('alloc d 4096 dup 4')
    vm.agent.ask('alloc u 2048 signed')
    vm.agent.ask('loop u start 16')
    return vm


def wait_shared(vm):
    """The VM shares region s with another member."""
    dedup.wait_until(
        lambda: dedup.stats(vm)['pages-merged-between'] >= 0.9 * PAGES,
        'shared pages of ' + vm.name, 90)
    tap.note(dedup.summary(vm))


def pages_shared(vm):
    """How many segment pages the group has."""
    return dedup.stats(vm)['group']['pages-shared']


@tap.case
def test_kill_publishers():
    """every byte survives, and new members share with the survivor"""
    group = vms.group_dir()
    cgroup = host.Cgroup()
    old = member('first', group, cgroup)
    for name in ('second', 'third', 'fourth'):
        # The old one may have published first, or the new one; over the
        # rounds both are killed.
        new = member(name, group, cgroup)
        wait_shared(new)
        wait_shared(old)
        shared = pages_shared(new)
        old.kill()
        dedup.wait_until(
            lambda: dedup.stats(new)['group']['members'] == 1,
            'the group to notice the death')
        new.check_regions('sdu')
        dedup.wait_scans([new], 2)
        tap.note('%s alone: %d segment pages, %d before' %
                 (name, pages_shared(new), shared))
        old = new
    old.agent.ask('rewrite s 1')
    old.agent.ask('loop u stop')
    old.check_regions('sdu')
    old.kill()
    tap.check(cgroup.shmem() < MIB / 2,
              'shared memory left: %d' % cgroup.shmem())
    names = [os.path.join(where, f)
             for where, _, files in os.walk(group) for f in files]
    tap.note('names left: %s' % names)
    last = member('last', group, cgroup)
    dedup.wait_merged(last, 2048)
    tap.check(dedup.stats(last)['group']['members'] == 1,
              dedup.summary(last))
    dedup.unmerge(last)
    last.check_regions('sd')
    last.quit()
    for name in names:
        tap.check(not os.path.exists(name) or
                  os.lstat(name).st_size == 0 or 'lock' in name,
                  'stale %s stays' % name)


host.prepare()
tap.main()
