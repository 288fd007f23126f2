#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Every row of docs/devel/dedup-hazards.rst has a guard and a test, and every
test that it names is in the sources."""

import fnmatch
import functools
import itertools
import os
import re

from checks import TOP
from layers import none
import tap

DOCUMENT = 'docs/devel/dedup-hazards.rst'
CASES = [f'C{n}' for n in range(1, 27)]
# A section, or the heading of a list at the end
HEADING = re.compile(r'^(?:([A-Z])\. )?(.+)\n-{4,}$', re.M)
# "program: case, case"
TEST = re.compile(r'``((?:\w+/)?[\w-]+(?:\.py)?): ([^`]+)``')
NO_TEST = 'No test'
PARTLY = 'Not tested:'

COMMENT = re.compile(r'/\*.*?\*/', re.S)
STRING = re.compile(r'"((?:\\.|[^"\\\n])*)"')
# g_test_add_func("/a/b", ...), and functions of ours that hand it on
ADDED = re.compile(r'\b\w*add\w*\s*\(\s*"([^"\n]+)"')
BUILT = re.compile(r'\bg_strdup_printf\s*\(\s*"([^"\n]*%s[^"\n]*)"')
PYTHON = re.compile(r'^@tap\.case\ndef (\w+)\(', re.M)
CITED = re.compile(r'\bC(?:[1-9]|1\d|2[0-6])\b')
# Has the names of the kinds of memory
KINDS = 'tests/unit/engine-fixture.c'


@functools.lru_cache(maxsize=None)
def read(path):
    with open(os.path.join(TOP, path), encoding='utf-8') as f:
        return f.read()


@functools.lru_cache(maxsize=None)
def sections():
    """[(letter or None, title, text)]"""
    text = read(DOCUMENT)
    found = list(HEADING.finditer(text))
    ends = [m.start() for m in found[1:]] + [len(text)]
    return [(m.group(1), m.group(2), text[m.end():end])
            for m, end in zip(found, ends)]


@functools.lru_cache(maxsize=None)
def rows():
    """[(letter of the section, [cell, ...])], without the tables' heads"""
    found = []
    for letter, _, text in sections():
        for row in re.split(r'^   \* - ', text, flags=re.M)[2:]:
            cells = re.split(r'\n     - ', row.rstrip())
            found.append((letter, [' '.join(c.split()) for c in cells]))
    return found


def name_of(row):
    return row[1][0].split(':')[0]


def tests_of(row):
    """[(program, case)]"""
    return [(program, case.strip())
            for program, cases in TEST.findall(row[1][-1])
            for case in cases.split(',')]


def source_of(program):
    """The path of a test program's source; None: there is none."""
    if '/' in program:
        places = [f'tests/{program}', f'tests/{program}.c']
    else:
        places = [f'tests/unit/{program}.c', f'tests/unit-qemu/{program}.c']
    return next((p for p in places if os.path.isfile(os.path.join(TOP, p))),
                None)


@functools.lru_cache(maxsize=None)
def code_of(path):
    return COMMENT.sub('', read(path))


def is_built(case, path):
    """Is it made of parts, with "%s" for some, and is each part a string?"""
    strings = set(STRING.findall(code_of(path)) +
                  STRING.findall(code_of(KINDS))) | {'*'}
    for template in BUILT.findall(code_of(path)):
        pattern = re.escape(template).replace('%s', '([^/]+)')
        m = re.fullmatch(pattern, case)
        if m and all(part in strings for part in m.groups()):
            return True
    return False


def is_there(program, case):
    path = source_of(program)
    if not path:
        return False
    if path.endswith('.py'):
        return case in PYTHON.findall(read(path))
    return (bool(fnmatch.filter(ADDED.findall(code_of(path)), case)) or
            is_built(case, path))


@tap.case
def test_rows():
    """every row has a name, a hazard, a guard and a test"""
    tap.check(len(rows()) > 90, f'only {len(rows())} rows?')
    bad = []
    for row in rows():
        cells = row[1]
        if len(cells) != 3 or not all(cells):
            bad.append(f'{name_of(row)}: {len(cells)} cells, or an empty one')
        elif not tests_of(row) and not cells[2].startswith(NO_TEST):
            bad.append(f'{name_of(row)}: neither a test nor "{NO_TEST}"')
    none(bad, f'each row of {DOCUMENT} is hazard, guard, test')


@tap.case
def test_names():
    """sections A to H, and the cases C1 to C26, are complete and in order"""
    letters = [letter for letter, _, _ in sections() if letter]
    tap.check(letters[:9] == list('ABCDEFGHI'), f'sections {letters}')
    bad = []
    for letter, group in itertools.groupby(rows(), lambda row: row[0]):
        names = [name_of(row) for row in group]
        want = CASES if letter == 'I' else \
            [f'{letter}.{n}' for n in range(1, len(names) + 1)]
        if names != want:
            bad.append(f'section {letter}: lacks '
                       f'{sorted(set(want) - set(names))}, or out of order')
    none(bad, f'number the rows of {DOCUMENT}; each case has one')


@tap.case
def test_tests():
    """every test that is named is in the sources"""
    found = [(name_of(row), program, case)
             for row in rows() for program, case in tests_of(row)]
    tap.check(len(found) > 200, f'only {len(found)} tests?')
    none([f'{name}: {program}: {case}' for name, program, case in found
          if not is_there(program, case)],
         'name the test that sees it now')


@tap.case
def test_untested():
    """what has no test, or lacks a part of one, is listed at the end"""
    lists = {title: text for letter, title, text in sections() if not letter}
    text = lists.get('Without a test')
    tap.check(text, 'no list of what is without a test')
    whole, part = text.split('\nIn part ')
    for listed, said in (
            (re.findall(r'^- ([A-Z]\.?\d+):', whole, re.M),
             [name_of(r) for r in rows() if r[1][-1].startswith(NO_TEST)]),
            (re.findall(r'\b[A-Z]\.?\d+\b', part),
             [name_of(r) for r in rows() if PARTLY in r[1][-1]])):
        tap.check(listed == said, f'listed: {listed}; rows: {said}')


@tap.case
def test_cited():
    """a case is cited by one of its tests; who cites one is named there"""
    programs = {name_of(row): {source_of(program)
                               for program, _ in tests_of(row)} - {None}
                for row in rows() if row[0] == 'I'}
    cited = {path: set(CITED.findall(read(path)))
             for path in set().union(*programs.values())}
    bad = [f'{name}: {", ".join(sorted(paths))}'
           for name, paths in programs.items()
           if paths and not any(name in cited[p] for p in paths)]
    bad += [f'{path}: {name}' for path, names in sorted(cited.items())
            for name in sorted(names) if path not in programs.get(name, ())]
    none(bad, 'a comment of the test says which case it is')


tap.main()
