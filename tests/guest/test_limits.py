#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Something runs short: nothing more is merged, query-dedup-stats names it
and says what to change, and merging goes on when there is room again.

No guest runs; the test writes guest memory itself.  The limit of mappings is
in tests/qtest/dedup-merge-test.c.
"""

import os
import resource
import struct

import dedup
import host
import tap
import vm as vms
from host import MIB
from outside import Machine, pages

EQUAL = 600
SEGMENT_PAGES = 512
# Pages that may hide each other: the index keeps only a part of their hashes.
COLLISIONS = 32

# The table of segments in the group's file (hw/dedup/engine/group/group-internal.h)
TABLE_OFFSET = 4096 + 256 * 128
TABLE_ENTRIES = 1 << 18


def machine(**kwargs):
    """A VM with equal pages that does not merge them yet."""
    vm = Machine('a', dedup=dict(dedup.FULL_SPEED, run='off'), **kwargs)
    vm.start()
    vm.write(84 * MIB, pages(1, EQUAL))
    vm.write(88 * MIB, pages(1, EQUAL))
    return vm


def group_file(vm):
    """The file that the members share; it is made by the scanner's thread."""
    def find():
        base = '/proc/%d/fd' % vm.pid
        for fd in os.listdir(base):
            path = '%s/%s' % (base, fd)
            if 'memfd:dedup-group' in os.readlink(path):
                return path
        return None
    return dedup.wait_until(find, 'file of the group')


def check_limited(vm, reason, text):
    """It may merge, and for this one reason does not merge more than the
    pages that are merged already; returns how many."""
    merged = dedup.stats(vm)['pages-merged']
    dedup.run(vm, True)
    dedup.wait_until(lambda: dedup.stats(vm)['blocked-reasons'], 'reason')
    dedup.wait_scans([vm], 2)
    got = dedup.stats(vm)
    tap.check(got['state'] == 'limited', got['state'])
    tap.check([b['reason'] for b in got['blocked-reasons']] == [reason] and
              text in got['blocked-reasons'][0]['detail'],
              str(got['blocked-reasons']))
    tap.check(got['pages-merged'] == merged, str(got['pages-merged']))
    return merged


def check_merges(vm, merged):
    """There is room again, for more than @merged."""
    dedup.wait_merged(vm, merged + 2 * EQUAL - COLLISIONS)
    got = dedup.wait_state(vm, ['idle'])
    tap.check(not got['blocked-reasons'], str(got['blocked-reasons']))


@tap.case
def test_file_descriptors():
    """file-descriptors: half of RLIMIT_NOFILE are in use for segments"""
    vm = machine()
    limit = 32      # poll(2) of the main loop needs so many
    count = limit // 2 * SEGMENT_PAGES
    vm.write(16 * MIB, pages(2, count))
    vm.write(48 * MIB, pages(2, count))
    vm.write(84 * MIB, pages(3, EQUAL))         # not equal yet
    dedup.run(vm, True)
    dedup.wait_merged(vm, 2 * count - COLLISIONS)
    dedup.wait_state(vm, ['idle'])
    dedup.run(vm, False)
    dedup.wait_state(vm, ['stopped'])
    vm.write(84 * MIB, pages(1, EQUAL))
    old = resource.prlimit(vm.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(vm.pid, resource.RLIMIT_NOFILE, (limit, old[1]))
    merged = check_limited(vm, 'file-descriptors', 'RLIMIT_NOFILE')
    resource.prlimit(vm.pid, resource.RLIMIT_NOFILE, old)
    check_merges(vm, merged)


@tap.case
def test_memory():
    """memory: the cgroup could not bear all of the guest's RAM"""
    cgroup = host.Cgroup()
    vm = machine(cgroup=cgroup)
    cgroup.limit(cgroup.usage() + 16 * MIB)
    merged = check_limited(vm, 'memory', 'memory cgroup')
    cgroup.limit(1024 * MIB)
    check_merges(vm, merged)


@tap.case
def test_index_full():
    """index-full: every entry of the group's table of segments is taken"""
    vm = machine(group=vms.group_dir())
    # Segments of one page, of the first generation
    taken = b''.join(struct.pack('<IHBBQ', TABLE_ENTRIES + i, 1, 0, 0, 1)
                     for i in range(TABLE_ENTRIES))
    with open(group_file(vm), 'r+b', buffering=0) as f:
        f.seek(TABLE_OFFSET)
        tap.check(f.write(taken) == len(taken), 'a short write')
        merged = check_limited(vm, 'index-full', 'split the group')
        f.seek(TABLE_OFFSET)
        tap.check(f.write(bytes(len(taken))) == len(taken), 'a short write')
    check_merges(vm, merged)


host.prepare()
tap.main()
