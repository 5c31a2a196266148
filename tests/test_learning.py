"""Training through the plugin: the verb `train`, the benchmark page that compares models, and what cannot be trained."""

import json
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "benchmarks" / "test_learning.py"
TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.\n"
LEARNS = """
    def test_learns(lmeval, lm, corpus):
        before = lmeval.perplexity(lm, corpus("automaton:size=20k", "test"), tokens=500)
        trained = lmeval.train(lm, corpus("automaton:size=20k", "train"), steps=8, seq_len=16, batch_size=8, tokens=5_000)
        after = lmeval.perplexity(trained.lm, corpus("automaton:size=20k", "test"), tokens=500)
        assert after.perplexity < before.perplexity
        assert len(trained.curve.y) == 8
        assert lmeval.perplexity(lm, corpus("automaton:size=20k", "test"), tokens=500).perplexity == before.perplexity
"""


@pytest.fixture
def project(project):
    project.makefile(".ini", pytest="[pytest]\nfilterwarnings = error\nmarkers = slow: takes minutes\nlmeval_budget = 1000\n")
    return project


@pytest.fixture
def mirror(project):
    """Two datasets of the hub as files."""
    fields = {"ptb-text-only/ptb_text_only/penn_treebank": "sentence", "monology/pile-uncopyrighted/default": "text"}
    for name, field in fields.items():
        folder = project.path / "mirror" / name
        folder.mkdir(parents=True)
        for split, times in (("train", 60), ("validation", 20), ("test", 30)):
            rows = (json.dumps({field: f"{split} {number} {TEXT}"}) for number in range(times))
            (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return project.path / "mirror"


def run(project, *options):
    return project.runpytest_subprocess("-p", "no:cacheprovider", *options)


def records(project, kind):
    document = json.loads((project.path / ".lmeval" / "metrics.json").read_text())
    return [record for record in document["records"] if record["kind"] == kind]


def test_a_model_is_trained_once_and_the_original_is_unchanged(project):
    project.makepyfile(test_own=LEARNS)
    run(project, "--lm", "tiny:Tiny").assert_outcomes(passed=1)
    (record,) = records(project, "train")
    assert record["lm"]["spec"] == "tiny:Tiny trained"
    assert record["subject"] == "automaton:size=20k[train]"
    assert record["settings"]["seed"] == 0
    assert record["cost"]["flops"] == record["metrics"]["flops_total"]["value"] > 0
    assert {"learning_curve", "held_out_loss", "epoch_loss"} <= set(record["series"])
    run(project, "--lm", "tiny:Tiny").stdout.fnmatch_lines(["*trained before by the same protocol*"])
    assert records(project, "train")[0]["metrics"] == record["metrics"]
    assert "trained before" not in run(project, "--lm", "tiny:Tiny", "--lmeval-fresh").stdout.str()


def compare(project, mirror, *options):
    page = PAGE.read_text().replace("STEPS = 300", "STEPS = 8")
    project.makepyfile(test_learning=page.replace("lm.vocab_size / 4", "lm.vocab_size * 4"))
    texts = ("--lmeval-corpus", "ptb", "--lmeval-corpus", "pile", "--lmeval-data", str(mirror))
    return run(project, "--lm", "tiny:Tiny", "--lm", "tiny:Other", "--lmeval-seq-len", "16", *texts, *options)


def test_models_are_compared_over_corpora(project, mirror):
    result = compare(project, mirror)
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["train, ptb?train?", "*perplexity*tiny:Tiny trained*", "*tiny:Other trained*"])
    means = [(record["lm"]["spec"], record["subject"]) for record in records(project, "custom")]
    assert sorted(means) == [(f"tiny:{name}", "perplexity over pile, ptb") for name in ("Other", "Tiny")]
    assert records(project, "custom")[0]["metrics"]["mean_perplexity"]["n"] == 2
    assert len(records(project, "perplexity")) >= 2
    for page in ("summary.md", "report.html"):
        assert "tiny:Other trained" in (project.path / ".lmeval" / page).read_text()


@pytest.mark.thorough
def test_a_corpus_that_fails_costs_only_its_own_results_and_the_mean(project, mirror):
    (mirror / "monology/pile-uncopyrighted/default/train.jsonl").write_text('{"text": "cut off')
    result = compare(project, mirror)
    result.assert_outcomes(passed=2, failed=4)
    result.stdout.fnmatch_lines(["*no mean over pile, ptb: pile failed. The results of the others are kept.*"])
    assert {record["subject"] for record in records(project, "train")} == {"ptb[train]"}
    assert not records(project, "custom")


REFUSED = [
    ('lmeval.train("zoo:nothing", corpus("automaton:size=20k", "train"))', "*unknown model spec 'zoo:nothing'*"),
    ('lmeval.train("tiny:Tiny", corpus("text:short.txt"), held_out=corpus("automaton:size=20k", "test"))', "*needs 2,049*"),
    ('lmeval.train("zoo:transformer", corpus("automaton:size=20k", "train"), seq_len=2000)', "*2,000*1,024*"),
    ('lmeval.train("zoo:bk", corpus("automaton:size=20k", "train"))', "*non-causal*"),
    ('lmeval.train("tiny:Tiny", corpus("automaton:size=20k", "train"), step=2)', "*no setting*step*steps*"),
    ('lmeval.train("tiny:Tiny", corpus("text:short.txt"))', "*held_out=*"),
    ('lmeval.train("tiny:Tiny", [1, 2, 3] * 1000)', "*held_out=*"),
    ('lmeval.perplexity("tiny:Tiny", corpus("automaton:size=20k"), positions=(0, 1.5))', "*0, 1.5*a position is*"),
    ('lmeval.perplexity("tiny:Odd", corpus("automaton:size=20k"), tokens=500)', "*expected a dict from names to tensors*"),
    ('lmeval.train("tiny:Tiny", corpus("automaton:size=20k", "train"), steps=0)', "*steps*0*"),
]


def test_what_cannot_be_trained_is_refused_without_a_traceback(project):
    project.makefile(".txt", short="too short")
    tests = [f"def test_{number}(lmeval, corpus):\n    {call}\n" for number, (call, _) in enumerate(REFUSED)]
    project.makepyfile(test_own="\n".join(tests))
    result = run(project, "--lm", "tiny:Tiny")
    result.assert_outcomes(failed=len(REFUSED))
    for number, (_, message) in enumerate(REFUSED):
        result.stdout.fnmatch_lines([f"*_ test_{number} _*", message])
    assert "site-packages" not in result.stdout.str()


def test_perplexity_reports_unchanged_fast_weights_and_the_excess_over_a_known_entropy(project):
    project.makepyfile(
        test_own="""
        from tiny import Tiny

        class Idle(Tiny):
            def fast_weights(self, state):
                return {"head": self.head.weight[None]}

        def test_idle(lmeval, corpus):
            result = lmeval.perplexity(Idle(), corpus("automaton:size=20k", "test"), tokens=500)
            assert result.fast_weights.unchanged == ("head",)

        def test_optimal(lmeval, load_lm, corpus):
            source = load_lm("pytest_lmeval.data._automaton:load")
            metrics = lmeval.perplexity(source, corpus("automaton", "test"), tokens=20_000).record.metrics
            assert metrics["excess_nats"].low < 0 < metrics["excess_nats"].high
            assert 0.8 < metrics["entropy_floor"] < 0.9
        """
    )
    result = run(project)
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*1 fast weights and none of them moved*"])
