"""Frames of several codes are streamed: every code that can be predicted is scored once, and no other."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from probing import failure, first_failure, probed
from reading import measure_perplexity, stream, stream_in_windows
from tiny_models import Functional
from torch import nn

from pytest_lmeval._session import Session, TestLog as Log
from pytest_lmeval.data import corpus
from pytest_lmeval.errors import CorpusError, LawBroken, ModelError, NotFiniteError, StreamError
from pytest_lmeval.laws import Case, Harness, check, probe
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.measures._latency import measure_latency
from pytest_lmeval.measures._throughput import measure_throughput
from pytest_lmeval.models._model import Codebooks, fork
from pytest_lmeval.models._sources import as_model, load
from pytest_lmeval.records._journal import Checkpoints, Saver
from pytest_lmeval.zoo._moshi import Block, Moshi, Temporal

SIZES, DELAYS, SCORED = (9, 7, 5, 6), (0, 0, 2, 1), (1, 2)
SEVERAL = settings(max_examples=20)


class Frames(nn.Module):
    """A GRU over frames, and in each frame a sum over the codes before: frames of four codes, two of them scored."""

    codebooks = Codebooks(SIZES, SCORED, tuple(DELAYS[book] for book in SCORED), gaps=True)

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.ModuleList(nn.Embedding(size + 1, 12) for size in SIZES)
            self.cell = nn.GRU(12, 12, batch_first=True)
            self.heads = nn.ModuleList(nn.Linear(12, max(SIZES)) for _ in SCORED)

    def forward(self, codes, state=None):
        recent, hidden = state or (torch.tensor(SIZES)[None, :, None].expand(len(codes), -1, 3), None)
        recent, t = torch.cat([recent, codes], 2), codes.shape[2] + 1
        end = recent.shape[2]
        delayed = torch.stack([recent[:, k, end - d - t : end - d] for k, d in enumerate(DELAYS)], 1)
        vectors = torch.stack(
            [table(delayed[:, k].clamp(min=0)) * (delayed[:, k] >= 0)[..., None] for k, table in enumerate(self.embed)]
        )  # [k, b, t + 1, d]
        known, hidden = self.cell(vectors.sum(0)[:, :-1], hidden)
        logits = [head(known + self.seen(vectors[:, :, 1:], book)) for book, head in zip(SCORED, self.heads, strict=True)]
        return torch.stack(logits, 1), (recent[:, :, -3:], hidden)

    def seen(self, vectors, book):
        return vectors[:book].sum(0)

    @staticmethod
    def recent(state):
        return state[0]


LM = as_model(Frames())


def frames_of(length, seed=0, gaps=0.0):
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, length) for size in SIZES], axis=1)
    return np.where(random.random(codes.shape) < gaps, -1, codes)


def losses_of(frames, lm=LM):
    """{(frame, codebook): loss} of every code that can be predicted, from one full pass."""
    with torch.no_grad():
        logits, _ = lm.step(torch.from_numpy(frames.T[None]))
    books = lm.codebooks
    return {
        (frame - delay, book): float(nn.functional.cross_entropy(logits[0, column, frame].double(), torch.tensor(code)))
        for column, (book, delay) in enumerate(zip(books.scored, books.delays, strict=True))
        for frame in range(delay, len(frames))
        if (code := int(frames[frame - delay, book])) >= 0
    }


def by_code(chunks, books=LM.codebooks):
    """{(frame, codebook): loss} of the scored codes; none twice."""
    found = [
        ((chunk.start - 1 + row - books.delays[column], books.scored[column]), chunk.nll[row, column])
        for chunk in chunks
        for row, column in np.argwhere(chunk.valid)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@SEVERAL
@given(st.integers(1, 90), st.integers(1, 40), st.sampled_from([0.0, 0.3]))
def test_any_chunk_size_scores_each_code_once_with_the_loss_of_one_full_pass(length, chunk_size, gaps):
    frames = frames_of(length, gaps=gaps)
    found, expected = by_code(stream(LM, frames, chunk_size=chunk_size)), losses_of(frames)
    assert found == pytest.approx(expected, abs=1e-5)
    if not gaps:
        assert len(found) == sum(max(0, length - delay) for delay in LM.codebooks.delays)


def test_a_model_that_drops_its_delayed_codes_breaks_laws():
    class Dropping(Frames):
        def forward(self, codes, state=None):
            logits, (recent, hidden) = super().forward(codes, state)
            return logits, (torch.tensor(SIZES)[None, :, None].expand_as(recent), hidden)

    frames = frames_of(60)
    found, expected = by_code(stream(as_model(Dropping()), frames, chunk_size=7)), losses_of(frames)
    assert set(expected) - set(found)
    assert max(abs(found[code] - expected[code]) for code in found) > 0.01
    harness = Harness(as_model(Dropping()))
    assert all(failure(law, harness, Case(12, (5,))) for law in ("splits", "steps", "sums"))


@SEVERAL
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 40))
def test_losses_do_not_depend_on_how_the_frames_arrive(sizes, chunk_size):
    frames = frames_of(sum(sizes))
    parts = np.split(frames, np.cumsum(sizes)[:-1])
    if not len(frames):
        with pytest.raises(StreamError, match="nothing to score"):
            list(stream(LM, iter(parts), chunk_size=chunk_size))
        return
    whole = by_code(stream(LM, frames, chunk_size=chunk_size))
    assert by_code(stream(LM, iter(parts), chunk_size=chunk_size)) == whole
    assert by_code(stream(LM, iter(frames), chunk_size=chunk_size)) == whole
    assert by_code(stream(LM, torch.from_numpy(frames), chunk_size=chunk_size)) == whole


@SEVERAL
@given(st.integers(2, 60), st.integers(1, 20), st.data())
def test_a_stream_resumes_from_any_chunk_with_its_delayed_codes(length, chunk_size, data):
    frames = frames_of(length)
    whole = list(stream(LM, frames, chunk_size=chunk_size))
    head = whole[: data.draw(st.integers(1, len(whole)))]
    read = head[-1].end - 1
    state = fork(list(stream(LM, frames[:read], chunk_size=chunk_size))[-1].state)
    rest = stream(LM, frames[read:], chunk_size=chunk_size, state=state, position=read)
    assert by_code([*head, *rest]) == by_code(whole)


def test_the_first_frame_is_the_first_target():
    chunks = list(stream(LM, frames_of(10), chunk_size=4))
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(1, 5), (5, 9), (9, 11)]
    assert chunks[0].valid.tolist() == [[True, False], [True, False], [True, True], [True, True]]
    assert all(before.end == after.start for before, after in pairwise(chunks))


def test_a_missing_code_is_no_target_and_has_no_loss():
    frames = frames_of(30)
    frames[10, 1] = frames[20, 2] = -1
    (chunk,) = stream(LM, frames)
    assert not chunk.valid[10, 0]
    assert not chunk.valid[22, 1]
    assert np.isnan(chunk.nll[~chunk.valid]).all()
    assert (chunk.rank[~chunk.valid] == -1).all()
    assert len(chunk.losses) == chunk.valid.sum() == 30 + 28 - 2
    assert np.array_equal(chunk.losses, chunk.nll[chunk.valid])


def test_a_chunk_without_any_code_is_read():
    frames = frames_of(30)
    frames[8:16] = -1
    chunks = list(stream(LM, frames, chunk_size=4))
    assert len(chunks[3].losses) == 0
    assert by_code(chunks) == pytest.approx(losses_of(frames), abs=1e-5)


@pytest.mark.parametrize(
    ("code", "gaps", "message"), [(6, True, "code 6 in codebook 3, .* -1 to 5"), (-2, True, "code -2"), (-1, False, "code -1")]
)
def test_a_code_outside_its_codebook_is_refused_with_its_frame(code, gaps, message):
    module = Frames()
    module.codebooks = Codebooks(SIZES, SCORED, (0, 2), gaps=gaps)
    frames = frames_of(60)
    frames[40, 3] = code
    with pytest.raises(StreamError, match=f"frame 40 of the stream has {message}"):
        list(stream(as_model(module), frames, chunk_size=16))


def test_a_nan_is_reported_with_its_frame_and_codebook_after_the_chunks_before():
    class Broken(Frames):
        def forward(self, codes, state=None):
            logits, state = super().forward(codes, state)
            logits[:, 1] = logits[:, 1].masked_fill((codes[:, 0] == 8)[..., None], float("nan"))
            return logits, state

    frames = frames_of(60) % np.array([8, 7, 5, 6])
    frames[41, 0] = 8
    scored = []
    with pytest.raises(NotFiniteError, match=f"loss of nan for code {frames[39, 2]} of codebook 2 in frame 39"):
        scored.extend(stream(as_model(Broken()), frames, chunk_size=10))
    assert [chunk.end for chunk in scored] == [11, 21, 31, 41]


def test_logits_before_a_delay_has_passed_are_ignored():
    class Silent(Frames):
        def forward(self, codes, state=None):
            logits, after = super().forward(codes, state)
            if state is None:
                logits[:, 1, :2] = float("nan")
            return logits, after

    frames = frames_of(20)
    assert by_code(stream(as_model(Silent()), frames, chunk_size=8)) == by_code(stream(LM, frames, chunk_size=8))


@pytest.mark.parametrize("shape", [(20,), (20, 3), (20, 4, 1)])
def test_frames_of_another_shape_are_refused(shape):
    with pytest.raises(StreamError, match=r"frames of 4 integer codes, \[T, 4\]; got shape \[20"):
        list(stream(LM, np.zeros(shape, int)))


def test_frames_are_not_read_in_windows():
    with pytest.raises(StreamError, match="with the state carried, not in windows"):
        list(stream_in_windows(LM, frames_of(20), window=8, overlap=4))


def test_logits_of_one_codebook_alone_are_refused():
    class One(Frames):
        def forward(self, codes, state=None):
            logits, state = super().forward(codes, state)
            return logits[:, :1], state

    with pytest.raises(ModelError, match=r"logits of shape \[1, 1, 20, 9\]; expected \[1, 2, 20, 9\]"):
        list(stream(as_model(One()), frames_of(20)))


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_keep_returns_the_last_positions_of_every_codebook(keep):
    ids = LM.random_ids(2, 5)
    with torch.no_grad():
        everything, kept = LM.step(ids)[0], LM.step(ids, keep=keep)[0]
    assert torch.equal(kept, everything[:, :, 5 - keep :])


def test_random_codes_lie_in_their_codebooks():
    ids = LM.random_ids(3, 500, seed=1)
    assert ids.shape == (3, 4, 500)
    assert ids.amax((0, 2)).tolist() == [size - 1 for size in SIZES]
    assert ids.min() == 0


def test_a_model_that_delays_codes_needs_a_method_recent():
    module = Frames()
    module.recent = None
    with pytest.raises(ModelError, match=r"delayed by \[0, 2\].*recent\(state\)"):
        as_model(module)


def test_another_attribute_named_codebooks_is_ignored():
    module = Functional()
    module.codebooks = 8
    assert as_model(module).codebooks is None


# Data


def test_frames_in_a_file_are_memory_mapped_and_scored(tmp_path):
    np.save(tmp_path / "codes.npy", frames_of(500).astype(np.int16))
    mapped = np.load(tmp_path / "codes.npy", mmap_mode="r")
    assert by_code(stream(LM, mapped, chunk_size=64)) == by_code(stream(LM, frames_of(500), chunk_size=64))


def test_a_corpus_that_is_no_frames_of_the_model_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"is text, and .*Frames reads frames of 4 codes: it has no tokenizer.*\[frames, 4\]"):
        measure_perplexity(LM, corpus(f"text:{__file__}"))
    np.save(tmp_path / "codes.npy", np.zeros((20, 8), int))
    source = corpus(f"tokens:{tmp_path / 'codes.npy'}")
    with pytest.raises(
        CorpusError, match=r"codes.npy cannot be read by .*Frames: .*frames of 4 .* codes.*; got shape \[20, 8\]"
    ):
        measure_perplexity(LM, source)
    with pytest.raises(CorpusError, match=r"cannot be read by demo: .*a row of .* ids; got shape \[20, 8\]"):
        measure_perplexity(load("demo"), source)
    np.save(tmp_path / "ids.npy", np.zeros(20, int))
    with pytest.raises(CorpusError, match=r"cannot be read by .* frames of 4 integer codes"):
        measure_perplexity(LM, corpus(f"tokens:{tmp_path / 'ids.npy'}"))


# Perplexity


@pytest.mark.parametrize("chunk_size", [7, None])
def test_perplexity_is_the_mean_over_all_codes_and_its_positions_count_frames(chunk_size):
    frames = frames_of(2500, gaps=0.2)
    losses = losses_of(frames)
    result = measure_perplexity(LM, frames, chunk_size=chunk_size, positions=(1000, 2000))
    assert float(result.nll) == pytest.approx(np.mean(list(losses.values())), rel=1e-6)
    assert result.tokens == len(losses)
    for position in (1000, 2000):  # a code is scored at the frame in which it is predicted, and frame n is target n + 1
        near = [loss for (frame, book), loss in losses.items() if position - 1000 <= frame + DELAYS[book] < position]
        assert result.loss_at[position] == pytest.approx(np.mean(near), rel=1e-6)


def test_positions_count_frames_however_many_codes_are_missing():
    for gaps in (0.0, 0.8):
        assert set(measure_perplexity(LM, frames_of(2000, gaps=gaps), positions=(1000, 2000)).loss_at) == {1000, 2000}
        assert set(measure_perplexity(LM, frames_of(1600, gaps=gaps), positions=(1000, 2000)).loss_at) == {1000}


def test_a_limit_counts_frames():
    frames = frames_of(300)
    limited = measure_perplexity(LM, frames, tokens=100, chunk_size=30)
    assert float(limited.nll) == pytest.approx(np.mean(list(losses_of(frames[:100]).values())), rel=1e-6)


def test_the_fixture_streams_frames_with_a_certificate(tmp_path):
    random, lm = np.random.default_rng(0), load("zoo:moshi")
    np.save(tmp_path / "codes.npy", np.stack([random.integers(0, size, 300) for size in lm.codebooks.sizes], axis=1))
    lmeval = Lmeval(VerbContext(Session(tmp_path / "reports", budget=1000), Log("test_frames")))
    result = lmeval.perplexity(lm, corpus(f"tokens:{tmp_path / 'codes.npy'}"), positions=(100, 200, 300))
    assert result.certificate.verdict == "exact-any-chunk"
    assert result.tokens == sum(300 - delay for delay in lm.codebooks.delays)
    assert set(result.loss_at) == {100, 200, 300}


def test_accuracy_counts_valid_codes_only():
    frames = frames_of(300, gaps=0.5)
    chunks = list(stream(LM, frames, chunk_size=50))
    ranks = np.concatenate([chunk.rank[chunk.valid] for chunk in chunks])
    result = measure_perplexity(LM, frames, chunk_size=50)
    assert float(result.token_accuracy[1]) == pytest.approx((ranks == 0).mean())
    assert float(result.token_accuracy[5]) == pytest.approx((ranks < 5).mean())


def test_frames_without_codes_change_no_loss():
    frames = frames_of(600)
    frames[:300] = -1
    result = measure_perplexity(LM, frames, chunk_size=50)
    assert float(result.nll) == pytest.approx(np.mean(list(losses_of(frames).values())), rel=1e-6)
    assert np.isfinite(result.chunk_loss.y).all()
    with pytest.raises(StreamError, match="nothing to score"):
        measure_perplexity(LM, np.full((50, 4), -1))


@pytest.mark.parametrize("model", ["Frames", "zoo:moshi"])
def test_an_interrupted_measurement_resumes_with_bit_equal_losses(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Saver, "PAUSE", 0.0)
    monkeypatch.setattr(Saver, "SHARE", 0.0)
    lm = LM if model == "Frames" else load(model)
    random = np.random.default_rng(0)
    np.save(tmp_path / "codes.npy", np.stack([random.integers(-1, size, 200) for size in lm.codebooks.sizes], axis=1))
    source = corpus(f"tokens:{tmp_path / 'codes.npy'}")
    options = {"chunk_size": 13, "positions": (100,), "losses": tmp_path / "whole.npy"}
    whole = measure_perplexity(lm, source, **options)

    def kill(done, nats, expected):
        if done > whole.tokens / 2:
            raise KeyboardInterrupt

    options |= {"losses": tmp_path / "parts.npy", "checkpoints": Checkpoints(tmp_path / "partial"), "key": "k"}
    with pytest.raises(KeyboardInterrupt):
        measure_perplexity(lm, source, progress=kill, **options)
    resumed = measure_perplexity(lm, source, **options)
    assert 0 < resumed.resumed_at < resumed.tokens == whole.tokens
    assert (float(resumed.nll), resumed.loss_at) == (float(whole.nll), whole.loss_at)
    assert resumed.chunk_loss == whole.chunk_loss
    losses = np.load(tmp_path / "parts.npy")
    assert np.array_equal(losses, np.load(tmp_path / "whole.npy"))
    assert len(losses) == whole.tokens


# The laws


class OwnCodeSeen(Frames):
    """Wrong: predicts a code from itself too."""

    def seen(self, vectors, book):
        return vectors[: book + 1].sum(0)


class LaterCodesSeen(Frames):
    """Wrong: predicts a code from all other codes of its frame."""

    def seen(self, vectors, book):
        return vectors.sum(0) - vectors[book]


class WrittenFirst(Temporal):
    """Wrong: new frames overwrite the ring before it is read."""

    def attend(self, q, known, new):
        last = new[0] - 1
        held = last - (last - torch.arange(self.context)) % self.context
        held = torch.where(held > self.lost(new), held, -1)
        frames = torch.cat([held, new])
        age = new[:, None] - frames
        visible = (frames >= 0) & (age >= 0) & (age < self.context)
        return nn.functional.scaled_dot_product_attention(q, known[0], known[1], attn_mask=visible)

    def lost(self, new):
        """The last frame of the ring that is not seen."""
        return new[-1] - self.context


class OneTooFew(WrittenFirst):
    """Wrong: one frame of the ring too few is seen."""

    def lost(self, new):
        return new[0] + 1 - self.context


class Unmasked(Block):
    """Wrong: every code of a frame sees all of its codes."""

    def forward(self, x):
        return self.finish(x, nn.functional.scaled_dot_product_attention(*self.project(x)))


class Undelayed(Moshi):
    """Wrong: a chunk begins with initial codes in place of the delayed ones."""

    def forward(self, codes, state=None):
        if state is not None:
            state = state._replace(recent=self.beginning(len(codes)).recent)
        return super().forward(codes, state)


def small(kind=Moshi, *, temporal=None, depth=None, context=16):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(width=16, layers=2, heads=2, context=context, card=12, text_card=20).eval()
    for layer in module.layers:
        layer.__class__ = temporal or Temporal
    for layer in module.depth.layers:
        layer.__class__ = depth or Block
    return module


@pytest.mark.parametrize("budget", [1000, pytest.param(300_000, marks=pytest.mark.thorough)])
def test_the_moshi_of_the_zoo_is_exact_for_any_chunk(budget):
    result = probe(load("zoo:moshi"), budget=budget, examples=1)
    assert result.verdict == "exact-any-chunk", result
    assert result.certificate.worst_ratio < 8
    assert result.certificate.longest > 3 * 32
    assert result.certificate.state.bytes_per_token == 0


@pytest.mark.parametrize(
    ("module", "broken"),
    [
        (small(temporal=WrittenFirst), {"splits"}),
        (small(temporal=OneTooFew), {"splits", "steps"}),
        (small(Undelayed), {"splits", "steps"}),
        (small(depth=Unmasked), {"causality"}),
        (OwnCodeSeen(), {"causality"}),
        (LaterCodesSeen(), {"causality"}),
    ],
    ids=["written before it is read", "context off by one", "delay dropped", "unmasked", "own code", "later codes"],
)
def test_a_fault_breaks_its_laws(module, broken):
    harness = Harness(as_model(module), 60)
    assert {law for law in ("splits", "steps", "causality") if first_failure([law], harness)} == broken


def test_a_leak_inside_a_frame_is_reported_with_its_codebooks():
    message = r"changing the codes from codebook 1 at position 4 on .* logits of codebook 1 at position 4"
    with pytest.raises(LawBroken, match=message):
        check("causality", Harness(as_model(OwnCodeSeen())), Case(12, (4,)))
    check("causality", Harness(LM), Case(12, (4,)))


def test_a_model_of_codes_is_exact_for_any_chunk():
    result = probed(Frames(), examples=5)
    assert result.verdict == "exact-any-chunk", result


# Context and speed


def test_a_small_moshi_sees_no_further_than_its_context():
    lm = as_model(small(context=4))
    ids = lm.random_ids(1, 40)
    other = ids.clone()
    other[..., 0] = (ids[..., 0] + 1) % 12
    with torch.no_grad():
        one, another = lm.step(ids)[0], lm.step(other)[0]
    seen = (one != another).any(-1).any(1)[0]
    last = 2 * (4 - 1) + 2  # two layers, then the depth model, and the frame is read one position later, or two
    assert seen[:2].all()
    assert not seen[last + 1 :].any()


def test_speed_is_measured_on_random_frames():
    result = measure_latency(LM, batch_size=2, seq_len=10, new_tokens=3, runs=3, warm_up=1)
    assert (result.prefill.n, result.itl.n) == (3, 6)
    assert result.record.cost.tokens == 3 * 2 * (10 + 2)
    result = measure_throughput(LM, batch_size=4, seq_len=10, runs=3, warm_up=1)
    assert result.record.cost.tokens == 3 * 4 * 10
    assert result.batch_scaling.x == [1, 2, 4]
