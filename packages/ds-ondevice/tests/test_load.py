"""`load_into`, against what ``load_state_dict`` and ``safetensors.torch.load_model`` make of the same files."""

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ds_ondevice import LoadError, MaterializeError, OnDevice, UnrestorableError, load_into
from ds_ondevice._shards import held, is_nested
from ranks import run_ranks
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)) for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0, 6, 2).float() / 6)), persistent=False)
        self.table = torch.arange(4).float() / 3
        self.where = self.scale.device

    def forward(self, x):
        hidden = self.embedding(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden * self.inv_freq.sum() * self.scale)


TIED = "head.weight"
COMPUTED = ("inv_freq", "table")


def trained(seed=0):
    """A model whose tensors all have values that construction does not give them."""
    torch.manual_seed(seed)
    model = Model()
    with torch.no_grad():
        for tensor in dict.fromkeys(model.state_dict().values()):
            tensor.copy_(torch.rand(tensor.shape) * 100)
    return model


def on_meta(dtype=torch.float32):
    with OnDevice(dtype, device="meta"):
        return Model()


def save(folder, state, files=1, index=True):
    """Write a state dict as transformers does: without duplicates, in one file or several with an index."""
    state = {name: tensor.detach().clone() for name, tensor in state.items() if name != TIED}
    if files == 1:
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    places = {name: names[position % files] for position, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name in state if places[name] == file}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def assert_same(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(model.inv_freq, expected.inv_freq)
    assert torch.equal(model.table, expected.table)
    assert model.head.weight is model.embedding.weight
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]


@pytest.mark.parametrize("shape", ["file", "folder", "index", "folder of one", "folder without index", "list", "str"])
def test_every_way_to_name_files(tmp_path, shape):
    expected = trained()
    one = shape in ("file", "folder of one", "str")
    path = save(tmp_path, expected.state_dict(), files=1 if one else 3, index=shape != "folder without index")
    paths = {
        "folder of one": tmp_path,
        "index": tmp_path / "model.safetensors.index.json",
        "list": [str(file) for file in tmp_path.glob("*.safetensors")],
        "str": str(path),
    }
    model = on_meta()
    before = model.state_dict(keep_vars=True)
    report = load_into(model, paths.get(shape, path), "cpu")
    assert_same(model, expected)
    assert all(tensor is before[name] for name, tensor in model.state_dict(keep_vars=True).items())
    assert report.replaced == ()
    assert set(report.loaded) == set(expected.state_dict()) - {TIED}
    assert report.tied == (TIED,)
    assert sorted(report.computed) == sorted(COMPUTED)
    assert report.missing == report.unexpected == report.uninitialized == ()
    assert report.device == torch.device("cpu")
    stored = {name: tensor for name, tensor in expected.state_dict().items() if name != TIED}
    assert report.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert str(report).startswith(f"loaded {len(stored)} tensors, {report.nbytes} bytes on this rank, to cpu\n")


def test_as_load_model(tmp_path):
    save_model(trained(), str(tmp_path / "saved.safetensors"))
    theirs, ours = Model(), on_meta()
    load_model(theirs, tmp_path / "saved.safetensors")
    load_into(ours, tmp_path / "saved.safetensors", "cpu")
    assert_same(ours, theirs)
    tokens = torch.arange(8).view(2, 4)
    assert torch.equal(ours(tokens), theirs(tokens))


def test_a_real_module_is_loaded_in_place(tmp_path):
    expected = trained()
    path = save(tmp_path, expected.state_dict())
    model = Model()
    model.scale.requires_grad_(False)
    before = dict(model.named_parameters())
    report = load_into(model, path, "cpu")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model.scale.requires_grad
    model.scale.requires_grad_(True)
    assert_same(model, expected)
    assert report.computed == ()


def test_no_block_around_the_call_has_a_say(tmp_path):
    expected = trained()
    path = save(tmp_path, expected.state_dict())
    model, other = on_meta(), on_meta()
    with torch.device("meta"), torch.inference_mode(False):
        load_into(model, path, "cpu")
    with OnDevice(torch.float16, device="meta"):
        load_into(other, path, "cpu")
    assert_same(model, expected)
    assert_same(other, expected)


def test_of_a_tie_the_last_is_read_as_in_load_state_dict(tmp_path):
    expected = trained()
    state = {**expected.state_dict(), TIED: torch.full((11, 6), 5.0)}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "both.safetensors")
    model = on_meta()
    report = load_into(model, tmp_path / "both.safetensors", "cpu")
    expected.load_state_dict(load_file(tmp_path / "both.safetensors"))
    assert_same(model, expected)
    assert report.tied == ("embedding.weight",)
    assert TIED in report.loaded
    assert report.nbytes == sum(t.nbytes for t in state.values()) - state[TIED].nbytes


class Views(nn.Module):
    """Parameters that share memory without being the same object."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Parameter(torch.zeros(4, 3))
        self.same = nn.Parameter(self.whole.data)
        self.part = nn.Parameter(self.whole.data[1:3])
        self.turned = nn.Parameter(self.whole.data.t())


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("block", [torch.device("meta"), OnDevice(device="meta"), torch.device("cpu")], ids=str)
def test_memory_that_is_shared_stays_shared(tmp_path, block, dtype):
    with block:
        model = Views()
    value = torch.rand(4, 3).to(dtype)
    save_file({"whole": value}, tmp_path / "a.safetensors")
    report = load_into(model, tmp_path / "a.safetensors", "cpu", dtype=dtype)
    assert report.tied == ("same", "part", "turned")
    with torch.no_grad():
        model.whole.add_(1)
    for found, expected in zip(model.parameters(), (value, value, value[1:3], value.t()), strict=True):
        assert torch.equal(found, expected + 1)


def test_a_part_does_not_stand_for_the_whole(tmp_path):
    save_file({"part": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(LoadError) as failed:
        load_into(Views(), tmp_path / "a.safetensors", "cpu")
    assert failed.value.missing == ("whole", "same", "turned")


def wrong_state():
    state = trained().state_dict()
    del state["layers.0.0.bias"], state["norm.running_mean"]
    state["layers.1.0.weight"] = torch.zeros(6, 5)
    state["norm.num_batches_tracked"] = torch.tensor(1.0)
    state["extra"] = torch.zeros(3)
    return state


@pytest.mark.parametrize("make", [Model, on_meta])
def test_all_that_does_not_fit_is_one_error_and_nothing_changes(tmp_path, make):
    path = save(tmp_path, wrong_state())
    model = make()
    before, values = model.state_dict(keep_vars=True), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(LoadError) as failed:
        load_into(model, path, "cpu")
    error = failed.value
    assert isinstance(error, MaterializeError)
    assert error.missing == ("layers.0.0.bias", "norm.running_mean")
    assert error.unexpected == ("extra",)
    assert error.mismatched == {
        "layers.1.0.weight": "shape (6, 5) in the file, (5, 6) in the module",
        "norm.num_batches_tracked": "torch.float32 in the file, torch.int64 in the module",
    }
    assert error.unsupported == {}
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, tensor in before.items())
    if make is Model:
        assert all(torch.equal(after[name], tensor) for name, tensor in values.items())
    else:
        assert all(tensor.is_meta for tensor in (*after.values(), model.inv_freq, model.table))
    again = pickle.loads(pickle.dumps(error))
    assert (again.missing, again.mismatched, str(again)) == (error.missing, error.mismatched, str(error))
    assert "  2 missing in the files: layers.0.0.bias, norm.running_mean\n" in str(error)


def test_the_message_of_a_thousand_names_fits_a_screen():
    names = [f"layers.{i}" for i in range(1000)]
    error = LoadError(names, names, dict.fromkeys(names, "why"), {})
    assert len(str(error).splitlines()) < 30
    assert "layers.19, and 980 more" in str(error)
    assert "layers.20" not in str(error)


def test_not_strict_on_a_real_module(tmp_path):
    state = wrong_state()
    del state["layers.1.0.weight"], state["norm.num_batches_tracked"]
    path = save(tmp_path, state)
    torch.manual_seed(1)
    model = Model()
    theirs = pickle.loads(pickle.dumps(model))
    theirs.load_state_dict({k: v for k, v in load_file(path).items() if k != "extra"}, strict=False)
    report = load_into(model, path, "cpu", strict=False)
    assert_same(model, theirs)
    assert set(report.missing) == {
        "layers.0.0.bias",
        "layers.1.0.weight",
        "norm.running_mean",
        "norm.num_batches_tracked",
    }
    assert report.unexpected == ("extra",)
    assert report.computed == report.uninitialized == ()


def test_not_strict_on_meta_gives_the_rest_what_construction_would(tmp_path):
    state = wrong_state()
    del state["layers.1.0.weight"], state["norm.num_batches_tracked"]
    path = save(tmp_path, state)
    torch.manual_seed(5)
    theirs = Model()
    theirs.load_state_dict({k: v for k, v in load_file(path).items() if k != "extra"}, strict=False)
    model = on_meta()
    torch.manual_seed(5)
    report = load_into(model, path, "cpu", strict=False)
    assert_same(model, theirs)
    assert set(report.missing) < set(report.computed)


def test_not_strict_still_refuses_what_does_not_match(tmp_path):
    with pytest.raises(LoadError) as failed:
        load_into(on_meta(), save(tmp_path, wrong_state()), "cpu", strict=False)
    assert len(failed.value.mismatched) == 2
    assert failed.value.missing == failed.value.unexpected == ()


def test_without_a_recording_what_no_file_has_is_refused_or_marked(tmp_path, caplog):
    expected = trained()
    path = save(tmp_path, expected.state_dict())
    with torch.device("meta"):
        model = Model()
    with pytest.raises(UnrestorableError) as failed:
        load_into(model, path, "cpu")
    assert sorted(failed.value.reasons) == sorted(COMPUTED)
    assert "No file holds these" in str(failed.value)
    assert all(tensor.is_meta for tensor in (*model.state_dict().values(), model.inv_freq, model.table))
    caplog.set_level(logging.WARNING, "ds.ondevice")
    report = load_into(model, path, "cpu", strict=False)
    assert sorted(report.uninitialized) == sorted(COMPUTED)
    assert model.inv_freq.isnan().all()
    assert model.where == torch.device("cpu")
    assert torch.equal(model.embedding.weight, expected.embedding.weight)
    assert torch.equal(model.norm.running_mean, expected.norm.running_mean)
    (line,) = caplog.messages
    assert line.startswith("load_into left 2 tensor(s) without a value")


def test_nothing_random_is_drawn_and_nothing_logged(tmp_path, caplog):
    path = save(tmp_path, trained().state_dict())
    model = on_meta()
    state = torch.get_rng_state()
    load_into(model, path, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert caplog.messages == []


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float16])
@pytest.mark.parametrize("make", [Model, on_meta])
def test_floating_point_is_converted(tmp_path, stored, asked, make):
    state = {n: t.to(stored) if t.is_floating_point() else t for n, t in trained().state_dict().items()}
    path = save(tmp_path, state)
    model = make() if make is Model else make(torch.bfloat16)
    own = model.embedding.weight.dtype
    report = load_into(model, path, "cpu", dtype=asked)
    for name, tensor in model.state_dict().items():
        wanted = (asked or own) if state[name].is_floating_point() else state[name].dtype
        assert tensor.dtype is wanted, name
        assert torch.equal(tensor, state[name].to(wanted)), name
    assert model.head.weight is model.embedding.weight
    assert report.nbytes == sum(t.nbytes for n, t in state.items() if n != TIED)


ALLOWED = [(torch.bool, torch.int8), (torch.int32, torch.int64), (torch.uint8, torch.int16), (torch.bool, torch.bool)]
REFUSED = [
    (torch.float32, torch.int64),
    (torch.int64, torch.float32),
    (torch.int64, torch.int32),
    (torch.int8, torch.uint8),
    (torch.uint8, torch.bool),
    (torch.float32, torch.complex64),
    (torch.complex64, torch.float32),
]


@pytest.mark.parametrize(("stored", "wanted"), ALLOWED + REFUSED)
def test_other_kinds_are_converted_only_where_nothing_is_lost(tmp_path, stored, wanted):
    model = nn.Module()
    model.register_buffer("buffer", torch.zeros(3, dtype=wanted))
    try:
        save_file({"buffer": torch.tensor([0, 1, 1]).to(stored)}, tmp_path / "a.safetensors")
    except KeyError:
        pytest.skip(f"this safetensors has no name for {stored}")
    if (stored, wanted) in ALLOWED:
        load_into(model, tmp_path / "a.safetensors", "cpu")
        assert torch.equal(model.buffer, torch.tensor([0, 1, 1]).to(wanted))
        return
    with pytest.raises(LoadError, match=f"{stored} in the file, {wanted} in the module"):
        load_into(model, tmp_path / "a.safetensors", "cpu")
    assert torch.equal(model.buffer, torch.zeros(3, dtype=wanted))


class Custom(nn.Parameter):
    def to(self, *args, **kwargs):
        return self


class Renamed(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update(weight=state["bias"] * 2))


def quantized():
    module = nn.Module()
    module.register_buffer("weight", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return module


def custom():
    module = nn.Linear(3, 3)
    module.weight = Custom(torch.zeros(3))
    return module


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LazyLinear(3), "lazy"),
        (quantized, "quantized"),
        (custom, "Custom tensors are not supported"),
        (Renamed, "made for its state dict"),
    ],
)
def test_tensors_that_cannot_be_loaded_are_named(tmp_path, make, reason):
    save_file({"weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(LoadError) as failed:
        load_into(make(), tmp_path / "a.safetensors", "cpu", strict=False)
    assert reason in failed.value.unsupported["weight"]


def test_progress_tells_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_ondevice._safetensors._BLOCK", 48)
    expected = trained()
    path = save(tmp_path, expected.state_dict(), files=2)
    calls = []
    model = on_meta()
    report = load_into(model, path, "cpu", progress=lambda done, total: calls.append((done, total)))
    assert_same(model, expected)  # in blocks of two rows of the embedding
    assert calls[0] == (0, report.nbytes)
    assert calls[-1] == (report.nbytes, report.nbytes)
    assert calls == sorted(calls)
    assert len(calls) > len(report.loaded) + 5


def test_progress_with_and_without_rich(tmp_path, monkeypatch, caplog, capsys):
    path = save(tmp_path, trained().state_dict())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    caplog.set_level(logging.INFO, "ds.ondevice")
    load_into(on_meta(), path, "cpu", progress=True)
    assert caplog.messages[-1].startswith("load_into: ")
    monkeypatch.undo()
    pytest.importorskip("rich")
    load_into(on_meta(), path, "cpu", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "load_into" in err


class Stop(BaseException):
    pass


def test_a_failure_in_the_middle_puts_meta_back(tmp_path):
    expected = trained()
    path = save(tmp_path, expected.state_dict())
    model = on_meta()
    before = model.state_dict(keep_vars=True)
    buffers = (model.inv_freq, model.table)

    def stop(done, total):
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        load_into(model, path, "cpu", progress=stop)
    assert all(after is before[name] for name, after in model.state_dict(keep_vars=True).items())
    assert (model.inv_freq is buffers[0], model.table is buffers[1]) == (True, True)
    assert all(tensor.is_meta for tensor in (*before.values(), *buffers, model.table))
    load_into(model, path, "cpu")
    assert_same(model, expected)


@pytest.mark.parametrize("left", [0, 4, 200, -1])
def test_a_truncated_file_is_seen_before_anything_changes(tmp_path, left):
    path = save(tmp_path, trained().state_dict(), files=2)
    last = path / "model-00002-of-00002.safetensors"
    data = last.read_bytes()
    last.write_bytes(data[:left])
    torch.manual_seed(0)
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OSError, match="safetensors' is no safetensors file, or not all of one"):
        load_into(model, path, "cpu")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_is_replaced_while_it_is_read_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_ondevice._safetensors._BLOCK", 48)
    path = save(tmp_path, trained().state_dict())
    data = path.read_bytes()

    def replace(done, total):
        if done == 0:
            (tmp_path / "new").write_bytes(data)
            os.utime(tmp_path / "new", (1, 1))
            os.replace(tmp_path / "new", path)

    model = on_meta()
    with pytest.raises(OSError, match="was changed while it was read"):
        load_into(model, path, "cpu", progress=replace)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_wrong_arguments(tmp_path):
    path = save(tmp_path, trained().state_dict())
    model = on_meta()
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, not dict"):
        load_into({}, path, "cpu")
    with pytest.raises(TypeError, match=r"floating-point torch\.dtype"):
        load_into(model, path, "cpu", dtype=torch.int8)
    with pytest.raises(ValueError, match="device must be a real device"):
        load_into(model, path, "meta")
    with pytest.raises(ValueError, match="an empty list"):
        load_into(model, [], "cpu")
    with pytest.raises(FileNotFoundError, match=r"no file '.*none\.safetensors'"):
        load_into(model, tmp_path / "none.safetensors", "cpu")
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        load_into(model, tmp_path / "sub", "cpu")
    (tmp_path / "index.json").write_text('{"weight_map": {"scale": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"no file '.*gone\.safetensors'"):
        load_into(model, tmp_path / "index.json", "cpu")
    (tmp_path / "sub" / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="is no index"):
        load_into(model, tmp_path / "sub" / "a.json", "cpu")
    save_file({"scale": torch.tensor(1.0)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"'scale' is in two files, '.*b\.safetensors' and '.*model\.safetensors'"):
        load_into(model, tmp_path, "cpu")
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_error_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    path = save(tmp_path, trained().state_dict())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install ds-ondevice\[safetensors\]"):
        load_into(on_meta(), path, "cpu")


PEAK = """
import sys, torch
from ds_ondevice import OnDevice
from ds_ondevice import load_into

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def build(width):
    with OnDevice(torch.float32, device="meta"):
        return torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(16)])

load_into(build(8), sys.argv[1], "cpu")  # what the first call imports
model = build(2048)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
report = load_into(model, sys.argv[2], "cpu")
print(status("VmHWM") - before, report.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_the_model_and_a_block(tmp_path):
    for name, width in (("small", 8), ("large", 2048)):
        state = {f"{i}.weight": torch.full((width, width), float(i)) for i in range(16)}
        save_file(state, tmp_path / f"{name}.safetensors")
    del state
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small.safetensors"), str(tmp_path / "large.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    peak, nbytes = map(int, done.stdout.split())
    assert nbytes == 256 << 20
    assert (256 << 20) <= peak < (256 + 64 + 32) << 20


def sharded_ways(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    columns = {"layers.0.0.weight", "layers.1.0.weight"}

    def shard(model):
        model.scale = nn.Parameter(model.scale.reshape(1))  # FSDP2 does not shard scalars
        by_columns = {id(p) for name, p in model.named_parameters() if name in columns}
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if id(p) in by_columns else None)
        fully_shard(model, mesh=mesh)
        return model

    def shard_inside():
        with OnDevice(torch.float32, device="meta"):
            return shard(Model())

    torch.manual_seed(0)
    inside = shard_inside()
    outside = shard(on_meta())
    real = shard(Model())
    eager = trained()
    eager.scale = nn.Parameter(eager.scale.reshape(1))
    losses, nbytes = [], []
    for model in (inside, outside, real):
        state = model.state_dict()
        assert all(isinstance(p, DTensor) for p in model.parameters())
        for turn in range(2):  # one rank at a time: nothing waits for the other
            if turn == rank:
                report = load_into(model, folder / "shards.safetensors", "cpu")
            torch.distributed.barrier()
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs), name
            assert ours.placements == state[name].placements == ((Shard(1) if name in columns else Shard(0)),), name
        assert torch.equal(model.norm.running_mean, eager.norm.running_mean)
        assert torch.equal(model.inv_freq, eager.inv_freq)
        assert model.head.weight is model.embedding.weight
        mine = [p.to_local() for p in model.parameters()] + [b for n, b in model.named_buffers() if n != "inv_freq"]
        assert report.nbytes == sum(tensor.nbytes for tensor in mine)
        nbytes.append(report.nbytes)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        for _ in range(2):
            model(torch.arange(8).view(2, 4)).mean().backward()
            optimizer.step()
        trained_on = model.embedding.weight.full_tensor().tolist()
        assert trained_on != eager.embedding.weight.tolist()
        with torch.no_grad():
            model(torch.arange(8).view(2, 4))  # leaves the root's parameters whole
        load_into(model, folder / "shards.safetensors", "cpu")
        assert torch.equal(model.embedding.weight.full_tensor(), eager.embedding.weight)
        with torch.no_grad():
            theirs = eager(torch.arange(8).view(2, 4))
            torch.testing.assert_close(model(torch.arange(8).view(2, 4)), theirs)
        losses.append(trained_on)
    state = load_file(folder / "shards.safetensors")
    lacking = folder / f"lacking-{rank}.safetensors"
    save_file({n: t for n, t in state.items() if n not in ("layers.0.0.weight", "layers.1.2.bias")}, lacking)
    torch.manual_seed(7)
    fresh = Model()
    for partly in (shard(on_meta()), shard_inside()):
        torch.manual_seed(7)
        incomplete = load_into(partly, lacking, "cpu", strict=False)
        assert incomplete.missing == ("layers.0.0.weight", "layers.1.2.bias")
        assert set(incomplete.missing) < set(incomplete.computed)
        for (name, ours), new in zip(partly.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), new if name in incomplete.missing else state[name]), name
    with pytest.raises(LoadError, match="sharded and real already"):
        load_into(model, folder / "shards.safetensors", "cpu", dtype=torch.bfloat16)
    halves = shard(on_meta())
    assert load_into(halves, folder / "shards.safetensors", "cpu", dtype=torch.bfloat16).nbytes == report.nbytes
    for ours, theirs in zip(halves.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.bfloat16())
    assert halves(torch.arange(8).view(2, 4)).dtype is torch.bfloat16
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("ds.ondevice").addHandler(handler)
    logging.getLogger("ds.ondevice").setLevel(logging.INFO)
    sys.modules["rich.console"] = None
    load_into(model, folder / "shards.safetensors", "cpu", progress=True)
    assert bool(lines) == (rank == 0)
    # other placements, and none
    module = nn.Module()
    with torch.device("meta"):
        module.whole = nn.Parameter(distribute_tensor(torch.zeros(5, 6), mesh, [Replicate()]))
        module.rows = nn.Parameter(distribute_tensor(torch.zeros(1, 3), mesh, [Shard(0)]))
    module.sum = nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Partial()], run_check=False))
    state = {"whole": torch.rand(5, 6), "rows": torch.rand(1, 3), "sum": torch.zeros(2)}
    if rank == 0:
        save_file(state, folder / "placed.safetensors")
    torch.distributed.barrier()
    with pytest.raises(LoadError) as partial:
        load_into(module, folder / "placed.safetensors", "cpu")
    del module.sum
    report = load_into(module, folder / "placed.safetensors", "cpu", strict=False)
    assert torch.equal(module.whole.to_local(), load_file(folder / "placed.safetensors")["whole"])
    assert torch.equal(module.rows.full_tensor(), load_file(folder / "placed.safetensors")["rows"])
    assert report.nbytes == 120 + (12 if rank == 0 else 0)
    return losses, nbytes, partial.value.unsupported


def test_shards_on_two_ranks(tmp_path):
    state = trained().state_dict()
    state["scale"] = state["scale"].reshape(1)
    save_file({n: t.clone() for n, t in state.items() if n != TIED}, tmp_path / "shards.safetensors")
    (losses, first, unsupported), (_, second, _) = run_ranks(sharded_ways, 2, tmp_path)
    assert losses[0] == losses[1] == losses[2]  # they train on, and alike
    whole = sum(t.nbytes for n, t in state.items() if n != TIED)
    buffers = sum(
        t.nbytes for n, t in state.items() if n.startswith("norm.") and n.split(".")[1] not in ("weight", "bias")
    )
    assert [a + b for a, b in zip(first, second, strict=True)] == [whole + buffers] * 3
    assert list(unsupported) == ["sum"]
    assert "Partial" in unsupported["sum"]


def tensor_parallel(rows):
    return nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, rows, bias=False)


def strided(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return strided_rows(mesh, folder, 12), strided_rows(mesh, folder, 11)


def strided_rows(mesh, folder, rows):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    try:
        with OnDevice(torch.float32, device="meta"):
            model = nn.Sequential(*tensor_parallel(rows))
            plan = {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": ColwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
            fully_shard(model, mesh=mesh["dp"])
    except NotImplementedError as error:
        return str(error)
    placements = {name: str(p.placements) for name, p in model.named_parameters()}
    report = load_into(model, folder / f"{rows}.safetensors", "cpu")
    state = load_file(folder / f"{rows}.safetensors")
    dp, tp = mesh.get_coordinate()
    for name, parameter in model.named_parameters():
        whole = state[name]
        if name == "1.weight":
            whole = whole.chunk(2, dim=1)[tp]
        elif name != "1.bias":
            whole = whole.chunk(2)[tp]
        assert torch.equal(parameter.to_local(), whole.chunk(2)[dp]), name
        assert rows == 11 or torch.equal(parameter.full_tensor(), state[name]), name
    eager = nn.Sequential(*tensor_parallel(rows))
    eager.load_state_dict(state)
    x = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), eager(x).chunk(2, dim=1)[tp])
    return placements, report.nbytes


def test_tensor_parallel_below_fsdp2_on_four_ranks(tmp_path):
    even, uneven = nn.Sequential(*tensor_parallel(12)).state_dict(), nn.Sequential(*tensor_parallel(11)).state_dict()
    save_file(even, tmp_path / "12.safetensors")
    save_file(uneven, tmp_path / "11.safetensors")
    results = run_ranks(strided, 4, tmp_path)
    for state, loaded in ((even, [each[0] for each in results]), (uneven, [each[1] for each in results])):
        if isinstance(loaded[0], str):
            assert "does not support uneven" in loaded[0]  # old versions of torch
            continue
        assert "_S" in loaded[0][0]["0.weight"]
        bias = state["1.bias"].nbytes  # on both ranks of a tensor-parallel pair
        assert sum(nbytes for _, nbytes in loaded) == sum(t.nbytes for t in state.values()) + bias


def kept(whole, *cuts):
    """What is left of a dimension after ``torch.chunk`` into so many parts, of which one is kept, and so on."""
    for parts, index in cuts:
        pieces = whole.chunk(parts) if len(whole) else ()
        whole = pieces[index] if index < len(pieces) else whole[:0]
    return whole.tolist()


@pytest.mark.parametrize("inner", [1, 2, 3, 5])
@pytest.mark.parametrize("outer", [1, 2, 4])
def test_held_is_what_chunk_gives(inner, outer):
    for length in range(14):
        whole, same = ((0, length),), []
        for i in range(inner):
            for j in range(outer):
                expected = kept(torch.arange(length), (inner, i), (outer, j))
                plain = held(held(whole, inner, i), outer, j)
                assert [k for start, stop in plain for k in range(start, stop)] == expected
                strided = held(held(whole, outer, j, inner), inner, i)  # the same shards, outer axis first
                same.append([k for start, stop in strided for k in range(start, stop)] == expected)
        assert is_nested(length, ((outer, inner), (inner, 1))) == (all(same) or inner == 1)
        assert length % (inner * outer) or all(same)


def test_a_strided_shard_keeps_the_order():
    assert held(((0, 9),), 4, 0, factor=2) == ((0, 2), (5, 6))  # the example in torch's own comment
    assert held(((0, 9),), 4, 3, factor=2) == ((8, 9),)
    assert held(((0, 4), (6, 10)), 1, 0, factor=2) == ((0, 4), (6, 10))
    assert held(((0, 8),), 1, 0, factor=4) == ((0, 8),)
    assert not is_nested(9, ((4, 2), (2, 1)))
    assert not is_nested(8, ((2, 3), (2, 1)))
    assert is_nested(7, ((2, 2), (2, 1)))
