#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/run-tests sees every way in which a test program can fail."""

import contextlib
import io
import os
import shutil
import tempfile
import time

from checks import script
import tap

run_tests = script('run-tests')


def outcome(commands, timeout=20):
    """(passed, failed, skipped) of a shell script."""
    run_tests.LOGS = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda d=run_tests.LOGS: shutil.rmtree(d))
    program = run_tests.Program('fake', ['sh', '-c', commands],
                                timeout=timeout)
    with contextlib.redirect_stdout(io.StringIO()):
        program.run()
    return program.passed, program.failed, program.skipped


def expect(commands, result, **kwargs):
    got = outcome(commands, **kwargs)
    tap.check(got == result, f'{commands!r}: {got}, not {result}')


@tap.case
def test_counts():
    """ok, not ok and skipped are counted one by one"""
    expect('echo 1..1; echo ok 1 a', (1, 0, 0))
    expect('echo 1..3; echo ok 1 a; echo "ok 2 - b # SKIP no kvm"; echo ok 3',
           (2, 0, 1))
    expect('echo 1..2; echo ok 1 a; echo not ok 2 b; exit 1', (1, 1, 0))
    expect('echo "1..0 # SKIP nothing here"', (0, 0, 1))
    expect('echo ok 1 a; echo 1..1', (1, 0, 0))


@tap.case
def test_subtests():
    """the lines of a subtest are its own"""
    expect('echo 1..1; echo "    ok 1 x"; echo "    not ok 2 y"; echo ok 1 a',
           (1, 0, 0))


@tap.case
def test_lanes():
    """two lanes run beside each other, a lane's programs one by one"""
    run_tests.LOGS = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda d=run_tests.LOGS: shutil.rmtree(d))
    pipe = os.path.join(run_tests.LOGS, 'pipe')
    os.mkfifo(pipe)
    mark = os.path.join(run_tests.LOGS, 'mark')
    # Opening a pipe waits for its other end.
    writer, reader, later, last = [
        run_tests.Program(name, ['sh', '-c', 'echo 1..1; %s && echo ok' % does],
                          timeout=20)
        for name, does in (('writer', ': > ' + pipe),
                           ('reader', ': < %s && : > %s' % (pipe, mark)),
                           ('later', 'test -e ' + mark),
                           ('last', 'test -e ' + mark))]
    with contextlib.redirect_stdout(io.StringIO()):
        run_tests.run_lanes((1, [writer]), (1, [reader, later]))
        run_tests.run_lanes((2, [last]))
    for program in writer, reader, later, last:
        tap.check(program.passed == 1 and not program.failed,
                  '%s: %s' % (program.name, program.failures))


@tap.case
def test_bad_ends():
    """a crash, a bad status, a bail-out, a broken plan are failures"""
    expect('echo 1..1; echo ok 1 a; kill -SEGV $$', (1, 1, 0))
    expect('echo 1..1; echo ok 1 a; exit 3', (1, 1, 0))
    expect('echo 1..2; echo ok 1 a; echo "Bail out! tired"', (1, 1, 0))
    expect('echo 1..2; echo ok 1 a', (1, 1, 0))
    expect('echo 1..1; echo ok 1 a; echo ok 2 b', (2, 1, 0))
    expect('echo ok 1 a', (1, 1, 0))
    expect('true', (0, 1, 0))
    expect('echo 1..1', (0, 1, 0))


@tap.case
def test_time_out():
    """a program that does not end is ended, with what it started"""
    start = time.monotonic()
    expect('echo 1..2; echo ok 1 a; sleep 600 & sleep 600', (1, 1, 0),
           timeout=2)
    tap.check(time.monotonic() - start < 15, 'waited for its children')


tap.main()
