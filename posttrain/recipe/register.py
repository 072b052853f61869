"""`register`: the model that passed enters MLflow's Model Registry, with what is known of it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.recipe.base import ArtifactKind, StageConfig

CHOICE = "model:"
"""Begins the inputs that are the models of several candidates, of which the gate chooses one; then
comes the name of the candidate's `evaluate` stage, as in the verdict."""
VERDICT = "verdict"
"""Name of the input with the last gate's verdict."""


class RegisterConfig(StageConfig):
    """Makes the current model a version of a registered model. A gate must have passed it."""

    produces: ClassVar[ArtifactKind] = "registration"

    stage: Literal["register"] = "register"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the registered model."""
    model: str | None = None
    """Name of an earlier stage whose model is registered. Default: what the gate chose, or the
    stage before."""
    alias: Literal["challenger", "champion"] = "challenger"
    """`challenger`: a person promotes it later. `champion`: it takes the champion's place now."""

    license: str | None = None
    """Licence of the model, for its card, such as `apache-2.0`. Default: not stated."""
    licenses: dict[str, str] = {}
    """Not for recipes: filled in with the `license` of each dataset that has one, so that one that
    is added later gets into the card without anything being trained again."""

    @property
    def step_name(self) -> None:
        """`name` is the registered model's; the stage goes by its kind."""
        return None
