# SPDX-License-Identifier: GPL-2.0-or-later
"""Test Anything Protocol: what a guest test prints.

A test program defines functions, decorates them with @tap.case, and ends with
tap.main().  A case passes by returning, is skipped by tap.skip(reason), and
fails by raising.  Names given on the command line select cases.
"""

import os
import sys
import time
import traceback


class Skip(Exception):
    """The host lacks what the case needs."""


class Failure(AssertionError):
    """The case found what must not be."""


# Deadlines bound a hang, on a host that may do other work: so many times what
# is given, which is what a host that does nothing else needs.  Where all is
# slower, $DEDUP_TEST_PATIENCE times that.
PATIENCE = 5 * int(os.environ.get('DEDUP_TEST_PATIENCE', '1'))

_cases = []
_cleanups = []
_details = []


def case(function):
    """Decorator: @function is one case; its docstring's first line names it."""
    _cases.append(function)
    return function


def skip(reason):
    """End the case: the host lacks something."""
    raise Skip(reason)


def check(condition, message):
    """Fail the case with @message unless @condition holds."""
    if not condition:
        raise Failure(message)


def cleanup(function):
    """Call @function when the case has ended, whatever the outcome."""
    _cleanups.append(function)


def run_cleanups():
    """Do what cleanup() was asked for, the last first; return the tracebacks
    of those that failed.  For programs that have no cases, and for cases that
    are done with what they have."""
    failed = []
    while _cleanups:
        try:
            _cleanups.pop()()
        except Exception:
            failed.append(traceback.format_exc())
    return failed


def detail(function):
    """Call @function if the case fails; print the lines it returns."""
    _details.append(function)


def note(text):
    """Print @text as a comment, with the time."""
    for line in str(text).splitlines():
        print('#', time.strftime('%H:%M:%S'), line, flush=True)


def _comment(text):
    for line in text.splitlines():
        print('#   ' + line, flush=True)


def _run(number, function):
    name = (function.__doc__ or function.__name__).splitlines()[0]
    name = '%s: %s' % (function.__name__, name.rstrip('.'))
    start = time.monotonic()
    good = True
    try:
        function()
        result = 'ok %d - %s' % (number, name)
    except Skip as e:
        result = 'ok %d - %s # SKIP %s' % (number, name, e)
    except BaseException as e:
        good = False
        result = 'not ok %d - %s' % (number, name)
        _comment(traceback.format_exc())
        for function in _details:
            try:
                _comment('\n'.join(function()))
            except Exception as why:
                _comment('no detail: %s' % why)
        # Once more, last: the end of a log is all that some readers have.
        _comment('%s: %s' % (type(e).__name__, str(e)[-500:]))
        if isinstance(e, KeyboardInterrupt):
            raise
    finally:
        _details.clear()
        for trace in run_cleanups():
            good = False
            result = 'not ok %d - %s' % (number, name)
            _comment(trace)
    print(result, flush=True)
    note('%.1f s' % (time.monotonic() - start))
    return good


def main():
    """Run the cases and exit: 0 if none failed."""
    cases = [c for c in _cases
             if len(sys.argv) < 2 or c.__name__ in sys.argv[1:]]
    print('TAP version 13', flush=True)
    print('1..%d' % len(cases), flush=True)
    good = [_run(i + 1, c) for i, c in enumerate(cases)]
    sys.stdout.flush()
    os._exit(0 if all(good) else 1)
