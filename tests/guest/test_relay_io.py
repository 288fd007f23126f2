#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
# timeout: 3600
"""Every byte that real vhost-user back ends read and write by the relay is
right, on each kind of RAM, while it is not merged and while it is.

The guest reads into pages that are merged and writes from them, on a disk, on
two file systems and by TCP at the same time.  RELAY_REQUESTS=1000000 has each
of them do so many requests in each cell, rather than a few.
"""

import os

import dedup
import relay
import tap

REQUESTS = int(os.environ.get('RELAY_REQUESTS', '150'))
# A tenth of what a loaded host does in a second
TIMEOUT = 60 + REQUESTS // 20
# Of the guest's pools, and no fewer in the small ones beside
MERGED = 4000


def reasons(vm):
    """Why it does not merge."""
    return [b['reason'] for b in dedup.stats(vm)['blocked-reasons']]


def cells(backing, iothread=False):
    """One kind of RAM: the scanner off, then on."""
    kinds = [k for k in ('blk', 'fs', 'fs-c', 'net') if relay.have(k)]
    g = relay.Guest(backing, kinds, iothread=iothread,
                    dedup=dict(dedup.FULL_SPEED, run='off'))
    g.boot().run_all()
    g.wait_requests(REQUESTS, TIMEOUT)
    tap.check(dedup.stats(g.vm)['pages-merged'] == 0, dedup.summary(g.vm))
    if relay.RELAY:
        tap.check('ram-exported' not in reasons(g.vm), str(reasons(g.vm)))
        dedup.run(g.vm, True)
        dedup.wait_merged(g.vm, MERGED)
        breaks = dedup.stats(g.vm)['cow-breaks']
        g.wait_requests(REQUESTS, TIMEOUT)
        tap.note(dedup.summary(g.vm))
        got = dedup.stats(g.vm)
        tap.check(got['cow-breaks'] > breaks + REQUESTS,
                  'nothing was read into merged pages')
        tap.check(got['pages-merged'] > MERGED // 4, dedup.summary(g.vm))
        for kind, figures in g.relayed().items():
            tap.note('%s: %s' % (kind, figures))
            tap.check(figures['requests'] > REQUESTS // 10 and
                      not figures['broken'], str(figures))
            tap.check(figures['bytes-in'] and figures['bytes-out'],
                      str(figures))
        tap.check(set(g.relayed()) == set(kinds), str(g.relayed()))
    g.end_all()
    g.quit()


@tap.case
def test_storage_daemon():
    """the storage daemon can be had"""
    relay.KINDS['blk']().start()


@tap.case
def test_contrib_blk():
    """contrib/vhost-user-blk can be had"""
    relay.KINDS['contrib']().start()


@tap.case
def test_virtiofsd():
    """the Rust virtiofsd can be had"""
    relay.KINDS['fs']().start()


@tap.case
def test_virtiofsd_c():
    """the C virtiofsd can be had"""
    relay.KINDS['fs-c']().start()


@tap.case
def test_passt():
    """passt can be had"""
    relay.KINDS['net']().start()


@tap.case
def test_memfd():
    """memfd: a disk, two file systems and TCP, every byte"""
    cells('memfd-shared')


@tap.case
def test_tmpfs():
    """a file on tmpfs, the disk and the network in an iothread"""
    cells('file-shared', iothread=True)


@tap.case
def test_anonymous():
    """anonymous RAM, which plain vhost-user cannot use"""
    cells('plain')


@tap.case
def test_contrib():
    """anonymous RAM and contrib/vhost-user-blk, which does one at a time"""
    relay.KINDS['contrib']().command()
    g = relay.Guest('plain', ['contrib'], dedup=dict(dedup.FULL_SPEED))
    g.boot().run_all()
    dedup.wait_merged(g.vm, 1000)
    g.wait_requests(REQUESTS, TIMEOUT)
    g.end_all()
    g.quit()


relay.prepare()
tap.main()
