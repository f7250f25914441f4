"""Programs are dropped after each file."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Drawn shapes make thousands of programs, each with memory maps of its own; a process may have
    some 65,000 of these, and XLA ends it with a segmentation fault when there are no more."""
    yield
    jax.clear_caches()
