#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""How the QEMU tree is made: scripts/prepare-tree and the patches."""

import os

from checks import (BUILD, TOP, TREE, run, scratch, series, small_source,
                    tracked)
import tap

PREPARE = os.path.join(TOP, 'scripts', 'prepare-tree')


USUAL = '10.0'


def source_tree():
    full = os.path.join(BUILD, 'fetch')
    with open(os.path.join(full, 'directory'), encoding='ascii') as f:
        return small_source(os.path.join(full, f.read().strip()), USUAL)


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
def test_twice():
    """applying twice changes nothing, and the source is left alone"""
    need_fetched()
    source, tree = source_tree(), scratch()
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
    source, tree = source_tree(), scratch()
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
def test_no_source():
    """a directory that is no QEMU source is refused by name"""
    source, tree = scratch(), scratch()
    out = run(PREPARE, source, tree)
    tap.check(out.returncode != 0 and source in out.stdout, out.stdout)


@tap.case
def test_in_the_way():
    """a file that stands where an overlay file goes is refused by name"""
    need_fetched()
    source, tree = source_tree(), scratch()
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
    source, tree = source_tree(), scratch()
    with open(os.path.join(source, 'hw/meson.build'), 'w',
              encoding='ascii') as f:
        f.write('# nothing of the sort\n')
    out = run(PREPARE, source, tree)
    tap.check(out.returncode != 0 and
              os.path.basename(series(USUAL)[0]) in out.stdout, out.stdout)


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
