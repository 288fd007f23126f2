# SPDX-License-Identifier: GPL-2.0-or-later
"""The vhost-user back ends of the guest tests, and QEMU's options for them.

    disk = backends.Storage(size=64)
    vm = VM('a', backing='plain', extra=disk.options('d0', relay='on'))

Each is a program of its own: QEMU's storage daemon is ours, the others are
the distribution's (build-backends).  A case that wants one which cannot be had
is skipped with the reason.  Each ends when the case ends.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

import host
import tap
import vm as vms
from host import MIB
from qmp import Timeout

DIRECTORY = os.path.join(host.IMAGES, 'backends')
HZ = os.sysconf('SC_CLK_TCK')
TAG = 'share'

# What the guest sees of its network, and of the host's loopback in it.
NETWORK = {'guest': '10.77.0.2', 'host': '10.77.0.1', 'prefix': '24'}


def prepare(*names):
    """Fetch what is missing, or only these; a moment if it is there."""
    subprocess.run([os.path.join(host.HERE, 'build-backends'), DIRECTORY,
                    *names], check=True, stdout=subprocess.DEVNULL,
                   timeout=1000)


def foreign(name, suite, program):
    """The words that run a program of another release with its libraries."""
    missing = os.path.join(DIRECTORY, name + '.missing')
    if not os.path.exists(os.path.join(DIRECTORY, name + '.done')):
        reason = 'build-backends has not run'
        if os.path.exists(missing):
            with open(missing, encoding='utf-8') as f:
                reason = f.read().strip()
        tap.skip('no %s: %s' % (name, reason))
    root = os.path.join(DIRECTORY, suite)
    libraries = [os.path.join(root, d, 'x86_64-linux-gnu')
                 for d in ('lib', 'usr/lib')]
    loader = [p for p in (os.path.join(d, 'ld-linux-x86-64.so.2')
                          for d in libraries) if os.path.exists(p)]
    return [loader[0], '--library-path', ':'.join(libraries),
            os.path.join(root, program)]


def listens(path):
    """Does a socket with this name take connections?  To connect and see
    would be the one connection that some back ends take."""
    with open('/proc/net/unix', encoding='utf-8') as f:
        return any(line.split()[3] == '00010000' and
                   line.rstrip('\n').endswith(' ' + path) for line in f)


class Backend:
    """A back end's process."""

    device = None               # QEMU's device for it
    can_reconnect = False       # does that device outlive it?
    properties = {}             # of the device

    def __init__(self):
        # Socket names are short.
        self.dir = tempfile.mkdtemp(prefix='qemu-dedup-be-')
        tap.cleanup(self._clean)
        tap.detail(self._describe)
        self.path = os.path.join(self.dir, 'socket')
        self.process = None

    def command(self):
        """The words that start it."""
        raise NotImplementedError

    def start(self):
        """Start it, and wait until QEMU can connect."""
        for path in os.listdir(self.dir):
            if path.startswith('socket'):
                os.unlink(os.path.join(self.dir, path))
        with open(os.path.join(self.dir, 'log'), 'ab') as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True)
        deadline = time.monotonic() + 20 * tap.PATIENCE
        while not listens(self.path):
            tap.check(self.alive(), '%s ended with status %s' % (
                type(self).__name__, self.process.poll()))
            if time.monotonic() > deadline:
                raise Timeout('no socket of ' + type(self).__name__)
            # Nothing announces that a socket listens.
            time.sleep(0.01)
        return self

    def alive(self):
        """Is the process there?"""
        return self.process is not None and self.process.poll() is None

    def kill(self):
        """End it as a crash would."""
        if self.alive():
            self.process.send_signal(signal.SIGKILL)
        if self.process:
            self.process.wait(30 * tap.PATIENCE)

    def restart(self):
        """A crash, and a new one in its place."""
        self.kill()
        self.start()

    def cpu(self):
        """Seconds of CPU time that it has used."""
        return cpu_time(self.process.pid)

    def wait_end(self, timeout=20):
        """It must end by itself, as one that serves one connection does."""
        self.process.wait(timeout * tap.PATIENCE)

    def chardev(self, name, reconnect=False):
        """QEMU's option for the connection to it."""
        return ['-chardev', 'socket,id=c-%s,path=%s%s' % (
            name, self.path, ',reconnect-ms=100' if reconnect else '')]

    def describe_device(self, name, relay=None, iothread=None, **more):
        """Arguments of device_add."""
        result = {'driver': self.device, 'id': name, 'chardev': 'c-' + name}
        result.update(self.properties)
        if relay is not None:
            result['relay'] = relay
        if iothread is not None:
            result['iothread'] = iothread
        result.update(more)
        return result

    def options(self, name, relay=None, iothread=None, reconnect=False,
                **more):
        """QEMU's options for a device with this back end."""
        return self.chardev(name, reconnect) + [
            '-device', json.dumps(self.describe_device(name, relay, iothread,
                                                       **more))]

    def plug(self, vm, name, relay=None, iothread=None, **more):
        """Plug the device into a VM that runs."""
        vm.qmp.command('chardev-add', {'id': 'c-' + name, 'backend': {
            'type': 'socket', 'data': {'server': False, 'addr': {
                'type': 'unix', 'data': {'path': self.path}}}}})
        vm.qmp.command('device_add',
                       self.describe_device(name, relay, iothread, **more))

    @staticmethod
    def unplug(vm, name):
        """Unplug it: the guest's kernel has to agree."""
        vm.qmp.command('device_del', {'id': name})
        vm.qmp.wait_event('DEVICE_DELETED', 60,
                          lambda data: data.get('device') == name)
        vm.qmp.command('chardev-remove', {'id': 'c-' + name})

    def _describe(self):
        try:
            with open(os.path.join(self.dir, 'log'), errors='replace',
                      encoding='utf-8') as f:
                return ['--- %s: %s' % (type(self).__name__, self.process and
                                        self.process.poll())] + [
                    'log: ' + line.rstrip() for line in f.readlines()[-12:]]
        except OSError:
            return []

    def _clean(self):
        self.kill()
        shutil.rmtree(self.dir, ignore_errors=True)


def cpu_time(pid):
    """Seconds of CPU time that a process has used; "PID/task/TID": a
    thread."""
    with open('/proc/%s/stat' % pid, encoding='utf-8') as f:
        words = f.read().rpartition(')')[2].split()
    return (int(words[11]) + int(words[12])) / HZ


class Storage(Backend):
    """vhost-user-blk by QEMU's storage daemon."""

    device = 'vhost-user-blk-pci'
    can_reconnect = True

    def __init__(self, size=32, image=None, direct=True, queues=1):
        """@size in MiB of a new disk of zeros, unless there is an @image."""
        super().__init__()
        self.image = image or os.path.join(vms.scratch(), 'disk')
        self.direct = direct
        self.queues = queues
        self.properties = {'num-queues': queues}
        if not image:
            with open(self.image, 'wb') as f:
                f.truncate(size * MIB)

    def command(self):
        return [os.path.join(host.QEMU_DIR, 'bin', 'qemu-storage-daemon'),
                '--blockdev', 'driver=file,node-name=disk,locking=off,'
                'filename=%s,cache.direct=%s' % (
                    self.image, 'on' if self.direct else 'off'),
                '--export', 'type=vhost-user-blk,id=export,node-name=disk,'
                'addr.type=unix,addr.path=%s,writable=on,num-queues=%d' % (
                    self.path, self.queues)]


class ContribBlk(Storage):
    """vhost-user-blk by the example among QEMU's sources."""

    def command(self):
        program = os.path.join(host.QEMU_DIR, 'qemu-obj', 'contrib',
                               'vhost-user-blk', 'vhost-user-blk')
        if not os.access(program, os.X_OK):
            tap.skip('contrib/vhost-user-blk is not built')
        return [program, '--socket-path=' + self.path,
                '--blk-file=' + self.image]


class Fs(Backend):
    """virtiofs: what both daemons have in common."""

    device = 'vhost-user-fs-pci'

    def __init__(self, shared=None, tag=TAG):
        super().__init__()
        self.shared = shared or os.path.join(vms.scratch(), 'shared')
        os.makedirs(self.shared, exist_ok=True)
        self.properties = {'tag': tag}


class FsRust(Fs):
    """virtiofs by the daemon in Rust."""

    def command(self):
        return foreign('virtiofsd', 'trixie', 'usr/libexec/virtiofsd') + [
            '--socket-path=' + self.path, '--shared-dir=' + self.shared,
            '--sandbox=none', '--seccomp=none', '--xattr', '--cache=auto']


class FsC(Fs):
    """virtiofs by the daemon in C."""

    def command(self):
        return foreign('virtiofsd-c', 'bookworm', 'usr/lib/qemu/virtiofsd') + [
            '--socket-path=' + self.path, '-f', '-o',
            'source=%s,sandbox=chroot,xattr,cache=auto' % self.shared]


class Passt(Backend):
    """A network device by passt."""

    device = 'virtio-net-pci'
    properties = {'romfile': ''}
    echo = '127.0.0.1'          # where the guest's peer is on the host
    can_reconnect = True

    def command(self):
        # As root it changes to nobody: who must reach the socket.
        os.chmod(self.dir, 0o755)
        return foreign('passt', 'trixie', 'usr/bin/passt') + [
            '--foreground', '--vhost-user', '--socket', self.path,
            '--address', NETWORK['guest'], '--netmask', NETWORK['prefix'],
            '--gateway', NETWORK['host'], '--map-host-loopback',
            NETWORK['host'], '-4', '-t', 'none', '-u', 'none', '--no-dhcp']

    @staticmethod
    def _netdev(name, relay, iothread):
        result = {'type': 'vhost-user', 'id': 'n-' + name,
                  'chardev': 'c-' + name}
        if relay is not None:
            result['relay'] = relay
        if iothread is not None:
            result['iothread'] = iothread
        return result

    def describe_device(self, name, relay=None, iothread=None, **more):
        return dict({'driver': self.device, 'id': name,
                     'netdev': 'n-' + name}, **self.properties,
                    **more)

    def options(self, name, relay=None, iothread=None, reconnect=False,
                **more):
        return self.chardev(name, reconnect) + [
            '-netdev', json.dumps(self._netdev(name, relay, iothread)),
            '-device', json.dumps(self.describe_device(name, **more))]


class Echo:
    """A server on the host that sends back what it gets."""

    def __init__(self, address='127.0.0.1'):
        self.listener = socket.create_server((address, 0))
        self.port = self.listener.getsockname()[1]
        self.bytes = 0
        tap.cleanup(self.listener.close)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                sock = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._echo, args=(sock,),
                             daemon=True).start()

    def _echo(self, sock):
        buffer = bytearray(256 << 10)
        view = memoryview(buffer)
        with sock:
            try:
                while True:
                    n = sock.recv_into(buffer)
                    if not n:
                        return
                    sock.sendall(view[:n])
                    self.bytes += n
            except OSError:
                return


def mount(vm, tag=TAG, where='/mnt'):
    """Mount a virtiofs in the guest."""
    vm.agent.ask('sh mkdir -p %s' % where)
    vm.agent.ask('sh mount -t virtiofs %s %s' % (tag, where))


def network_up(vm, device='eth0'):
    """Give the guest its address."""
    vm.agent.ask('sh ip addr add %s/%s dev %s' % (
        NETWORK['guest'], NETWORK['prefix'], device))
    vm.agent.ask('sh ip link set %s up' % device)


def relays(vm):
    """query-vhost-user-relays by chardev."""
    return {r['chardev']: r
            for r in vm.qmp.command('query-vhost-user-relays')}


def check_job(vm, kind, got):
    """No byte is wrong and no call failed."""
    tap.note('%s: %s: %s' % (vm.name, kind, got))
    tap.check(got['bad'] == 0, '%s: %s: wrong bytes: %s' % (vm.name, kind,
                                                            got))
    tap.check(got['err'] == 0, '%s: %s: errors: %s' % (vm.name, kind, got))


__all__ = ['Backend', 'Storage', 'ContribBlk', 'FsRust', 'FsC', 'Passt',
           'Echo', 'mount', 'network_up', 'relays', 'check_job', 'prepare',
           'cpu_time', 'NETWORK', 'TAG', 'Timeout']
