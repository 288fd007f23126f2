#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Merged domains outlive their libvirtd, each other, and their host."""

import os
import signal

import dedup
import host as machine
import tap
import virsh
import virthost

MERGED = 8000


def working(host, **kinds):
    """Domains {name: kind of memory} that are merged."""
    guests = [virsh.Domain(host, name, memory=memory, group='web').start()
              for name, memory in kinds.items()]
    for vm in guests:
        vm.boot()
        vm.agent.ask('alloc d 10000 dup 4')
        vm.agent.ask('alloc m 4000 mixed')
    for vm in guests:
        dedup.wait_merged(vm, MERGED)
    return guests


@tap.case
def test_libvirtd_restarted():
    """libvirtd ends and starts while two domains are merged"""
    host = virsh.prepared_host()
    guests = working(host, one='anonymous', two='memfd')
    pids = [vm.pid for vm in guests]
    host.stop()
    for vm in guests:
        vm.agent.ask('touch d 7')
        vm.check_regions('dm')
    host.start()
    tap.check(host.virsh('list', '--name').split() == ['one', 'two'],
              host.virsh('list'))
    for vm, pid in zip(guests, pids):
        vm.forget()
        tap.check(vm.pid == pid, 'another process')
        dedup.wait_merged(vm, MERGED)
        tap.check(dedup.stats(vm)['group']['members'] == 2,
                  dedup.group_summary(vm))
        vm.check_regions('dm')
    # Events come through the new one, too.
    guests[0].qmp.listen()
    dedup.unmerge(guests[0])
    guests[0].check_regions('dm')


@tap.case
def test_killed():
    """one domain is killed, one destroyed: the third has lost nothing"""
    host = virsh.prepared_host()
    one, two, three = working(host, one='memfd', two='anonymous',
                              three='anonymous')
    dedup.wait_until(lambda: dedup.stats(one)['group']['members'] == 3,
                     'three members')
    os.kill(one.pid, signal.SIGKILL)
    dedup.wait_until(lambda: one.state() == 'shut off', 'its end')
    tap.check(one.virsh('domstate', '@', '--reason') == 'shut off (crashed)',
              one.virsh('domstate', '@', '--reason'))
    two.virsh('destroy', '@')
    three.check_regions('dm')
    three.agent.ask('touch d 5')
    dedup.wait_until(lambda: dedup.stats(three)['group']['members'] == 1,
                     'one member')
    dedup.wait_merged(three, MERGED)
    one.forget()
    one.start().boot()
    one.agent.ask('alloc d 10000 dup 4')
    dedup.wait_merged(one, MERGED)
    one.check_regions('d')
    three.check_regions('dm')


def uri(host):
    """How virsh calls this host's libvirtd."""
    return ('qemu+unix:///system?socket=' +
            host.path('/run/libvirt/libvirt-sock'))


def migrate(vm, target, *flags):
    """Migrate a domain that writes; it goes on over there."""
    vm.agent.ask('loop m start 200')
    dedup.wait_merged(vm, MERGED)
    source = vm.host
    vm.copy_images(target)
    with virthost.popen_virsh('-c', uri(source), 'migrate', vm.name,
                              uri(target), '--migrateuri',
                              'tcp://127.0.0.1', *flags) as process:
        out, err = process.communicate(timeout=120 * tap.PATIENCE)
    tap.check(process.returncode == 0, out + err)
    tap.check(vm.name not in source.virsh('list', '--name').split(),
              source.virsh('list'))
    vm.host = target
    vm.connect()
    vm.agent.ask('loop m stop')
    vm.check_regions('dm')
    dedup.wait_merged(vm, MERGED)
    tap.note(dedup.summary(vm))
    vm.agent.ask('touch d 3')
    vm.check_regions('dm')


@tap.case
def test_migrate():
    """to another libvirtd and back: live, and with postcopy"""
    source = virsh.prepared_host()
    target = virsh.prepared_host(network=source)
    vm, other = working(source, goes='anonymous', stays='memfd')
    migrate(vm, target, '--live')
    other.check_regions('dm')
    tap.check(dedup.stats(vm)['group']['members'] == 1,
              dedup.group_summary(vm))
    migrate(vm, source, '--live', '--postcopy', '--postcopy-after-precopy')
    dedup.wait_until(lambda: dedup.stats(vm)['group']['members'] == 2,
                     'two members')
    other.check_regions('dm')


machine.prepare()
tap.main()
