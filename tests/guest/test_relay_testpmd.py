#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 600
"""DPDK's testpmd, which polls, has a relay before it: a network whose other
side is a tap device.  It needs no huge pages.

Debian has it in dpdk-dev, with librte-net-vhost23 and librte-net-tap23; for
another place: TESTPMD=PROGRAM.
"""

import os
import shutil
import subprocess

import backends
import dedup
import relay
import tap

PROGRAM = os.environ.get('TESTPMD') or shutil.which('dpdk-testpmd')
TAP = 'dedup-pmd0'
PREFIX = 'dedup%d' % os.getpid()
STOPS = 20


class Testpmd(backends.Passt):
    """It moves frames between a vhost-user port and a tap device."""

    echo = backends.NETWORK['host']
    # It does not do them in software where the other side cannot.
    properties = dict(backends.Passt.properties, **{
        name: False for name in (
            'csum', 'guest_csum', 'host_tso4', 'guest_tso4', 'host_tso6',
            'guest_tso6', 'host_ufo', 'guest_ufo')})

    def command(self):
        # It polls: at a priority that leaves the guest its processor.
        return ['chrt', '--idle', '0', PROGRAM, '--no-huge', '-m', '256',
                '--no-pci', '--no-telemetry', '-l', '0,1',
                '--file-prefix=' + PREFIX,
                '--vdev', 'net_vhost0,iface=' + self.path,
                '--vdev', 'net_tap0,iface=' + TAP, '--',
                '--forward-mode=io', '--auto-start', '--no-lsc-interrupt',
                '--total-num-mbufs=16384', '--stats-period=60']

    def start(self):
        tap.cleanup(lambda: shutil.rmtree('/run/dpdk/' + PREFIX,
                                          ignore_errors=True))
        super().start()
        for words in (['addr', 'add', backends.NETWORK['host'] + '/' +
                       backends.NETWORK['prefix'], 'dev', TAP],
                      ['link', 'set', TAP, 'up']):
            subprocess.run(['ip'] + words, check=True)
        return self


def try_it(iothread):
    """TCP into merged pages and from them, and stops."""
    if not PROGRAM:
        tap.skip('no dpdk-testpmd (apt install dpdk-dev librte-net-vhost23 '
                 'librte-net-tap23)')
    if os.geteuid() or not os.path.exists('/dev/net/tun'):
        tap.skip('no tap device without root and /dev/net/tun')
    if (os.cpu_count() or 1) < 2:
        tap.skip('it wants two processors')
    g = relay.Guest('plain', ['net'], iothread=iothread,
                    dedup=dict(dedup.FULL_SPEED))
    g.boot().run_all()
    dedup.wait_merged(g.vm, 100)
    g.wait_requests(1000)
    for _ in range(STOPS):
        g.vm.stop()
        g.vm.cont()
        g.wait_requests(20)
    tap.check(g.backend['net'].alive(), 'testpmd has ended')
    tap.note('%s; %s' % (dedup.summary(g.vm), g.relayed()))
    g.end_all()
    g.quit()


@tap.case
def test_main_loop():
    """the relay in the main loop"""
    try_it(False)


@tap.case
def test_iothread():
    """the relay in an iothread"""
    try_it(True)


relay.KINDS['net'] = Testpmd
relay.prepare()
tap.main()
