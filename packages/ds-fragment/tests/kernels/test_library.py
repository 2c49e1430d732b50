"""The library: found, loaded, described, and what is said when it is not."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ds_fragment.kernels import KernelError, library as _library
from ds_fragment.kernels.library import SIGNATURES, Loaded, Work, load

HEADER = (Path(__file__).parents[2] / "csrc" / "ds_fragment.h").read_text()
C_TYPES = {
    "int": ctypes.c_int, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64, "float": ctypes.c_float, "const char*": ctypes.c_char_p,
    "const uint8_t*": ctypes.c_char_p, "const dsf_work*": ctypes.POINTER(Work), "int*": ctypes.POINTER(ctypes.c_int),
    "void**": ctypes.POINTER(ctypes.c_void_p), "uint64_t*": ctypes.POINTER(ctypes.c_uint64),
}  # fmt: skip


def declared() -> dict[str, tuple[str, list[str]]]:
    """What the header declares: name -> (result, argument types)."""
    text = re.sub(r"//[^\n]*", "", HEADER)
    found = {}
    for result, name, arguments in re.findall(r"DSF_API\s+([\w ]+\*?)\s*\b(dsf_\w+)\(([^)]*)\)", text):
        kinds = [re.sub(r"\s*\w+$", "", a.strip()) for a in arguments.split(",") if a.strip() != "void"]
        found[name] = (result.strip(), [re.sub(r"\s+", " ", kind) for kind in kinds])
    return found


def test_the_table_agrees_with_the_header() -> None:
    header = declared()
    assert set(header) == set(SIGNATURES)
    for name, (result, arguments) in SIGNATURES.items():
        c_result, c_arguments = header[name]
        assert C_TYPES[c_result] is result, name
        assert len(c_arguments) == len(arguments), name
        for c, python in zip(c_arguments, arguments, strict=True):
            assert C_TYPES.get(c, ctypes.c_void_p) is python, (name, c)


def test_the_constants_agree_with_the_header() -> None:
    numbers = dict(re.findall(r"#define (DSF_\w+) (\w+)", HEADER))
    assert int(numbers["DSF_ABI"]) == _library.ABI
    assert int(numbers["DSF_WORKSPACE"]) == _library.WORKSPACE_BYTES
    assert int(numbers["DSF_MIXED"].rstrip("u"), 16) == _library.MIXED
    fields = re.search(r"typedef struct \{(.*?)\} dsf_work", HEADER, re.DOTALL)
    assert fields is not None
    assert re.findall(r"(\w+);", fields[1]) == [name for name, *_ in Work._fields_]
    assert ctypes.sizeof(Work) == 64


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    found = load(tmp_path / "libds_fragment.so")
    assert found.library is None
    assert found.reason is not None
    assert "not in this installation" in found.reason
    assert "DS_FRAGMENT_BUILD_CUDA=1" in found.reason
    assert found.why_not(0) == found.why_no_device() == found.reason
    assert (found.architectures, found.toolkit, found.driver) == ("", "", "")


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "libds_fragment.so"
    path.write_bytes(b"not a library")
    found = load(path)
    assert found.library is None
    assert "libds_fragment.so could not be loaded" in str(found.reason)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int other(void) { return 0; }", r"is not the library of this version: .*dsf_abi"),
        ("int dsf_abi(void) { return 99; }", rf"has interface 99 where this version needs {_library.ABI}"),
        (f"int dsf_abi(void) {{ return {_library.ABI}; }}", r"is not the library of this version"),
    ],
)
def test_another_library_is_a_reason(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "a.c").write_text(source)
    path = tmp_path / "libds_fragment.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(tmp_path / "a.c")], check=True)
    found = load(path)
    assert found.library is None
    assert re.search(reason, str(found.reason))
    assert "reinstall ds-fragment" in str(found.reason)


def test_the_compiled_library_loads_and_says_what_it_is(library: Loaded) -> None:
    assert library.library is not None
    assert re.fullmatch(r"(sm_\d+ )+compute_\d+", library.architectures)
    assert re.fullmatch(r"1[2-9]\.\d+", library.toolkit)


def test_without_a_device_the_library_says_so(library: Loaded) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert library.why_no_device() is not None
    assert re.search(r"no CUDA (driver|device)", str(library.why_no_device()))
    reason = str(library.why_not(0))
    assert reason.startswith("cuda:0 cannot run them: ")
    assert "CUDA error" in reason
    assert f"the library holds {library.architectures}" in reason


def test_a_failed_launch_raises_what_cuda_says(library: Loaded) -> None:
    library.check(0, "the copy kernel")
    with pytest.raises(KernelError, match=r"the copy kernel failed: invalid argument \(CUDA error 1\)"):
        library.check(1, "the copy kernel")


def test_a_launch_without_a_device_returns_an_error(library: Loaded) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert library.library is not None
    assert library.library.dsf_copy(ctypes.byref(Work(0, 0, 1, 1, 0, 0, _library.MIXED, 0))) != 0
    assert library.library.dsf_keep(0, None, 0, 16, ctypes.byref(ctypes.c_void_p())) != 0
    assert library.library.dsf_capturing(None) == 0
