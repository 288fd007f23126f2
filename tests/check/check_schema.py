#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What qapi/dedup.json says of figures and reasons.

QEMU's generator sees to it that each member has a description.  These look
at what is in it, and for a test of each reason.
"""

import os
import re
import sys

from checks import TOP, TREE, tracked
import tap

# QEMU's own parser; the tree stays as it is.
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(TREE, 'scripts'))
# pylint: disable=wrong-import-position
from qapi.parser import QAPISchemaParser        # noqa: E402

# The three kinds of figures that DedupInfo explains, and the rest
WHEN = re.compile(r'\b(Live|Per scan|Sampled|Changes|Does not change|'
                  r'Present (once|if))\b')
UNITS = {'bytes': 'bytes', 'ms': 'milliseconds', 'ns': 'nanoseconds',
         'pages': 'pages'}

FIGURES = 'DedupInfo', 'DedupBlockInfo', 'DedupGroupInfo'


def definitions():
    """{name of a type: [its own text, {member: text}]}."""
    parser = QAPISchemaParser(os.path.join(TOP, 'qapi', 'dedup.json'))
    return {doc.symbol: [doc.body.text,
                         {name: ' '.join(section.text.split())
                          for name, section in doc.args.items()}]
            for doc in parser.docs if doc.symbol}


@tap.case
def test_when():
    """each figure's description says when it changes"""
    types = definitions()
    bad = [f'{name}.{member}' for name in FIGURES
           for member, text in types[name][1].items()
           if not WHEN.search(text)]
    if not WHEN.search(types['DedupBlocked'][0]):
        bad.append('DedupBlocked')
    tap.check(not bad, f'do not say when: {bad}')


@tap.case
def test_units():
    """each figure's description names the unit that its name stands for"""
    bad = [f'{name}.{member}' for name in FIGURES
           for member, text in definitions()[name][1].items()
           for word in member.split('-')
           if word in UNITS and UNITS[word] not in text]
    tap.check(not bad, f'do not name their unit: {bad}')


@tap.case
def test_reasons():
    """each reason is expected by a test"""
    tests = ''
    for path in tracked('.c', '.py'):
        if re.match(r'tests/(qtest|guest)/', path):
            with open(os.path.join(TOP, path), encoding='utf-8') as f:
                tests += f.read()
    reasons = {member for name in ('DedupBlockReason', 'DedupBlockedReason')
               for member in definitions()[name][1]}
    seen = {r for r in reasons if re.search(f'["\']{r}["\']', tests)}
    tap.check(reasons == seen, f'without a test: {sorted(reasons - seen)}')


tap.main()
