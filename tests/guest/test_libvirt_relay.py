#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 1800
"""Domains with vhost-user devices that have a relay: what the documentation
says of <qemu:override> and <qemu:commandline> is so.

As libvirt-qemu, at full speed; the domains are merged while the guest compares
what comes through the relays.
"""

import os
import shlex
import xml.etree.ElementTree as ET

import backends
import dedup
import host as machine
import tap
import virsh
import virthost
from host import MIB

SHARED = '/var/lib/libvirt/shared'
DAEMON = '/var/lib/libvirt/virtiofsd'
FILE = 4096, 5, 4096            # arguments of host.make_disk()
IO_MIB = 16
# <qemu:override> came with libvirt 8.2.
OVERRIDE = (8, 2)
# The guest's port is to stay its first virtio device.
SLOT = ("<address type='pci' domain='0' bus='0' slot='0x%x' function='0'/>")

FILESYSTEM = ("<filesystem type='mount' accessmode='passthrough'>"
              "<driver type='virtiofs'/><binary path='%s'/>"
              "<source dir='%s'/><target dir='share'/>%s</filesystem>")
DISK = ("<disk type='vhostuser' device='disk'>"
        "<driver name='qemu' type='raw'/><source type='unix' path='%s'/>"
        "<target dev='vdb' bus='virtio'/>%s</disk>")
PROPERTY = "<qemu:property name='%s' type='%s' value='%s'/>"
ON = {'relay': 'on'}


def override(vm, alias, properties):
    """Have libvirt pass @properties to a device."""
    text = ''.join(PROPERTY % (name, 'unsigned' if isinstance(value, int)
                               else 'string', value)
                   for name, value in properties.items())
    vm.root.append(ET.fromstring(
        "<x xmlns:qemu='%s'><qemu:override><qemu:device alias='%s'>"
        "<qemu:frontend>%s</qemu:frontend></qemu:device></qemu:override></x>"
        % (virsh.QEMU_NS, alias, text))[0])


def add_device(vm, text):
    """One more device."""
    vm.root.find('devices').append(ET.fromstring(text))


def add_options(vm, *words):
    """More of <qemu:commandline>."""
    element = vm.root.find('qemu:commandline', {'qemu': virsh.QEMU_NS})
    for word in words:
        ET.SubElement(element, '{%s}arg' % virsh.QEMU_NS, value=word)


def prepared_host():
    """A host whose libvirt can do it."""
    host = virsh.prepared_host()
    if host.version() < OVERRIDE:
        tap.skip('libvirt %d.%d has no <qemu:override>' % host.version())
    return host


def share(host):
    """A directory to share, and a program that libvirt starts for it."""
    words = backends.FsC().command()
    words = words[:[w.startswith('--socket') for w in words].index(True)]
    with open(host.path(DAEMON), 'w', encoding='utf-8') as f:
        f.write('#!/bin/sh\nexec %s "$@"\n' % shlex.join(words))
    os.chmod(host.path(DAEMON), 0o755)
    os.mkdir(host.path(SHARED))
    machine.make_disk(host.path(SHARED + '/data'), *FILE)


def reachable(backend):
    """Start a back end where libvirt-qemu can connect to it."""
    os.chmod(backend.dir, 0o755)
    backend.start()
    os.chmod(backend.path, 0o666)
    return backend


def check(vm, chardev, target, **expected):
    """Data goes through the relay, from pages that are merged and into them,
    and all of it is right."""
    tap.check(chardev in backends.relays(vm), 'no relay')
    vm.agent.ask('io-start x %s %d 512 both 2 1024 zero' % (target, IO_MIB))
    dedup.wait_merged(vm, 3000)
    before = backends.relays(vm)[chardev]
    ops = vm.agent.get('io-stat x')['ops']
    dedup.wait_until(lambda: vm.agent.get('io-stat x')['ops'] > ops + 200,
                     'more requests')
    backends.check_job(vm, 'io', vm.agent.get('io-stop x'))
    after = backends.relays(vm)[chardev]
    tap.note(dedup.summary(vm))
    tap.note(str(after))
    tap.check(after['requests'] > before['requests'] and
              after['bytes-out'] > before['bytes-out'] and
              after['bytes-in'] > before['bytes-in'], after)
    tap.check(not after['broken'], after)
    for name, value in expected.items():
        tap.check(after[name] == value, after)


def start(vm):
    """Start it, with copies that can be merged."""
    vm.start().boot()
    vm.agent.ask('alloc keep 4000 dup 4')
    return vm


@tap.case
def test_filesystem():
    """<filesystem>: libvirt's own virtiofsd, relay by <qemu:override>"""
    host = prepared_host()
    share(host)
    vm = virsh.Domain(host, 'files', memory='memfd', group='web',
                      more='<iothreads>1</iothreads>')
    add_device(vm, FILESYSTEM % (DAEMON, SHARED, SLOT % 0x10))
    override(vm, 'fs0', dict(ON, **{'iothread': 'iothread1',
                                    'relay-size': 32 * MIB}))
    start(vm)
    backends.mount(vm, 'share')
    got = vm.agent.get('cache /mnt/data %d %d %d' % (FILE[1], FILE[2],
                                                     FILE[0]))
    tap.check(got['bad'] == 0 and got['pages'] == FILE[0], got)
    vm.agent.ask('sh truncate -s %d /mnt/file' % (IO_MIB * MIB))
    check(vm, 'chr-vu-fs0', '/mnt/file', iothread='iothread1',
          size=32 * MIB)
    # The host has what the guest has.
    tap.check(os.path.getsize(host.path(SHARED + '/file')) == IO_MIB * MIB,
              'the file in the host')
    vm.virsh('suspend', '@')
    vm.virsh('resume', '@')
    vm.check_regions(['keep'])


@tap.case
def test_without():
    """what libvirt refuses without shared memory; without a relay: blocked"""
    host = prepared_host()
    share(host)
    for name, text, words in (
            ('nofiles', FILESYSTEM % (DAEMON, SHARED, ''), 'virtiofs'),
            ('nodisk', DISK % ('/nowhere', ''), 'vhostuser')):
        vm = virsh.Domain(host, name, ram=64)
        add_device(vm, text)
        try:
            vm.define()
            tap.note('libvirt %s takes %s on anonymous memory' % (
                host.version(), words))
        except virthost.Failed as e:
            tap.check("'%s' requires shared memory" % words in str(e), str(e))
    vm = virsh.Domain(host, 'plain', ram=64, memory='memfd')
    add_device(vm, FILESYSTEM % (DAEMON, SHARED, SLOT % 0x10))
    vm.start('--paused')
    dedup.wait_state(vm, ['blocked'])
    found = [b['detail'] for b in dedup.stats(vm)['blocked-reasons']
             if b['reason'] == 'ram-exported']
    tap.check(found and 'relay=on' in found[0] and 'chr-vu-fs0' in found[0],
              dedup.stats(vm)['blocked-reasons'])
    tap.check(backends.relays(vm) == {}, 'a relay')


@tap.case
def test_disk():
    """<disk type='vhostuser'>: relay by <qemu:override>"""
    host = prepared_host()
    disk = reachable(backends.Storage(size=IO_MIB))
    vm = virsh.Domain(host, 'disk', memory='memfd', group='web')
    add_device(vm, DISK % (disk.path, SLOT % 0x10))
    override(vm, 'virtio-disk1', ON)
    start(vm)
    check(vm, 'chr-vu-virtio-disk1', '/dev/vda')
    vm.check_regions(['keep'])


@tap.case
def test_interface():
    """a network of <qemu:commandline>, on anonymous memory"""
    host = prepared_host()
    net = reachable(backends.Passt())
    vm = virsh.Domain(host, 'net', group='web')
    add_options(vm, '-chardev', 'socket,id=net9,path=' + net.path, '-netdev',
                'vhost-user,id=n9,chardev=net9,relay=on', '-device',
                'virtio-net-pci,netdev=n9,romfile=,addr=0x1e')
    start(vm)
    backends.network_up(vm)
    echo = backends.Echo()
    vm.agent.ask('net-start %s %d 2 512' % (backends.NETWORK['host'],
                                            echo.port))
    dedup.wait_merged(vm, 3000)
    ops = vm.agent.get('net-stat')['ops']
    dedup.wait_until(lambda: vm.agent.get('net-stat')['ops'] > ops + 100,
                     'more messages')
    backends.check_job(vm, 'net', vm.agent.get('net-stop'))
    after = backends.relays(vm)['net9']
    tap.check(after['requests'] > 100, after)
    tap.note(str(after))
    vm.check_regions(['keep'])


machine.prepare()
backends.prepare('virtiofsd-c', 'passt')
tap.main()
