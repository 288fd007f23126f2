#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The fuzzers, for some seconds each: "make fuzz" runs them for longer."""

import os
import re
import shutil

from checks import BUILD, TOP, run
import tap

SCRIPT = os.path.join(TOP, 'scripts', 'fuzz')
FUZZERS = os.path.join(BUILD, 'engine-fuzz', 'tests', 'fuzz')
SECONDS = 5


def fuzz(name):
    """Its inputs, and some more."""
    if not shutil.which('clang'):
        tap.skip('no clang: apt install clang libclang-rt-dev, '
                 'then make fuzzers')
    if not os.path.exists(os.path.join(FUZZERS, name)):
        tap.check(name == 'fuzz-relay', f'{name} is not built: make fuzzers')
        tap.skip('QEMU is not built with tests: make check builds it')
    out = run(SCRIPT, '--seconds', str(SECONDS), name)
    tap.note(out.stdout)
    tap.check(out.returncode == 0, f'{name}: see above')
    tap.check(re.search(r'[1-9]\d* inputs', out.stdout), 'no inputs')


def add(name):
    def case():
        fuzz(name)
    case.__name__ = 'test_' + name.replace('-', '_')
    case.__doc__ = f'{name}: nothing fails in {SECONDS} s'
    tap.case(case)


for fuzzer in run(SCRIPT, '--list').stdout.split():
    add(fuzzer)

tap.main()
