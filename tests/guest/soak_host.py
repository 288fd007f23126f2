# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host does to its VMs in a soak: each is begun and ended.

A function gets the soak and a VM; it is a generator that yields once, while
what it has done lasts.  It raises tap.Skip where the host does not offer it.
"""

import os
import signal

import host
import tap
from host import MIB


class Controller:
    """A cgroup with one controller, version 1 or 2."""

    def __init__(self, name, v2_file):
        self.path, self.v2 = None, False
        with open('/proc/self/mountinfo', encoding='ascii') as f:
            for line in f:
                left, right = line.split(' - ')
                kind, _, options = right.split()[:3]
                where = left.split()[4]
                if kind == 'cgroup' and name in options.split(','):
                    self.path, self.v2 = where, False
                    break
                if kind == 'cgroup2' and self._offers(where, name):
                    self.path, self.v2 = where, True
        if not self.path:
            tap.skip('no cgroup controller ' + name)
        self.path = os.path.join(self.path, 'qemu-dedup-soak-%d' % os.getpid())
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as e:
            tap.skip(str(e))
        if self.v2 and not os.path.exists(os.path.join(self.path, v2_file)):
            os.rmdir(self.path)
            tap.skip('the controller %s is not delegated' % name)

    @staticmethod
    def _offers(where, name):
        with open(os.path.join(where, 'cgroup.controllers'),
                  encoding='ascii') as f:
            # Every cgroup of version 2 can be frozen.
            return name == 'freezer' or name in f.read().split()

    def write(self, name, value):
        """A file of the cgroup."""
        with open(os.path.join(self.path, name), 'w', encoding='ascii') as f:
            f.write(str(value))

    def hold(self, pid):
        """Take a process in; where it was is where it goes back to."""
        with open('/proc/%d/cgroup' % pid, encoding='ascii') as f:
            before = f.read()
        self.write('cgroup.procs', pid)
        return before

    def end(self, pid):
        """Let the process go to the top, remove the cgroup."""
        with open(os.path.join(os.path.dirname(self.path), 'cgroup.procs'),
                  'w', encoding='ascii') as f:
            f.write(str(pid))
        os.rmdir(self.path)


def freeze(_, vm):
    """cgroup freezer"""
    group = Controller('freezer', 'cgroup.freeze')
    if group.v2:
        # The memory cgroup is of version 2, too, and stays its own.
        group.path = vm.cgroup.path
        group.write('cgroup.freeze', 1)
        yield
        group.write('cgroup.freeze', 0)
        return
    group.hold(vm.pid)
    group.write('freezer.state', 'FROZEN')
    try:
        yield
    finally:
        group.write('freezer.state', 'THAWED')
        group.end(vm.pid)


def quota(soak, vm):
    """CPU quota of the whole QEMU"""
    group = Controller('cpu', 'cpu.max')
    if group.v2:
        os.rmdir(group.path)
        tap.skip('one tree of cgroups: it would leave its memory cgroup')
    percent = soak.random.choice([10, 30, 60])
    try:
        group.write('cpu.cfs_period_us', 100000)
        group.write('cpu.cfs_quota_us', 1000 * percent)
        group.hold(vm.pid)
        yield
    finally:
        group.end(vm.pid)


def sigstop(_, vm):
    """SIGSTOP, SIGCONT"""
    os.kill(vm.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(vm.pid, signal.SIGCONT)


def fifo(_, vm):
    """SCHED_FIFO for the vCPUs"""
    tids = [c['thread-id'] for c in vm.qmp.command('query-cpus-fast')]
    before = {t: (os.sched_getscheduler(t), os.sched_getparam(t))
              for t in tids}
    try:
        for tid in tids:
            os.sched_setscheduler(tid, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError as e:
        tap.skip(str(e))
    try:
        yield
    finally:
        for tid, (policy, param) in before.items():
            os.sched_setscheduler(tid, policy, param)


def overhead(vm):
    """Anonymous memory of a QEMU beside its guest's RAM."""
    pid, start, end = vm.ram_range()
    return host.status(pid, 'RssAnon') - host.smaps(
        pid, start, end).get('Anonymous', 0)


def limit(_, vm):
    """memory limit: what the VM could live with without a scanner"""
    vm.cgroup.limit(overhead(vm) + (vm.ram + vm.dimm) * MIB +
                    96 * MIB)
    try:
        yield
    finally:
        vm.cgroup.limit(1 << 40)
        tap.check(vm.cgroup.kills() == 0, 'killed by the limit: ' + vm.name)


def ksm(*_):
    """KSM scans, then all it has merged is undone"""
    # Another test may have it for minutes.
    knobs = host.Ksm(wait=False)
    try:
        knobs.run(True)
        yield
    finally:
        knobs.put_back()


def paused(_, vm):
    """stop, cont"""
    vm.stop()
    try:
        yield
    finally:
        vm.cont()


# Seconds that each may last, at most.  SCHED_FIFO takes a processor.
ALL = {freeze: 2, quota: 6, sigstop: 2, fifo: 1, limit: 8, ksm: 4, paused: 1}
