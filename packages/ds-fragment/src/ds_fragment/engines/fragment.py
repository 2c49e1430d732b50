"""Where a low-precision parameter's fp32 copy lies in this rank's flat partition.

[Note: words] *lp* is the low-precision parameter that the model computes with, *hp* its fp32 master. A *flat
partition* is a rank's 1-D slice of the concatenated hp parameters; a *fragment* the overlap of one parameter with one
rank's partition; an *address* its (start, numel) in elements.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_fragment.errors import GradientUnavailableError, StateKeyError, StateNotReadyError, UnlinkedParameterError
from ds_fragment.layout import overlap


@dataclass
class fragment_address:
    """Where a fragment is: ``numel`` elements from element ``start`` on."""

    numel: int
    start: int


class tensor_fragment:
    """The overlap of one lp parameter with this rank's flat hp partition.

    It holds the lp parameter, the flat partition and the gradient table weakly, so that a model never keeps its
    optimizer's memory alive; a tensor that is assigned to `hp_fragment` is held as it is.

    Args:
        lp_fragment: the overlap as a view of the lp parameter, 1-D.
        lp_fragment_address: where it begins in the flattened lp parameter.
        hp_fragment: the same elements in the flat hp partition, 1-D.
        hp_fragment_address: where they begin in the flat hp partition.
        gradient_dict: gradients of this rank's fragments: ``gradient_dict[param_group_index][index]``, 1-D.
        offload_gradient_dict: the same for an offloaded optimizer.
        use_offload: which of the two to read.
        param_group_index: the parameter group.
        optim_fragment: optimizer state of this fragment by key, views of the flat state, 1-D; None before the first
            step.
    """

    _lp: Callable[[], torch.Tensor]
    _hp: Callable[[], torch.Tensor]

    def __init__(
        self,
        lp_fragment: torch.Tensor,
        lp_fragment_address: fragment_address,
        hp_fragment: torch.Tensor,
        hp_fragment_address: fragment_address,
        gradient_dict: Any,
        offload_gradient_dict: Any,
        use_offload: bool,
        param_group_index: int,
        optim_fragment: dict[str, Any] | None = None,
    ) -> None:
        self.lp_fragment_address = lp_fragment_address
        self.hp_fragment_address = hp_fragment_address
        self.gradient_dict = gradient_dict
        self.offload_gradient_dict = offload_gradient_dict
        self.use_offload = use_offload
        self.param_group_index = param_group_index
        self.optim_fragment = optim_fragment
        self.lp_fragment, self.hp_fragment = lp_fragment, hp_fragment

    @property
    def lp_fragment(self) -> torch.Tensor:
        """This rank's part of the lp parameter, 1-D, a view."""
        return self._lp()

    @lp_fragment.setter
    def lp_fragment(self, value: torch.Tensor) -> None:
        self._lp = lambda: value

    @property
    def hp_fragment(self) -> torch.Tensor:
        """The same elements in fp32, 1-D, a view of the flat partition."""
        return self._hp()

    @hp_fragment.setter
    def hp_fragment(self, value: torch.Tensor) -> None:
        self._hp = lambda: value

    def update_hp(self) -> None:
        """Write the lp values into the fp32 fragment."""
        self.hp_fragment.data.copy_(self.lp_fragment.data)

    def update_lp(self) -> None:
        """Write the fp32 values into the lp fragment, rounded to nearest even."""
        self.lp_fragment.data.copy_(self.hp_fragment.data)

    def get_hp_fragment_address(self) -> fragment_address:
        """Where the fragment begins in the flat partition, and its length."""
        return self.hp_fragment_address

    def get_optim_state_keys(self) -> list[str]:
        """The names of the optimizer's state.

        Raises:
            StateNotReadyError: the optimizer has not stepped yet.
        """
        return list(self._states())

    def get_optim_state_fragment(self, key: str) -> Any:
        """This rank's part of one optimizer state: 1-D, a view; whole unless it has one number an element.

        Raises:
            StateNotReadyError: the optimizer has not stepped yet.
            StateKeyError: it keeps no such state.
        """
        states = self._states()
        if key not in states:
            raise StateKeyError(f"optim_state_key '{key}' is not kept by the optimizer; it keeps {sorted(states)}")
        return states[key]

    def set_optim_state_fragment(self, flat_hp_partition: torch.Tensor, optim_fragment: Mapping[str, Any]) -> None:
        """Link the optimizer's state: tensors as long as the flat partition are cut to the fragment, others kept."""
        address = self.hp_fragment_address
        self.optim_fragment = {
            key: state.narrow(0, address.start, address.numel)
            if torch.is_tensor(state) and state.shape == flat_hp_partition.shape
            else state
            for key, state in optim_fragment.items()
        }

    def get_hp_fragment(self, optim_state_key: str | None = None) -> Any:
        """The fp32 fragment, or that of an optimizer state."""
        return self.hp_fragment if optim_state_key is None else self.get_optim_state_fragment(optim_state_key)

    def get_lp_grad_fragment(self, index_in_param_group: int) -> torch.Tensor:
        """This rank's part of the reduced gradient, 1-D.

        Raises:
            GradientUnavailableError: the table holds none for the parameter.
        """
        table = self.offload_gradient_dict if self.use_offload else self.gradient_dict
        try:
            found: torch.Tensor | None = table[self.param_group_index][index_in_param_group]
        except (KeyError, IndexError, TypeError, ReferenceError):  # the last: the table is held weakly, and gone
            found = None
        if found is None:
            raise GradientUnavailableError(
                f"no reduced gradient of parameter {index_in_param_group} of group {self.param_group_index} is kept "
                "now: it is there between the reduction and the optimizer's step"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        """The fields as DeepSpeed pickles them, tensors and all."""
        held = {"lp_fragment": self.lp_fragment, "hp_fragment": self.hp_fragment}
        return held | {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take the fields of one that this package or DeepSpeed pickled."""
        for name, value in state.items():
            setattr(self, name, value)

    def _states(self) -> dict[str, Any]:
        if self.optim_fragment is None:
            raise StateNotReadyError(
                "the optimizer state is not linked: take one optimizer step, then call "
                "lazy_init_hp_params_optimizer_state"
            )
        return self.optim_fragment

    def __repr__(self) -> str:
        return f"tensor_fragment(lp={self.lp_fragment_address}, hp={self.hp_fragment_address})"


def _weak_slice(source: torch.Tensor, start: int, numel: int, what: str) -> Callable[[], torch.Tensor]:
    """A function that returns the elements of a flattened tensor, as long as somebody else holds that."""
    reference = weakref.ref(source)

    def tensor() -> torch.Tensor:
        held = reference()
        if held is None:
            raise UnlinkedParameterError(f"{what} of this fragment is gone: its owner was deleted")
        return held.data.view(-1).narrow(0, start, numel)

    return tensor


def get_hp_fragment_mapping(
    lp_param: torch.Tensor,
    lp_start: int,
    flat_hp_partition: torch.Tensor,
    gradient_dict: Any,
    offload_gradient_dict: Any,
    use_offload: bool,
    param_group_index: int,
    partition_start: int,
    partition_size: int,
) -> tensor_fragment | None:
    """The fragment of one lp parameter in this rank's partition; no communication.

    Args:
        lp_param: the parameter, contiguous, any shape; held weakly.
        lp_start: where it begins in the concatenation of its group's parameters, in elements.
        flat_hp_partition: this rank's slice of that concatenation in fp32, 1-D; held weakly.
        gradient_dict, offload_gradient_dict, use_offload, param_group_index: see `tensor_fragment`.
        partition_start: where this rank's slice begins.
        partition_size: its length, padding included.

    Returns:
        The fragment, or None where this rank holds no part of the parameter.
    """
    start, numel = overlap(lp_start, lp_param.numel(), partition_start, partition_size)
    if numel == 0:
        return None
    lp = fragment_address(numel, start - lp_start)
    hp = fragment_address(numel, start - partition_start)
    fragment = tensor_fragment(
        lp_param.data.view(-1).narrow(0, lp.start, numel),
        lp,
        flat_hp_partition.data.narrow(0, hp.start, numel),
        hp,
        gradient_dict,
        offload_gradient_dict,
        use_offload,
        param_group_index,
    )
    fragment._lp = _weak_slice(lp_param, lp.start, numel, "the low-precision parameter")
    fragment._hp = _weak_slice(flat_hp_partition, hp.start, numel, "the flat fp32 partition")
    return fragment


def map_to_flat_opt_states(
    flat_hp_tensor: torch.Tensor,
    lp_tensors: Sequence[torch.Tensor],
    optim_state: dict[Any, dict[str, Any]],
    opt_keys: Sequence[str],
) -> None:
    """Bring optimizer state that is linked by fragment back into flat tensors, and link the fragments to those.

    A checkpoint loader calls it after each fragment's state was replaced. No communication.

    Args:
        flat_hp_tensor: this rank's flat partition, 1-D, the key into ``optim_state``.
        lp_tensors: the linked parameters of the partition's group.
        optim_state: the optimizer's ``state``; ``optim_state[flat_hp_tensor]`` is written.
        opt_keys: which states to flatten; each becomes as long as the partition, zero where nothing is linked.

    Raises:
        StateKeyError: a fragment lacks one of the states; nothing was written then.
    """
    mappings = (getattr(param, "_hp_mapping", None) for param in lp_tensors)
    fragments = [mapping for mapping in mappings if mapping is not None]
    pieces = {key: [fragment.get_optim_state_fragment(key) for fragment in fragments] for key in opt_keys}
    for key in opt_keys:
        flat = torch.zeros_like(flat_hp_tensor.data)
        for fragment, piece in zip(fragments, pieces[key], strict=True):
            address = fragment.get_hp_fragment_address()
            fragment.optim_fragment[key] = flat.narrow(0, address.start, address.numel).copy_(piece)
        optim_state.setdefault(flat_hp_tensor, {})[key] = flat
