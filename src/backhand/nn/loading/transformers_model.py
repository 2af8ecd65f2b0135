"""Load any causal language model with transformers, for models that the decoder engine does not support.

No code from the model repository is run (`trust_remote_code` stays off). Missing weights are an error; transformers
itself would initialize them randomly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError, BackhandError, short_reason
from backhand.nn.families.config_fields import FOREIGN, UNREAD
from backhand.nn.loading.expert_tensors import may_hold_experts, split_experts
from backhand.nn.loading.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SHOWN = 5


def load_transformers_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a model in evaluation mode, frozen, in the compute dtype.

    Args:
        source: a Hugging Face directory, or any source whose tensors have Hugging Face names.

    Raises:
        ArtifactError: if transformers does not know the model or would need to run the model's own code. Also if
            weights are missing or have another shape, or a GGUF file has metadata that no config expresses.
    """
    with _as_artifact_error(source), quiet_transformers():
        model = _from_directory(source, dtype) if _is_directory(source) else _from_tensors(source, dtype)
    return model.to(device).eval().requires_grad_(False)


def transformers_skeleton(source: ModelSource, *, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model's modules without weights, on torch's `meta` device, to see which modules can be adapted.

    Raises:
        ArtifactError: if transformers does not know the model or would need to run the model's own code.
    """
    from transformers import AutoModelForCausalLM

    with _as_artifact_error(source), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(source), dtype=dtype, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def _config(source: ModelSource) -> Any:
    from transformers import AutoConfig

    if _is_directory(source):
        return AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    unread = source.config.get(UNREAD)
    if unread:
        raise ArtifactError(
            f"this {source.config.get('model_type')} model cannot be computed from its GGUF file",
            where=str(source.path),
            why="these metadata keys are not understood: " + ", ".join(sorted(unread)[:_SHOWN]),
            next_step="use the model's Hugging Face directory",
        )
    return AutoConfig.for_model(**{key: value for key, value in source.config.items() if key != FOREIGN})


def _is_directory(source: ModelSource) -> bool:
    """Return True if transformers can load the directory itself. For an image model it would load the whole model."""
    return source.path.is_dir() and source.wrapper is None


def _from_directory(source: ModelSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    _refuse_unloaded(source, [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    return model


def _from_tensors(source: ModelSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_config(source), dtype=dtype, trust_remote_code=False)
    tensors = {name: source.load(name) for name in source.tensor_names()}
    for name, parameter in model.named_parameters():
        if may_hold_experts(name) and name not in tensors:
            tensors |= _stacked(name, tuple(parameter.shape), tensors, source.config.get("model_type"))
    missing, _ = model.load_state_dict(tensors, strict=False)
    tied = set(model.all_tied_weights_keys)
    _refuse_unloaded(source, [name for name in missing if name not in tied])
    return model


def _stacked(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor], model_type: object) -> dict[str, Tensor]:
    """Stack the experts' matrices or biases into one parameter and remove them from `tensors`.

    Returns an empty dict if one of them is missing or has another shape.
    """
    slices = [(expert, part) for expert, part in split_experts(name, shape, model_type) if part is not None]
    complete = all(expert in tensors and tensors[expert].shape == part.shape(shape) for expert, part in slices)
    if not slices or not complete:
        return {}
    stack = tensors[slices[0][0]].new_empty(shape)
    for expert, part in slices:
        part.view(stack).copy_(tensors.pop(expert))
    return {name: stack}


def _refuse_unloaded(source: ModelSource, names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
        raise ArtifactError(
            f"{len(names)} weights of the model are missing or have another shape: {shown}",
            where=str(source.path),
            why=_not_causal(source.config.get("architectures")),
            next_step="fetch the model again, or use a causal language model",
        )


def _not_causal(architectures: object) -> str | None:
    """Return the reason if config.json names an architecture without a language modelling head, otherwise None."""
    names = architectures if isinstance(architectures, list) else []
    if not names or any(word in str(name) for name in names for word in _CAUSAL):
        return None
    return f"config.json says that the weights belong to {names[0]}, which is not a causal language model"


_CAUSAL = ("ForCausalLM", "LMHead", "ForConditionalGeneration")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and load reports. Weights that are missing are checked for by the caller."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _as_artifact_error(source: ModelSource) -> Iterator[None]:
    """Convert any exception that transformers raises during loading to ArtifactError."""
    try:
        yield
    except (BackhandError, MemoryError):
        raise
    except Exception as error:  # transformers raises a dozen exception types
        raise ArtifactError(
            f"transformers cannot load this {source.config.get('model_type')} model",
            where=str(source.path),
            why=short_reason(error),
            next_step="install the version of transformers that the model needs, or use another model",
        ) from error
