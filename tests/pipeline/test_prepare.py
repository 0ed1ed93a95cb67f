"""Recipes, and names that say what went in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.prepare import PRECISIONS
from pipeline.prepare import Recipe
from pipeline.prepare import prepared_digest
from pipeline.prepare import recipe_for

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
