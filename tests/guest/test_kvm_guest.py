#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A KVM vCPU writes to its pages while they are merged and given back."""

import bareguest
import dedup
import host
import tap
from bareguest import PAGES, command, wait_round, wait_verified

CYCLES = 4


def kvm_guest(backing):
    """Merge, write, unmerge, again and again; then check every word."""
    vm = bareguest.start(backing, dedup=dedup.FULL_SPEED)
    for cycle in range(CYCLES):
        command(vm, b'bw'[cycle % 2:][:1])
        wait_round(vm, 2)
        # The guest writes most pages in a round of 'b'; some stay merged.
        dedup.wait_merged(vm, 20)
        tap.note(dedup.summary(vm))
        if cycle % 3 == 2:
            dedup.unmerge(vm)
            wait_round(vm, 1)
            dedup.run(vm, True)
    command(vm, b'q')
    wait_round(vm, 2)
    # Now nothing changes: all of the runs that are equal can be merged.
    dedup.wait_merged(vm, PAGES // 4)
    wait_verified(vm)
    command(vm, b'b')
    wait_round(vm, 3)
    tap.check(dedup.stats(vm)['cow-breaks'] > 0, 'no page was ever written')
    dedup.unmerge(vm)
    wait_verified(vm)
    vm.quit()


@tap.case
def test_memfd():
    """memory-backend-memfd, share=on"""
    kvm_guest('memfd-shared')


@tap.case
def test_anonymous():
    """plain -m"""
    kvm_guest('plain')


host.prepare()
tap.main()
