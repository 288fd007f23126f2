#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# alone
"""Each figure of query-dedup-stats beside an outside source.

The members are taken from QEMU's own schema: one without a check here fails
the test, and so does a check without a member.  No guest runs; the test
writes guest memory itself, so it knows what is in it.
"""

import os
import struct
import time

import dedup
import host
import poison
import tap
import vm as vms
from host import MIB, PAGE
from outside import Machine, Outside, Scene, pages

CHECKS = {}


def member(*paths):
    """Decorator: the function checks these members."""
    def register(function):
        for path in paths:
            assert path not in CHECKS, path
            CHECKS[path] = function
        return function
    return register


def near(what, said, seen, tolerance):
    """Fail unless two figures agree."""
    tap.check(abs(said - seen) <= tolerance,
              '%s: said %d, seen from outside %d, tolerance %d'
              % (what, said, seen, tolerance))


# The schema

def members_of(schema, type_name, prefix=''):
    """Paths of all members of an object type, lists and objects followed."""
    found = set()
    for m in schema[type_name]['members']:
        path = prefix + m['name']
        kind = schema[m['type']]
        if kind['meta-type'] == 'array':
            path += '[]'
            kind = schema[kind['element-type']]
        found.add(path)
        if kind['meta-type'] == 'object':
            found |= members_of(schema, kind['name'], path + '.')
    return found


def schema_members(vm):
    """The members of what query-dedup-stats returns a list of."""
    schema = {e['name']: e for e in vm.qmp.command('query-qmp-schema')}
    returned = schema[schema['query-dedup-stats']['ret-type']]
    return members_of(schema, returned['element-type'])


# What is still, once all is merged

@member('id')
def check_id(s):
    found = [o['name'] for o in s.vm.qmp.command('qom-list',
                                                 {'path': '/objects'})
             if o['type'] == 'child<dedup-scanner>']
    tap.check(found == [s.said['id']], str(found))


@member('state')
def check_state(s):
    # Stopped is what we made it; scheduled on no processor, says the host.
    tap.check(s.said['state'] == 'stopped', s.said['state'])
    path = '/proc/%d/task/%d/schedstat' % (s.vm.pid, s.said['thread-id'])
    with open(path, encoding='ascii') as f:
        before = int(f.read().split()[0])
    time.sleep(1)
    with open(path, encoding='ascii') as f:
        near('processor time while stopped', before,
             int(f.read().split()[0]), 5000000)


@member('write-protect')
def check_write_protect(s):
    base = '/proc/%d/fd' % s.vm.pid
    found = [os.readlink('%s/%s' % (base, fd)) for fd in os.listdir(base)]
    tap.check(s.said['write-protect'] == 'userfaultfd' and
              'anon_inode:[userfaultfd]' in found, s.said['write-protect'])


@member('thread-id')
def check_thread_id(s):
    found = [tid for tid, name in s.threads().items()
             if name == 'dedup-scanner']
    # Names are shown only with -name debug-threads=on.
    tap.check(found == [s.said['thread-id']] or
              (not found and s.said['thread-id'] in s.threads()), str(found))


@member('pages-total')
def check_total(s):
    near('pages-total', s.said['pages-total'],
         (s.seen.end - s.seen.start) // PAGE, 0)


@member('pages-present')
def check_present(s):
    # QEMU itself may touch a few pages while we count.
    near('pages-present', s.said['pages-present'],
         s.seen.own + len(s.seen.merged), 16)


@member('pages-merged')
def check_merged(s):
    near('pages-merged', s.said['pages-merged'], len(s.seen.merged), 0)
    near('pages-merged of the other', s.others['pages-merged'],
         len(s.seen_other.merged), 0)
    tap.check(len(s.seen.merged) >= 8500, str(len(s.seen.merged)))


@member('pages-merged-within', 'pages-merged-between')
def check_within_between(s):
    theirs = set(s.seen_other.merged)
    between = sum(1 for where in s.seen.merged if where in theirs)
    near('pages-merged-between', s.said['pages-merged-between'], between, 0)
    near('pages-merged-within', s.said['pages-merged-within'],
         len(s.seen.merged) - between, 0)
    tap.check(between >= 4500, str(between))


@member('zero-pages')
def check_zero(s):
    near('zero-pages', s.said['zero-pages'], s.zeros_before, 8)
    tap.check(s.zeros_before >= s.zeros, str(s.zeros_before))
    pid = s.vm.pid
    start = s.seen.start + 64 * MIB
    near('absent pages', host.smaps(pid, start, start + MIB).get('Rss', 0), 0,
         0)


@member('pages-unshared')
def check_unshared(s):
    # Everything that has memory of its own and rests
    near('pages-unshared', s.said['pages-unshared'], s.seen.own, 32)
    tap.check(s.seen.own >= 1500, str(s.seen.own))


@member('pages-swapped')
def check_swapped(s):
    near('pages-swapped', s.said['pages-swapped'], s.seen.swapped, 0)


@member('maps-used')
def check_maps_used(s):
    # Threads and their stacks come and go.
    near('maps-used', s.said['maps-used'], host.count_maps(s.vm.pid), 8)


@member('maps-limit')
def check_maps_limit(s):
    with open('/proc/sys/vm/max_map_count', encoding='ascii') as f:
        near('maps-limit', s.said['maps-limit'], int(f.read()) * 60 // 100,
             0)


@member('metadata-bytes')
def check_metadata(s):
    # What the process has grown by, and its share of the group's files; what
    # malloc() keeps, and the stacks of two threads come with it.
    shared = 0
    base = '/proc/%d/fd' % s.vm.pid
    for fd in os.listdir(base):
        if 'memfd:dedup-group' in os.readlink('%s/%s' % (base, fd)):
            shared += os.stat('%s/%s' % (base, fd)).st_blocks * 512
    tap.note('metadata: said %d, grown %d, shared %d' % (
        s.said['metadata-bytes'], s.grown, shared))
    near('metadata-bytes', s.said['metadata-bytes'], s.grown + shared // 2,
         256 * 1024)


@member('bytes-saved', 'group.bytes-saved')
def check_saved(s):
    group = s.said['group']['bytes-saved']
    # 64 KiB for what a member published a moment before the other
    near('the sum of bytes-saved',
         s.said['bytes-saved'] + s.others['bytes-saved'], group, 65536)
    # The cgroup is charged in batches, for each processor: 2 MiB; and what
    # was allocated meanwhile that has nothing to do with it.
    tap.note('saved: said %d, the cgroup fell by %d' % (group, s.saved))
    near('group.bytes-saved', group, s.saved, 2 * MIB + s.saved // 20)


@member('blocks[]', 'blocks[].id', 'blocks[].pages', 'blocks[].eligible')
def check_blocks(s):
    known = s.vm.blocks()
    tap.check(sorted(known) == sorted(b['id'] for b in s.said['blocks']),
              '%s and %s' % (known, s.said['blocks']))
    for b in s.said['blocks']:
        near('pages of ' + b['id'], b['pages'], known[b['id']][1] // PAGE, 0)
        tap.check(b['eligible'] == (known[b['id']][0] == s.seen.start),
                  str(b))


@member('blocks[].reason')
def check_block_reason(s):
    # The host shows which mappings are not writable: firmware.
    for b in s.said['blocks']:
        tap.check(('reason' in b) != b['eligible'], str(b))
    reasons = {b['id']: b.get('reason') for b in s.said['blocks']}
    tap.check(reasons['pc.bios'] == 'read-only' and
              reasons['/rom@etc/acpi/tables'] == 'resizeable', str(reasons))


@member('blocks[].pages-merged')
def check_block_merged(s):
    for b in s.said['blocks']:
        near('pages-merged of ' + b['id'], b['pages-merged'],
             len(s.seen.merged) if b['eligible'] else 0, 0)


@member('group', 'group.path')
def check_group_path(s):
    tap.check(s.said['group']['path'] == s.group, s.said['group']['path'])
    base = '/proc/%d/fd' % s.vm.pid
    tap.check(any(os.readlink('%s/%s' % (base, fd)).startswith(s.group)
                  for fd in os.listdir(base)), 'nothing is open in the group')


@member('group.members', 'group.members-incompatible')
def check_group_members(s):
    near('group.members', s.said['group']['members'], len(s.vms()), 0)
    near('group.members-incompatible',
         s.said['group']['members-incompatible'], 0, 0)


@member('group.pages-shared', 'group.pages-sharing')
def check_group_pages(s):
    used = set(s.seen.merged) | set(s.seen_other.merged)
    mapped = len(s.seen.merged) + len(s.seen_other.merged)
    near('group.pages-shared', s.said['group']['pages-shared'], len(used), 0)
    near('group.pages-sharing', s.said['group']['pages-sharing'],
         mapped - len(used), 0)
    for name in 'pages-shared', 'pages-sharing':
        near('the other member: ' + name, s.others['group'][name],
             s.said['group'][name], 0)


# What moves: each does something and looks at the difference

@member('blocked-reasons[]', 'blocked-reasons[].reason',
        'blocked-reasons[].detail')
def check_blocked_reasons(s):
    tap.check(s.said['blocked-reasons'] == [], str(s.said))
    # Too few mappings for anything: a reason, with the sysctl's name in it
    dedup.set_property(s.vm, 'max-maps', 1)
    s.vm.write(80 * MIB, b''.join(
        pages(1, 1, i) + pages(90, 1, i) for i in range(600)))
    dedup.run(s.vm, True)
    got = dedup.wait_state(s.vm, ['limited'])
    dedup.run(s.vm, False)
    dedup.set_property(s.vm, 'max-maps', 60)
    with open('/proc/sys/vm/max_map_count', encoding='ascii') as f:
        limit = int(f.read()) // 100
    # It stops short of the limit by what a window may take, and a little for
    # everybody else.
    near('mappings at the limit', host.count_maps(s.vm.pid), limit, 200)
    tap.check([b['reason'] for b in got['blocked-reasons']] == ['max-maps'],
              str(got['blocked-reasons']))
    tap.check('vm.max_map_count' in got['blocked-reasons'][0]['detail'],
              str(got['blocked-reasons']))
    dedup.wait_state(s.vm, ['stopped'])


@member('pages-volatile')
def check_volatile(s):
    # The test changes 64 pages many times in each scan.  (Before pages break:
    # what rests after that is not seen, and counted here, too.)
    dedup.set_property(s.vm, 'pages-to-scan', 100)
    dedup.set_property(s.vm, 'sleep-millisecs', 50)
    target = dedup.stats(s.vm)['full-scans'] + 3
    got = {'full-scans': 0}
    turn = 0
    dedup.run(s.vm, True)
    deadline = time.monotonic() + 60 * tap.PATIENCE
    while got['full-scans'] < target:
        tap.check(time.monotonic() < deadline, 'no scan ends')
        turn += 1
        for i in range(64):
            s.vm.write(90 * MIB + i * PAGE, struct.pack('<QQ', turn, i))
        got = dedup.stats(s.vm)
    tap.note('%d changes in %d scans' % (turn, 3))
    dedup.run(s.vm, False)
    dedup.wait_state(s.vm, ['stopped'])
    near('pages-volatile', got['pages-volatile'], 64, 2)


@member('cow-breaks')
def check_cow_breaks(s):
    before = dedup.stats(s.vm)['cow-breaks']
    broken = Outside(s.vm).broken
    for i in range(100):
        s.vm.write(16 * MIB + i * 7 * PAGE, b'written')
    broken = Outside(s.vm).broken - broken
    dedup.run(s.vm, True)
    dedup.wait_scans([s.vm], 2)
    # Each page was written once, and counts once.
    near('cow-breaks', dedup.stats(s.vm)['cow-breaks'] - before, broken, 0)
    near('broken pages', broken, 100, 0)


@member('full-scans', 'last-pass-ms')
def check_full_scans(s):
    # So many batches, so long a pause after each
    dedup.set_property(s.vm, 'pages-to-scan', 1000)
    dedup.set_property(s.vm, 'sleep-millisecs', 20)
    dedup.wait_scans([s.vm], 1)
    first = dedup.stats(s.vm)
    start = time.monotonic()
    dedup.wait_scans([s.vm], 8)
    elapsed = (time.monotonic() - start) * 1000
    last = dedup.stats(s.vm)
    scans = last['full-scans'] - first['full-scans']
    # Pages without memory of their own take no part.
    batches = Outside(s.vm).own / 1000
    tap.note('%d scans in %d ms, the last in %d ms' % (
        scans, elapsed, last['last-pass-ms']))
    tap.check(last['last-pass-ms'] >= (batches - 1) * 20,
              'a pass of %g batches in %d ms' % (batches,
                                                 last['last-pass-ms']))
    # One scan more or less at the ends; the passes differ among themselves.
    near('full-scans times last-pass-ms', scans * last['last-pass-ms'],
         elapsed, last['last-pass-ms'] * 2 + elapsed * 0.3)


@member('pass-pages')
def check_pass_pages(s):
    # How far a slow pass is: it rises, and begins anew with the next
    total = dedup.stats(s.vm)['pages-total']
    dedup.set_property(s.vm, 'pages-to-scan', 200)
    dedup.set_property(s.vm, 'sleep-millisecs', 5)
    seen = []
    first = dedup.stats(s.vm)['full-scans']
    while True:
        got = dedup.stats(s.vm)
        seen.append((got['full-scans'], got['pass-pages']))
        if got['full-scans'] > first + 3:
            break
    dedup.set_property(s.vm, 'pages-to-scan', 1 << 20)
    dedup.set_property(s.vm, 'sleep-millisecs', 0)
    tap.check(all(0 <= n <= total for _, n in seen), 'beyond all pages')
    tap.check(all(a[0] != b[0] or a[1] <= b[1]
                  for a, b in zip(seen, seen[1:])), 'it went back')
    tap.check(len({n for _, n in seen}) > 10, str(seen[:40]))


@member('pages-scanned')
def check_scanned(s):
    # What is hashed in a pass: all that has memory of its own.
    own = Outside(s.vm).own
    first = dedup.stats(s.vm)
    dedup.wait_scans([s.vm], 4)
    last = dedup.stats(s.vm)
    scans = last['full-scans'] - first['full-scans']
    scanned = last['pages-scanned'] - first['pages-scanned']
    tap.note('%d pages scanned in %d scans, %d own' % (scanned, scans, own))
    # A pass is under way at both ends.
    near('pages-scanned', scanned, own * scans, own + own * scans // 20)


@member('cpu-time-ns')
def check_cpu_time(s):
    def outside():
        total = 0
        for tid, name in s.threads().items():
            if tid == s.said['thread-id'] or 'peer' in name:
                path = '/proc/%d/task/%d/schedstat' % (s.vm.pid, tid)
                with open(path, encoding='ascii') as f:
                    total += int(f.read().split()[0])
        return total

    # The thread goes on while we look, and threads of old have ended: 5 %.
    seen = outside()
    near('cpu-time-ns', dedup.stats(s.vm)['cpu-time-ns'], seen,
         50000000 + seen // 20)


@member('window-max-ns')
def check_window(s):
    # Reset by the query; no longer than what it is a part of.
    dedup.run(s.vm, False)
    dedup.wait_state(s.vm, ['stopped'])
    dedup.stats(s.vm)
    near('window-max-ns at rest', dedup.stats(s.vm)['window-max-ns'], 0, 0)
    merged = len(Outside(s.vm).merged)
    s.vm.write(72 * MIB, pages(1, 2000))
    start = time.monotonic()
    dedup.run(s.vm, True)
    # Outside only: to ask for the figure is to reset it.
    dedup.wait_until(lambda: len(Outside(s.vm).merged) >= merged + 2000,
                     '2000 more merged pages')
    elapsed = (time.monotonic() - start) * 1e9
    got = dedup.stats(s.vm)['window-max-ns']
    tap.note('longest window %d ns, of %d' % (got, elapsed))
    # Two system calls at least; and the 2000 pages are many windows.
    tap.check(1000 < got < elapsed / 4, 'window of %d ns' % got)


@member('pages-left')
def check_left(s):
    dedup.run(s.vm, False)
    dedup.wait_state(s.vm, ['stopped'])
    tap.check('pages-left' not in dedup.stats(s.vm), 'pages-left at rest')
    before = len(Outside(s.vm).merged)
    s.vm.qmp.command('dedup-unmerge', {'id': 'ds0'})
    samples = []
    while True:
        got = dedup.stats(s.vm)
        if got['state'] != 'unmerging':
            break
        samples.append(got['pages-left'])
    s.vm.qmp.wait_event('DEDUP_UNMERGE_COMPLETED')
    tap.note('%d merged; pages left: %s' % (before, samples[:20]))
    # It takes 2 us a page at least: the first look comes in time.
    tap.check(samples and samples == sorted(samples, reverse=True) and
              0 <= samples[-1] and samples[0] <= before, str(samples))
    near('merged pages after unmerging', len(Outside(s.vm).merged), 0, 0)


# Figures that need a machine of their own

def ahci_read(vm, at, buffer, size):
    """Have the disk at q35's first AHCI port read sectors to guest memory;
    its commands and replies are in the 12 KiB from @at on."""
    config = 0x80000000 | (0x1f << 11) | (2 << 8)
    abar = 0xfebf0000
    fis = bytes([0x27, 0x80, 0x25, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, size // 512])
    for register, value in (0x24, abar), (0x04, 0x0006):
        vm.ask('outl 0xcf8 0x%x' % (config | register))
        vm.ask('outl 0xcfc 0x%x' % value)
    vm.write(at, struct.pack('<4I', 5 | 1 << 16, 0, at + 8192, 0))
    vm.write(at + 8192, fis)
    vm.write(at + 8192 + 128, struct.pack('<4I', buffer, 0, 0, size - 1))
    for register, value in ((0x04, 1 << 31), (0x100, at), (0x104, 0),
                            (0x108, at + 4096), (0x10c, 0), (0x118, 1 << 4),
                            (0x118, 1 << 4 | 1), (0x138, 1)):
        vm.ask('writel 0x%x 0x%x' % (abar + register, value))


@member('pages-pinned')
def check_pinned(_):
    """A disk that takes its time to read 64 KiB into equal pages."""
    vm = Machine('p', backing='memfd-shared', dedup=dict(dedup.FULL_SPEED),
                 extra=['-machine', 'q35', '-blockdev', 'null-aio,'
                        'node-name=disk,latency-ns=%d' % (5 * 10 ** 9),
                        '-device', 'ide-hd,drive=disk,bus=ide.0'])
    vm.start()
    ahci_read(vm, 48 * MIB, 16 * MIB, 16 * PAGE)
    vm.write(16 * MIB, pages(1, 64))
    vm.write(32 * MIB, pages(1, 64))
    # The 64 KiB of the buffer, and not a page more; a page counts when the
    # scanner would merge it, which it finds out in a few scans.
    dedup.wait_until(lambda: dedup.stats(vm)['pages-pinned'] >= 16,
                     'pinned pages')
    near('pages-pinned', dedup.stats(vm)['pages-pinned'], 16, 0)
    dedup.wait_until(lambda: dedup.stats(vm)['pages-pinned'] == 0,
                     'end of the pin')
    vm.kill()


@member('pages-huge-kept')
def check_huge_kept(_):
    vm = Machine('h', backing='plain', dedup=dict(
        dedup.FULL_SPEED, **{'huge-pages': 'keep', 'run': 'off'})).start()
    vm.write(16 * MIB, pages(1, 1024))
    vm.write(32 * MIB, pages(1, 1024))
    _, start, _ = vm.ram_range()
    huge = host.smaps(vm.pid, start, vm.ram_range()[2]).get(
        'AnonHugePages', 0) // PAGE
    dedup.run(vm, True)
    dedup.wait_scans([vm], 3)
    got = dedup.stats(vm)
    tap.note('huge: %d kept, %d in huge pages' % (got['pages-huge-kept'],
                                                  huge))
    if huge < 2048:
        near('pages-huge-kept', got['pages-huge-kept'], 0, huge)
        tap.note('the host gave no huge pages')
    else:
        # All the equal pages lie in them.
        near('pages-huge-kept', got['pages-huge-kept'], 2048, huge - 2048)
        tap.check(got['pages-merged'] == 0, str(got['pages-merged']))
    vm.kill()


@member('pages-poisoned')
def check_poisoned(_):
    """Pages that break while nobody uses them; one of each is whole, too."""
    vm = Machine('e', backing='memfd-shared', dedup=dict(
        dedup.FULL_SPEED, run='off')).start()
    start = vm.ram_range()[1]
    vm.write(16 * MIB, pages(1, 64))
    broken = poison.fill_and_break(vm.pid, start + 48 * MIB,
                                   pages(1, 32))
    if not broken:
        tap.note('no UFFDIO_POISON (Linux 6.6), or no userfaultfd')
    dedup.run(vm, True)
    dedup.wait_scans([vm], 3)
    near('pages-poisoned', dedup.stats(vm)['pages-poisoned'],
         32 if broken else 0, 0)
    vm.kill()


@member('estimate', 'estimate.zero-pages', 'estimate.pages-within',
        'estimate.pages-between', 'estimate.bytes')
def check_estimate(s):
    """Two that estimate, with what the scene's VMs had before they merged."""
    tap.check('estimate' not in s.said, 'an estimate of who merges')
    group = vms.group_dir()
    pair = [Machine(name, backing=backing, group=group,
                    dedup=dict(dedup.FULL_SPEED, mode='estimate')).start()
            for name, backing in (('e', 'plain'), ('f', 'memfd-shared'))]
    for machine, seed in zip(pair, (5, 6)):
        machine.write(16 * MIB, pages(1, 4000))     # in both
        machine.write(32 * MIB, pages(1, 1000))     # once more
        machine.write(40 * MIB, pages(seed, 2000))  # in one, twice
        machine.write(48 * MIB, pages(seed, 2000))
        machine.write(64 * MIB, pages(seed + 4, s.zeros))
        machine.write(64 * MIB, bytes(s.zeros * PAGE))
    seen = [Outside(machine) for machine in pair]
    dedup.wait_scans(pair, 3)
    dedup.wait_scans(pair, 2)
    said = [dedup.stats(machine)['estimate'] for machine in pair]
    for one, merged in zip(said, (s.said, s.others)):
        near('estimate.bytes', one['bytes'], PAGE * (
            one['zero-pages'] + one['pages-within'] + one['pages-between']),
             0)
        # What merging has found, and QEMU's own in plain RAM.
        near('estimate.zero-pages', one['zero-pages'], merged['zero-pages'],
             64)
        # The twins, and what is there once more if the other has not got it.
        tap.check(2000 <= one['pages-within'] <= 3032, str(one))
    within, between = (sum(one['pages-' + what] for one in said)
                       for what in ('within', 'between'))
    # All but one of each content; firmware has a few pages, too.
    near('estimate.pages-within and -between', within + between,
         2 * 2000 + 2 * 5000 - 4000, 64)
    tap.check(between >= 4000, str(said))
    for machine, before in zip(pair, seen):
        after = Outside(machine)
        near('memory while it is estimated', after.own, before.own, 16)
        near('merged pages', len(after.merged), 0, 0)
        machine.kill()


# A host that has no time for us at that moment spoils them.
TIMED = (check_full_scans, check_scanned, check_cpu_time)


@tap.case
def test_every_member():
    """Each member of the schema has a check, and the check agrees"""
    scene = Scene()
    wanted = schema_members(scene.vm)
    tap.check(wanted == set(CHECKS), 'without a check: %s; without a member: '
              '%s' % (sorted(wanted - set(CHECKS)),
                      sorted(set(CHECKS) - wanted)))
    failed = []
    for check in dict.fromkeys(CHECKS.values()):
        try:
            try:
                check(scene)
            except tap.Failure as e:
                if check not in TIMED:
                    raise
                tap.note('once more, %s: %s' % (check.__name__, e))
                check(scene)
        except tap.Failure as e:
            tap.note('FAILED %s: %s' % (check.__name__, e))
            failed.append('%s: %s' % (check.__name__, e))
    tap.check(not failed, '; '.join(failed))


host.prepare()
tap.main()
