#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The patches fit the versions of QEMU that they are for, and no other.

A version whose source is not there is fetched; the test is skipped when that
fails.  Nothing is built: "make check-versions" does that.
"""

import os

from checks import TOP, fetch, run, scratch, series, small_source, versions
import tap

PREPARE = os.path.join(TOP, 'scripts', 'prepare-tree')
FETCH = os.path.join(TOP, 'scripts', 'fetch-qemu')
PATCHES = os.path.join(TOP, 'patches')

# A version, and the one that is named instead.
REFUSED = {
    '7.2.22': '10.0', '9.2.4': '10.0', '10.0.13-rc1x': '10.0',
    '10.0.50': '10.0', '10.1.3': '10.2', '10.2.50': '10.2', '42.0.0': '10.2',
}


def each_source():
    """(Version, a small tree of its source)."""
    for version in versions():
        full, why = fetch(version)
        if full:
            yield version, small_source(full, version)
        else:
            tap.skip(f'no source of QEMU {version}: {why}')


@tap.case
def test_git_am():
    """the patches for each version apply with git am"""
    for version, source in each_source():
        git = ['git', '-C', source, '-c', 'user.name=check',
               '-c', 'user.email=check@localhost', '-c',
               'commit.gpgsign=false']
        for command in (['init', '-q'], ['add', '-A'],
                        ['commit', '-qm', 'base'],
                        ['am', '-q', *series(version)]):
            out = run(*git, *command)
            tap.check(out.returncode == 0, f'{version}: {out.stdout}')


@tap.case
def test_patch():
    """they apply with patch -p1, without fuzz; to the oldest without offset"""
    for version, source in each_source():
        for patch in series(version):
            out = run('patch', '-p1', '-F0', '-d', source, '-i', patch)
            tap.check(out.returncode == 0 and 'fuzz' not in out.stdout and
                      ('offset' not in out.stdout or version != versions()[0]),
                      f'{version}: {out.stdout}')


@tap.case
def test_prepare():
    """scripts/prepare-tree takes those of the source's version"""
    for version, source in each_source():
        tree = scratch()
        out = run(PREPARE, source, tree)
        tap.check(out.returncode == 0, f'{version}: {out.stdout}')
        out = run('patch', '-p1', '-R', '-f', '--dry-run', '-d', tree, '-i',
                  series(version)[-1])
        tap.check(out.returncode == 0, f'{version}: {out.stdout}')


@tap.case
def test_fuzz():
    """a context that is only similar is refused"""
    for version, source in each_source():
        path = os.path.join(source, 'qapi/meson.build')
        with open(path, encoding='utf-8') as f:
            text = f.read()
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text.replace("  'control',", "  'controls',"))
        out = run(PREPARE, source, scratch())
        tap.check(out.returncode and 'does not apply' in out.stdout,
                  f'{version}: {out.stdout}')


@tap.case
def test_series():
    """every patch belongs to a series, and the common ones to each"""
    files = {os.path.join(base, name) for base, _, names in os.walk(PATCHES)
             for name in names if name.endswith('.patch')}
    known = {version: set(series(version)) for version in versions()}
    lost = files - set().union(*known.values())
    tap.check(not lost, f'in no series: {sorted(lost)}')
    for version, patches in known.items():
        lost = {f for f in files if '/common/' in f} - patches
        tap.check(not lost, f'not in series-{version}: {sorted(lost)}')


@tap.case
def test_refused():
    """a version that is not known is refused, with the nearest that is"""
    for version, near in REFUSED.items():
        source, tree = scratch(), scratch()
        with open(os.path.join(source, 'VERSION'), 'w',
                  encoding='ascii') as f:
            f.write(version + '\n')
        for out in (run(PREPARE, source, tree),
                    run(FETCH, env=dict(os.environ, QEMU_VERSION=version))):
            tap.check(out.returncode and out.stdout.rstrip().endswith(
                f'QEMU {version} does not fit; the nearest that does is '
                f'{near}.x'), f'{version}: {out.stdout}')
        tap.check(not os.listdir(tree), 'something was built all the same')


tap.main()
