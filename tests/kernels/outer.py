#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot one outer guest and hand on what its tests say.

usage: outer.py SUITE [WORD...]

SUITE is one that build-kernels has been called with; the WORDs go to inside.py,
which says what they are.  What the guest's kernel says is in
build/test-logs/kernel-SUITE.console.
"""

import os
import subprocess
import sys

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
KERNELS = os.path.join(TOP, 'build', 'kernels')
QEMU = os.path.join(TOP, 'build', 'bin', 'qemu-system-x86_64')
LOGS = os.path.join(TOP, 'build', 'test-logs')
RAM_MIB = 3072
# Two, so that threads do meet.  On a host that has other work each waits for
# the other most of the time: $CPUS.
CPUS = os.environ.get('CPUS', '2')
# So many times longer than on the host may anything take.
PATIENCE = 10


def main():
    suite = sys.argv[1]
    console = os.path.join(LOGS, 'kernel-%s.console' % suite)
    # Without KVM the kernel's guards against what a processor does out of turn
    # only cost time, and there is little of it for its test of the timer.
    append = ['console=ttyS0', 'loglevel=5', 'panic=-1', 'no_timer_check',
              'mitigations=off', 'patience=%d' % PATIENCE] + sys.argv[2:]
    os.makedirs(LOGS, exist_ok=True)
    result = subprocess.run(
        [QEMU, '-nodefaults', '-no-user-config', '-display', 'none',
         '-no-reboot', '-machine', 'pc', '-cpu', 'max', '-smp', CPUS,
         '-accel', 'tcg,thread=multi,tb-size=256', '-m', '%dM' % RAM_MIB,
         '-kernel', os.path.join(KERNELS, suite, 'vmlinuz'),
         '-initrd', os.path.join(KERNELS, suite, 'initramfs'),
         '-append', ' '.join(append),
         '-serial', 'file:' + console, '-serial', 'stdio'],
        stdin=subprocess.DEVNULL, check=False)
    with open(console, encoding='utf-8', errors='replace') as f:
        for line in f.readlines()[-40:]:
            print('# console: ' + line.rstrip())
    sys.exit(result.returncode)


main()
