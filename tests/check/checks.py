# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checks of the source share."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.abspath(__file__))))
BUILD = os.path.join(TOP, 'build')
TREE = os.path.join(BUILD, 'qemu-src')

sys.path.insert(0, os.path.join(TOP, 'tests', 'guest'))


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


def script(name):
    """The program scripts/@name as a module."""
    sys.dont_write_bytecode = True
    loader = importlib.machinery.SourceFileLoader(
        name.replace('-', '_'), os.path.join(TOP, 'scripts', name))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module
