"""Adapters in other programs' formats: MLX-LM's, Ollama's Modelfile, PEFT's, and kohya's for diffusion models.

MLX-LM: adapters.safetensors with transposed factors, and its own adapter_config.json.

    y = x Wᵀ + scale · (x lora_a) lora_b,   lora_a (in, rank), lora_b (rank, out)        [mlx_lm/tuner/lora.py]

MLX-LM uses one rank and one scale for all modules, adapts every module in `keys` in each of the last `num_layers`
layers, and silently ignores tensors that do not fit. The file therefore contains every module that MLX-LM will adapt:
smaller ranks are padded with zeros, other scalings are folded into lora_b, and modules without an update are zero.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from backhand.adapters.classifier_config import classifier_config_bytes
from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import AdapterContents, read_json_object, read_tensors, tensor_bytes
from backhand.adapters.module_factors import Factors, ModuleFactors, factors_without_model
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import slot_shapes
from backhand.adapters.peft_saving import HEADLESS_TASK, AdapterParts, adapter_files, facts_of_card
from backhand.adapters.targets import Target
from backhand.errors import ArtifactError, UsageError
from backhand.files import write_atomically
from backhand.generation.loading import classification_of
from backhand.interop.opened_adapter import OpenedAdapter, refuse
from backhand.nn.loading.source import ModelSource
from backhand.nn.loading.stores import OLLAMA
from backhand.nn.loading.wrappers import EncoderWrapper, Wrapper
from backhand.nn.lora_parameters import LoRASlot
from backhand.runs.directory import ADAPTER, SUMMARY, run_of
from backhand.runs.status import unfinished
from backhand.runs.summary import read_summary
from backhand.training.console import held_out_results

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapters.safetensors"
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def mlx_files(opened: OpenedAdapter) -> dict[str, bytes]:
    """Return the two files by name.

    Raises:
        ArtifactError: names modules that MLX cannot adapt.
    """
    factors, module_shapes = opened.factors, opened.shapes
    if opened.config.tied_head and "lm_head" in factors:
        refuse("mlx", {"lm_head": "the head is the embedding's matrix, and MLX has no module of its own for it"})
    scale = Counter(one.scaling for one in factors.values()).most_common(1)[0][0]
    rank = max(one.rank for one in factors.values())
    found = {name: _IN_LAYER.fullmatch(name) for name in factors}
    keys = sorted({match[2] if match else name for name, match in found.items()})
    layers = 1 + max(int(match[1]) for name in module_shapes if (match := _IN_LAYER.fullmatch(name)))
    tensors: dict[str, Tensor] = {}
    for name, (out_features, in_features) in module_shapes.items():
        match = _IN_LAYER.fullmatch(name)
        if (match[2] if match else name) not in keys:
            continue
        one = factors.get(name)
        if one is None:
            one = ModuleFactors(torch.zeros(rank, in_features), torch.zeros(out_features, rank), scale)
        one = one.scaled_to(scale).padded_to(rank)
        tensors[f"{name}.lora_a"] = one.lora_A.T
        tensors[f"{name}.lora_b"] = one.lora_B.T
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    if opened.base_name:
        config["model"] = opened.base_name
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {TENSOR_FILE: tensor_bytes(tensors), CONFIG_FILE: text.encode("utf-8")}


def read_mlx_files(directory: Path) -> dict[str, ModuleFactors]:
    """Read the factors of every module that MLX-LM would adapt.

    Raises:
        ArtifactError: if the files are not those that `mlx_files` writes.
    """
    parameters = read_json_object(directory / CONFIG_FILE)["lora_parameters"]
    tensors = _tensors_of(directory / TENSOR_FILE)
    modules = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {
        name: ModuleFactors(tensors[f"{name}.lora_a"].T, tensors[f"{name}.lora_b"].T, parameters["scale"])
        for name in modules
    }


def _tensors_of(path: Path) -> dict[str, Tensor]:
    tensors, problems = read_tensors(path)
    for name, what in problems.items():
        raise ArtifactError(f"{name}: {what}", where=str(path))
    return tensors


# Ollama: a GGUF file, and a Modelfile that names the base and the adapter.
#
# `FROM` takes a GGUF file, a directory, or the name of one of Ollama's models, and `ADAPTER` a file next to the
# Modelfile. Ollama compares the chat template in the model's GGUF file with its own list of templates, and takes the
# nearest if it differs by fewer than 100 edits, else the bare prompt. Its templates write no default system message.

MODELFILE = "Modelfile"
ADAPTER_FILE = "adapter.gguf"
MODEL_FILE = "model.gguf"


BASE_FILE = "base.gguf"


def ollama_base(source: ModelSource, directory: Path) -> str:
    """Return the operand of FROM: Ollama's name of the model if it was opened by it, else its file or directory.

    A file of an installed Python package is linked or copied into `directory`: its own place is that of an environment.
    """
    if source.origin.startswith(OLLAMA):
        return source.origin.removeprefix(OLLAMA)
    path = source.path.resolve()
    if "site-packages" not in path.parts or not path.is_file():
        return str(path)
    try:
        os.link(path, directory / BASE_FILE)
    except OSError:  # on another disk, or a file system without links
        shutil.copyfile(path, directory / BASE_FILE)
    return f"./{BASE_FILE}"


def write_modelfile(
    directory: Path, base: str, *, adapter: str | None = None, system: str | None = None, bare_prompt: bool = False
) -> None:
    """Write `Modelfile` into a directory.

    Args:
        base: the operand of FROM.
        system: the system message; left out if it contains quotes that would end it.
        bare_prompt: give the model the prompt without the base's chat template.

    Raises:
        UsageError: if the base's name has several lines, of which the second would be another instruction.
    """
    if len(base.splitlines()) != 1:
        raise UsageError(f"{base!r} cannot be written to a Modelfile", why="a name there ends with its line")
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    if bare_prompt:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    if system is not None and '"""' not in system and not system.endswith('"'):
        lines.append(f'SYSTEM """{system}"""')
    write_atomically(directory / MODELFILE, ("\n".join(lines) + "\n").encode("utf-8"))


# PEFT: the adapter in canonical form, or with one rank and one scaling for all modules.
#
# vLLM uses one lora_alpha / r for the whole adapter, and silently ignores rank_pattern and alpha_pattern. The uniform
# form needs neither: every rank is padded with zeros to the largest, and every other scaling is folded into lora_B.


def described_for_peft(opened: OpenedAdapter, *, text_model: bool = False) -> tuple[PEFTConfig, Wrapper | None]:
    """Return the adapter's configuration in PEFT's files, and the model whose names they use, as `adapter_files`."""
    described, prefix = opened.loaded.described, opened.config.class_head.prefix
    wrapper: Wrapper | None = None if text_model else opened.source.wrapper
    if classification_of(opened.loaded, opened.config) and prefix:
        wrapper = EncoderWrapper("", prefix)
    headless = None if opened.config.has_head else HEADLESS_TASK
    named = replace(
        described,
        base_model=described.base_model or opened.base_name,
        task_type=described.task_type or headless,
    )
    return named, wrapper


def _card_of_results(adapter: Path) -> dict[str, str]:
    """Return the line of the card on the held-out rows of a finished run, {} for a checkpoint."""
    run = run_of(adapter)
    if run is None or adapter.resolve() != run / ADAPTER or (summary := read_summary(run / SUMMARY)) is None:
        return {}
    return {"result": " ".join(held_out_results(summary))} if summary.best_eval_loss is not None else {}


def peft_directory_files(opened: OpenedAdapter, *, uniform: bool = False, text_model: bool = False) -> dict[str, bytes]:
    """Return the files by name in the order in which to write them; see `peft_saving.adapter_files`.

    Args:
        text_model: use the names of the text model alone, if the base's files contain an image model around it.
    """
    loaded, names = opened.loaded, list(opened.shapes)
    classification = classification_of(loaded, opened.config)
    described, wrapper = described_for_peft(opened, text_model=text_model)
    left = unfinished(loaded.directory)
    card = facts_of_card(loaded.directory) | ({} if left is None else {"training": f"the run {left.fact}"})
    card |= _card_of_results(loaded.directory)
    if not uniform:
        parts = AdapterParts(described, loaded.targets, loaded.shapes, loaded.factors, loaded.trained)
        head_config = classifier_config_bytes(opened.source, classification) if classification else None
        return adapter_files(
            parts,
            record=loaded.record,
            card=card,
            module_names=names,
            wrapper=wrapper,
            classifier_config=head_config,
        )
    rank = max(one.rank for one in opened.factors.values())
    scaling = Counter(one.scaling for one in opened.factors.values()).most_common(1)[0][0]
    alpha = round(scaling * rank, 9)
    factors = {name: one.scaled_to(alpha / rank).padded_to(rank) for name, one in opened.factors.items()}
    config = LoRAConfig(rank, alpha, loaded.config.dropout, tuple(factors))
    targets = [Target(name, rank, alpha, alpha / rank) for name in factors]
    slots = [LoRASlot(name, opened.shapes[name][1], opened.shapes[name][0], rank, alpha / rank) for name in factors]
    tensors = {f"{name}.lora_A": one.lora_A for name, one in factors.items()}
    tensors |= {f"{name}.lora_B": one.lora_B for name, one in factors.items()}
    described = PEFTConfig(config, described.base_model, described.task_type, described.revision)
    parts = AdapterParts(described, targets, slot_shapes(slots), tensors)
    return adapter_files(parts, record=loaded.record, card=card, module_names=names, wrapper=wrapper)


# kohya: an adapter of a diffusion model, in the format that A1111, ComfyUI and diffusers load.

#     lora_unet_<path with _ for .>.lora_down.weight    lora_A        lora_te_… for the text encoder
#     lora_unet_<path with _ for .>.lora_up.weight      lora_B
#     lora_unet_<path with _ for .>.alpha               one number: scaling = alpha / rank, for each module

# Every module has an alpha of its own, so that patterns and rank-stabilised scaling need no folding. The format has
# names for modules of Stable Diffusion's U-Net and CLIP text encoder only.


_UNET = re.compile(
    r"(?:unet\.)?((?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b.*)"
)

_TEXT_ENCODER = re.compile(r"(?:text_encoder\.)?(text_model\..*)")
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def factors_for_kohya(contents: AdapterContents) -> dict[str, ModuleFactors]:
    """Return the factors of an adapter, whose model is not read.

    Raises:
        ArtifactError: if a tensor is no factor of a linear or convolutional module, or lacks its partner.
    """
    modules, _, others = factors_without_model(contents)
    if odd := [*others, *(name for name, module in modules.items() if module.embedding)]:
        raise ArtifactError(
            f"{len(odd)} tensors are no factors of linear or convolutional modules: {', '.join(odd[:4])}",
            where=str(contents.directory),
        )
    return modules


def kohya_bytes(factors: Factors) -> bytes:
    """Return the bytes of the file. Raises ArtifactError with the modules that have no name in the format."""
    keys = {module: kohya_name(module) for module in factors}
    reason = "only modules of Stable Diffusion's U-Net and CLIP text encoder have names in this format"
    refuse("kohya", {module: reason for module, key in keys.items() if key is None}, "give --to peft")
    if len(set(keys.values())) < len(keys):
        raise ArtifactError("two modules would have the same name in this format", where="to kohya")
    tensors: dict[str, Tensor] = {}
    for module, one in factors.items():
        lora_A, lora_B = one.in_file()
        tensors[f"{keys[module]}.lora_down.weight"] = lora_A.contiguous()
        tensors[f"{keys[module]}.lora_up.weight"] = lora_B.contiguous()
        tensors[f"{keys[module]}.alpha"] = torch.tensor(round(one.scaling * one.rank, 9), dtype=torch.float32)
    ranks = {one.rank for one in factors.values()}
    alphas = {float(tensors[f"{key}.alpha"]) for key in keys.values()}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{max(alphas):g}" if len(alphas) == 1 else "Dynamic",
    }
    data: bytes = save(tensors, metadata)
    return data


def read_kohya_file(path: Path, modules: Factors) -> dict[str, ModuleFactors]:
    """Read the factors of these modules. Raises ArtifactError if `kohya_bytes` does not write such a file."""
    tensors = _tensors_of(path)
    found = {}
    for module in modules:
        key = kohya_name(module)
        lora_A, lora_B = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        scaling = float(tensors[f"{key}.alpha"]) / lora_A.shape[0]
        found[module] = ModuleFactors.from_file(lora_A, lora_B, scaling)
    return found


def kohya_name(module: str) -> str | None:
    """Return the prefix of `.lora_down.weight`, or None for a module without a name in the format."""
    for pattern, prefix in ((_UNET, "lora_unet_"), (_TEXT_ENCODER, "lora_te_")):
        if match := pattern.fullmatch(module):
            return prefix + match[1].replace(".", "_")
    return None
