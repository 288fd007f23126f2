#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The models of tests/model name functions that are there, and what they can
leave out is verified and documented."""

import importlib.util
import os
import re

from checks import TOP, tracked
from layers import code, engine_files, none, side_files
import tap

DOCUMENTS = ('docs/devel/dedup-model.rst', 'docs/devel/dedup-mutants.rst')
COMMENT = re.compile(r'/\*.*?\*/', re.S)
# "file.c: function(), function()"; what follows a file is its functions
NAMED = re.compile(r'([\w-]+\.c): ((?:\w+\(\)[,;]?\s*)+)')
# An option that leaves out a guard
OPTION = re.compile(r'^#\s*(?:if|ifdef|ifndef)\b(.*)$', re.M)


def read(path):
    with open(os.path.join(TOP, path), encoding='utf-8') as f:
        return f.read()


def models(*suffixes):
    return [f for f in tracked(*(suffixes or ('.pml',)))
            if f.startswith('tests/model/')]


def runner():
    path = os.path.join(TOP, 'tests', 'model', 'check_models.py')
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location('check_models', path))
    module.__spec__.loader.exec_module(module)
    return module


def options(model):
    """The mutants that a model has."""
    text = read(model)
    for name in re.findall(r'^#include "(.+)"', text, re.M):
        text += read(f'tests/model/{name}')
    return {m for line in OPTION.findall(text)
            for m in re.findall(r'\b(?:[MX]\d+|FAST_KSM)\b', line)}


@tap.case
def test_functions():
    """every function that a model names is defined in the file that it names"""
    sources = {os.path.basename(name): name
               for name in engine_files('.c') + side_files('.c')}
    found = []
    for model in models('.pml', '.inc'):
        text = read(model)
        for comment in COMMENT.findall(text):
            words = ' '.join(comment.replace('\n *', '\n').split())
            for name, functions in NAMED.findall(words):
                found += [(model, name, f)
                          for f in re.findall(r'(\w+)\(\)', functions)]
    tap.check(len(found) > 40, f'only {len(found)} functions are named?')
    bad = []
    for model, name, function in found:
        if name not in sources:
            bad.append(f'{model}: {name}')
        elif not re.search(r'^[\w *]*\b' + function + r'\(',
                           code(sources[name]), re.M):
            bad.append(f'{model}: {name}: {function}()')
    none(sorted(set(bad)),
         'look whether the model still does what the code does, then name it')


@tap.case
def test_options():
    """every guard that a model can leave out is left out by a verification"""
    planned = {}
    for model, _, mutants in runner().PLAN:
        planned.setdefault(f'tests/model/{model}.pml', set()).update(
            re.findall(r'\b(?:[MX]\d+|FAST_KSM)\b', mutants))
    tap.check(sorted(planned) == models(), f'{sorted(planned)} are verified')
    none([f'{model}: {sorted(options(model) ^ planned[model])}'
          for model in models() if options(model) != planned[model]],
         'list it in PLAN of tests/model/check_models.py')
    text = ''.join(read(d) for d in DOCUMENTS)
    # "M1" to "M9", and "10"
    known = re.findall(r'^M?(\d+)  ', text, re.M)
    none([f'{model}: {m}' for model in models() for m in options(model)
          if m[1:] not in known and not re.search(rf'^{m} ', text, re.M)],
         f'tell of it in {" or ".join(DOCUMENTS)}')


tap.main()
