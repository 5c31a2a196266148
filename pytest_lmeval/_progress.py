"""Show the progress of long work on the terminal, past pytest's capture, and in the file that `lmeval watch` reads.

demo reads stdlib[test]:  34% 48,128/145,928 tokens, perplexity 3.21, 29,870 tokens/s, 00:03 left
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm

from pytest_lmeval.records._live import LiveFile, so_far

LAYOUT = "{desc}: {percentage:3.0f}% {n:,d}/{total:,d} tokens{postfix}, {rate_noinv:,.0f} tokens/s, {remaining} left"
UNKNOWN = "{desc}: {n:,d} tokens{postfix}, {rate_noinv:,.0f} tokens/s, {elapsed} so far"  # the total is not known
NARROW = {LAYOUT: "{desc}: {percentage:3.0f}%{postfix}, {remaining} left", UNKNOWN: "{desc}: {n:,d} tokens, {elapsed} so far"}
"""What a terminal of fewer than `ROOMY` columns has room for, if the title leaves `BESIDE` of them."""
ROOMY, BESIDE = 120, 45


class Uncaptured:
    """The terminal as a file that pytest's capture does not swallow."""

    def __init__(self, terminal: Any, capture: Any) -> None:
        self._file, self._capture = terminal._tw._file, capture

    def write(self, text: str) -> None:
        with self._capture.global_and_fixture_disabled():
            self._file.write(text)
            self._file.flush()

    def flush(self) -> None:
        """`write` has flushed."""

    def isatty(self) -> bool:
        with self._capture.global_and_fixture_disabled():  # while it captures, file descriptor 1 is pytest's own file
            return bool(self._file.isatty())

    @property
    def columns(self) -> int:
        """How many characters a line of the terminal has: a longer one goes on in the next, which no update writes over."""
        with self._capture.global_and_fixture_disabled():
            return shutil.get_terminal_size().columns


@contextmanager
def shown(
    title: str, terminal: Any, live: LiveFile | None, unit: str = "tokens"
) -> Iterator[Callable[[int, float, int | None], None] | None]:
    """Show work where it can be shown. Yields the callback of its progress, as `bar`, or None if nobody sees it."""
    with ExitStack() as stack:
        bars = [] if terminal is None else [stack.enter_context(bar(title, terminal, unit))]
        bars += [] if live is None else [stack.enter_context(live.work(title, unit))]
        callbacks = [callback for callback in bars if callback is not None]

        def update(done: int, total: float, expected: int | None) -> None:
            for callback in callbacks:
                callback(done, total, expected)

        yield update if callbacks else None


@contextmanager
def bar(title: str, file: Any, unit: str = "tokens") -> Iterator[Callable[[int, float, int | None], None] | None]:
    """A progress bar, or None without a terminal.

    Call it with tokens done, nats so far, tokens expected; with questions answered, right answers (nan: nobody judges them),
    questions expected; or (unit "laws") with tokens done, laws broken, tokens expected.
    """
    if not file.isatty():
        yield None
        return
    counted = "tokens" if unit == "laws" else unit
    # delay: the first update needs a rate to show
    with tqdm(desc=title, file=file, leave=False, mininterval=0.2, delay=0.2) as shown:

        def update(done: int, total: float, expected: int | None) -> None:
            if expected is not None:  # an estimate may improve
                shown.total = max(expected, done)
            columns, layout = file.columns, UNKNOWN if shown.total is None else LAYOUT
            shown.ncols, room = columns - 1, max(1, columns - BESIDE)
            shown.desc = title if len(title) <= room else f"{title[:room]}..."
            shown.bar_format = (layout if columns >= ROOMY else NARROW[layout]).replace("tokens", counted)
            if not shown.n:  # the rate leaves out what an interrupted run did before
                shown.initial = shown.n = shown.last_print_n = done
            shown.set_postfix_str(so_far(unit, done, total), refresh=False)
            shown.update(done - shown.n)

        yield update
