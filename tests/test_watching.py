"""`lmeval watch` shows what a folder holds of a run, to this machine's browsers alone, and changes nothing in it."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from documents import HOSTILE, document, generated, perplexity_of, write_run
from msgspec.structs import replace
from test_plugin import run

from pytest_lmeval.__main__ import main
from pytest_lmeval.records import _live as live, _schema as schema
from pytest_lmeval.records._journal import Journal, clean
from pytest_lmeval.records._kept import KeptAnswer, KeptBatch, KeptScored, name_of
from pytest_lmeval.records._live import Live, LiveFile
from pytest_lmeval.records._schema import line_of, to_plain
from pytest_lmeval.watching import _folder as folder_module, _results as results, _tail as tail
from pytest_lmeval.watching._folder import Folder
from pytest_lmeval.watching._server import Server
from pytest_lmeval.watching._tail import Tail

playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(autouse=True)
def read_anew(monkeypatch):
    monkeypatch.setattr(folder_module, "FRESH", 0.0)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


@contextmanager
def served(path):
    with Server(Folder(path), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path="/state", method="GET", host=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host or f"127.0.0.1:{server.port}", **headers}.items():
        if value:
            connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def add(journal, key, **changes):
    journal.add(key, to_plain(perplexity_of(subject=key, **changes)))


def subjects(folder):
    return [result["subject"] for result in folder.state()["results"]]


def batch(number, text="an answer", judged=None, why="stop", key=None):
    own = KeptAnswer(ids=(1, 2, 3), logprobs=(0.0,) * 3, text=text, judged=judged, read=3, why=why, counts=(3, 0, 1, 0))
    return line_of(KeptBatch(plan="p", answers={name_of(number, key or f"key{number}", 0): own}))


def write_answers(path, *lines, name="task"):
    path = path / "answers" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.writelines(lines)


def work(**changes):
    now = time.time()
    own = {"test": "t.py::test", "title": "demo reads stdlib[test]", "unit": "tokens", "started": now - 10, "written": now}
    return Live(**{**own, "done": 3000, "first": 1000, "total": 3000.0, "expected": 5000, **changes})


def write_live(path, name="live.json", **changes):
    (path / name).write_text(line_of(work(**changes)))


# ------------------------------------------------------------------------------------------------- the file that a run writes


@pytest.fixture
def clock(monkeypatch):
    """Seconds that `live` reads; a test moves them on."""
    now = [100.0]
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    return now


def test_a_run_writes_what_it_does_at_most_once_a_second_and_deletes_it_at_the_end(tmp_path, clock, monkeypatch):
    written = []
    replacing = live.replacing
    monkeypatch.setattr(live, "replacing", lambda file, **how: written.append(how) or replacing(file, **how))
    file = LiveFile(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with file.work("token=hf_abcdefghijklmnopqrstuvwxyz0123456789 reads x") as update:
        for done in range(1, 1001):
            clock[0] += 0.01
            update(done, 2.0 * done, 1000)
        said = schema.convert(json.loads((tmp_path / "live.json").read_text()), Live)
    assert 10 <= len(written) <= 12
    assert all(how == {"sync": False} for how in written)
    assert (said.first, said.total, said.expected) == (1, 2.0 * said.done, 1000)
    assert said.done > 890
    assert "test_watching.py::test_a_run_writes" in said.test
    assert "hf_abc" not in said.title
    assert json.loads((tmp_path / "live.json").read_text())["title"] == ""  # between two works
    file.close()
    assert list(tmp_path.iterdir()) == []


def test_short_works_are_not_written_each_and_a_slow_disk_is_written_less_often(tmp_path, clock, monkeypatch):
    written = []
    replacing = live.replacing

    def slow(file, **how):
        written.append(clock[0])
        clock[0] += 0.1
        return replacing(file, **how)

    monkeypatch.setattr(live, "replacing", slow)
    file = LiveFile(tmp_path)
    for _ in range(100):
        with file.work("short") as update:
            update(1, float("nan"), None)
            clock[0] += 0.001
    assert len(written) == 2  # when the first began, and when it ended
    clock[0] += 199.0
    with file.work("after a while") as update:
        update(1, 1.0, None)
    assert len(written) == 2
    clock[0] += 2.0
    with file.work("later"):
        pass
    assert len(written) == 4


def test_a_file_that_cannot_be_written_costs_the_run_nothing(tmp_path):
    (tmp_path / "a file").write_text("")
    file = LiveFile(tmp_path / "a file")
    with file.work("x") as update:
        update(1, 1.0, 2)
    file.close()


def test_files_of_killed_runs_are_deleted_by_the_next_and_at_its_end(tmp_path):
    write_live(tmp_path, "live-gw0.json")
    write_live(tmp_path, "live-gw1.json")
    (tmp_path / "live music.json").write_text("{}")
    os.utime(tmp_path / "live-gw1.json", (1, 1))
    file = LiveFile(tmp_path, "gw2")
    with file.work("x"):
        assert [one.name for one in live.files(tmp_path)] == ["live-gw0.json", "live-gw2.json"]
    clean(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["live music.json"]


TESTS = """
    import json, pathlib
    from pytest_lmeval.records._live import LiveFile

    LiveFile.PAUSE = LiveFile.SHARE = 0.0

    def test_reads(lmeval, corpus, lm, monkeypatch):
        seen, write = [], LiveFile._write
        def note(self):
            write(self)
            seen.append(json.loads(self.path.read_text()))
        monkeypatch.setattr(LiveFile, "_write", note)
        lmeval.perplexity(lm, corpus("text:text.txt"), chunk_size=64, tokens=400)
        mine = [one for one in seen if "reads" in one["title"]]
        assert {one["done"] for one in mine} >= {64, 128, 399}
        assert mine[-1]["expected"] == 399 and mine[-1]["total"] > 100 and "::test_reads" in mine[-1]["test"]
        pathlib.Path("name").write_text(LiveFile and next(pathlib.Path(".lmeval").glob("live*.json")).name)
"""


def test_a_run_without_a_terminal_writes_its_progress_and_leaves_no_file(project):
    project.makepyfile(TESTS)
    (project.path / "text.txt").write_text("all that is written here is read. " * 60)
    run(project).assert_outcomes(passed=1)
    assert (project.path / "name").read_text() == "live.json"
    assert list((project.path / ".lmeval").glob("live*")) == []


@pytest.mark.thorough
def test_a_worker_writes_a_file_of_its_own(project):
    pytest.importorskip("xdist")
    project.makepyfile(TESTS)
    (project.path / "text.txt").write_text("all that is written here is read. " * 60)
    run(project, "-n", "1").assert_outcomes(passed=1)
    assert (project.path / "name").read_text() == "live-gw0.json"
    assert list((project.path / ".lmeval").glob("live*")) == []


# ------------------------------------------------------------------------------------------------------- what the folder holds


def test_progress_is_told_with_perplexity_rate_and_time_left(tmp_path):
    write_live(tmp_path)
    write_live(
        tmp_path, "live-gw1.json", unit="questions", total=1.5, done=3, first=0, expected=None, title="demo answers boolq"
    )
    state = Folder(tmp_path).state()
    one, other = state["works"]
    assert (other["done"], other["so_far"], other["share"]) == ("3,000 of 5,000 tokens", "perplexity 2.718", 0.6)
    assert (other["process"], other["rate"], other["left"]) == ("", "200 tokens/s", 10)
    assert (one["process"], one["done"], one["so_far"], one["left"]) == ("gw1", "3 questions", "50.0% right", None)
    assert state["status"] == "The run goes on in 2 processes"


def test_the_curve_of_the_perplexity_grows_and_begins_anew_with_the_work(tmp_path):
    folder = Folder(tmp_path)
    for done in (1000, 2000, 2000, 3000):
        write_live(tmp_path, done=done, total=float(done))
        curve = folder.state()["works"][0]["curve"]
    assert [at for at, _ in curve] == [1000, 2000, 3000]
    write_live(tmp_path, done=500, total=500.0)
    assert [at for at, _ in folder.state()["works"][0]["curve"]] == [500]


def test_the_state_of_the_run_follows_from_its_files(tmp_path, journal):
    folder = Folder(tmp_path)
    assert not folder.has_run
    assert folder.state()["status"] == "There is no run here yet"
    write_live(tmp_path)
    assert folder.has_run
    assert folder.state()["status"] == "The run goes on"
    write_live(tmp_path, written=time.time() - 100)
    assert folder.state()["status"].startswith("No news for 100 seconds: the run was killed")
    (tmp_path / "live.json").unlink()
    add(journal, "a")
    assert folder.state()["status"].startswith("Nothing is measured at the moment")
    journal.end()
    assert folder.state()["status"] == "The run ended"


def test_results_come_as_the_journal_grows_and_a_half_written_line_when_it_is_whole(tmp_path, journal):
    folder = Folder(tmp_path)
    assert subjects(folder) == []
    add(journal, "a")
    assert subjects(folder) == ["a"]
    (result,) = folder.state()["results"]
    assert (result["kind"], result["model"]) == ("perplexity", "demo")
    assert any(row[0] == "perplexity" for row in result["numbers"])
    line = (tmp_path / "journal.jsonl").read_bytes().replace(b'"a"', b'"b"')
    with open(tmp_path / "journal.jsonl", "ab", buffering=0) as file:
        file.write(line[:100])
        assert subjects(folder) == ["a"]
        file.write(line[100:])
    assert subjects(folder) == ["a", "b"]
    assert folder.state()["problems"] == []
    journal.end(["b"])
    assert subjects(folder) == ["a"]  # of a run that goes on
    journal.end()
    assert subjects(folder) == ["a"]
    add(journal, "c")
    assert subjects(folder) == ["c"]


def test_a_journal_that_is_replaced_is_read_from_its_beginning(tmp_path, journal):
    folder = Folder(tmp_path)
    for key in "abc":
        add(journal, key)
    assert subjects(folder) == ["a", "b", "c"]
    path = tmp_path / "journal.jsonl"
    longer = path.read_bytes().replace(b'"a"', b'"x"').replace(b'"b"', b'"y"') * 2
    path.write_bytes(longer.replace(b'"c"', b'"z"'))  # the same file, and longer: only its content tells
    assert subjects(folder) == ["x", "y", "z"]
    path.unlink()
    assert subjects(folder) == []
    add(journal, "d")
    assert subjects(folder) == ["d"]


def test_broken_lines_are_counted_and_cost_no_other(tmp_path, journal):
    add(journal, "a")
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"event": "result", "key": "k", "rec\n[]\n\xff\n{"event": "result", "record": {"kind": 3}}\n')
    add(journal, "b")
    folder = Folder(tmp_path)
    assert subjects(folder) == ["a", "b"]
    assert folder.state()["problems"][0].startswith("4 lines of journal.jsonl cannot be read")


def test_memory_does_not_grow_with_the_journal_and_a_line_that_is_too_long_is_skipped(tmp_path, monkeypatch, journal):
    monkeypatch.setattr(results, "KEPT", 5)
    monkeypatch.setattr(results, "SHOWN", 3)
    monkeypatch.setattr(folder_module, "SHOWN", 3)
    for number in range(8):
        add(journal, f"s{number}")
    folder = Folder(tmp_path)
    assert subjects(folder) == ["s5", "s6", "s7"]
    assert folder.state()["count"] == 5
    monkeypatch.setattr(tail, "LONGEST", 100)
    (tmp_path / "lines").write_bytes(b"one\n" + b"x" * 100 + b"\n" + b"y" * 250 + b"\ntwo\nhalf")
    own = Tail(tmp_path, "lines")
    assert list(own.lines()) == [b"one\n", b"two\n"]
    assert list(own.lines()) == []


def test_a_large_file_is_begun_near_its_end_with_a_whole_line(tmp_path):
    (tmp_path / "lines").write_bytes(b"".join(b"%04d\n" % number for number in range(1000)))
    own = Tail(tmp_path, "lines", last=12)
    assert list(own.lines()) == [b"0998\n", b"0999\n"]


def test_the_last_answers_are_told_with_text_judgement_and_choice(tmp_path):
    write_answers(tmp_path, *(batch(number, f"text {number}") for number in range(25)))
    scored = {
        name_of(30, "k", index): KeptScored(loglikelihood=losses, greedy=False, read=2, state_bytes=0)
        for index, losses in enumerate([(-3.0, -1.0), (-1.5, -1.0), (-9.0,)])
    }
    folder = Folder(tmp_path)
    found = folder.state()["answers"]
    assert [one["question"] for one in found] == list(range(24, 4, -1))
    assert folder.state()["answer_rate"] is None  # those were there before
    write_answers(tmp_path, line_of(KeptBatch(plan="p", scored=scored)), batch(31, HOSTILE, judged=False, why="length"))
    last, choice = folder.state()["answers"][:2]
    assert (last["text"], last["judged"], last["why"]) == (HOSTILE.replace("\x07", "\\x07"), False, "length")
    assert (choice["text"], choice["judged"]) == ("choice 2 of 3 is the likeliest, at -2.5 nats", None)
    assert folder.state()["answer_rate"].endswith(" tokens/s")


def test_an_answer_has_its_prompt_and_scores_once_its_measurement_wrote_them(tmp_path):
    folder = Folder(tmp_path)
    write_answers(tmp_path, batch(0, "Paris", key="aa"), batch(1, "Bonn", key="bb"))
    assert not any("prompt" in one for one in folder.state()["answers"])
    examples = [
        replace(generated(0, "Paris", target="Paris", prompt="The capital of France:"), key="aa"),
        replace(generated(1, "Bonn", target="Berlin", prompt="x" * 5_000, scores={"squad_f1": 0.25}), key="bb"),
    ]
    write_run(tmp_path, document(), task=examples)
    os.rename(tmp_path / "examples/task.jsonl", tmp_path / "examples/task-examples.jsonl")
    second, first = folder.state()["answers"]
    assert (first["prompt"], first["target"]) == ("The capital of France:", "Paris")
    assert (second["scores"], second["target"]) == ({"squad_f1": 0.25}, "Berlin")
    assert second["prompt"] == "... " + "x" * 2_000


def test_the_last_report_is_told_until_it_changes_and_a_broken_one_costs_only_itself(tmp_path):
    write_run(tmp_path, document(perplexity_of(outcome="passed")))
    folder = Folder(tmp_path)
    assert folder.state()["report"]["headline"] == "The test passed"
    (tmp_path / "metrics.json").write_text("{")
    state = folder.state()
    assert state["report"] is None
    assert state["problems"][0].startswith("metrics.json cannot be read")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes")
def test_links_that_leave_the_folder_and_pipes_are_not_read(tmp_path):
    out, secret = tmp_path / "out", tmp_path / "secret"
    out.mkdir()
    Journal(secret).add("k", to_plain(perplexity_of(subject="secret")))
    write_answers(secret, batch(1, "secret"))
    (out / "journal.jsonl").symlink_to(secret / "journal.jsonl")
    (out / "answers").symlink_to(secret / "answers")
    (out / "live.json").symlink_to(secret / "journal.jsonl")
    os.mkfifo(out / "live-gw0.json")
    os.mkfifo(out / "metrics.json")
    state = Folder(out).state()
    assert "secret" not in json.dumps([state["results"], state["answers"], state["works"]])
    assert [problem.partition(" ")[0] for problem in state["problems"]] == [
        "journal.jsonl", "live-gw0.json", "live.json", "metrics.json",
    ]  # fmt: skip
    (out / "answers").unlink()
    (out / "answers").mkdir()
    (out / "answers/x.jsonl").symlink_to(secret / "answers/task.jsonl")
    state = Folder(out).state()
    assert state["answers"] == []
    assert "answers cannot be read (it lies outside of the folder)" in state["problems"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"done": "many"}', '{"done": -5, "total": -1e300, "expected": 0, "unit": "tokens", "title": "x"}',
     '{"done": 1, "first": 0, "total": 1e300, "expected": 18446744073709551615, "started": 1, "written": 2, "unit": "tokens"}'],
)  # fmt: skip
def test_no_content_of_a_live_file_stops_the_page(tmp_path, text):
    (tmp_path / "live.json").write_text(text)
    state = Folder(tmp_path).state()
    json.dumps(state, allow_nan=False)
    assert len(state["works"]) + len(state["problems"]) == 1


def test_a_folder_that_goes_away_is_named_and_nothing_is_written_to_one(tmp_path, journal):
    add(journal, "a")
    write_answers(tmp_path, batch(1))
    write_live(tmp_path)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.rglob("*")}
    folder = Folder(tmp_path)
    folder.state()
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.rglob("*")} == before
    shutil.rmtree(tmp_path)
    assert folder.state()["problems"] == [f"the folder {tmp_path} is gone"]


# ---------------------------------------------------------------------------------------------------------------- over the net


def test_the_page_and_the_state_are_served_with_a_policy_and_nothing_else_is(tmp_path):
    (tmp_path / "metrics.json").write_text("secret")
    with served(tmp_path) as server:
        assert server.address == f"http://127.0.0.1:{server.port}/"
        status, headers, page = ask(server, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'; script-src 'nonce-" in headers["Content-Security-Policy"]
        assert "http" not in page.decode().replace("http://www.w3.org/2000/svg", "")  # it asks nobody else
        status, headers, body = ask(server)
        assert (status, headers["Content-Type"], headers["Cache-Control"]) == (
            200,
            "application/json; charset=utf-8",
            "no-store",
        )
        assert json.loads(body)["folder"] == str(tmp_path)
        assert not [name for name in headers if name.startswith("Access-Control")]
        status, headers, body = ask(server, "/", method="HEAD")
        assert (status, body, int(headers["Content-Length"]) > 5_000) == (200, b"", True)
        for path in ("/metrics.json", "/../metrics.json", "/state/../metrics.json", "/%2e%2e/metrics.json", "//metrics.json",
                     f"file://{tmp_path}/metrics.json", "/state?file=metrics.json"):  # fmt: skip
            status, _, body = ask(server, path)
            assert (status, b"secret" in body) == (404, False), path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "X"):
            status, headers, _ = ask(server, "/state", method=method)
            assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_a_request_under_another_name_or_from_another_page_is_refused(tmp_path):
    with served(tmp_path) as server:
        own = f"localhost:{server.port}"
        assert ask(server, host=own)[0] == 200
        for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", "localhost:1",
                     f"127.0.0.1.evil.example:{server.port}",
                     f"localhost:{server.port}:80", f"[::1]:{server.port}", " "):  # fmt: skip
            for path in ("/", "/state"):
                assert ask(server, path, host=host)[0] == 403, host
        assert ask(server, Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(server, Sec_Fetch_Site="same-site")[0] == 403  # another port of this machine
        assert ask(server, Sec_Fetch_Site="same-origin")[0] == 200


def test_a_connection_that_says_nothing_keeps_no_other_waiting(tmp_path):
    with served(tmp_path) as server, socket.create_connection(("127.0.0.1", server.port)):
        assert ask(server)[0] == 200
        with socket.create_connection(("127.0.0.1", server.port)) as broken:
            broken.sendall(b"\x00\xff nonsense\r\n\r\n")
            assert broken.recv(1000) == b"Bad Request\n"
        assert ask(server)[0] == 200


# ----------------------------------------------------------------------------------------------------------------- the command


def test_a_folder_that_is_none_and_a_port_that_is_in_use_are_refused_in_words(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}/nowhere does not exist. Name the output folder of a run")
    (tmp_path / "file").write_text("")
    assert main(["watch", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["watch", str(tmp_path), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is in use. Name another with --port" in capsys.readouterr().err
    for wrong in ("65536", "-1", "http"):
        with pytest.raises(SystemExit, match="2"):
            main(["watch", str(tmp_path), "--port", wrong])
        assert "a port is a number from 0 to 65535" in capsys.readouterr().err or wrong == "-1"


def test_ctrl_c_ends_it_cleanly_and_a_folder_without_a_run_is_waited_for(tmp_path):
    (tmp_path / ".lmeval").mkdir()
    command = [sys.executable, "-u", "-m", "pytest_lmeval", "watch", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background processes ignore it
    )  # fmt: skip
    waits, address = process.stdout.readline(), process.stdout.readline()
    assert waits == f"there is no run in {tmp_path} yet; the page waits for one. Did you mean {tmp_path}/.lmeval?\n"
    port = int(address.partition("http://127.0.0.1:")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port)):  # an open page keeps it from nothing
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "no longer shown; the run is not touched\n", "")


# ----------------------------------------------------------------------------------------------------------------- the browser

QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
ATTACK = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"><b>bold</b>"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_the_page_shows_the_run_as_it_goes_on_and_texts_as_texts(tmp_path, journal):
    at = time.time() + 3600  # news, however long the browser takes to start
    now = {"started": at - 10, "written": at}
    write_live(tmp_path, **now)
    problems, requests = [], []
    with (
        served(tmp_path) as server,
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser,
    ):
        page = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark").new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(server.address)
        page.get_by_text("perplexity 2.718").wait_for()
        assert page.get_by_role("status").inner_text() == "The run goes on"
        bar = page.get_by_role("progressbar", name="Progress of: demo reads stdlib[test]")
        assert float(bar.get_attribute("value")) == 0.6
        page.get_by_text("No answers yet.").wait_for()
        add(journal, f"result {ATTACK}", test=ATTACK)
        write_answers(tmp_path, batch(0, f"answer {ATTACK}", judged=True, why=ATTACK))
        write_live(tmp_path, title=ATTACK, done=4000, total=8000.0, **now)
        page.get_by_text(f"answer {ATTACK}").wait_for()
        page.get_by_text(f"result {ATTACK}").wait_for()
        page.get_by_text("judged right").wait_for()
        assert page.locator("main b, main img, main script").count() == 0
        assert page.title() == "The run goes on - lmeval watch"
        write_live(tmp_path, title=ATTACK, done=4500, total=9100.0, **now)
        page.get_by_role("img", name="Running perplexity, from 7.389 at 4,000 tokens to 7.555 at 4,500").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        lightness = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
        assert page.evaluate(lightness) < 128
        (tmp_path / "live.json").unlink()
        journal.end()
        page.get_by_text("The run ended").wait_for()
        assert problems == []
        assert set(requests) == {server.address, f"{server.address}state"}
        page.route("**/state", lambda route: route.abort())
        page.get_by_text("lmeval watch does not answer").wait_for()
