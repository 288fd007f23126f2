#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the documents and comments name is there."""

import os
import re

from checks import TOP, tracked
from layers import (code, comments, engine_files, full, none, relay_files,
                    side_files)
import tap

# Document -> the sources that it has a map of
MAPS = {
    'docs/devel/dedup.rst': lambda: engine_files('.c') + side_files('.c'),
    'docs/devel/vhost-user-relay.rst': lambda: relay_files('.c'),
}
QUOTED = re.compile(r'``(.+?)``', re.S)
SOURCE = re.compile(r'[\w./*-]*[\w*-]\.[ch]\b')
# Ours have such names; what else is quoted may be the system's.
FUNCTION = re.compile(r'\b(?:dedup|ram_guard|vhost_user_relay)_\w+\b|'
                      r'\b(?:Dedup[A-Z]|VhostUserRelay)\w+\b')


def read(path):
    with open(os.path.join(TOP, path), encoding='utf-8') as f:
        return f.read()


def is_there(path, files):
    """Is it the end of a file's path?  It may have "*"."""
    pattern = re.compile('(?:^|/)' + re.escape(path).replace(r'\*', '[^/]*') +
                         '$')
    return any(pattern.search(f) for f in files)


def quoted():
    """(document, line, what is quoted there)"""
    for path in tracked('.rst'):
        if path.startswith('docs/'):
            text = read(path)
            for m in QUOTED.finditer(text):
                yield path, text.count('\n', 0, m.start()) + 1, m.group(1)


def known_files():
    """Our sources, and those of QEMU that a patch of ours changes."""
    patched = {name for path in tracked('.patch')
               for name in re.findall(r'^--- a/(\S+\.[ch])$', read(path),
                                      re.M)}
    return tracked('.c', '.h') + sorted(patched)


@tap.case
def test_files_documents():
    """every source that a document quotes exists"""
    files = known_files()
    found = [(path, line, name) for path, line, words in quoted()
             for name in SOURCE.findall(words)]
    tap.check(len(found) > 50, 'nothing is quoted?')
    none([f'{path}:{line}: {name}' for path, line, name in found
          if not is_there(name, files)],
         'name the file that has it now')


@tap.case
def test_files_comments():
    """every source that a comment of hw/ names exists"""
    files = known_files()
    found = [(name, source)
             for name in engine_files() + side_files() + relay_files()
             for comment in comments(name)
             for source in SOURCE.findall(comment)
             if not source.startswith('linux/')]
    tap.check(len(found) > 50, 'nothing is named?')
    none([f'{full(name)}: {source}' for name, source in found
          if not is_there(source, files)],
         'name the file that has it now')


@tap.case
def test_functions():
    """every function and type of ours that a document quotes exists"""
    words = set()
    for name in engine_files() + side_files() + relay_files():
        words |= set(re.findall(r'\w+', code(name)))
    # Commands, trace events.
    for path in tracked('.patch', '.json', '/trace-events'):
        words |= set(re.findall(r'\w+', read(path)))
    found = [(path, line, name) for path, line, quote in quoted()
             for name in FUNCTION.findall(quote)]
    tap.check(found, 'nothing is quoted?')
    none([f'{path}:{line}: {name}' for path, line, name in found
          if name not in words],
         'name the function that does it now')


@tap.case
def test_map():
    """the maps in docs/devel have every source of hw/dedup and of the relay"""
    for document, sources in MAPS.items():
        names = {os.path.basename(name) for path, _, quote in quoted()
                 if path == document for name in SOURCE.findall(quote)}
        none([full(f) for f in sources() if os.path.basename(f) not in names],
             f'tell in a line of {document}, "The parts", what is in it')


tap.main()
