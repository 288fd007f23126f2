#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A KVM vCPU writes to its pages while they are merged and given back."""

import os

import dedup
import host
import tap
import vm as vms

CYCLES = 4
PAGES = 256


def wait_round(vm, more):
    """Wait for @more complete rounds without an error."""
    serial = vm.serial_port
    done = 0
    while done < more:
        line = serial.line(60)
        tap.check(not line.startswith('bad'), '%s: %s' % (vm.name, line))
        if line.startswith('round '):
            tap.check(line.endswith(' errors 0'), line)
            done += 1


def command(vm, letter):
    """Send a one-letter command to the bare guest."""
    vm.serial_port.sock.sendall(letter)


def wait_verified(vm):
    """Have the guest check every word."""
    command(vm, b'v')
    while True:
        line = vm.serial_port.line(120)
        tap.check(not line.startswith('bad'), '%s: %s' % (vm.name, line))
        if line.startswith('verified'):
            tap.check(line == 'verified errors 0', line)
            return


def kvm_guest(backing):
    """Merge, write, unmerge, again and again; then check every word."""
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        tap.skip('no /dev/kvm')
    vm = vms.VM('kvm', ram=3, backing=backing, accel='kvm',
                bios=host.image('bare.rom'), dedup=dedup.FULL_SPEED)
    vm.start()
    tap.check(vm.serial_port.line(60) == 'ready %d' % PAGES, 'not ready')
    for cycle in range(CYCLES):
        command(vm, b'bw'[cycle % 2:][:1])
        wait_round(vm, 2)
        # The guest writes most pages in a round of 'b'; some stay merged.
        dedup.wait_merged(vm, 20)
        tap.note(dedup.summary(vm))
        if cycle % 3 == 2:
            dedup.unmerge(vm)
            wait_round(vm, 1)
            dedup.run(vm, True)
    command(vm, b'q')
    wait_round(vm, 2)
    # Now nothing changes: all of the runs that are equal can be merged.
    dedup.wait_merged(vm, PAGES // 4)
    wait_verified(vm)
    command(vm, b'b')
    wait_round(vm, 3)
    tap.check(dedup.stats(vm)['cow-breaks'] > 0, 'no page was ever written')
    dedup.unmerge(vm)
    wait_verified(vm)
    vm.quit()


@tap.case
def test_memfd():
    """memory-backend-memfd, share=on"""
    kvm_guest('memfd-shared')


@tap.case
def test_anonymous():
    """plain -m"""
    kvm_guest('plain')


host.prepare()
tap.main()
