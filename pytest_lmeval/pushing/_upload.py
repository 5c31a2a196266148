"""Send files to the hub in parts: each part is a commit, and what the hub already has is not sent again.

huggingface_hub's `upload_folder` goes on after an interruption only with Xet, whose client has no time limits. So each part is
one `create_commit` within a `HubCall`, and the hub is asked before which files it has.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pytest_lmeval.errors import HubError, LmevalError, described
from pytest_lmeval.models._hub import HubCall
from pytest_lmeval.pushing._contents import Sent, text_file
from pytest_lmeval.report._words import size_of

SMALL = 5 << 20  # bytes of a file that is sent together with others
AT_ONCE = 1 << 22
README = "README.md"


@dataclass(frozen=True)
class Place:
    """The repository, the branch or pull request (None: main), and what is created."""

    repository: str
    revision: str | None = None
    create_pr: bool = False
    private: bool = False


def send(
    files: Sequence[Sent],
    to: Place,
    *,
    card: Callable[[str | None], str] | None = None,
    message: str,
    show: Callable[[str], None],
) -> None:
    """Send what the repository does not have.

    card  the text of README.md now (None: there is none) -> its new text
    show  takes a line for each part

    Raises HubError if the hub refuses or is not reached; what was sent until then stays, and the same call goes on.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so nothing is sent. Unset it; or look at what would be sent with --dry-run.")
    api, revision, done = HfApi(), to.revision, 0
    try:
        with _quiet(), HubCall(), tempfile.TemporaryDirectory(prefix="lmeval-") as name:
            folder = Path(name)
            _prepare(api, to)
            if card is not None:
                files = [*files, text_file(README, card(_readme(api, to, revision)), last=True)]
            parts = _parts(files)
            for number, part in enumerate(parts, 1):
                written = {file.path: file.write(folder) for file in part}
                missing = _missing(api, to.repository, revision, written)
                if missing:
                    entitled = message if len(parts) == 1 else f"{message} (part {number} of {len(parts)})"
                    opened = _commit(api, to, revision, missing, entitled)
                    revision = opened or revision
                    if opened:
                        show(f"pull request {opened}; if this is interrupted, go on with --revision {opened}, not --create-pr")
                done = number
                show(_line(number, len(parts), part, missing))
                for file in written.values():
                    if file.parent == folder:
                        file.unlink()
    except HubError as error:
        raise HubError(f"{error}{_how_to_go_on(to, revision, done)}", error.status) from error
    except LmevalError:
        raise
    except Exception as error:
        raise HubError(f"{to.repository}: {described(error.__cause__ or error)}.{_how_to_go_on(to, revision, done)}") from error
    show(f"all is at {constants.ENDPOINT}/{to.repository}" + (f", {revision}" if revision else ""))


def _prepare(api: Any, to: Place) -> None:
    """Create the repository if there is none. Raises HubError for a public one that should be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(to.repository)
    except RepositoryNotFoundError:
        api.create_repo(to.repository, private=to.private or None, exist_ok=True)
        return
    if to.private and not found.private:
        raise HubError(
            f"{to.repository} exists and is public, and --private creates private ones only. Nothing is sent. Make it private "
            "in its settings, or take another name."
        )


def _readme(api: Any, to: Place, revision: str | None) -> str | None:
    """Its text on the hub; None if there is none there. A failed request is no missing file, whose text would be replaced."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import EntryNotFoundError

    utils: Any = importlib.import_module("huggingface_hub.utils")
    url = f"{api.endpoint}/{to.repository}/resolve/{quote(revision or 'main', safe='')}/{README}"
    response = get_session().get(url, headers=utils.build_hf_headers())
    try:
        utils.hf_raise_for_status(response)
    except EntryNotFoundError:
        return None
    return str(response.content, "utf-8")


def _parts(files: Sequence[Sent]) -> list[list[Sent]]:
    """Small files together, in a first part; each larger one alone; those that are to be the last."""
    early = [file for file in files if not file.last]
    small, large = [file for file in early if file.size <= SMALL], [file for file in early if file.size > SMALL]
    return [part for part in (small, *([file] for file in large), [file for file in files if file.last]) if part]


def _missing(api: Any, repository: str, revision: str | None, files: dict[str, Path]) -> dict[str, Path]:
    """The files that the repository does not have, or has with other content."""
    there = {one.path: one for one in api.get_paths_info(repository, list(files), revision=revision) if hasattr(one, "size")}
    return {path: file for path, file in files.items() if path not in there or not _is_same(there[path], file)}


def _is_same(there: Any, file: Path) -> bool:
    size = file.stat().st_size
    if there.size != size:
        return False
    digest = hashlib.sha256() if there.lfs else hashlib.sha1(b"blob %d\0" % size)
    with file.open("rb") as content:
        while part := content.read(AT_ONCE):
            digest.update(part)
    return bool(digest.hexdigest() == (there.lfs.sha256 if there.lfs else there.blob_id))


def _commit(api: Any, to: Place, revision: str | None, files: dict[str, Path], message: str) -> str | None:
    """Commit files; returns the revision of the pull request if one was opened."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    new = to.create_pr and revision is None
    try:
        found = api.create_commit(
            to.repository,
            [CommitOperationAdd(path, file) for path, file in files.items()],
            commit_message=message,
            revision=revision,
            create_pr=new,
        )
    except HfHubHTTPError as error:
        status, said = error.response.status_code, getattr(error, "server_message", None)
        if 400 <= status < 500 and status not in (401, 403, 404, 429) and said:
            raise HubError(f"the hub refused {', '.join(files)} with {status}: {said}.", status) from error
        raise
    return found.pr_revision if new else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Show the bars of huggingface_hub in a terminal only, and not its own use of what its client deprecates."""
    utils: Any = importlib.import_module("huggingface_hub.utils")
    change = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if change:
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
            yield
    finally:
        if change:
            utils.enable_progress_bars()


def _line(number: int, parts: int, files: Sequence[Sent], missing: dict[str, Path]) -> str:
    there = [file.path for file in files if file.path not in missing]
    sent = [file for file in files if file.path in missing]
    said = [f"sent {', '.join(file.path for file in sent)} ({size_of(sum(file.size for file in sent))})"] if sent else []
    said += [f"{', '.join(there)} already there"] if there else []
    return f"part {number} of {parts}: {'; '.join(said)}"


def _how_to_go_on(to: Place, revision: str | None, done: int) -> str:
    if not done:
        return " Nothing is committed." if not (to.create_pr and revision) else f" Go on with --revision {revision}."
    how = f"with --revision {revision} in place of --create-pr" if to.create_pr and revision else "by the same command"
    return (
        f" {done} part{'s' * (done > 1)} of it {'are' if done > 1 else 'is'} there; go on {how}: only what is missing is sent."
    )
