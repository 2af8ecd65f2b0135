"""What llama.cpp does not compute of a model whose numbers a GGUF file can state.

It opens no file with a tensor, or with a shape, that the architecture does not have. A sliding window that the
architecture does not have is worse: it reads over it without a word, and every token sees all before it. Up to the
window's length that is the same thing, and its server takes no longer text than the context that the file states.
"""

from __future__ import annotations

from backhand.errors import ArtifactError
from backhand.nn.family import DecoderConfig

_LISTS_OF_FACTORS = ("llama3", "longrope")


def refuse_for_llama_cpp(config: DecoderConfig, architecture: str, where: str) -> None:
    """Do nothing if llama.cpp can compute the model up to `context_length`.

    Args:
        config: of the model.
        architecture: general.architecture of its files.
        where: the model, for errors.

    Raises:
        ArtifactError: lists what stands in the way.
    """
    obstacles = []
    if architecture != "llama":
        scaling = [dict(rotary.scaling or ()).get("rope_type") for rotary in config.rotary]
        obstacles += [f"{rule} rope scaling" for rule in scaling if rule in _LISTS_OF_FACTORS]
        if config.output_bias:
            obstacles.append("a bias on the attention's output (attention_bias)")
    width = config.num_heads * config.head_dim
    if architecture == "qwen2" and width != config.hidden_size:
        obstacles.append(f"heads that are {width} wide together where the model is {config.hidden_size}")
    if architecture in ("qwen2", "qwen3") and any(layer.window is not None for layer in config.layers):
        obstacles.append("a sliding window")
    if obstacles:
        raise ArtifactError(
            "llama.cpp cannot compute this model from a GGUF file",
            where=where,
            why=f"in files of architecture {architecture} it does not have {', nor '.join(obstacles)}",
            next_step="merge into a Hugging Face directory",
        )


def context_length(config: DecoderConfig, architecture: str) -> int:
    """The longest text for which llama.cpp computes what the model does: the context a new file states."""
    return unknown_window(config, architecture) or config.max_position_embeddings


def unknown_window(config: DecoderConfig, architecture: str) -> int | None:
    """A sliding window, shorter than the context, that files of this architecture are computed without; or None."""
    windows = [layer.window for layer in config.layers if layer.window is not None]
    if architecture != "llama" or not windows or min(windows) >= config.max_position_embeddings:
        return None
    return min(windows)


def window_note(window: int, *, is_context: bool) -> str:
    """What people should know of such a window, and whether the file's context ends with it."""
    if is_context:
        return (
            f"note: the file states a context of {window} tokens, the model's sliding window: llama.cpp does not have "
            "the window, and would compute longer texts otherwise"
        )
    return (
        f"note: llama.cpp does not have the model's sliding window, and computes texts of more than {window} tokens "
        "otherwise"
    )
