#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""tests/guest/build-backends says what it could not get, and goes on."""

import os
import shutil
import tempfile

from checks import TOP, run
import tap

# In place of scripts/private-apt: an archive that has nothing
NO_ARCHIVE = '#!/bin/sh\necho "no archive for $1"\nexit 1\n'
# ... and one with the Rust virtiofsd, in a package that holds just that
ONE_PACKAGE = '''#!/bin/sh
[ "$3" = update ] && exit
mkdir -p p/DEBIAN p/usr/libexec
printf 'Package: p\\nVersion: 1\\nArchitecture: all\\n' > p/DEBIAN/control
printf 'Maintainer: none <none@none.test>\\nDescription: p\\n' \
    >> p/DEBIAN/control
touch p/usr/libexec/virtiofsd
chmod +x p/usr/libexec/virtiofsd
dpkg-deb --root-owner-group -b p p.deb && rm -r p
'''


def build(archive, *runs):
    """What is in the directory after each run, with an archive."""
    top = tempfile.mkdtemp(prefix='dedup-check-')
    tap.cleanup(lambda: shutil.rmtree(top))
    for name in ('tests/guest', 'scripts'):
        os.makedirs(os.path.join(top, name))
    script = os.path.join(top, 'tests/guest/build-backends')
    shutil.copy(os.path.join(TOP, 'tests/guest/build-backends'), script)
    apt = os.path.join(top, 'scripts/private-apt')
    with open(apt, 'w', encoding='ascii') as f:
        f.write(archive)
    os.chmod(apt, 0o755)
    out = os.path.join(top, 'out')
    for words in runs:
        result = run(script, out, *words)
        tap.check(result.returncode == 0, f'{words}: {result.stdout}')
    return {name for name in os.listdir(out)
            if name.endswith(('.done', '.missing'))}


@tap.case
def test_nothing_to_be_had():
    """each is named as missing, and that is no failure"""
    got = build(NO_ARCHIVE, ())
    tap.check(got == {'virtiofsd.missing', 'virtiofsd-c.missing',
                      'passt.missing'}, str(got))


@tap.case
def test_these_only():
    """words choose, on an empty directory and on one with all of it"""
    got = build(NO_ARCHIVE, ('virtiofsd',))
    tap.check(got == {'virtiofsd.missing'}, str(got))
    got = build(ONE_PACKAGE, ('virtiofsd',), ('virtiofsd',), ('passt',))
    tap.check(got == {'virtiofsd.done', 'passt.missing'}, str(got))


tap.main()
