# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of a QEMU process that cannot be read any more.

As after an error of the memory: UFFDIO_POISON (Linux 6.6), by a duplicate of the
userfaultfd that the scanner has.
"""

import ctypes
import fcntl
import os
import struct

from host import PAGE

SYS_PIDFD_GETFD = 438
REGISTER = 0xc020aa00
UNREGISTER = 0x8010aa01
POISON = 0xc020aa08
MODE_MISSING = 1


def _userfaultfd(pid):
    """A duplicate of the process's."""
    for fd in os.listdir('/proc/%d/fd' % pid):
        try:
            target = os.readlink('/proc/%d/fd/%s' % (pid, fd))
        except FileNotFoundError:
            continue
        if target == 'anon_inode:[userfaultfd]':
            pidfd = os.pidfd_open(pid)
            got = ctypes.CDLL(None).syscall(SYS_PIDFD_GETFD, pidfd, int(fd),
                                            0)
            os.close(pidfd)
            return got
    return -1


def _write_file(pid, address, data):
    """Write to shared memory that the process has not touched yet."""
    with open('/proc/%d/maps' % pid, encoding='ascii') as f:
        for line in f:
            words = line.split()
            start, end = (int(w, 16) for w in words[0].split('-'))
            if start <= address < end:
                name = '/proc/%d/map_files/%x-%x' % (pid, start, end)
                fd = os.open(name, os.O_RDWR)
                os.pwrite(fd, data, int(words[2], 16) + address - start)
                os.close(fd)
                return
    raise LookupError('nothing is mapped at 0x%x' % address)


def fill_and_break(pid, address, data):
    """Pages of shared RAM that nobody has touched get data, and break.

    False: not on this host.
    """
    _write_file(pid, address, data)
    return break_pages(pid, address, len(data)) == len(data) // PAGE


def break_pages(pid, address, size):
    """Break those pages of shared RAM that the process has not mapped.

    Returns how many; 0 also where this host cannot do it.
    """
    fd = _userfaultfd(pid)
    if fd < 0:
        return 0
    broken = 0
    try:
        fcntl.ioctl(fd, REGISTER, struct.pack('<4Q', address, size,
                                              MODE_MISSING, 0))
        for at in range(address, address + size, PAGE):
            try:
                fcntl.ioctl(fd, POISON, struct.pack('<4Q', at, PAGE, 0, 0))
                broken += 1
            except FileExistsError:
                pass # it is mapped
        fcntl.ioctl(fd, UNREGISTER, struct.pack('<2Q', address, size))
    except OSError:
        return 0
    finally:
        os.close(fd)
    return broken
