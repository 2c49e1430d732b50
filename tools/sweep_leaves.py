"""Look for leaf candidates in every model type of Hugging Face transformers, and write what is found as a table.

Each type is built on meta from its default configuration with few layers and four experts; plain, with LoRA on all
linear layers, and with LoRA on the parameters that hold several experts. Whether a type has mixtures is taken from
its configuration and its class names, not from what is found.

    python tools/sweep_leaves.py docs/leaf-sweep.md
    python tools/sweep_leaves.py - mixtral llama
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from ds_z3leaf import find_leaf_candidates
from torch import nn

# Every rank uses all of the experts of these, so that they need no leaf.
ALL_USED = {
    "doge": "its experts are rows of two embeddings, which every rank looks up",
    "vitpose": "its forward calls all of its experts and masks what they put out",
    "vitpose_backbone": "its forward calls all of its experts and masks what they put out",
}
SECONDS = 60  # for one type
LAYERS, EXPERTS = 4, 4
_LAYER_KEYS = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers|num_encoder_layers"
    r"|depth|layers)$"
)
_EXPERT_KEYS = re.compile(r"^(moe_|encoder_|decoder_)?(num|n)_(local_|routed_|text_)?experts$|^num_moe_experts$")
_TOP_KEYS = re.compile(r"^(num_experts_per_(tok|token)|moe_top_?k|moe_k|num_selected_experts|top_k_experts)$")
_GROUP_KEYS = re.compile(r"^(n_group|topk_group|num_expert_groups?)$")
_SWITCHES = re.compile(r"^(is_moe|use_moe|enable_moe\w*)$")
_DENSE_FIRST = re.compile(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|first_k_dense_layers)$")
_SIZE_KEYS = re.compile(r"^(moe|expert)_intermediate_size$")
_CLASSES = re.compile(r"Experts|(Mo[eE]|SparseMLP|Mo[eE]Block|Mo[eE]Layer|Mo[eE]MLP|MoA)$")
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# What a class reads and its configuration has no default for.
_NEEDED: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", *["sparse"] * 47]},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 32},
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 64,
        "talker_config.spatial_merge_size": 2,
    },
    "qwen4_exp": {f"text_config.{key}": value for key, value in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
}


@dataclass
class Found:
    """What the sweep found for one model type.

    Attributes:
        kind: the model type.
        mixture: whether its configuration has several experts and a class of its modules says so.
        blocks: for each class of blocks, the class, the first block's name, their number, the first block's reason.
        names: the blocks' names, for each way of building; None where that could not be built, with `errors`.
        errors: why a way of building failed.
    """

    kind: str
    mixture: bool = False
    modules: int = 0
    blocks: list[tuple[str, str, int, str]] = field(default_factory=list)
    names: dict[str, list[str] | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def same(self, way: str) -> str:
        """Whether a way of building gives the same names as the plain model: yes, NO, or - where there is none."""
        if self.names.get(way) is None:
            return "-"
        return "yes" if self.names[way] == self.names["plain"] else "NO"


def model_types() -> list[str]:
    """All types that have a configuration."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def sweep_one(kind: str, ways: tuple[str, ...] = ("plain", "lora", "parameters")) -> Found:
    """Build one type in each way and look for candidates; never raises."""
    found = Found(kind)
    for way in ways:
        try:
            with _time_out(SECONDS):
                model = build(kind)
                found.mixture = found.mixture or is_mixture(model)
                found.modules = found.modules or sum(1 for _ in model.modules())
                adapted = adapt(model, way)
                if adapted is None:
                    continue
                candidates = find_leaf_candidates(adapted)
        except Exception as error:  # one type of hundreds
            found.names[way] = None
            found.errors[way] = f"{type(error).__name__}: {_cleaned(str(error))[:160]}"
            if way == "plain":
                break
            continue
        found.names[way] = [_plain(candidate.name) for candidate in candidates]
        if way == "plain":
            for name in dict.fromkeys(type(candidate.module).__name__ for candidate in candidates):
                alike = [candidate for candidate in candidates if type(candidate.module).__name__ == name]
                found.blocks.append((name, alike[0].name, len(alike), alike[0].reason))
    return found


def build(kind: str) -> nn.Module:
    """The base model of a type on meta: small if its configuration allows that, of its default size if not."""
    last: Exception | None = None
    for configuration in _configurations(kind):
        try:
            for path, value in _NEEDED.get(kind, {}).items():
                *holders, key = path.split(".")
                setattr(functools.reduce(getattr, holders, configuration), key, value)
            with torch.device("meta"):
                return _model_class(configuration)(configuration)
        except Exception as error:
            last = error
    raise last or RuntimeError("no configuration can be made")


def adapt(model: nn.Module, way: str) -> nn.Module | None:
    """The model as it is, or with LoRA; None where nothing can be adapted in that way."""
    if way == "plain":
        return model
    from peft import LoraConfig, get_peft_model

    if way == "lora":
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    targets = sorted(
        {
            name
            for name, param in model.named_parameters()
            if param.dim() == 3 and param.shape[0] > 1 and re.search("expert", name)
        }
    )
    return get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets)) if targets else None


def is_mixture(model: nn.Module) -> bool:
    """Whether the configuration has several experts and a module's class says so too."""
    classes = {type(module).__name__ for module in model.modules()}
    return _has_experts(model.config.to_dict()) and any(_CLASSES.search(name) for name in classes)


def missed_types(results: list[Found]) -> list[str]:
    """Types with mixtures in which no block was found, those left out of which every rank uses all experts."""
    return [
        result.kind
        for result in results
        if result.mixture and result.names.get("plain") == [] and result.kind not in ALL_USED
    ]


def false_alarms(results: list[Found]) -> list[Found]:
    """Types without mixtures in which a block was found."""
    return [result for result in results if not result.mixture and result.blocks]


def changed_types(results: list[Found]) -> list[str]:
    """Types in which adapters change the blocks' names."""
    return [result.kind for result in results if "NO" in (result.same("lora"), result.same("parameters"))]


def table(results: list[Found], took: float) -> str:
    """The results as a page."""
    built = [result for result in results if result.names.get("plain") is not None]
    mixtures = [result for result in built if result.mixture]
    dense = [result for result in built if not result.mixture]
    used = [result.kind for result in mixtures if not result.blocks and result.kind in ALL_USED]
    missed, alarms = missed_types(results), false_alarms(results)
    changed = changed_types(results)
    import peft
    import transformers

    lines = [
        "# Leaf candidates in transformers' model types",
        "",
        "`python tools/sweep_leaves.py docs/leaf-sweep.md` wrote this page. It builds a model of every type on meta,",
        "with few layers and four experts where the configuration allows that, and calls `find_leaf_candidates` on it:",
        "plain, with LoRA on all linear layers, and with LoRA on the parameters that hold several experts",
        "(`target_parameters`). Whether a type has mixtures is taken from its configuration and its class names.",
        "",
        f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__.split('+')[0]}; "
        f"{took / 60:.0f} minutes on CPU.",
        "",
        "| | types |",
        "|---|---|",
        f"| listed | {len(results)} |",
        f"| built | {len(built)} |",
        f"| with mixtures | {len(mixtures)} |",
        f"| of them where every rank uses all experts, so that no block is wanted | {len(used)}{_listed(used)} |",
        f"| of them missed | {len(missed)}{_listed(missed)} |",
        f"| without mixtures | {len(dense)} |",
        f"| of them with a block found all the same | {len(alarms)}{_listed([result.kind for result in alarms])} |",
        f"| other blocks under LoRA | {len(changed)}{_listed(changed)} |",
        "",
        "## Mixtures",
        "",
        'One row for each class of block. "same" means the same module names as in the plain model.',
        "",
        "| type | block class | blocks | reason | same under LoRA | same under `target_parameters` |",
        "|---|---|---|---|---|---|",
    ]
    for result in [*mixtures, *alarms]:
        same = f"{result.same('lora')} | {result.same('parameters')}"
        for name, first, count, reason in result.blocks:
            lines.append(f"| {result.kind} | {name} | {count} (`{first}`, ...) | {_escaped(reason)} | {same} |")
        if not result.blocks:
            lines.append(f"| {result.kind} | none | 0 | {ALL_USED.get(result.kind, 'missed')} | {same} |")
    unbuilt = [result for result in results if result.names.get("plain") is None]
    parts = [result.kind for result in unbuilt if "no model takes" in result.errors.get("plain", "")]
    failed = [result for result in unbuilt if result.kind not in parts]
    lines += [
        "",
        "## Not built",
        "",
        f"{len(parts)} types are parts of other models and have no model class of their own.",
    ]
    lines += ["", "| type | why |", "|---|---|"]
    lines += [f"| {result.kind} | {_escaped(result.errors.get('plain', ''))} |" for result in failed]
    adapters = [(result.kind, way, why) for result in built for way, why in result.errors.items()]
    lines += ["", "## Not adapted by peft", "", "| type | way | why |", "|---|---|---|"]
    lines += [f"| {kind} | {way} | {_escaped(why)} |" for kind, way, why in adapters]
    return "\n".join(lines) + "\n"


def _configurations(kind: str) -> Iterator[Any]:
    from transformers import AutoConfig

    default = AutoConfig.for_model(kind)
    for changes in (
        _changes(default, layers=True, experts=True),
        _changes(default, layers=False, experts=True),
        _changes(default, layers=True, experts=False),
        {},
    ):
        try:
            yield type(default)(**copy.deepcopy(changes))
        except Exception:  # a configuration that checks its own sizes
            continue


def _model_class(configuration: Any) -> Any:
    """The base model's class, or for types without one the first other that takes this configuration."""
    from transformers.models.auto import modeling_auto

    mappings = [
        modeling_auto.MODEL_MAPPING,
        *(mapping for name, mapping in vars(modeling_auto).items() if name.endswith("_MAPPING")),
    ]
    for mapping in mappings:
        if type(configuration) in mapping:
            found = mapping[type(configuration)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise LookupError(f"no model takes a {type(configuration).__name__}")


def _changes(config: Any, *, layers: bool, experts: bool) -> dict[str, Any]:
    """Arguments of a configuration class that differ from the default."""
    changes: dict[str, Any] = {}
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            if inner := _changes(value, layers=layers, experts=experts):
                changes[key] = {"model_type": value.model_type, **inner} if value.model_type else inner
        elif isinstance(value, bool):
            if experts and _SWITCHES.match(key):
                changes[key] = True
        elif experts and _EXPERT_KEYS.match(key):
            changes[key] = EXPERTS
        elif experts and (_TOP_KEYS.match(key) or _GROUP_KEYS.match(key)) and (value is None or isinstance(value, int)):
            changes[key] = 1 if _GROUP_KEYS.match(key) else 2
        elif isinstance(value, int) and layers and _LAYER_KEYS.match(key):
            changes[key] = min(value, LAYERS)
        elif isinstance(value, int) and _DENSE_FIRST.match(key):
            changes[key] = min(value, 1)
        elif value is None and experts and _SIZE_KEYS.match(key):
            changes[key] = 64
    return changes


def _has_experts(config: dict[str, Any]) -> bool:
    for key, value in config.items():
        if isinstance(value, dict) and _has_experts(value):
            return True
        if isinstance(key, str) and _EXPERT_KEYS.match(key) and isinstance(value, int) and value > 1:
            return True
    return False


def _plain(name: str) -> str:
    return re.sub(r"^base_model\.model\.?", "", name)


def _listed(kinds: list[str]) -> str:
    return f" ({', '.join(kinds)})" if kinds else ""


def _cleaned(text: str) -> str:
    """A message in one line, without the path of the environment, and with the entries of a set of names in order."""
    text = re.sub(r"'[^' ]*/site-packages/", "'", " ".join(text.split()))
    return re.sub(r"\{('[^{}:]*')\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


@contextlib.contextmanager
def _time_out(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: list[str]) -> None:
    """Sweep the types that are named, or all of them, and write or print the page."""
    if not arguments:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")
    started = time.time()
    results = []
    for kind in arguments[1:] or model_types():
        results.append(sweep_one(kind))
        result = results[-1]
        note = [name for name, *_ in result.blocks] or result.errors.get("plain", "nothing")
        print(
            kind,
            "mixture" if result.mixture else "dense",
            note,
            result.same("lora"),
            result.same("parameters"),
            flush=True,
        )
    page = table(results, time.time() - started)
    if arguments[0] == "-":
        print(page)
    else:
        Path(arguments[0]).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
