"""The compiled kernels: found, loaded, and described argument by argument. A failed load is a reason, not an error."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

from ds_fragment.errors import FragmentError

ABI = 3  # DSF_ABI of csrc/ds_fragment.h
WORKSPACE_BYTES = 65536  # DSF_WORKSPACE
MIXED = 0xFE  # DSF_MIXED
LIBRARY = Path(__file__).with_name("libds_fragment.so")
PATH_VARIABLE = "DS_FRAGMENT_LIBRARY"


class KernelError(FragmentError, RuntimeError):
    """The CUDA kernels were asked for and cannot run, or a launch failed; the message says why."""


class Work(ctypes.Structure):
    """dsf_work: a table in device memory, and how to run it."""

    _fields_ = (
        ("table", c_void_p),
        ("pieces", c_uint64),
        ("chunks", c_uint64),
        ("groups", c_uint32),  # vectors in a chunk
        ("blocks", c_uint32),  # at most; 0: as many as fit
        ("device", c_int32),
        ("kind", c_uint32),  # of all pieces, or MIXED
        ("stream", c_void_p),
        ("dst_base", c_uint64),  # added to the table's addresses; 0, as those are absolute
        ("src_base", c_uint64),
    )


_work = POINTER(Work)
_u64s = c_void_p  # the address of 64-bit numbers on the host
_device = c_void_p  # an address in device memory

# name: (what it returns, its arguments); the names are those of csrc/ds_fragment.h. Where int is returned, 0 is good.
SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    "dsf_abi": (c_int, ()),
    "dsf_architectures": (c_char_p, ()),
    "dsf_toolkit": (c_int, ()),
    "dsf_driver": (c_int, (POINTER(c_int),)),  # version
    "dsf_devices": (c_int, (POINTER(c_int),)),  # count
    "dsf_ready": (c_int, (c_int,)),  # device
    "dsf_capturing": (c_int, (c_void_p,)),  # stream
    "dsf_error": (c_char_p, (c_int,)),  # code
    # n, dsts, srcs, numels, kinds (n bytes), groups, align_source, out (host), bytes, need; returns chunks, or -1
    "dsf_plan": (
        c_int64,
        (c_int64, _u64s, _u64s, _u64s, c_char_p, c_uint32, c_int, c_void_p, c_uint64, POINTER(c_uint64)),
    ),
    # device, host, bytes, zeroed, out
    "dsf_keep": (c_int, (c_int, c_void_p, c_uint64, c_uint64, POINTER(c_void_p))),
    "dsf_copy": (c_int, (_work,)),
    # work, scale, scale_at, accumulate, stats, found_inf, workspace
    "dsf_gather_grads": (c_int, (_work, c_float, _device, c_int, _device, _device, _device)),
    "dsf_norm": (c_int, (_work, _device, _device)),  # work, stats, workspace
    "dsf_publish": (c_int, (_work, c_uint64, _device)),  # work, seed, seed_at
}


@dataclass(frozen=True)
class Loaded:
    """The library, or the reason why it could not be loaded."""

    path: Path
    library: ctypes.CDLL | None
    reason: str | None
    _ready: dict[int, str | None] = field(default_factory=dict, compare=False)  # by device, see `why_not`

    @property
    def architectures(self) -> str:
        """What it was compiled for, such as ``sm_80 sm_90 compute_90``."""
        return "" if self.library is None else str(self.library.dsf_architectures().decode())

    @property
    def toolkit(self) -> str:
        """The CUDA release that it was compiled with."""
        return "" if self.library is None else _release(self.library.dsf_toolkit())

    @property
    def driver(self) -> str:
        """The newest CUDA release that the installed driver runs; empty without a driver."""
        version = c_int(0)
        if self.library is None or self.library.dsf_driver(ctypes.byref(version)) != 0 or version.value == 0:
            return ""
        return _release(version.value)

    def why_no_device(self) -> str | None:
        """Why no CUDA device can be used, or None if there is one."""
        if self.library is None:
            return self.reason
        if not self.driver:
            return "no CUDA driver is installed"
        count = c_int(0)
        code = self.library.dsf_devices(ctypes.byref(count))
        if code != 0:
            return f"no CUDA device: {self.error(code)}"
        return None if count.value else "no CUDA device"

    def error(self, code: int) -> str:
        """What CUDA says of an error code."""
        assert self.library is not None
        return f"{self.library.dsf_error(code).decode()} (CUDA error {code})"

    def why_not(self, device: int) -> str | None:
        """Why the kernels do not run on a device, or None if they do; the driver is asked once."""
        if self.library is None:
            return self.reason
        if device not in self._ready:
            code = self.library.dsf_ready(device)
            built = f"; the library holds {self.architectures}, compiled with CUDA {self.toolkit}"
            reason = f"cuda:{device} cannot run them: {self.error(code)}{built}" if code else None
            self._ready[device] = reason
        return self._ready[device]

    def check(self, code: int, what: str) -> None:
        """Raise `KernelError` with what CUDA says, unless the code is 0."""
        if code != 0:
            raise KernelError(f"{what} failed: {self.error(code)}")


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def load(path: Path) -> Loaded:
    """Load the library at a path; a failure becomes the reason."""
    if not path.is_file():
        return Loaded(
            path,
            None,
            f"{path.name} is not in this installation: it was built without nvcc (a pure wheel, or a source tree); "
            "install a wheel for this platform, or build one with DS_FRAGMENT_BUILD_CUDA=1",
        )
    try:
        library = ctypes.CDLL(str(path))
        library.dsf_abi.restype, library.dsf_abi.argtypes = c_int, []
        if (found := library.dsf_abi()) != ABI:
            reason = f"{path.name} has interface {found} where this version needs {ABI}: reinstall ds-fragment"
            return Loaded(path, None, reason)
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
    except OSError as error:
        return Loaded(path, None, f"{path.name} could not be loaded: {error}")
    except AttributeError as error:
        return Loaded(path, None, f"{path.name} is not the library of this version: {error}; reinstall ds-fragment")
    return Loaded(path, library, None)


@functools.cache
def loaded() -> Loaded:
    """The library of this installation, or the one that the variable DS_FRAGMENT_LIBRARY names; loaded once."""
    return load(Path(os.environ.get(PATH_VARIABLE) or LIBRARY))
