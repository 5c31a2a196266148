"""Snapshots put tensors back bit for bit: tied, packed and split ones, wherever they are kept and however they were changed."""

import copy

import pytest
import torch
from torch import nn

import pytest_lmeval
from pytest_lmeval import snapshot
from pytest_lmeval._session import Session
from pytest_lmeval.errors import ArgumentError, UnreadableError
from pytest_lmeval.measures import Lmeval
from pytest_lmeval.measures._context import VerbContext
from pytest_lmeval.models._identity import fingerprint
from pytest_lmeval.models._sources import as_model
from pytest_lmeval.models._tensors import parts


class Tied(nn.Module):
    """Head and table are one tensor; a buffer, and a block."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(8, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3, dtype=torch.int64))

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def bits(module):
    """The bytes of every tensor, by each of its names."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {
        name: b"".join(part.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes() for part in parts(own).values())
        for name, own in named
    }


def objects(module):
    return {name: id(tensor) for name, tensor in module.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def changed_in_place(module):
    module.blocks[0].weight.mul_(2)
    module.embed.weight[3, 1] = torch.nan


def data_replaced(module):
    module.blocks[0].weight.data = torch.zeros(2, 2)
    module.embed.weight.data = module.embed.weight.data.double()


def tensor_replaced(module):
    module.blocks[0].weight = nn.Parameter(torch.zeros(4, 4))
    module.head.weight = nn.Parameter(torch.zeros(8, 4))


def deleted(module):
    del module.blocks[0].weight
    module.blocks[0].weight = torch.zeros(4, 4)
    module.embed.weight = None


def module_replaced(module):
    module.blocks[0] = nn.Linear(4, 4)
    module.embed = nn.Embedding(8, 4)
    module.blocks = nn.ModuleList(nn.Identity() for _ in range(2))


def turned_to_a_buffer(module):
    weight = module.blocks[0].weight
    del module.blocks[0].weight
    module.blocks[0].register_buffer("weight", weight.detach() + 1)


CHANGES = [changed_in_place, data_replaced, tensor_replaced, deleted, module_replaced, turned_to_a_buffer]


@pytest.mark.parametrize("on", ["cpu", "device", "file"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_tensors_are_put_back_bit_for_bit_as_the_same_objects(tmp_path, change, on):
    module = Tied()
    before, same, aliases = bits(module), objects(module), module.blocks[0].weight.view(-1)
    on = tmp_path / "kept.safetensors" if on == "file" else on
    with snapshot(module, "*", on=on) as kept:
        change(module)
        assert module.head is not None
        assert "blocks.0.weight" not in dict(module.named_parameters()) or bits(module) != before
    assert bits(module) == before
    assert objects(module) == same
    assert module.head.weight is module.embed.weight
    assert torch.equal(aliases, module.blocks[0].weight.view(-1))
    assert aliases.data_ptr() == module.blocks[0].weight.data_ptr()  # a view of it still is one
    assert ("blocks.0.weight" in kept.replaced) == (change not in (changed_in_place, data_replaced))
    module(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_state_dict_alone_would_not_undo_every_change(change):
    """What `copy.deepcopy(state_dict())` puts back: the bits, where shapes and modules stayed; not the objects."""
    module = Tied()
    before, same = bits(module), objects(module)
    saved = copy.deepcopy(module.state_dict())
    change(module)
    try:
        module.load_state_dict(saved)
        undone = bits(module) == before and objects(module) == same
    except (RuntimeError, AttributeError):
        undone = False
    assert undone == (change is changed_in_place)


def test_only_what_is_named_is_kept_and_a_tied_tensor_once():
    module = Tied()
    kept = snapshot(module, "head.weight", "embed.*")
    assert kept.names == ["embed.weight", "head.weight"]
    assert kept.nbytes == 8 * 4 * 4
    with kept, torch.no_grad():
        module.blocks[0].weight.zero_()
        module.embed.weight.zero_()
    assert not module.blocks[0].weight.any()
    assert module.embed.weight.any()


def test_tensors_are_put_back_after_an_exception_and_before_the_end():
    module = Tied()
    before = bits(module)
    with pytest.raises(KeyboardInterrupt), snapshot(module, "*.weight") as kept:  # noqa: PT012
        for _ in range(3):
            changed_in_place(module)
            assert bits(module) != before
            kept.restore()
            assert bits(module) == before
        changed_in_place(module)
        raise KeyboardInterrupt
    assert bits(module) == before


def test_the_model_is_known_as_the_same_after_the_block_and_as_another_inside():
    lm = as_model(Tied())
    before = fingerprint(lm)
    with snapshot(lm, "*"):
        changed_in_place(lm.module)
        assert fingerprint(lm) != before
    assert fingerprint(lm) == before


def test_a_module_that_was_rounded_has_its_bits_back():
    module = Tied()
    before = bits(module)
    with snapshot(module, "*"):
        module.half()
    assert bits(module) == before
    assert module.embed.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("blocks.0.weight_",), r"matches no tensor of Tied. Did you mean blocks.0.weight\? There are: scale, embed.weight"),
        ((), "no tensor is named"),
        ((3,), "a tensor is named by a text such as 'scale'; got 3"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(arguments, said):
    with pytest.raises(ArgumentError, match=said):
        snapshot(Tied(), *arguments)


def test_a_spec_is_the_model_of_the_test_and_refused_outside():
    with pytest.raises(ArgumentError, match=r"Load it first, lm = load\('demo'\)"):
        snapshot("demo", "*")
    with pytest.raises(ArgumentError, match="is no torch module"):
        snapshot(pytest_lmeval.as_model(type("Own", (), {"step": lambda *a, **o: (torch.zeros(1, 1, 4), 0)})()), "*")


def test_the_fixture_has_it(tmp_path):
    lmeval = Lmeval(VerbContext(Session(tmp_path)))
    module = lmeval._context.model("demo").module
    before = module.embed.weight.clone()
    with lmeval.snapshot("demo", "embed.weight"):
        module.embed.weight.data.zero_()
    assert torch.equal(module.embed.weight, before)


def test_a_file_that_is_gone_or_broken_is_said_and_changes_nothing(tmp_path):
    module = Tied()
    file = tmp_path / "kept.safetensors"
    for damage in (file.unlink, lambda: file.write_bytes(file.read_bytes()[:-5]), lambda: snapshot(module, "scale", on=file)):
        before = bits(module)
        kept = snapshot(module, "*.weight", on=file)
        changed_in_place(module)
        changed = bits(module)
        damage()
        with pytest.raises(UnreadableError, match="the tensors stay as they are now"):
            kept.restore()
        assert bits(module) == changed != before


@pytest.mark.parametrize(("precision", "on"), [("int8", "cpu"), ("int8", "file"), ("int4", "device"), ("int4", "file")])
def test_tensors_that_torchao_packed_are_put_back(tmp_path, precision, on):
    pytest.importorskip("torchao")
    lm = pytest_lmeval.load(f"demo@{precision}")
    before, ids = bits(lm.module), torch.arange(40)[None]
    expected = lm.step(ids)[0]
    with snapshot(lm, "*.out.weight", on=tmp_path / "kept" if on == "file" else on), torch.no_grad():
        for layer in lm.module.layers:
            max(parts(layer.out.weight).values(), key=torch.numel).zero_()
        lm.module.layers[1].out.weight = nn.Parameter(torch.zeros(128, 128))
        assert not torch.equal(lm.step(ids)[0], expected)
    assert bits(lm.module) == before
    assert torch.equal(lm.step(ids)[0], expected)


@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
@pytest.mark.parametrize("stepped", [False, True])
def test_layers_of_bitsandbytes_are_put_back_with_their_scales(tmp_path_factory, kind, stepped):
    """Their first step repacks the weight, and moves the scales."""
    bnb = pytest.importorskip("bitsandbytes").nn
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(64, 64, generator=generator)
    if kind == "int8":
        layer = bnb.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(plain.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, compress_statistics=kind == "nested")
        layer.weight = bnb.Params4bit(
            plain.clone(), requires_grad=False, quant_type="nf4", compress_statistics=kind == "nested"
        )
    module = nn.Sequential(layer.to("cpu")).eval()
    given = torch.randn(3, 64, generator=generator)

    @torch.no_grad()
    def answer():
        return module(given)

    if stepped:
        answer()
    expected = copy.deepcopy(module)(given) if kind != "int8" else None
    with snapshot(module, "0.weight") as kept, torch.no_grad():
        first = answer()
        assert kept.nbytes > module[0].weight.nbytes  # with its scales
        module[0].weight.data.zero_()
        state = module[0].weight.quant_state if kind != "int8" else None
        scales = module[0].state.SCB if state is None else state.absmax
        scales.zero_()
        assert not torch.equal(answer(), first)
    assert torch.equal(answer(), first)
    assert expected is None or torch.equal(first, expected)


def test_each_rank_keeps_its_part_of_a_split_tensor(tmp_path):
    distributed = pytest.importorskip("torch.distributed.tensor")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        module = Tied()
        split = distributed.distribute_tensor(module.blocks[0].weight.detach(), mesh, [distributed.Shard(0)])
        module.blocks[0].weight = nn.Parameter(split)
        before = bits(module)
        for on in ("cpu", "device", tmp_path / "kept"):
            with snapshot(module, "blocks.*", on=on), torch.no_grad():
                module.blocks[0].weight.mul_(3)
                assert bits(module) != before
            assert bits(module) == before
            assert isinstance(module.blocks[0].weight, distributed.DTensor)
        assert (tmp_path / "kept.0").exists()  # a file for each rank
    finally:
        torch.distributed.destroy_process_group()
