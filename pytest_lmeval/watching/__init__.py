"""`lmeval watch`: show a run on a local page while it goes on: progress, results, answers as they come.

It reads the output folder and writes nothing. The page is served on the loopback interface alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.report._terminal import say
from pytest_lmeval.watching._folder import Folder
from pytest_lmeval.watching._server import HOST, Server

PORT = 8497


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="output folder of the run (--lmeval-dir), by default .lmeval")
    parser.add_argument("--port", type=port, default=PORT, help=f"of {HOST} (default: {PORT}); 0: any that is free")


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535; got {text!r}")
    return int(text)


def main(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Raises ArgumentError for a folder that does not exist, and for a port that cannot be had."""
    if not options.folder.is_dir():
        why = "is no folder" if options.folder.exists() else "does not exist"
        raise ArgumentError(f"{options.folder} {why}. Name the output folder of a run: --lmeval-dir, by default .lmeval.")
    folder = Folder(options.folder)
    if not folder.has_run:
        inner = options.folder / ".lmeval"
        meant = f" Did you mean {inner}?" if inner.is_dir() else ""
        say(f"there is no run in {options.folder} yet; the page waits for one.{meant}")
    try:
        with Server(folder, options.port) as server:
            say(f"{options.folder} is shown at {server.address} (Ctrl-C ends this, not the run)")
            server.serve_forever()
    except KeyboardInterrupt:
        say("no longer shown; the run is not touched")
    return 0
