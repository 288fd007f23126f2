#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""House style: QEMU's checkpatch, licence lines, and no compiler warning."""

import json
import os
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor

from checks import BUILD, OBJ, TOP, TREE, run, tracked
import tap

CHECKPATCH = os.path.join(TREE, 'scripts', 'checkpatch.pl')
# Not C, or not a language that has comments.
NO_LICENCE_LINE = ('COPYING', '.gitignore', '.patch', '.md', '.Debian',
                   'debian/changelog', 'debian/copyright', 'source/format')


def each(function, items):
    """Call it for each, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # A list: so what one of them raises is raised here.
        return list(pool.map(function, items))


def checkpatch(*arguments):
    out = run('perl', CHECKPATCH, '--strict', '--terse', '--no-summary',
              *arguments, cwd=TOP)
    tap.check(out.returncode == 0 and not out.stdout.strip(), out.stdout)


@tap.case
def test_checkpatch_files():
    """checkpatch --strict is content with every C file"""
    files = tracked('.c', '.h')
    tap.check(files, 'no C files?')
    some = 20
    each(lambda i: checkpatch('-f', *files[i:i + some]),
         range(0, len(files), some))


@tap.case
def test_checkpatch_patches():
    """checkpatch --strict is content with every patch"""
    patches = tracked('.patch')
    tap.check(patches, 'no patches?')
    each(lambda patch: checkpatch('--patch', '--no-signoff', patch), patches)


@tap.case
def test_licence():
    """every file names its licence"""
    bad = []
    for path in tracked(''):
        if path.endswith(NO_LICENCE_LINE):
            continue
        with open(os.path.join(TOP, path), encoding='utf-8',
                  errors='replace') as f:
            if 'SPDX-License-Identifier: GPL-2.0-or-later' not in f.read(4096):
                bad.append(path)
    tap.check(not bad, 'no SPDX line: ' + ' '.join(bad))


def compile_all(database, compiler, wanted, extra=()):
    """Compile once more what is @wanted, a warning is an error."""
    with open(database, encoding='utf-8') as f:
        commands = json.load(f)

    def compile_one(c):
        source = os.path.normpath(os.path.join(c['directory'], c['file']))
        if not wanted(source):
            return False
        words = shlex.split(c['command'])
        if os.path.basename(words[0]) == 'ccache':
            words.pop(0)
        words[0] = compiler or words[0]
        words[words.index('-o') + 1] = '/dev/null'
        # The dependency file belongs to the real build.
        for option in ('-MQ', '-MF'):
            if option in words:
                del words[words.index(option):words.index(option) + 2]
        words = [w for w in words if w != '-MD']
        out = run(*words, '-Werror', *extra, cwd=c['directory'])
        tap.check(out.returncode == 0 and not out.stdout,
                  f'{source}: {out.stdout}')
        return True

    done = sum(each(compile_one, commands))
    tap.check(done, f'{database}: nothing to compile')
    tap.note(f'{done} files')


@tap.case
def test_warnings_qemu():
    """inside QEMU none of our files, and none that we patch, has a warning"""
    ours = set()
    with open(os.path.join(TREE, '.dedup-tree.json'), encoding='utf-8') as f:
        manifest = json.load(f)
    for path in manifest['patched'] + manifest['overlay']:
        ours.add(os.path.join(TREE, path))
    compile_all(os.path.join(OBJ, 'compile_commands.json'), None,
                lambda s: s in ours and '/tests/' not in s)


@tap.case
def test_warnings_clang():
    """the engine and its tests have no warning with clang"""
    if not shutil.which('clang'):
        tap.skip('no clang')
    compile_all(os.path.join(BUILD, 'engine', 'compile_commands.json'),
                'clang', lambda s: re.search(r'/(hw|tests)/', s),
                ['-Wno-unknown-warning-option'])


tap.main()
