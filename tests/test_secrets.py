"""A secret is masked before it is written, and a name is one line that commands no terminal, log or page."""

import html
import re

import pytest
from documents import document, perplexity_of
from hypothesis import given, strategies as st
from test_plugin import metrics, run

from pytest_lmeval._options import OPTIONS
from pytest_lmeval.records._document import Failure
from pytest_lmeval.records._secrets import MASK, is_secret, masked, masked_command, without_secrets
from pytest_lmeval.report import _github as github, _pages as pages
from pytest_lmeval.report._pages import cell, heading
from pytest_lmeval.report._words import one_line, wrapped

SECRET = "kR7wQ2xLm9TzB4vN8sJd"
FORMS = [
    f"--hf-token={SECRET}",
    f"api_key={SECRET}",
    f'{{"password": "{SECRET}"}}',
    f"password: {SECRET}",
    f"Authorization: Bearer {SECRET}",
    f"clientSecret = '{SECRET}'",
    f"server:http://user:{SECRET}@host:8000/v1,tokenizer=a/b",
    f"https://{SECRET}@host/path?x=1",
    f"https://host/path?access_token={SECRET}&x=1",
    f"hf_{SECRET}",
    f"ghp_{SECRET}",
    f"github_pat_{SECRET}",
    f"sk-proj-{SECRET}",
    "AKIA" + SECRET.upper(),
    f"eyJhbGciOiJI.eyJ{SECRET}.{SECRET}",
]
HARMLESS = [
    *(f"--{name}" for name in OPTIONS),
    "--lmeval-tokens=200k --lmeval-limit 5 tokenizer=hf-internal-testing/tiny-random max_tokens=128 eos_token=</s>",
    "tests/test_secret.py::TestPassword::test_token[hf:./folder@bf16]",
    "secret_models:Tiny",
    "assert token == 'the', where the first token: the",
    "https://example.com/a?b=c and mail to me",
    "server:http://localhost:8000,tokenizer=a/b",
    "task-force and risk-averse, sk-learn",
    "0123456789abcdef0123456789abcdef01234567",
]
words = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=8).map(lambda text: text.strip())


@given(st.sampled_from(FORMS), words, words)
def test_a_secret_is_masked_wherever_it_stands_and_once(form, before, after):
    text = f"{before} {form} {after}".strip()
    shown = masked(text)
    assert SECRET.lower() not in shown.lower()
    assert masked(shown) == shown
    assert shown.startswith(before)
    assert without_secrets({"a": [{"b": text}]}) == {"a": [{"b": shown}]}


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays_as_it_is(text):
    assert masked(text) == text


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["pytest", "--hf-token", SECRET, "-k", "x y"], "pytest --hf-token *** -k 'x y'"),
        (["pytest", "-o", f"openai_api_key={SECRET}"], "pytest -o 'openai_api_key=***'"),
        (["pytest", f"--password=two words {SECRET}"], "pytest '--password=***'"),
        (["pytest", "--lm", f"server:http://u:{SECRET}@h"], "pytest --lm 'server:http://***@h'"),
        (["pytest", "--lmeval-tokens", "200k"], "pytest --lmeval-tokens 200k"),
    ],
)
def test_a_command_line_is_masked(arguments, shown):
    assert masked_command(arguments) == shown


def test_a_secret_of_the_environment_is_masked_in_any_text(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct horse battery")
    monkeypatch.setenv("MY_SERVICE_TOKENS", "ordinary words")
    assert masked("it said: correct horse battery, ordinary words") == f"it said: {MASK}, ordinary words"


def test_values_whose_name_is_secret_are_masked_in_settings():
    plain = {"api_key": "abc", "tokens": 5, "token": 7, "inner": {"Authorization": "x"}}
    assert without_secrets(plain) == {"api_key": MASK, "tokens": 5, "token": 7, "inner": {"Authorization": MASK}}
    assert not any(is_secret(name) for name in ("tokens_read", "retokenized", "PWD", "passkey", "pad_token"))


def test_no_file_of_a_run_holds_a_secret(project, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "hunter2hunter2")
    project.makepyfile(
        test_it=f"""
        import pytest
        from msgspec.structs import replace
        from tiny import Tiny
        from pytest_lmeval import as_model
        import dataclasses

        def test_own(lmeval, lm):
            named = dataclasses.replace(lm, spec="server:http://me:{SECRET}@host")
            lmeval.record(named, "subject api_key={SECRET}", accuracy=0.5)
            assert lmeval.equivalence(named).verdict == "hunter2hunter2", "Bearer {SECRET}"

        def test_skips(lmeval):
            pytest.skip("no password={SECRET}")
        """
    )
    result = run(project, "-o", f"junit_suite_name=secret_key={SECRET}", "--junitxml=.lmeval/junit.xml")
    result.assert_outcomes(failed=1, skipped=1)
    files = [file for file in (project.path / ".lmeval").rglob("*") if file.is_file() and file.name != "junit.xml"]
    assert {"metrics.json", "summary.md", "report.html", "journal.jsonl", "history.jsonl"} <= {file.name for file in files}
    for file in files:
        content = file.read_text()
        assert SECRET not in content, file
        assert "hunter2hunter2" not in content, file
    assert "server:http://***@host" in {record["lm"]["spec"] for record in metrics(project)["records"]}
    assert f"me:{SECRET}" not in (project.path / ".lmeval/junit.xml").read_text().partition("<failure")[0]
    section = result.stdout.str().partition("= lmeval =")[2].partition("short test summary")[0]
    assert SECRET not in section


# -------------------------------------------------------------------------------------------------------- names

HOSTILE = (
    "x\n::error file=a.py::forged\r\x1b[31mred @everyone #12 GH-3 https://evil.example www.evil.example <b> | `c` a@b.de "
    "##[error]y"
)
PIECES = [*"ab@#1:/[]<>&*_`|~!\\ \n\r\t\x1b\u2028\u202e", "::", "##[", "http://", "www."]
ESCAPED = re.compile(r"\\([\\`*_\[\]<>|~])")
texts = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


@given(texts)
def test_a_name_is_one_line_without_commands(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert all(letter.isprintable() or letter.isspace() for letter in line)
    assert "\x1b" not in line
    assert not line.lstrip().startswith("::")
    assert "##[" not in line
    for piece in wrapped(text, 20):
        assert not piece.lstrip().startswith("::")
    assert one_line(one_line(text)) == one_line(text)


@given(texts)
def test_a_name_in_markdown_looks_as_it_is_and_links_nowhere(text):
    shown = one_line(" ".join(text.split()))
    for escaped in (re.sub(ESCAPED, r"\1", cell(text)), heading(text)):
        assert not re.search(r"@\w|#\d|https?:/|www\.", re.sub(r"&#8203;|&#x?\w+;", "\0", escaped))
    assert not set("<>") & set(heading(text))
    plain = re.sub(ESCAPED, r"\1", cell(text).replace("&#8203;", ""))
    assert html.unescape(plain) == html.unescape(shown.replace("&", "&amp;"))
    assert html.unescape(heading(text).replace("&#8203;", "")) == html.unescape(html.escape(shown))


def test_a_hostile_name_reaches_terminal_and_pages_as_one_safe_line(project, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    project.makepyfile(
        test_it=f"""
        def test_own(lmeval, lm):
            lmeval.record(lm, {HOSTILE!r}, **{{"x\\n::error::metric": 0.5}})
        """
    )
    result = run(project)
    result.assert_outcomes(passed=1)
    output = result.stdout.str()
    assert not [line for line in output.splitlines() if line.lstrip().startswith("::")]
    assert "\x1b[31m" not in output
    assert "##[" not in output
    summary = (project.path / ".lmeval/summary.md").read_text()
    for live in ("@everyone", "#12", "https://evil", "www.evil", "<b>"):
        assert live not in summary


def test_annotations_of_github_hold_no_command_of_a_name():
    failure = Failure(HOSTILE, f"message {HOSTILE}", "a.py", 1)
    commands = github.workflow_commands(document(perplexity_of(), failures=[failure]), {"GITHUB_ACTIONS": "true"})
    assert [line.startswith("::error file=a.py,line=1,title=x%0A%3A%3Aerror file=a.py%3A%3Aforged") for line in commands] == [
        True
    ]
    assert "\x1b" not in commands[0]
    assert len(commands[0].splitlines()) == 1
    page = pages.render("summary.md", document(perplexity_of(), failures=[failure]))
    assert "<summary>failed: x : :error file=a.py::forged" in page
