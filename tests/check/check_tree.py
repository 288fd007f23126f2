#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""How the QEMU tree is made: scripts/prepare-tree and the patches."""

import glob
import os
import re
import shutil
import tempfile

from checks import BUILD, TOP, TREE, run, tracked
import tap

PREPARE = os.path.join(TOP, 'scripts', 'prepare-tree')
PATCHES = sorted(glob.glob(os.path.join(TOP, 'patches', '*.patch')))


def scratch():
    path = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda: shutil.rmtree(path))
    return path


def touched():
    """Every file that a patch changes."""
    files = set()
    for patch in PATCHES:
        with open(patch, encoding='utf-8') as f:
            files |= set(re.findall(r'^--- a/(\S+)', f.read(), re.M))
    return sorted(files)


def small_source():
    """A source tree with just the files that the patches change."""
    with open(os.path.join(BUILD, 'fetch', 'directory'),
              encoding='ascii') as f:
        full = os.path.join(BUILD, 'fetch', f.read().strip())
    source = scratch()
    for path in touched() + ['VERSION']:
        os.makedirs(os.path.dirname(os.path.join(source, path)),
                    exist_ok=True)
        shutil.copy2(os.path.join(full, path), os.path.join(source, path))
    return source


def snapshot(root):
    """What is in a directory: every path with its bytes and mtime."""
    state = {}
    for base, _, names in os.walk(root):
        for name in names:
            path = os.path.join(base, name)
            if os.path.islink(path):
                state[path] = os.readlink(path)
            else:
                with open(path, 'rb') as f:
                    state[path] = (f.read(), os.stat(path).st_mtime_ns)
    return state


def need_fetched():
    if not os.path.exists(os.path.join(BUILD, 'fetch', 'directory')):
        tap.skip('QEMU was not fetched but given by QEMU_SRC')


@tap.case
def test_git_am():
    """the patches apply with git am"""
    need_fetched()
    source = small_source()
    git = ['git', '-C', source, '-c', 'user.name=check',
           '-c', 'user.email=check@localhost', '-c', 'commit.gpgsign=false']
    for command in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'base'],
                    ['am', '-q', *PATCHES]):
        out = run(*git, *command)
        tap.check(out.returncode == 0, out.stdout)


@tap.case
def test_patch():
    """the patches apply with patch -p1, without fuzz and offset"""
    need_fetched()
    source = small_source()
    for patch in PATCHES:
        out = run('patch', '-p1', '-F0', '-d', source, '-i', patch)
        tap.check(out.returncode == 0 and 'offset' not in out.stdout and
                  'fuzz' not in out.stdout, out.stdout)


@tap.case
def test_twice():
    """applying twice changes nothing, and the source is left alone"""
    need_fetched()
    source, tree = small_source(), scratch()
    before = snapshot(source)
    out = run(PREPARE, source, tree)
    tap.check(out.returncode == 0, out.stdout)
    first = snapshot(tree)
    tap.check(snapshot(source) == before, 'the source was changed')
    out = run(PREPARE, source, tree)
    tap.check(out.returncode == 0 and not out.stdout, out.stdout)
    tap.check(snapshot(tree) == first, 'the tree was changed')


@tap.case
def test_refresh():
    """a changed file of the source is taken over, the others keep their time"""
    need_fetched()
    source, tree = small_source(), scratch()
    run(PREPARE, source, tree)
    first = snapshot(tree)
    with open(os.path.join(source, 'MAINTAINERS'), 'a',
              encoding='utf-8') as f:
        f.write('one more line\n')
    out = run(PREPARE, source, tree)
    tap.check(out.returncode == 0, out.stdout)
    second = snapshot(tree)
    changed = {os.path.relpath(p, tree) for p in second
               if first.get(p) != second[p]}
    tap.check(changed == {'MAINTAINERS', '.dedup-tree.json'}, str(changed))
    with open(os.path.join(tree, 'MAINTAINERS'), encoding='utf-8') as f:
        text = f.read()
    tap.check('one more line' in text and 'hw/dedup/' in text,
              'not the patched new file')


@tap.case
def test_version():
    """a version that does not fit is refused by name"""
    need_fetched()
    for version in ('9.2.4', '10.1.0', '10.0.13-rc1x'):
        source, tree = small_source(), scratch()
        with open(os.path.join(source, 'VERSION'), 'w',
                  encoding='ascii') as f:
            f.write(version + '\n')
        out = run(PREPARE, source, tree)
        tap.check(out.returncode != 0 and version in out.stdout and
                  '10.0.x' in out.stdout, out.stdout)
        tap.check(not os.listdir(tree), 'something was built all the same')


@tap.case
def test_no_source():
    """a directory that is no QEMU source is refused by name"""
    source, tree = scratch(), scratch()
    out = run(PREPARE, source, tree)
    tap.check(out.returncode != 0 and source in out.stdout, out.stdout)


@tap.case
def test_in_the_way():
    """a file that stands where an overlay file goes is refused by name"""
    need_fetched()
    source, tree = small_source(), scratch()
    place = 'hw/dedup/ram-guard.c'
    os.makedirs(os.path.join(source, 'hw/dedup'))
    with open(os.path.join(source, place), 'w', encoding='ascii') as f:
        f.write('/* not ours */\n')
    out = run(PREPARE, source, tree)
    tap.check(out.returncode != 0 and place in out.stdout, out.stdout)


@tap.case
def test_bad_patch():
    """a patch that does not apply is named"""
    need_fetched()
    source, tree = small_source(), scratch()
    with open(os.path.join(source, 'hw/meson.build'), 'w',
              encoding='ascii') as f:
        f.write('# nothing of the sort\n')
    out = run(PREPARE, source, tree)
    tap.check(out.returncode != 0 and
              os.path.basename(PATCHES[0]) in out.stdout, out.stdout)


@tap.case
def test_links():
    """every overlay file in the tree is a link to this repository"""
    for path in tracked('.c', '.h'):
        if path.startswith('hw/'):
            place = os.path.join(TREE, path)
            tap.check(os.path.realpath(place) ==
                      os.path.realpath(os.path.join(TOP, path)),
                      f'{place} is not {path}')


tap.main()
