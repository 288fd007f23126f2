# SPDX-License-Identifier: GPL-2.0-or-later
"""Eight small VMs of one group, of which now one dies, now another.

Each has the bare guest, which checks its pages without end; the QEMU is the
one with crash points (crash-points.c).  What the guests say is read by one
thread, so that none waits for us.
"""

import concurrent.futures
import os
import re
import selectors
import signal
import struct
import subprocess
import threading
import time

import dedup
import host
import tap
import vm as vms
from host import MIB, PAGE
from outside import SEGMENT, Outside
from qmp import ChannelClosed, Timeout

QEMU = os.path.join(host.QEMU_DIR, 'mutants', 'qemu-system-x86_64')
SIZE = 8
RAM = 6                        # MiB
PAGES = (RAM - 2) * MIB // PAGE
ERAS = 128
# Segments that a member has open for itself: a draft, and what the end of a pass
# lets go of.
UNUSED = 2
AT_ONCE = 3                     # die and join
# Member i of the group has these, and so has who comes in its place.
KINDS = [('memfd-shared', 'auto'), ('plain', 'auto'),
         ('file-shared', 'auto'), ('memfd-shared', 'mprotect'),
         ('memfd-private', 'auto'), ('file-private', 'auto'),
         ('ram', 'mprotect'), ('memfd-shared', 'auto')]


def read_points():
    """The crash points' names, each at its number."""
    with open(os.path.join(host.HERE, 'crash-points.c'),
              encoding='utf-8') as f:
        return re.findall(r'^    CRASH_(\w+)', f.read(), re.M)[:-1]


POINTS = read_points()


def comes_to(kind, point):
    """Does a member of this kind ever come to the point?"""
    backing, way = kind
    if point == 'REPLACED':
        # Shared RAM is punched.
        return 'shared' in backing
    if point == 'FLUSHED':
        # A private mapping of a file is not dropped; nor with mprotect(),
        # nor by an older kernel.
        version = tuple(map(int, os.uname().release.split('.')[:2]))
        return ('private' not in backing and way == 'auto' and
                version >= (6, 16))
    return True


def points():
    """Those that some member comes to."""
    return [p for p in POINTS[1:] if any(comes_to(k, p) for k in KINDS)]


class Listener(threading.Thread):
    """Reads what all guests say."""

    def __init__(self):
        super().__init__(daemon=True)
        self.members = selectors.DefaultSelector()
        self.wake, self.woken = os.pipe()
        self.members.register(self.wake, selectors.EVENT_READ)
        self.told = threading.Condition()
        self.wrong = []
        self.words = 0          # that were checked by 'v'
        self.start()

    def add(self, member):
        """From now on."""
        member.serial_port.sock.setblocking(False)
        member.heard = False
        self.members.register(member.serial_port.sock,
                              selectors.EVENT_READ, member)

    def run(self):
        while True:
            for key, _ in self.members.select():
                if key.data is None:
                    return
                self.read(key.fileobj, key.data)

    def read(self, sock, member):
        """Some of what a guest says."""
        try:
            data = sock.recv(65536)
        except OSError:
            data = b''
        if not data:
            self.members.unregister(sock)
            with self.told:
                member.heard = True
                self.told.notify_all()
            return
        *lines, member.rest = (member.rest + data).split(b'\n')
        with self.told:
            for line in lines:
                self.line(member, line.decode(errors='replace'))
            self.told.notify_all()

    def line(self, member, line):
        """One line."""
        if line.startswith('bad'):
            self.wrong.append('%s: %s' % (member.name, line))
        elif line.startswith('ready'):
            member.ready = True
        elif line.startswith('round'):
            member.rounds = int(line.split()[1])
        elif line.startswith('verified'):
            member.verified += 1
            self.words += PAGES * PAGE // 4
            if line != 'verified errors 0':
                self.wrong.append('%s: %s' % (member.name, line))

    def wait(self, members, condition, what, timeout=60):
        """Until the condition is true for each of these."""
        deadline = time.monotonic() + timeout * tap.PATIENCE
        with self.told:
            for member in members:
                while not condition(member):
                    tap.check(member.alive(), member.name + ' is dead')
                    left = deadline - time.monotonic()
                    if left <= 0 or not self.told.wait(min(left, 1)):
                        tap.check(left > 0, '%s: no %s' % (member.name, what))

    def wait_end(self, member):
        """It has died: read what it still said."""
        with self.told:
            tap.check(self.told.wait_for(lambda: member.heard,
                                         60 * tap.PATIENCE), 'no end')

    def end(self):
        """Join the thread."""
        os.close(self.woken)
        self.join()
        self.members.close()
        os.close(self.wake)


class Member(vms.VM):
    """A VM with the bare guest and crash points."""

    def __init__(self, herd, place):
        self.place = place
        self.rest, self.rounds, self.verified = b'', 0, 0
        self.ready = self.gone = False
        self.heard = True       # all that it said
        backing, way = KINDS[place]
        Member.count = getattr(Member, 'count', 0) + 1
        super().__init__(
            'm%d' % Member.count, ram=RAM, backing=backing, qemu=QEMU,
            bios=host.image('bare.rom'), group=herd.group,
            cgroup=herd.cgroup,
            dedup={'sleep-millisecs': 20, 'pages-to-scan': 1 << 20,
                   'write-protect': way},
            # A guest that leaves the processor to others now and then
            extra=('-icount', 'shift=7,align=on'),
            # 0: none; but what was written is merged again at once.
            env={'DEDUP_MUTANT': os.environ.get('DEDUP_MUTANT', '0')})
        self.env['DEDUP_CRASH'] = self.path('crash')
        with open(self.path('crash'), 'wb') as f:
            f.truncate(PAGE)

    def arm(self, point, skip):
        """Die at this point, after so many times there."""
        with open(self.path('crash'), 'r+b') as f:
            f.seek(4)
            f.write(struct.pack('<I', skip))
            f.flush()
            f.seek(0)
            f.write(struct.pack('<I', POINTS.index(point)))

    def reached(self):
        """How often it came to each point."""
        with open(self.path('crash'), 'rb') as f:
            data = f.read(8 + 4 * len(POINTS))
        return struct.unpack('<%dI' % len(POINTS), data[8:])

    def command(self, byte):
        """A command for the guest."""
        try:
            self.serial_port.sock.send(bytes([byte]))
        except OSError:
            pass                # it is dying

    def describe(self):
        return [] if self.gone else super().describe()

    def bury(self):
        """Nothing of it is left but its dead body: take that away."""
        tap.check(self.process.wait(60 * tap.PATIENCE) == -signal.SIGKILL,
                  '%s ended with status %s' % (self.name,
                                               self.process.returncode))
        self.kill()
        self._clean()
        self.gone = True


class Herd:
    """The group."""

    def __init__(self, random):
        self.random = random
        self.group = vms.group_dir()
        self.cgroup = host.Cgroup()
        self.listener = Listener()
        self.lock = threading.Lock()
        self.pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
        self.era = 0
        self.deaths = dict.fromkeys(POINTS, 0)
        self.reached = [0] * len(POINTS)
        self.members = []
        for place in range(SIZE):
            self.members.append(Member(self, place))
            self.members[-1].start()
        for member in self.members:
            self.listener.add(member)
        self.listener.wait(self.members, lambda m: m.ready, 'start')

    def join(self, place, point=None):
        """A new member, which may die of it: None then."""
        member = Member(self, place)
        if point:
            member.arm(point, 0)
        try:
            member.start()
            self.listener.add(member)
        except (ChannelClosed, Timeout):
            if not point:
                raise
        if point:
            self.died(member, point)
            return
        member.command(128 + self.era)
        self.members.append(member)

    def died(self, member, how):
        """It has died, or is dying."""
        reached = member.reached()
        self.listener.wait_end(member)
        member.bury()
        with self.lock:
            self.deaths[how] += 1
            self.reached = list(map(sum, zip(self.reached, reached)))

    def tell(self, byte):
        """A command for all guests."""
        for member in list(self.members):
            member.command(byte)

    def new_era(self):
        """All guests write what nobody has had before."""
        self.era = (self.era + 1) % ERAS
        self.tell(128 + self.era)

    def kill(self, ways):
        """So many members die at about the same time, each in its way: by a
        signal from outside (NONE) or at a point; others take their places."""
        victims = []
        for how in ways:
            some = [m for m in self.members if m not in victims and
                    comes_to(KINDS[m.place], how)]
            some.sort(key=lambda m: m.place)
            victims.append(self.random.choice(some))
        chances = [(self.random.random() * 0.2, self.random.randrange(3))
                   for _ in ways]
        if self.random.random() < 0.5:
            self.new_era()
        done = [self.pool.submit(self.exchange, *what)
                for what in zip(victims, ways, chances)]
        for future in done:
            future.result()

    def exchange(self, victim, how, chances):
        """One dies, one joins."""
        if how in ('NONE', 'JOINING'):
            # The moment is what is random.
            time.sleep(chances[0])
            victim.process.kill()
        else:
            victim.arm(how, chances[1])
            self.drive(victim, how)
        self.members.remove(victim)
        if how == 'JOINING':
            self.died(victim, 'NONE')
            self.join(victim.place, how)
        else:
            self.died(victim, how)
        self.join(victim.place)

    def drive(self, victim, how):
        """Have it come to the point: something is new for all until then."""
        deadline = time.monotonic() + 60 * tap.PATIENCE
        while victim.alive():
            tap.check(time.monotonic() < deadline,
                      '%s does not come to %s' % (victim.name, how))
            self.new_era()
            try:
                if how == 'RESTORING':
                    victim.qmp.command('dedup-unmerge', {'id': 'ds0'})
                    victim.process.wait(2)
                    dedup.run(victim, True)
                else:
                    victim.process.wait(1)
            except (ChannelClosed, subprocess.TimeoutExpired):
                pass

    def check(self):
        """All live, all go on, nothing was wrong."""
        before = {m: m.rounds for m in self.members}
        self.listener.wait(self.members, lambda m: m.rounds > before[m] + 1,
                           'progress')
        tap.check(not self.listener.wrong, '\n'.join(self.listener.wrong))

    def verify(self):
        """Every word of every guest is compared."""
        target = {m: m.verified + 1 for m in self.members}
        self.tell(ord('v'))
        self.listener.wait(self.members, lambda m: m.verified >= target[m],
                           'end of the comparison', 120)
        tap.check(not self.listener.wrong, '\n'.join(self.listener.wrong))

    def segments(self, member):
        """Inodes of the segments' descriptors that it has open."""
        found = set()
        base = '/proc/%d/fd' % member.pid
        for fd in os.listdir(base):
            if SEGMENT in os.readlink('%s/%s' % (base, fd)):
                found.add(os.stat('%s/%s' % (base, fd)).st_ino)
        return found

    def groups(self):
        """What each member says of the group, and of its own pages."""
        said = [dedup.stats(m) for m in self.members]
        return ([(g['members'], g['pages-shared'], g['pages-sharing'])
                 for g in (s['group'] for s in said)],
                sum(s['pages-merged'] for s in said))

    def agree(self):
        """Do all say the same, and what their own figures add up to?"""
        groups, merged = self.groups()
        return (len(set(groups)) == 1 and groups[0][0] == SIZE and
                groups[0][1] + groups[0][2] == merged)

    def unused(self, used):
        """(Member, how many segments it has open that nobody uses.)"""
        return [(m, len(self.segments(m) - used)) for m in self.members]

    def rest(self):
        """Stop all scanners.  Each figure is then that of the moment when it
        was stopped; lean segments may still be left until then, and segments
        open that the next passes let go of."""
        for member in self.members:
            dedup.run(member, False)
        for member in self.members:
            dedup.wait_state(member, ['stopped'])
        used = {inode for m in self.members
                for inode, _ in Outside(m).merged}
        if self.agree() and all(n <= UNUSED for _, n in self.unused(used)):
            return True
        for member in self.members:
            dedup.run(member, True)
        dedup.wait_scans(self.members, 2)
        return False

    def settle(self):
        """The guests are paused: now all members say the same, and so does
        who counts from outside."""
        for member in self.members:
            member.stop()
        try:
            dedup.wait_until(lambda: self.agree() and self.rest(),
                             'agreement', 180, 0.3)
        except Timeout:
            for member, held in self.unused(set()):
                tap.note(dedup.summary(member))
                tap.note('%s, %d segments open' % (
                    dedup.group_summary(member), held))
            raise
        self.count()
        for member in self.members:
            dedup.run(member, True)
            member.cont()

    def count(self):
        """Compare with what the host shows."""
        said = [dedup.stats(m) for m in self.members]
        seen = [Outside(m) for m in self.members]
        group = said[0]['group']
        used = {where for o in seen for where in o.merged}
        merged = sum(len(o.merged) for o in seen)
        saved = sum(s['bytes-saved'] for s in said)
        zeros = sum(s['zero-pages'] for s in said)
        meta = sum(s['metadata-bytes'] for s in said)
        tap.note('%s; %d segments, %d merged, %d zero pages, metadata %d KiB'
                 % (dedup.group_summary(self.members[0]),
                    len({inode for inode, _ in used}), merged, zeros,
                    meta >> 10))
        tap.check(group['pages-shared'] == len(used) and
                  group['pages-sharing'] == merged - len(used),
                  'seen from outside: %d shared, %d sharing' %
                  (len(used), merged - len(used)))
        for s, o in zip(said, seen):
            tap.check(s['pages-merged'] == len(o.merged),
                      '%d merged, seen %d' % (s['pages-merged'],
                                              len(o.merged)))
            tap.check(abs(s['group']['bytes-saved'] - saved) <= 64 << 10,
                      'the sum of bytes-saved is %d, a member says %d' %
                      (saved, s['group']['bytes-saved']))
        gross = (merged - len(used) + zeros) * PAGE
        tap.check(gross - 2 * meta - 4 * MIB <= saved <= gross,
                  'saved %d of %d, metadata %d' % (saved, gross, meta))
        self.check_left({inode for inode, _ in used}, len(used))

    def check_left(self, used, pages):
        """Nothing is left of who has died: descriptors, memory."""
        for member, held in self.unused(used):
            tap.check(held <= UNUSED, '%s has %d segments open that nobody '
                      'uses' % (member.name, held))
            base = '/proc/%d/fd' % member.pid
            socks = [fd for fd in os.listdir(base) if os.readlink(
                '%s/%s' % (base, fd)).startswith('socket:')]
            # One to each and one from each; its own, QMP's, the guest's
            tap.check(len(socks) <= 2 * (SIZE - 1) + 6,
                      '%s has %d sockets' % (member.name, len(socks)))
        shmem = self.cgroup.shmem()
        bound = pages * PAGE + SIZE * RAM * MIB + 8 * MIB
        tap.check(shmem < bound, 'shared memory of %d, at most %d is in use'
                  % (shmem, bound))

    def end(self):
        """All die; who joins and leaves then takes their names away, and
        nothing is there any more."""
        while self.members:
            victim = self.members.pop()
            victim.process.kill()
            self.died(victim, 'NONE')
        self.join(0)
        last = self.members.pop()
        # It may not have joined yet.
        dedup.wait_until(
            lambda: dedup.stats(last).get('group', {}).get('members') == 1,
            'a group of one')
        last.quit()
        self.listener.end()
        self.pool.shutdown()
        dedup.wait_until(lambda: self.cgroup.shmem() < MIB / 2,
                         'end of shared memory', 20)
        left = [os.path.join(where, f)
                for where, _, files in os.walk(self.group) for f in files]
        tap.check({os.path.basename(f) for f in left} <= {'lock', 'slots'} and
                  sum(os.lstat(f).st_blocks * 512 for f in left) <= 64 << 10,
                  'left: %s' % left)
        with open('/proc/net/unix', encoding='utf-8') as f:
            tap.check(self.group not in f.read(), 'a socket is left')

