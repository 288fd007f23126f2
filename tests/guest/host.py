# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host says about processes and memory, from outside QEMU."""

import ctypes
import fcntl
import os
import re
import struct
import subprocess
import sys
import time

import tap
from qmp import fields

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(os.path.dirname(HERE))
BUILD = os.environ.get('BUILD_DIR', os.path.join(TOP, 'build'))
# Another version of QEMU than the usual one is built elsewhere.
QEMU_DIR = os.environ.get('QEMU_DIR', BUILD)
QEMU = os.environ.get('QEMU_SYSTEM',
                      os.path.join(QEMU_DIR, 'bin', 'qemu-system-x86_64'))
IMAGES = os.path.join(BUILD, 'guest')
MIB = 1 << 20
PAGE = 4096
SYS_USERFAULTFD = 323           # x86-64
PM_PRESENT = 1 << 63            # in an entry of pagemap
KPF_ZERO_PAGE = 24              # a bit of kpageflags


def image(name):
    """Path of something that build-images makes."""
    return os.path.join(IMAGES, name)


def has_userfaultfd():
    """Does the host grant us one that covers faults of the kernel?"""
    try:
        os.close(os.open('/dev/userfaultfd', os.O_RDWR | os.O_CLOEXEC))
        return True
    except OSError:
        pass
    fd = ctypes.CDLL(None).syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def prepare(scanner=True):
    """Build what the guests need; a moment if it is there.  QEMU itself is
    the business of make.  @scanner: without a userfaultfd, skip all."""
    if not os.access(QEMU, os.X_OK):
        print('Bail out! %s is not built' % QEMU, flush=True)
        sys.exit(1)
    if scanner and not has_userfaultfd():
        print('1..0 # SKIP the host grants no userfaultfd', flush=True)
        sys.exit(0)
    subprocess.run([os.path.join(HERE, 'build-images'), IMAGES], check=True,
                   stdout=subprocess.DEVNULL, timeout=1000)


def make_disk(path, blocks, seed, distinct):
    """Write a disk for the agent's dio-start."""
    subprocess.run([image('mkdisk'), path, str(blocks), str(seed),
                    str(distinct)], check=True, timeout=300)


def meminfo():
    """/proc/meminfo in bytes."""
    with open('/proc/meminfo', encoding='ascii') as f:
        return {line.split(':')[0]: int(line.split()[1]) * 1024 for line in f}


def status(pid, name):
    """A field of /proc/PID/status in bytes (those with kB)."""
    with open('/proc/%d/status' % pid, encoding='ascii') as f:
        for line in f:
            if line.startswith(name + ':'):
                return int(line.split()[1]) * 1024
    raise KeyError(name)


def count_maps(pid):
    """The number of mappings of a process."""
    with open('/proc/%d/maps' % pid, encoding='ascii') as f:
        return sum(1 for line in f)


def smaps(pid, start, end):
    """Sum of the figures in smaps, in bytes, over mappings in the range."""
    total = {}
    inside = False
    with open('/proc/%d/smaps' % pid, encoding='ascii') as f:
        for line in f:
            m = re.match(r'([0-9a-f]+)-([0-9a-f]+) ', line)
            if m:
                inside = (int(m.group(1), 16) >= start and
                          int(m.group(2), 16) <= end)
                continue
            m = re.match(r'(\w+): +(\d+) kB', line)
            if inside and m:
                total[m.group(1)] = (total.get(m.group(1), 0) +
                                     int(m.group(2)) * 1024)
    return total


def count_pages(ranges):
    """Count equal pages; @ranges are (pid, start, end) of paused VMs that
    are not being merged right now."""
    if os.geteuid() != 0:
        tap.skip('counting pages from outside needs root')
    done = subprocess.run(
        [image('pagecount')] + ['%d:%x-%x' % r for r in ranges],
        capture_output=True, text=True, timeout=600, check=False)
    tap.check(done.returncode == 0, done.stderr)
    return fields(done.stdout)


def pagemap(pid, start, end):
    """The entries of /proc/PID/pagemap for a range, a list of integers."""
    with open('/proc/%d/pagemap' % pid, 'rb', buffering=0) as f:
        f.seek(start // PAGE * 8)
        data = f.read((end - start) // PAGE * 8)
    return struct.unpack('<%dQ' % (len(data) // 8), data)


def find_page(pid, start, end, first_bytes):
    """Address of the first page in the range that begins with these bytes.
    Of the pages that are mapped: to read an absent one may take memory."""
    with open('/proc/%d/mem' % pid, 'rb', buffering=0) as f:
        for i, entry in enumerate(pagemap(pid, start, end)):
            if entry & PM_PRESENT:
                f.seek(start + i * PAGE)
                if f.read(len(first_bytes)) == first_bytes:
                    return start + i * PAGE
    raise LookupError('no such page')


def is_zero_frame(frame):
    """Is it the kernel's page of zeros, or a part of a huge one?  To read
    absent memory and see what is mapped there would not tell: there are
    kernels that give it a page of its own, and yet map the one of zeros
    where a huge page is split."""
    with open('/proc/kpageflags', 'rb', buffering=0) as f:
        f.seek(frame * 8)
        return bool(struct.unpack('<Q', f.read(8))[0] >> KPF_ZERO_PAGE & 1)


def poke(pid, address, data):
    """Write into another process's memory."""
    with open('/proc/%d/mem' % pid, 'r+b', buffering=0) as f:
        f.seek(address)
        f.write(data)


def peek(pid, address, size):
    """Read from another process's memory."""
    with open('/proc/%d/mem' % pid, 'rb', buffering=0) as f:
        f.seek(address)
        return f.read(size)


class Ksm:
    """The kernel's KSM.  It is one for the machine: who uses it holds a lock,
    and its knobs are put back when the case has ended."""

    DIR = '/sys/kernel/mm/ksm/'
    QUICK = {'sleep_millisecs': '0', 'pages_to_scan': '20000',
             'smart_scan': '0', 'use_zero_pages': '0'}

    def __init__(self, wait=True):
        """@wait: until nobody else uses it; else skip."""
        if not os.access(self.DIR + 'run', os.W_OK):
            tap.skip('no KSM, or its knobs may not be set')
        # pylint: disable=consider-using-with
        self.lock = open(self.DIR + 'run', 'rb')
        tap.cleanup(self.lock.close)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX |
                        (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            self.lock.close()
            tap.skip('another test uses KSM')
        if self.get('run') != '0':
            self.lock.close()
            tap.skip('KSM is in use on this machine')
        self.saved = {name: self.get(name) for name in self.QUICK
                      if os.path.exists(self.DIR + name)}
        tap.cleanup(self.put_back)
        for name in self.saved:
            self._set(name, self.QUICK[name])

    def get(self, name):
        """A knob or a figure."""
        with open(self.DIR + name, encoding='ascii') as f:
            return f.read().strip()

    def _set(self, name, value):
        with open(self.DIR + name, 'w', encoding='ascii') as f:
            f.write(value)

    def put_back(self):
        """As it was found, once; it is another's then."""
        if self.lock.closed:
            return
        self._set('run', '2')
        for name, value in self.saved.items():
            self._set(name, value)
        self._set('run', '0')
        self.lock.close()

    def run(self, on):
        """Switch ksmd on or off; what is merged stays."""
        self._set('run', '1' if on else '0')

    @staticmethod
    def pages(pid):
        """KSM's pages of a process."""
        with open('/proc/%d/ksm_merging_pages' % pid, encoding='ascii') as f:
            return int(f.read())

    def merge(self, pids):
        """Have it merge what it can of these processes: until two scans in a
        row find nothing more."""
        self.run(True)
        before = -1
        deadline = time.monotonic() + 120
        while sum(map(self.pages, pids)) > before:
            before = sum(map(self.pages, pids))
            target = int(self.get('full_scans')) + 3
            while int(self.get('full_scans')) < target:
                tap.check(time.monotonic() < deadline, 'KSM does not scan')
                time.sleep(0.02)
        self.run(False)


def set_sysctl(path, value):
    """Set a knob of the whole host until the case ends; one test at a time,
    whatever checkout it is of.  Skips where that may not be done."""
    # pylint: disable=consider-using-with
    lock = open(path, encoding='ascii')
    fcntl.flock(lock, fcntl.LOCK_EX)
    old = lock.read()

    def write(text):
        with open(path, 'w', encoding='ascii') as f:
            f.write(text)

    def put_back():
        write(old)
        lock.close()
    try:
        write(value)
    except OSError as e:
        lock.close()
        tap.skip('cannot set %s: %s' % (path, e))
    tap.cleanup(put_back)


class Cgroup:
    """A fresh memory cgroup below this process's own; version 1 or 2."""

    serial = 0

    def __init__(self):
        Cgroup.serial += 1
        name = 'qemu-dedup-test-%d-%d' % (os.getpid(), Cgroup.serial)
        self.v2, parent = self._parent()
        self.path = os.path.join(parent, name)
        try:
            os.mkdir(self.path)
        except OSError as e:
            tap.skip('cannot make a memory cgroup: %s' % e)
        tap.cleanup(self.remove)
        current = 'memory.current' if self.v2 else 'memory.usage_in_bytes'
        if not os.path.exists(os.path.join(self.path, current)):
            tap.skip('the memory controller is not delegated to us')
        self._current = current

    @staticmethod
    def _parent():
        mounts = []
        with open('/proc/self/mountinfo', encoding='ascii') as f:
            for line in f:
                left, right = line.split(' - ')
                kind, _, options = right.split()[:3]
                mounts.append((kind, options.split(','),
                               left.split()[3], left.split()[4]))
        own = {}
        with open('/proc/self/cgroup', encoding='ascii') as f:
            for line in f:
                _, names, path = line.rstrip('\n').split(':', 2)
                for n in names.split(','):
                    own[n] = path
        for kind, options, root, where in mounts:
            if kind == 'cgroup' and 'memory' in options:
                below = os.path.relpath(own['memory'], root)
                for p in (os.path.join(where, below), where):
                    if os.path.isdir(p):
                        return False, p
        for kind, options, root, where in mounts:
            if kind == 'cgroup2':
                below = os.path.relpath(own.get('', '/'), root)
                for p in (os.path.join(where, below), where):
                    control = os.path.join(p, 'cgroup.subtree_control')
                    if os.path.exists(control):
                        with open(control, encoding='ascii') as f:
                            if 'memory' in f.read():
                                return True, p
        tap.skip('no memory cgroup here')
        return None

    def read(self, name):
        """A file of the group's."""
        with open(os.path.join(self.path, name), encoding='ascii') as f:
            return f.read()

    def write(self, name, value):
        """Write one."""
        with open(os.path.join(self.path, name), 'w', encoding='ascii') as f:
            f.write(str(value))

    def enter_command(self):
        """Shell words that put the shell itself into the group."""
        return 'echo $$ > %s/cgroup.procs' % self.path

    def enter(self, pid):
        """Move a process that runs into the group."""
        self.write('cgroup.procs', pid)

    def usage(self):
        """Bytes charged to the group."""
        return int(self.read(self._current))

    def stat(self):
        """memory.stat."""
        return {line.split()[0]: int(line.split()[1])
                for line in self.read('memory.stat').splitlines()}

    def shmem(self):
        """Bytes of shared memory charged, whoever maps it."""
        return self.stat()['shmem']

    def limit(self, value):
        """Set the hard limit in bytes; no swap beyond it."""
        self.write('memory.max' if self.v2 else 'memory.limit_in_bytes',
                   value)

    def kills(self):
        """How many processes the group's limit has killed."""
        name = 'memory.events' if self.v2 else 'memory.oom_control'
        for line in self.read(name).splitlines():
            if line.split()[0] == 'oom_kill':
                return int(line.split()[1])
        return 0

    def remove(self):
        """Remove the group; the last process may be on its way out."""
        deadline = time.monotonic() + 10 * tap.PATIENCE
        while True:
            try:
                os.rmdir(self.path)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
