# SPDX-License-Identifier: GPL-2.0-or-later
"""The dedup-scanner of a VM, as a test drives it (object ID ds0)."""

import time

import tap
from qmp import Timeout

# As fast as it goes, nothing in between.
FULL_SPEED = {'sleep-millisecs': 0, 'pages-to-scan': 1 << 20}


def wait_until(condition, what, timeout=60, pause=0.05,
               patience=tap.PATIENCE):
    """Poll @condition until it returns something true; return that.  For
    figures: nothing announces them.  @patience 1: @timeout is no deadline but
    how long to look."""
    deadline = time.monotonic() + timeout * patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Timeout('no %s within %g s' % (what, timeout))
        time.sleep(pause)


def wait_saved(usage, before, least):
    """Bytes that a cgroup has fallen by since @usage() was @before: @least, or
    as far as it came.  What is given back is charged for a moment longer."""
    try:
        wait_until(lambda: before - usage() >= least, 'memory', 20)
    except Timeout:
        pass
    return before - usage()


def wait_online(vm, mib):
    """Wait until the guest's kernel has found so much that was plugged."""
    blocks = 0

    def found():
        nonlocal blocks
        blocks += vm.agent.get('online')['blocks']
        return blocks * 128 >= mib
    wait_until(found, 'plugged memory in the guest')


def stats(vm):
    """query-dedup-stats of the VM's object."""
    found = vm.qmp.command('query-dedup-stats')
    tap.check(len(found) == 1, '%s: %d scanners' % (vm.name, len(found)))
    return found[0]


def summary(vm):
    """One line for a log."""
    s = stats(vm)
    return ('%s: %s %s scans %d present %d merged %d zero %d unshared %d '
            'volatile %d pinned %d breaks %d maps %d window %d us' % (
                vm.name, s['state'],
                ','.join(b['reason'] for b in s['blocked-reasons']) or '-',
                s['full-scans'], s['pages-present'], s['pages-merged'],
                s['zero-pages'], s['pages-unshared'], s['pages-volatile'],
                s['pages-pinned'], s['cow-breaks'], s['maps-used'],
                s['window-max-ns'] // 1000))


def group_summary(vm):
    """One line about the VM's group."""
    g = stats(vm)['group']
    return 'group: ' + ' '.join('%s %s' % (k, g[k]) for k in sorted(g)
                                if k != 'path')


def set_property(vm, name, value):
    """Change a property of the object."""
    vm.qmp.command('qom-set', {'path': '/objects/ds0', 'property': name,
                               'value': value})


def run(vm, on):
    """Turn scanning on or off."""
    set_property(vm, 'run', on)


def wait_scans(vm_list, count, timeout=150):
    """Wait until every VM has completed @count more full scans."""
    target = {vm: stats(vm)['full-scans'] + count for vm in vm_list}
    for vm in vm_list:
        wait_until(lambda: stats(vm)['full-scans'] >= target[vm],
                   '%d full scans of %s' % (count, vm.name), timeout)


def wait_merged(vm, pages, timeout=60):
    """Wait until at least @pages pages of the VM are merged."""
    wait_until(lambda: stats(vm)['pages-merged'] >= pages,
               '%d merged pages in %s' % (pages, vm.name), timeout)


def wait_state(vm, states, timeout=60):
    """Wait until the object's state is one of @states."""
    return wait_until(lambda: stats(vm)['state'] in states and stats(vm),
                      'state %s of %s' % (states, vm.name), timeout)


def unmerge(vm, timeout=90):
    """Give every page its own memory and wait for the end."""
    vm.qmp.command('dedup-unmerge', {'id': 'ds0'})
    event = vm.qmp.wait_event('DEDUP_UNMERGE_COMPLETED', timeout)
    tap.check(event['data']['pages-left'] == 0, str(event))
    s = stats(vm)
    tap.check(s['pages-merged'] == 0 and s['state'] == 'stopped',
              'after unmerge: ' + summary(vm))


def eligible(vm):
    """Names of the RAM blocks that are scanned."""
    return [b['id'] for b in stats(vm)['blocks'] if b['eligible']]
