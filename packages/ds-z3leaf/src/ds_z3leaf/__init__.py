"""Keep mixture-of-experts blocks whole under ZeRO-3 and FSDP2."""

from ds_z3leaf import leaf
from ds_z3leaf.__about__ import __version__
from ds_z3leaf._candidates import find_leaf_candidates
from ds_z3leaf._choose import plan_leaves
from ds_z3leaf._fine_grained import find_fine_grained
from ds_z3leaf._fsdp import fully_shard_leaves
from ds_z3leaf._plan import LeafCandidate, LeafPlan
from ds_z3leaf._rehearse.rehearse import check, rehearse
from ds_z3leaf._rehearse.stage import Rehearsal
from ds_z3leaf._report import LeafReport, LeafRow, leaf_report
from ds_z3leaf._select import Selection, select_modules
from ds_z3leaf._watch.watcher import watch
from ds_z3leaf.errors import (
    LeafError,
    LeafHangError,
    LeafNotFoundError,
    LeafOrderError,
    LeafRehearsalError,
    LeafShardError,
    LeafTypeError,
    LeafValueError,
)
from ds_z3leaf.leaf import (
    apply_zero_leaf_module_config,
    get_z3_leaf_modules,
    mark_leaves,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
    z3_leaves,
)

__all__ = [
    "LeafCandidate",
    "LeafError",
    "LeafHangError",
    "LeafNotFoundError",
    "LeafOrderError",
    "LeafPlan",
    "LeafRehearsalError",
    "LeafReport",
    "LeafRow",
    "LeafShardError",
    "LeafTypeError",
    "LeafValueError",
    "Rehearsal",
    "Selection",
    "__version__",
    "apply_zero_leaf_module_config",
    "check",
    "find_fine_grained",
    "find_leaf_candidates",
    "fully_shard_leaves",
    "get_z3_leaf_modules",
    "leaf",
    "leaf_report",
    "mark_leaves",
    "rehearse",
    "plan_leaves",
    "select_modules",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "watch",
    "z3_leaf_module",
    "z3_leaf_parameter",
    "z3_leaves",
]


def __dir__() -> list[str]:
    """The public names and those with an underscore."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})
