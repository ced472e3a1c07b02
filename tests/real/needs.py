"""Skipping with the name of the package that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from thresher.compiler.errors import MissingRequirementError


@contextmanager
def packages(*modules: str) -> Iterator[None]:
    """Skip when a module cannot be imported, or when data turns out to be missing inside."""
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is not installed")
    try:
        yield
    except MissingRequirementError as error:
        pytest.skip(str(error))
