# SPDX-License-Identifier: GPL-2.0-or-later
"""Line protocols over a Unix socket: QMP, the guest agent, a serial port."""

import json
import select
import socket
import time

import tap


class ChannelClosed(Exception):
    """The other end is gone."""


class Timeout(Exception):
    """The other end did not answer in time."""


class QMPError(Exception):
    """A QMP command failed; .cls is its class, the text its description."""

    def __init__(self, error):
        super().__init__(error['desc'])
        self.cls = error['class']


class AgentError(Exception):
    """The guest agent answered "err"."""


class Lines:
    """Lines over a Unix stream socket, each read with a deadline."""

    def __init__(self, path, alive, timeout=20):
        """Connect to @path as soon as it is there; @alive() says whether the
        process that will offer it still runs."""
        self.path = path
        self.buffer = b''
        deadline = time.monotonic() + timeout * tap.PATIENCE
        while True:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.sock.connect(path)
                return
            except OSError:
                self.sock.close()
                if not alive():
                    raise ChannelClosed('the process ended before it offered '
                                        + path) from None
                if time.monotonic() > deadline:
                    raise Timeout('no socket ' + path) from None
                # There is no event for the birth of a socket we could wait
                # for more simply.
                time.sleep(0.01)

    def close(self):
        """Close the connection."""
        self.sock.close()

    def send(self, text):
        """Send @text and a newline."""
        try:
            self.sock.sendall(text.encode() + b'\n')
        except OSError as e:
            raise ChannelClosed('%s: %s' % (self.path, e)) from None

    def line(self, timeout):
        """Return the next line, without its end."""
        return self.line_until(time.monotonic() + timeout * tap.PATIENCE)

    def line_until(self, deadline):
        """The same, for who has a deadline for more than one line."""
        while b'\n' not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.sock], [], [], left)[0]:
                raise Timeout('%s: no line in time' % self.path)
            try:
                data = self.sock.recv(65536)
            except OSError as e:
                raise ChannelClosed('%s: %s' % (self.path, e)) from None
            if not data:
                raise ChannelClosed(self.path)
            self.buffer += data
        line, self.buffer = self.buffer.split(b'\n', 1)
        return line.decode(errors='replace').rstrip('\r')


class QMP(Lines):
    """A QMP client: commands, and the events that came meanwhile."""

    def __init__(self, path, alive):
        super().__init__(path, alive)
        self.events = []
        json.loads(self.line(30))
        self.command('qmp_capabilities')

    def command(self, name, arguments=None, timeout=60):
        """Run command @name; return its result or raise QMPError."""
        request = {'execute': name}
        if arguments:
            request['arguments'] = arguments
        self.send(json.dumps(request))
        deadline = time.monotonic() + timeout * tap.PATIENCE
        while True:
            reply = json.loads(self.line_until(deadline))
            if 'event' in reply:
                self.events.append(reply)
            elif 'error' in reply:
                raise QMPError(reply['error'])
            else:
                return reply['return']

    def hmp(self, line, timeout=60):
        """Run a human monitor command and return its text."""
        return self.command('human-monitor-command', {'command-line': line},
                            timeout)

    def wait_event(self, name, timeout=60, match=lambda data: True):
        """Return the next event @name whose data @match accepts; others
        stay for later."""
        deadline = time.monotonic() + timeout * tap.PATIENCE
        seen = 0
        while True:
            while seen < len(self.events):
                event = self.events[seen]
                if event['event'] == name and match(event.get('data', {})):
                    return self.events.pop(seen)
                seen += 1
            reply = json.loads(self.line_until(deadline))
            if 'event' in reply:
                self.events.append(reply)


def fields(text):
    """Turn "a=1 b=x rest" into {'a': 1, 'b': 'x'}."""
    result = {}
    for word in text.split():
        name, equals, value = word.partition('=')
        if equals:
            result[name] = int(value) if value.isdigit() else value
    return result


class Agent(Lines):
    """A client of the guest agent (agent.c)."""

    def wait_hello(self, timeout=90):
        """Wait until the guest has booted."""
        while self.line(timeout) != 'hello':
            pass

    def ask(self, text, timeout=120):
        """Run a command in the guest; return what follows "ok"."""
        self.send(text)
        return self.answer(text, timeout)

    def answer(self, text, timeout=120):
        """Wait for the answer to @text, the oldest command that was sent and
        has none; return what follows "ok"."""
        while True:
            word, _, rest = self.line(timeout).partition(' ')
            if word == 'ok':
                return rest
            if word == 'err':
                raise AgentError('%s: %s' % (text, rest))

    def get(self, text, timeout=120):
        """Run a command in the guest; return its figures as a dict."""
        return fields(self.ask(text, timeout))
