import gc
import logging
import weakref

import pytest
import torch
from ds_ondevice import MaterializeReport, OnDevice, UnrestorableError, materialize
from ds_ondevice._ops import mark_of
from torch import nn


class Rotary(nn.Module):
    """Tensors that are no parameters and in no checkpoint, and numbers read out of tensors."""

    def __init__(self, dim=8, base=10000.0):
        super().__init__()
        inverse = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
        self.register_buffer("inv_freq", inverse, persistent=False)
        self.original = self.inv_freq
        self.tables = [
            torch.outer(torch.arange(4), inverse),
            {"mask": torch.triu(torch.full((4, 4), float("-inf")), 1)},
        ]
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]
        self.more_rates = torch.linspace(0, 1, 3).tolist()


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.rotary = Rotary()
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.Tensor([1.0, 2.0]))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.batchnorm = nn.BatchNorm1d(4)
        nn.Linear(5, 7)  # thrown away; its numbers are drawn
        nn.init.trunc_normal_(self.transformer.encoder.layers[0].linear1.weight, std=0.02)
        self.rows = self.head.weight.data[2:4]
        self.register_buffer("mask", torch.triu(torch.full((4, 4), float("-inf")), 1))
        self.old = nn.Parameter(torch.Tensor(3, 4), requires_grad=False)
        nn.init.normal_(self.old)
        with torch.no_grad():
            self.scale[1] = 7.0
            self.transformer.decoder.layers[1].linear2.weight.mul_(0.5)


def tensors_of(model):
    """Every tensor of `Everything`, by name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        "rows": model.rows,
        "tables": model.rotary.tables[0],
        "table mask": model.rotary.tables[1]["mask"],
    }


def assert_same_bits(one, other):
    assert (one.dtype, one.device, one.shape, one.stride()) == (other.dtype, other.device, other.shape, other.stride())
    assert (one.requires_grad, one.is_leaf) == (other.requires_grad, other.is_leaf)
    assert torch.equal(one.detach().flatten().view(torch.uint8), other.detach().flatten().view(torch.uint8))


class InDefaultDtype:
    """Eager construction without OnDevice, in another default dtype: the oracle."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_values_are_those_of_eager_construction_bit_for_bit(dtype):
    torch.manual_seed(5)
    with InDefaultDtype(dtype):
        eager = Everything()
    state_after = torch.get_rng_state()
    with OnDevice(dtype, device="meta"):
        model = Everything()
    assert all(t.is_meta for t in tensors_of(model).values())
    torch.manual_seed(5)
    report = materialize(model, "cpu")
    expected, actual = tensors_of(eager), tensors_of(model)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert_same_bits(actual[name], tensor)
    assert torch.equal(torch.get_rng_state(), state_after)
    assert model.rotary.rates == eager.rotary.rates == [0.0, 0.25, 0.5]
    assert model.rotary.more_rates == eager.rotary.more_rates
    assert (report.moved, report.initialized, report.uninitialized, report.missing) == ((), (), (), ())
    assert {"rotary.inv_freq", "rotary.original", "rotary.tables", "rows", "head.weight"} <= set(report.restored)
    assert report.device == torch.device("cpu")


def test_construction_draws_nothing():
    state = torch.get_rng_state()
    with OnDevice(torch.float32):
        Everything()
    assert torch.equal(torch.get_rng_state(), state)


def test_ties_are_kept():
    with OnDevice(torch.float32):
        model = Everything()
    materialize(model, "cpu")
    assert model.head.weight is model.embedding.weight
    assert model.rotary.original is model.rotary.inv_freq
    assert model.rows.data_ptr() == model.head.weight[2:4].data_ptr()
    with torch.no_grad():
        model.embedding.weight[2] = 5.0
    assert model.rows[0].tolist() == [5.0] * 8


def test_buffers_tied_across_modules_are_kept():
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
        model[1].register_buffer("running_mean", model[0].running_mean)
        model[1].register_buffer("start", model[0].running_var[:1], persistent=False)
    materialize(model, "cpu")
    assert model[0].running_mean is model[1].running_mean
    assert model[1].start.data_ptr() == model[0].running_var.data_ptr()
    assert "1.start" not in {f"1.{name}" for name in model[1].state_dict()}


def test_a_model_works_and_trains_afterwards():
    with OnDevice(torch.float32):
        model = Everything()
    materialize(model, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hidden, _ = model.recurrent(model.embedding(torch.tensor([[1, 2, 3]])))
    model.head(model.transformer(hidden, hidden)).square().sum().backward()
    before = model.head.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.embedding.weight)


def test_an_lstm_uses_its_new_weights():
    with OnDevice(torch.float32):
        model = nn.LSTM(3, 4)
    torch.manual_seed(1)
    materialize(model, "cpu")
    torch.manual_seed(1)
    eager = nn.LSTM(3, 4)
    x = torch.randn(2, 1, 3)
    assert torch.equal(model(x)[0], eager(x)[0])
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))


def test_attributes_of_parameters_and_their_class_are_kept():
    class Special(nn.Parameter):
        pass

    with OnDevice(torch.float32):
        model = nn.Linear(2, 2)
        model.extra = Special(torch.ones(2), requires_grad=False)
        model.buffer = nn.Buffer(torch.ones(2), persistent=False)
    model.weight.sequence_parallel = True
    materialize(model, "cpu")
    assert model.weight.sequence_parallel is True
    assert type(model.extra) is Special
    assert model.extra.requires_grad is False
    assert "buffer" not in model.state_dict()
    assert list(dict(model.named_buffers())) == ["buffer"]


def test_a_part_gets_the_values_that_it_has_in_the_whole():
    torch.manual_seed(2)
    eager = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    with OnDevice(torch.float32):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    torch.manual_seed(2)
    materialize(model[2], "cpu")
    assert torch.equal(model[2].weight, eager[2].weight)
    assert model[0].weight.is_meta
    torch.manual_seed(2)
    materialize(model, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), eager.parameters(), strict=True))


def test_inside_the_block_too():
    torch.manual_seed(3)
    eager = nn.Linear(2, 2)
    torch.manual_seed(3)
    with OnDevice(torch.float32):
        model = nn.Linear(2, 2)
        materialize(model, "cpu")
        assert torch.zeros(1).is_meta
    assert torch.equal(model.weight, eager.weight)


def test_initialisation_in_a_later_block_counts():
    torch.manual_seed(4)
    eager = nn.Linear(2, 2)
    nn.init.normal_(eager.weight)
    with OnDevice(torch.float32):
        model = nn.Linear(2, 2)
    with OnDevice(torch.float32):
        nn.init.normal_(model.weight)
    torch.manual_seed(4)
    materialize(model, "cpu")
    assert torch.equal(model.weight, eager.weight)


def test_copies_made_inside_are_known():
    import copy

    torch.manual_seed(4)
    eager = nn.Linear(2, 2)
    with OnDevice(torch.float32):
        model = nn.Linear(2, 2)
    with OnDevice(torch.float32):
        twins = nn.ModuleList([model, copy.deepcopy(model)])
    torch.manual_seed(4)
    materialize(twins, "cpu")
    assert torch.equal(twins[1].weight, eager.weight)
    assert twins[1].weight is not twins[0].weight


def test_real_tensors_that_went_in_are_copied():
    table = torch.arange(3.0)
    with OnDevice(torch.float32):
        model = nn.Module()
        model.register_buffer("table", torch.zeros(3))
        model.table.copy_(table)
    materialize(model, "cpu")
    assert model.table.tolist() == [0.0, 1.0, 2.0]
    assert model.table.data_ptr() != table.data_ptr()


def test_real_tensors_on_the_device_stay_the_same_objects():
    with OnDevice(torch.float32):
        model = nn.Linear(2, 2)
        model.bias = nn.Parameter(torch.ones(2, device="cpu"))
    bias = model.bias
    report = materialize(model, "cpu")
    assert model.bias is bias
    assert report.restored == ("weight",)
    assert materialize(model, "cpu") == MaterializeReport(device=torch.device("cpu"))


def test_the_recording_dies_with_the_last_tensor_on_meta():
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    recording = weakref.ref(mark_of(model[0].weight).recordings[0])
    materialize(model[0], "cpu")
    gc.collect()
    assert recording() is not None
    del model[1]
    gc.collect()
    assert recording() is None


# What cannot be restored


def test_tensors_made_elsewhere_are_named_and_nothing_is_changed():
    with torch.device("meta"):
        other = nn.Linear(2, 2)
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.Linear(2, 2), other)
    before = list(model.parameters())
    with pytest.raises(UnrestorableError, match=r"2 tensor\(s\)(.|\n)*1\.weight: it was not made inside") as caught:
        materialize(model, "cpu")
    assert sorted(caught.value.reasons) == ["1.bias", "1.weight"]
    assert "fallback=" in str(caught.value)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_what_is_computed_from_tensors_made_elsewhere():
    other = torch.ones(2, device="meta")
    with OnDevice(torch.float32):
        model = nn.Module()
        model.doubled = nn.Parameter(other * 2)
    with pytest.raises(UnrestorableError, match="doubled: it, or what it is computed from, was made outside"):
        materialize(model, "cpu")


def test_initialisation_outside_the_block_is_seen():
    with OnDevice(torch.float32):
        model = nn.Linear(2, 2)
    nn.init.normal_(model.weight)
    with pytest.raises(UnrestorableError, match="weight: it was changed in place outside") as caught:
        materialize(model, "cpu")
    assert list(caught.value.reasons) == ["weight"]


def test_a_cast_outside_the_block_is_seen():
    with OnDevice(torch.float32):
        model = nn.Linear(2, 2)
    with pytest.raises(UnrestorableError, match="weight: it was not made inside"):
        materialize(model.to(torch.float16), "cpu")


def test_a_real_input_that_changed_since_is_seen():
    table = torch.arange(3.0)
    with OnDevice(torch.float32):
        model = nn.Module()
        model.register_buffer("table", torch.zeros(3))
        model.table.copy_(table)
    table[0] = 9.0
    with pytest.raises(UnrestorableError, match=r"table: .*copy_.* changed in place since"):
        materialize(model, "cpu")


def test_an_array_that_changed_since_does_not_matter():
    numpy = pytest.importorskip("numpy")
    array = numpy.ones(3, numpy.float32)
    with OnDevice(torch.float32):
        model = nn.Module()
        model.register_buffer("table", torch.zeros(3))
        model.table.copy_(torch.from_numpy(array))
        model.register_buffer("other", torch.as_tensor(array))
    array[0] = 9.0
    materialize(model, "cpu")
    assert model.table.tolist() == model.other.tolist() == [1.0, 1.0, 1.0]


def test_a_resized_storage_is_seen_and_earlier_readers_are_not_hurt():
    with OnDevice(torch.float32):
        model = nn.Module()
        model.register_buffer("grown", torch.ones(2))
        model.register_buffer("copy", model.grown + 1)
        model.grown.resize_(5)
    with pytest.raises(UnrestorableError) as caught:
        materialize(model, "cpu")
    assert list(caught.value.reasons) == ["grown"]
    report = materialize(model, "cpu", strict=False)
    assert model.copy.tolist() == [2.0, 2.0]
    assert model.grown.isnan().all()
    assert report.missing == ("grown",)


def test_not_strict_fills_and_reports(caplog):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
        model.register_buffer("count", torch.tensor(3))
    with caplog.at_level(logging.WARNING, logger="ds.ondevice"):
        report = materialize(model, "cpu", strict=False)
    assert report.missing == ("weight", "bias", "count")
    assert model.weight.isnan().all()
    assert model.count.item() == 0
    assert "weight, bias, count" in caplog.text


def test_fallback_initialises_what_is_not_known():
    with torch.device("meta"):
        other = nn.Linear(2, 2)
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.Linear(2, 2), other)
    called = []

    def fallback(module):
        assert not any(p.is_meta for p in model.parameters())
        called.append(module)
        nn.init.constant_(module.weight, 3.0)
        nn.init.zeros_(module.bias)

    report = materialize(model, "cpu", fallback=fallback)
    assert called == [other]
    assert report.initialized == ("1.weight", "1.bias")
    assert report.restored == ("0.weight", "0.bias")
    assert report.missing == ()
    assert model[1].weight.tolist() == [[3.0, 3.0]] * 2


def test_ties_among_unknown_tensors_are_kept():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        model[1].register_buffer("row", model[0].weight.data[0])
    materialize(model, "cpu", fallback=lambda m: m.reset_parameters())
    assert model[1].weight is model[0].weight
    assert model[1].row.data_ptr() == model[0].weight.data_ptr()


def test_a_value_that_construction_never_gave_is_nan_not_garbage(caplog):
    with OnDevice(torch.float32):
        model = nn.Module()
        model.never = nn.Parameter(torch.empty(1000))
        model.ints = nn.Parameter(torch.empty(5, dtype=torch.int32), requires_grad=False)
        model.part = nn.Parameter(torch.empty(4))
        with torch.no_grad():
            model.part[:2] = 1.0
    report = materialize(model, "cpu")
    assert report.uninitialized == ("never", "ints")
    assert model.never.isnan().all()
    assert model.ints.tolist() == [0] * 5
    assert model.part[:2].tolist() == [1.0, 1.0]
    assert model.part[2:].isnan().all()
    assert "never, ints" in caplog.text


def test_init_false_leaves_parameters_for_a_checkpoint_but_computes_buffers():
    eager = Everything()
    with OnDevice(torch.float32):
        model = Everything()
    state = torch.get_rng_state()
    report = materialize(model, "cpu", init="empty")
    assert model.transformer.encoder.layers[0].linear1.weight.isnan().all()
    assert set(report.uninitialized) >= {name for name, _ in model.named_parameters()}
    for name in ("rotary.inv_freq", "mask", "batchnorm.running_var"):
        assert torch.equal(model.get_buffer(name), eager.get_buffer(name))
    assert model.head.weight is model.embedding.weight
    model.load_state_dict(eager.state_dict())
    assert torch.equal(model.rows, eager.rows)
    assert not torch.equal(torch.get_rng_state(), state)  # spectral norm has a random buffer, the rest drew nothing


def test_init_false_draws_nothing_that_no_buffer_needs():
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    state = torch.get_rng_state()
    materialize(model, "cpu", init="empty")
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].running_var.tolist() == [1.0] * 3


# Arguments


def test_lazy_parameters_are_refused():
    with OnDevice(torch.float32):
        model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(UnrestorableError, match=r"0\.weight: it is a lazy parameter"):
        materialize(model, "cpu", strict=False)


@pytest.mark.parametrize("device", ["meta", "nowhere", None])
def test_wrong_device(device):
    with pytest.raises(ValueError, match="device must"):
        materialize(nn.Linear(1, 1), device)


def test_wrong_module_and_fallback():
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module or a tensor, not list"):
        materialize([torch.zeros(1)], "cpu")
    with pytest.raises(TypeError, match="fallback must be a function"):
        materialize(nn.Linear(1, 1), "cpu", fallback=True)


@pytest.mark.parametrize("init", [True, False, None, "Replay", 1])
def test_wrong_init(init):
    with pytest.raises(TypeError, match="init must be 'replay', 'reset' or 'empty'"):
        materialize(nn.Linear(1, 1), "cpu", init=init)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int32, float])
def test_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch\.dtype"):
        materialize(nn.Linear(1, 1), "cpu", dtype=dtype)


def test_dtype_casts_as_module_to_does():
    with OnDevice(torch.float32, device="meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
        model[2].weight = model[0].weight
        model.extra = nn.Linear(2, 2, device="cpu")
    torch.manual_seed(0)
    report = materialize(model, "cpu", dtype=torch.bfloat16)
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    for name, expected in eager.state_dict().items():
        assert model.state_dict()[name].dtype is expected.dtype, name
        assert torch.equal(model.state_dict()[name], expected), name
    assert model[2].weight is model[0].weight
    assert model.extra.weight.dtype is torch.bfloat16
    assert report.moved == ("extra.weight", "extra.bias")


def test_reset_calls_reset_parameters_and_computes_the_rest():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.full((3,), 0.5))
            self.register_buffer("table", torch.arange(3), persistent=False)

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3))
    with OnDevice(torch.float32, device="meta"):
        model.append(Scaled())
    torch.manual_seed(0)
    report = materialize(model, "cpu", init="reset")
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    assert torch.equal(model[0].weight, first.weight)
    assert torch.equal(model[1].linear.bias, second.bias)
    assert model[1].scale.tolist() == [0.5] * 3
    assert report.initialized == ("0.weight", "0.bias", "1.linear.weight", "1.linear.bias")
    assert report.restored == ("1.scale", "1.table")


def test_a_parameter_that_no_reset_reaches_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.ParameterList([nn.Parameter(torch.ones(1))]))
    with pytest.raises(UnrestorableError) as error:
        materialize(model, "cpu", init="reset")
    assert list(error.value.reasons) == ["1.0"]


def test_progress_tells_all_bytes():
    told = []
    with OnDevice(torch.float32, device="meta"):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False))
    materialize(model, "cpu", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2 * 256 + 4 * 32 + 8,) * 2
    assert told == sorted(told)


def test_the_report_and_the_error_take_one_screen():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(300)))
    with pytest.raises(UnrestorableError) as error:
        materialize(model, "cpu")
    assert len(str(error.value).splitlines()) < 30
    assert "and 580 more: it was not made inside" in str(error.value)
    assert len(error.value.reasons) == 600
    text = str(materialize(model, "cpu", strict=False))
    assert "missing 600: 0.weight, 0.bias" in text
    assert len(text) < 1000


def test_shared_memory_is_shared():
    with OnDevice(torch.float32, device="meta"):
        model = nn.Linear(4, 4).share_memory()
        model.table = torch.zeros(3).share_memory_()
        model.table[1] = 2
    torch.manual_seed(0)
    materialize(model, "cpu")
    assert model.weight.is_shared()
    assert model.table.is_shared()
    assert model.table.tolist() == [0, 2, 0]
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(4, 4).weight)


def test_a_tensor_filled_twice_takes_no_memory_twice(replay_peak):
    with OnDevice(torch.float32, device="meta"):
        layers = [nn.Linear(100, 100, bias=False) for _ in range(20)]
        for layer in layers:
            nn.init.normal_(layer.weight)
        shards = nn.ParameterList([layer.weight.data[:5].clone() for layer in layers])
    torch.manual_seed(0)
    eager = [nn.Linear(100, 100, bias=False) for _ in range(20)]
    for layer in eager:
        nn.init.normal_(layer.weight)
    torch.manual_seed(0)
    materialize(shards, "cpu")
    assert 4 * 100 * 100 <= replay_peak() <= 4 * (100 * 100 + 20 * 5 * 100)
    for actual, expected in zip(shards, eager, strict=True):
        assert torch.equal(actual, expected.weight[:5])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_materialized():
    with OnDevice(torch.float32, device="meta"):
        model = torch.jit.script(nn.Linear(2, 2))
    torch.manual_seed(0)
    materialize(model, "cpu")
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(2, 2).weight)


class Reinterpreted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bits", torch.arange(4, dtype=torch.int32).view(torch.float32))
        self.register_buffer("parts", torch.view_as_real(torch.ones(2, dtype=torch.cfloat)))
        self.register_buffer("whole", torch.ones(4))
        self.register_buffer("integers", self.whole.view(torch.int32))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_that_is_seen_as_another_dtype(dtype):
    with OnDevice(torch.float32, device="meta"):
        model = Reinterpreted()
    materialize(model, "cpu", dtype=dtype)
    eager = Reinterpreted() if dtype is None else Reinterpreted().to(dtype)
    for name, expected in eager.state_dict().items():
        if dtype is None or name != "integers":
            assert torch.equal(model.state_dict()[name], expected), name
