"""An adapter of a diffusion model in kohya's format, which A1111, ComfyUI and diffusers load.

    lora_unet_<path with _ for .>.lora_down.weight    lora_A        lora_te_… for the text encoder
    lora_unet_<path with _ for .>.lora_up.weight      lora_B
    lora_unet_<path with _ for .>.alpha               one number: scaling = alpha / rank, for each module

Every module has an alpha of its own there, so that patterns and rank-stabilised scaling need no folding. The names are
of Stable Diffusion's U-Net and CLIP text encoder; nothing else has any.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from backhand.adapters.contents import AdapterContents
from backhand.adapters.module_factors import Factors, ModuleFactors
from backhand.adapters.peft_keys import PREFIX
from backhand.adapters.targets import module_values
from backhand.adapters.tensor_file import read_tensors
from backhand.errors import ArtifactError
from backhand.export.opened_adapter import refuse

_UNET = re.compile(
    r"(?:unet\.)?((?:down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b.*)"
)

_TEXT_ENCODER = re.compile(r"(?:text_encoder\.)?(text_model\..*)")
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def factors_without_model(contents: AdapterContents) -> dict[str, ModuleFactors]:
    """Factors of the modules that the tensors name, when there is no model to hold them against.

    Raises:
        ArtifactError: a tensor that is no factor of a linear or convolutional module, or one without its partner.
    """
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in contents.tensors.items()}
    if odd := [key for key in tensors if not key.endswith(_SUFFIXES)]:
        raise ArtifactError(
            f"{len(odd)} tensors are no factors of linear or convolutional modules: {', '.join(odd[:4])}",
            where=str(contents.directory),
        )
    names = list(dict.fromkeys(key.removesuffix(_SUFFIXES[0]).removesuffix(_SUFFIXES[1]) for key in tensors))
    factors = {}
    for target in module_values(contents.described.config, names, strict=False):
        lora_A, lora_B = (tensors[target.name + suffix] for suffix in _SUFFIXES)
        if lora_A.shape[0] != target.rank or lora_B.shape[1] != target.rank:
            raise ArtifactError(
                f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} are not of rank {target.rank}",
                where=f"{contents.directory}: {target.name}",
            )
        factors[target.name] = ModuleFactors.from_file(lora_A, lora_B, target.scaling)
    return factors


def kohya_bytes(factors: Factors) -> bytes:
    """The file. Raises ArtifactError: modules that have no name there, by name."""
    keys = {module: kohya_name(module) for module in factors}
    reason = "only modules of Stable Diffusion's U-Net and CLIP text encoder have names in this format"
    refuse("kohya", {module: reason for module, key in keys.items() if key is None}, merge=False)
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
    """What the file holds of these modules. Raises ArtifactError: not what `kohya_bytes` writes."""
    tensors, problems = read_tensors(path)
    if problems:
        name, what = next(iter(problems.items()))
        raise ArtifactError(f"{name}: {what}", where=str(path))
    found = {}
    for module in modules:
        key = kohya_name(module)
        lora_A, lora_B = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        scaling = float(tensors[f"{key}.alpha"]) / lora_A.shape[0]
        found[module] = ModuleFactors.from_file(lora_A, lora_B, scaling)
    return found


def kohya_name(module: str) -> str | None:
    """What comes before `.lora_down.weight`, None for a module that has no name there."""
    for pattern, prefix in ((_UNET, "lora_unet_"), (_TEXT_ENCODER, "lora_te_")):
        if match := pattern.fullmatch(module):
            return prefix + match[1].replace(".", "_")
    return None
