"""Shards of a run: what each scores, what they merge to, and what is refused."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st
from shared_out import CHOICES, LM, OTHER, ROWS, VERBS, close, lines_of, measured, numbers_of
from tiny import Tiny

from pytest_lmeval import NotMeasuredError, Suite, TaskError, as_model
from pytest_lmeval.__main__ import main
from pytest_lmeval.errors import ArgumentError
from pytest_lmeval.merging import _results as results
from pytest_lmeval.records._document import load
from pytest_lmeval.records._journal import Journal
from pytest_lmeval.records._share import Share, parsed


def merged(folder, verb, count):
    """The record of the merged shards of a run, and its examples."""
    for index in range(1, count + 1):
        measured(folder / str(index), verb, Share(index, count))
    assert main(["merge", *(str(folder / str(index)) for index in range(1, count + 1)), "--to", str(folder / "all")]) == 0
    (record,) = load(folder / "all").records
    return record


@pytest.mark.parametrize("verb", VERBS)
def test_merged_shards_have_the_record_of_one_process(tmp_path, verb):
    result, _ = measured(tmp_path / "one", VERBS[verb])
    for count in (3,):
        record = merged(tmp_path / f"of {count}", VERBS[verb], count)
        own, whole = numbers_of(record), numbers_of(result.record)
        series = own.pop("series"), whole.pop("series")
        if verb != "windows" and "in windows" not in verb:  # whose chunks are blocks, once they are merged
            assert series[0].keys() == series[1].keys()
        assert close(own, whole)
        if "agreement" not in verb:
            left, right = lines_of(tmp_path / "one", result.record), lines_of(tmp_path / f"of {count}/all", record)
            assert list(map(_without_reads, left)) == list(map(_without_reads, right))


def _without_reads(line):
    plain = json.loads(line)
    return {name: value for name, value in plain.items() if name not in ("read", "saved", "audited")}


@given(st.text(max_size=20), st.integers(1, 40))
def test_each_example_is_in_exactly_one_share(name, count):
    owners = [index for index in range(1, count + 1) if Share(index, count).owns(name)]
    assert len(owners) == 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_shard_that_does_not_exist_is_refused(text):
    with pytest.raises(ArgumentError, match="shard"):
        parsed(text)


def test_a_question_that_counts_twice_is_found(tmp_path):
    """What the comparison above would say if an example were in two shards."""
    result, _ = measured(tmp_path / "one", VERBS["choices"])
    for index in (1, 2):
        measured(tmp_path / str(index), VERBS["choices"], Share(index, 2))
    (file,), (other,) = ([*(tmp_path / name / "examples").iterdir()] for name in "12")
    file.write_text(file.read_text() + other.read_text().splitlines()[0] + "\n")
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--to", str(tmp_path / "all")]) == 0
    (record,) = load(tmp_path / "all").records
    assert record.metrics["accuracy"].n == 13 != result.record.metrics["accuracy"].n


def test_a_share_without_an_example_has_no_number_and_is_merged(tmp_path):
    def few(lmeval):
        return lmeval.task(LM, replace(CHOICES, rows=ROWS[:2]), invariant=True)

    result, _ = measured(tmp_path / "one", few)
    empty, context = measured(tmp_path / "some", few, Share(next(i for i in range(1, 9) if not _owned(i)), 8))
    assert empty.record.not_measured
    assert context.log.records[0].notes[0].startswith("shard ")
    with pytest.raises(NotMeasuredError, match="no example of it falls into this share"):
        _ = empty.accuracy
    assert close(numbers_of(merged(tmp_path / "of 8", few, 8)), numbers_of(result.record))


def test_a_suite_is_averaged_from_the_merged_tasks(tmp_path):
    def asked(lmeval):
        return lmeval.suite(LM, Suite("both", (replace(CHOICES, name="few", rows=ROWS[:2]), CHOICES)), invariant=True)

    result, context = measured(tmp_path / "one", asked)
    for index in range(1, 5):
        share, _ = measured(tmp_path / str(index), asked, Share(index, 4))
        with pytest.raises(NotMeasuredError, match=f"those of shard {index}/4 alone"):
            _ = share.average
    folders = [str(tmp_path / str(index)) for index in range(1, 5)]
    assert main(["merge", *folders, "--to", str(tmp_path / "all")]) == 0
    by_subject = {record.subject: record for record in load(tmp_path / "all").records}
    assert by_subject.keys() == {record.subject for record in context.log.records}
    assert close(numbers_of(by_subject["both, 0-shot"]), numbers_of(result.record))


def test_a_suite_of_which_a_task_failed_has_no_average_after_the_merge(tmp_path):
    def asked(lmeval):
        broken = replace(CHOICES, name="broken", ask=of_broken)
        with pytest.raises(TaskError, match="1 of the 2 tasks of both failed"):
            lmeval.suite(LM, Suite("both", (broken, CHOICES)))

    for index in (1, 2):
        measured(tmp_path / str(index), asked, Share(index, 2))
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--to", str(tmp_path / "all")]) == 0
    whole = {record.subject: record for record in load(tmp_path / "all").records}["both, 0-shot"]
    assert list(whole.metrics) == ["parity"]
    assert "broken" in whole.details["failed"]


def of_broken(row):
    raise KeyError("no such field")


def test_merging_deletes_nothing_that_it_did_not_write(tmp_path, capsys):
    for index in (1, 2):
        measured(tmp_path / str(index), VERBS["choices"], Share(index, 2))
    project = tmp_path / "project"
    (project / "examples").mkdir(parents=True)
    (project / "examples/mine.py").touch()
    folders = tmp_path / "1", tmp_path / "2"
    assert "holds files that no merge wrote" in refused(capsys, *folders, to=project)
    assert (project / "examples/mine.py").exists()
    for _ in range(2):  # what a merge wrote is replaced
        assert main(["merge", *map(str, folders), "--to", str(tmp_path / "all")]) == 0


def test_a_shard_that_has_begun_anew_has_nothing_of_the_run_before(tmp_path, capsys):
    for index in (1, 2):
        measured(tmp_path / str(index), VERBS["choices"], Share(index, 2))
    Journal(tmp_path / "1").begin("1/2")  # and was killed
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--to", str(tmp_path / "all")]) == 1
    assert "since shard 1 did not finish it" in capsys.readouterr().out
    assert load(tmp_path / "all").records == []


def _owned(index):
    return any(Share(index, 8).owns(example) for example in _ids())


def _ids():
    from pytest_lmeval.tasks._rows import id_of

    return [id_of(row) for row in ROWS[:2]]


def test_what_cannot_be_shared_out_is_measured_in_one_shard(tmp_path):
    def carried(lmeval):
        return lmeval.perplexity(as_model(Tiny()), range(60), tokens=50)

    def timed(lmeval):
        return lmeval.latency(LM, seq_len=4, new_tokens=2, runs=2)

    for number, verb in enumerate((carried, timed)):
        records = [measured(tmp_path / f"{number} {index}", verb, Share(index, 4))[0].record for index in range(1, 5)]
        assert sum(record.not_measured is None for record in records) == 1
        folders = [str(tmp_path / f"{number} {index}") for index in range(1, 5)]
        assert main(["merge", *folders, "--to", str(tmp_path / f"{number}")]) == 0
        (whole,) = load(tmp_path / f"{number}").records
        assert whole.metrics == next(record.metrics for record in records if record.metrics)


def test_a_run_on_the_merged_folder_takes_what_is_there(tmp_path):
    measured(tmp_path / "one", VERBS["documents"])
    merged(tmp_path, VERBS["documents"], 2)
    result, context = measured(tmp_path / "all", VERBS["documents"])
    assert "taken from an interrupted run" in context.log.notes[0]
    again = measured(tmp_path / "all", VERBS["documents"])[1]  # with a baseline, say
    assert "taken from an interrupted run" in again.log.notes[0]
    assert Journal(tmp_path / "all").unfinished() == []
    Journal(tmp_path / "all", fresh=True)
    assert not measured(tmp_path / "all", VERBS["documents"])[1].log.notes
    merged(tmp_path / "tasks", VERBS["choices"], 2)
    result, context = measured(tmp_path / "tasks/all", VERBS["choices"])
    assert result.resumed == len(ROWS)


def refused(capsys, *folders, to):
    assert main(["merge", *map(str, folders), "--to", str(to)]) == 2
    return capsys.readouterr().err


def test_what_are_not_all_shards_of_one_run_is_refused(tmp_path, capsys):
    verb = VERBS["choices"]
    for name, share in {"1": (1, 3), "2": (2, 3), "again": (2, 3), "other": (2, 4)}.items():
        measured(tmp_path / name, verb, Share(*share))
    measured(tmp_path / "whole", verb)
    (tmp_path / "empty").mkdir()
    to = tmp_path / "all"
    one, two = tmp_path / "1", tmp_path / "2"
    assert "1 of 3 shards are missing: 3" in refused(capsys, one, two, to=to)
    assert "shard 2 is given twice" in refused(capsys, one, two, tmp_path / "again", to=to)
    assert "shards of different runs" in refused(capsys, one, tmp_path / "other", to=to)
    assert "no shard: it was started without --lmeval-shard" in refused(capsys, one, tmp_path / "whole", to=to)
    assert "holds no journal.jsonl" in refused(capsys, one, tmp_path / "empty", to=to)
    measured(tmp_path / "3", lambda lmeval: lmeval.task(LM, CHOICES), Share(3, 3))
    assert not to.exists()
    assert "is the folder of a shard" in refused(capsys, one, two, tmp_path / "3", to=two)
    assert "holds the results of a run" in refused(capsys, one, two, tmp_path / "3", to=tmp_path / "whole")


def test_what_a_shard_did_not_finish_is_named_and_the_rest_is_merged(tmp_path, capsys):
    def both(lmeval):
        VERBS["documents"](lmeval)
        return VERBS["choices"](lmeval)

    measured(tmp_path / "1", both, Share(1, 2))
    measured(tmp_path / "2", VERBS["documents"], Share(2, 2))
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "2"), "--to", str(tmp_path / "all")]) == 1
    assert "parity, 0-shot: not merged, since shard 2 did not finish it" in capsys.readouterr().out
    assert [record.kind for record in load(tmp_path / "all").records] == ["perplexity"]


def test_shares_of_different_models_or_settings_are_refused(tmp_path, capsys):
    for index, lm in ((1, LM), (2, OTHER)):
        folder = tmp_path / str(index)
        measured(folder, lambda lmeval, lm=lm: lmeval.task(lm, CHOICES), Share(index, 2))
        journal = folder / "journal.jsonl"  # as if the two were called alike
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        journal.write_text("".join(json.dumps({**line, "whole": "call"} if "whole" in line else line) + "\n" for line in lines))
    assert "are of different models" in refused(capsys, tmp_path / "1", tmp_path / "2", to=tmp_path / "all")


def test_damaged_shards_are_refused_with_their_file(tmp_path, capsys):
    for index in (1, 2):
        measured(tmp_path / str(index), VERBS["choices"], Share(index, 2))
    (file,) = (tmp_path / "2/examples").iterdir()
    whole = file.read_text()
    for damage, why in ((whole[:-30], "is no example"), (None, "cannot be read")):
        file.unlink() if damage is None else file.write_text(damage)
        assert why in (said := refused(capsys, tmp_path / "1", tmp_path / "2", to=tmp_path / "all"))
        assert file.name in said


def test_a_shard_decides_no_test_and_its_folder_is_its_own(project):
    project.makepyfile("""
        import tiny
        from pytest_lmeval import Choices, Generate, Task

        TASK = Task("parity", [{"n": n} for n in range(40)], lambda row: Choices(f"{row['n']} is", (" even", " odd"), 0))

        def test_knows(lmeval):
            assert lmeval.task(tiny.Tiny(), TASK).accuracy > 2

        def test_is_cut_off(lmeval):
            def ask(row):
                return Generate(f"{row['n']} is", ("x",), ("no such end",), max_tokens=2)

            assert lmeval.task(tiny.Tiny(), Task("cut", [{"n": n} for n in range(4)], ask)).exact_match > 0

        def test_puts_back(lmeval):
            lm = tiny.Tiny()
            with lmeval.snapshot(lm, "*") as kept:
                lm.head.weight.data.zero_()
            assert lm.head.weight.any()
    """)
    own = ("-p", "no:cacheprovider", "--lmeval-budget", "1000", "--lmeval-dir")
    result = project.runpytest_subprocess(*own, "one", "--lmeval-shard", "1/2", "-rs")
    result.assert_outcomes(skipped=2, passed=1)
    result.stdout.fnmatch_lines(["*of shard 1/2 alone. After `lmeval merge` the test decides*"])
    assert "parity" in (project.path / "one/summary.md").read_text()
    result = project.runpytest_subprocess(*own, "one", "--lmeval-shard", "2/2")
    result.stderr.fnmatch_lines(["*one holds shard 1/2. Give each shard a folder of its own*"])
    result = project.runpytest_subprocess(*own, "one", "--lmeval-shard", "2/2", "--lmeval-fresh")
    result.assert_outcomes(skipped=2, passed=1)
    result = project.runpytest_subprocess(*own, "one", "--lmeval-shard", "3/2")
    result.stderr.fnmatch_lines(["*--lmeval-shard: there is no shard 3 of 2*"])


def test_more_shards_than_files_may_be_open_are_merged(tmp_path, monkeypatch):
    """At no time is more than one file of examples open; a reader that leaves them open would hold one for each shard."""
    for index in range(1, 41):
        measured(tmp_path / str(index), VERBS["choices"], Share(index, 40))
    opened, most = [], [0]
    plain_open = open

    def counted(file, *arguments, **options):
        found = plain_open(file, *arguments, **options)
        if "-examples.jsonl" in str(file) and str(tmp_path / "all") not in str(file):
            opened.append(found)
            most[0] = max(most[0], sum(not one.closed for one in opened))
        return found

    monkeypatch.setattr("builtins.open", counted)
    folders = [str(tmp_path / str(index)) for index in range(1, 41)]
    assert main(["merge", *folders, "--to", str(tmp_path / "all")]) == 0
    assert most[0] == 1
    (record,) = load(tmp_path / "all").records
    assert record.metrics["accuracy"].n == len(ROWS)


def test_lines_are_read_whole_in_parts_of_a_file(tmp_path, monkeypatch):
    text = b"".join(b"%d " % number * number + b"\n" for number in range(50))
    (tmp_path / "lines").write_bytes(text + b"cut off")
    for size in (1, 7, 100, 1 << 16):
        monkeypatch.setattr(results, "READ", size)
        assert b"".join(found := [*results._raw_lines(tmp_path / "lines")]) == text + b"cut off"
        assert len(found) == 51


def test_an_invariant_answer_is_none_that_was_read_in_a_batch(tmp_path):
    """A test before it may have asked the same questions side by side: what it kept differs in the last bits."""

    def after_batches(lmeval):
        lmeval.task(LM, CHOICES)
        return lmeval.task(LM, CHOICES, invariant=True)

    found, _ = measured(tmp_path, after_batches)
    assert found.resumed == 0
    assert measured(tmp_path, VERBS["choices"])[0].resumed == len(ROWS)
