#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""dedup-unmerge of 2 GiB: QEMU's monitor answers all the time.

The monitor needs the BQL for each answer, so the longest wait for one bounds
how long anybody else held it.  What QEMU's main thread and this program spent
waiting for a processor is taken off, by the scheduler's own count.  A busy
host adds other waits to that: the best of three counts.
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
LIMIT_MS = 10
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


def run_delay(task):
    """Seconds that a thread has waited for a processor so far."""
    try:
        with open('/proc/%s/schedstat' % task, encoding='ascii') as f:
            return int(f.read().split()[1]) / 1e9
    except OSError:
        return 0


def worst_answer(vm):
    """Unmerge; the longest that the monitor took for an answer meanwhile."""
    worst = 0
    answers = 0
    vm.qmp.command('dedup-unmerge', {'id': 'ds0'})
    tasks = ('%d/task/%d' % (vm.pid, vm.pid), 'thread-self')
    while dedup.stats(vm)['state'] == 'unmerging':
        delay = sum(run_delay(task) for task in tasks)
        start = time.monotonic()
        vm.qmp.command('query-status')
        took = time.monotonic() - start
        delay = sum(run_delay(task) for task in tasks) - delay
        worst = max(worst, took - delay)
        answers += 1
    event = vm.qmp.wait_event('DEDUP_UNMERGE_COMPLETED')
    tap.check(event['data']['pages-left'] == 0, str(event))
    tap.note('%d answers, the longest after %.1f ms' % (answers,
                                                        worst * 1000))
    tap.check(answers > 20, 'too few answers to judge by')
    return worst * 1000


@tap.case
def test_monitor_answers():
    """2 GiB merged: the BQL is never held longer than 10 ms"""
    with open('/proc/meminfo', encoding='ascii') as f:
        available = int(f.read().split('MemAvailable:')[1].split()[0])
    if available < 2 * RAM_MIB * 1024:
        tap.skip('needs %d MiB of memory' % (2 * RAM_MIB))
    vm = vms.VM('bql', ram=RAM_MIB, backing='file-shared',
                dedup=dedup.FULL_SPEED, extra=('-S',))
    expected = fill(vm.ram_file)
    vm.start()
    worst = []
    while len(worst) < 3 and not (worst and min(worst) <= LIMIT_MS):
        dedup.run(vm, True)
        dedup.wait_merged(vm, 2048 * MIB // 4096, timeout=90)
        tap.note(dedup.summary(vm))
        worst.append(worst_answer(vm))
    vm.qmp.command('object-del', {'id': 'ds0'})
    tap.check(file_hash(vm.ram_file) == expected,
              'the RAM has other contents than at the start')
    tap.check(min(worst) <= LIMIT_MS, 'the monitor waited %s ms' % worst)
    vm.quit()


host.prepare()
tap.main()
