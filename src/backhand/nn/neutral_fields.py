"""Config fields, of any family, that do not change what a model computes, or do so only beside one value."""

from __future__ import annotations

NEUTRAL = (
    # What is written about the file, the classes and the dtype of storage.
    "_name_or_path", "name_or_path", "_commit_hash", "architectures", "dtype", "torch_dtype", "transformers_version",
    "model_type", "tokenizer_class", "transformers.js_config", "unsloth_fixed", "unsloth_version", "is_llama_config",
    # How to run it, not what it computes.
    "use_cache", "cache_implementation", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "return_dict", "output_hidden_states", "output_attentions", "torchscript",
    "pretraining_tp", "chunk_size_feed_forward",
    # Before training, and tasks with another head.
    "initializer_range", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params",
    # Token ids; eos_token_id is used.
    "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix",
    # Generation.
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip

FIXED: dict[str, object] = {
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "use_bfloat16": False,
    "use_mrope": False,
    "rope_interleaved": False,
}
"""Fields with the one value (beside null) for which the engine computes the same."""
