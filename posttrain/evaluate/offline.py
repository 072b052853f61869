"""Keeping libraries off the Hub where benchmarks come from a folder."""

from __future__ import annotations

import os


def stay_local(offline_root: str | None) -> None:
    """Forbid the Hub if there is a folder to read instead.

    Libraries read these once, on import; so this comes before all of them.
    """
    if offline_root is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
