"""The options that choose a training's recipe, shared by the commands that train."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from langchain_cope.training.recipe import RecipeChoice

Paper = Annotated[
    bool,
    typer.Option("--paper", help="Use the paper's settings, chosen for 7B models, as they are."),
]
TrainingSeed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Same seed, same result."),
]


def recipe_choice(*, paper: bool, seed: int) -> "RecipeChoice":
    """Return the recipe asked for, or how it is made for a base and a history."""
    from dataclasses import replace
    from functools import partial

    from langchain_cope import Recipe

    if paper:
        return replace(Recipe.paper(), seed=seed)
    return partial(Recipe.for_model, seed=seed)
