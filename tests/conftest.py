"""Hypothesis: no deadline, for the machine's load is no property of an example; a failure prints how to repeat it."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steadyread", deadline=None, print_blob=True)
settings.load_profile("steadyread")
