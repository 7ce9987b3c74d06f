"""Waits until a server that a script has started takes connections."""

import os
import re
import selectors
import time


class NotListening(Exception):
    """It ended, or said nothing in time, or something else than where it listens."""


def address_of(process, seconds):
    """Where it listens, as it says on its standard output, which is a pipe."""
    descriptor, text = process.stdout.fileno(), b""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while b"\n" not in text:
            if not selector.select(max(0, deadline - time.monotonic())):
                raise NotListening(f"the server does not listen within {seconds} s")
            data = os.read(descriptor, 4096)
            if not data:
                raise NotListening(f"the server ended at its start with exit code {process.wait(seconds)}")
            text += data
    found = re.search(rb"listening on (127\.0\.0\.1):(\d+)", text)
    if not found:
        raise NotListening(f"the server said {text!r}")
    return found.group(1).decode(), int(found.group(2))
