#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# alone
"""dedup-unmerge of 2 GiB: QEMU's monitor answers all the time.

The monitor needs the BQL for each answer.  How fast it answers depends on
the host and on what else runs there, so it is compared with itself: while the
scanner, which takes as much of the host, looks for pages.  Where the BQL was
held for the unmerge, or for a step of it, there would be a few answers in
place of hundreds.
"""

import hashlib
import os
import time

import dedup
import host
import tap
import vm as vms

RAM_MIB = 2304
DISTINCT_MIB = 256
SHARE = 4                       # how many times fewer answers are too few
MIB = 1 << 20


def fill(path):
    """Random contents, repeated; no page is zero.  Returns their hash."""
    pattern = os.urandom(DISTINCT_MIB * MIB)
    digest = hashlib.sha256()
    with open(path, 'wb') as f:
        for _ in range(RAM_MIB // DISTINCT_MIB):
            f.write(pattern)
            digest.update(pattern)
    return digest.hexdigest()


def file_hash(path):
    """The hash of what is in the file now."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while True:
            data = f.read(16 * MIB)
            if not data:
                return digest.hexdigest()
            digest.update(data)


def answers_per_second(vm, until):
    """How often the monitor answers, until @until is true."""
    answers = 0
    longest = 0
    start = now = time.monotonic()
    while not until(now - start):
        vm.qmp.command('query-status')
        dedup.stats(vm)
        then, now = now, time.monotonic()
        longest = max(longest, now - then)
        answers += 1
    tap.note('%d answers in %.1f s, the longest after %.1f ms' %
             (answers, now - start, longest * 1000))
    return answers / (now - start)


@tap.case
def test_monitor_answers():
    """2 GiB merged: the monitor answers as if nothing was being restored"""
    with open('/proc/meminfo', encoding='ascii') as f:
        available = int(f.read().split('MemAvailable:')[1].split()[0])
    if available < 2 * RAM_MIB * 1024:
        tap.skip('needs %d MiB of memory' % (2 * RAM_MIB))
    vm = vms.VM('bql', ram=RAM_MIB, backing='file-shared',
                dedup=dedup.FULL_SPEED, extra=('-S',))
    expected = fill(vm.ram_file)
    vm.start()
    dedup.wait_merged(vm, 2048 * MIB // 4096, timeout=200)
    tap.note(dedup.summary(vm))
    scanning = answers_per_second(vm, lambda seconds: seconds > 3)
    vm.qmp.command('dedup-unmerge', {'id': 'ds0'})
    unmerging = answers_per_second(
        vm, lambda seconds: dedup.stats(vm)['state'] != 'unmerging')
    event = vm.qmp.wait_event('DEDUP_UNMERGE_COMPLETED')
    tap.check(event['data']['pages-left'] == 0, str(event))
    vm.qmp.command('object-del', {'id': 'ds0'})
    tap.check(file_hash(vm.ram_file) == expected,
              'the RAM has other contents than at the start')
    tap.check(unmerging > scanning / SHARE,
              '%.0f answers a second, %.0f while scanning' %
              (unmerging, scanning))
    vm.quit()


host.prepare()
tap.main()
