"""LoRA fine-tuning in which every gradient is derived and written by hand, and proved.

    import backhand

    backhand.train(data="rows.jsonl", output="runs/mine")    # every option of the command line, by its name
    backhand.generate("Hello", adapter="runs/mine/adapter")
    backhand.inject(module, backhand.LoRAConfig(rank=8))     # any torch.nn.Module, your own training loop
    backhand.inject_from(module, "runs/mine/adapter")        # the same with an adapter that was saved
    backhand.compare("d_lora_A", by_hand, autograd)          # exact | approximate | largest difference

Importing the package imports nothing else; each name below is imported when it is first used.
"""

import sys

# `python -m backhand` has put the current directory first, and has imported nothing of ours before this line.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0] == __name__:
    from backhand.safe_path import leave_out_first

    leave_out_first()

from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False  # of typing, which is not imported for it
if TYPE_CHECKING:
    from typing import Any

    from backhand.adapters.config import LoRAConfig
    from backhand.adapters.inject import inject, inject_from
    from backhand.adapters.trainer_callback import AdapterCallback
    from backhand.api import (
        classify,
        decide,
        embed,
        evaluate,
        export,
        generate,
        lint,
        merge,
        mine,
        plan,
        rank,
        train,
    )
    from backhand.data.options import DataOptions
    from backhand.errors import BackhandError
    from backhand.loop.embed import VectorEvaluation
    from backhand.loop.evaluate import Evaluation
    from backhand.loop.observers import Observer, RunStart
    from backhand.objectives.rewards.evaluation import RewardEvaluation
    from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
    from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
    from backhand.options.objectives import ObjectiveOptions
    from backhand.options.rewards import RewardOptions
    from backhand.runs.summary import RunSummary
    from backhand.verify.comparison import compare

    __version__: str

_NAMES = {
    "backhand.adapters.trainer_callback": "AdapterCallback",
    "backhand.errors": "BackhandError",
    "backhand.data.options": "DataOptions",
    "backhand.options.command_options": "EvaluateOptions EvaluateRunOptions",
    "backhand.loop.evaluate": "Evaluation",
    "backhand.adapters.config": "LoRAConfig",
    "backhand.options.config": "ModelOptions OptimizationOptions RunOptions TrainConfig",
    "backhand.options.objectives": "ObjectiveOptions",
    "backhand.loop.observers": "Observer RunStart",
    "backhand.objectives.rewards.evaluation": "RewardEvaluation",
    "backhand.options.rewards": "RewardOptions",
    "backhand.runs.summary": "RunSummary",
    "backhand.loop.embed": "VectorEvaluation",
    "backhand.api": "classify decide embed evaluate export generate lint merge mine plan rank train",
    "backhand.verify.comparison": "compare",
    "backhand.adapters.inject": "inject inject_from",
}
"""Public names by their module."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AdapterCallback",
    "BackhandError",
    "DataOptions",
    "EvaluateOptions",
    "EvaluateRunOptions",
    "Evaluation",
    "LoRAConfig",
    "ModelOptions",
    "ObjectiveOptions",
    "Observer",
    "OptimizationOptions",
    "RewardEvaluation",
    "RewardOptions",
    "RunOptions",
    "RunStart",
    "RunSummary",
    "TrainConfig",
    "VectorEvaluation",
    "__version__",
    "classify",
    "compare",
    "decide",
    "embed",
    "evaluate",
    "export",
    "generate",
    "inject",
    "inject_from",
    "lint",
    "merge",
    "mine",
    "plan",
    "rank",
    "train",
]


def _attribute(name: str) -> "Any":
    if name == "__version__":
        from importlib.metadata import version

        value = version("backhand")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise _missing(name)
    globals()[name] = value
    return value


if not TYPE_CHECKING:  # a type checker would accept every name
    __getattr__ = _attribute


def _missing(name: str) -> AttributeError:
    run = ""
    if name.isalpha():
        examples = {entry.name: entry.example for entry in import_module("backhand.cli.commands").COMMANDS}
        if name in examples:
            run = f": it is a command, which is run in a terminal: {examples[name]}"
        elif same := import_module("backhand.other_names").command_answers().get(name):
            run = f". Its equivalent in a terminal is {same}"
    return AttributeError(f"module 'backhand' has no attribute {name!r}{run}")


class _Package(ModuleType):
    """This package, in which subpackages with the names of commands become attributes when they are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("report", "search", "studio", "verify") and type(value) is ModuleType:
            value.__class__ = _CommandPackage
        super().__setattr__(name, value)


class _CommandPackage(ModuleType):
    """A subpackage with the name of a command. A call of it raises what `__getattr__` raises before its import."""

    def __call__(self, *_: object, **__: object) -> None:
        raise _missing(self.__name__.rpartition(".")[2])


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
