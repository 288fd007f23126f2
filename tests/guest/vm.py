# SPDX-License-Identifier: GPL-2.0-or-later
"""Start QEMU processes and talk with what runs in them.

    vm = VM('a', ram=192, backing='memfd-shared', group=g, dedup={})
    vm.start().boot()
    vm.agent.ask('alloc s 1000 signed')

Every VM that a case starts is ended when the case ends.  If the case fails,
its command line, its stderr and the end of its console are printed.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile

import host
import tap
from host import MIB
from qmp import QMP, Agent, Lines

# Kind of RAM: what the machine's main memory is made of.
BACKINGS = {
    'file-shared': 'memory-backend-file,mem-path={path},share=on',
    'file-private': 'memory-backend-file,mem-path={path},share=off',
    'memfd-shared': 'memory-backend-memfd,share=on',
    'memfd-private': 'memory-backend-memfd,share=off',
    'ram': 'memory-backend-ram',
    'plain': None,
}


def scratch():
    """A directory for one case: on a file system with O_DIRECT."""
    run = os.path.join(host.IMAGES, 'run')
    os.makedirs(run, exist_ok=True)
    path = tempfile.mkdtemp(dir=run)
    tap.cleanup(lambda: shutil.rmtree(path, ignore_errors=True))
    return path


def shm_scratch():
    """A directory on tmpfs for one case."""
    if not os.path.isdir('/dev/shm'):
        tap.skip('no /dev/shm')
    path = tempfile.mkdtemp(prefix='qemu-dedup-test-', dir='/dev/shm')
    tap.cleanup(lambda: shutil.rmtree(path, ignore_errors=True))
    return path


def group_dir():
    """A new group directory."""
    path = tempfile.mkdtemp(prefix='qemu-dedup-group-')
    tap.cleanup(lambda: shutil.rmtree(path, ignore_errors=True))
    return path


class VM:
    """One QEMU process."""

    serial = 0

    def __init__(self, name, ram=192, backing='memfd-shared', accel='tcg',
                 dedup=None, group=None, cgroup=None, disk=None, aio='threads',
                 balloon=False, hotplug=False, incoming=None, bios=None,
                 qemu=host.QEMU, env=None, ram_path=None, user=None,
                 prefix=(), extra=()):
        """@ram in MiB.  @dedup: properties of the dedup-scanner object, None
        for no object.  @disk: a raw file, read only, cache=none.  @bios: boot
        this ROM instead of Linux; its serial port is .serial_port then.
        @env: added to the environment.  @ram_path: where the file of
        file-shared and file-private is made.  @user: run it as this one.
        @prefix: words of a command that runs it."""
        VM.serial += 1
        self.number = VM.serial
        self.name = name
        self.ram = ram
        self.bios = bios
        self.process = self.ram_file = None
        self.qmp = self.agent = self.serial_port = None
        # Socket names are short: a build directory may lie deep.
        self.dir = tempfile.mkdtemp(prefix='qemu-dedup-vm-')
        tap.cleanup(self._clean)
        tap.detail(self.describe)
        memory = '%dM' % ram
        if hotplug:
            memory += ',slots=4,maxmem=%dM' % (ram + 1024)
        args = ['-nodefaults', '-no-user-config', '-display', 'none',
                '-no-reboot', '-name', name, '-m', memory,
                '-accel', 'tcg,tb-size=48' if accel == 'tcg' else accel,
                '-qmp', 'unix:%s,server=on,wait=off' % self.path('qmp')]
        machine = 'pc'
        options = BACKINGS[backing]
        if options:
            if '{path}' in options:
                self.ram_file = ram_path or os.path.join(shm_scratch(), 'ram')
                options = options.format(path=self.ram_file)
            args += ['-object', '%s,id=ram0,size=%dM' % (options, ram)]
            machine += ',memory-backend=ram0'
        args += ['-machine', machine]
        if bios:
            args += ['-bios', bios, '-serial',
                     'unix:%s,server=on,wait=on' % self.path('serial')]
        else:
            # A free page keeps what it held: it is still merged when the
            # guest's balloon takes it.
            # On a busy host the test of the timer fails, and the kernel gives
            # up.
            args += ['-kernel', host.image('vmlinuz'),
                     '-initrd', host.image('initramfs.gz'),
                     '-append', 'console=ttyS0 quiet panic=-1 '
                     'init_on_alloc=0 no_timer_check',
                     '-serial', 'file:' + self.path('console'),
                     '-device', 'virtio-serial-pci',
                     '-chardev', 'socket,id=agent,path=%s,server=on,wait=off'
                     % self.path('agent'),
                     '-device', 'virtserialport,chardev=agent,name=agent']
        if disk:
            args += ['-drive', 'if=virtio,format=raw,readonly=on,cache=none,'
                     'aio=%s,file=%s' % (aio, disk)]
        if balloon:
            args += ['-device', 'virtio-balloon-pci,id=balloon0']
        if dedup is not None:
            dedup = dict(dedup)
            if group:
                dedup.setdefault('group', group)
            args += ['-object', ','.join(
                ['dedup-scanner,id=ds0'] +
                ['%s=%s' % (k, v) for k, v in dedup.items()])]
        if incoming:
            args += ['-incoming', incoming]
        self.args = [qemu] + args + list(extra)
        self.args = list(prefix) + self.args
        if user is not None:
            os.chown(self.dir, user, user)
            self.args = ['setpriv', '--reuid=%d' % user, '--regid=%d' % user,
                         '--clear-groups'] + self.args
        self.env = dict(os.environ, **(env or {}))
        self.cgroup = cgroup

    def path(self, name):
        """A file in this VM's own directory."""
        return os.path.join(self.dir, name)

    def start(self):
        """Start the process and connect to its monitor."""
        command = 'exec "$@"'
        if self.cgroup:
            command = self.cgroup.enter_command() + ' && ' + command
        with open(self.path('stderr'), 'wb') as err:
            self.process = subprocess.Popen(
                ['/bin/sh', '-c', command, 'sh'] + self.args,
                stdin=subprocess.DEVNULL, stdout=err, stderr=err,
                env=self.env)
        if self.bios:
            # wait=on: QEMU starts the machine when this is connected.
            self.serial_port = Lines(self.path('serial'), self.alive)
        self.qmp = QMP(self.path('qmp'), self.alive)
        if not self.bios:
            self.agent = Agent(self.path('agent'), self.alive)
        return self

    def boot(self):
        """Wait for the guest agent."""
        self.agent.wait_hello()
        self.agent.ask('id %d' % self.number)
        return self

    def alive(self):
        """Is the process there?"""
        return self.process.poll() is None

    @property
    def pid(self):
        """The QEMU process."""
        return self.process.pid

    def stop(self):
        """Pause the guest."""
        self.qmp.command('stop')

    def cont(self):
        """Let the guest run."""
        self.qmp.command('cont')

    def kill(self, number=signal.SIGKILL):
        """End the process and wait until it is gone."""
        if self.process and self.alive():
            self.process.send_signal(number)
            try:
                self.process.wait(30 * tap.PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30 * tap.PATIENCE)
                raise
        if self.ram_file:
            # QEMU leaves a file that it was given by name.
            os.unlink(self.ram_file)
            self.ram_file = None

    def quit(self):
        """End QEMU in an orderly way; fails if it does not end well."""
        self.kill(signal.SIGTERM)
        tap.check(self.process.returncode == 0,
                  '%s ended with status %s' % (self.name,
                                               self.process.returncode))

    def blocks(self):
        """RAM blocks: name -> (host address, used size)."""
        result = {}
        text = self.qmp.command('x-query-ramblock')['human-readable-text']
        for line in text.splitlines():
            words = re.match(r' *(\S+) +\d+ KiB +0x([0-9a-f]+) +0x([0-9a-f]+) '
                             r'+0x([0-9a-f]+) +0x([0-9a-f]+)', line)
            if words:
                result[words.group(1)] = (int(words.group(5), 16),
                                          int(words.group(3), 16))
        return result

    def ram_range(self):
        """(pid, start, end) of the main memory in the QEMU process."""
        size = self.ram * MIB
        for address, used in self.blocks().values():
            if used == size:
                return self.pid, address, address + used
        raise LookupError('no RAM block of %d MiB' % self.ram)

    def count_ranges(self):
        """The ranges that the offline counter looks at."""
        return [self.ram_range()]

    def check_regions(self, names, timeout=120):
        """Every byte of these regions is right, now and at all times."""
        for name in names:
            got = self.agent.get('verify ' + name, timeout)
            tap.check(got['bad'] == 0 and got['errors'] == 0,
                      '%s: region %s: %s' % (self.name, name, got))

    def describe(self):
        """Lines about this VM for a failed case."""
        lines = ['--- VM %s: %s' % (self.name, ' '.join(self.args)),
                 'status: %s' % (self.process and self.process.poll())]
        for name in ('stderr', 'console'):
            try:
                with open(self.path(name), errors='replace',
                          encoding='utf-8') as f:
                    lines += [name + ': ' + l.rstrip()
                              for l in f.readlines()[-12:]]
            except OSError:
                pass
        return lines

    def _clean(self):
        for channel in (self.qmp, self.agent, self.serial_port):
            if channel:
                channel.close()
        if self.process and self.alive():
            self.process.kill()
            self.process.wait(30 * tap.PATIENCE)
        shutil.rmtree(self.dir, ignore_errors=True)


def count_saveable(vms):
    """What merging could save among @vms: they are paused meanwhile."""
    for vm in vms:
        vm.stop()
    try:
        return host.count_pages([r for vm in vms for r in vm.count_ranges()])
    finally:
        for vm in vms:
            vm.cont()
