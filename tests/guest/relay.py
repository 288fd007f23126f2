# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the vhost-user relay share: a guest with devices that have
back ends, and the checkers that run on them in the guest.

    g = Guest('memfd-shared', ['blk', 'fs'], dedup=dict(dedup.FULL_SPEED))
    g.start(); g.wait_requests(100); g.stop()
"""

import os

import backends
import dedup
import host
import tap
import vm as vms
from host import MIB
from qmp import fields

# 'none': plain vhost-user in place of it, to try the tests themselves
RELAY = os.environ.get('RELAY', 'on')
if RELAY == 'none':
    RELAY = None

KINDS = {'blk': backends.Storage, 'contrib': backends.ContribBlk,
         'fs': backends.FsRust, 'fs-c': backends.FsC, 'net': backends.Passt}
# MiB of a target, and how it is used
TARGETS = {'blk': (32, 512, 'both', 4, 1024), 'contrib': (32, 512, 'both', 2,
                                                          1024),
           'fs': (16, 64, 'both', 2, 1024), 'fs-c': (16, 64, 'both', 2, 1024)}


def have(kind):
    """Can this back end be had?  Says so in the log if not."""
    try:
        KINDS[kind]().command()
        return True
    except tap.Skip as e:
        tap.note('without %s: %s' % (kind, e))
        return False


class Guest:
    """A VM, the back ends of its devices, and the jobs in the guest."""

    def __init__(self, backing, kinds, relay=RELAY, iothread=False,
                 reconnect=False, existing=None, name='relay', more=None,
                 extra=(), **kwargs):
        """@existing: the back ends' data is that of another guest.  @more:
        properties for each kind."""
        self.backend = {}
        self.running = set()
        self.echo = None
        options = list(extra)
        if not RELAY:
            iothread = False
            backing = 'memfd-shared'
        if iothread:
            options += ['-object', 'iothread,id=io0']
        for kind in kinds:
            args = {}
            if kind in ('blk', 'contrib'):
                args = {'size': TARGETS[kind][0]}
                if existing:
                    args = {'image': existing.backend[kind].image}
            elif kind != 'net':
                args = {'tag': kind}
                if existing:
                    args['shared'] = existing.backend[kind].shared
            self.backend[kind] = KINDS[kind](**args).start()
            options += self.backend[kind].options(
                kind, relay, 'io0' if iothread and
                self.backend[kind].can_reconnect else None,
                reconnect and self.backend[kind].can_reconnect,
                **(more or {}).get(kind, {}))
        kwargs.setdefault('ram', 256)
        self.vm = vms.VM(name, backing=backing, extra=options, **kwargs)
        self.vm.start()

    def boot(self):
        """Boot, mount what there is and bring the network up."""
        self.vm.boot()
        for kind in self.backend:
            if kind.startswith('fs'):
                backends.mount(self.vm, kind, '/' + kind)
        if 'net' in self.backend:
            backends.network_up(self.vm)
            self.echo = backends.Echo(self.backend['net'].echo)
        return self

    def target(self, kind):
        """What the guest calls it."""
        if kind.startswith('fs'):
            return '/%s/file' % kind
        disks = [k for k in self.backend if k in ('blk', 'contrib')]
        return '/dev/vd' + 'abc'[disks.index(kind)]

    def run(self, kind, state='zero', mode=None):
        """Start the checker of one device; @mode: "direct" or "buffered"."""
        if kind == 'net':
            self.vm.agent.ask('net-start %s %d 2 512' % (
                backends.NETWORK['host'], self.echo.port))
        elif kind == 'meta':
            self.vm.agent.ask('meta-start /%s 2' % next(
                k for k in self.backend if k.startswith('fs')))
        else:
            mib, unit, both, workers, pages = TARGETS[kind]
            if kind.startswith('fs'):
                self.vm.agent.ask('sh truncate -s %d %s' % (
                    mib * MIB, self.target(kind)))
            self.vm.agent.ask('io-start %s %s %d %d %s %d %d %s' % (
                kind, self.target(kind), mib, unit, mode or both, workers,
                pages, state))
        self.running.add(kind)

    def run_all(self):
        """Start them all."""
        for kind in self.backend:
            self.run(kind)
        if any(k.startswith('fs') for k in self.backend):
            self.run('meta')
        return self

    def _ask(self, what, kind):
        command = ('%s-%s' % (kind, what) if kind in ('net', 'meta') else
                   'io-%s %s' % (what, kind))
        text = self.vm.agent.ask(command, 300)
        # What the first fault was stands at the end, in words.
        return dict(fields(text), first=text.partition(' err=')[2])

    def figures(self):
        """The figures of each checker."""
        return {kind: self._ask('stat', kind) for kind in self.running}

    def check(self):
        """Nothing is wrong up to now."""
        for kind, got in self.figures().items():
            tap.check(got['bad'] == 0 and got['err'] == 0,
                      '%s: %s: %s' % (self.vm.name, kind, got))

    def wait_requests(self, count, timeout=60, patience=tap.PATIENCE):
        """Until each of them has completed so many more."""
        target = {kind: got['ops'] + count
                  for kind, got in self.figures().items()}

        def done():
            figures = self.figures()
            bad = {k: g for k, g in figures.items()
                   if g['bad'] or g['err']}
            tap.check(not bad, '%s: %s' % (self.vm.name, bad))
            return all(figures[k]['ops'] >= target[k] for k in target)
        dedup.wait_until(done, '%d requests of each' % count, timeout, 0.1,
                         patience)

    def end(self, kind):
        """End one checker: all is compared."""
        got = self._ask('stop', kind)
        self.running.discard(kind)
        tap.check(got['ops'] > 0, '%s did nothing: %s' % (kind, got))
        backends.check_job(self.vm, kind, got)
        return got

    def end_all(self):
        """End all: every byte is right."""
        for kind in sorted(self.running - {'net', 'meta'}):
            self._ask('halt', kind)
        for kind in sorted(self.running):
            self.end(kind)

    def halt(self, kind):
        """End the checker of a disk or a file; it can be resumed."""
        return self._ask('halt', kind)

    def resume(self, kind):
        """Go on after halt()."""
        self.vm.agent.ask('io-resume ' + kind)

    def quit(self):
        """End QEMU."""
        self.vm.quit()

    def relayed(self):
        """The figures of the relays, by kind."""
        if not RELAY:
            return {}
        return {name[2:]: r for name, r in backends.relays(self.vm).items()}


def prepare(scanner=True):
    """As host.prepare(), and the back ends."""
    host.prepare(scanner)
    backends.prepare()
