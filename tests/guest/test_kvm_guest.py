#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A KVM vCPU writes to its pages while they are merged and given back."""

import os
import signal

import bareguest
import dedup
import host
import poison
import qmp
import tap
from bareguest import PAGES, command, wait_round, wait_verified

CYCLES = 4


def kvm_guest(backing):
    """Merge, write, unmerge, again and again; then check every word."""
    vm = bareguest.start(backing, dedup=dedup.FULL_SPEED)
    for cycle in range(CYCLES):
        command(vm, b'bw'[cycle % 2:][:1])
        wait_round(vm, 2)
        # The guest writes most pages in a round of 'b'; some stay merged.
        dedup.wait_merged(vm, 20)
        tap.note(dedup.summary(vm))
        if cycle % 3 == 2:
            dedup.unmerge(vm)
            wait_round(vm, 1)
            dedup.run(vm, True)
    command(vm, b'q')
    wait_round(vm, 2)
    # Now nothing changes: all of the runs that are equal can be merged.
    dedup.wait_merged(vm, PAGES // 4)
    wait_verified(vm)
    command(vm, b'b')
    wait_round(vm, 3)
    tap.check(dedup.stats(vm)['cow-breaks'] > 0, 'no page was ever written')
    dedup.unmerge(vm)
    wait_verified(vm)
    vm.quit()


@tap.case
def test_memfd():
    """memory-backend-memfd, share=on"""
    kvm_guest('memfd-shared')


@tap.case
def test_anonymous():
    """plain -m"""
    kvm_guest('plain')


def thread_named(pid, name):
    """The thread of a process that has this name."""
    for task in os.listdir('/proc/%d/task' % pid):
        with open('/proc/%d/task/%s/comm' % (pid, task),
                  encoding='ascii') as f:
            if f.read().strip() == name:
                return int(task)
    raise LookupError(name)


@tap.case
def test_real_time():
    """SCHED_FIFO: a vCPU that never sleeps, on the scanner's processor"""
    vm = bareguest.start('memfd-shared', dedup=dedup.FULL_SPEED,
                         extra=['-name', 'kvm,debug-threads=on'])
    vcpu = thread_named(vm.pid, 'CPU 0/KVM')
    scanner = dedup.stats(vm)['thread-id']
    cpu = min(os.sched_getaffinity(0))
    for task in vcpu, scanner:
        os.sched_setaffinity(task, {cpu})
    try:
        os.sched_setscheduler(vcpu, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        tap.skip('needs the right to SCHED_FIFO')
    command(vm, b'w')
    # The kernel leaves others 5 % of the time: both go on, however slowly.
    dedup.wait_merged(vm, 20)
    wait_round(vm, 2)
    wait_verified(vm)
    dedup.unmerge(vm)
    wait_verified(vm)
    vm.quit()


@tap.case
def test_poison():
    """Pages break: the scanner goes on, and a vCPU that meets one is told"""
    vm = bareguest.start('memfd-shared', dedup=dedup.FULL_SPEED)
    command(vm, b'q')
    dedup.wait_merged(vm, PAGES // 4)
    # What is restored while nobody runs is in the file, and not mapped.
    vm.qmp.command('stop')
    dedup.unmerge(vm)
    _, start, end = vm.ram_range()
    broken = poison.break_pages(vm.pid, start + 2 * host.MIB,
                                end - start - 2 * host.MIB)
    if not broken:
        tap.skip('no UFFDIO_POISON (Linux 6.6), or no userfaultfd')
    dedup.run(vm, True)
    dedup.wait_scans([vm], 3)
    found = dedup.stats(vm)['pages-poisoned']
    tap.note('%d pages broke, %d were met' % (broken, found))
    tap.check(0 < found <= broken, 'none was met')
    try:
        vm.qmp.command('cont')
    except qmp.ChannelClosed:
        pass # it was met at once
    # The bare guest has no handler for it: a reset, which ends QEMU here.  If
    # the kernel has no memory errors, QEMU cannot tell that it is one.
    vm.process.wait(60)
    with open(vm.path('stderr'), encoding='utf-8') as f:
        said = f.read()
    if os.path.exists('/proc/sys/vm/memory_failure_recovery'):
        expected, ok = 0, 'BUS_MCEERR_AR injected' in said
    else:
        expected, ok = -signal.SIGBUS, True
    tap.check(vm.process.returncode == expected and ok,
              '%s: %s' % (vm.process.returncode, said))


host.prepare()
tap.main()
