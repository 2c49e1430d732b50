"""Small DeepSpeed engines on CPUs, the same every time, and what trains them."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# LOCAL_SIZE: were it the world size, DeepSpeed would take its shared-memory collectives, and compile more for it.
ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
TIMEOUT = 280.0  # the first start on a machine compiles DeepSpeed's communication operator
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "bf16opt": 1}


class Net(nn.Module):
    """Sizes that no number of ranks divides, a frozen parameter, one that can be left out, and one used twice."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        first, second, third = 5 * width, 7 * width, 11 * width
        self.a = nn.Linear(first, second)
        self.b = nn.Linear(second, third)
        self.frozen = nn.Parameter(torch.randn(3, third), requires_grad=False)
        self.c = nn.Linear(third, first, bias=False)
        self.tied = nn.Linear(third, first, bias=False)
        self.tied.weight = self.c.weight
        self.scale = nn.Parameter(torch.randn(1))
        self.extra = nn.Parameter(torch.randn(13))

    def forward(self, x: torch.Tensor, extra: bool = True) -> torch.Tensor:
        hidden = torch.tanh(self.b(torch.tanh(self.a(x)))) + self.frozen[0]
        out = (self.c(hidden) + self.tied(hidden * 0.5)) * self.scale
        if extra:
            out = out + self.extra.square().sum()
        return out.float().square().mean()


@dataclass(frozen=True)
class Case:
    """One way to make an engine.

    Attributes:
        stage: a key of `STAGES`; ``"bf16opt"`` is what makes DeepSpeed take its BF16_Optimizer.
        dtype: a key of `DTYPES`.
        gas: micro batches in an optimizer step.
        offload: whether the optimizer is kept on the CPU by DeepSpeed's offloading.
        zero: more of the section ``zero_optimization``.
        config: more of the configuration.
        zero_init: whether the model is made under `deepspeed.zero.Init`.
        width: what the matrices' sizes are multiplied by.
    """

    stage: str
    dtype: str = "fp32"
    gas: int = 1
    offload: bool = False
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False
    width: int = 1

    def __str__(self) -> str:
        words = [self.stage, self.dtype, f"gas{self.gas}", "offload" * self.offload, "init" * self.zero_init]
        return "-".join([*filter(None, words), *self.zero, *self.config])

    @property
    def lp(self) -> torch.dtype:
        """The model's dtype."""
        return DTYPES[self.dtype]

    @property
    def is_zero3(self) -> bool:
        """Whether parameters are partitioned."""
        return self.stage == "zero3"


def configuration(case: Case) -> dict[str, Any]:
    """What `deepspeed.initialize` is given."""
    zero: dict[str, Any] = {"stage": STAGES[case.stage], "reduce_bucket_size": 1000}
    if case.is_zero3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 500}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.gas,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 unless told
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero | case.zero,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32" if case.stage == "bf16opt" else "bf16"}
    if case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}
    return config | case.config


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without; the frozen parameter among them."""
    matrices = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
    rest = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]


def make_engine(
    case: Case,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    lr: float = 0.05,
    net: type[Net] = Net,
) -> Any:
    """An engine over all ranks, which all must call it."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    gc.freeze()  # DeepSpeed collects garbage at each start: leave out what was imported
    warnings.simplefilter("ignore")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if case.dtype == "fp16":  # the CPU accelerator refuses it, though it works
        get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    config = configuration(case)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=case.zero_init):
        model = net(case.width)
    made = deepspeed.initialize(
        model=model, optimizer=optimizer(groups_of(model), lr=lr), config=config, dist_init_required=False
    )
    return made[0]


def batch(step: int, micro: int, rank: int, width: int = 1) -> torch.Tensor:
    """A rank's micro batch, (4, 5 * width), fp32."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    return torch.randn(4, 5 * width, generator=generator)


def backward(engine: Any, step: int, micro: int = 0, *, extra: bool = True) -> None:
    """Forward and backward of one micro batch."""
    dtype, width = next(param for param in engine.module.parameters()).dtype, engine.module.a.in_features // 5
    engine.backward(engine(batch(step, micro, dist.get_rank(), width).to(dtype), extra=extra))


def train(engine: Any, step: int) -> None:
    """One optimizer step with all of its micro batches."""
    for micro in range(engine.gradient_accumulation_steps()):
        backward(engine, step, micro)
        engine.step()


def trained(engine: Any) -> dict[str, torch.Tensor]:
    """The parameters that DeepSpeed trains, by name."""
    return {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
