"""Any causal language model of transformers from an opened source, for what the decoder engine does not compute.

No code from the model itself is run (`trust_remote_code` stays off), and no weight is made up at random in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError, BackhandError, short_reason
from backhand.nn.decoder.config_fields import FOREIGN, UNREAD
from backhand.nn.loading.expert_tensors import may_hold_experts, split_experts
from backhand.nn.loading.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SHOWN = 5


def load_transformers_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model in evaluation mode, frozen, in the compute dtype.

    Args:
        source: a Hugging Face directory, or anything else whose tensors have Hugging Face names.

    Raises:
        ArtifactError: transformers does not know the model, its code cannot be had without running code of the model's
            own, weights are missing or of another shape, or a GGUF file says what no config can.
    """
    with _as_artifact_error(source), _no_progress_bars():
        model = _from_directory(source, dtype) if _is_directory(source) else _from_tensors(source, dtype)
    return model.to(device).eval().requires_grad_(False)


def transformers_skeleton(source: ModelSource, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules without a single weight, on torch's `meta` device: what can be adapted, before reading it.

    Raises:
        ArtifactError: transformers does not know the model, or its code cannot be had without running the model's own.
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
            why="what its metadata says is not understood: " + ", ".join(sorted(unread)[:_SHOWN]),
            next_step="use the model's Hugging Face directory",
        )
    return AutoConfig.for_model(**{key: value for key, value in source.config.items() if key != FOREIGN})


def _is_directory(source: ModelSource) -> bool:
    """Whether transformers can open it as it lies there; of an image model's files it would load the whole."""
    return source.path.is_dir() and source.wrapper is None


def _from_directory(source: ModelSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    _refuse(source, [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
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
    _refuse(source, [name for name in missing if name not in tied])
    return model


def _stacked(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor], model_type: object) -> dict[str, Tensor]:
    """A parameter of experts, of each expert's matrix or bias, which leave `tensors`; nothing where one is missing."""
    pieces = [(one, piece) for one, piece in split_experts(name, shape, model_type) if piece is not None]
    if not pieces or not all(one in tensors and tensors[one].shape == piece.shape(shape) for one, piece in pieces):
        return {}
    stack = tensors[pieces[0][0]].new_empty(shape)
    for one, piece in pieces:
        piece.view(stack).copy_(tensors.pop(one))
    return {name: stack}


def _refuse(source: ModelSource, names: list[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
        raise ArtifactError(
            f"{len(names)} weights of the model are missing or of another shape: {shown}",
            where=str(source.path),
            why=_not_causal(source.config.get("architectures")),
            next_step="fetch the model again, or take a causal language model",
        )


def _not_causal(architectures: object) -> str | None:
    """What config.json says the weights are of, if that predicts no next tokens."""
    names = architectures if isinstance(architectures, list) else []
    if not names or any(word in str(name) for name in names for word in _CAUSAL):
        return None
    return f"config.json says that they are of {names[0]}, which is no causal language model"


_CAUSAL = ("ForCausalLM", "LMHead", "ForConditionalGeneration")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off standard error, which is for notes and errors."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _as_artifact_error(source: ModelSource) -> Iterator[None]:
    """Turn whatever transformers raises while it loads into one error."""
    try:
        yield
    except (BackhandError, MemoryError):
        raise
    except Exception as error:  # transformers raises a dozen kinds
        raise ArtifactError(
            f"transformers cannot load this {source.config.get('model_type')} model",
            where=str(source.path),
            why=short_reason(error),
            next_step="install the version of transformers that the model asks for, or take another model",
        ) from error
