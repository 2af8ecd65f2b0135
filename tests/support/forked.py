"""Imported by the process from which others are forked: what is there is never collected, nor looked through.

Its path to here was for this import alone; what the forked processes start has no such path.
"""

# ruff: noqa: E402, F401
from __future__ import annotations

import gc

gc.disable()  # before there is anything to look through

import os
import sys
from functools import cache

# What a forked process would import for itself otherwise: modeling_utils, which tests' own models need, took it 1.2 s.
import gguf
import pytest
import safetensors.torch
import torch.distributed
import transformers.modeling_utils
import transformers.models.auto.tokenization_auto
import transformers.models.llama.configuration_llama
import transformers.tokenization_utils_tokenizers

import backhand.cli.main
import backhand.data.bounded_template
import backhand.report.command
import backhand.report.train
import backhand.training.distributed
import backhand.training.run
from backhand.cli import commands
from backhand.kernels.builds import usable
from backhand.report.rendering import environment
from backhand.training import measuring
from backhand.training.memory import probe
from support.measured_once import step_bytes, two_neutral_texts

_, _, _path = os.environ.pop("PYTHONPATH", "").partition(os.pathsep)
if _path:
    os.environ["PYTHONPATH"] = _path
# Otherwise each process would parse the docstrings of `train`'s options for itself, and compile the report's templates.
_train = commands.train
for template in environment().list_templates(extensions=["j2"]):
    environment().get_template(template)
# As in tests/conftest.py, in files about memory too.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
measuring.neutral_texts, probe.step_bytes = two_neutral_texts, step_bytes
gc.collect()
gc.freeze()
gc.enable()
gc.get_freeze_count, os.fsync = cache(gc.get_freeze_count), lambda descriptor: None
# Counted, and the builds of the kernels looked through, once for all.
gc.get_freeze_count()
usable()
