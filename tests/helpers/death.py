"""A process that ends at any change that it makes to files: what a kill or a crash leaves."""

from __future__ import annotations

import os
import sys

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
DIED = 77


def die_at(event, action):
    """Run an action in a process that ends, without any cleaning up, before its n-th change.

    Returns:
        Whether it died; False when the action has fewer changes.
    """
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count(name, args):
            nonlocal seen
            if name in CHANGES:
                seen += 1
                if seen == event:
                    os._exit(DIED)

        sys.addaudithook(count)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == DIED
