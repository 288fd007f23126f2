#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Members of a group of eight die, at random moments and at named points of
the engine (crash-points.c); others take their places.

KILLS=1000 in the environment: so many.  SEED=N: those of run N.
DEDUP_MUTANT=2: a fault of the engine, which the guests must see.
"""
# timeout: 36000

import os
import random
import resource
import time

import dedup
import host
import kills
import tap

KILLS = int(os.environ.get('KILLS', '32'))
SEED = int(os.environ.get('SEED', random.SystemRandom().randrange(1 << 32)))
# After so many, every byte is compared and every figure.
EVERY = 100


def ways(rand):
    """How the next one dies, for ever: half of them by a signal from outside,
    the others at each point in turn."""
    while True:
        turn = kills.points() + ['NONE'] * len(kills.points())
        rand.shuffle(turn)
        yield from turn


@tap.case
def test_kills():
    """every byte is right, the figures agree, nothing is left"""
    tap.note('KILLS=%d SEED=%d' % (KILLS, SEED))
    start = time.monotonic()
    files = len(os.listdir('/proc/self/fd'))
    rand = random.Random(SEED)
    herd = kills.Herd(rand)
    herd.check()
    way, done = ways(rand), 0
    while done < KILLS:
        count = min(rand.randrange(1, kills.AT_ONCE + 1), KILLS - done)
        herd.kill([next(way) for _ in range(count)])
        done += count
        if done // 10 > (done - count) // 10:
            herd.check()
            tap.note('%d killed, %d s' % (done, time.monotonic() - start))
        if done // EVERY > (done - count) // EVERY and done < KILLS:
            herd.verify()
            herd.settle()
    herd.verify()
    herd.settle()
    herd.end()
    tap.check(KILLS < 2 * len(kills.POINTS) or
              all(herd.deaths[p] for p in kills.points()),
              'not at each point: %s' % herd.deaths)
    tap.check(len(os.listdir('/proc/self/fd')) <= files + 8,
              'descriptors of this test are left')
    tap.note('deaths: ' + ' '.join('%s %d' % (k.lower(), n) for k, n in
                                   herd.deaths.items()))
    tap.note('passed alive: ' + ' '.join(
        '%s %d' % (k.lower(), n)
        for k, n in list(zip(kills.POINTS, herd.reached))[1:]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    tap.note('%d killed, %d words compared at rest, wrong: %d; %d s, of the '
             'processor %d s' % (
                 sum(herd.deaths.values()), herd.listener.words,
                 len(herd.listener.wrong), time.monotonic() - start,
                 used.ru_utime + used.ru_stime))


host.prepare()
if not os.access(kills.QEMU, os.X_OK):
    print('Bail out! %s is not built' % kills.QEMU, flush=True)
    raise SystemExit(1)
tap.main()
