# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests hold that are measured: a mix as guests of one image have it.

Page cache of one disk, data of their own, data that guests have in common,
copies within a guest, freed memory.  Each guest does it in an order of its
own, after it has used and freed some memory, so that what is equal lies in
other places: how long the runs of equal pages are decides what merging costs.
"""

RAM = 384                       # MiB for each guest
BLOCKS = 12288                  # of the disk that all read
DISK = (BLOCKS, 11, BLOCKS)     # arguments of host.make_disk()

CACHE = 'cache /dev/vda 11 %d %%d' % BLOCKS


def fill(vm, number):
    """Fill a guest that has booted."""
    parts = ['alloc s 8192 same 3 scatter', 'alloc u 10240 signed',
             'alloc d 4096 dup 4', 'alloc m 4096 mixed 0 scatter']
    turn = number % len(parts)
    commands = ['alloc f %d signed 0 nohuge' % (6144 + 1024 * number),
                'alloc g 2048 signed 0 nohuge', 'drop f']
    for i, part in enumerate(parts[turn:] + parts[:turn]):
        commands.append(CACHE % (BLOCKS * (i + 1) // len(parts)))
        commands.append(part)
    for command in commands + ['alloc z 8192 zero', 'drop z']:
        vm.agent.ask(command)
