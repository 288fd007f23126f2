#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What makes packages of the project fits together.

The full build, the package and the series for Debian's own source package take
long to make.  What can be told without making them is told here.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import tempfile

from checks import BUILD, TOP, run, script, tracked
import tap

DEBIAN = os.path.join(TOP, 'packaging', 'debian')
INSTALL = os.path.join(TOP, 'scripts', 'install-files')
SERIES = os.path.join(TOP, 'scripts', 'debian-series')
# install-deps installs them, and every Debian package may lean on them.
ESSENTIAL = {'gcc', 'libc6-dev', 'make', 'patch', 'dpkg-dev'}
# For speed alone
OPTIONAL = {'ccache'}
# "gnutls-dev" is provided by the package with this name.
SAME = {'libgnutls28-dev': 'gnutls-dev'}
PREFIX = '/usr/local'


def scratch():
    path = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda: shutil.rmtree(path, ignore_errors=True))
    return path


def read(*names):
    with open(os.path.join(*names), encoding='utf-8') as f:
        return f.read()


def write(text, *names):
    path = os.path.join(*names)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)


def fetched():
    """Debian's source, with Debian's patches applied."""
    name = os.path.join(BUILD, 'fetch', 'directory')
    if not os.path.exists(name):
        tap.skip('the source was not fetched (QEMU_SRC)')
    return os.path.join(BUILD, 'fetch', read(name).strip())


def features():
    """scripts/full-features: [(options, packages, first release)]."""
    table = []
    for line in read(TOP, 'scripts', 'full-features').splitlines():
        if not line.startswith('#'):
            fields = [f.strip() for f in line.split('|')] + ['']
            table.append((fields[0].split(), fields[1].split(), fields[2]))
    tap.check(len(table) > 20, 'no features?')
    return table


def paragraph(name):
    """A field of debian/control's first paragraph."""
    text = re.sub(r'^#.*\n', '', read(DEBIAN, 'control'), flags=re.M)
    text = re.search(r'^%s:(.*?)(?=^\S|\Z)' % name, text.split('\n\n')[0],
                     re.M | re.S)
    return [w.strip() for w in text.group(1).split(',') if w.strip()]


@tap.case
def test_features():
    """the full build's options and packages are those of Debian's control"""
    debian = os.path.join(fetched(), 'debian')
    out = run('sh', os.path.join(debian, 'extract-config-opts'),
              'linux-amd64', os.path.join(debian, 'control'))
    wanted = {w for w in out.stdout.split() if not w.startswith('--disable')}
    ours = {o for options, _, _ in features() for o in options}
    tap.check('--enable-spice' in wanted, out.stdout)
    tap.check(ours == wanted, 'Debian alone: %s; here alone: %s' % (
        ' '.join(sorted(wanted - ours)), ' '.join(sorted(ours - wanted))))
    control = read(debian, 'control').split('\nPackage:')[0]
    control = set(re.findall(r'[a-z0-9.+-]+',
                             re.sub(r'^#.*', '', control, flags=re.M)))
    missing = [p for _, packages, _ in features() for p in packages
               if SAME.get(p, p) not in control]
    tap.check(not missing, 'not in Debian\'s: ' + ' '.join(missing))


@tap.case
def test_dependencies():
    """what the package is built with is what install-deps installs"""
    text = read(TOP, 'scripts', 'install-deps')
    groups = {name: set(re.search(r'^%s="([^"$]*)"' % name, text,
                                  re.M).group(1).split())
              for name in ('build', 'run', 'fresh')}
    wanted = (groups['build'] | groups['fresh']) - ESSENTIAL - OPTIONAL
    for _, packages, since in features():
        wanted |= {'%s | base-files (<< %s~)' % (p, since) if since else p
                   for p in packages}
    least = re.search(r'^meson_min=(\S+)', text, re.M).group(1)
    wanted = {p + ' (>= %s~)' % least if p == 'meson' else p for p in wanted}
    have = set(paragraph('Build-Depends'))
    debhelper = {p for p in have if p.startswith('debhelper-compat')}
    tap.check(debhelper and ' debhelper ' in text, 'no debhelper')
    have -= debhelper
    tap.check(have == wanted, 'control alone: %s; install-deps alone: %s' % (
        ', '.join(sorted(have - wanted)), ', '.join(sorted(wanted - have))))
    control = read(DEBIAN, 'control')
    depends = re.search(r'^Depends:(.*?)^\S', control, re.M | re.S).group(1)
    missing = [p for p in groups['run'] if p not in depends]
    tap.check(not missing, 'the package does not want: ' + ' '.join(missing))


def listed():
    """packaging/install.list: {file: directory}."""
    return dict(line.split() for line in
                read(TOP, 'packaging', 'install.list').splitlines()
                if line and not line.startswith('#'))


@tap.case
def test_files():
    """each file of packaging/ is installed; the package takes what is there"""
    files = listed()
    left = [p for p in tracked('') if p.startswith('packaging/') and
            not p.startswith('packaging/debian/') and p not in files and
            p != 'packaging/install.list']
    tap.check(not left, 'not in install.list: ' + ' '.join(left))
    gone = [p for p in files if not os.path.isfile(os.path.join(TOP, p))]
    tap.check(not gone, 'missing: ' + ' '.join(gone))
    there = ['usr/local/%s%s' % (place, os.path.basename(path))
             for path, place in files.items()]
    for line in read(DEBIAN, 'qemu-system-x86-dedup.install').splitlines():
        if line.startswith('#'):
            continue
        pattern = line.split()[0]
        tap.check(pattern.endswith('.so') or any(
            fnmatch.fnmatch(p, pattern) or p.startswith(pattern + '/')
            for p in there), line)
    # What debian/rules names
    rules = read(DEBIAN, 'rules')
    for name in re.findall(r'\$\(examples\)/(\S+)', rules):
        tap.check(any(p.endswith('examples/' + name) for p in there), name)
    for name in re.findall(r'\$\(QEMU_DEDUP\)/(scripts/\S+)', rules):
        tap.check(os.access(os.path.join(TOP, name), os.X_OK), name)
    tap.check(os.access(os.path.join(DEBIAN, 'rules'), os.X_OK), 'rules')


def tree(root):
    """All that is in a directory."""
    return sorted(os.path.relpath(os.path.join(base, name), root)
                  for base, dirs, names in os.walk(root)
                  for name in dirs + names)


def stage(*places):
    """What meson would have installed."""
    root = scratch()
    for place in places:
        write(place, root + PREFIX, place)
    os.chmod(os.path.join(root + PREFIX, places[0]), 0o755)
    write('', root, 'usr/lib/qemu/helper')
    return root


@tap.case
def test_install():
    """install-files puts it there, and takes all of it back"""
    dest = os.path.join(scratch(), 'new', 'dir')
    first = stage('bin/qemu', 'lib/qemu-dedup/a.so', 'share/old/file')
    second = stage('bin/qemu', 'lib/qemu-dedup/a.so', 'lib/x/b.so')

    def call(*args, status=0):
        out = run(INSTALL, *args)
        tap.check(out.returncode == status, out.stdout)
        return out.stdout
    tap.check('nothing to remove' in call('--remove', dest, PREFIX, status=1),
              'removes nothing')
    tap.check(not os.path.exists(dest), 'made something')
    call(first, dest, PREFIX)
    root = dest + PREFIX
    tap.check(os.stat(root + '/bin/qemu').st_mode & 0o777 == 0o755 and
              read(root, 'bin/qemu') == 'bin/qemu', 'bin/qemu')
    tap.check(not os.path.exists(dest + '/usr/lib'), 'outside of the prefix')
    for path, place in listed().items():
        tap.check(read(root, place, os.path.basename(path)) == read(TOP, path),
                  path)
    # Over it, with other files
    call(second, dest, PREFIX)
    tap.check(os.path.exists(root + '/lib/x/b.so'), 'b.so')
    tap.check(not os.path.exists(root + '/share/old/file'), 'file stays')
    call('--remove', dest, PREFIX)
    tap.check(not os.path.exists(os.path.dirname(dest)),
              'left: ' + ' '.join(tree(os.path.dirname(dest))))
    # What others have there stays.
    write('mine', root, 'bin/other')
    write('mine', root, 'lib/qemu-dedup/other.so')
    before = tree(dest)
    call(first, dest, PREFIX)
    call('--remove', dest, PREFIX)
    tap.check(tree(dest) == before, ' '.join(tree(dest)))


@tap.case
def test_interrupted():
    """what an interrupted install left is removed, too"""
    dest = scratch()
    root = dest + PREFIX
    source = stage('bin/qemu', 'lib/z/a.so')
    os.makedirs(root + '/lib/z/a.so.dedup-new')
    out = run(INSTALL, source, dest, PREFIX)
    tap.check(out.returncode != 0, 'it was not interrupted')
    tap.check(os.path.exists(root + '/bin/qemu'), 'nothing was installed')
    os.rmdir(root + '/lib/z/a.so.dedup-new')
    os.rmdir(root + '/lib/z')
    out = run(INSTALL, '--remove', dest, PREFIX)
    tap.check(out.returncode == 0, out.stdout)
    tap.check(tree(dest) == ['usr', 'usr/local', 'usr/local/lib'],
              'left: ' + ' '.join(tree(dest)))


def small_source():
    """Debian's source package, with just the files that our patches change,
    and its own patches applied."""
    full, small = fetched(), scratch()
    shutil.copytree(os.path.join(full, 'debian'),
                    os.path.join(small, 'debian'))
    shutil.copytree(os.path.join(full, '.pc'), os.path.join(small, '.pc'))
    paths = set()
    for patch in script('prepare-tree').patches_for(full):
        paths |= set(re.findall(r'^--- a/(\S+)', read(patch), re.M))
    for path in paths | {'VERSION'}:
        os.makedirs(os.path.dirname(os.path.join(small, path)), exist_ok=True)
        shutil.copy2(os.path.join(full, path), os.path.join(small, path))
    return small, paths


@tap.case
def test_series():
    """the series for Debian's own source package: dpkg-source applies it"""
    source, paths = small_source()
    out = run(SERIES, source)
    tap.check(out.returncode == 0, out.stdout)
    out = run('dpkg-source', '--before-build', source)
    tap.check(out.returncode == 0 and 'dedup/files.patch' in out.stdout,
              out.stdout)
    places = [line.split('#')[0].split() for line in
              read(TOP, 'overlay.list').splitlines()]
    places = [p for p in places if p]
    tap.check(len(places) > 3, 'no overlay?')
    for path, place in places:
        here, there = os.path.join(TOP, path), os.path.join(source, place)
        for name in tree(here) if path.endswith('/') else ['']:
            a, b = os.path.join(here, name), os.path.join(there, name)
            if os.path.isfile(a) and not re.search(r'/\.|~$|\.o$', a):
                tap.check(read(a) == read(b), b)
    tree_now = os.path.join(BUILD, 'qemu-src')
    for path in paths:
        tap.check(read(source, path) == read(tree_now, path),
                  path + ' is not as "make tree" has it')
    for name in 'control', 'control-in':
        tap.check('\n libxxhash-dev,\n' in read(source, 'debian', name), name)
    out = subprocess.run(['dpkg-parsechangelog', '-S', 'Version'], cwd=source,
                         stdout=subprocess.PIPE, text=True, check=True).stdout
    tap.check(out.strip().endswith('+dedup1'), out)
    out = run(SERIES, source)
    tap.check(out.returncode != 0 and 'already' in out.stdout, out.stdout)


@tap.case
def test_series_refuses():
    """a source to which it does not apply is refused"""
    source, paths = small_source()
    path = os.path.join(source, 'system', 'physmem.c')
    tap.check('system/physmem.c' in paths, 'nothing in physmem.c')
    write(re.sub(r'[a-z]', 'x', read(path)), path)
    out = run(SERIES, source)
    tap.check(out.returncode == 0, out.stdout)
    out = run('dpkg-source', '--before-build', source)
    tap.check(out.returncode != 0, 'applies to anything')
    out = run(SERIES, scratch())
    tap.check(out.returncode != 0 and 'not an unpacked' in out.stdout,
              out.stdout)


tap.main()
