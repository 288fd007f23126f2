#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/private-apt finds Debian's archive in the system's own sources."""

import os
import shutil
import tempfile

from checks import BUILD, TOP, run
import tap

SCRIPT = os.path.join(TOP, 'scripts', 'private-apt')
SUITE = 'check-suite'


def source_for(**files):
    """What it writes for these sources; None if it finds no archive."""
    etc = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda: shutil.rmtree(etc))
    out = os.path.join(BUILD, 'apt', SUITE + '-deb')
    tap.cleanup(lambda: shutil.rmtree(out, ignore_errors=True))
    shutil.rmtree(out, ignore_errors=True)
    os.mkdir(os.path.join(etc, 'sources.list.d'))
    for name, text in files.items():
        stem, _, suffix = name.rpartition('_')
        path = ('sources.list' if name == 'sources_list' else
                f'sources.list.d/{stem}.{suffix}')
        with open(os.path.join(etc, path), 'w', encoding='ascii') as f:
            f.write(text)
    # A command of apt-get that touches neither network nor system.
    result = run(SCRIPT, SUITE, 'deb', 'indextargets',
                 env=dict(os.environ, PRIVATE_APT_ETC=etc))
    if result.returncode:
        tap.check("no source for Debian's main archive" in result.stdout,
                  result.stdout)
        return None
    with open(os.path.join(out, 'parts', 'private.sources'),
              encoding='ascii') as f:
        return dict(line.strip().split(': ', 1) for line in f)


def expect(uri, key=None, **files):
    got = source_for(**files)
    want = {'Types': 'deb', 'URIs': uri, 'Suites': SUITE,
            'Components': 'main'}
    if key:
        want['Signed-By'] = key
    tap.check(got == want, f'{got}, not {want}')


DEB822 = '''Types: deb
# a comment
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /some/key.gpg

Types: deb
URIs: http://mirror.test/debian-security
Suites: bookworm-security
Components: main
'''


@tap.case
def test_deb822():
    """a deb822 file, the archive first"""
    expect('http://mirror.test/debian', '/some/key.gpg',
           debian_sources=DEB822)


@tap.case
def test_deb822_security_first():
    """a deb822 file, the security archive first"""
    first, second = DEB822.split('\n\n')
    expect('http://mirror.test/debian', '/some/key.gpg',
           debian_sources=second + '\n' + first + '\n')


@tap.case
def test_deb822_disabled():
    """what is disabled, or has no main, is passed over"""
    expect('http://b.test/debian',
           a_sources=DEB822.replace('Types: deb\n#',
                                    'Enabled: no\nTypes: deb\n#'),
           b_sources='Types: deb deb-src\nURIs: http://c.test/debian\n'
           'Suites: trixie\nComponents: contrib\n\n'
           'Types: deb deb-src\nURIs: http://b.test/debian\n'
           'Suites: trixie\nComponents: main contrib\n')


@tap.case
def test_one_line():
    """one-line sources, with and without options"""
    expect('http://a.test/debian',
           sources_list='# deb http://no.test/debian bookworm main\n'
           'deb http://s.test/debian-security bookworm-security main\n'
           'deb http://a.test/debian bookworm main contrib\n')
    expect('http://a.test/debian', '/k.gpg',
           x_list='deb [ arch=amd64 signed-by=/k.gpg ] http://a.test/debian '
           'trixie main\n')
    expect('http://a.test/debian', '/k.gpg',
           x_list='deb [signed-by=/k.gpg] http://a.test/debian stable main\n')


@tap.case
def test_other_archives():
    """an archive of something else is not taken for Debian's"""
    tap.check(source_for(
        node_sources='Types: deb\nURIs: http://n.test/node\n'
        'Suites: nodistro\nComponents: main\n',
        cloud_list='deb http://c.test/apt cloud-sdk-bookworm main\n') is None,
        'took one')


tap.main()
