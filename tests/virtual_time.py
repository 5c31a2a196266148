"""A clock that jumps: what waits in an event loop is done at its moment, and takes no time."""

import asyncio


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that begins at 0 and, where nothing is ready, moves its clock on to what is waited for next."""

    def __init__(self):
        super().__init__()
        self.now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if self._scheduled and not self._ready:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def run(work):
    """What a coroutine returns, in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()
