"""Config fields of all families that do not change the model's output, or only if they have another value."""

from __future__ import annotations

NEUTRAL = (
    # What is written about the file, the classes and the dtype of storage.
    "_name_or_path", "name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version",
    "model_type", "tokenizer_class", "transformers.js_config", "auto_map",
    # How to run it, not what it computes; dropout of the attention is off as in evaluation.
    "num_logits_to_keep", "mamba_chunk_size",
    "use_cache", "cache_implementation", "attn_implementation", "_attn_implementation", "experts_implementation",
    "_experts_implementation", "return_dict", "use_return_dict", "output_hidden_states", "output_attentions",
    "output_router_logits",
    "pretraining_tp", "chunk_size_feed_forward", "gradient_checkpointing", "attention_dropout", "resid_pdrop",
    "embd_pdrop",
    "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan",
    # Initialization, heads for other tasks, layers after the model.
    "initializer_range", "id2label", "label2id", "num_labels", "problem_type", "mtp_layer_types",
    # Training: an auxiliary loss of routers and one of logits, and noise.
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "z_loss_coefficient",
    # Token ids; eos_token_id is used, and pad_token_id read apart.
    "bos_token_id", "pad_token_id",
    # Of images.
    "vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy",
)  # fmt: skip


FIXED: dict[str, object] = {"is_encoder_decoder": False, "is_causal": True}
"""Fields with the one value, apart from null, for which the engine computes the same result as transformers."""


QUANTIZED = ("quantization_config", "compression_config", "quantization")
"""Fields in which a directory states that its weights are quantized. The last one is MLX's."""
