#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 5400
"""The package (make deb) on a fresh Debian: installed beside Debian's own QEMU,
used by libvirt, and gone without a trace.

A package fits the release that it was made on; its version says which.
"""

import glob
import os
import socket
import stat
import subprocess
import xml.etree.ElementTree as ET

import backends
import debroot
import dedup
import host as machine
import tap
import virsh

NAME = 'qemu-system-x86-dedup'
PROGRAM = '/usr/bin/qemu-system-x86_64-dedup'
RELEASES = {'bookworm': '12', 'trixie': '13'}
# What a domain of everything wants.  Debian 12 has virtiofsd in the package of
# its QEMU.
LIBVIRT = {'bookworm': ['qemu-system-common'], 'trixie': ['virtiofsd']}
COMMON = ['libvirt-daemon-system', 'libvirt-clients', 'qemu-system-x86',
          'swtpm', 'swtpm-tools', 'ovmf', 'systemd']
SHARED = '/var/lib/libvirt/shared'
# What installing anything changes
CHANGES = ('/cache', '/dev', '/proc', '/run', '/sys', '/tmp', '/var/cache',
           '/var/lib/apt', '/var/lib/dpkg', '/var/log', '/etc/ld.so.cache')

# The guest's port is to stay its first virtio device: an address for the other.
MORE = '''<x>
<graphics type='vnc'><listen type='socket'/></graphics>
<graphics type='spice'><listen type='socket'/></graphics>
<video><model type='qxl'/></video>
<redirdev bus='usb' type='spicevmc'/>
<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>
<filesystem type='mount' accessmode='passthrough'>
<driver type='virtiofs'/><source dir='%s'/><target dir='share'/>
<address type='pci' domain='0' bus='0' slot='0x10' function='0'/></filesystem>
</x>''' % SHARED
RELAY = '''<x xmlns:qemu='%s'><qemu:override><qemu:device alias='fs0'>
<qemu:frontend><qemu:property name='relay' type='string' value='on'/>
</qemu:frontend></qemu:device></qemu:override></x>''' % virsh.QEMU_NS


def package(suite):
    """The package for a release; skip if it is not built."""
    for where in 'deb', 'suites/%s/deb' % suite:
        found = glob.glob(os.path.join(machine.BUILD, where, '%s_*~deb%s_*.deb'
                                       % (NAME, RELEASES[suite])))
        if found:
            return found[0]
    tap.skip('no package for %s: make deb SUITE=%s' % (suite, suite))


def files(root):
    """Every path of a root, but what installing anything changes."""
    prune = ' -o '.join('-path %s' % p for p in CHANGES)
    return set(root.run('sh', '-c', r'find / -xdev \( %s \) -prune -o -print'
                        % prune).splitlines())


def install(root, path):
    """apt install ./package"""
    root.apt('update')
    there = '/tmp/' + os.path.basename(path)
    with open(path, 'rb') as f, open(root.path(there), 'wb') as t:
        t.write(f.read())
    root.apt('install', there)
    root.run('rm', there)


def check_installed(root):
    """It runs, all modules load, and it has what the issue is about."""
    text = root.run(PROGRAM, '-version')
    tap.note(text.splitlines()[0])
    text = root.run(PROGRAM, '-device', 'help')
    tap.check('ailed to' not in text, text[:2000])
    for name in 'qxl', 'usb-redir', 'virtio-gpu-gl-pci', 'virtio-9p-pci':
        tap.check('name "%s"' % name in text, 'no ' + name)
    tap.check('spice-app' in root.run(PROGRAM, '-display', 'help'), 'no SPICE')
    text = root.run('sh', '-c', 'ldd %s /usr/lib/qemu-dedup/*.so' % PROGRAM)
    tap.check('not found' not in text, text)
    # Not the modules of another QEMU, nor of none
    text = root.run('sh', '-c', 'rm -rf /tmp/m; mkdir /tmp/m; '
                    'QEMU_MODULE_DIR=/tmp/m %s -device help' % PROGRAM)
    tap.check('name "qxl"' in text, text[:300])


def listed(root):
    """What the package has: its files and directories."""
    return root.run('dpkg', '-L', NAME).splitlines()


def purge(root, paths):
    """Remove it; nothing of it may be left."""
    root.apt('purge', NAME)
    left = []
    for path in paths:
        where = root.path(path)
        try:
            mode = os.lstat(where).st_mode
        except FileNotFoundError:
            continue
        # A directory may be another's, too.
        if not stat.S_ISDIR(mode) or path != '/.' and 'no path found' in (
                root.run('dpkg', '-S', path, status=None)):
            left.append(path)
    tap.check(not left, 'left: ' + ' '.join(left))
    text = root.run('find', '/', '-xdev', '-name', '*dedup*', '-not', '-path',
                    '/proc/*', '-not', '-path', '/cache/*')
    tap.check(not text, 'left: ' + text)
    tap.check(not os.path.exists(root.path('/run/qemu-dedup')),
              '/run/qemu-dedup is left')


def fresh(suite):
    """apt install on a fresh Debian, and purge."""
    path = package(suite)
    root = debroot.Root(suite)
    before = files(root)
    install(root, path)
    check_installed(root)
    depends = set(root.run('dpkg-query', '-W', '-f',
                           '${Package}\n').splitlines())
    tap.note('%s: %d packages installed' % (suite, len(depends)))
    purge(root, listed(root))
    root.apt('autoremove', '--purge')
    # What the packages that it wanted leave is theirs.
    new = {p for p in files(root) - before if 'dedup' in p}
    tap.check(not new, 'left: ' + ' '.join(sorted(new)))


def domain(root):
    """A domain with all that the small build has not."""
    vm = virsh.Domain(root, 'whole', ram=256, memory='memfd', group='web')
    devices = vm.root.find('devices')
    devices.find('emulator').text = PROGRAM
    for element in ET.fromstring(MORE):
        devices.append(element)
    vm.root.append(ET.fromstring(RELAY)[0])
    element = vm.root.find('os')
    element.set('firmware', 'efi')
    # The guest's modules are not signed.
    element.insert(0, ET.fromstring(
        "<firmware><feature enabled='no' name='secure-boot'/></firmware>"))
    return vm


def greeting(root, vm, kind):
    """What listens at a display's socket says first, or sends back."""
    kept = ET.fromstring(vm.virsh('dumpxml', '@'))
    path, = [e.get('socket') for e in
             kept.findall("devices/graphics[@type='%s']/listen" % kind)]
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(60 * tap.PATIENCE)
        # Socket names are short.
        directory = os.open(root.path(os.path.dirname(path)), os.O_PATH)
        try:
            s.connect('/proc/self/fd/%d/%s' % (directory,
                                               os.path.basename(path)))
        finally:
            os.close(directory)
        if kind == 'spice':
            # SpiceLinkHeader, version 2.2, and an empty SpiceLinkMess
            s.sendall(b'REDQ' + b'\2\0\0\0\2\0\0\0\x12\0\0\0' +
                      b'\0\0\0\0\1\0' + b'\0' * 8 + b'\x12\0\0\0')
        return s.recv(4)


def with_libvirt(suite):
    """A domain of libvirt's on the package, beside Debian's QEMU."""
    path = package(suite)
    root = debroot.Root(suite)
    install(root, path)
    root.apt('install', '--no-install-recommends', *COMMON, *LIBVIRT[suite])
    theirs = root.run('qemu-system-x86_64', '-version').splitlines()[0]
    tap.check('dedup' not in theirs, theirs)
    tap.note(theirs)
    tap.check(not root.run('dpkg', '-V', 'qemu-system-x86', NAME), 'changed')
    root.run('systemd-tmpfiles', '--create', 'qemu-dedup.conf')
    st = os.stat(root.path('/run/qemu-dedup'))
    tap.check(st.st_uid == root.number('passwd', 'libvirt-qemu'), str(st))
    if os.path.exists('/dev/userfaultfd'):
        virsh.grant_userfaultfd(root)
    root.start_libvirt('\n'.join(virsh.package_file('libvirt', 'qemu.conf')) +
                       '\n')
    os.mkdir(root.path(SHARED))
    with open(root.path(SHARED + '/file'), 'w', encoding='ascii') as f:
        f.write('shared\n')
    vm = domain(root).start().boot()
    backends.mount(vm, 'share')
    vm.agent.ask('sh grep -q shared /mnt/file')
    vm.agent.ask('sh test -d /sys/firmware/efi')
    tap.check(vm.qmp.command('query-tpm'), 'no TPM')
    for kind, wanted in ('vnc', b'RFB '), ('spice', b'REDQ'):
        got = greeting(root, vm, kind)
        tap.check(got == wanted, '%s: %s' % (kind, got))
    vm.agent.ask('alloc d 4000 dup 4')
    vm.agent.ask('loop d start 16')
    dedup.wait_merged(vm, 3000)
    tap.note(dedup.summary(vm))
    tap.note(', '.join('%s %s' % (k, v) for k, v in
                       dedup.stats(vm).items() if 'pages' in k))
    vm.agent.ask('loop d stop')
    vm.check_regions('d')
    relays = backends.relays(vm)
    tap.check(relays and not any(r['broken'] for r in relays.values()), relays)
    program = os.readlink('/proc/%d/exe' % vm.pid)
    tap.check(program == PROGRAM, program)
    vm.virsh('destroy', '@')
    vm.virsh('undefine', '--nvram', '@')
    root.stop()
    purge(root, listed(root))
    tap.check(root.run('qemu-system-x86_64', '-version').splitlines()[0] ==
              theirs, "Debian's QEMU is gone")


@tap.case
def test_bookworm():
    """Debian 12: apt install on a fresh one, apt purge"""
    fresh('bookworm')


@tap.case
def test_trixie():
    """Debian 13: apt install on a fresh one, apt purge"""
    fresh('trixie')


@tap.case
def test_libvirt_bookworm():
    """Debian 12: a domain with VNC, SPICE, virtiofs, TPM, UEFI is merged"""
    with_libvirt('bookworm')


@tap.case
def test_libvirt_trixie():
    """Debian 13: a domain with VNC, SPICE, virtiofs, TPM, UEFI is merged"""
    with_libvirt('trixie')


@tap.case
def test_in_suite():
    """in-suite: a fresh Debian 13 that has the repository, and its own build"""
    package('trixie')
    name = 'in-suite-%d' % os.getpid()
    there = os.path.join(machine.BUILD, 'suites', 'trixie', name)
    tap.cleanup(lambda: os.path.exists(there) and os.unlink(there))
    out = subprocess.run(
        [os.path.join(machine.TOP, 'scripts', 'in-suite'), 'trixie', 'sh',
         '-c', '. /etc/os-release; echo $VERSION_CODENAME > build/%s; '
         'cmp "$0" "$1" && test -e build/fetch/directory && exit 3' % name,
         __file__, os.path.relpath(__file__, machine.TOP)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False)
    tap.check(out.returncode == 3, out.stdout)
    with open(there, encoding='ascii') as f:
        tap.check(f.read() == 'trixie\n', 'another release')
    tap.check(not os.path.exists(os.path.join(machine.BUILD, name)),
              'it has our build/')


tap.main()
