"""The parameters of the models that are measured."""

from __future__ import annotations

Shape = tuple[int, ...]


def shapes_of(case: str) -> list[Shape]:
    """The shapes of a case."""
    if case == "mixed":  # 100 parameters, 20 M elements
        return [(1000, 384)] * 50 + [(384,)] * 25 + [(40, 768)] * 25
    if case == "tiny":  # 2,000 tensors of 1,000 elements, where latency rules
        return [(1000,)] * 2000
    if case == "small":  # 600 small tensors, 236 M elements
        return [(768, 512)] * 600
    if case == "llama":
        return llama()
    raise ValueError(f"case is {case!r}, expected mixed, tiny, small or llama")


def llama(layers: int = 16, shrink: int = 1) -> list[Shape]:
    """Llama-3.2-1B: 146 tensors, 1.24 G elements; or one of fewer layers, and of every dimension divided."""
    layer = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
    shapes = [(128256, 2048), *[shape for _ in range(layers) for shape in (*layer, (2048,), (2048,))], (2048,)]
    return [tuple(size // shrink for size in shape) for shape in shapes]
