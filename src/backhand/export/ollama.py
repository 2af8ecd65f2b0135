"""What Ollama needs beside a GGUF file: a Modelfile that names the base and the adapter.

`FROM` takes a GGUF file, a directory, or the name of a model that Ollama has; `ADAPTER` a file beside the Modelfile.
Ollama reads the prompt template out of the model's GGUF file.
"""

from __future__ import annotations

from pathlib import Path

from backhand.adapters.atomic_files import write_atomically
from backhand.errors import UsageError

MODELFILE = "Modelfile"
ADAPTER_FILE = "adapter.gguf"
MODEL_FILE = "model.gguf"


def write_modelfile(directory: Path, base: str, *, adapter: str | None = None) -> None:
    """Write `Modelfile` into a directory.

    Args:
        directory: that the named files lie in.
        base: what follows FROM.
        adapter: file name of the adapter, if it is one.

    Raises:
        UsageError: the base's name has several lines, of which the second would be an instruction of its own.
    """
    if len(base.splitlines()) != 1:
        raise UsageError(f"{base!r} cannot stand in a Modelfile", why="a name there ends with its line")
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    write_atomically(directory / MODELFILE, ("\n".join(lines) + "\n").encode("utf-8"))
