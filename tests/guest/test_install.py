#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 3600
"""make install and make uninstall: it runs from where it was put, and nothing
of it stays."""

import os
import shutil
import subprocess
import tempfile

import host
import tap

PREFIX = '/usr/local'


def make(*words):
    """A make of the project."""
    out = subprocess.run(['make', '-C', host.TOP, *words],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True, check=False)
    tap.check(out.returncode == 0, out.stdout[-3000:])
    return out.stdout


def install(full):
    """Install, look at it, take it away."""
    directory = tempfile.mkdtemp(prefix='install-', dir=host.IMAGES)
    tap.cleanup(lambda: shutil.rmtree(directory))
    dest = os.path.join(directory, 'dest')
    words = ['FULL=' + full, 'DESTDIR=' + dest, 'prefix=' + PREFIX]
    make('install', *words)
    there = [os.path.relpath(os.path.join(base, n), dest)
             for base, _, names in os.walk(dest) for n in names]
    outside = [p for p in there if not p.startswith(PREFIX[1:] + '/')]
    tap.check(not outside, 'outside of the prefix: ' + ' '.join(outside))
    tap.note('%d files' % len(there))
    program = dest + PREFIX + '/bin/qemu-system-x86_64'

    def qemu(*words):
        return subprocess.run(
            [program, *words], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=True).stdout
    tap.check('dedup-scanner' in qemu('-object', 'help'), 'no dedup-scanner')
    # qxl is a module, and the build directory's is not looked at
    tap.check(('name "qxl"' in qemu('-device', 'help')) == bool(full),
              'modules')
    if full:
        shutil.rmtree(dest + PREFIX + '/lib/qemu-dedup')
        tap.check('name "qxl"' not in qemu('-device', 'help'),
                  'whose module is that?')
        make('install', *words)
    make('install', *words)
    make('uninstall', *words)
    left = [os.path.join(base, n) for base, dirs, names in os.walk(directory)
            for n in dirs + names]
    tap.check(not left, 'left: ' + ' '.join(left))


@tap.case
def test_small():
    """the small build"""
    install('')


@tap.case
def test_full():
    """the full build"""
    if not os.path.exists(os.path.join(host.QEMU_DIR, 'full', 'obj',
                                       'qemu-system-x86_64')):
        tap.skip('no full build: make FULL=1')
    install('1')


tap.main()
