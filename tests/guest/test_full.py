#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 3600
"""The full build (make FULL=1) has what Debian's package has.

Debian's package of the same version, and all that it depends on, is unpacked
into build/guest/debian-qemu and run from there with its own libraries; nothing
of it is installed.  QEMU_FULL=DIR compares the programs of that directory
instead: the small build must fail.
"""

import glob
import os
import re
import shutil
import subprocess

import host
import tap

FULL = os.environ.get('QEMU_FULL', os.path.join(host.QEMU_DIR, 'full', 'bin'))
DEBIAN = os.path.join(host.IMAGES, 'debian-qemu')
SUITE = 'trixie'
PACKAGES = ['qemu-system-x86', 'qemu-system-gui', 'qemu-system-modules-spice',
            'qemu-system-modules-opengl', 'qemu-block-extra', 'qemu-utils']

# What is not there when configure was not given an option: full-features
# leaves it out where the distribution is too old for it.
LEFT_OUT = {
    '--enable-blkio': {'io_uring', 'nvme-io_uring', 'virtio-blk-vfio-pci',
                       'virtio-blk-vhost-user', 'virtio-blk-vhost-vdpa'},
}


class Programs:
    """QEMU's programs of one build."""

    def __init__(self, directory, loader=(), env=None):
        self.directory = directory
        self.loader = list(loader)
        self.env = dict(os.environ, **(env or {}))

    def run(self, program, *args, **kwargs):
        """What it prints."""
        out = subprocess.run(
            self.loader + [os.path.join(self.directory, program), *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.env, timeout=120 * tap.PATIENCE, check=False, **kwargs)
        tap.check(out.returncode == 0, '%s %s: %s' % (
            program, ' '.join(args), out.stderr.strip()))
        # A module that does not load is said, and not listed.
        tap.check('ailed to' not in out.stderr, out.stderr)
        return out.stdout or out.stderr

    def qemu(self, *args, **kwargs):
        """The system emulator."""
        return self.run('qemu-system-x86_64', *args, **kwargs)


def version(programs):
    """QEMU's version, numbers alone."""
    return re.search(r'version (\d+\.\d+\.\d+)',
                     programs.qemu('-version')).group(1)


def full():
    """Ours; skip if it is not built."""
    if not os.access(os.path.join(FULL, 'qemu-system-x86_64'), os.X_OK):
        tap.skip('no full build: make FULL=1')
    return Programs(FULL)


def fetch():
    """Unpack Debian's packages."""
    apt = [os.path.join(host.TOP, 'scripts', 'private-apt'), SUITE, 'deb',
           '-o', 'Dir::State::status=/dev/null', '-o', 'Debug::NoLocking=1',
           '-o', 'APT::Architecture=amd64']
    new = DEBIAN + '.new'
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(os.path.join(new, 'archives', 'partial'))
    for words in (['update'],
                  ['-o', 'Dir::Cache::archives=%s/archives' % new, '-y',
                   '--no-install-recommends', '--download-only', 'install',
                   *PACKAGES]):
        out = subprocess.run(apt + words, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, check=False)
        if out.returncode:
            shutil.rmtree(new)
            tap.skip("Debian's package cannot be had: " +
                     out.stdout.strip().splitlines()[-1])
    for deb in glob.glob(new + '/archives/*.deb'):
        subprocess.run(['dpkg-deb', '-x', deb, os.path.join(new, 'root')],
                       check=True)
    shutil.rmtree(os.path.join(new, 'archives'))
    os.rename(new, DEBIAN)


def debian():
    """Debian's."""
    if not os.path.isdir(DEBIAN):
        fetch()
    root = os.path.join(DEBIAN, 'root')
    libraries = [path for path in (
        os.path.join(root, d, 'x86_64-linux-gnu') for d in ('usr/lib', 'lib'))
        if os.path.isdir(path)]
    # Some have a directory of their own, and find it when installed.
    libraries += sorted({os.path.dirname(p) for p in glob.glob(
        libraries[0] + '/*/lib*.so*')})
    loader, = glob.glob(libraries[0] + '/ld-linux-x86-64.so.2')
    return Programs(os.path.join(root, 'usr', 'bin'),
                    [loader, '--library-path', ':'.join(libraries)],
                    {'QEMU_MODULE_DIR': os.path.join(libraries[0], 'qemu')})


def names(text):
    """The first words of a list's lines, without its headings."""
    return {line.split()[0] for line in text.splitlines()
            if line.strip() and not line.rstrip().endswith(':')}


def devices(programs):
    """-device help"""
    return set(re.findall(r'^name "([^"]+)"', programs.qemu('-device', 'help'),
                          re.M))


def options(programs):
    """-help: the options that there are."""
    return set(re.findall(r'^(-[\w-]+)', programs.qemu('-help'), re.M))


def formats(text):
    """The words behind "Supported formats", some lines in qemu-img's help."""
    return set(' '.join(re.findall(
        r'^Supported (?:image )?formats[^:]*:(.*?)(?:^\S|\Z)', text + '\n',
        re.M | re.S)).split())


def commands(programs):
    """What the monitor knows."""
    out = programs.qemu(
        '-M', 'none', '-display', 'none', '-nodefaults', '-qmp', 'stdio',
        input='{"execute": "qmp_capabilities"}\n'
              '{"execute": "query-commands"}\n{"execute": "quit"}\n')
    return set(re.findall(r'"name": "([^"]+)"', out))


LISTS = {
    'devices': devices,
    'options': options,
    'monitor commands': commands,
    'block drivers of QEMU': lambda p: formats(
        p.qemu('-drive', 'format=help')),
    'block drivers of qemu-img': lambda p: formats(p.run('qemu-img', '--help')),
}
for _name in ('display', 'audiodev', 'netdev', 'chardev', 'object', 'accel',
              'machine', 'cpu', 'vga'):
    LISTS['-%s help' % _name] = (
        lambda p, name=_name: names(p.qemu('-' + name, 'help')))


def left_out():
    """What this build's configure was told to do without."""
    path = os.path.join(host.QEMU_DIR, 'full', 'obj', '.arguments')
    try:
        with open(path, encoding='utf-8') as f:
            given = f.read().split()
    except FileNotFoundError:
        return set()
    missing = set()
    for option, what in LEFT_OUT.items():
        if option not in given:
            tap.note('built without %s: %s' % (option[len('--enable-'):],
                                               ' '.join(sorted(what))))
            missing |= what
    return missing


@tap.case
def test_superset():
    """every list of the full build has all of Debian's"""
    ours = full()
    theirs = debian()
    if version(ours) != version(theirs):
        tap.skip("QEMU %s here, Debian's is %s" % (version(ours),
                                                  version(theirs)))
    excused = left_out()
    lacking = []
    for what, get in LISTS.items():
        there, here = get(theirs), get(ours)
        tap.check(len(there) > 1, 'Debian lists no %s?' % what)
        missing = there - here - excused
        tap.note('%s: Debian %d, here %d%s' % (
            what, len(there), len(here), ', MISSING %s' % ' '.join(
                sorted(missing)) if missing else ''))
        lacking += ['%s: %s' % (what, m) for m in sorted(missing)]
    tap.check(not lacking, '%d missing: %s' % (len(lacking),
                                               ', '.join(lacking)))


@tap.case
def test_modules():
    """Debian's modules are ours, too, and all load"""
    ours = full()
    debian()
    there = {os.path.basename(p) for p in glob.glob(
        DEBIAN + '/root/usr/lib/x86_64-linux-gnu/qemu/*.so')}
    here = {os.path.basename(p) for p in glob.glob(
        os.path.join(FULL, '..', 'lib', 'qemu-dedup', '*.so'))}
    excused = {'block-blkio.so'} if left_out() else set()
    tap.check(len(there) > 20, str(there))
    tap.check(not there - here - excused, 'missing: ' + ' '.join(
        sorted(there - here - excused)))
    # Not those of the distribution's QEMU, which has another build's stamp
    tap.check('dedup-scanner' in ours.qemu('-object', 'help'),
              'not our QEMU')


tap.main()
