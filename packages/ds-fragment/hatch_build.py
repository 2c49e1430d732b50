"""Compile the CUDA kernels into the wheel where `nvcc` is found, and leave a pure wheel where it is not.

Environment:
    DS_FRAGMENT_BUILD_CUDA: ``1`` makes it an error if the kernels cannot be compiled, ``0`` leaves them out.
    DS_FRAGMENT_CUDA_ARCHS: compute capabilities to compile for, such as ``80;90``; all that are supported unless set.
    NVCC, CUDA_HOME: where the compiler is; else it is looked for on the PATH and in /usr/local/cuda.

``python hatch_build.py`` compiles into the source tree, for work on the kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run by hand
    BuildHookInterface = object

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # machine code for each, and PTX of the newest for what comes after
LIBRARY = "ds_fragment/kernels/libds_fragment.so"


class BuildError(RuntimeError):
    """The kernels were asked for and cannot be compiled."""


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.environ.get("NVCC"), *(str(Path(home, "bin", "nvcc")) for home in homes), "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def architectures(nvcc: str) -> list[int]:
    """The compute capabilities to compile for: what was asked for, or what this project and this nvcc support."""
    asked = os.environ.get("DS_FRAGMENT_CUDA_ARCHS", "")
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    able = {int(found) for found in re.findall(r"sm_(\d+)\b", listed)}
    if not asked:
        return [arch for arch in ARCHITECTURES if arch in able]
    wanted = [int(arch.replace(".", "")) for arch in re.split(r"[;, ]+", asked.strip())]
    unable = [arch for arch in wanted if arch not in able]
    if unable:
        raise BuildError(f"DS_FRAGMENT_CUDA_ARCHS={asked!r} names {unable}, which {nvcc} does not know: {sorted(able)}")
    return wanted


def compile_library(root: Path, out: Path, nvcc: str) -> list[str]:
    """Compile ``csrc`` of the package into one shared library, and return the names of what is inside."""
    archs = architectures(nvcc)
    names = [f"sm_{arch}" for arch in archs] + [f"compute_{max(archs)}"]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{max(archs)},code=compute_{max(archs)}")
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-cudart=static", "--threads=0", *codes]
    command += [f'-DDSF_ARCHITECTURES="{" ".join(names)}"', "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
    command += ["-Xcompiler=-static-libgcc,-static-libstdc++", "-Xlinker=--exclude-libs=ALL,--strip-all"]
    command += ["-o", str(out), str(root / "csrc" / "ds_fragment.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"nvcc failed with code {done.returncode}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return names


def platform_tag(library: Path) -> str:
    """The wheel's platform: manylinux of the newest glibc that the library asks for."""
    plain = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if not plain.startswith("linux_"):
        return plain
    asked = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())]
    return plain.replace("linux", f"manylinux_2_{max([17, *asked])}", 1)


class CudaBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Puts the compiled library into the wheel and names the wheel after its platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is put together."""
        wanted = os.environ.get("DS_FRAGMENT_BUILD_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise BuildError(f"DS_FRAGMENT_BUILD_CUDA={wanted!r}, expected 0, 1 or nothing")
        if wanted == "0":
            self.app.display_info("DS_FRAGMENT_BUILD_CUDA=0: a pure wheel")
            return
        nvcc = find_nvcc()
        if nvcc is None:
            if wanted == "1":
                raise BuildError(
                    "DS_FRAGMENT_BUILD_CUDA=1 but nvcc was not found: put it on the PATH or set CUDA_HOME or NVCC, or "
                    "set DS_FRAGMENT_BUILD_CUDA=0 for a pure wheel"
                )
            self.app.display_info("nvcc was not found: a pure wheel, which uses torch's own operators")
            return
        root = Path(self.root)
        editable = version == "editable"
        self._folder = tempfile.mkdtemp(prefix="ds-fragment-")
        library = root / "src" / LIBRARY if editable else Path(self._folder, Path(LIBRARY).name)
        try:
            names = compile_library(root, library, nvcc)
        except (BuildError, OSError, subprocess.SubprocessError) as error:
            if wanted == "1":
                raise
            self.app.display_warning(f"the CUDA kernels did not compile, so this is a pure wheel: {error}")
            return
        self.app.display_info(f"compiled the CUDA kernels with {nvcc} for {' '.join(names)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(library)}"
        if not editable:
            build_data["force_include"][str(library)] = LIBRARY

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called by hatchling when the wheel is done."""
        shutil.rmtree(getattr(self, "_folder", ""), ignore_errors=True)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    compiler = find_nvcc()
    if compiler is None:
        sys.exit("nvcc was not found: put it on the PATH or set CUDA_HOME or NVCC")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "src" / LIBRARY
    print(f"{target}: {' '.join(compile_library(here, target, compiler))}")
