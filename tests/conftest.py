"""For all tests.

Hypothesis: no deadline, for the machine's load is no property of an example; a failure prints how to repeat it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("steadyread", deadline=None, print_blob=True)
settings.load_profile("steadyread")


@pytest.fixture(scope="module", autouse=True)
def blame_the_module_that_leaks() -> Iterator[None]:
    """What was left open is found here, where pytest makes it a failure, and not by a later module's test."""
    yield
    gc.collect()
