# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMs of a soak: memory, disk and network load that compares every byte."""

import os
import subprocess

import backends
import host
import tap
import vm as vms

RAM = 256                       # MiB
DISK = (4096, 9, 700)           # blocks, seed, distinct
DATA = 32                       # MiB that each writes to
# Place: kind of RAM, what keeps pages from changing, a network device?
PLACES = [('file-shared', 'auto', False), ('plain', 'auto', False),
          ('memfd-shared', 'mprotect', True)]
REGIONS = {'m': '3000 mixed', 'u': '1500 signed', 'd': '5000 dup 4',
           's': '3000 same 11'}
LOOPS = {'m': 64, 'u': 16}


class Guest(vms.VM):
    """One of them."""

    def __init__(self, soak, place, data=None, incoming=None):
        """@data: the disk of the one that it goes on for."""
        self.place = place
        self.backing, way, self.net = PLACES[place]
        self.dimm = 0           # MiB that are plugged
        self.seen = None        # figures when they were last counted
        self.data = data or soak.new_data()
        self.dedup = {'group': soak.group, 'write-protect': way,
                      'sleep-millisecs': 5, 'pages-to-scan': 20000}
        self.passt = None
        extra = ['-drive', 'if=virtio,format=qcow2,file=' + self.data,
                 '-device', 'virtio-balloon-pci,id=balloon0,'
                 'free-page-reporting=on']
        if self.net:
            self.passt = backends.Passt().start()
            extra += self.passt.options('net0', relay='on')
        super().__init__(
            'soak%d' % place, ram=RAM, backing=self.backing, hotplug=True,
            cgroup=host.Cgroup(), disk=soak.disk, dedup=self.dedup,
            incoming=incoming, extra=extra)

    def load(self, soak):
        """Boot, and begin all that it does."""
        self.agent.wait_hello(300)
        self.agent.ask('id %d' % self.number)
        for name, what in REGIONS.items():
            self.agent.ask('alloc %s %s' % (name, what))
        for name, step in LOOPS.items():
            self.agent.ask('loop %s start %d' % (name, step))
        self.agent.ask('dio-start /dev/vda %d %d %d 2 12 4' %
                       (DISK[1], DISK[2], DISK[0]))
        self.agent.ask('io-start disk /dev/vdb %d 512 direct 2 1024 zero' %
                       DATA)
        if self.net:
            backends.network_up(self)
            self.agent.ask('net-start %s %d 2 1024' % (
                backends.NETWORK['host'], soak.echo.port))

    def check(self):
        """What its loads have found so far: nothing."""
        got = self.agent.get('list')
        tap.check(got['errors'] == 0, '%s: %s' % (self.name, got))
        got = self.agent.get('dio-stat')
        tap.check(got['errors'] == 0 and got['lost'] == 0,
                  '%s: %s' % (self.name, got))
        jobs = ['io-stat disk'] + (['net-stat'] if self.net else [])
        for job in jobs:
            got = self.agent.get(job)
            tap.check(got['bad'] == 0 and got['err'] == 0,
                      '%s: %s: %s' % (self.name, job, got))

    def end_load(self):
        """Stop, and compare all once more; what was done, in words."""
        done = [self.agent.get('list')]
        for name in LOOPS:
            self.agent.ask('loop %s stop' % name)
        done.append(self.agent.get('dio-stop'))
        tap.check(done[-1]['errors'] == 0, str(done[-1]))
        jobs = ['io-stop disk'] + (['net-stop'] if self.net else [])
        for job in jobs:
            done.append(self.agent.get(job, 300))
            tap.check(done[-1]['bad'] == 0 and done[-1]['err'] == 0,
                      '%s: %s: %s' % (self.name, job, done[-1]))
        self.check_regions(REGIONS)
        return done

    def bury(self):
        """It has ended, or is not needed any more: leave nothing."""
        self.kill()
        self._clean()
        if self.passt:
            self.passt.kill()


def new_disk(path):
    """A qcow2 file: it can keep snapshots of the whole VM."""
    subprocess.run([os.path.join(os.path.dirname(host.QEMU), 'qemu-img'),
                    'create', '-q', '-f', 'qcow2', path, '%dM' % DATA],
                   check=True)
    return path
