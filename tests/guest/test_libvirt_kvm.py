#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of type kvm: the bare guest, as libvirt-qemu and as root.

It has no driver for anything, so a KVM that can run nothing large will do.
"""

import os

import bareguest
import dedup
import host as machine
import tap
import virsh


def bare_guest(user):
    """Merged, saved, restored, killed by an unmerge of nobody."""
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        tap.skip('no /dev/kvm')
    host = virsh.prepared_host(user)
    guests = [virsh.Domain(host, name, ram=3, bare=True, memory=memory,
                           group='web').start()
              for name, memory in (('one', 'memfd'), ('two', 'anonymous'))]
    for vm in guests:
        tap.check('-accel kvm' in vm.log(), vm.log())
        dedup.wait_merged(vm, 20)
    for vm in guests:
        bareguest.wait_round(vm, 2)
        tap.note(dedup.summary(vm))
    vm = guests[0]
    vm.virsh('managedsave', '@')
    vm.virsh('start', '@', '--paused')
    vm.connect()
    vm.virsh('resume', '@')
    bareguest.wait_round(vm, 2)
    dedup.wait_merged(vm, 20)
    for vm in guests:
        bareguest.wait_verified(vm)
    vm.qmp.listen()
    dedup.unmerge(vm)
    bareguest.wait_verified(vm)


@tap.case
def test_user():
    """as libvirt-qemu"""
    bare_guest(None)


@tap.case
def test_root():
    """as root"""
    bare_guest('root')


machine.prepare()
tap.main()
