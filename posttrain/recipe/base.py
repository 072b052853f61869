"""What every recipe model is built from: frozen, strict, clear about what changes a result."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

ArtifactKind = Literal[
    "dataset",
    "model",
    "adapter",
    "reward",
    "evaluation",
    "comparison",
    "verdict",
    "registration",
    "report",
]
"""What a stage leaves in the store. `model` is complete weights, `adapter` needs its base, `reward`
scores answers: complete weights, or an adapter that needs its base. `comparison` says which of two
models' answers are preferred, `registration` where a model was entered."""

RowFormat = Literal[
    "text", "prompt_completion", "alpaca", "messages", "sharegpt", "preference", "kto"
]
"""How a user's rows are written. See `posttrain.data.formats` for the columns of each."""

RowFamily = Literal["documents", "chats", "preferences", "kto"]
"""What rows become once read: the canonical schema a training method needs."""

DType = Literal["auto", "float32", "bfloat16", "float16"]


def unhashed(default: Any, description: str) -> Any:
    """A field that cannot change a stage's result and so stays out of its fingerprint."""
    return Field(
        default=default, description=description, json_schema_extra={"affects_result": False}
    )


class Strict(BaseModel):
    """Frozen, refuses unknown keys, and documents itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StageConfig(Strict):
    """What all stages share. A subclass's `stage` literal is its name everywhere."""

    produces: ClassVar[ArtifactKind]
    """Kind of artifact the stage leaves."""
    accounts: ClassVar[frozenset[str]] = frozenset()
    """Files of the artifact that no later stage reads: not part of its content digest."""
    code_version: ClassVar[int] = 1
    """Raise it when the stage's code would give another result from the same inputs."""

    stage: str
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] | None = unhashed(
        None, "Name of this stage in the recipe, needed only where a stage kind occurs twice."
    )

    @property
    def step_name(self) -> str | None:
        """What the recipe calls this stage; None for the name of its kind."""
        return self.name


def result_config(model: BaseModel) -> dict[str, Any]:
    """The part of a config that can change a result, as plain JSON values.

    A field marked with `unhashed` is left out, at any depth. This decides what enters a
    fingerprint, field by field, beside the field itself.
    """
    out: dict[str, Any] = {}
    for key, field in type(model).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_result") is False:
            continue
        out[key] = _plain(getattr(model, key))
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return result_config(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
