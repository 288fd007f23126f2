#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Three guests of one image give back what an offline count says.

All VMs are paused and their equal pages counted from outside; then they are
merged.  Within four full scans of the slowest, the usage of the memory cgroup
that holds them has to fall by 95 % of the count.
"""

import dedup
import host
import tap
import vm as vms
from host import MIB, PAGE

SHARE = 0.95
SCANS = 4
# What each guest holds beyond its kernel.
WORK = ('alloc s 16384 same 3', 'alloc m 12288 mixed',
        'alloc u 8192 signed', 'alloc z 4096 zero', 'drop z')


def saving(backings):
    """One run with these kinds of RAM."""
    group = vms.group_dir()
    cgroup = host.Cgroup()
    guests = [vms.VM('%s%d' % (kind, i), ram=256, backing=kind, group=group,
                     cgroup=cgroup, dedup={'run': 'off', 'sleep-millisecs': 0})
              for i, kind in enumerate(backings)]
    for vm in guests:
        vm.start()
    for vm in guests:
        vm.boot()
        for command in WORK:
            vm.agent.ask(command)
    for vm in guests:
        vm.stop()
    ranges = [r for vm in guests for r in vm.count_ranges()]
    for vm, r in zip(guests, ranges):
        one = host.count_pages([r])
        tap.check(one['physical'] * PAGE >= 150 * MIB,
                  '%s: only %s' % (vm.name, one))
    count = host.count_pages(ranges)
    before = cgroup.usage()
    for vm in guests:
        vm.cont()
        dedup.run(vm, True)
    dedup.wait_scans(guests, SCANS)
    want = count['saveable'] * PAGE
    got = dedup.wait_saved(cgroup.usage, before, SHARE * want)
    for vm in guests:
        tap.note(dedup.summary(vm))
    tap.note(dedup.group_summary(guests[0]))
    tap.note('%s: usage %d -> %d MiB; saved %.1f of %.1f MiB: %.1f %%' % (
        '+'.join(sorted(set(backings))), before // MIB,
        (before - got) // MIB,
        got / MIB, want / MIB, 100 * got / want))
    for vm in guests:
        vm.check_regions('smu')
    tap.check(got >= SHARE * want,
              'saved %d of %d bytes, %.1f %%; %s' % (got, want,
                                                     100 * got / want, count))


@tap.case
def test_file():
    """memory-backend-file on tmpfs, share=on"""
    saving(['file-shared'] * 3)


@tap.case
def test_memfd():
    """memory-backend-memfd, share=on"""
    saving(['memfd-shared'] * 3)


@tap.case
def test_anonymous():
    """plain -m: anonymous memory, transparent huge pages"""
    with open('/sys/kernel/mm/transparent_hugepage/enabled',
              encoding='ascii') as f:
        tap.note('transparent_hugepage: ' + f.read().strip())
    saving(['plain'] * 3)


@tap.case
def test_mixed():
    """one of each"""
    saving(['file-shared', 'memfd-shared', 'plain'])


host.prepare()
tap.main()
