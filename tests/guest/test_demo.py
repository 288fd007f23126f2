#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What "make demo" shows a newcomer is there, and true.

The demo is run as it is.  Interrupted in the middle, it leaves nothing.
"""

import os
import re
import signal
import subprocess
import threading

import backends
import host
import tap

DEMO = os.path.join(host.TOP, 'scripts', 'demo')
GUESTS = ('web', 'db', 'batch')
FILES = 'files'         # the one with virtiofs
FILE_MIB = 96
SECONDS = 120 * tap.PATIENCE
LEAST = 90              # percent of what an offline count says can be saved


def numbers(pattern, text):
    """The numbers of the only line that matches @pattern."""
    lines = re.findall(pattern, text, re.MULTILINE)
    tap.check(len(lines) == 1, '%s: %s' % (pattern, lines))
    return [float(n) for n in
            (lines[0] if isinstance(lines[0], tuple) else lines)]


def children(pid):
    """Processes below @pid, and their children."""
    with open('/proc/%d/task/%d/children' % (pid, pid),
              encoding='ascii') as f:
        mine = [int(p) for p in f.read().split()]
    return mine + [c for p in mine for c in children(p)]


def has_virtiofs():
    """Is there a daemon?"""
    backends.prepare('virtiofsd')
    try:
        return backends.FsRust().command()
    except tap.Skip as e:
        tap.note(str(e))
        return None


@tap.case
def test_whole():
    """it ends by itself: saved, seen from outside, every byte right"""
    done = subprocess.run([DEMO], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True,
                          timeout=SECONDS, check=False)
    tap.check(done.returncode == 0, done.stdout)
    names = GUESTS
    if has_virtiofs():
        names += (FILES,)
        lines = re.findall(r'^files: virtiofs: ([0-9]+) requests, ([0-9.]+) '
                           r'MiB in; .* sees ([0-9.]+) MiB', done.stdout,
                           re.MULTILINE)
        tap.check(lines and float(lines[-1][1]) >= FILE_MIB, str(lines))
        merged = re.findall(r'^files +plain -m +\w+ +[0-9.]+ +[0-9.]+ '
                            r'+([0-9.]+) ', done.stdout, re.MULTILINE)
        # With the pages of those that have the file from a disk
        tap.check(merged and float(merged[-1]) >= FILE_MIB * LEAST / 100,
                  str(merged))
    for name in names:
        numbers(r'^ +%s +([0-9]+) pages, .*: every byte right$' % name,
                done.stdout)
    before, = numbers(r'^  before merging +([0-9.]+)$', done.stdout)
    now, = numbers(r'^  now +([0-9.]+)$', done.stdout)
    saved, _ = numbers(r'^  saved +([0-9.]+) +([0-9]+) % of', done.stdout)
    own, = numbers(r"^  QEMU's own figure +([0-9.]+)$", done.stdout)
    tap.check(abs(before - now - saved) < 0.2, 'saved %s' % saved)
    tap.check(abs(own - saved) < saved / 10, "QEMU's figure %s" % own)
    if 'counted offline' in done.stdout:
        _, share = numbers(r'^  could be saved +([0-9.]+) .*: ([0-9]+) % of',
                           done.stdout)
        tap.check(share >= LEAST, '%s %% of what can be saved' % share)
    seconds, = numbers(r'^([0-9]+) seconds since', done.stdout)
    tap.note('%.0f MiB saved, %.0f s' % (saved, seconds))


@tap.case
def test_interrupted():
    """Ctrl-C while guests run: they end, nothing is left"""
    with subprocess.Popen([DEMO], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as demo:
        timer = threading.Timer(SECONDS, demo.kill)
        timer.start()
        seen, below = '', []
        for line in demo.stdout:
            seen += line
            if line.startswith('Merging:'):
                below = children(demo.pid)
                demo.send_signal(signal.SIGINT)
        demo.wait()
        timer.cancel()
    tap.check(demo.returncode == 130, seen)
    tap.check('interrupted' in seen, seen)
    tap.check(len(below) >= len(GUESTS), 'processes: %s' % below)
    left = [p for p in below if os.path.exists('/proc/%d' % p)]
    tap.check(not left, 'still there: %s' % left)


host.prepare()
tap.main()
