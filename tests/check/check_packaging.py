#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What packaging/ has for administrators is as its readers want it.

The parsers are those of Debian's packages.  One that is not installed is
unpacked into build/parsers, where nothing of the host is changed.
"""

import os
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET

from checks import BUILD, TOP, run, tracked
import tap

PACKAGING = os.path.join(TOP, 'packaging')
PARSERS = os.path.join(BUILD, 'parsers')


def path_of(*names):
    return os.path.join(PACKAGING, *names)


def lines(*names):
    with open(path_of(*names), encoding='utf-8') as f:
        return [line for line in f.read().splitlines()
                if line and not line.startswith('#')]


def scratch():
    path = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda: shutil.rmtree(path))
    return path


def unpack(package):
    """A directory with the files of a package."""
    place = os.path.join(PARSERS, package)
    if not os.path.isdir(place):
        os.makedirs(PARSERS, exist_ok=True)
        new = tempfile.mkdtemp(dir=PARSERS)
        user = subprocess.run(['id', '-un'], stdout=subprocess.PIPE,
                              check=True, text=True).stdout.strip()
        out = run('sh', '-c', 'apt-get -q -o APT::Sandbox::User=%s download %s'
                  ' && dpkg-deb -x *.deb files' % (user, package), cwd=new)
        if out.returncode:
            shutil.rmtree(new)
            tap.skip('no package %s: %s' % (
                package, ' '.join(out.stdout.split())[-120:]))
        os.rename(os.path.join(new, 'files'), place)
        shutil.rmtree(new)
    return place


def tool(name, package):
    """The path of a program, wherever it is."""
    found = shutil.which(name, path=os.environ.get('PATH', '') +
                         ':/usr/sbin:/sbin')
    if found:
        return found
    place = unpack(package)
    for sub in ('sbin', 'usr/sbin', 'usr/bin'):
        path = os.path.join(place, sub, name)
        if os.path.exists(path):
            return path
    tap.skip(f'no {name} in the package {package}')
    return None


def good(*command, **kwargs):
    out = run(*command, **kwargs)
    tap.check(out.returncode == 0, out.stdout)


def profile(directory, rules):
    """A profile as libvirt makes it for a domain, with these rules."""
    path = os.path.join(directory, 'profile')
    with open(path, 'w', encoding='utf-8') as f:
        f.write('#include <tunables/global>\n'
                'profile libvirt-test flags=(attach_disconnected) {\n'
                '  #include <abstractions/base>\n%s\n}\n' % rules)
    return path


@tap.case
def test_apparmor():
    """apparmor_parser takes the rules, and not broken ones"""
    parser = tool('apparmor_parser', 'apparmor')
    base = os.path.join(unpack('apparmor'), 'etc', 'apparmor.d')
    with open(path_of('apparmor', 'libvirt-qemu'), encoding='utf-8') as f:
        rules = f.read()
    with open(path_of('apparmor', 'usr.sbin.libvirtd'), encoding='utf-8') as f:
        daemon = f.read()
    command = [parser, '-Q', '-K', '--config-file', '/dev/null', '--base',
               base]
    directory = scratch()
    good(*command, profile(directory, daemon))
    tap.check('/usr/local/bin/qemu-system-x86_64 PUx,' in daemon, daemon)
    good(*command, profile(directory, rules))
    broken = rules.replace('rwk,', 'rwk')
    out = run(*command, profile(directory, broken))
    tap.check(out.returncode != 0, 'takes anything')
    for name in ('/dev/userfaultfd rw,', 'qemu-dedup/** rwk,', 'pagemap',
                 'qemu-system-x86_64 rmix,'):
        tap.check(name in rules, 'nothing about ' + name)


@tap.case
def test_selinux():
    """checkmodule and semodule_package make a module of it"""
    checkmodule = tool('checkmodule', 'checkpolicy')
    package = tool('semodule_package', 'semodule-utils')
    directory = scratch()
    module = os.path.join(directory, 'qemu_dedup.mod')
    good(checkmodule, '-M', '-m', '-o', module,
         path_of('selinux', 'qemu_dedup.te'))
    good(package, '-o', os.path.join(directory, 'qemu_dedup.pp'), '-m',
         module, '-f', path_of('selinux', 'qemu_dedup.fc'))
    types = set()
    with open(path_of('selinux', 'qemu_dedup.te'), encoding='utf-8') as f:
        types = set(re.findall(r'^type (\w+);', f.read(), re.M))
    for line in lines('selinux', 'qemu_dedup.fc'):
        context = line.split()[-1].split(':')
        tap.check(len(context) == 4 and context[2] in types, line)


@tap.case
def test_tmpfiles():
    """systemd-tmpfiles makes the directory, with mode and owner"""
    tmpfiles = tool('systemd-tmpfiles', 'systemd')
    if os.geteuid() != 0:
        tap.skip('only root can give a directory away')
    root = scratch()
    os.makedirs(os.path.join(root, 'etc'))
    for name, text in ('passwd', 'libvirt-qemu:x:64055:64056::/:/bin/false\n'
                       ), ('group', 'libvirt-qemu:x:64055:\n'):
        with open(os.path.join(root, 'etc', name), 'w',
                  encoding='ascii') as f:
            f.write('root:x:0:0::/:/bin/sh\n' if name == 'passwd'
                    else 'root:x:0:\n')
            f.write(text)
    good(tmpfiles, '--create', '--root=' + root,
         path_of('tmpfiles.d', 'qemu-dedup.conf'))
    st = os.stat(os.path.join(root, 'run', 'qemu-dedup'))
    tap.check((st.st_uid, st.st_gid, st.st_mode & 0o7777) ==
              (64055, 64055, 0o755), str(st))


@tap.case
def test_udev():
    """the rule has what udev wants"""
    rule, = lines('udev', '60-qemu-dedup.rules')
    match = dict(re.findall(r'(\w+)=="([^"]*)"', rule))
    assign = dict(re.findall(r'(\w+)="([^"]*)"', rule))
    tap.check(match == {'KERNEL': 'userfaultfd', 'SUBSYSTEM': 'misc'},
              str(match))
    tap.check(assign == {'GROUP': 'kvm', 'MODE': '0660'}, str(assign))
    tap.check(re.fullmatch(r'(\w+==?"[^"]*"(, |$))+', rule), rule)
    udevadm = shutil.which('udevadm')
    # "verify" came with systemd 254.
    if udevadm and 'verify' in run(udevadm, '--help').stdout:
        good(udevadm, 'verify', '--no-style',
             path_of('udev', '60-qemu-dedup.rules'))


@tap.case
def test_sysctl():
    """the knob is one that this kernel has"""
    for line in lines('sysctl.d', '60-qemu-dedup.conf'):
        m = re.fullmatch(r'([a-z_.]+) = (\d+)', line)
        tap.check(m, line)
        tap.check(os.path.exists('/proc/sys/' + m.group(1).replace('.', '/')),
                  line)


@tap.case
def test_libvirt():
    """the example is XML with the object, qemu.conf a list with the node"""
    root = ET.parse(path_of('libvirt', 'domain.xml')).getroot()
    name = '{http://libvirt.org/schemas/domain/qemu/1.0}arg'
    args = [e.get('value') for e in root.iter(name)]
    tap.check(args == ['-object', 'dedup-scanner,id=ds0,group=web'], str(args))
    text = ' '.join(lines('libvirt', 'qemu.conf'))
    m = re.fullmatch(r'cgroup_device_acl = \[(.*)\]', text)
    tap.check(m, text)
    names = [n.strip() for n in m.group(1).split(',')]
    tap.check('"/dev/userfaultfd"' in names and '"/dev/kvm"' in names,
              str(names))
    tap.check(all(re.fullmatch(r'"/dev/\w+"', n) for n in names), str(names))


@tap.case
def test_named():
    """the documentation names each file"""
    with open(os.path.join(TOP, 'docs', 'system', 'dedup-libvirt.rst'),
              encoding='utf-8') as f:
        text = f.read()
    files = [p for p in tracked('') if re.match(
        'packaging/(?!debian/|man/|install.list)', p)]
    tap.check(len(files) > 6, 'no files?')
    missing = [p for p in files if p not in text]
    tap.check(not missing, 'not named: ' + ' '.join(missing))


tap.main()
