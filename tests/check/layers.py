# SPDX-License-Identifier: GPL-2.0-or-later
"""The layers of hw/dedup and of the vhost-user relay: what their sources and
objects say of them.

A file is named by its path below hw/dedup/engine ("space/lock.c", "engine.c"),
one of the QEMU side or the relay by its path from the top ("hw/dedup/ram.c").
"""

import functools
import json
import os
import re

from checks import BUILD, OBJ, TOP, run, tracked
import tap

SIDE = 'hw/dedup/'
ENGINE = SIDE + 'engine/'
SIDE_HEADERS = 'include/hw/dedup/'
RELAY = 'hw/virtio/vhost-user-relay'
RELAY_HEADER = 'include/' + RELAY + '.h'

# From the top down.  A layer knows those behind it.
QEMU, FACE = 'qemu', 'face'
LAYERS = (FACE, 'scan', 'space', 'group', 'index', 'host')
# What follows the relay's name; '' is the relay itself
RELAY_PARTS = ('-qmp-cmds', '', '-internal', '-features', '-queue', '-guest',
               '-request', '-layout', '-area', '-ring')

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<][^">\n]+[">])', re.M)
COMMENT_OR_STRING = re.compile(
    r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)


def full(name):
    """The path of a file from the top of the project."""
    if name.startswith((SIDE, SIDE_HEADERS, RELAY, RELAY_HEADER)):
        return name
    return ENGINE + name


def layer_of(name):
    if name.startswith((SIDE, SIDE_HEADERS)):
        return QEMU
    return os.path.dirname(name) or FACE


def level(name):
    """How far up a file of the engine is: 0 for the lowest layer."""
    return len(LAYERS) - 1 - LAYERS.index(layer_of(name))


@functools.lru_cache
def engine_files(*suffixes):
    return [f[len(ENGINE):] for f in tracked(*(suffixes or ('.c', '.h')))
            if f.startswith(ENGINE)]


@functools.lru_cache
def side_files(*suffixes):
    return [f for f in tracked(*(suffixes or ('.c', '.h')))
            if f.startswith((SIDE, SIDE_HEADERS)) and
            not f.startswith(ENGINE)]


@functools.lru_cache
def relay_files(*suffixes):
    return [f for f in tracked(*(suffixes or ('.c', '.h')))
            if f.startswith(RELAY) or f == RELAY_HEADER]


def relay_level(name):
    """How far up a file of the relay is; None if it has no place."""
    part = os.path.splitext(name)[0][len(RELAY):]
    if name == RELAY_HEADER:
        # It declares what others may know, and is below what fills that in.
        part = '-internal'
    return (len(RELAY_PARTS) - 1 - RELAY_PARTS.index(part)
            if part in RELAY_PARTS else None)


def text(name):
    with open(os.path.join(TOP, full(name)), encoding='utf-8') as f:
        return f.read()


def code(name):
    """The text of a file without comments and strings, lines kept."""
    return COMMENT_OR_STRING.sub(
        lambda m: '""' if m.group()[0] == '"' else
        "' '" if m.group()[0] == "'" else ' ' + '\n' * m.group().count('\n'),
        text(name))


def comments(name):
    return [m.group() for m in COMMENT_OR_STRING.finditer(text(name))
            if m.group()[0] == '/']


class Includes:
    """Who includes which of our headers.

    named   [(file, as it is written there, the header or None)]
    graph   {file: set of headers}, ours only
    """

    def __init__(self):
        self.headers = set(engine_files('.h'))
        self.named = []
        self.graph = {}
        for name in engine_files() + side_files():
            self.graph[name] = set()
            for written in INCLUDE.findall(text(name)):
                header = self.find(name, written)
                self.named.append((name, written, header))
                if header:
                    self.graph[name].add(header)

    def find(self, name, written):
        """The header that @name means, None if it is not ours."""
        path = written[1:-1]
        own = os.path.dirname(full(name))
        for place in (ENGINE, SIDE, own, 'include', ''):
            if place == ENGINE and layer_of(name) == QEMU:
                continue
            found = os.path.normpath(os.path.join(place, path))
            if found.startswith(ENGINE) and found[len(ENGINE):] in self.headers:
                return found[len(ENGINE):]
            if found in side_files('.h'):
                return found
        # A bare name means the header of that name, wherever it is.
        if written[0] == '"' and '/' not in path:
            return min((h for h in self.headers
                        if os.path.basename(h) == path), default=None)
        return None


def commands(build, wanted):
    """[(source, object, command's words)] of a build's directory (in build/,
    unless it is a whole path), made there or not."""
    with open(os.path.join(BUILD, build, 'compile_commands.json'),
              encoding='utf-8') as f:
        entries = json.load(f)
    return [(os.path.realpath(os.path.join(c['directory'], c['file'])),
             os.path.join(c['directory'], c['output']), c)
            for c in entries if wanted(c['output'])]


class Calls:
    """Which object needs a symbol of which other one.

    graph   {file: {file: set of symbols}}
    where   {symbol: the file that defines it}
    stale   objects that are not there, or are older than their source
    """

    def __init__(self, objects):
        """@objects: {file: object}"""
        self.graph = {name: {} for name in objects}
        self.where = {}
        self.stale = []
        needs = {}
        for name, path in objects.items():
            source = os.path.join(TOP, full(name))
            if not os.path.exists(path) or \
                    os.path.getmtime(path) < os.path.getmtime(source):
                self.stale.append(name)
                continue
            needs[name] = set()
            for line in run('nm', '-P', '-g', path).stdout.splitlines():
                symbol, kind = line.split()[:2]
                if kind in 'Uwv':
                    needs[name].add(symbol)
                else:
                    self.where[symbol] = name
        for name, symbols in needs.items():
            for symbol in symbols:
                to = self.where.get(symbol)
                if to and to != name:
                    self.graph[name].setdefault(to, set()).add(symbol)


@functools.lru_cache
def engine_calls():
    found = commands('engine', lambda o: 'libdedup-engine.a.p/' in o)
    sources = engine_files('.c')
    objects = {name: None for name in sources}
    for source, path, _ in found:
        name = os.path.relpath(source, os.path.join(TOP, ENGINE))
        if name in objects:
            objects[name] = path
    return Calls({n: p or os.path.join(BUILD, 'engine', 'not-built', n)
                  for n, p in objects.items()})


def qemu_calls(directory, files):
    """Calls between files of a directory that is built within QEMU."""
    found = commands(OBJ, lambda o: re.search(
        r'\.p/%s[^/]*\.o$' % directory.replace('/', '_'), o))
    objects = {name: os.path.join(OBJ, 'not-built', name)
               for name in files}
    for _, path, c in found:
        name = directory + os.path.basename(c['file'])
        if name in objects:
            objects[name] = path
    return Calls(objects)


@functools.lru_cache
def side_calls():
    return qemu_calls(SIDE, side_files('.c'))


@functools.lru_cache
def relay_calls():
    return qemu_calls(os.path.dirname(RELAY) + '/', relay_files('.c'))


def circles(graph):
    """The circles of a graph: sets of nodes that all reach one another."""
    number, low, stack, found = {}, {}, [], []

    def visit(node):
        number[node] = low[node] = len(number)
        stack.append(node)
        for to in sorted(graph.get(node, ())):
            if to not in number:
                visit(to)
                low[node] = min(low[node], low[to])
            elif to in stack:
                low[node] = min(low[node], number[to])
        if low[node] == number[node]:
            at = stack.index(node)
            found.append(stack[at:])
            del stack[at:]

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return [c for c in found if len(c) > 1 or c[0] in graph.get(c[0], ())]


def ties(graph, circle):
    """The arrows within a circle, for a message."""
    return [f'{a} -> {b}' for a in sorted(circle)
            for b in sorted(set(graph[a]) & set(circle))]


def none(bad, todo):
    """Fail with what is @bad, a line each, and with what to do."""
    tap.check(not bad, '\n'.join(bad + ['-> ' + todo]))
