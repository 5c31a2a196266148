"""Cases that earlier runs tried on a model count in later ones, once some were replayed, and never if the model changed."""

import json

import pytest
import torch
from tiny_models import Fragile, Functional

from pytest_lmeval.engine._policy import CALL
from pytest_lmeval.laws import Case, probe
from pytest_lmeval.laws._counterexample_store import CounterexampleStore
from pytest_lmeval.laws._evidence import Evidence, EvidenceStore, Tried, _digest
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.records._journal import JournalWarning


def certified(model, folder, *, budget=1, profile="dev", **options):
    return probe(as_model(model), budget=budget, profile=profile, certificates=folder, **options)


def stored(folder):
    (file,) = folder.glob("*.json")
    return file, json.loads(file.read_text())


def test_a_later_run_replays_a_case_of_each_law_counts_the_others_and_adds_new_ones(tmp_path):
    first, second, third = (certified(Functional(), tmp_path) for _ in range(3))
    assert [result.certificate.runs for result in (first, second, third)] == [1, 2, 3]
    assert {result.verdict for result in (first, second, third)} == {"exact-any-chunk"}
    cases = [sum(law.cases for law in result.laws.values()) for result in (first, second, third)]
    assert cases == sorted(set(cases))
    assert second.record.details["work"] < 0.55 * first.record.details["work"]


def test_a_second_run_costs_about_five_percent_of_reading_100_000_tokens(tmp_path):
    for _ in range(2):
        work = certified(Functional(), tmp_path).record.details["work"]
    assert work < 0.055 * (100_000 + CALL * 100_000 / 256)


def test_another_model_precision_or_length_starts_anew(tmp_path):
    certified(Functional(), tmp_path)
    assert certified(Functional(seed=1), tmp_path).certificate.runs == 1
    assert certified(Functional().double(), tmp_path).certificate.runs == 1
    assert certified(Functional(), tmp_path, longest=330).certificate.runs == 1
    assert len(list(tmp_path.glob("*.json"))) == 4


@pytest.mark.parametrize("part", ["packages", "code", "device"])
def test_other_versions_code_or_device_start_anew(tmp_path, monkeypatch, part):
    certified(Functional(), tmp_path)
    from pytest_lmeval.laws import _evidence

    key = _evidence._key
    monkeypatch.setattr(_evidence, "_key", lambda lm, longest: {**key(lm, longest), part: "another"})
    assert certified(Functional(), tmp_path).certificate.runs == 1


def test_in_the_profile_ci_stored_cases_enable_nothing(tmp_path):
    alone = certified(Functional(), None, profile="ci")
    for _ in range(2):
        certified(Functional(), tmp_path)
    again = certified(Functional(), tmp_path, profile="ci")
    assert again.certificate == alone.certificate
    assert again.record.details["work"] == alone.record.details["work"]


def rare():
    """Wrong in a case that no floor has."""
    return Fragile(lambda seen, t: seen == 70 and t == 3)


@pytest.mark.parametrize("profile", ["ci", "dev"])
def test_a_stored_failure_refutes_in_every_profile(tmp_path, profile):
    known = tmp_path / "counterexamples.jsonl"
    CounterexampleStore(known).add(as_model(rare()).spec, "splits", Case(90, (70, 73)).choices())
    assert not certified(rare(), tmp_path, counterexamples=known).laws["splits"].kept
    found = certified(rare(), tmp_path, profile=profile)  # without the file of counterexamples
    assert found.laws["splits"].status == "broken"
    assert certified(rare(), None, profile=profile).laws["splits"].kept  # the twin: nothing stored


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file, plain: file.write_bytes(file.read_bytes()[:100]), "JSONDecodeError"),
        (lambda file, plain: file.write_text("[]"), "TypeError|AttributeError"),
        (lambda file, plain: file.write_text(json.dumps({**plain, "runs": 9})), "it was damaged, or edited"),
        (lambda file, plain: file.write_bytes(b"\xff\x00"), "UnicodeDecodeError"),
        (lambda file, plain: file.write_text(signed({**plain, "key": {}})), "of another model"),
        (lambda file, plain: file.write_text(signed({**plain, "own-kept": {"splits": [{"length": -1}]}})), "ArgumentError"),
    ],
)
def test_a_damaged_certificate_is_reported_and_replaced(tmp_path, damage, why):
    certified(Functional(), tmp_path)
    file, plain = stored(tmp_path)
    damage(file, plain)
    with pytest.warns(JournalWarning, match=rf"the certificate .* is not used \(.*({why})"):
        again = certified(Functional(), tmp_path)
    assert (again.verdict, again.certificate.runs) == ("exact-any-chunk", 1)
    assert certified(Functional(), tmp_path).certificate.runs == 2


def signed(plain):
    plain = {name: value for name, value in plain.items() if name != "sha256"}
    return json.dumps({**plain, "sha256": _digest(plain)})


class Forgetting(Functional):
    """Drops its state at every boundary."""

    def forward(self, input_ids, state=None):
        return super().forward(input_ids, None if state is None else torch.zeros_like(state))


def test_a_forged_certificate_is_replayed_and_the_whole_floor_is_tried(tmp_path):
    lm = as_model(Forgetting())
    right = probe(as_model(Functional()), budget=1, profile="dev", certificates=tmp_path)
    _, plain = stored(tmp_path)
    store = EvidenceStore.of(tmp_path, lm, 320)
    honest = {
        law: [Case(**{**case, "cuts": tuple(case.get("cuts", ()))}) for case in some] for law, some in plain["own-kept"].items()
    }
    store.save(Evidence(Tried(honest), runs=99))
    forged = certified(Forgetting(), tmp_path)
    assert right.verdict == "exact-any-chunk"
    assert (forged.verdict, forged.certificate.runs) == ("inexact", 1)
    assert len(store.load().own.broken["splits"]) >= 1


def test_of_a_model_in_sixteen_bits_the_float32_copy_has_evidence_too(tmp_path):
    first, second = (certified(Functional().bfloat16(), tmp_path) for _ in range(2))
    assert (first.verdict, second.verdict) == ("consistent", "consistent")
    assert (second.certificate.float32, second.certificate.runs) == ("exact-any-chunk", 2)
    assert second.record.details["work"] < 0.55 * first.record.details["work"]


def test_an_object_that_is_new_in_every_run_leaves_no_file(tmp_path):
    class Stepped:
        def __init__(self):
            self.model = Functional()

        def step(self, input_ids, state=None):
            return self.model(input_ids, state)

    certified(Stepped(), tmp_path)
    assert not list(tmp_path.glob("*"))


def test_a_folder_that_cannot_be_written_costs_no_verdict(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(JournalWarning, match="the certificate is not kept for the next run"):
        assert certified(Functional(), tmp_path / "file" / "certificates").verdict == "exact-any-chunk"


def test_a_run_keeps_certificates_in_its_folder_and_forgets_them_on_request(project):
    project.makepyfile("def test_it(lmeval, lm):\n    print('runs', lmeval.equivalence(lm).certificate.runs)\n")
    command = ("-s", "--lm", "tiny:Tiny", "--lmeval-profile=dev", "-p", "no:cacheprovider")
    for expected in (1, 2, 3):
        project.runpytest_subprocess(*command).stdout.fnmatch_lines([f"*runs {expected}*"])
    project.runpytest_subprocess(*command, "--lmeval-fresh-evidence").stdout.fnmatch_lines(["*runs 1*"])
    project.runpytest_subprocess(*command, "--lmeval-fresh-evidence", "-n", "1").assert_outcomes(passed=1)
    (file,) = (project.path / ".lmeval/certificates").glob("*.json")
    assert json.loads(file.read_text())["runs"] == 1  # the process that starts the workers forgets, before they start
    assert len(list((project.path / ".lmeval/certificates").glob("*.json"))) == 1


@pytest.mark.parametrize("profile", ["ci", "nightly"])
def test_old_counterexamples_that_break_nothing_any_more_change_nothing(tmp_path, profile):
    known = tmp_path / "counterexamples.jsonl"
    for law, case in (("splits", Case(900, (450,), 1)), ("rows", Case(300, (10,), 2, rows=5)), ("steps", Case(40))):
        CounterexampleStore(known).add(as_model(Functional()).spec, law, case.choices())
    options = {"profile": profile, "budget": 1}
    tried = [certified(Functional(), None, counterexamples=file, **options).certificate.laws for file in (known, None)]
    if profile == "ci":
        assert tried[0] == tried[1]
    assert {law.longest for law in tried[0].values()} <= {13, 24, 27, 160, 163, 320}
