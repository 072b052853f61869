"""Write requirements-cuda.lock: requirements.lock and the NVIDIA libraries that torch asks for.

Reads pip's report (`pip install --dry-run --ignore-installed --report FILE torch==...`) of an
index that serves torch's CUDA build; nothing is downloaded but metadata.
"""

import json
import re
import sys
from pathlib import Path


def main(report: Path, cpu_lock: Path, cuda_lock: Path) -> None:
    """Add to the CPU lock what only the CUDA build needs."""
    locked = cpu_lock.read_text(encoding="utf-8").splitlines()
    names = {_normal(line.partition("==")[0]) for line in locked}
    wanted = {
        item["metadata"]["name"]: item["metadata"]["version"]
        for item in json.loads(report.read_bytes())["install"]
    }
    if not any(name.startswith("nvidia-") for name in map(_normal, wanted)):
        sys.exit(f"{report}: this index serves torch without CUDA; nothing written")
    extra = [f"{name}=={version}" for name, version in wanted.items() if _normal(name) not in names]
    cuda_lock.write_text("\n".join(sorted(locked + extra, key=str.lower)) + "\n", encoding="utf-8")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
