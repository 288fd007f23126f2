#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A private host for libvirt: virtlogd and libvirtd in namespaces.

libvirtd has its directories compiled in.  So each Host is a set of namespaces
(mounts, processes, network, host name) with an /etc/libvirt, /var/lib/libvirt,
/run and /dev of its own: a libvirtd that runs on this machine is not met, two
can migrate to each other, no node of the real /dev is touched, and when the
first process of the namespaces ends everything in them does.

Run as a program it is that first process.
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time

import host
import tap
import vm as vms

# What Debian's package libvirt-daemon-system makes; it need not be installed.
USER, UID = 'libvirt-qemu', 64055
GROUPS = {'libvirt-qemu': 64055, 'kvm': 64056}
PRIVATE = {'etc': '/etc/libvirt', 'lib': '/var/lib/libvirt',
           'log': '/var/log/libvirt', 'cache': '/var/cache/libvirt'}
# Where "make install" puts QEMU
BIN = '/usr/local/bin'
IMAGES = '/var/lib/libvirt/images'
NODES = ('null', 'zero', 'full', 'random', 'urandom', 'tty', 'kvm',
         'userfaultfd', 'net/tun')
NAMESPACES = ('--mount', '--pid', '--uts', '--ipc', '--net')
LIBVIRTD_CONF = '''\
auth_unix_rw = "none"
auth_unix_ro = "none"
host_uuid = "%s"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
'''
QEMU_CONF = 'security_driver = "none"\n'


# The first process of a host

def run(*command):
    """It must succeed."""
    subprocess.run(command, check=True)


def private_dev(state):
    """A /dev with what a host without guests has; made here, so that nobody
    changes the real one."""
    new = os.path.join(state, 'dev')
    os.mkdir(new)
    run('mount', '-t', 'tmpfs', '-o', 'mode=755,nosuid', 'dev', new)
    for name in NODES:
        try:
            real = os.stat('/dev/' + name)
        except OSError:
            continue
        path = os.path.join(new, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mknod(path, real.st_mode, real.st_rdev)
        os.chmod(path, stat.S_IMODE(real.st_mode))
    for name in ('pts', 'shm'):
        os.mkdir(os.path.join(new, name))
    run('mount', '-t', 'devpts', '-o', 'newinstance,ptmxmode=666,mode=620',
        'devpts', os.path.join(new, 'pts'))
    os.symlink('pts/ptmx', os.path.join(new, 'ptmx'))
    run('mount', '-t', 'tmpfs', '-o', 'mode=1777', 'shm',
        os.path.join(new, 'shm'))
    os.symlink('/proc/self/fd', os.path.join(new, 'fd'))
    kvm = os.path.join(new, 'kvm')
    if os.path.exists(kvm):
        # As Debian's udev has it
        shutil.chown(kvm, 'root', 'kvm')
        os.chmod(kvm, 0o660)
    if os.path.ismount('/dev'):
        # Not only covered: libvirt moves what the list of mounts has there.
        run('umount', '--lazy', '/dev')
    run('mount', '--move', new, '/dev')


def private_users(state):
    """Debian's user for QEMU, if nobody has made it."""
    for name, lines in (
            ('passwd', ['%s:x:%d:%d::/var/lib/libvirt:/bin/false'
                        % (USER, UID, GROUPS['kvm'])]),
            ('group', ['%s:x:%d:%s' % (g, n, USER)
                       for g, n in GROUPS.items()])):
        with open('/etc/' + name, encoding='utf-8') as f:
            text = f.read()
        there = {line.split(':')[0] for line in text.splitlines()}
        text += ''.join(line + '\n' for line in lines
                        if line.split(':')[0] not in there)
        path = os.path.join(state, name)
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)
        run('mount', '--bind', path, '/etc/' + name)


def loopback():
    """Bring up the one network device that there is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        # struct ifreq, SIOCSIFFLAGS, IFF_UP
        fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 1))


def first_process(state, name):
    """Make the host, say so, stay until standard input ends."""
    socket.sethostname(name)
    for short, path in PRIVATE.items():
        os.makedirs(path, exist_ok=True)
        run('mount', '--bind', os.path.join(state, short), path)
    private_users(state)
    private_dev(state)
    run('mount', '-t', 'tmpfs', '-o', 'mode=755', 'run', '/run')
    run('mount', '--bind', os.path.dirname(host.QEMU), BIN)
    loopback()
    # QEMU's processes are left to us: gone when they end, as libvirtd wants.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print('ready', flush=True)
    sys.stdin.read()


# The host as a test sees it

def need():
    """Skip unless there is libvirt, and namespaces can be made."""
    missing = [p for p in ('libvirtd', 'virtlogd', 'virsh', 'unshare',
                           'nsenter') if not shutil.which(p)]
    if missing:
        tap.skip('not installed: ' + ' '.join(missing))
    if os.geteuid() != 0:
        tap.skip('a libvirtd of the system wants root')
    probe = subprocess.run(
        ['unshare', *NAMESPACES, '--fork', '--mount-proc', 'mount', '-t',
         'tmpfs', 'none', '/run'], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False)
    if probe.returncode:
        tap.skip('no private namespaces: ' + probe.stdout.strip())


def read(path):
    """A small file's text, without blanks around it."""
    with open(path, encoding='utf-8', errors='replace') as f:
        return f.read().strip()


def popen_virsh(*words, prefix=()):
    """Start virsh."""
    return subprocess.Popen(
        [*prefix, 'virsh', '-q', *words], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Failed(Exception):
    """A virsh command failed; the text is what it said."""


class Host:
    """A host with a libvirtd, until the case ends."""

    serial = 0
    running = 0
    cgroups = ()                # where the first of them has libvirt put VMs

    def __init__(self, user=None, conf='', network=None):
        """@user: who runs QEMU, libvirt's default if None.  @conf: more
        lines for qemu.conf.  @network: another Host with the same network."""
        need()
        Host.serial += 1
        self.name = 'dedup-host-%d' % Host.serial
        self.state = vms.scratch()
        for name in PRIVATE:
            os.mkdir(os.path.join(self.state, name))
        if not Host.running:
            Host.cgroups = self._machine_cgroups()
        Host.running += 1
        self.unshare = self.virtlogd = self.libvirtd = None
        tap.cleanup(self.close)
        tap.detail(self.describe)
        command = ['unshare', *NAMESPACES, '--fork', '--kill-child',
                   '--mount-proc', sys.executable, os.path.abspath(__file__),
                   self.state, self.name]
        if network:
            command.remove('--net')
            command[:0] = ['nsenter', '--net=/proc/%d/ns/net' % network.pid]
        # pylint: disable=consider-using-with
        self.unshare = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        tap.check(self.unshare.stdout.readline() == 'ready\n',
                  'no private host')
        self.pid = int(read('/proc/%d/task/%d/children' % (
            (self.unshare.pid,) * 2)))
        self._write('/etc/libvirt/libvirtd.conf', LIBVIRTD_CONF
                    % ('%08x-0000-4000-8000-000000000000' % Host.serial))
        self._write('/etc/libvirt/virtlogd.conf', '')
        self.configure((user and 'user = "%s"\ngroup = "%s"\n' % (user, user)
                        or '') + conf)
        self.virtlogd = self._daemon('virtlogd', '/run/libvirt/virtlogd-sock')
        self.start()

    @staticmethod
    def _machine_cgroups():
        """Where libvirt puts VMs; what is there already is somebody's."""
        base = '/sys/fs/cgroup'
        places = [base] + [os.path.join(base, d) for d in os.listdir(base)]
        return [p for p in (os.path.join(d, 'machine') for d in places
                            if os.path.isdir(d)) if not os.path.exists(p)]

    def path(self, inside):
        """A path of this host as others name it."""
        return '/proc/%d/root%s' % (self.pid, inside)

    def number(self, file, name):
        """The number of a user ("passwd") or a group ("group")."""
        for line in read(self.path('/etc/' + file)).splitlines():
            words = line.split(':')
            if words[0] == name:
                return int(words[2])
        raise LookupError(name)

    def _write(self, inside, text):
        with open(self.path(inside), 'w', encoding='utf-8') as f:
            f.write(text)

    def configure(self, conf):
        """Write qemu.conf, for the next start."""
        self._write('/etc/libvirt/qemu.conf', QEMU_CONF + conf)

    def mount(self, *words):
        """Mount something in this host."""
        run('nsenter', '-t', str(self.pid), '-m', '--', 'mount', *words)

    def umount(self, path):
        """Undo that."""
        run('nsenter', '-t', str(self.pid), '-m', '--', 'umount', path)

    def inside(self, *command):
        """The words that run a command in this host."""
        return ['nsenter', '-t', str(self.pid), '-m', '-p', '-u', '-n', '-i',
                '--', *command]

    def _daemon(self, name, path):
        """Start a daemon in the foreground and wait for its socket."""
        # Not in the profile that the system's libvirtd may have: paths differ.
        command = self.inside(
            'sh', '-c', '{ echo exec unconfined > /proc/self/attr/exec; } '
            '2> /dev/null; exec "$0"', name)
        with open(os.path.join(self.state, name + '.err'), 'ab') as err:
            # pylint: disable=consider-using-with
            process = subprocess.Popen(command, stdout=err, stderr=err,
                                       stdin=subprocess.DEVNULL)
        vms.Lines(self.path(path), lambda: process.poll() is None).close()
        return process

    def start(self):
        """Start libvirtd."""
        self.libvirtd = self._daemon('libvirtd', '/run/libvirt/libvirt-sock')

    def stop(self):
        """Have libvirtd end; its VMs stay."""
        os.kill(self.outer(int(read(self.path('/run/libvirtd.pid')))),
                signal.SIGTERM)
        tap.check(self.libvirtd.wait(30 * tap.PATIENCE) == 0,
                  'libvirtd ended badly')
        self.libvirtd = None

    def outer(self, inner):
        """Our number of a process that has the number @inner in there."""
        space = os.readlink('/proc/%d/ns/pid' % self.pid)
        for name in os.listdir('/proc'):
            try:
                if (name.isdigit() and
                        os.readlink('/proc/%s/ns/pid' % name) == space and
                        'NSpid:\t%s\t%d\n' % (name, inner) in
                        open('/proc/%s/status' % name).read()):
                    return int(name)
            except OSError:
                pass
        raise LookupError('no process %d in %s' % (inner, self.name))

    def popen(self, *words):
        """Start a virsh command: our own child, which a kill reaches."""
        return popen_virsh('-c', 'qemu:///system', *words, prefix=(
            'nsenter', '-t', str(self.pid), '-m', '--'))

    def virsh(self, *words, timeout=60):
        """Run a virsh command; return what it prints, raise Failed."""
        with self.popen(*words) as process:
            try:
                out, err = process.communicate(timeout=timeout * tap.PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        if process.returncode:
            raise Failed('virsh %s: %s' % (' '.join(words), err.strip()))
        return out.strip()

    def version(self):
        """libvirt's version, numbers."""
        m = re.search(r'Using library: libvirt (\d+)\.(\d+)',
                      self.virsh('version'))
        return int(m.group(1)), int(m.group(2))

    def describe(self):
        """Lines for a failed case."""
        lines = ['--- ' + self.name]
        noise = re.compile('ethtool|is tainted|getaddrinfo')
        for base, _, names in os.walk(os.path.join(self.state, 'log')):
            for name in names:
                text = read(os.path.join(base, name))
                lines += ['%s: %s' % (name, line)
                          for line in text.splitlines()[-12:]
                          if not noise.search(line)]
        return lines

    def close(self):
        """End all that runs in there, and take its traces away."""
        if self.unshare:
            self.unshare.stdin.close()
            self.unshare.wait(30 * tap.PATIENCE)
        for process in (self.libvirtd, self.virtlogd):
            if process:
                process.wait(30 * tap.PATIENCE)
        Host.running -= 1
        if not Host.running:
            for top in Host.cgroups:
                self._remove_cgroups(top)

    @staticmethod
    def _remove_cgroups(top):
        """Remove them; the last process may be on its way out."""
        deadline = time.monotonic() + 10 * tap.PATIENCE
        while os.path.isdir(top):
            try:
                for base, names, _ in os.walk(top, topdown=False):
                    for name in names:
                        os.rmdir(os.path.join(base, name))
                os.rmdir(top)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


if __name__ == '__main__':
    first_process(*sys.argv[1:])
