# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of a private libvirtd, driven with virsh.

    host = virthost.Host()
    vm = virsh.Domain(host, 'a', group='web').start().boot()
    host.virsh('managedsave', 'a')

A Domain stands where the other tests have a VM: dedup.stats(vm) and the like
work with it, by virsh qemu-monitor-command.  Its XML is the one of
packaging/libvirt/domain.xml, with what a test needs beside.
"""

import json
import os
import re
import select
import shutil
import subprocess
import time
import uuid
import xml.etree.ElementTree as ET

import dedup
import host as machine
import tap
import virthost
from qmp import Agent, Lines, QMPError, Timeout
from vm import VM

EXAMPLE = os.path.join(machine.TOP, 'packaging', 'libvirt', 'domain.xml')
QEMU_NS = 'http://libvirt.org/schemas/domain/qemu/1.0'
RAM_DIR = '/var/lib/libvirt/qemu/ram'
FAST = 'sleep-millisecs=0,pages-to-scan=1048576'

ET.register_namespace('qemu', QEMU_NS)

# Kind of RAM -> what <memoryBacking> has
MEMORY = {
    'anonymous': '',
    'memfd': "<source type='memfd'/><access mode='shared'/>",
    'file': "<source type='file'/><access mode='shared'/>",
}


def expected_write_protect(granted):
    """How the memory of a domain as libvirt-qemu is kept from changing.
    @granted: was it given a userfaultfd?"""
    return 'userfaultfd' if granted else 'mprotect'


def package_file(*names):
    """The lines of a file for administrators, without comments."""
    with open(os.path.join(machine.TOP, 'packaging', *names),
              encoding='utf-8') as f:
        return [line for line in f.read().splitlines()
                if line and not line.startswith('#')]


def make_group_parent(host, owner=None):
    """Do what packaging/tmpfiles.d says; @owner instead of whom it names."""
    for line in package_file('tmpfiles.d', 'qemu-dedup.conf'):
        kind, path, mode, user, group = line.split()[:5]
        tap.check(kind == 'd' and user == virthost.USER, line)
        path = host.path(path)
        os.makedirs(path)
        os.chmod(path, int(mode, 8))
        if owner != 'root':
            os.chown(path, host.number('passwd', user),
                     host.number('group', group))


def grant_userfaultfd(host):
    """Do what packaging/udev says to the node of this host."""
    node = host.path('/dev/userfaultfd')
    if not os.path.exists(node):
        tap.skip('no /dev/userfaultfd')
    rule, = package_file('udev', '60-qemu-dedup.rules')
    says = dict(re.findall(r'(\w+)==?"([^"]*)"', rule))
    tap.check(says['KERNEL'] == 'userfaultfd', rule)
    os.chown(node, 0, host.number('group', says['GROUP']))
    os.chmod(node, int(says['MODE'], 8))


def prepared_host(user=None, granted=True, **kwargs):
    """A host with what the documentation has administrators set."""
    conf = ('\n'.join(package_file('libvirt', 'qemu.conf')) + '\n'
            if granted and not user else '')
    host = virthost.Host(user=user, conf=conf, **kwargs)
    if granted and not user:
        grant_userfaultfd(host)
    make_group_parent(host, user)
    # Where libvirt has files for memory
    os.makedirs(host.path(RAM_DIR), exist_ok=True)
    host.mount('-t', 'tmpfs', 'ram', RAM_DIR)
    return host


class Monitor:
    """QMP through virsh, with the methods of qmp.QMP that the helpers use."""

    def __init__(self, domain):
        self.domain = domain
        self.events = None

    def command(self, name, arguments=None, timeout=60):
        """Run command @name; return its result or raise QMPError."""
        request = {'execute': name}
        if arguments:
            request['arguments'] = arguments
        reply = json.loads(self.domain.virsh(
            'qemu-monitor-command', '@', json.dumps(request),
            timeout=timeout))
        if 'error' in reply:
            raise QMPError(reply['error'])
        return reply['return']

    def hmp(self, line):
        """Run a command of the human monitor."""
        return self.domain.virsh('qemu-monitor-command', '--hmp', '@', line)

    def listen(self, trigger=None):
        """Hear of events from here on.  @trigger makes one, if it is to be
        another than a change of the state."""
        on = False

        def toggle():
            nonlocal on
            dedup.run(self.domain, on)
            on = not on
        self.events = Events(self.domain, trigger or toggle)
        dedup.run(self.domain, True)

    def wait_event(self, name, timeout=60, match=lambda data: True):
        """As qmp.QMP's; listen() came before."""
        return {'data': self.events.wait(name, timeout, match)}


class Events:
    """virsh qemu-monitor-event, which runs until the case ends."""

    LINE = re.compile(r"\S+ \S+: event (\S+) for domain '(.*?)': (.*)$")

    def __init__(self, domain, trigger):
        self.name = domain.name
        self.process = domain.host.popen(
            'qemu-monitor-event', domain.name, '--loop', '--timestamp',
            '--event', '^DEDUP_', '--regex')
        tap.cleanup(self.close)
        self.buffer = ''
        # Nothing says that it listens: have an event happen until one comes.
        deadline = time.monotonic() + 20 * tap.PATIENCE
        while not select.select([self.process.stdout], [], [], 0.3)[0]:
            tap.check(time.monotonic() < deadline, 'no event')
            trigger()

    def line(self, deadline):
        """The next line."""
        while '\n' not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [],
                                              left)[0]:
                raise Timeout('no event from ' + self.name)
            data = os.read(self.process.stdout.fileno(), 65536).decode()
            tap.check(data, 'virsh qemu-monitor-event ended')
            self.buffer += data
        line, self.buffer = self.buffer.split('\n', 1)
        return line

    def wait(self, name, timeout=60, match=lambda data: True):
        """The data of the next event @name that @match accepts."""
        deadline = time.monotonic() + timeout * tap.PATIENCE
        while True:
            m = self.LINE.match(self.line(deadline))
            tap.check(m, 'not an event')
            tap.check(m.group(2) == self.name, m.group(0))
            data = json.loads(m.group(3))
            if m.group(1) == name and match(data):
                return data

    def close(self):
        """End the command."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


class Domain:
    """One domain; its object is ds0."""

    check_regions = VM.check_regions
    blocks = VM.blocks
    ram_range = VM.ram_range
    count_ranges = VM.count_ranges
    serial = 0

    def __init__(self, host, name, ram=192, memory='anonymous', group=None,
                 options=FAST, bare=False, disk=None, format='qcow2',
                 slots=False, backing='', more=None):
        """@ram in MiB.  @options: of the object.  @bare: KVM with the bare
        guest.  @slots: for DIMMs.  @backing: XML for <memoryBacking>;
        @more: an element of the domain's own."""
        Domain.serial += 1
        self.number = Domain.serial
        self.host = host
        self.name = name
        self.ram = ram
        self.bare = bare
        self.agent = self.serial_port = None
        self.qmp = Monitor(self)
        self._pid = None
        words = ['dedup-scanner', 'id=ds0']
        if group:
            words.append('group=' + group)
        self.object = ','.join(words + [options])
        tree = ET.parse(EXAMPLE)
        self.root = tree.getroot()
        self._adapt(memory, backing, slots)
        if more:
            self._insert(more)
        self._boot(self.root.find('os'))
        self._devices(self.root.find('devices'), disk, format)
        tap.cleanup(self._close)

    def channel(self):
        """Where the guest's port is, in the host."""
        return '/var/lib/libvirt/qemu/%s.port' % self.name

    def _insert(self, text):
        """One more element, before <os>: the order is free there."""
        self.root.insert(list(self.root).index(self.root.find('os')),
                         ET.fromstring(text))

    def _adapt(self, memory, backing, slots):
        """Turn the example into this domain."""
        root = self.root
        root.find('name').text = self.name
        ET.SubElement(root, 'uuid').text = str(uuid.uuid4())
        root.find('memory').text = str(self.ram)
        root.findall('qemu:commandline/qemu:arg',
                     {'qemu': QEMU_NS})[1].set('value', self.object)
        text = MEMORY[memory] + backing
        if text:
            self._insert('<memoryBacking>%s</memoryBacking>' % text)
        if not self.bare:
            root.set('type', 'qemu')
            root.find('features').append(ET.fromstring(
                "<tcg><tb-cache unit='MiB'>48</tb-cache></tcg>"))
        root.remove(root.find('cpu'))
        if slots:
            self._insert("<maxMemory slots='4' unit='MiB'>%d</maxMemory>"
                         % (self.ram + 1024))
            self._insert("<cpu><numa><cell id='0' cpus='0' memory='%d' "
                         "unit='MiB'/></numa></cpu>" % self.ram)

    def copy_images(self, host):
        """Have what it boots in a host; returns {element: path there}."""
        names = ({'loader': 'bare.rom'} if self.bare else
                 {'kernel': 'vmlinuz', 'initrd': 'initramfs.gz'})
        os.makedirs(host.path(virthost.IMAGES), exist_ok=True)
        for tag, name in names.items():
            there = os.path.join(virthost.IMAGES, name)
            if not os.path.exists(host.path(there)):
                shutil.copy(machine.image(name), host.path(there))
            names[tag] = there
        return names

    def _boot(self, os_element):
        os_element.remove(os_element.find('boot'))
        for tag, path in self.copy_images(self.host).items():
            ET.SubElement(os_element, tag).text = path
        if self.bare:
            os_element.find('loader').set('type', 'rom')
        else:
            ET.SubElement(os_element, 'cmdline').text = (
                'console=ttyS0 quiet panic=-1 init_on_alloc=0 '
                'no_timer_check')

    def _devices(self, element, disk, image_format):
        element.remove(element.find('console'))
        source = element.find('disk')
        if disk:
            source.find('source').set('file', disk)
            source.find('driver').set('type', image_format)
        else:
            element.remove(source)
        kind = 'serial' if self.bare else 'channel'
        target = ("<target type='isa-serial' port='0'/>" if self.bare else
                  "<target type='virtio' name='agent'/>")
        text = ("<%s type='unix'><source mode='bind' path='%s'/>%s</%s>"
                % (kind, self.channel(), target, kind))
        if not self.bare:
            text += ("<serial type='file'><source path='/var/log/libvirt/"
                     "%s.console'/></serial>" % self.name)
        for child in ET.fromstring('<x>%s</x>' % text):
            element.append(child)

    def xml(self):
        """The domain's XML, a file in the host."""
        path = '/var/lib/libvirt/%s.xml' % self.name
        ET.ElementTree(self.root).write(self.host.path(path))
        return path

    def virsh(self, *words, **kwargs):
        """A virsh command, with this domain for '@'."""
        return self.host.virsh(*(self.name if w == '@' else w
                                 for w in words), **kwargs)

    def define(self):
        """Make it known to libvirt."""
        self.virsh('define', self.xml())
        return self

    def start(self, *flags):
        """Start it; the bare guest waits until somebody listens."""
        self.define()
        self.virsh('start', '@', *(('--paused',) if self.bare else ()),
                   *flags)
        self.connect()
        if self.bare:
            self.virsh('resume', '@')
            tap.check(self.serial_port.line(60) == 'ready 256', 'not ready')
        return self

    def forget(self):
        """What was known of its process may not be true any more."""
        self._pid = None

    def connect(self):
        """Connect to the guest: it has been started or restored."""
        self.forget()
        kind = Lines if self.bare else Agent
        self._close()
        port = kind(self.host.path(self.channel()), self.alive)
        if self.bare:
            self.serial_port = port
        else:
            self.agent = port

    def boot(self):
        """Wait for the guest agent."""
        self.agent.wait_hello()
        self.agent.ask('id %d' % self.number)
        return self

    @property
    def pid(self):
        """The QEMU process, as this test's namespace numbers it."""
        if not self._pid:
            self._pid = self.host.outer(int(virthost.read(self.host.path(
                '/run/libvirt/qemu/%s.pid' % self.name))))
        return self._pid

    def alive(self):
        """Is it there?"""
        return self.state() != 'shut off'

    def state(self):
        """What domstate says."""
        return self.virsh('domstate', '@')

    def stop(self):
        """Pause the guest."""
        self.virsh('suspend', '@')

    def cont(self):
        """Let the guest run."""
        self.virsh('resume', '@')

    def log(self):
        """What QEMU said on stderr, and its command line."""
        return virthost.read(self.host.path(
            '/var/log/libvirt/qemu/%s.log' % self.name))

    def _close(self):
        for port in (self.agent, self.serial_port):
            if port:
                port.close()
        self.agent = self.serial_port = None


def make_disk(host, name, mib):
    """An empty qcow2 image in the host; returns its path there."""
    os.makedirs(host.path(virthost.IMAGES), exist_ok=True)
    path = '%s/%s.qcow2' % (virthost.IMAGES, name)
    subprocess.run([os.path.join(os.path.dirname(machine.QEMU), 'qemu-img'),
                    'create', '-q', '-f', 'qcow2', host.path(path),
                    '%dM' % mib], check=True)
    return path


def cgroup_usage(vm):
    """Bytes charged to the memory cgroup that libvirt made for a domain."""
    kinds = {}
    for line in virthost.read('/proc/%d/cgroup' % vm.pid).splitlines():
        _, names, path = line.split(':', 2)
        # What is below is for its threads.
        kinds[names] = re.sub(r'(/[^/]*qemu[^/]*).*', r'\1', path)
    for top, figure, path in (
            ('/sys/fs/cgroup/memory', 'memory.usage_in_bytes',
             kinds.get('memory')),
            ('/sys/fs/cgroup', 'memory.current', kinds.get(''))):
        place = '%s%s/%s' % (top, path, figure)
        if path and 'qemu' in path and os.path.exists(place):
            return int(virthost.read(place))
    tap.skip('libvirt made no memory cgroup: %s' % kinds)
    return None
