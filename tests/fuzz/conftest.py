"""The cases of a fuzz test follow from its source alone."""

import pytest
from hypothesis.internal.conjecture import providers


@pytest.fixture(autouse=True)
def _no_constants_of_whatever_is_imported(monkeypatch):
    """Hypothesis also draws constants that it finds in the project's modules: those that other tests have imported by then."""
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)
    providers.CONSTANTS_CACHE.cache.clear()
