#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 1200
"""Three guests whose files come from one directory by virtiofs give back what
an offline count says, relays and all.

Each has read the same files, so the page caches are equal, and each has a
virtiofsd of its own behind relay=on.  All VMs are paused and their equal pages
counted from outside; then they are merged while the guests go on.
Within four full scans of the slowest, the usage of the memory cgroup that
holds them has to fall by 95 % of the count; and what the guests read then,
into pages that are merged, is what is in the files.
"""

import hashlib
import os

import backends
import dedup
import host
import tap
import vm as vms
from host import MIB, PAGE

SHARE = 0.95
SCANS = 4
GUESTS = 3
RAM = 256
# What the guest's memory is to be full of: the kernel's modules are real files.
FILES = 80 * MIB


def make_files(directory):
    """Real files, as many as FILES allows; the digest of all."""
    source = os.path.join(host.IMAGES, 'kernel')
    names = sorted(os.path.join(base, name)
                   for base, _, names in os.walk(source)
                   for name in names if name.endswith('.ko'))
    digest = hashlib.sha256()
    left = FILES
    for i, name in enumerate(names):
        with open(name, 'rb') as f:
            data = f.read()
        left -= len(data)
        if left < 0:
            break
        digest.update(data)
        with open('%s/%04d' % (directory, i), 'wb') as f:
            f.write(data)
    tap.check(left < FILES // 10, 'too few modules in %s' % source)
    return digest.hexdigest()


def read_files(vm):
    """Have the guest read them; the digest of what it has read."""
    return vm.agent.ask('sh cat /%s/* | sha256sum' % backends.TAG,
                        600).split()[0]


def saving(backing):
    """One run with this kind of RAM."""
    shared = os.path.join(vms.scratch(), 'files')
    os.mkdir(shared)
    digest = make_files(shared)
    group = vms.group_dir()
    cgroup = host.Cgroup()
    guests = []
    for i in range(GUESTS):
        daemon = backends.FsRust(shared=shared).start()
        guests.append(vms.VM(
            'v%d' % i, ram=RAM, backing=backing, group=group, cgroup=cgroup,
            dedup={'run': 'off', 'sleep-millisecs': 0},
            extra=daemon.options('fs', 'on')))
    for vm in guests:
        vm.start()
    for vm in guests:
        vm.boot()
        backends.mount(vm, backends.TAG, '/' + backends.TAG)
        tap.check(read_files(vm) == digest, '%s read other bytes' % vm.name)
    for vm in guests:
        vm.stop()
    count = host.count_pages([r for vm in guests for r in vm.count_ranges()])
    want = count['saveable'] * PAGE
    tap.check(want >= (GUESTS - 1) * FILES, 'only %s' % count)
    before = cgroup.usage()
    for vm in guests:
        vm.cont()
        dedup.run(vm, True)
    dedup.wait_scans(guests, SCANS)
    got = dedup.wait_saved(cgroup.usage, before, SHARE * want)
    for vm in guests:
        tap.note(dedup.summary(vm))
        tap.note(str(backends.relays(vm)))
    tap.note('%s: saved %.1f of %.1f MiB: %.1f %%' % (
        backing, got / MIB, want / MIB, 100 * got / want))
    for vm in guests:
        # Three scanners at full speed leave a small host no time.
        dedup.run(vm, False)
    for vm in guests:
        vm.agent.ask('sh echo 3 > /proc/sys/vm/drop_caches')
        tap.check(read_files(vm) == digest, '%s read other bytes' % vm.name)
    tap.check(got >= SHARE * want,
              'saved %d of %d bytes; %s' % (got, want, count))


@tap.case
def test_memfd():
    """memory-backend-memfd, share=on"""
    saving('memfd-shared')


@tap.case
def test_anonymous():
    """plain -m, which virtiofs alone cannot use"""
    saving('plain')


host.prepare()
backends.prepare()
tap.main()
