"""List the files of the package that one training step runs through, from the command to the optimizer.

python tools/one_step.py    # JSON: the files, in the order in which they are entered

`backhand train` is run with plain options on a tiny random Llama, float32, three steps, and Python's profiler records
every call. A file is on the way of a step if one of its functions

- is on the stack when the second step begins: the way from the command down to the loop, or
- is called from there on until the optimizer has moved the adapter: sampling, packing, forward, backward, clipping,
  AdamW.

The second step, since the first also does what is done once. A step begins with `TrainingLoop._step` and ends when
`AdapterOptimizer.step` returns. Reading the options, loading the model and the rows, and what follows the optimizer
(a line of metrics, guards, an evaluation) are not on the way. The package is the one that Python finds: PYTHONPATH
decides.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
BEGINS, ENDS = "TrainingLoop._step", "AdapterOptimizer.step"
_STEP = 2


class StepFiles:
    """A profiler that collects the files of one step.

    Args:
        package: the folder whose files count.

    Attributes:
        way: file to the names of what ran in it, in the order of first entry.
        complete: whether the step has been seen from its beginning to its end.
    """

    def __init__(self, package: Path) -> None:
        self.package = f"{package}{os.sep}"
        self.way: dict[str, list[str]] = {}
        self.complete = False
        self._inside = False

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        """Record a call; called by `sys.setprofile`."""
        name = frame.f_code.co_qualname
        if event == "call" and name == BEGINS:
            self._inside = True
            self._take_stack(frame)
        elif self._inside and event == "call":
            self._take(frame)
        elif self._inside and event == "return" and name == ENDS:
            self.complete = True
            sys.setprofile(None)

    def _take_stack(self, frame: FrameType | None) -> None:
        stack = []
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
        for above in reversed(stack):
            self._take(above)

    def _take(self, frame: FrameType) -> None:
        file = frame.f_code.co_filename
        if file.startswith(self.package):
            names = self.way.setdefault(file.removeprefix(self.package), [])
            if frame.f_code.co_qualname not in names:
                names.append(frame.f_code.co_qualname)


def prepare(directory: Path) -> list[str]:
    """Make a tiny model and a few rows; the command line that trains on them."""
    sys.path.insert(0, str(PROJECT))
    tiny_models = import_module("tests.support.tiny_models")
    tiny = tiny_models.tiny_model("llama-tied", num_hidden_layers=2)
    model = tiny_models.save_tiny(tiny, directory / "model")
    asked = "the user asks the assistant for a number, and the number is"
    rows = [{"prompt": f"{asked} {number}", "completion": f"a number: {number}"} for number in range(12)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = f"train --model {model} --data {directory / 'rows.jsonl'} --output {directory / 'run'} --quiet"
    return f"{line} --dtype float32 --threads 1 --batch-rows 4 --max-steps 3".split()


def step_files() -> dict[str, list[str]]:
    """Files on the way of one step, relative to the package, each with the functions that run.

    Raises:
        RuntimeError: the command failed, or no whole step was seen in it.
    """
    import backhand
    from backhand.__main__ import run
    from backhand.loop.loop import TrainingLoop

    original, numbers = TrainingLoop._step, itertools.count(1)

    def step(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == _STEP:  # what comes before takes a profiler longer than the step
            sys.setprofile(profiler)
        return original(*args, **kwargs)

    with tempfile.TemporaryDirectory() as directory:
        words = prepare(Path(directory))
        profiler = StepFiles(Path(backhand.__file__).resolve().parent)
        sys.argv = ["backhand", *words]
        TrainingLoop._step = step  # type: ignore[method-assign]
        code = run()
    if code != 0 or not profiler.complete:
        raise RuntimeError(f"exit code {code}; a whole step from {BEGINS} to {ENDS} was not seen")
    return profiler.way


if __name__ == "__main__":
    print(json.dumps(step_files()))
