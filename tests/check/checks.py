# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checks of the source share."""

import functools
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
BUILD = os.path.join(TOP, 'build')
# Another version of QEMU than the usual one is built elsewhere.
QEMU_DIR = os.environ.get('QEMU_DIR', BUILD)
TREE = os.path.join(QEMU_DIR, 'qemu-src')
OBJ = os.path.join(QEMU_DIR, 'qemu-obj')

sys.path.insert(0, os.path.join(TOP, 'tests', 'guest'))
import tap                                      # noqa: E402


def tracked(*suffixes):
    """The project's files whose names end so, new ones included."""
    out = subprocess.run(
        ['git', '-C', TOP, 'ls-files', '-z', '--cached', '--others',
         '--exclude-standard'], stdout=subprocess.PIPE, check=True, text=True)
    return sorted(f for f in set(out.stdout.split('\0'))
                  if f.endswith(suffixes) and
                  os.path.isfile(os.path.join(TOP, f)))


def run(*command, **kwargs):
    """The completed process, stdout and stderr in one text."""
    return subprocess.run(command, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True,
                          errors='replace', check=False, **kwargs)


@functools.lru_cache
def versions():
    """The versions of QEMU that there are patches for: ["10.0", "10.2"]."""
    return ['.'.join(map(str, v)) for v in script('prepare-tree').known_series()]


def series(version):
    """The patches for a version, in order."""
    return script('prepare-tree').read_series(version)


@functools.lru_cache
def fetch(version):
    """(Where the unpatched source of a version is, or why there is none)."""
    out = subprocess.run(
        [os.path.join(TOP, 'scripts', 'fetch-qemu')], text=True, check=False,
        env=dict(os.environ, QEMU_VERSION=version),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if out.returncode:
        lines = out.stderr.strip().split('\n')
        return None, next((s for s in lines if s.startswith('E: ')), lines[-1])
    return out.stdout.strip(), None


def touched(version):
    """Every file that the patches for a version change."""
    files = set()
    for patch in series(version):
        with open(patch, encoding='utf-8') as f:
            files |= set(re.findall(r'^--- a/(\S+)', f.read(), re.M))
    return sorted(files)


def small_source(full, version):
    """A source tree with just the files that the patches change."""
    source = scratch()
    for path in touched(version) + ['VERSION']:
        os.makedirs(os.path.dirname(os.path.join(source, path)),
                    exist_ok=True)
        shutil.copy2(os.path.join(full, path), os.path.join(source, path))
    return source


def scratch():
    path = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda: shutil.rmtree(path))
    return path


def script(name):
    """The program scripts/@name as a module."""
    sys.dont_write_bytecode = True
    loader = importlib.machinery.SourceFileLoader(
        name.replace('-', '_'), os.path.join(TOP, 'scripts', name))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module
