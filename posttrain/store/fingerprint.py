"""Names for contents: a stage's fingerprint, a folder's digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def canonical_json(value: Any) -> bytes:
    """The one way to write a value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def stage_fingerprint(
    stage: str, code_version: int, config: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """SHA-256 (hex) of all that a stage's result depends on.

    Args:
        stage: the stage's kind.
        code_version: raised by hand when the stage's code would give another result.
        config: `result_config` of the resolved settings.
        inputs: content digest by input name. Contents, not fingerprints: an upstream stage that
            ran again and gave the same bytes changes nothing here (early cutoff).
    """
    payload = {
        "stage": stage,
        "code_version": code_version,
        "config": dict(config),
        "inputs": dict(inputs),
    }
    return hashlib.sha256(canonical_json(payload)).hexdigest()


def files_digest(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) of a folder's content, from (relative path, file's SHA-256) pairs."""
    return hashlib.sha256(canonical_json(sorted(files))).hexdigest()


def combine(*digests: str) -> str:
    """One digest for several contents in this order, such as an adapter and its base."""
    return hashlib.sha256(canonical_json(list(digests))).hexdigest()
