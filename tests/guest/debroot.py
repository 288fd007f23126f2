#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A fresh Debian of some release, to install packages in, with a libvirtd.

    root = debroot.Root('trixie')
    root.apt('install', '-y', 'libvirt-daemon-system')
    root.start_libvirt()
    virsh.Domain(root, 'a').start()

debootstrap makes the release once, in build/guest/roots; each Root lies over it
as an overlay, in namespaces of its own, and is gone with its first process.
Run as a program it is that first process.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import host as machine
import tap
import virthost
import vm as vms
from virthost import run

ROOTS = os.path.join(machine.IMAGES, 'roots')
# The network is the host's: packages are fetched.
NAMESPACES = ('--mount', '--pid', '--uts', '--ipc')
TIMEOUT = 1500


def first_process(base, state, name, *shared):
    """Make the root this mount namespace's own, say so, stay until standard
    input ends.  @shared: paths here and there, by turns."""
    socket.sethostname(name)
    virthost.private_users(state)
    virthost.private_dev(state)
    root = os.path.join(state, 'root')
    for sub in ('root', 'upper', 'work'):
        os.mkdir(os.path.join(state, sub))
    run('mount', '-t', 'overlay', '-o', 'lowerdir=%s,upperdir=%s/upper,'
        'workdir=%s/work' % (base, state, state), 'overlay', root)
    run('mount', '--rbind', '/dev', root + '/dev')
    run('mount', '-t', 'proc', 'proc', root + '/proc')
    run('mount', '-t', 'sysfs', '-o', 'ro', 'sys', root + '/sys')
    run('mount', '-t', 'tmpfs', '-o', 'mode=755', 'run', root + '/run')
    os.makedirs(root + '/cache/archives')
    run('mount', '--bind', cache(os.path.basename(base)),
        root + '/cache/archives')
    for here, there in zip(shared[::2], shared[1::2]):
        os.makedirs(root + there, exist_ok=True)
        run('mount', '--bind', here, root + there)
    # Not chroot: virtiofsd wants to do this, too, and nsenter finds it.
    os.chdir(root)
    run('pivot_root', '.', 'mnt')
    os.chdir('/')
    run('umount', '--lazy', '/mnt')
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print('ready', flush=True)
    sys.stdin.read()


def cache(suite):
    """Where a release's packages are kept from one Root to the next."""
    path = os.path.join(ROOTS, 'archives', suite)
    os.makedirs(os.path.join(path, 'partial'), exist_ok=True)
    return path


def bootstrap(suite):
    """The release as debootstrap makes it; its archive is the host's."""
    if os.geteuid() != 0:
        tap.skip('only root can make a root')
    base = os.path.join(ROOTS, suite)
    if os.path.isdir(base):
        return base
    if not shutil.which('debootstrap'):
        tap.skip('not installed: debootstrap')
    apt = os.path.join(machine.TOP, 'scripts', 'private-apt')
    out = subprocess.run([apt, suite, 'deb', 'indextargets'],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True, check=False)
    if out.returncode:
        tap.skip(out.stdout.strip())
    with open(os.path.join(machine.BUILD, 'apt', suite + '-deb', 'parts',
                           'private.sources'), encoding='ascii') as f:
        uri, = [line.split()[1] for line in f if line.startswith('URIs:')]
    os.makedirs(ROOTS, exist_ok=True)
    new = tempfile.mkdtemp(prefix=suite + '.', dir=ROOTS)
    os.chmod(new, 0o755)
    tap.note('debootstrap %s' % suite)
    out = subprocess.run(['debootstrap', '--variant=minbase', suite, new, uri],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True, timeout=TIMEOUT, check=False)
    if out.returncode:
        shutil.rmtree(new)
        tap.skip('no %s: %s' % (suite, out.stdout.strip().splitlines()[-1]))
    os.rename(new, base)
    return base


class Root(virthost.Host):
    """A fresh Debian, until the case ends.  A Host, too: libvirt's domains
    live in it."""

    # pylint: disable=super-init-not-called
    def __init__(self, suite, shared=()):
        """@shared: directories of this machine's that it has, too, as pairs of
        a path here and one there."""
        base = bootstrap(suite)
        virthost.Host.serial += 1
        self.name = 'dedup-%s-%d' % (suite, virthost.Host.serial)
        self.state = vms.scratch()
        if not virthost.Host.running:
            virthost.Host.cgroups = self._machine_cgroups()
        virthost.Host.running += 1
        self.unshare = self.virtlogd = self.libvirtd = None
        tap.cleanup(self.close)
        # pylint: disable=consider-using-with
        self.unshare = subprocess.Popen(
            ['unshare', *NAMESPACES, '--fork', '--kill-child', '--mount-proc',
             sys.executable, os.path.abspath(__file__), base, self.state,
             self.name, *(path for pair in shared for path in pair)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        tap.check(self.unshare.stdout.readline() == 'ready\n', 'no root')
        self.pid = int(virthost.read('/proc/%d/task/%d/children' % (
            (self.unshare.pid,) * 2)))
        shutil.copyfile('/etc/resolv.conf', self.path('/etc/resolv.conf'))
        # Proxies and the like
        self._write('/etc/apt/apt.conf.d/99host', subprocess.run(
            ['apt-config', 'dump', 'Acquire'], stdout=subprocess.PIPE,
            text=True, check=True).stdout +
            'Dir::Cache::archives "/cache/archives";\n'
            'APT::Keep-Downloaded-Packages "true";\n')
        # It is thrown away: nothing is waited for until it is on the disk.
        self._write('/etc/dpkg/dpkg.cfg.d/fast', 'force-unsafe-io\n')
        # No service is started: there is no init.
        self._write('/usr/sbin/policy-rc.d', '#!/bin/sh\nexit 101\n')
        os.chmod(self.path('/usr/sbin/policy-rc.d'), 0o755)

    def run(self, *command, status=0):
        """What a command prints in there; it must succeed."""
        out = subprocess.run(
            self.command(*command), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors='replace', timeout=TIMEOUT * tap.PATIENCE, check=False)
        tap.check(status is None or out.returncode == status, '%s: %s' % (
            ' '.join(command), out.stdout[-3000:]))
        return out.stdout

    def command(self, *command):
        """The words that run a command as its administrator does."""
        return self.inside('env', 'PATH=/usr/sbin:/usr/bin:/sbin:/bin',
                           'DEBIAN_FRONTEND=noninteractive', 'LC_ALL=C',
                           *command)

    def apt(self, *words):
        """apt-get, without questions."""
        return self.run('apt-get', '-q', '-y', *words)

    def inside(self, *command):
        """The words that run a command in this root."""
        return ['nsenter', '-t', str(self.pid), '-m', '-p', '-u', '-i', '--',
                *command]

    def start_libvirt(self, conf=''):
        """virtlogd and libvirtd, as Debian's packages have them."""
        tap.detail(self.describe)
        # The group is there now.
        kvm = self.path('/dev/kvm')
        if os.path.exists(kvm):
            os.chown(kvm, 0, self.number('group', 'kvm'))
        self._write('/etc/libvirt/libvirtd.conf', virthost.LIBVIRTD_CONF
                    % ('%08x-0000-4000-8000-000000000000' %
                       virthost.Host.serial))
        self._write('/etc/libvirt/virtlogd.conf', '')
        self.configure(conf)
        self.virtlogd = self._daemon('virtlogd', '/run/libvirt/virtlogd-sock')
        self.start()

    def describe(self):
        """Lines for a failed case."""
        lines = []
        for base, _, names in os.walk(self.path('/var/log/libvirt')):
            for name in names:
                text = virthost.read(os.path.join(base, name))
                lines += ['%s: %s' % (name, line)
                          for line in text.splitlines()[-12:]]
        return lines


if __name__ == '__main__':
    first_process(*sys.argv[1:])
