# SPDX-License-Identifier: GPL-2.0-or-later
"""The bare guest (bare.c): talk with it."""

import os

import host
import tap
import vm as vms

PAGES = 256


def start(backing, name='kvm', accel='kvm', **kwargs):
    """A bare guest that is ready."""
    if accel == 'kvm' and not os.access('/dev/kvm', os.R_OK | os.W_OK):
        tap.skip('no /dev/kvm')
    vm = vms.VM(name, ram=3, backing=backing, accel=accel,
                bios=host.image('bare.rom'), **kwargs)
    vm.start()
    tap.check(vm.serial_port.line(60) == 'ready %d' % PAGES, 'not ready')
    return vm


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
