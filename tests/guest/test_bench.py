#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# alone
"""What merging real guests' RAM costs, in counts that do not depend on the
machine, and that every byte is right afterwards.

Three guests' RAM is written to files, and loaded into processes that run the
engine alone (tests/bench/bench-replay).
"""

import os
import subprocess

import host
import tap
import vm as vms

BENCH = os.path.join(host.TOP, 'tests', 'bench')
REPLAY = os.path.join(host.BUILD, 'engine', 'tests', 'bench', 'bench-replay')


def call(*command):
    """Run it; its output into the log."""
    done = subprocess.run(command, capture_output=True, text=True,
                          timeout=300 * tap.PATIENCE, check=False)
    tap.note(done.stdout + done.stderr)
    return done.returncode


@tap.case
def test_counts():
    """system calls, faults and hashes per saved page"""
    images = vms.scratch()
    tap.check(call(os.path.join(BENCH, 'make-images'), images) == 0,
              'no images')
    for memory in 'anon', 'memfd':
        status = call(REPLAY, '--rounds=1', '--no-ksm', '--check',
                      '--memory=' + memory,
                      *sorted(os.path.join(images, name)
                              for name in os.listdir(images)))
        if status == 77:
            tap.skip('no memory cgroup may be made here')
        tap.check(status == 0, 'bench-replay: status %d' % status)


host.prepare()
tap.main()
