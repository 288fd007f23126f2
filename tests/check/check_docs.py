#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the documents and comments name is there."""

import os
import re

from checks import TOP, tracked
from layers import code, comments, engine_files, full, none, side_files
import tap

MAP = 'docs/devel/dedup.rst'
QUOTED = re.compile(r'``(.+?)``', re.S)
SOURCE = re.compile(r'[\w./*-]*[\w*-]\.[ch]\b')
# Ours have such names; what else is quoted may be the system's.
FUNCTION = re.compile(r'\b(?:dedup|ram_guard)_\w+\b|\bDedup[A-Z]\w+\b')


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


@tap.case
def test_files_documents():
    """every source that a document quotes exists"""
    files = tracked('.c', '.h')
    found = [(path, line, name) for path, line, words in quoted()
             for name in SOURCE.findall(words)]
    tap.check(len(found) > 50, 'nothing is quoted?')
    none([f'{path}:{line}: {name}' for path, line, name in found
          if not is_there(name, files)],
         'name the file that has it now')


@tap.case
def test_files_comments():
    """every source that a comment of hw/dedup names exists"""
    files = tracked('.c', '.h')
    found = [(name, source) for name in engine_files() + side_files()
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
    for name in engine_files() + side_files():
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
    """the map of docs/devel/dedup.rst has every source of hw/dedup"""
    names = {os.path.basename(name) for path, _, quote in quoted()
             if path == MAP for name in SOURCE.findall(quote)}
    none([full(f) for f in engine_files('.c') + side_files('.c')
          if os.path.basename(f) not in names],
         f'tell in a line of {MAP}, "The parts", what is in it')


tap.main()
