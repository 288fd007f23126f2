#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""make soak: VMs at work, and everything that may happen to them, at random.

Three guests of one group have memory, disk and network load that compares
every byte.  Meanwhile they are merged and unmerged, migrated, saved and
loaded, plugged, ballooned, limited, frozen, stopped ... (soak_actions.py,
soak_host.py).  MINUTES: how long; SEED: what comes, in which order; ONLY: the
names of the actions that may come.  It ends by itself, leaves nothing, and a
failure says how to run the same again.
"""

import os
import random
import signal
import sys
import time
import traceback

import backends
import dedup
import host
import soak_actions
import soak_host
import soak_vms
import tap
import vm as vms
from host import MIB

MINUTES = float(os.environ.get('MINUTES') or 60)
SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(1 << 32))
ONLY = os.environ.get('ONLY', '').split()
PROGRESS_SECONDS = 30
# Of all that is done, so much is done by the host.
HOST_PART = 0.4
LASTING = (soak_host.quota, soak_host.limit, soak_host.ksm)
# Not while the host does something to the VM that lasts: it needs more.
ALONE = (soak_actions.dimm, soak_actions.migrate, soak_actions.newcomer,
         soak_actions.whole, soak_actions.ignore_shared)


class Soak:
    """The VMs, and what is done to them."""

    def __init__(self):
        self.random = random.Random(SEED)
        self.start = time.monotonic()
        self.group = vms.group_dir()
        self.scratch = vms.scratch()
        self.disk = os.path.join(self.scratch, 'disk')
        host.make_disk(self.disk, *soak_vms.DISK)
        self.disks = 0
        self.events = self.checks = self.pages = 0
        self.log, self.done, self.skipped = [], {}, {}
        self.lasting = {}       # (VM or None, function): (generator, end)
        self.told = self.start
        self.echo = backends.Echo()
        self.storage = backends.Storage(size=8)
        self.vms = []

    def begin(self):
        """Start all."""
        for place in range(len(soak_vms.PLACES)):
            self.vms.append(self.build(place).start())
        for vm in self.vms:
            vm.load(self)
            tap.note('%s works' % vm.name)
        self.start = time.monotonic()

    # What actions use

    def new_data(self):
        """A disk that a VM may write to."""
        self.disks += 1
        return soak_vms.new_disk(os.path.join(self.scratch, 'data%d.qcow2' %
                                              self.disks))

    def build(self, place, data=None, incoming=None):
        """A VM, not started."""
        return soak_vms.Guest(self, place, data, incoming)

    def replace(self, old, new):
        """Another QEMU has the place of one that has ended."""
        self.vms[self.vms.index(old)] = new
        old.bury()

    def count(self, vm):
        """Add up what has happened to pages.  At least this: what comes and
        goes between two looks is not seen."""
        s = dedup.stats(vm)
        now = (s['pages-merged'] + s['zero-pages'], s['cow-breaks'])
        if vm.seen:
            broken = max(now[1] - vm.seen[1], 0)
            self.events += broken + abs(now[0] - vm.seen[0] + broken)
        vm.seen = now

    @staticmethod
    def forget(vm):
        """Its figures begin anew."""
        vm.seen = None

    def work(self, seconds, besides=None):
        """Let the guests work, and look at their figures."""
        end = time.monotonic() + seconds
        while True:
            for vm in self.vms:
                if vm is not besides:
                    self.count(vm)
            left = end - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(left, 0.2))
        self.tell()

    # The loop

    def tell(self):
        """Where are we?"""
        now = time.monotonic()
        if now - self.told >= PROGRESS_SECONDS:
            self.told = now
            tap.note('%d s: %d actions, %d page events, %d checks, %d pages '
                     'compared, wrong bytes 0' % (
                         now - self.start, sum(self.done.values()),
                         self.events, self.checks, self.pages))

    def end_lasting(self, vm=None, everything=False):
        """End what has lasted long enough, or is in the way of this VM."""
        for key, (action, end) in list(self.lasting.items()):
            if everything or time.monotonic() > end or (vm and key[0] is vm):
                del self.lasting[key]
                next(action, None)

    def host_action(self, vm):
        """Something that the host does."""
        some = [f for f in soak_host.ALL if not ONLY or f.__name__ in ONLY]
        if not some:
            return
        function = self.random.choice(some)
        seconds = self.random.uniform(0.1, soak_host.ALL[function])
        key = (None if function is soak_host.ksm else vm, function)
        if key in self.lasting:
            return
        self.log.append('%s for %.1f s: %s' % (function.__name__, seconds,
                                               vm.name))
        action = function(self, vm)
        try:
            next(action)
        except tap.Skip as e:
            self.skipped[function.__name__] = str(e)
            return
        self.done[function.__name__] = self.done.get(function.__name__, 0) + 1
        if function in LASTING:
            self.lasting[key] = (action, time.monotonic() + seconds)
        else:
            self.work(seconds, vm)
            next(action, None)

    def qemu_action(self, vm):
        """Something that QEMU is asked for."""
        some = {f: n for f, n in soak_actions.ALL.items()
                if not ONLY or f.__name__ in ONLY}
        if not some:
            return
        function = self.random.choices(list(some), list(some.values()))[0]
        if function in ALONE:
            self.end_lasting(vm)
        self.log.append('%s: %s' % (function.__name__, vm.name))
        try:
            function(self, vm)
            self.done[function.__name__] = self.done.get(
                function.__name__, 0) + 1
        except tap.Skip as e:
            self.skipped.setdefault(function.__name__, str(e))

    def check(self, vm):
        """Is all well?"""
        vm.check()
        self.checks += 1
        name = self.random.choice(sorted(soak_vms.REGIONS))
        vm.check_regions(name)
        self.pages += int(soak_vms.REGIONS[name].split()[0])

    def step(self):
        """One thing."""
        vm = self.random.choice(self.vms)
        if self.random.random() < HOST_PART:
            self.host_action(vm)
        else:
            self.qemu_action(vm)
        self.work(self.random.random())
        self.end_lasting()
        self.check(self.random.choice(self.vms))

    def run(self):
        """All of it."""
        while time.monotonic() - self.start < MINUTES * 60:
            self.step()
        self.log.append('the end')
        self.end_lasting(everything=True)
        for vm in self.vms:
            tap.note('%s: %s' % (vm.name, vm.end_load()))
            self.count(vm)
            dedup.run(vm, True)
            dedup.unmerge(vm)
            vm.check_regions(soak_vms.REGIONS)
            self.count(vm)
        for vm in self.vms:
            vm.quit()
            tap.check(vm.cgroup.shmem() < MIB / 2,
                      'shared memory is left: %d' % vm.cgroup.shmem())
        left = [f for _, _, files in os.walk(self.group) for f in files]
        tap.check(set(left) <= {'lock', 'slots'}, 'left: %s' % left)

    def report(self):
        """The figures."""
        tap.note('done: ' + ', '.join('%s %d' % a for a in
                                      sorted(self.done.items())))
        tap.note('never: ' + (', '.join(
            '%s (%s)' % (k, v) for k, v in sorted(self.skipped.items())
            if k not in self.done) or 'none'))
        tap.note('%d s, %d actions, at least %d page events, %d checks, wrong '
                 'bytes 0' % (time.monotonic() - self.start,
                              sum(self.done.values()), self.events,
                              self.checks))


def fail(soak):
    """Say what to do again."""
    traceback.print_exc()
    if soak:
        for line in soak.log[-20:]:
            tap.note('action: ' + line)
        for vm in soak.vms:
            tap.note('\n'.join(vm.describe()))
    tap.note('rerun: make soak MINUTES=%g SEED=%d' % (MINUTES, SEED))


def main():
    """Returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    tap.note('soak: MINUTES=%g SEED=%d' % (MINUTES, SEED))
    soak, good = None, False
    try:
        backends.prepare('passt')
        soak = Soak()
        soak.begin()
        soak.run()
        soak.report()
        good = True
    except BaseException:
        fail(soak)
    for action, _ in soak.lasting.values() if soak else ():
        action.close()
    for trace in tap.run_cleanups():
        good = False
        tap.note(trace)
    tap.note('soak: ' + ('all is right' if good else 'FAILED'))
    return 0 if good else 1


if __name__ == '__main__':
    host.prepare()
    sys.exit(main())
