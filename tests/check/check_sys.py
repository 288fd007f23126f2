#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's system calls go through host/sys.h, where a test can have any
of them fail."""

import re

from layers import COMMENT_OR_STRING, engine_files, full, none, text
import tap

SYS = 'host/sys.h'
# What glibc calls it, or another call that does the same
OTHER_NAMES = {
    'syscall', 'open64', 'pread64', 'pwrite64', 'mmap64', 'lseek64', 'dup',
    'dup2', 'dup3', 'readv', 'writev', 'preadv', 'pwritev', 'send', 'recv',
    'sendto', 'recvfrom', 'sendmmsg', 'recvmmsg', 'accept', 'socketpair',
    'access', 'mkdir', 'unlink', 'rename', 'renameat', 'link', 'linkat',
    'symlink', 'rmdir', 'truncate', 'posix_fallocate', 'flock', 'lockf',
    'ppoll', 'select', 'epoll_create1', 'epoll_ctl', 'epoll_wait', 'pipe',
    'pipe2', 'mlock', 'mlock2', 'msync', 'fopen', 'fdopen', 'opendir',
    'statfs', 'pthread_create', 'g_thread_new', 'g_thread_try_new', 'g_open',
    'g_file_get_contents', 'g_file_set_contents', 'g_mkdir',
    'g_mkdir_with_parents', 'g_unlink', 'g_rename', 'g_file_test',
    'g_dir_open', 'process_vm_readv', 'process_vm_writev', 'fork',
}


def entries():
    """The names that sys.h has: sys_NAME() is for NAME()."""
    return set(re.findall(r'^DEDUP_SYS\([^,]+, (\w+),', text(full(SYS)),
                          re.M))


@tap.case
def test_table():
    """no file of the engine goes past host/sys.h"""
    names = entries()
    tap.check(len(names) > 40 and 'mmap' in names, f'{SYS} has {names}?')
    direct = re.compile(r'(?<![\w.>])(%s)\s*\(' %
                        '|'.join(sorted(names | OTHER_NAMES)))
    bad = []
    for name in engine_files():
        source = COMMENT_OR_STRING.sub(
            lambda m: re.sub(r'[^\n]', ' ', m.group()), text(full(name)))
        if name != SYS:
            bad += [f'{full(name)}:{source.count(chr(10), 0, m.start()) + 1}: '
                    f'{m.group(1)}()' for m in direct.finditer(source)]
    none(bad, f'call sys_NAME() of {SYS}, or give that an entry')
    tap.note(f'{len(names)} calls')


@tap.case
def test_used():
    """every entry of host/sys.h is used"""
    used = set()
    for name in engine_files():
        used |= set(re.findall(r'\bsys_(\w+)\(', text(full(name))))
    none(sorted(entries() - used), f'delete it from {SYS}')


tap.main()
