"""Whether a tag may be released: it is the version, and CHANGELOG.md says what is new. `python release/tag.py v1.2.3`."""

import re
import sys

from project import ROOT, cargo


def refusal(tag: str) -> str | None:
    """Why this tag is not to be released."""
    version = cargo("version")
    if tag != f"v{version}":
        return f"the tag is {tag}, and Cargo.toml has version {version}: tag v{version}, or change the version"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, flags=re.M):
        return f"CHANGELOG.md has no heading '## [{version}] - DATE': date the entries under Unreleased"
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python release/tag.py TAG")
    raise SystemExit(refusal(sys.argv[1]))
