#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A hard memory limit barely above the RAM does not kill a VM that merges.

A segment stays charged to its publisher.  A VM that published half of its
pages and then writes to all of them would need 1.5 times its RAM.
"""

import dedup
import host
import tap
import vm as vms
from host import MIB

RAM = 1024
HALF = RAM * MIB // host.PAGE // 2
REST = HALF - 56000             # the guest's kernel has to live as well


@tap.case
def test_rewrite_everything():
    """limit 1.1 x RAM, half published, all rewritten: the VM lives"""
    group = vms.group_dir()
    cgroup = host.Cgroup()
    cgroup.limit(RAM * MIB * 11 // 10)
    partner = vms.VM('partner', ram=RAM // 2 + 128, group=group,
                     dedup=dedup.FULL_SPEED)
    partner.start()
    victim = vms.VM('victim', ram=RAM, group=group, cgroup=cgroup,
                    dedup=dict(dedup.FULL_SPEED, run='off'))
    victim.start()
    # The partner has seen each page when the victim sees it: the second that
    # sees it is the one that publishes.
    partner.boot().agent.ask('alloc s %d same 3' % HALF)
    victim.boot().agent.ask('alloc s %d same 3' % HALF)
    victim.agent.ask('alloc u %d signed' % REST)
    dedup.wait_scans([partner], 2)
    tap.note('charged %d of %d MiB' % (cgroup.usage() // MIB,
                                       RAM * 11 // 10))
    dedup.run(victim, True)
    dedup.wait_scans([victim, partner], 4)
    tap.note(dedup.summary(victim))
    tap.note('charged %d MiB, shared memory %d MiB' %
             (cgroup.usage() // MIB, cgroup.shmem() // MIB))
    state = dedup.stats(victim)
    tap.check(state['pages-merged'] > 1000 or
              'memory' in [b['reason'] for b in state['blocked-reasons']],
              'nothing was merged, and nothing says why')
    for vm in (victim, partner):
        # Merging was at work, but the limit was not exceeded by it.
        tap.check(vm.alive(), vm.name + ' is dead')
    for gen in (1, 2):
        victim.agent.ask('rewrite s %d' % gen)
        victim.agent.ask('rewrite u %d' % gen)
        tap.note('rewritten; charged %d MiB; %s' %
                 (cgroup.usage() // MIB, dedup.summary(victim)))
    tap.check(cgroup.kills() == 0, 'the limit killed a process')
    victim.check_regions('su')
    partner.check_regions('s')
    victim.quit()


host.prepare()
tap.main()
