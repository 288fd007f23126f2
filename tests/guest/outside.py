# SPDX-License-Identifier: GPL-2.0-or-later
"""Two VMs that share their memory, and what the host says about it.

No guest runs: a test writes guest memory itself, so it knows what is in it.
"""

import base64
import os
import struct

import dedup
import host
import tap
import vm as vms
from host import MIB, PAGE
from qmp import Lines

RAM = 96
SEGMENT = 'memfd:dedup-segment'


class Machine(vms.VM):
    """A VM whose memory this test writes through the qtest protocol."""

    def __init__(self, name, extra=(), **kwargs):
        super().__init__(name, ram=RAM, accel='qtest', extra=extra, **kwargs)
        self.args += ['-qtest', 'unix:%s,server=on,wait=off'
                      % self.path('qtest'), '-qtest-log', 'none']
        self.port = None

    def start(self):
        super().start()
        self.port = Lines(self.path('qtest'), self.alive)
        return self

    def ask(self, text):
        """One command of the qtest protocol."""
        self.port.send(text)
        while True:
            line = self.port.line(60)
            if line.startswith('OK'):
                return line[2:].strip()
            tap.check(line.startswith('IRQ'), line)

    def write(self, address, data):
        """Write guest memory."""
        for at in range(0, len(data), MIB):
            part = data[at:at + MIB]
            self.ask('b64write 0x%x 0x%x %s' % (
                address + at, len(part), base64.b64encode(part).decode()))

    def read(self, address, size):
        """Read guest memory, as a device would."""
        return b''.join(base64.b64decode(self.ask('b64read 0x%x 0x%x' % (
            at, min(MIB, address + size - at))))
                        for at in range(address, address + size, MIB))


def pages(seed, count, start=0):
    """Contents of pages: the same for the same seed, else unique."""
    return b''.join(struct.pack('<QQ', seed, i) * (PAGE // 16)
                    for i in range(start, start + count))


class Outside:
    """The main memory of a VM as pagemap and maps show it."""

    PRESENT, SWAPPED, FILE = host.PM_PRESENT, 1 << 62, 1 << 61
    FRAME = (1 << 55) - 1
    zeros = set()               # frames of the kernel's that hold zeros

    def __init__(self, vm):
        pid, self.start, self.end = vm.ram_range()
        self.merged = []        # (inode of segment, page in it) of each page
        self.own = self.swapped = self.broken = 0
        for low, high, offset, inode, name in self.maps(pid):
            for i, entry in enumerate(host.pagemap(pid, low, high)):
                self.look(entry, SEGMENT in name,
                          (inode, offset // PAGE + i))

    def look(self, entry, in_segment, where):
        """Count one page."""
        present = bool(entry & self.PRESENT)
        if entry & self.SWAPPED:
            self.swapped += 1
        elif in_segment and not (present and not entry & self.FILE):
            # Mapped to the segment, whether somebody has looked or not
            self.merged.append(where)
        elif present and not self.is_zero(entry & self.FRAME):
            self.own += 1
            self.broken += in_segment

    def is_zero(self, frame):
        """Is that the kernel's own page of zeros?"""
        if not frame:
            tap.skip('only root sees which pages are the zero page')
        if frame not in self.zeros and host.is_zero_frame(frame):
            self.zeros.add(frame)
        return frame in self.zeros

    def maps(self, pid):
        """The mappings that lie in the main memory."""
        with open('/proc/%d/maps' % pid, encoding='ascii') as f:
            for line in f:
                words = line.split(None, 5)
                low, high = (int(n, 16) for n in words[0].split('-'))
                if self.start <= low and high <= self.end:
                    yield (low, high, int(words[2], 16), int(words[4]),
                           words[5] if len(words) > 5 else '')


class Scene:
    """Two VMs of a group that have merged all they can, and rest."""

    def __init__(self):
        self.group = vms.group_dir()
        self.cgroup = host.Cgroup()
        options = dict(dedup.FULL_SPEED, run='off')
        self.vm = Machine('a', backing='plain', dedup=options,
                          group=self.group, cgroup=self.cgroup).start()
        self.other = Machine('b', backing='memfd-shared', dedup=options,
                             group=self.group, cgroup=self.cgroup).start()
        self.zeros = 1500
        for machine, seed in (self.vm, 5), (self.other, 6):
            machine.write(16 * MIB, pages(1, 4000))     # in both
            machine.write(32 * MIB, pages(1, 1000))     # once more
            machine.write(40 * MIB, pages(seed, 2000))  # in one, twice
            machine.write(48 * MIB, pages(seed, 2000))
            machine.write(56 * MIB, pages(seed + 2, 1500))      # unique
            machine.write(64 * MIB, pages(seed + 4, self.zeros))
            machine.write(64 * MIB, bytes(self.zeros * PAGE))
        self.zeros_before = self.count_zeros()
        self.anon_before = self.anonymous()
        self.usage_before = self.cgroup.usage()
        for machine in self.vms():
            dedup.run(machine, True)
        for machine in self.vms():
            dedup.wait_state(machine, ['idle'])
        dedup.wait_scans(self.vms(), 2)
        for machine in self.vms():
            dedup.run(machine, False)
        for machine in self.vms():
            dedup.wait_state(machine, ['stopped'])
        self.said = dedup.stats(self.vm)
        self.others = dedup.stats(self.other)
        self.seen = Outside(self.vm)
        self.seen_other = Outside(self.other)
        self.saved = dedup.wait_saved(self.cgroup.usage, self.usage_before,
                                      self.said['group']['bytes-saved'] -
                                      MIB)
        self.grown = self.anonymous() - self.anon_before
        tap.note(dedup.summary(self.vm))
        tap.note(dedup.summary(self.other))

    def count_zeros(self):
        """Zero pages that have memory in the first VM: those written above,
        and what the kernel added to make huge pages full."""
        pid, start, end = self.vm.ram_range()
        count = 0
        for i, entry in enumerate(host.pagemap(pid, start, end)):
            if entry & Outside.PRESENT:
                page = host.peek(pid, start + i * PAGE, PAGE)
                count += not any(page)
        return count

    def vms(self):
        """Both."""
        return [self.vm, self.other]

    def anonymous(self):
        """Anonymous memory of the first VM's process outside guest RAM."""
        pid, start, end = self.vm.ram_range()
        return host.status(pid, 'RssAnon') - host.smaps(
            pid, start, end).get('Anonymous', 0)

    def threads(self):
        """comm of each thread of the first VM: {tid: name}."""
        result = {}
        base = '/proc/%d/task' % self.vm.pid
        for tid in os.listdir(base):
            with open('%s/%s/comm' % (base, tid), encoding='ascii') as f:
                result[int(tid)] = f.read().strip()
        return result
