#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the outer guest runs: test programs one after the other, as one TAP.

Each result of a program becomes one of ours, with the program's name before it.
What a test needs of a kernel and does not get is a skip with the reason.
On the kernel's command line: "tests=NAME,..." as run-tests takes them, or
NAME:CASE for one case of it; "long": those of the engine's that are not in "make
check-engine", too; "patience=N": anything may take so many times longer than on
the host.
"""

import os
import subprocess
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
sys.path.insert(0, os.path.join(TOP, 'tests', 'check'))
from checks import script                       # noqa: E402

SWAP = 512 << 20
# An outer guest is slow.
STRESS = ['--operations=5000', '--pages=512']
ENGINE = os.path.join(TOP, 'build', 'engine')


runner = script('run-tests')


class Inner(runner.Program):
    """A program whose results are handed on."""

    count = failures_of_all = 0

    @classmethod
    def say(cls, good, name, skip=None):
        cls.count += 1
        cls.failures_of_all += not good
        print('%sok %d - %s%s' % ('' if good else 'not ', cls.count, name,
                                  ' # SKIP ' + skip if skip else ''),
              flush=True)

    def line(self, line):
        before = self.passed, self.failed, self.skipped
        super().line(line)
        passed, failed, _ = (a - b for a, b in zip(
            (self.passed, self.failed, self.skipped), before))
        if (self.passed, self.failed, self.skipped) == before:
            return
        if passed or failed:
            self.say(passed, '%s: %s' % (self.name, self.last))
        elif self.plan == 0:
            self.say(True, self.name, self.skips[-1].removeprefix('SKIP '))
        else:
            name, _, why = self.skips[-1].partition(': ')
            self.say(True, '%s: %s' % (self.name, name), why)

    def broken(self, why):
        super().broken(why)
        self.say(False, '%s: %s' % (self.name, why))

    def report(self, seconds, log):
        print('# %s: %d passed, %d failed, %d skipped, %.1f s' %
              (self.name, self.passed, self.failed, self.skipped, seconds),
              flush=True)
        if self.failed:
            with open(log, encoding='utf-8') as f:
                for line in f.readlines()[-60:]:
                    print('#   ' + line.rstrip('\n'), flush=True)
        os.unlink(log)


def command_line():
    """The kernel's, as a dictionary."""
    with open('/proc/cmdline', encoding='utf-8') as f:
        return dict(w.partition('=')[::2] for w in f.read().split())


def swap_on():
    """Swap on a zram device, if the kernel has one."""
    zram = '/sys/block/zram0/disksize'
    if os.path.exists(zram):
        with open(zram, 'w', encoding='ascii') as f:
            f.write(str(SWAP))
        for words in (['mkswap', '/dev/zram0'], ['swapon', '/dev/zram0']):
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def as_inner(program, name=None):
    """The same, with its results handed on."""
    program.__class__ = Inner
    program.name = (name or program.name).removeprefix('engine/')
    program.timeout *= int(os.environ['DEDUP_TEST_PATIENCE'])
    program.cwd = '/tmp'
    return program


def programs(long):
    """The programs, each when the one before has ended."""
    every = runner.engine_tests(ENGINE, True)
    stress = [p for p in every if 'stress-dedup' in p.name]
    for p in runner.engine_tests(ENGINE, long):
        if 'stress-dedup' not in p.name:
            yield as_inner(p)
    swap_on()
    for p in every:
        if 'test-dedup-void' in p.name:
            yield as_inner(p, p.name + '+swap')
    for p in (runner.python_tests('kernels', 'tests/kernels/test_*.py') +
              runner.python_tests('guest', 'tests/guest/test_kvm_guest.py')):
        yield as_inner(p)
    for p in stress:
        p.command = p.command + STRESS
        yield as_inner(p)


def main():
    options = command_line()
    os.environ['DEDUP_TEST_PATIENCE'] = options.get('patience', '1')
    os.environ['DEDUP_TEST_BREAK_HOST'] = '1'
    runner.LOGS = '/tmp'
    wanted = options.get('tests', '').split(',')
    start = time.monotonic()
    print('TAP version 13')
    print('# Linux %s' % os.uname().release, flush=True)
    for p in programs('long' in options):
        names, cases = [], []
        for word in wanted:
            name, _, case = word.partition(':')
            if name in p.name:
                names.append(name)
                cases += ['-p'] * case.startswith('/') + [case] * bool(case)
        p.command = p.command + cases
        if names:
            p.run()
    print('# %.0f s' % (time.monotonic() - start))
    print('1..%d' % Inner.count, flush=True)
    sys.exit(1 if Inner.failures_of_all else 0)


if __name__ == '__main__':
    main()
