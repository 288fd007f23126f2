#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Domains of a real libvirtd: what its users set and see.

As root, and as Debian's libvirt-qemu: with libvirt's defaults, and with what
docs/system/dedup-libvirt.rst has the administrator set.
"""

import json
import os

import dedup
import host as machine
import tap
import virsh
import virthost
import vm as vms
from host import MIB, PAGE
from qmp import QMPError

# Savings as libvirt-qemu may differ from root's by this part.
TOLERANCE = 0.03
SHARE = 0.95
WORK = ('alloc s 10000 same 3', 'alloc m 6000 mixed', 'alloc u 2000 signed')
# From here on libvirt gives each domain a /dev/userfaultfd of its own.
GIVES_NODE = (10, 1)
UUID = '00000000-0000-4000-8000-000000000001'
LIBVIRTS_SANDBOX = ('-sandbox on,obsolete=deny,elevateprivileges=deny,'
                    'spawn=deny,resourcecontrol=deny')


def process_field(vm, name):
    """A line of /proc/PID/status."""
    for line in virthost.read('/proc/%d/status' % vm.pid).splitlines():
        if line.startswith(name + ':'):
            return line.split()[1]
    raise LookupError(name)


def check_confined(vm, uid):
    """It is as libvirt has it by default: the user, seccomp, a private /dev."""
    tap.check(process_field(vm, 'Uid') == str(uid), 'not the user')
    tap.check(process_field(vm, 'Seccomp') == '2', 'no seccomp')
    tap.check(LIBVIRTS_SANDBOX in vm.log(), vm.log())
    there = os.listdir('/proc/%d/root/dev' % vm.pid)
    tap.check('null' in there and 'tty' not in there,
              'not a private /dev: %s' % there)


@tap.case
def test_nothing_set():
    """as libvirt-qemu, nothing set but the group's directory: it merges"""
    if virthost.read('/proc/sys/vm/unprivileged_userfaultfd') == '1':
        tap.skip('this host grants everybody a userfaultfd')
    host = virsh.prepared_host(granted=False)
    vm = virsh.Domain(host, 'plain', group='web').start().boot()
    check_confined(vm, virthost.UID)
    vm.qmp.listen()
    vm.agent.ask('alloc d 4000 dup 4')
    dedup.wait_merged(vm, 3000)
    expected = virsh.expected_write_protect(host.version() >= GIVES_NODE)
    tap.check(dedup.stats(vm)['write-protect'] == expected, dedup.summary(vm))
    tap.check('write-protect ' + expected in vm.qmp.hmp('info dedup'),
              'info dedup')
    vm.agent.ask('loop d start 16')
    dedup.unmerge(vm)
    vm.agent.ask('loop d stop')
    vm.check_regions('d')


@tap.case
def test_monitor():
    """qemu-monitor-command in both languages, and qemu-monitor-event"""
    host = virsh.prepared_host()
    vm = virsh.Domain(host, 'monitor', group='web').start().boot()
    check_confined(vm, virthost.UID)
    vm.qmp.listen()
    vm.agent.ask('alloc d 4000 dup 4')
    vm.agent.ask('loop d start 16')
    dedup.wait_merged(vm, 3000)
    s = dedup.stats(vm)
    tap.check(s['write-protect'] == virsh.expected_write_protect(True), s)
    tap.check(s['group']['path'] == '/run/qemu-dedup/web', s['group'])
    text = vm.qmp.hmp('info dedup')
    tap.check('write-protect userfaultfd' in text and
              'group /run/qemu-dedup/web: 1 members' in text, text)
    # libvirt has a shorter way to say it, too.
    text = vm.virsh('qemu-monitor-command', '--hmp', '@', 'info', 'dedup')
    tap.check('pages merged: ' in text, text)
    text = vm.virsh('qemu-monitor-command', '--pretty', '@',
                    '{"execute": "query-dedup-stats"}')
    tap.check(json.loads(text)['return'][0]['id'] == 'ds0', text)

    dedup.run(vm, False)
    event = vm.qmp.wait_event('DEDUP_STATE_CHANGED', match=lambda d:
                              d['state'] == 'stopped')
    tap.check(event['data'] == {'id': 'ds0', 'state': 'stopped'}, event)
    dedup.unmerge(vm)
    try:
        vm.qmp.command('dedup-unmerge', {'id': 'none'})
        tap.check(False, 'unmerged nothing')
    except QMPError as e:
        tap.check(e.cls == 'DeviceNotFound' and "'none' not found" in str(e),
                  str(e))
    vm.agent.ask('loop d stop')
    vm.check_regions('d')
    vm.qmp.hmp('object_del ds0')
    tap.check(vm.qmp.command('query-dedup-stats') == [], 'still there')


def usage_of(guests):
    """What is charged to the cgroups of the domains, in bytes."""
    return sum(virsh.cgroup_usage(vm) for vm in guests)


def memory_of(guests):
    """What tools say of these processes, in bytes."""
    info = machine.meminfo()
    figures = {'cgroup': usage_of(guests),
               'not available': info['MemTotal'] - info['MemAvailable']}
    for name in ('Rss', 'Pss'):
        figures[name] = 0
        for vm in guests:
            text = virthost.read('/proc/%d/smaps_rollup' % vm.pid)
            for line in text.splitlines():
                if line.startswith(name + ':'):
                    figures[name] += int(line.split()[1]) * 1024
    return figures


def saving(user, granted=True):
    """One run of three guests; the part that was saved of what could be.

    Their host ends with it: the next one has cgroups of the same names.
    """
    host = virsh.prepared_host(user, granted)
    guests = [virsh.Domain(host, kind, memory=kind, group='web',
                           options='run=off,sleep-millisecs=0')
              for kind in virsh.MEMORY]
    for vm in guests:
        vm.start()
    for vm in guests:
        vm.boot()
        for command in WORK:
            vm.agent.ask(command)
    check_confined(guests[0], 0 if user else virthost.UID)
    want = vms.count_saveable(guests)['saveable'] * PAGE
    before = memory_of(guests)
    for vm in guests:
        dedup.run(vm, True)
    dedup.wait_scans(guests, 4)
    saved = dedup.wait_saved(lambda: usage_of(guests), before['cgroup'],
                             SHARE * want)
    merged = memory_of(guests)
    for vm in guests:
        tap.note(dedup.summary(vm))
        tap.check(dedup.stats(vm)['group']['members'] == 3,
                  dedup.group_summary(vm))
        # The guests read it all, so it is mapped again.
        vm.check_regions('smu')
    after = memory_of(guests)
    fell = {name: before[name] - after[name] for name in before}
    tap.note('%s: can save %.1f MiB; before, merged, and read again: %s' % (
        user or virthost.USER, want / MIB, ', '.join(
            '%s %s' % (name, ' '.join('%.1f' % (figures[name] / MIB)
                                      for figures in (before, merged, after)))
            for name in fell)))
    group = dedup.stats(guests[0])['group']
    tap.note(dedup.group_summary(guests[0]))
    tap.check(saved >= SHARE * want, 'saved %d of %d' % (saved, want))
    # PSS tells of it.  RSS, which virsh dommemstat shows, does not: a merged
    # page is counted in each process that has touched it.
    tap.check(fell['Pss'] >= 0.9 * want, 'PSS: %s of %d' % (fell, want))
    tap.check(fell['Rss'] < 0.85 * fell['Pss'], 'RSS: %s' % fell)
    tap.check(abs(group['bytes-saved'] - want) < 0.1 * want, str(group))
    tap.check(not tap.run_cleanups(), 'the host does not end')
    return saved / want


@tap.case
def test_saving():
    """libvirt-qemu saves what root does, also with nothing set"""
    root = saving('root')
    user = saving(None)
    nothing = saving(None, granted=False)
    tap.note('root %.1f %%, %s %.1f %%, and with nothing set %.1f %%' % (
        100 * root, virthost.USER, 100 * user, 100 * nothing))
    tap.check(abs(root - user) <= TOLERANCE and
              abs(root - nothing) <= TOLERANCE,
              '%f %f %f' % (root, user, nothing))


@tap.case
def test_sysctl():
    """with vm.unprivileged_userfaultfd=1 nothing else is needed"""
    (name, value), = [line.split(' = ') for line in
                      virsh.package_file('sysctl.d', '60-qemu-dedup.conf')]
    tap.check(value == '1', value)
    machine.set_sysctl('/proc/sys/' + name.replace('.', '/'), value)
    host = virsh.prepared_host(granted=False)
    vm = virsh.Domain(host, 'sysctl', memory='memfd').start().boot()
    there = os.listdir('/proc/%d/root/dev' % vm.pid)
    tap.check('userfaultfd' not in there or host.version() >= GIVES_NODE,
              'the node is there')
    vm.agent.ask('alloc d 4000 dup 4')
    dedup.wait_merged(vm, 3000)
    tap.check(dedup.stats(vm)['write-protect'] == 'userfaultfd',
              dedup.summary(vm))
    vm.check_regions('d')


@tap.case
def test_example():
    """the example is as libvirt's schema has it, starts, and is not blocked"""
    host = virsh.prepared_host()
    virsh.make_disk(host, 'web1', 64)
    path = virthost.IMAGES + '/domain.xml'
    with open(virsh.EXAMPLE, encoding='utf-8') as f:
        text = f.read()
    # There are KVMs that cannot start all that they offer.
    small = text.replace("<cpu mode='host-model'>", "<cpu mode='custom' "
                         "match='exact'><model>qemu64</model>")
    tap.check(small != text, 'no host-model')
    for version in text, small:
        with open(host.path(path), 'w', encoding='utf-8') as f:
            f.write(version.replace('</name>', '</name><uuid>%s</uuid>' % UUID))
        host.virsh('define', '--validate', path)
    kept = host.virsh('dumpxml', 'web1')
    tap.check("value='dedup-scanner,id=ds0,group=web'" in kept, kept)
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        tap.skip('it is of type kvm, and there is no /dev/kvm')
    host.virsh('start', 'web1', '--paused')
    text = host.virsh('qemu-monitor-command', 'web1',
                      '{"execute": "query-dedup-stats"}')
    stats, = json.loads(text)['return']
    tap.check(not stats['blocked-reasons'] and
              stats['write-protect'] == 'userfaultfd', str(stats))


machine.prepare()
tap.main()
