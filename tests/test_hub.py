"""A hub that does not answer, or answers badly, ends within its limit, and the message says what it did."""

import json
import os
import subprocess
import sys
import time

import pytest
from huggingface_hub import get_session
from huggingface_hub.utils import hf_raise_for_status
from stub_hub import MOODS, PASSING, StubHub
from test_huggingface import MODELS
from tokenizers_of_each_kind import tokenizer_of

from pytest_lmeval.errors import ArgumentError, HubError
from pytest_lmeval.models._hub import HubCall, limit

LIMIT = 0.6  # seconds
SLACK = 1.5  # seconds of a busy machine, and of libraries between requests
ROWS = 50

CHILD = """
import contextlib, json, sys, time
from pathlib import Path
from stub_hub import MOODS, PASSING, StubHub

with StubHub(Path(sys.argv[1])) as hub:
    import os
    os.environ["HF_ENDPOINT"] = hub.url
    import datasets, transformers
    from huggingface_hub import close_session, constants, get_session
    from pytest_lmeval.data._rows import Rows
    from pytest_lmeval.models._hub import HubCall
    from pytest_lmeval.models._sources import load

    READ = {"rows": lambda of: len(list(Rows(of, split="train").read())), "model": lambda of: load(f"hf:{of}").vocab_size}

    def tried(what, mood):
        HubCall.resting.clear()
        began, asked = time.monotonic(), len(hub.asked)
        try:
            found = READ[what](f"moods/{mood}")
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        return [found, time.monotonic() - began, len(hub.asked) - asked]

    load("hf:moods/well")  # which imports what it needs
    start = time.monotonic()
    moods = [mood for mood in (*PASSING, *MOODS) if mood != "refuses"]
    found = {f"{mood} {what}": tried(what, mood) for mood in moods for what in READ}
    found["again"] = tried("model", "503") + tried("model", "well")
    hub.silent = True
    found["cached"] = tried("model", "well")
    began = time.monotonic()
    found["resting"] = []
    for _ in range(3):
        try:
            load("hf:moods/other")
        except Exception as error:
            found["resting"].append([str(error), time.monotonic() - began])
    constants.HF_HUB_OFFLINE, asked = True, len(hub.asked)
    HubCall.resting.clear()
    found["offline"] = [load("hf:moods/well").vocab_size, len(hub.asked) - asked]
    constants.HF_HUB_OFFLINE, hub.silent = False, False
    found["after"] = [constants.HF_HUB_DISABLE_XET, HubCall.active, get_session().get(hub.url + "/moods/503").status_code]
    hub.shutdown()
    hub.server_close()
    close_session()
    for what in ("rows", "model"):
        found[f"refuses {what}"] = tried(what, "refuses")
    found["seconds"] = time.monotonic() - start
    print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a child found in each mood: the number of rows, the size of the vocabulary, or the error; seconds; requests."""
    folder = tmp_path_factory.mktemp("repository")
    MODELS["llama"]().save_pretrained(folder)
    tokenizer_of("gpt2").tokenizer.save_pretrained(folder)
    (folder / "train.jsonl").write_text((json.dumps({"text": "x" * 120}) + "\n") * ROWS)
    home = {
        "LMEVAL_HUB_TIMEOUT": str(LIMIT),
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder)]
    ran = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=300)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("found ")]
    assert lines, ran.stderr[-4000:]
    return json.loads(lines[0].removeprefix("found "))


@pytest.mark.parametrize("mood", [mood for mood in MOODS if mood != "refuses"])
def test_a_request_within_a_call_ends_within_its_limit(tmp_path, monkeypatch, mood):
    monkeypatch.setenv("LMEVAL_HUB_TIMEOUT", "0.3")
    (tmp_path / "train.jsonl").write_text("row\n" * 3000)
    with StubHub(tmp_path) as hub:
        began = time.monotonic()
        part = {"range": "bytes=0-"} if mood == "drips-file" else {}  # a part of a file may take its time
        with pytest.raises(HubError, match=MOODS[mood]), HubCall():
            hf_raise_for_status(get_session().get(f"{hub.url}/moods/{mood}/resolve/main/train.jsonl", headers=part))
        assert time.monotonic() - began < 0.3 + SLACK


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["rows", "model"])
@pytest.mark.parametrize("mood", MOODS)
def test_each_bad_mood_ends_within_its_limit_and_has_its_own_message(found, mood, what):
    message, seconds, _ = found[f"{mood} {what}"]
    assert str(message).startswith("CorpusError: " if what == "rows" else "SpecError: ")
    assert MOODS[mood] in message
    assert [said for said in set(MOODS.values()) if said in message] == [MOODS[mood]]
    assert seconds < (2 if mood == "drips-file" else 1) * LIMIT + SLACK


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["rows", "model"])
@pytest.mark.parametrize("mood", PASSING)
def test_errors_that_pass_are_tried_again_until_the_answer_is_whole(found, mood, what):
    assert found[f"{mood} {what}"][0] == (ROWS if what == "rows" else 64)
    assert (found[f"{mood} {what}"][2] > found[f"well {what}"][2]) == (mood != "well")


@pytest.mark.thorough
def test_a_hub_that_is_down_is_not_needed_for_what_is_in_the_cache(found):
    assert found["cached"][0] == 64
    assert found["cached"][1] < LIMIT + SLACK


@pytest.mark.thorough
def test_a_hub_that_did_not_answer_is_asked_again_only_later_and_one_that_is_overloaded_at_once(found):
    assert len(found["resting"]) == 3
    assert all("It is asked again after" in message for message, _ in found["resting"])
    assert found["resting"][-1][1] < LIMIT
    assert found["again"][3] == 64


@pytest.mark.thorough
def test_offline_nothing_is_sent_and_after_a_call_nothing_is_limited(found):
    assert found["offline"] == [64, 0]
    assert found["after"] == [False, [], 503]


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("LMEVAL_HUB_TIMEOUT", text)
    with pytest.raises(ArgumentError, match="LMEVAL_HUB_TIMEOUT is"):
        HubCall()
    monkeypatch.setenv("LMEVAL_HUB_TIMEOUT", "7")
    assert limit() == 7
