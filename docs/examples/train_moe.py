"""Train a sharded mixed-precision mixture-of-experts model with all seven packages, and prove what they say.

    python docs/examples/train_moe.py                    # bf16 weights, fp32 masters cut over the ranks
    python docs/examples/train_moe.py --engine fsdp2     # the same on PyTorch's FSDP2

It starts its own ranks through torchrun: one a GPU where there are GPUs, else two on the CPU. The text is the Python
standard library's own sources. Half-way the output layer is set to zero through ds-fragment: the loss must jump to
ln 256, and training must recover. At the end one consolidated file is written, loaded into a dense model on one rank,
and the loss is compared.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ds_numa

BOUND = ds_numa.bind() if "LOCAL_RANK" in os.environ else None  # before torch counts the cores

import ds_fragment  # noqa: E402
import ds_logging  # noqa: E402
import ds_z3leaf  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (optimizers import it; once a process group exists, that can abort torch 2.13 at exit)
import torch.distributed as dist  # noqa: E402
from ds_fragment.tensor_fragment import (  # noqa: E402
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
)
from ds_groups import ParallelTopology  # noqa: E402
from ds_loader import RepeatingLoader  # noqa: E402
from ds_logging import instrument_w_nvtx, log_dist  # noqa: E402
from ds_ondevice import OnDevice, materialize  # noqa: E402
from moe_model import ByteTransformer, MixtureOfExperts  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torch.utils.data.distributed import DistributedSampler  # noqa: E402

CONTEXT = 128


class StandardLibrary(Dataset[torch.Tensor]):
    """Windows of the standard library's source text: uint8 bytes as int64, (CONTEXT + 1,)."""

    def __init__(self, max_bytes: int) -> None:
        text = bytearray()
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text += path.read_bytes()
            if len(text) >= max_bytes:
                break
        self.text = torch.frombuffer(text, dtype=torch.uint8)[:max_bytes]

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()


class FlatEngine:
    """bf16 weights on every rank; fp32 masters and optimizer state cut over the ranks by `FlatPartition`."""

    dtype = torch.bfloat16

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, lr: float) -> None:
        self.partition = ds_fragment.FlatPartition(model.parameters(), group)
        self.optimizer = torch.optim.AdamW([self.partition.hp_param], lr=lr)
        log_dist(f"engine: {self.partition}")

    def reduce(self) -> None:
        """Average the gradients."""
        self.partition.reduce_gradients()

    def step(self) -> None:
        """Update the masters, then the weights."""
        self.optimizer.step()
        self.partition.publish()


class Fsdp2Engine:
    """fp32 parameters cut over the ranks by FSDP2, computed with in bf16; one unit for each block and each MoE."""

    dtype = torch.float32

    def __init__(self, model: nn.Module, topology: Any, lr: float) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = topology.to_device_mesh("dp")
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        ds_z3leaf.fully_shard_leaves(model, mesh=mesh, mp_policy=policy)
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        log_dist(f"engine: FSDP2 over {mesh}")

    def reduce(self) -> None:
        """FSDP2 has reduced the gradients in the backward pass."""

    def step(self) -> None:
        """Update the sharded parameters."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Everything that one rank does."""
    bar, console = progress_bar(options.steps)
    ds_logging.configure("INFO", console=console)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log_dist(f"{world_size} ranks on {device.type}, backend {dist.get_backend()}, torch {torch.__version__}")
    log_dist(f"cores: {BOUND}", ranks=[-1])

    topology = ParallelTopology(world_size).bind()
    group = topology.group("dp")
    log_dist(f"groups: {topology.topology}")

    torch.manual_seed(0)
    dtype = FlatEngine.dtype if options.engine == "flat" else Fsdp2Engine.dtype
    with OnDevice(dtype, device="meta"):
        model = ByteTransformer(context=CONTEXT)
    report = materialize(model, device)
    count = sum(param.numel() for param in model.parameters())
    log_dist(f"model: {count:,} parameters in {dtype}, {len(report.restored)} tensors materialized on {device}")

    ds_z3leaf.set_z3_leaf_modules(model, [MixtureOfExperts])
    log_dist(f"leaves: {len(ds_z3leaf.get_z3_leaf_modules(model))} mixture-of-experts blocks are kept whole")

    engine = (
        FlatEngine(model, group, options.lr) if options.engine == "flat" else Fsdp2Engine(model, topology, options.lr)
    )
    ds_fragment.attach(model, engine.optimizer)
    log_dist(f"who holds what, seen from rank 0:\n{str(ds_fragment.describe(model)).splitlines()[2]}\n...")

    data = StandardLibrary(options.bytes)
    sampler: DistributedSampler[torch.Tensor] = DistributedSampler(data, world_size, rank, shuffle=True, drop_last=True)
    loader = RepeatingLoader(DataLoader(data, batch_size=options.batch, sampler=sampler, drop_last=True))
    log_dist(f"data: {len(data):,} windows of {CONTEXT} bytes of Python, {len(loader)} batches an epoch and rank")

    losses = []
    surgery = options.steps // 2
    with bar as advance:
        for step, loss in enumerate(steps(model, engine, loader, options, device)):
            losses.append(loss)
            advance(loss)
            if step + 1 == surgery:
                before = safe_get_full_fp32_param(model.head.weight)
                safe_set_full_fp32_param(model.head.weight, torch.zeros_like(before))
                log_dist(f"step {step + 1}: set the fp32 master of head.weight to zero, |w| was {before.norm():.3f}")
            if step == surgery:
                ok = abs(loss - math.log(256)) < 0.02  # and the little that is added for unused experts
                log_dist(f"step {step + 1}: the loss is {loss:.4f}, ln 256 = {math.log(256):.4f}: {verdict(ok)}")
    log_dist(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}; the loader is in epoch {loader.epoch}")
    finish(model, losses, surgery, data, options, device, dtype)
    topology.close()


def steps(
    model: nn.Module, engine: Any, loader: Any, options: argparse.Namespace, device: torch.device
) -> Iterator[float]:
    """Train, yielding the loss of each step, averaged over the ranks; look at the sharded run now and then."""

    @instrument_w_nvtx
    def step(text: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(text)
        loss.backward()
        engine.reduce()
        return loss.detach()

    for number in range(options.steps):
        warmup = min(1.0, (number + 1) / 20)
        engine.optimizer.param_groups[0]["lr"] = options.lr * warmup * (1 - 0.9 * number / options.steps)
        loss = step(next(loader).to(device))
        dist.all_reduce(loss)
        if number % max(1, options.steps // 6) == 1:
            look(model, number)
        engine.step()
        yield float(loss) / dist.get_world_size()


def look(model: Any, number: int) -> None:
    """Read true values, gradients and optimizer state of the sharded run; all ranks take part."""
    used = ds_fragment.available(model, "grad")  # experts that no token went to have no gradient
    norms = ds_fragment.norms(used, "grad")
    total = math.sqrt(sum(norm * norm for norm in norms.values()))
    largest = max(norms, key=lambda name: norms[name])
    weight = model.head.weight
    value, grad = safe_get_full_fp32_param(weight), safe_get_full_grad(weight)
    state = safe_get_full_optimizer_state(weight, "exp_avg_sq")
    log_dist(
        f"step {number + 1}: gradient norm {total:.3f}, most of it in {largest} ({len(used)} parameters used); "
        f"head.weight: |w| {value.norm():.3f}, |g| {grad.norm():.3f}, mean exp_avg_sq {state.mean():.2e}"
    )


def finish(
    model: nn.Module,
    losses: list[float],
    surgery: int,
    data: StandardLibrary,
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Write the pictures and the consolidated file, and prove that a dense model computes the same."""
    out = Path(options.out)
    text = torch.stack([data[i] for i in range(8)]).to(device)
    model.eval()
    with torch.no_grad():
        sharded_loss = float(model(text))
    ds_fragment.save_full(model, out / "model.safetensors", progress=True)
    if dist.get_rank() != 0:
        return
    plot_loss(losses, surgery, out / "loss.png")
    ds_fragment.plot_partition(model, out / "partition.png", title=f"{options.engine}: which rank holds what")

    from safetensors.torch import load_file

    with torch.device(device):  # its rotary tables are computed where the sharded model's were
        dense = ByteTransformer(context=CONTEXT)
    dense.load_state_dict(load_file(out / "model.safetensors", device=str(device)))
    dense.to(torch.bfloat16).eval()
    with torch.no_grad():
        dense_loss = float(dense(text))
    same = dense_loss == sharded_loss
    log_dist(f"dense model from the file: loss {dense_loss!r}, sharded run: {sharded_loss!r}: {verdict(same)}")
    for name in ("loss.png", "partition.png", "model.safetensors"):
        log_dist(f"wrote {out / name} ({(out / name).stat().st_size:,} bytes)")
    if not same or (len(losses) >= 60 and losses[-1] > 0.75 * losses[0]):
        raise SystemExit("the run did not do what it promises: see above")


def verdict(ok: bool) -> str:
    """Plain words."""
    return "as it must be" if ok else "WRONG"


def plot_loss(losses: list[float], surgery: int, path: Path) -> None:
    """The training loss, with the step at which the head was set to zero."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses)
    axes.axhline(math.log(256), color="0.6", linestyle=":", label="ln 256: knows nothing")
    if surgery < len(losses):
        axes.axvline(surgery + 1, color="tab:red", linestyle="--", label="head.weight set to zero in fp32")
    axes.set(xlabel="step", ylabel="loss, nats a byte", title="A sharded MoE on the standard library's sources")
    axes.legend()
    figure.savefig(path, dpi=150)


def progress_bar(total: int) -> tuple[Any, Any]:
    """A context that gives a function to call with each step's loss, and the console that logs share with it."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    if dist.get_rank() != 0:
        return contextlib.nullcontext(lambda loss: None), console

    @contextlib.contextmanager
    def shown() -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("training", total=total)
            yield lambda loss: bar.update(task, advance=1, description=f"training, loss {loss:.3f}")

    return shown(), console


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", choices=("flat", "fsdp2"), default="flat", help="who cuts the model (flat)")
    parser.add_argument("--ranks", type=int, help="processes; one a GPU, or 2 without GPUs, unless told")
    parser.add_argument("--out", default="demo-output", help="folder for the results (demo-output)")
    parser.add_argument("--steps", type=int, default=120, help="training steps (120)")
    parser.add_argument("--batch", type=int, default=8, help="windows a step and rank (8)")
    parser.add_argument("--bytes", type=int, default=160_000, help="how much text (160000)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (0.003)")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    options.ranks = options.ranks or max(gpus, 1) if gpus else options.ranks or 2
    if options.steps < 4:
        parser.error(f"--steps is {options.steps}, expected at least 4")
    if gpus and options.ranks > gpus:
        parser.error(f"--ranks is {options.ranks}, but there are {gpus} GPUs: one rank each")
    return options


def main() -> None:
    """Start the ranks, or be one."""
    options = parse()
    if "LOCAL_RANK" not in os.environ:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        os.execve(sys.executable, [sys.executable, *launcher, *sys.argv], environment)
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = time.perf_counter()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(options, device)
        log_dist(f"done in {time.perf_counter() - started:.0f} s")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
