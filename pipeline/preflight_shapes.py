"""What a node multiplies and whom it talks to in a preflight: a model's sizes in, matrices out; nodes in, pairs out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

from pipeline.shape import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """[rows, inner] times [inner, columns]."""

    name: str
    rows: int
    columns: int
    inner: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.inner

    @property
    def values(self) -> int:
        """Numbers in all three matrices."""
        return self.rows * self.inner + self.inner * self.columns + self.rows * self.columns


def squares(*, on_gpu: bool) -> list[Gemm]:
    """Whose best rate is the ceiling. Azure's guide takes 8192 as well, and 16384, for which an idle engine leaves no memory."""
    return [Gemm(name=f"{size}³", rows=size, columns=size, inner=size) for size in ((4096, 8192) if on_gpu else (1024, 2048))]


def part_of(shape: Shape, devices: int) -> Shape:
    """What one of a replica's devices computes of each layer: heads and intermediate columns are shared, the hidden state is not."""
    return replace(
        shape,
        heads=max(1, shape.heads // devices),
        kv_heads=max(1, shape.kv_heads // devices),
        intermediate=max(1, shape.intermediate // devices),
        vocab=-(-shape.vocab // devices),
    )


def layer_gemms(shape: Shape, *, prefill_rows: int, decode_rows: int) -> list[Gemm]:
    """Of one layer and of the output layer, as an engine computes them: q, k and v in one, gate and up in one.

    The output layer sees a row for each sequence, in prefill too.
    """
    query = shape.heads * shape.head_dim
    sizes = {
        "q, k, v": (query + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        "o": (shape.hidden, query),
        "gate, up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }
    gemms = [
        Gemm(name=f"{name}, {phase}", rows=rows, columns=columns, inner=inner)
        for phase, rows in (("prefill", prefill_rows), ("decode", decode_rows))
        for name, (columns, inner) in sizes.items()
    ]
    return [*gemms, Gemm(name="output layer", rows=decode_rows, columns=shape.vocab, inner=shape.hidden)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Of one layer, over `batch` sequences with `queries` new tokens each and `keys` tokens in all."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def flops(self) -> float:
        """Twice the product with keys and with values; causal, so half of the square where every token is new."""
        half = 0.5 if self.queries == self.keys else 1.0
        return half * 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim

    @property
    def kv_values(self) -> int:
        """Numbers in keys and values, each of which is read once."""
        return 2 * self.batch * self.kv_heads * self.keys * self.head_dim


def attentions(shape: Shape, *, on_gpu: bool, decode_rows: int) -> list[Attention]:
    """A long prompt, and a batch of sequences that get one token each."""
    prompt, context = (4096, 1024) if on_gpu else (1024, 512)
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    return [
        Attention(name="attention, prefill", batch=1, queries=prompt, keys=prompt, **heads),
        Attention(name="attention, decode", batch=decode_rows, queries=1, keys=context, **heads),
    ]


def rounds(num_places: int, most: int) -> list[list[tuple[int, int]]]:
    """Pairs of places that talk at the same time, so that in each round everybody has one partner at most, and never the same twice.

    Of 4 places: (0,3)(1,2), then (0,2)(3,1), then (0,1)(2,3): a round-robin tournament by the circle method.
    """
    circle: list[int | None] = [*range(num_places), *([None] if num_places % 2 else [])]
    found = []
    for _ in range(min(most, len(circle) - 1) if num_places > 1 else 0):
        pairs = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def partners(places: Sequence[int], rank: int, *, most: int) -> list[int | None]:
    """By round, the rank that this one talks to: of another node, at the same position there. On one node alone all ranks are places.

    None where it has no partner in that round.
    """
    alone = len(set(places)) == 1
    own = list(range(len(places))) if alone else list(places)
    firsts = [own.index(place) for place in sorted(set(own))]
    place, position = own[rank], rank - firsts[own[rank]]
    found: list[int | None] = []
    for pairs in rounds(len(firsts), most):
        other = next((b if a == place else a for a, b in pairs if place in (a, b)), None)
        there = None if other is None else firsts[other] + position
        found.append(there if there is not None and there < len(own) and own[there] == other else None)
    return found
