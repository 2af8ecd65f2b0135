"""Imported by the process from which others are forked: what each of them would import or look up for itself."""

# ruff: noqa: F401
from __future__ import annotations

import gc
from functools import cache

import gguf
import safetensors.torch
import torch.distributed
import transformers.modeling_utils
import transformers.models.auto.tokenization_auto
import transformers.models.llama.configuration_llama
import transformers.tokenization_utils_tokenizers

import backhand.cli.main
import backhand.data.bounded_template
import backhand.distributed.process_group
import backhand.report.command
import backhand.report.train
import backhand.training.run
from backhand.cli import commands
from backhand.engines import memory_probe as probe
from backhand.kernels.builds import chosen, usable
from backhand.report.rendering import environment
from tests.support.measured_once import step_bytes

# Otherwise each process would parse the docstrings of `train`'s options for itself, and compile the report's templates.
_train = commands.train
for template in environment().list_templates(extensions=["j2"]):
    environment().get_template(template)
probe.step_bytes = step_bytes  # in files about memory too
gc.collect()
gc.freeze()
gc.enable()
gc.get_freeze_count = cache(gc.get_freeze_count)
# Counted, and the builds of the kernels looked through, once for all.
gc.get_freeze_count()
usable()
chosen.cache_clear()  # collecting the tests may have asked; each asks by its own environment
