"""What is trained with DeepSpeed's own modules and with ours: a name, and a function that returns what must be equal.

A scenario returns text in dicts and lists. Values at `READ`'s keys come from DeepSpeed's readers of full values; all
else is read without them. Where DeepSpeed's reader is known to be wrong, `reads` leaves it out and a comment says why.
The file is long because it is one table, with what its rows run beside it.
"""

from __future__ import annotations

import inspect
import logging
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import engines
import torch
import torch.distributed as dist
from engines import Case
from nets import WIDTH, Attention, Chosen, Mixture, Mlp, Sparse, rows
from observe import READ, classes_in, digest, fit, group_ranks, is_leaf, of_all_ranks, read, step
from torch import nn


@dataclass(frozen=True)
class Run:
    """One process of one run.

    Attributes:
        mode: ``"own"`` or ``"ours"``.
        saves: where its checkpoints go.
        loads: the other mode's checkpoints, if there are any yet.
    """

    mode: str
    saves: Path
    loads: Path | None


class Skip(Exception):
    """This DeepSpeed does not have what the scenario needs; the same in both modes."""


Scenario = Callable[[Run], dict[str, Any]]
SCENARIOS: dict[str, Scenario] = {}
NO_GRAD = ("fp32", "exp_avg")


def scenario(name: str) -> Callable[[Scenario], Scenario]:
    """Enter a function under a name."""

    def enter(function: Scenario) -> Scenario:
        SCENARIOS[name] = function
        return function

    return enter


def one_group(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Everything in one group: ZeRO-1 and 2 of DeepSpeed link the state of the first one only, and read no other's."""
    return torch.optim.AdamW([param for group in groups for param in group["params"]], lr=lr)


def engine_case(
    name: str, case: Case, *, reads: Iterable[str] = READ, needs: str | None = None, **options: Any
) -> None:
    """Enter the training of `engines.Net`; ``needs`` is a field of ZeRO's configuration."""

    @scenario(name)
    def train(run: Run) -> dict[str, Any]:
        if case == Case("none", "bf16") and version() < (0, 17):
            raise Skip("without ZeRO, DeepSpeed cannot sum gradients in bf16")
        if needs is not None:
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

            if needs not in DeepSpeedZeroConfig.model_fields:
                raise Skip(f"ZeRO's configuration has no {needs}")
        return train_case(run, case, reads, **options)


def version() -> tuple[int, ...]:
    """DeepSpeed's, as numbers."""
    import deepspeed

    return tuple(int(part) for part in deepspeed.__version__.partition("+")[0].split(".")[:3])


def comparable(case: Case, reads: Iterable[str] = READ) -> list[str]:
    """What is left of ``reads`` where both this DeepSpeed's own reader and ours give a right answer."""
    left = set(reads)
    # BF16_Optimizer keeps the gradients of all parameters; before, DeepSpeed looked a rank's first one up as the first.
    if case.stage == "bf16opt" and version() < (0, 19, 8):
        left.discard("grad")
    # Before, DeepSpeed does not keep what tells these gradients from those of the step before: ours refuses to read.
    if (case.is_zero3 or case.offload) and version() < (0, 19):
        left.discard("grad")
    return [what for what in reads if what in left]


def train_case(
    run: Run, case: Case, reads: Iterable[str], optimizer: Callable[..., torch.optim.Optimizer] = one_group
) -> dict[str, Any]:
    """Make an engine, train it, destroy it."""
    engine = engines.make_engine(case, optimizer)
    # DeepSpeed's reader leaves the loss scale in fp16 gradients, ours takes it out.
    unscale = run.mode == "own" and case.dtype == "fp16" and case.stage != "none"
    found = fit(engine, loss_of(engine), reads=comparable(case, reads), unscale=unscale)
    engine.destroy()
    return {"optimizer": type(engine.optimizer).__name__, **found}


def loss_of(engine: Any, *, extra: Callable[[int], bool] = lambda number: True) -> Callable[[int, int], torch.Tensor]:
    """The loss of `engines.Net`; ``extra`` says in which steps its parameter of that name is used."""
    dtype = next(engine.module.parameters()).dtype

    def loss(number: int, micro: int) -> torch.Tensor:
        x = engines.batch(number, micro, dist.get_rank(), engine.module.a.in_features // 5).to(dtype)
        out: torch.Tensor = engine(x, extra=extra(number))
        return out

    return loss


STATIC = {"fp16": {"enabled": True, "loss_scale": 16.0}}
for stage in ("none", "zero1", "zero2", "zero3"):
    for dtype in ("fp32", "bf16", "fp16"):
        engine_case(f"{stage}-{dtype}", Case(stage, dtype))
    engine_case(f"{stage}-fp16-static", Case(stage, "fp16", config=STATIC))
    if stage != "none":
        engine_case(f"{stage}-accumulation", Case(stage, "bf16", gas=2))
        engine_case(f"{stage}-offload", Case(stage, "bf16", gas=2, offload=True))
        groups = Case(stage, "bf16", gas=2)
        engine_case(f"{stage}-groups", groups, reads=("fp32", "grad"), optimizer=torch.optim.AdamW)
        engine_case(f"{stage}-clipping", Case(stage, "fp32", config={"gradient_clipping": 0.01}))
for stage in ("zero1", "zero2"):
    # DeepSpeed links each parameter to what is another's part of the partition, and its readers fail or answer with it.
    engine_case(f"{stage}-round-robin", Case(stage, "bf16", zero={"round_robin_gradients": True}), reads=())
    aligned = Case(stage, "bf16", gas=2, zero={"parameter_alignment": True})
    engine_case(f"{stage}-alignment", aligned, needs="parameter_alignment")
engine_case("bf16-optimizer", Case("bf16opt", "bf16", gas=2))
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
engine_case("zero2-fp32-sums", Case("zero2", "bf16", gas=2, config=FP32_SUMS))
engine_case("zero3-fp32-sums", Case("zero3", "bf16", gas=2, config=FP32_SUMS))
engine_case("zero3-init", Case("zero3", "bf16", zero_init=True))
engine_case("zero3-persistent", Case("zero3", "bf16", zero={"stage3_param_persistence_threshold": 30}))


def unused_parameter(stage: str) -> Scenario:
    """A parameter has no part in every other step."""

    def train(run: Run) -> dict[str, Any]:
        engine = engines.make_engine(Case(stage, "bf16"), one_group)
        # No gradients: with ZeRO-3 DeepSpeed reads what the unused parameter's was in an earlier step.
        found = fit(engine, loss_of(engine, extra=lambda number: number % 2 == 1), steps=4, reads=NO_GRAD)
        engine.destroy()
        return found

    return train


def writing(stage: str, dtype: str) -> Scenario:
    """Values, state and gradients are written before a step, which takes them from there."""

    def train(run: Run) -> dict[str, Any]:
        from deepspeed import utils

        case = Case(stage, dtype, width=2)
        if "grad" not in comparable(case):
            raise Skip("ours does not read gradients of ZeRO-3 before DeepSpeed 0.19")
        # With ZeRO-3 DeepSpeed can write parameters only whose size the number of ranks divides.
        engine = engines.make_engine(case, one_group)
        found = {"before": fit(engine, loss_of(engine), steps=2)}
        params = dict(engine.module.named_parameters())
        # After the forward pass: DeepSpeed writes the fp32 values only, ours the model's weights as well.
        engine.backward(loss_of(engine)(2, 0))
        for name in ("a.weight", "b.weight", "c.weight"):
            value, grad = utils.safe_get_full_fp32_param(params[name]), utils.safe_get_full_grad(params[name])
            utils.safe_set_full_fp32_param(params[name], value * 0.75)
            utils.safe_set_full_optimizer_state(params[name], torch.full_like(value, 0.125), "exp_avg")
            utils.safe_set_full_grad(params[name], grad * 0.5)
        step(engine)
        found["after"] = {what: read(engine, what) for what in NO_GRAD}
        found["last"] = fit(engine, loss_of(engine), steps=1, start=4)
        engine.destroy()
        return found

    return train


for stage in ("zero1", "zero2", "zero3"):
    SCENARIOS[f"{stage}-unused-parameter"] = unused_parameter(stage)
    SCENARIOS[f"{stage}-writing"] = writing(stage, "bf16")


def start(model: nn.Module, config: dict[str, Any], params: Any = None, **options: Any) -> Any:
    """An engine of another model than `engines.Net`."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    optimizer = torch.optim.AdamW(model.parameters() if params is None else params, lr=0.05)
    made = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False, **options)
    return made[0]


def with_rows(engine: Any, *shape: int, together: bool = False) -> Callable[[int, int], torch.Tensor]:
    """The loss of one of `nets`; ``together`` gives every rank the same rows."""
    dtype = next(engine.module.parameters()).dtype

    def loss(number: int, micro: int) -> torch.Tensor:
        out: torch.Tensor = engine(rows(10 * number + micro, 0 if together else dist.get_rank(), *shape).to(dtype))
        return out

    return loss


def experts(stage: str, dtype: str, ep_size: int) -> Scenario:
    """DeepSpeed's mixture of experts."""

    def train(run: Run) -> dict[str, Any]:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        torch.manual_seed(dist.get_rank())  # experts of each rank's own; the engine makes the rest equal
        model = Mixture(ep_size)
        groups = split_params_into_different_moe_groups_for_optimizer(
            [{"params": list(model.parameters()), "name": "all"}]
        )
        engine = start(model, engines.configuration(Case(stage, dtype)), groups)
        # No state: DeepSpeed links that of the first parameter group only.
        found = fit(engine, with_rows(engine, 8), reads=("fp32", "grad"))
        found |= {what: of_all_ranks(found[what]) for what in ("fp32", "grad")}  # experts differ from rank to rank
        engine.destroy()
        return found | {"weights": of_all_ranks(found["weights"]), "groups": group_ranks()}

    return train


for stage in ("zero1", "zero2"):
    for size in (1, 2):
        SCENARIOS[f"{stage}-experts-{size}"] = experts(stage, "bf16", size)


def leaves(way: str) -> Scenario:
    """ZeRO-3 with modules taken as one, whose experts are chosen by data."""

    def train(run: Run) -> dict[str, Any]:
        import deepspeed
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        config = engines.configuration(Case("zero3", "bf16"))
        torch.manual_seed(0)
        model = Sparse()
        if way == "config":
            if "leaf_module" not in DeepSpeedZeroConfig.model_fields:
                raise Skip("ZeRO's configuration has no leaf_module")
            config["zero_optimization"]["leaf_module"] = {"classes": ["Chosen"]}
        else:
            found = deepspeed.utils.set_z3_leaf_modules(model, [Chosen])
            assert found == list(model.blocks)
        engine = start(model, config)
        marked = [name for name, module in model.named_modules() if is_leaf(module)]
        # No gradients: DeepSpeed reads an earlier step's where an expert was not chosen.
        result = fit(engine, with_rows(engine, 1 + dist.get_rank()), steps=4, reads=NO_GRAD)
        engine.destroy()
        return result | {"marked": marked}

    return train


SCENARIOS["zero3-leaves-config"] = leaves("config")
SCENARIOS["zero3-leaves-set"] = leaves("set")


@scenario("on-device-meta")
def on_device_meta(run: Run) -> dict[str, Any]:
    """A model made on the meta device, then filled."""
    import deepspeed

    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        model = nn.Sequential(nn.Linear(WIDTH, 7), nn.LayerNorm(7), nn.Embedding(3, 2), Mlp())
        # DeepSpeed's leaves torch.rand and the like where they are, ours does not: not compared.
        made = [torch.empty(3), torch.zeros(3), torch.ones(3), torch.full((3,), 1.0)]
    seen = {name: f"{param.device} {param.dtype}" for name, param in model.named_parameters()}
    outside = torch.empty(3)
    model = model[3].to_empty(device="cpu")
    for param in model.parameters():
        nn.init.normal_(param, generator=torch.Generator().manual_seed(param.numel()))
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="cpu"):
        torch.manual_seed(3)
        seen["cpu"] = digest(nn.Linear(3, 5).parameters())
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta", enabled=False):
        seen["off"] = str(nn.Linear(1, 1).weight.device)
    engine = start(model, engines.configuration(Case("zero1", "bf16")))
    found = fit(engine, with_rows(engine, 2))
    engine.destroy()
    return found | {"seen": seen, "made": [f"{tensor.device} {tensor.dtype}" for tensor in (*made, outside)]}


def checkpoint(stage: str, dtype: str) -> Scenario:
    """Saved and loaded, by itself and by the other mode; ``went on`` is the engine that was saved."""

    def train(run: Run) -> dict[str, Any]:
        name, case = f"{stage}-{dtype}", Case(stage, dtype)
        engine = engines.make_engine(case, one_group)
        fit(engine, loss_of(engine), steps=2, reads=())
        if not hasattr(engine.optimizer, "dp_process_group"):
            raise Skip(f"DeepSpeed takes its {type(engine.optimizer).__name__}, and cannot load what that saved")
        engine.save_checkpoint(str(run.saves / name), tag="plain")
        found = {"went on": fit(engine, loss_of(engine), start=2, steps=2, reads=comparable(case))}
        engine.destroy()
        found["loaded"] = resume(case, run.saves / name, "plain")
        if run.loads is not None:
            found["crossed"] = resume(case, run.loads / name, "plain")
        found["classes"] = classes_in(run.saves / name / "plain")
        return found

    return train


def resume(case: Case, folder: Path, tag: str, reads: Iterable[str] = READ) -> dict[str, Any]:
    """Two more steps from a checkpoint."""
    engine = engines.make_engine(case, one_group)
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    assert path is not None
    found = fit(engine, loss_of(engine), start=2, steps=2, reads=comparable(case, reads))
    engine.destroy()
    return found


def universal(stage: str) -> Scenario:
    """The checkpoint of `checkpoint`, made universal and loaded."""

    def train(run: Run) -> dict[str, Any]:
        from deepspeed.checkpoint import ds_to_universal

        case = Case(stage, "bf16")
        folder = run.saves / f"{stage}-bf16"
        if dist.get_rank() == 0:
            ds_to_universal.main(
                Namespace(
                    input_folder=str(folder / "plain"),
                    output_folder=str(folder / "universal"),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
        dist.barrier()
        wanted = replace(case, config={"checkpoint": {"load_universal": True}})
        # No values: DeepSpeed 0.19.6 reads optimizer state in their place after it has loaded it; `held` has them.
        reads = ("grad", "exp_avg")
        found = {"loaded": resume(wanted, folder, "universal", reads), "classes": classes_in(folder / "universal")}
        if run.loads is not None:
            found["crossed"] = resume(wanted, run.loads / f"{stage}-bf16", "universal", reads)
        return found

    return train


for stage in ("zero1", "zero2", "zero3", "bf16opt"):
    SCENARIOS[f"checkpoint-{stage}"] = checkpoint(stage, "bf16")
for stage in ("zero1", "zero2", "zero3"):
    SCENARIOS[f"universal-{stage}"] = universal(stage)


# What DeepSpeed, torch and these scenarios call without deepspeed.comm: only ours records it.
PAST_DEEPSPEED = ("all_gather", "all_gather_object")


@scenario("comms-log")
def comms_log(run: Run) -> dict[str, Any]:
    """The communication log: what it counts by name, message size and number."""
    import deepspeed
    from deepspeed.comm import comm

    found: dict[str, Any] = {}
    for debug in (False, True):
        comm.comms_logger.comms_dict = {}
        log = {"enabled": True, "verbose": False, "prof_all": True, "debug": debug}
        for stage in ("zero2", "zero3"):
            case = Case(stage, "bf16", config={"comms_logger": log})
            found[f"{stage} {debug}"] = train_case(run, case, ())
        counted = comm.comms_logger.comms_dict
        counts = {
            name: {str(size): row[0] for size, row in sizes.items()}
            for name, sizes in counted.items()
            if name not in PAST_DEEPSPEED
        }
        found[f"counted {debug}"] = of_all_ranks(counts)
        if "return_dict" in inspect.signature(deepspeed.comm.log_summary).parameters:
            summary = deepspeed.comm.log_summary(return_dict=True)
            found[f"summary {debug}"] = {
                name: {str(size): row["count"] for size, row in sizes.items()}
                for name, sizes in summary["summary"].items()
                if name not in PAST_DEEPSPEED
            }
            found[f"keys {debug}"] = sorted(summary)
            deepspeed.comm.log_summary(show_straggler=True)  # DeepSpeed counts what this communicates; 0.16 fails of it
        deepspeed.comm.log_summary()
    comm.comms_logger.enabled = comm.comms_logger.debug = False
    return found


@scenario("hpz")
def hpz(run: Run) -> dict[str, Any]:
    """Secondary partitions of ZeRO-3's parameters. From here on DeepSpeed's module has a group for them."""
    from deepspeed.utils import groups

    case = Case("zero3", "bf16", zero={"zero_hpz_partition_size": 2}, zero_init=True)
    found = train_case(run, case, READ)
    names = ("rank_in_mygroup", "group_world_size", "group_ranks")
    ranks = {name: getattr(groups, f"_get_zero_param_intra_parallel_{name}")() for name in names}
    return found | {"groups": of_all_ranks({name: str(value) for name, value in ranks.items()})}


def forget_mpu() -> None:
    """Take back what an engine told DeepSpeed's module for good."""
    from deepspeed.utils import groups

    groups.mpu = groups.mesh_device = None


@scenario("ulysses-mesh-data")
def ulysses_mesh_data(run: Run) -> dict[str, Any]:
    """A mesh of two data parallel ranks."""
    return ulysses_mesh(2, 1)


@scenario("ulysses-mesh-sequence")
def ulysses_mesh_sequence(run: Run) -> dict[str, Any]:
    """A mesh of two sequence parallel ranks."""
    return ulysses_mesh(1, 2)


def ulysses_mesh(data: int, sequence: int) -> dict[str, Any]:
    """Sequence parallelism from sizes in the configuration."""
    from deepspeed import comm

    sizes = {"data_parallel_size": data, "sequence_parallel_size": sequence}
    torch.manual_seed(0)
    mesh = comm.initialize_mesh_device((data, sequence), ("data_parallel", "sequence_parallel"))
    model = Attention(mesh.get_group(mesh_dim="sequence_parallel"))
    engine = start(model, engines.configuration(Case("zero1", "bf16", config=sizes)))
    found = fit(engine, with_rows(engine, 1, 4))
    found |= {"groups": group_ranks(), "weights": of_all_ranks(found["weights"])}
    engine.destroy()
    forget_mpu()
    return found


@scenario("ulysses-mpu")
def ulysses_mpu(run: Run) -> dict[str, Any]:
    """Sequence parallelism from DeepSpeed's own module for its groups."""
    try:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu
    except ModuleNotFoundError:
        raise Skip("DeepSpeed has no module for sequence parallel groups") from None
    mpu.initialize_sequence_parallel(2)
    found: dict[str, Any] = {}
    for stage in ("zero1", "zero2", "zero3"):
        torch.manual_seed(0)
        model = Attention(mpu.get_sequence_parallel_group())
        engine = start(model, engines.configuration(Case(stage, "bf16")), mpu=mpu)
        found[stage] = fit(engine, with_rows(engine, 1, 4), reads=comparable(Case(stage)))
        found[stage]["weights"] = of_all_ranks(found[stage]["weights"])
        engine.destroy()
    found["groups"] = group_ranks()
    forget_mpu()
    return found


@scenario("tensor-parallel")
def tensor_parallel(run: Run) -> dict[str, Any]:
    """AutoTP over both ranks. From here on DeepSpeed's module has tensor parallel groups."""
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.utils import groups

    if "partition_config" not in TPTrainingConfig.model_fields:
        raise Skip("AutoTP's configuration has no partition_config")
    specs = [
        {"patterns": [r".*up_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*down_proj\.weight$"], "partition_type": "row"},
    ]
    tensor = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    config = engines.configuration(Case("zero1", "bf16", config={"tensor_parallel": tensor}))
    torch.manual_seed(0)
    engine = start(nn.Sequential(Mlp()), config)
    result = fit(engine, with_rows(engine, 2, together=True))
    found = {what: of_all_ranks(value) for what, value in result.items()}  # the ranks have parts of the layers
    found["groups"] = of_all_ranks(
        [
            dist.get_process_group_ranks(groups.get_tensor_model_parallel_group()),
            dist.get_process_group_ranks(groups.get_data_parallel_group()),
            groups.get_tensor_model_parallel_rank(),
            groups.get_tensor_model_parallel_src_rank(),
        ]
    )
    engine.destroy()
    forget_mpu()
    return found
