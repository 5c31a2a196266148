"""Files of an output folder may come from anywhere: none runs code, leads out of the folder, or keeps a run waiting."""

import io
import os
import sys
import zipfile

import pytest
import torch
import torch.utils.serialization.config  # torch imports it with the first checkpoint that it reads
from documents import document, task_of, write_run
from hypothesis import given, strategies as st
from reading import ids_of, measure_perplexity
from tiny_models import Functional

from pytest_lmeval._session import Session
from pytest_lmeval.errors import DocumentError
from pytest_lmeval.gates._scores import scores_of
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records import _history as history, _schema as schema
from pytest_lmeval.records._document import load
from pytest_lmeval.records._journal import Checkpoints, Journal, JournalWarning
from pytest_lmeval.records._replacing import append, inside
from pytest_lmeval.report import _pages as pages
from pytest_lmeval.scoring._answers import AnswerStore
from pytest_lmeval.scoring._text_files import LossFile, safe_load


class Held:
    """A class that the state of the model below holds."""

    ran = False

    def __init__(self, hidden):
        self.hidden = hidden

    @property
    def trick(self):
        Held.ran = True


class Holding(Functional):
    def forward(self, input_ids, state=None):
        logits, state = super().forward(input_ids, None if state is None else state.hidden)
        return logits, Held(state)


LM = as_model(Holding())


def calling(name, argument=""):
    """The pickle of a call of a function with a text."""
    module, _, function = name.partition(":")
    text = argument.encode()
    return b"c%s\n%s\nX%s%s\x85R" % (module.encode(), function.encode(), len(text).to_bytes(4, "little"), text)


def crafted(payload):
    """The content of a checkpoint whose state is the payload of a pickle."""
    whole = io.BytesIO()
    torch.save({}, whole)
    raw = io.BytesIO()
    key = b"X\x04\x00\x00\x00sumsX\x02\x00\x00\x00{}X\x05\x00\x00\x00state"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(raw, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02}(" + key + payload + b"u." if name.endswith("data.pkl") else old.read(name))
    return raw.getvalue()


HELD = f"{__name__}:Held"
ATTACKS = {
    "a function of the system": calling("os:system", "touch ran"),
    "a function of Python": calling("builtins:eval", "open('ran', 'w')"),
    "an attribute": calling("builtins:getattr", "x"),
    "a module of the folder": calling("lies_in_the_folder:Thing"),
    "a submodule of the folder": calling("lies_in_the_folder.deep:Thing"),
    "a class that is not imported": calling("xmlrpc.server:SimpleXMLRPCServer"),
    "a function of torch": calling("torch.hub:load", "x"),
    "a property of the state's class": calling(f"{HELD}.trick"),
    "a method of the state's class": calling(f"{HELD}.__init__"),
    "the state's class under another name": calling("reading:Held"),
    "a function called for the state's class": b"c%s\n%s\n%s\x85R"
    % (*HELD.encode().split(b":"), calling("os:system", "touch ran")),
    "a function in the state's class": (
        b"c%s\n%s\n)\x81}X\x06\x00\x00\x00hidden%ssb" % (*HELD.encode().split(b":"), calling("os:system", "touch ran"))
    ),
}


@pytest.mark.parametrize("how", ATTACKS)
def test_no_name_in_a_checkpoint_is_imported_or_called(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lies_in_the_folder").mkdir()
    for name in ("__init__", "deep"):
        (tmp_path / f"lies_in_the_folder/{name}.py").write_text("open('ran', 'w')\nThing = str\n")
    measure_perplexity(LM, ids_of(100))
    loaded = set(sys.modules)
    (tmp_path / "k.pt").write_bytes(crafted(ATTACKS[how]))
    with pytest.warns(JournalWarning, match=r"k\.pt cannot be read .*; the work starts again"):
        assert measure_perplexity(LM, ids_of(100), checkpoints=Checkpoints(tmp_path), key="k").resumed_at == 0
    assert set(sys.modules) == loaded
    assert not (tmp_path / "ran").exists()
    assert not Held.ran


def test_a_checkpoint_with_the_classes_of_the_state_is_read():
    """The attacks above fail because of what they name, and not because of how they are written."""
    assert (
        safe_load(crafted(b"c%s\n%s\n)\x81}X\x06\x00\x00\x00hiddenX\x01\x00\x00\x00asb" % (*HELD.encode().split(b":"),)), LM)[
            "state"
        ].hidden
        == "a"
    )


# ---------------------------------------------------------------------------------------------- what files name


@pytest.fixture
def folder(tmp_path):
    """A folder with a file, and a secret beside it."""
    (tmp_path / "secret.jsonl").write_text("{}\n")
    folder = tmp_path / "out"
    (folder / "examples").mkdir(parents=True)
    (folder / "examples/own.jsonl").write_text("{}\n")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "link.jsonl").symlink_to("../secret.jsonl")
    (folder / "endless.jsonl").symlink_to("/dev/zero")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    return folder


OUTSIDE = ["../secret.jsonl", "examples/../../secret.jsonl", "/dev/full", "/dev/zero", "/etc/passwd", "pipe.jsonl",
           "link.jsonl", "endless.jsonl", "loop.jsonl", "examples", "a\0b.jsonl"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_in_a_file_leads_to_no_other_place_than_a_file_of_the_folder(folder, name):
    with pytest.raises(PermissionError, match=r"outside of the folder|no regular file|no name"):
        inside(folder, name)
    record = task_of(examples=name if name.endswith(".jsonl") else f"{name}/.jsonl")
    named = record.examples
    if named == name:
        with pytest.raises(DocumentError, match="cannot be read"):
            scores_of(record, folder)
        assert "are not shown: it " in pages.render("report.html", document(record), folders=[folder])
    context = VerbContext(Session(folder=folder))
    Journal(folder).add("key", schema.to_plain(task_of(examples=name)))
    with pytest.warns(JournalWarning, match="a result in the journal cannot be read .*; it is computed again"):
        assert context.journaled("key") is None


@given(st.lists(st.sampled_from(["..", ".", "/", "examples", "own.jsonl", "out", "secret.jsonl", "etc", "passwd"]), max_size=6))
def test_whatever_a_name_is_made_of_it_stays_in_the_folder(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp() / "contained/out"
    (folder / "examples").mkdir(parents=True, exist_ok=True)
    for file in (folder / "examples/own.jsonl", folder / "secret.jsonl", folder.parent / "secret.jsonl"):
        file.write_text("{}")
    try:
        found = inside(folder, "/".join(parts))
    except OSError:
        return
    assert found in (folder.resolve() / "examples/own.jsonl", folder.resolve() / "secret.jsonl")


@pytest.mark.parametrize("to", ["/dev/zero", "../secret.jsonl", "a pipe"])
def test_a_link_or_pipe_in_place_of_a_file_is_neither_read_nor_written(folder, to):
    secret = folder.parent / "secret.jsonl"
    (folder / "partial").mkdir()
    for name in ("journal.jsonl", "history.jsonl", "metrics.json", "losses.npy", "partial/k.pt", "partial/k.jsonl"):
        if to == "a pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to(to if to.startswith("/") else secret)
    with pytest.warns(JournalWarning, match="nothing of an interrupted run is used"):
        assert Journal(folder).results == {}
    with pytest.warns(JournalWarning, match=r"journal\.jsonl cannot be written \(it is a link, or no regular file\)"):
        Journal(folder).add("key", {})
    with pytest.warns(JournalWarning, match=r"k\.pt cannot be read"):
        assert Checkpoints(folder / "partial").read("k", lambda file: file.read()) is None
    with pytest.raises(DocumentError, match="cannot be read"):
        load(folder)
    assert "cannot be read" in history.read(folder)[1][0]
    with pytest.raises(PermissionError):
        append(folder / "history.jsonl", b"x\n")
    if to != "../secret.jsonl":
        with pytest.warns(JournalWarning, match="its questions are asked again"):
            assert not AnswerStore(folder / "partial/k.jsonl").has_earlier
    with pytest.warns(JournalWarning, match="the losses of this text are not kept"), LossFile(folder / "losses.npy"):
        pass
    assert secret.read_text() == "{}\n"


# --------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    "line",
    [
        "{{ asset('/etc/passwd') }}",
        "{{ asset('../secret.css') }}",
        "{{ asset('link.css') }}",
        "{{ asset('endless.css') }}",
        "{{ asset('notes.txt') }}",
        "{% include '/etc/passwd' %}",
        "{% include '../secret.css' %}",
        "{% include 'link.css' %}",
    ],
)
def test_a_template_reads_only_its_folder_and_our_styles_and_scripts(tmp_path, line):
    templates = tmp_path / "templates"
    templates.mkdir()
    (tmp_path / "secret.css").write_text("root:secret")
    (templates / "notes.txt").write_text("root:secret")
    (templates / "link.css").symlink_to("../secret.css")
    (templates / "endless.css").symlink_to("/dev/zero")
    (templates / "own.css").write_text("a { color: red }</style><script>b</SCRIPT>")
    (templates / "summary.md").write_text(line)
    with pytest.raises(Exception, match=r"no style or script|not found|outside|regular|passwd|secret\.css") as refused:
        pages.render("summary.md", document(), templates=templates)
    assert "root:" not in str(refused.value)
    (templates / "report.html").write_text("{{ asset('own.css') }} {{ asset('report.css') }}")
    page = pages.render("report.html", document(), templates=templates)
    assert page.startswith(r"a { color: red }<\/style><script>b<\/SCRIPT> ")


def test_a_page_of_a_folder_with_hostile_names_shows_the_rest(tmp_path):
    folder = write_run(tmp_path / "run", document(task_of("a", "../x.jsonl"), task_of("b", "/dev/zero/.jsonl")))
    html = pages.render("report.html", load(folder), folders=[folder])
    assert "the examples of ../x.jsonl are not shown: No such file" in html
