#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What an outer guest of tests/kernels says is what its programs say."""

import contextlib
import io
import os
import shutil
import sys
import tempfile

from checks import TOP
import tap

sys.path.insert(0, os.path.join(TOP, 'tests', 'kernels'))
import inside                                   # noqa: E402


def said(commands, timeout=20):
    """The results that are handed on, without numbers, and how many failed."""
    inside.runner.LOGS = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda d=inside.runner.LOGS: shutil.rmtree(d))
    inside.Inner.count = inside.Inner.failures_of_all = 0
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        inside.Inner('p', ['sh', '-c', commands], timeout=timeout).run()
    lines = [line for line in out.getvalue().splitlines()
             if line.startswith(('ok ', 'not ok '))]
    tap.check(len(lines) == inside.Inner.count, out.getvalue())
    return ([line.split(' - ')[0].rstrip('0123456789 ') + ' ' +
             line.split(' - ')[1] for line in lines],
            inside.Inner.failures_of_all)


def expect(commands, lines, failures, **kwargs):
    got = said(commands, **kwargs)
    tap.check(got == (lines, failures), f'{commands!r}: {got}')


@tap.case
def test_results():
    """each result is handed on once, with the program's name"""
    expect('echo 1..3; echo ok 1 a; echo not ok 2 b; '
           'echo "ok 3 - c # SKIP no kvm"; exit 1',
           ['ok p: a', 'not ok p: b', 'ok p: c # SKIP no kvm'], 1)
    expect('echo "1..0 # SKIP nothing here"',
           ['ok p # SKIP nothing here'], 0)


@tap.case
def test_bad_ends():
    """a crash, a broken plan and a hang are failures"""
    expect('echo 1..1; echo ok 1 a; kill -SEGV $$',
           ['ok p: a', 'not ok p: killed by signal 11'], 1)
    expect('echo 1..2; echo ok 1 a',
           ['ok p: a', 'not ok p: 1 results of 2 planned'], 1)
    expect('echo 1..1; sleep 600', ['not ok p: no end within 2 s'], 1,
           timeout=2)


tap.main()
