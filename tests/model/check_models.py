#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Verify the models of tests/model with SPIN: the good ones, and every mutant.

usage: check_models.py [NAME...]

A good model holds in all of its states.  A mutant lacks a guard: it must fail.
Speaks TAP, a line for each verification with its states and seconds.  A NAME
selects those whose name contains it.  What is behind them, and their bounds, is
in docs/devel/dedup-model.rst; $KEEP=DIR keeps what SPIN makes, and its trails.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

MODELS = os.path.dirname(os.path.abspath(__file__))
# These bound a hang, on a host that may do other work.
TIMEOUT = 1800
MEMORY_MB = 2000
DEPTH = 1000000

# (model, options, (mutants, which must fail))
PLAN = [
    ('window', '', 'M1 M2 M3 M4 M5 M7 M9 M11 M15 M16 M24 X1 X4 FAST_KSM=true'),
    ('window', 'ANON', 'M1 M2 M3 M5 M15 M16 X2 X3 X4'),
    ('window', 'MPROTECT', 'M3 M4 M5 M9 M11 M21 M22 M24 X1 X4'),
    ('window', 'ANON MPROTECT', 'M3 M5 M21 M22 X4'),
    ('life', '', 'M5 M8 M12 X11 X12 X14 X15 X16 X17'),
]


def name_of(model, options, mutant):
    return ' '.join([model] + options.split() + ([mutant] if mutant else []))


def plan():
    """[(model, options, mutant or None)], what takes long first"""
    good = [(model, options, None) for model, options, _ in PLAN]
    return good + [(model, options, mutant) for model, options, mutants in PLAN
                   for mutant in mutants.split()]


def run(command, **kwargs):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.STDOUT, check=False, **kwargs)


def verify(model, options, mutant, directory):
    """(what is wrong with it, or None; what it says about itself)"""
    defines = ['-D' + word for word in options.split()]
    if mutant:
        defines += ['-D' + word for word in
                    re.sub(r'(?<=\d)(?=X)', ' ', mutant).split()]
    source = os.path.join(MODELS, model + '.pml')
    steps = [['spin'] + defines + ['-a', source],
             # A mutant fails soon: what counts is how long it compiles.
             ['gcc', '-w', '-O0' if mutant else '-O1', '-DSAFETY',
              f'-DMEMLIM={MEMORY_MB}', '-o', 'pan', 'pan.c'],
             ['./pan', f'-m{DEPTH}', '-c1']]
    start = time.monotonic()
    for step in steps:
        try:
            out = run(step, cwd=directory, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return f'{step[0]}: no end within {TIMEOUT} s', ''
        if out.returncode and step[0] != './pan':
            return f'{" ".join(step)}: {out.stdout}', ''
    text = out.stdout
    errors = re.search(r'errors: (\d+)', text)
    states = re.search(r'(\d+) states, stored', text)
    if not errors or not states:
        return f'pan: {text}', ''
    said = f'{states.group(1)} states, {time.monotonic() - start:.1f} s'
    whole = not re.search(r'Search not completed|max search depth too small',
                          text)
    why = re.search(r'^pan:1: (.*?)(?: \(at depth \d+\))?$', text, re.M)
    if mutant:
        if not why:
            return 'it does not fail', said
        return None, f'{said}, fails: {why.group(1)[:60]}'
    if why or int(errors.group(1)):
        trail = run(['spin'] + defines + ['-t', '-p', source], cwd=directory)
        return f'{why.group(1) if why else text}\n{trail.stdout[-4000:]}', said
    return None if whole else f'not all states were seen:\n{text}', said


def one(what):
    keep = os.environ.get('KEEP')
    if keep:
        directory = os.path.join(keep, name_of(*what).replace(' ', '-'))
        os.makedirs(directory, exist_ok=True)
        return verify(*what, directory)
    directory = tempfile.mkdtemp(prefix='dedup-model-')
    try:
        return verify(*what, directory)
    finally:
        shutil.rmtree(directory)


def main():
    wanted = [what for what in plan()
              if not sys.argv[1:] or
              any(word in name_of(*what) for word in sys.argv[1:])]
    if not wanted:
        sys.exit('check_models.py: no such verification')
    if not shutil.which('spin'):
        sys.exit('check_models.py: there is no spin: apt install spin')
    print(f'1..{len(wanted)}', flush=True)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, (what, (wrong, said)) in enumerate(
                zip(wanted, pool.map(one, wanted)), 1):
            failed += bool(wrong)
            print(f'{"not ok" if wrong else "ok"} {i} - {name_of(*what)} '
                  f'({said})', flush=True)
            if wrong:
                print('# ' + wrong.replace('\n', '\n# '), flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
