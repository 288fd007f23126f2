#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Nobody hands out the file behind guest RAM without saying so.

Merged pages are not in that file.  Whoever maps it, or gives it away, must
hold ram_guard_whole_get() (include/hw/dedup/ram-guard.h).  This looks for
every function in QEMU that takes the file descriptor of RAM, and knows each
by name: a new one fails the test until somebody has judged it.  It looks in
the tree that was built and in the source of every other version of QEMU that
there are patches for.
"""

import atexit
import functools
import os
import re
import shutil
import tempfile

from checks import TREE, fetch, run, script, series, versions
import tap

GETTERS = re.compile(
    r'\b(?:memory_region_get_fd|qemu_ram_get_fd)\s*\(|'
    r'\b(?:rb|ram_block|block|new_block)->fd\b')

# file:function -> why it is harmless, or who holds the RAM whole for it.
# The version in front: not before that one.
EXPORTERS = {
    'hw/virtio/vhost-user.c:vhost_user_get_mr_data': 'vhost_user_init',
    'hw/remote/proxy-memory-listener.c:get_fd_from_hostaddr':
        'pci_proxy_dev_realize',
    'hw/display/virtio-gpu-udmabuf.c:virtio_gpu_create_udmabuf':
        'virtio_gpu_device_realize',
    'hw/virtio/virtio-pmem.c:virtio_pmem_flush': 'virtio_pmem_realize',
    'hw/misc/ivshmem-pci.c:ivshmem_exit': 'ivshmem_common_realize',
    '10.1 hw/vfio-user/container.c:vfio_user_dma_map': 'vfio_user_pci_realize',
}
HARMLESS = {
    'block/blkio.c:blkio_mem_region_from_host':
        'blkio disables discards, which excludes merging',
    'hw/i386/sgx.c:sgx_epc_reset':
        'the fd is /dev/sgx_vepc, which is never merged',
    'hw/virtio/virtio-mem.c:virtio_mem_has_shared_zeropage': 'asks for its kind',
    'hw/virtio/virtio-mem.c:virtio_mem_set_block_state':
        'populates under the discard manager',
    'hw/virtio/virtio-mem.c:virtio_mem_prealloc_range_cb':
        'populates under the discard manager',
    'hw/virtio/vhost.c:vhost_section': 'asks whether there is one',
    'hw/display/virtio-gpu-udmabuf.c:find_memory_backend_type':
        'asks for its kind',
    'hw/ppc/spapr_nvdimm.c:spapr_nvdimm_validate': 'not x86',
    'hw/ppc/spapr_nvdimm.c:flush_worker_cb': 'not x86',
    'hw/ppc/spapr_nvdimm.c:h_scm_flush': 'not x86',
    'backends/hostmem-file.c:file_backend_unparent':
        'empties the file when the scanner has let go of the range',
    'backends/hostmem.c:host_memory_backend_set_prealloc': 'preallocates',
    'backends/hostmem.c:host_memory_backend_memory_complete': 'preallocates',
    'system/memory.c:memory_region_get_fd': 'the getter',
    'system/physmem.c:qemu_ram_get_fd': 'the getter',
    'system/physmem.c:qemu_ram_msync': 'syncs, exports nothing',
    'system/physmem.c:qemu_ram_alloc_internal': 'the block is being made',
    'system/physmem.c:file_ram_alloc': 'the block is being made',
    'system/physmem.c:reclaim_ramblock': 'the block is freed',
    'system/physmem.c:qemu_ram_remap_mmap': 'asserts that there is none',
    'system/physmem.c:qemu_ram_remap': 'discards, by the hook',
    'system/physmem.c:ram_block_discard_range': 'discards, after the hook',
    'system/physmem.c:ram_is_cpr_compatible': 'asks whether there is one',
    'migration/postcopy-ram.c:test_ramblock_postcopiable':
        'asks for its file system',
    'stubs/physmem.c:qemu_ram_get_fd': 'a stub',
    '10.1 hw/vfio/container.c:vfio_container_dma_map':
        'VFIO disables discards, which excludes merging',
}


class Tree:
    """QEMU's sources: the patched files, and where all the others are."""

    def __init__(self, version, patched, plain):
        self.version = version
        self.roots = [patched, plain]

    def read(self, path):
        for root in self.roots:
            full = os.path.join(root, path)
            if os.path.exists(full):
                with open(full, encoding='utf-8') as f:
                    return f.read()
        return ''

    def find(self, pattern, directory='.'):
        """The .c files below @directory that have a match."""
        paths = set()
        for root in self.roots:
            out = run('grep', '-rlE', '--include=*.c', pattern, directory,
                      cwd=root).stdout
            paths |= {os.path.normpath(p) for p in out.split('\n')
                      if p.endswith('.c')}
        return paths

    def known(self, table):
        """Those of @table that this version has."""
        entries = {}
        for place, what in table.items():
            since, _, place = place.rpartition(' ')
            if numbers(since) <= numbers(self.version):
                entries[place] = what
        return entries

    def functions_using(self):
        """{file:function} of every use in a .c file outside tests."""
        found = {}
        for path in self.find(GETTERS.pattern.replace('(?:', '(').replace(
                r'\s', '[[:space:]]')):
            if path.startswith(('tests/', 'hw/dedup/', '.pc/')):
                continue
            name = '?'
            for line in self.read(path).split('\n'):
                # A definition begins in the first column and is no label.
                m = re.match(r'(?:[A-Za-z_][\w\s*]*?[\s*])?(\w+)\s*\(', line)
                if m and not line.rstrip().endswith(';'):
                    name = m.group(1)
                if GETTERS.search(line) and not line.startswith('#'):
                    found.setdefault(f'{path}:{name}', line.strip())
        return found


def numbers(version):
    return [int(n) for n in version.split('.')[:2] if n]


@functools.lru_cache
def trees():
    """The tree that was built, and every other version's."""
    with open(os.path.join(TREE, 'VERSION'), encoding='ascii') as f:
        built = '.'.join(f.read().split('.')[:2])
    found, missing = [Tree(built, TREE, TREE)], []
    for version in versions():
        full, why = (None, None) if version == built else fetch(version)
        if full:
            stage = tempfile.mkdtemp(prefix='dedup-check-')
            atexit.register(shutil.rmtree, stage)
            script('prepare-tree').apply_patches(full, series(version), stage)
            found.append(Tree(version, stage, full))
        elif why:
            missing.append(f'no source of QEMU {version}: {why}')
    return found, missing


def each_tree():
    found, missing = trees()
    yield from found
    if missing:
        tap.skip(', '.join(missing))


@tap.case
def test_known():
    """every user of the file behind guest RAM is known"""
    for tree in each_tree():
        new = {k: v for k, v in tree.functions_using().items()
               if k not in tree.known(EXPORTERS) and
               k not in tree.known(HARMLESS)}
        tap.check(not new, f'{tree.version}, not judged yet: ' + ', '.join(
            f'{k} ({v})' for k, v in sorted(new.items())))


@tap.case
def test_current():
    """every one of the list is still there"""
    for tree in each_tree():
        gone = (set(tree.known(EXPORTERS)) | set(tree.known(HARMLESS))) - \
            set(tree.functions_using())
        tap.check(not gone, f'gone from QEMU {tree.version}: ' +
                  ', '.join(sorted(gone)))


@tap.case
def test_held():
    """whoever exports holds the RAM whole"""
    for tree in each_tree():
        for where, holder in tree.known(EXPORTERS).items():
            bodies = ''
            for path in tree.find(rf'\b{holder}\(', os.path.dirname(where)):
                m = re.search(rf'^[^\n;]*\b{holder}\([^;{{]*\)\n\{{.*?^\}}',
                              tree.read(path), re.M | re.S)
                bodies += m.group(0) if m else ''
            tap.check('ram_guard_whole_get(' in bodies,
                      f'{tree.version}: {holder}, for {where}, does not hold '
                      'the RAM whole')


tap.main()
