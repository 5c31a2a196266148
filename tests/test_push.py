"""`lmeval push` sends a run and its model to a repository of the hub, in parts, and goes on where it was interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from documents import document, model, task_of, write_run
from huggingface_hub import constants
from msgspec.structs import replace
from safetensors import safe_open
from safetensors.torch import save_file
from stub_uploads import TOKEN, WritableHub
from tiny_models import Functional

from pytest_lmeval.__main__ import main
from pytest_lmeval.errors import SpecError
from pytest_lmeval.models._hub import HubCall
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.pushing import _upload as upload
from pytest_lmeval.training._weights import load_weights

RECORD, REPORT = "metrics.json", "report.html"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def run(tmp_path):
    """The output folder of a run with a trained model, and what must not be sent."""
    folder = write_run(tmp_path / "run", document(task_of(subject="boolq, 5-shot", accuracy=0.75)))
    (folder / REPORT).write_text(f"<html><script>var token = 'x'; f('{TOKEN}')</script></html>")
    trained = folder / "models" / "abc"
    trained.mkdir(parents=True)
    tensors = {name: torch.full((20, 40), float(number)) for number, name in enumerate("abc")}
    save_file(tensors, trained / "best.safetensors", metadata={"spec": "tiny", "url": "http://me:pw@host"})
    (trained / "protocol.json").write_text('{"lr": 0.1, "hf_token": "secret"}')
    (trained / "record.json").write_text(json.dumps({"lm": {"fingerprint": "demo"}}))
    (trained / "point.pt").write_bytes(b"a pickle")
    (folder / "journal.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("LMEVAL_HUB_TIMEOUT", "2")
    monkeypatch.setattr(HubCall, "resting", {})
    with WritableHub(tmp_path) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        yield found


@pytest.fixture
def parts_of_one(monkeypatch):
    """Each file of weights is a part of its own, as large ones are."""
    monkeypatch.setattr(upload, "SMALL", 2_000)


def push(run, *options, name="me/model"):
    return main(["push", str(run), name, "--max-shard-size", "4KB", *options])


def test_a_dry_run_shows_what_would_be_sent_and_needs_no_hub(run, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(run, "--dry-run", "--benchmark", "boolq=google/boolq") == 0
    shown = capsys.readouterr().out
    for path in (RECORD, REPORT, *SHARDS, INDEX, "training/protocol.json", ".eval_results/boolq-default.yaml"):
        assert f"  {path}" in shown
    assert "3.2 KiB  model-00001-of-00003.safetensors" in shown
    assert "a dry run, nothing is sent" in shown
    assert "point.pt" not in shown
    assert "journal" not in shown


def test_all_arrives_with_secrets_masked_and_the_same_again_sends_nothing(run, hub, parts_of_one, capsys):
    assert push(run, "--benchmark", "boolq=google/boolq:yes-no", "--private") == 0
    files = hub.of()
    assert set(files) == {RECORD, REPORT, INDEX, *SHARDS, "training/protocol.json", "training/record.json",
                          ".eval_results/boolq-yes-no.yaml"}  # fmt: skip
    everything = b"".join(files.values())
    for secret in (TOKEN, "me:pw", '"secret"', "a pickle"):
        assert secret.encode() not in everything
    assert files[REPORT] == b"<html><script>var token = 'x'; f('***')</script></html>"  # its code is not changed
    assert files[RECORD] == (run / RECORD).read_bytes()
    assert hub.private == {"me/model"}
    assert hub.tokens == {f"Bearer {TOKEN}", None}
    assert TOKEN not in capsys.readouterr().out
    sent, commits = list(hub.sent), len(hub.messages)
    assert push(run, "--benchmark", "boolq=google/boolq:yes-no") == 0
    assert hub.sent == sent
    assert len(hub.messages) == commits == 5
    assert "already there" in capsys.readouterr().out


def test_an_entry_has_the_form_of_the_hub_with_interval_and_n_in_its_notes(run, hub):
    options = ("--benchmark", "boolq=google/boolq", "--source-url", "https://example.org/run", "--percent", "boolq")
    assert push(run, *options, "--no-model", "--no-report") == 0
    assert set(hub.of()) == {RECORD, ".eval_results/boolq-default.yaml"}
    (entry,) = yaml.safe_load(hub.of()[".eval_results/boolq-default.yaml"])
    notes = entry.pop("notes")
    assert notes.startswith("boolq, 5-shot, accuracy, 95 % interval 65 to 85, n = 10, pytest-lmeval ")
    assert entry.pop("date") == document().run.started
    assert entry == {
        "dataset": {"id": "google/boolq", "task_id": "default"},
        "value": 75.0,
        "source": {"url": "https://example.org/run"},
    }


def test_the_model_index_is_written_on_demand_and_merged_into_what_is_there(run, hub):
    hub.repositories["me/model"] = {"main": {"README.md": b"---\nlicense: mit\n---\n\nMy words.\n"}}
    for _ in range(2):
        assert push(run, "--no-model", "--benchmark", "boolq=google/boolq", "--model-index") == 0
    text = hub.of()["README.md"].decode()
    head = yaml.safe_load(text.split("---")[1])
    (result,) = head["model-index"][0]["results"]
    assert head["license"] == "mit"
    assert "My words." in text
    assert result["dataset"]["type"] == "google/boolq"
    assert result["metrics"][0]["value"] == 0.75
    assert len(hub.messages) == 2  # the second time, nothing has changed


@pytest.mark.parametrize("status", [-1, 403])
def test_an_interrupted_push_goes_on_with_what_is_missing(run, hub, parts_of_one, capsys, monkeypatch, status):
    monkeypatch.setattr("huggingface_hub.lfs.http_backoff", _once)
    hub.refuse = lambda method, path, before: status if method == "PUT" and before >= 2 else 0
    assert push(run) == 2
    told = capsys.readouterr()
    assert "3 parts of it are there; go on by the same command" in told.err
    assert set(SHARDS[:2]) < set(hub.of())
    assert INDEX not in hub.of()
    assert SHARDS[2] not in hub.of()
    hub.refuse, before = lambda *asked: 0, list(hub.sent)
    assert push(run) == 0
    assert len(hub.sent) == len(before) + 2
    assert hub.sent[-1] == INDEX
    assert "already there" in capsys.readouterr().out


def _once(method, url, **options):
    """A request of huggingface_hub without its pauses between tries."""
    from huggingface_hub import get_session

    if "data" in options:
        options["content"] = options.pop("data")
    return get_session().request(method, url, **options)


def test_a_pull_request_is_opened_once_and_gone_on_with_by_its_revision(run, hub, parts_of_one, capsys):
    hub.repositories["me/model"] = {"main": {}}
    hub.refuse = lambda method, path, before: 404 if path.endswith("/commit/refs/pr/1") else 0
    assert push(run, "--create-pr") == 2
    told = capsys.readouterr()
    assert "pull request refs/pr/1" in told.out
    assert "go on with --revision refs/pr/1 in place of --create-pr" in told.err
    hub.refuse = lambda *asked: 0
    assert push(run, "--revision", "refs/pr/1") == 0
    assert set(hub.repositories["me/model"]) == {"main", "refs/pr/1"}
    assert hub.of() == {}
    assert {RECORD, INDEX, *SHARDS} < set(hub.of(revision="refs/pr/1"))


KILLED = """
import os, sys
from huggingface_hub import constants
constants.ENDPOINT = sys.argv[1]
from pytest_lmeval.pushing import _upload
_upload.SMALL = 2_000
from pytest_lmeval.__main__ import main
sys.exit(main(["push", sys.argv[2], "me/model", "--max-shard-size", "4KB"]))
"""


@pytest.mark.thorough
def test_a_killed_push_goes_on_with_what_is_missing(run, hub):
    hub.refuse = lambda method, path, before: time.sleep(60) or 0 if method == "PUT" and before == 1 else 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LMEVAL_HUB_TIMEOUT": "60"}
    child = subprocess.Popen([sys.executable, "-c", KILLED, hub.url, str(run)], env=environment)
    try:
        until = time.monotonic() + 60
        while [method for method, _ in hub.asked].count("PUT") < 2 and child.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert SHARDS[0] in hub.of()
    assert SHARDS[1] not in hub.of()
    hub.refuse, before = lambda *asked: 0, list(hub.sent)
    done = subprocess.run([sys.executable, "-c", KILLED, hub.url, str(run)], env=environment, timeout=60)
    assert done.returncode == 0
    assert SHARDS[0] not in hub.sent[len(before) :]
    assert len(hub.objects) == len(SHARDS)
    assert set(SHARDS) < set(hub.of())


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "the token may not write there"),
        (403, "the token may not write there"),
        (404, "there is no such repository, revision or file"),
        (429, "too many requests"),
        (503, "it is down or overloaded"),
        (400, "no entry of a registered benchmark"),
    ],
)
def test_a_hub_that_refuses_is_named_and_the_exit_status_is_2(run, hub, capsys, status, says):
    hub.refuse = lambda method, path, before: status if "/commit/" in path else 0
    assert push(run, "--no-model") == 2
    told = capsys.readouterr().err
    assert says in told
    assert "Nothing is committed." in told
    assert TOKEN not in told


def test_no_network_and_offline_mode_are_said(run, monkeypatch, capsys):
    monkeypatch.setattr(HubCall, "resting", {})
    monkeypatch.setenv("LMEVAL_HUB_TIMEOUT", "0.3")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(run) == 2
    assert "127.0.0.1 could not be reached" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(run) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_public_repository_is_not_taken_for_a_private_one(run, hub, capsys):
    hub.repositories["me/model"] = {"main": {}}
    assert push(run, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err
    assert hub.of() == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "abx"], "holds no trained model 'abx'. It holds: abc"),
        (["--max-shard-size", "much"], "--max-shard-size is 'much'"),
        (["--benchmark", "boolq"], "does not have the form TASK=DATASET[:ID]"),
        (["--benchmark", "boolq=boolq"], "has the form OWNER/NAME"),
        (["--benchmark", "bolq=google/boolq"], "Did you mean boolq?"),
        (["--benchmark", "boolq=google/boolq", "--metric", "boolq=f1"], "has no metric 'f1'. It has: accuracy"),
        (["--benchmark", "boolq=google/boolq", "--lm", "other"], "--lm is 'other'"),
        (["--percent", "boolq"], "which no --benchmark maps"),
        (["--model-index"], "there is none. Name one"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is(run, hub, capsys, options, says):
    assert push(run, *options) == 2
    assert says in capsys.readouterr().err
    assert hub.asked == []


def test_files_that_cannot_be_sent_are_named(run, hub, tmp_path, capsys):
    assert push(run, name="model") == 2
    assert "Give OWNER/NAME" in capsys.readouterr().err
    assert push(tmp_path / "none") == 2
    assert "is no folder" in capsys.readouterr().err
    file = run / "models/abc/best.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert push(run) == 2
    assert "is no whole file of weights" in capsys.readouterr().err
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    file.symlink_to(tmp_path / "elsewhere")
    assert push(run) == 2
    assert "cannot be read" in capsys.readouterr().err
    (run / REPORT).unlink()
    assert push(run, "--no-model") == 2
    assert "--no-report" in capsys.readouterr().err
    assert hub.asked == []


def test_the_results_of_the_model_that_is_sent_are_chosen_among_several(run, hub, capsys):
    asked = task_of(subject="boolq, 5-shot")
    other = replace(asked, lm=model("other"), metrics=task_of(accuracy=0.25).metrics)
    write_run(run / "two", document(asked, other))
    (run / "two" / "metrics.json").replace(run / "metrics.json")
    assert push(run, "--benchmark", "boolq=google/boolq", "--no-report") == 0
    assert yaml.safe_load(hub.of()[".eval_results/boolq-default.yaml"])[0]["value"] == 0.5
    assert push(run, "--benchmark", "boolq=google/boolq", "--no-model") == 2
    assert "has 2 results of boolq" in capsys.readouterr().err


def test_shards_hold_the_tensors_of_the_model_and_are_loaded(run, hub, tmp_path):
    lm = as_model(Functional())
    tensors = {name: tensor.clone() + 1 for name, tensor in lm.module.state_dict().items()}
    save_file(tensors, run / "models/abc/best.safetensors", metadata={"spec": "trained"})
    assert push(run, "--no-report") == 0
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for path, raw in hub.of().items():
        if "/" not in path:
            (folder / path).write_bytes(raw)
    assert (folder / INDEX).exists()
    loaded = load_weights(lm, folder)
    assert loaded.spec == "trained"
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    shard = next(folder.glob("model-*"))
    with safe_open(shard, framework="pt") as content:
        first = next(iter(content.keys()))
    weights = json.loads((folder / INDEX).read_text())
    assert weights["weight_map"][first] == shard.name
    shard.unlink()
    with pytest.raises(SpecError, match="there are no weights at"):
        load_weights(lm, folder)
