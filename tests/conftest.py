"""Settings and fixtures for all tests."""

import os
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

import normclip

# No test asks the network; Transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# Without a deadline: a machine that is busy is no reason to fail.
settings.register_profile("normclip", deadline=None, print_blob=True)
settings.load_profile("normclip")


# The fuzzer limits its processes by means of Linux, and gloo's groups are tested where it is used.
collect_ignore = [] if sys.platform == "linux" else ["fuzz", "distributed"]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`normclip.set_num_threads`, undone after the test."""
    yield normclip.set_num_threads
    normclip.set_num_threads(None)
