#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Nobody hands out the file behind guest RAM without saying so.

Merged pages are not in that file.  Whoever maps it, or gives it away, must
hold ram_guard_whole_get() (include/hw/dedup/ram-guard.h).  This looks for
every function in QEMU that takes the file descriptor of RAM, and knows each
by name: a new one fails the test until somebody has judged it.
"""

import os
import re

from checks import TREE, run
import tap

GETTERS = re.compile(
    r'\b(?:memory_region_get_fd|qemu_ram_get_fd)\s*\(|'
    r'\b(?:rb|ram_block|block|new_block)->fd\b')

# file:function -> why it is harmless, or who holds the RAM whole for it.
EXPORTERS = {
    'hw/virtio/vhost-user.c:vhost_user_get_mr_data': 'vhost_user_init',
    'hw/remote/proxy-memory-listener.c:get_fd_from_hostaddr':
        'pci_proxy_dev_realize',
    'hw/display/virtio-gpu-udmabuf.c:virtio_gpu_create_udmabuf':
        'virtio_gpu_device_realize',
    'hw/virtio/virtio-pmem.c:virtio_pmem_flush': 'virtio_pmem_realize',
    'hw/misc/ivshmem-pci.c:ivshmem_exit': 'ivshmem_common_realize',
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
}


def functions_using():
    """{file:function} of every use in a .c file outside tests."""
    out = run('grep', '-rlE', '--include=*.c', GETTERS.pattern.replace(
        '(?:', '(').replace(r'\s', '[[:space:]]'), '.', cwd=TREE).stdout
    found = {}
    for path in out.split('\n'):
        path = path.removeprefix('./')
        if not path or path.startswith(('tests/', 'hw/dedup/')):
            continue
        name = '?'
        with open(os.path.join(TREE, path), encoding='utf-8') as f:
            for line in f:
                # A definition begins in the first column and is no label.
                m = re.match(r'(?:[A-Za-z_][\w\s*]*?[\s*])?(\w+)\s*\(', line)
                if m and not line.rstrip().endswith(';'):
                    name = m.group(1)
                if GETTERS.search(line) and not line.startswith('#'):
                    found.setdefault(f'{path}:{name}', line.strip())
    return found


@tap.case
def test_known():
    """every user of the file behind guest RAM is known"""
    new = {k: v for k, v in functions_using().items()
           if k not in EXPORTERS and k not in HARMLESS}
    tap.check(not new, 'not judged yet: ' + ', '.join(
        f'{k} ({v})' for k, v in sorted(new.items())))


@tap.case
def test_current():
    """every one of the list is still there"""
    gone = (set(EXPORTERS) | set(HARMLESS)) - set(functions_using())
    tap.check(not gone, 'gone from QEMU: ' + ', '.join(sorted(gone)))


@tap.case
def test_held():
    """whoever exports holds the RAM whole"""
    for where, holder in EXPORTERS.items():
        source = where.split(':')[0]
        directory = os.path.join(TREE, os.path.dirname(source))
        out = run('grep', '-rlE', '--include=*.c', rf'\b{holder}\(',
                  directory).stdout.split()
        bodies = ''
        for path in out:
            with open(path, encoding='utf-8') as f:
                m = re.search(rf'^[^\n;]*\b{holder}\([^;{{]*\)\n\{{.*?^\}}',
                              f.read(), re.M | re.S)
            bodies += m.group(0) if m else ''
        tap.check('ram_guard_whole_get(' in bodies,
                  f'{holder}, for {where}, does not hold the RAM whole')


tap.main()
