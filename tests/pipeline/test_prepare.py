"""Recipes, and names that say what went in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.hardware import known_sizes
from pipeline.prepare import PRECISIONS
from pipeline.prepare import Recipe
from pipeline.prepare import prepared_digest
from pipeline.prepare import recipe_for
from pipeline.prepare import room_bytes
from pipeline.shape import known_shape

SOURCE = {"weights": "a", "tokenizer": "b", "chat_template": "c"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_has_a_recipe(precision: str) -> None:
    recipe = recipe_for(precision)  # type: ignore[arg-type]
    assert recipe.precision == precision
    assert recipe.calibrated is (precision != "fp8")


def test_the_same_things_give_the_same_name() -> None:
    assert prepared_digest(SOURCE, recipe_for("int8"), "rows") == prepared_digest(
        dict(reversed(SOURCE.items())), recipe_for("int8"), "rows"
    )


@pytest.mark.parametrize(
    "other",
    [
        ({**SOURCE, "weights": "z"}, recipe_for("int8"), "rows"),
        (SOURCE, recipe_for("fp8"), "rows"),
        (SOURCE, replace(recipe_for("int8"), smoothing=0.5), "rows"),
        (SOURCE, replace(recipe_for("int8"), output_layer=False), "rows"),
        (SOURCE, recipe_for("int8"), "other rows"),
    ],
)
def test_another_source_recipe_or_table_gives_another_name(other: tuple[dict[str, str], Recipe, str]) -> None:
    assert prepared_digest(*other) != prepared_digest(SOURCE, recipe_for("int8"), "rows")


def test_every_size_has_the_memory_to_prepare_405_billion_weights_for_itself() -> None:
    shape = known_shape("llama-3.1-405b")
    for size in known_sizes():
        assert size.node is not None
        assert size.precision is not None
        assert size.precision != "bf16"
        need = room_bytes(810_000_000_000, shape, recipe_for(size.precision))
        fits = need < 0.95e9 * size.node.memory_gb.value
        assert fits is (size.name != "nd96asr-v4"), (size.name, need)  # whose 40 GB devices could not run the result either


def test_int8_smooths_a_copy_of_the_weights() -> None:
    shape = known_shape("llama-3.1-70b")
    needs = [room_bytes(140_000_000_000, shape, recipe_for(precision)) / 1e9 for precision in ("int8", "fp8", "nvfp4")]
    assert needs == [
        pytest.approx(197 + 8.4 + 1.1, rel=0.01),
        pytest.approx(84 + 1.9 + 1.1, rel=0.01),
        pytest.approx(56 + 15 + 1.1, rel=0.01),
    ]
