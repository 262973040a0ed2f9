"""What the files of the project say about it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cargo(key: str) -> str:
    """A key of Cargo.toml's `workspace.package`."""
    section = (ROOT / "Cargo.toml").read_text(encoding="utf-8").split("[workspace.package]")[1].split("[")[0]
    found = re.search(rf'^{key} = "([^"]+)"$', section, flags=re.M)
    if found is None:
        raise SystemExit(f"Cargo.toml has no {key} in [workspace.package]")
    return found[1]
