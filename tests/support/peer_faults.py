"""Faults of other packages, by the versions that have them."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.tiny_models import VARIANTS


def peer_fault(package: str, versions: str, fault: str, raises: type[Exception]) -> pytest.MarkDecorator:
    """Expect a failure where the package has one of these versions. A test that passes all the same fails.

    Args:
        package: at fault, by its name on PyPI.
        versions: as in a requirement. A fault that no release has mended yet has no upper end.
        fault: what it does wrong.
        raises: by which the fault ends the test.
    """
    at_fault = SpecifierSet(versions).contains(version(package), prereleases=True)
    return pytest.mark.xfail(at_fault, reason=f"{package}{versions}: {fault}", raises=raises, strict=True)


_OF_VARIANTS = {
    "nemotron-biases": peer_fault(
        "transformers", ">=5.25", "cannot run a Nemotron-H whose first layer has no attention", AttributeError
    )
}
COMPUTED_VARIANTS = [pytest.param(name, marks=_OF_VARIANTS.get(name, ())) for name in VARIANTS]
"""Variants of `tiny_models` for tests in which transformers computes them."""
