#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine is one chain of layers; the QEMU side is one of files, and so is
the vhost-user relay."""

import difflib
import os
import re
import shlex
import subprocess

from checks import TOP, script, tracked
from layers import (ENGINE, INCLUDE, LAYERS, QEMU, RELAY, RELAY_HEADER, SIDE,
                    Includes, circles, code, commands, engine_calls,
                    engine_files, full, layer_of, level, none, relay_calls,
                    relay_files, relay_level, side_calls, text, ties)
import tap

MOST_LINES = 600
MOST_MEMBERS = 24


@tap.case
def test_folders():
    """every file of the engine is in a layer"""
    none([full(f) for f in engine_files('')
          if layer_of(f) not in LAYERS],
         f'put it into a layer: {", ".join(LAYERS[1:])}, or the face')
    for layer in LAYERS:
        tap.check([f for f in engine_files('.c') if layer_of(f) == layer],
                  f'{layer}: no files?')


@tap.case
def test_includes_down():
    """a file includes headers of its own layer and of layers further down"""
    none([f'{full(f)}: {written} is {layer_of(h)}\'s'
          for f, written, h in Includes().named
          if h and QEMU not in (layer_of(f), layer_of(h)) and
          level(h) > level(f)],
         'a lower layer is called, or registers a callback: it names nothing '
         'above it')


@tap.case
def test_includes_side():
    """the QEMU side includes engine/engine.h, nothing else of the engine"""
    includes = Includes()
    none([f'{f}: {written}' for f, written, h in includes.named
          if layer_of(f) == QEMU and h and layer_of(h) != QEMU and
          (written != '"engine/engine.h"' or not f.startswith(SIDE))],
         'include "engine/engine.h", or add to it what is missing')
    none([f'{full(f)}: {written}' for f, written, h in includes.named
          if layer_of(f) != QEMU and
          (written[0] == '"' if h is None else layer_of(h) == QEMU)],
         'the engine has no header but its own and, in <>, the system\'s')


@tap.case
def test_includes_form():
    """an include names the header by its path, as "host/page.h" does"""
    none([f'{full(f)}: {written} -> "{h}"'
          for f, written, h in Includes().named
          if h and layer_of(f) != QEMU and written != f'"{h}"'],
         'name it by its path from hw/dedup/engine')


@tap.case
def test_internal():
    """NAME-internal.h is included within its folder only; no internal.h"""
    none([f'{full(f)}: {written}' for f, written, h in Includes().named
          if h and h.endswith('-internal.h') and
          os.path.dirname(full(f)) != os.path.dirname(full(h))],
         'use the layer\'s own header, or move the declaration there')
    none([f for f in tracked('/internal.h') if f.startswith('hw/')],
         'one header for everything: give each source one of its own')


@tap.case
def test_include_circles():
    """no header includes itself by way of others"""
    graph = Includes().graph
    none([', '.join(ties(graph, c)) for c in circles(graph)],
         'move what both need into a header below them')


@tap.case
def test_headers_alone():
    """every header of the engine compiles alone"""
    source, _, c = commands('engine',
                            lambda o: 'libdedup-engine.a.p/' in o)[0]
    tap.check(source.startswith(os.path.join(TOP, ENGINE)),
              f'{source}: build/engine was not made for this tree')
    words = shlex.split(c['command'])
    if os.path.basename(words[0]) == 'ccache':
        words.pop(0)
    words = [words[0]] + [w for w in words
                          if w.startswith(('-I', '-D', '-W', '-std=', '-f'))]
    bad = []
    headers = engine_files('.h')
    for h in headers:
        out = subprocess.run(
            [*words, '-fsyntax-only', '-x', 'c', '-'], text=True,
            input=f'#include "{os.path.join(TOP, full(h))}"\n',
            cwd=c['directory'], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False)
        if out.returncode or out.stdout:
            bad.append(f'{full(h)}: {out.stdout}')
    none(bad, 'the header includes what it names')
    tap.note(f'{len(headers)} headers')


def fresh(calls, target):
    none([full(f) for f in calls.stale],
         f'not built, or older than the source: make {target}')


def no_circle(calls):
    graph = calls.graph
    none([f'{tie} ({", ".join(sorted(calls.graph[a][b]))})'
          for c in circles(graph) for tie in ties(graph, c)
          for a, b in [tie.split(' -> ')]],
         'these call each other in a circle: move what both need into a file '
         'below, or let the lower one be told by a callback')
    tap.note(f'{len(graph)} objects, '
             f'{sum(len(to) for to in graph.values())} arrows')


@tap.case
def test_engine_calls():
    """no file of the engine calls in a circle, or up the chain"""
    calls = engine_calls()
    fresh(calls, 'engine')
    none([f'{full(f)} calls {", ".join(sorted(symbols))} of {full(to)}'
          for f, tos in calls.graph.items() for to, symbols in tos.items()
          if level(to) > level(f)],
         'return a value, or take a callback: the layer above calls')
    no_circle(calls)


@tap.case
def test_side_calls():
    """no file of the QEMU side calls in a circle"""
    calls = side_calls()
    fresh(calls, 'qemu')
    no_circle(calls)


@tap.case
def test_side_order():
    """dedup-internal.h names the files in the order in which they call"""
    header = text(SIDE + 'dedup-internal.h')
    head = header[:header.index('Each calls only those above it')]
    order = {SIDE + name: i for i, name in
             enumerate(['ram-guard.c'] + re.findall(r'[\w-]+\.c\b', head))}
    calls = side_calls()
    fresh(calls, 'qemu')
    none([f for f in calls.graph if f not in order],
         f'name it in {SIDE}dedup-internal.h')
    none([f'{f} calls {", ".join(sorted(symbols))} of {to}'
          for f, tos in calls.graph.items() for to, symbols in tos.items()
          if order[to] >= order[f]],
         f'correct the order in {SIDE}dedup-internal.h')


@tap.case
def test_relay():
    """each part of the relay includes and calls those below it only"""
    files = relay_files()
    tap.check(len(files) > 6, 'no relay?')
    none([f for f in files if relay_level(f) is None],
         'give it a place in RELAY_PARTS of layers.py')
    headers = {os.path.basename(f): f for f in files if f != RELAY_HEADER}
    headers[RELAY_HEADER.removeprefix('include/')] = RELAY_HEADER
    none([f'{f}: {written}' for f in files
          for written in INCLUDE.findall(text(f))
          if written[1:-1] in headers and
          relay_level(headers[written[1:-1]]) > relay_level(f)],
         'what both need belongs into the lower one')
    calls = relay_calls()
    fresh(calls, 'qemu')
    none([f'{f} calls {", ".join(sorted(symbols))} of {to}'
          for f, tos in calls.graph.items() for to, symbols in tos.items()
          if relay_level(to) >= relay_level(f)],
         'return a value, or take a callback: what is above calls')
    tap.check(sum(len(to) for to in calls.graph.values()) > 5, 'no calls?')


@tap.case
def test_length():
    """no file has more than 600 lines"""
    bad = []
    for path in tracked(''):
        if path.startswith(('hw/', 'include/', 'qapi/', 'tests/')):
            with open(os.path.join(TOP, path), 'rb') as f:
                lines = f.read().count(b'\n')
            if lines > MOST_LINES:
                bad.append(f'{path}: {lines} lines')
    none(bad, f'more than {MOST_LINES}: take a part out that has a name')


def structs(name):
    """(name, members) of every struct that a file defines."""
    source = re.sub(r'^[ \t]*#(?:.*\\\n)*.*', '', code(name), flags=re.M)
    for m in re.finditer(r'\bstruct\s+(\w*)\s*(?:\w+\s*)?\{', source):
        depth, flat, at = 1, '', m.end()
        while depth and at < len(source):
            c = source[at]
            if c in ')}]':
                depth -= 1
            if depth == 1:
                flat += c
            if c in '({[':
                depth += 1
            at += 1
        tail = re.match(r'[^;{}()]*', source[at:]).group().split()
        members = sum(1 + part.count(',') for part in flat.split(';')
                      if part.strip(' \n\t)}]'))
        yield m.group(1) or (tail[-1] if tail else '?'), members


@tap.case
def test_structs():
    """no struct of the engine has 25 members or more"""
    found = [(name, s, n) for name in engine_files()
             for s, n in structs(name)]
    tap.check(len(found) > 50, f'only {len(found)} structs?')
    none([f'{full(name)}: struct {s} has {n} members'
          for name, s, n in found if n > MOST_MEMBERS],
         'make structs of the members that belong together')
    name, s, n = max(found, key=lambda f: f[2])
    tap.note(f'{len(found)} structs; largest: {s} in {name}, {n}')


@tap.case
def test_remap_lock():
    """only space/ takes the remap lock"""
    lock = re.compile(r'\bdedup_space_(?:un)?lock(?:_to_read)?\b')
    files = engine_files() + [f for f in tracked('.c', '.h')
                              if f.startswith(SIDE) and
                              not f.startswith(ENGINE)]
    tap.check([f for f in files if layer_of(f) == 'space' and
               lock.search(code(f))], 'does space/ not take it?')
    none([full(f) for f in files if layer_of(f) != 'space' and
          lock.search(code(f))],
         'add a function to space/space.h that takes the lock itself')


@tap.case
def test_picture():
    """docs/devel/dedup-layers.svg shows the layers as they are"""
    calls = engine_calls()
    fresh(calls, 'engine')
    draw = script('draw-layers')
    sources = draw.Sources()
    with open(draw.PICTURE, encoding='utf-8') as f:
        drawn = f.read()
    none([line for line in difflib.unified_diff(
        draw.described(drawn).split('\n'), sources.description().split('\n'),
        'drawn', 'sources', n=0, lineterm='') if line[0] in '+-'],
         'run scripts/draw-layers')
    tap.check(drawn == draw.picture(sources),
              'edited, or drawn otherwise by now: run scripts/draw-layers')


tap.main()
