"""Equivalents of the options, keys and commands of PEFT, TRL, Unsloth, Axolotl and mlx-lm.

One table serves the command line, TOML and YAML. Names are in lower case with underscores, some with `=VALUE`. Our own
options are in backquotes. An answer that starts with one continues "here it is"; any other answer is a sentence. This
file imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

NOT_NEEDED = "no option is needed: "
"""Start of an answer if there is no equivalent option."""
HERE = "here it is "
"""Start of an answer if there is one."""
_STEP_ROWS = "`batch_rows`, the rows of a whole step over all its micro-batches; `micro_batch_rows` are those of one"
_PACKED = NOT_NEEDED + "rows are always packed, without padding and without seeing each other"
_LOSS_ON = "`train_on`: completions (the default) or all"
_TOOLS = "`report_to`, which names a tracker"
_UPLOAD = "backhand export --adapter runs/mine/adapter --to peft --push OWNER/NAME"
_TYPES = "q4_0, q4_1, q5_0, q5_1 or q8_0"
_SAMPLED = NOT_NEEDED + "answers are sampled by the model that is trained, with its keys and values cached"
_KERNELS = NOT_NEEDED + "fused kernels, compiled before, are taken wherever the processor has what they need"
_ATTENTION = NOT_NEEDED + "the engine has one form of attention, exact and by blocks"
_LAUNCH = NOT_NEEDED + "`workers` starts several processes, or torchrun does"

_NAMES = {
    "`rank`": "r lora_r lora_rank",
    "`alpha`": "lora_alpha",
    "`dropout`": "lora_dropout",
    "`target_modules`": "lora_target_modules lora_target lora_keys",
    "`target_modules`; every linear layer is adapted unless it names some": "lora_target_linear",
    "`target_parameters`": "lora_target_parameters",
    "`modules_to_save`": "lora_modules_to_save",
    "`layers_to_transform`": "lora_layers_to_transform peft_layers_to_transform",
    "`use_dora`": "peft_use_dora lora_use_dora fine_tune_type=dora",
    "`use_rslora`": "peft_use_rslora lora_use_rslora",
    "biases of the base stay frozen, as with PEFT's none; its all and lora_only are refused, and `lora_bias` is "
    "another thing, a bias of lora_B": "bias",
    "`layers`, as in last:16": "num_layers lora_layers",
    "`rank`, `dropout`, and `alpha`, which is mlx-lm's scale times the rank; its keys are `target_modules`": (
        "lora_parameters scale lora_scale"
    ),
    "layers are not replicated here": "layer_replication",
    "`model`": "model_name_or_path base_model model_name model_id pretrained_model_name_or_path",
    "`model` as a directory of that revision": "model_revision revision",
    "`data`, a list of files, folders or hub ids; the columns determine the form of the rows": "datasets",
    "`data`": "dataset_name dataset train_file train_dataset dataset_path dataset_dir",
    "`data` as owner/name@config:split": "dataset_config dataset_config_name dataset_train_split dataset_split",
    "`eval_data`": "eval_dataset test_datasets validation_file dataset_test_split val_data",
    "`eval_fraction`": "val_set_size validation_split test_size val_size",
    "`messages` for a column of conversations, `prompt` and `completion` for others; plain text is in text": (
        "dataset_text_field field_messages formatting_func prompt_feature completion_feature chat_feature text_feature"
    ),
    "`chat_template`": "chat_template_path chat_template_jinja",
    "`template_args`": "chat_template_kwargs",
    "`max_length`": (
        "max_seq_length max_seq_len sequence_len seq_len seq_length context_length "
        "model_max_length cutoff_len block_size max_prompt_length max_tokens"
    ),
    "`epochs`": "num_train_epochs num_epochs n_epochs",
    "`max_steps`; mlx-lm's iters are micro-batches, as many times more as its grad_accumulation_steps": "iters",
    "`max_steps`": "num_iters num_steps total_steps",
    "`learning_rate`": "lr",
    "`learning_rate`, which is that of embeddings too": "embedding_learning_rate embedding_lr",
    "`weight_decay`": "wd",
    "`schedule`": "lr_scheduler_type lr_scheduler",
    "`schedule`, and `warmup_steps` for the warmup in it": "lr_schedule",
    "`warmup_steps`, a number of steps; 3 % of them unless given": "warmup_ratio warmup",
    "`max_grad_norm`": "gradient_clipping grad_clip clip_grad_norm",
    "`micro_batch_rows`; `batch_rows` counts the rows of a whole step": (
        "per_device_train_batch_size micro_batch_size per_gpu_train_batch_size"
    ),
    "`micro_batch_rows`, which evaluation takes as well": "per_device_eval_batch_size eval_batch_size",
    _STEP_ROWS: "gradient_accumulation_steps grad_accumulation_steps gradient_accumulation",
    "`batch_rows`, of a whole step; mlx-lm's are those of a micro-batch, `micro_batch_rows`": "batch_size",
    "`batch_rows`": "train_batch_size",
    "`output`": "output_dir adapter_path out_dir save_path",
    "`output`, where metrics.jsonl and the report are": "logging_dir",
    "`save_every`, in steps": "save_steps save_strategy saves_per_epoch save_interval",
    "`eval_every`, in steps": "eval_steps eval_strategy evaluation_strategy steps_per_eval evals_per_epoch do_eval",
    "`log_every`, in steps": "logging_steps steps_per_report logging_strategy",
    "`keep`": "save_total_limit",
    "`resume` with the same `output`": "resume_from_checkpoint auto_resume_from_checkpoints",
    "`from_adapter`": "resume_adapter_file lora_model_dir adapter_name_or_path",
    "`early_stopping`": "early_stopping_patience",
    "`seed`": "random_state data_seed",
    "`dtype`": "torch_dtype bf16 fp16 tf32 float16 bfloat16",
    "`dtype`, as bfloat16": "load_in_16bit",
    "`dropout`, which is 0 unless given": "disable_dropout",
    "`recompute`, as block": "gradient_checkpointing=true use_gradient_checkpointing=true grad_checkpoint=true",
    "`recompute`, as none": "gradient_checkpointing=false use_gradient_checkpointing=false grad_checkpoint=false",
    "`recompute`": (
        "gradient_checkpointing use_gradient_checkpointing grad_checkpoint activation_offloading "
        "gradient_checkpointing_kwargs activation_checkpointing"
    ),
    f"`quantize`, as {_TYPES}: the base is quantized as it is read; of a GGUF file `base`, as quantized, keeps the "
    "blocks that it has": (
        "load_in_4bit load_in_8bit qlora bnb_4bit_quant_type bnb_4bit_compute_dtype quantization_bit "
        "quantization_config"
    ),
    NOT_NEEDED
    + "the base is quantized only where `quantize` says so": "load_in_4bit=false load_in_8bit=false qlora=false",
    "`device`": "device_map use_cpu no_cuda gpu gpus gpu_id gpu_ids cuda",
    "`memory`": "gpu_memory_limit max_memory gpu_memory_utilization",
    "`objective`": "rl rlhf stage train_type",
    **{f"`objective`, as {name}": name for name in ("dpo", "ipo", "orpo", "simpo", "kto", "grpo")},
    NOT_NEEDED + "the reference is the model that the run begins with, and what it says is computed once": (
        "ref_model precompute_ref_log_probs"
    ),
    "`target_modules` and `layers`; of a model for images its text model is adapted": (
        "finetune_vision_layers finetune_language_layers finetune_attention_modules finetune_mlp_modules"
    ),
    "after the run `backhand merge` folds the adapter into its base, and `backhand export` writes it for others": (
        "save_method quantization_method save_gguf save_merged save_model save_pretrained_merged save_pretrained_gguf "
        "merge_adapter merge_and_unload"
    ),
    "the file of options comes first, without an option name: `backhand train run.yaml`": "config config_file",
    "`reward`": "reward_funcs reward_model_name_or_path",
    "`workers`": "nproc_per_node num_processes num_gpus",
    _LOSS_ON: (
        "completion_only_loss assistant_only_loss train_on_inputs train_on_prompt mask_prompt "
        "train_on_responses_only roles_to_train train_on_eos response_part instruction_part"
    ),
    "`completion`, the column of what is learnt, with `prompt`": "label_names label_field label_column",
    _TOOLS: (
        "wandb_project wandb_entity wandb_name wandb_run_id wandb_watch project_name run_name wandb_log_model use_wandb"
    ),
    f"after the run `{_UPLOAD}` uploads the adapter": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_path push_model push_gguf upload_repo"
    ),
    _PACKED: (
        "packing sample_packing pad_to_sequence_len padding_free group_by_length eval_packing eval_sample_packing "
        "packing_strategy pad_to_multiple_of padding dataloader_drop_last data_collator"
    ),
    _ATTENTION: (
        "flash_attention attn_implementation use_flash_attention_2 xformers_attention sdp_attention flash_attn"
    ),
    _SAMPLED: "use_vllm vllm_mode fast_inference use_cache",
    _KERNELS: "use_liger_kernel liger_kernel torch_compile lora_mlp_kernel lora_qkv_kernel lora_o_kernel plugins",
    _LAUNCH: "deepspeed fsdp fsdp_config ddp_find_unused_parameters local_rank",
    NOT_NEEDED + "AdamW is the optimizer, with `adam_beta1`, `adam_beta2`, `weight_decay` and `loraplus_lr_ratio`": (
        "optim optimizer optimizer_config"
    ),
    NOT_NEEDED + "the best adapter by held-out loss is always what adapter/ holds": (
        "load_best_model_at_end metric_for_best_model greater_is_better save_only_model"
    ),
    NOT_NEEDED + "an adapter is trained always, and `from_adapter` begins with one": (
        "adapter use_peft train do_train peft_type"
    ),
    NOT_NEEDED + "an adapter is trained always, never all weights of the base": "fine_tune_type finetuning_type",
    "only adapters are trained here, never all weights of the base": (
        "full_finetuning fine_tune_type=full finetuning_type=full finetuning_type=freeze"
    ),
    NOT_NEEDED + "the adapter is written as PEFT's for a causal language model": (
        "task_type lora_task_type inference_mode fan_in_fan_out lora_fan_in_fan_out auto_mapping"
    ),
    NOT_NEEDED + "lora_A is drawn as PEFT draws it and lora_B is zero, the only way there is (no PiSSA, OLoRA, EVA, "
    "CorDA or LoftQ); `from_adapter` begins elsewhere": "init_lora_weights loftq_config peft_init_lora_weights",
    NOT_NEEDED + "steps with a non-finite loss are skipped, fewer than `max_bad_steps` in a row; no option looks at "
    "how large a finite loss is": "loss_watchdog_threshold loss_watchdog_patience",
    NOT_NEEDED + "what a step takes is planned before it, within `memory`": "clear_cache_threshold",
    NOT_NEEDED + "the model's own files say it, and no code of theirs is run": (
        "trust_remote_code model_type tokenizer_type tokenizer_name special_tokens eos_token pad_token token"
    ),
    NOT_NEEDED + "rows are prepared at once, on all cores": (
        "dataset_num_proc dataloader_num_workers dataset_prepared_path remove_unused_columns "
        "dataloader_pin_memory preprocessing_num_workers"
    ),
    NOT_NEEDED + "all held-out rows are evaluated; `backhand evaluate` measures others": (
        "val_batches test_batches test do_predict"
    ),
    NOT_NEEDED + "keys are checked always": "strict",
    "there is no noise on embeddings here": "neftune_noise_alpha",
}
_OF: dict[str, str] = {name: answer for answer, names in _NAMES.items() for name in names.split()}

_TRAIN = "backhand train --data rows.jsonl --output runs/mine"
COMMANDS = {
    **dict.fromkeys(("sft", "finetune", "fine-tune", "lora", "tune", "fit", "run", "lora_finetune"), _TRAIN),
    **{name: f"{_TRAIN} --objective {name}" for name in ("dpo", "ipo", "orpo", "simpo", "kto")},
    **dict.fromkeys(("grpo", "ppo"), f"{_TRAIN} --objective grpo --reward exact"),
    "rloo": f"{_TRAIN} --objective grpo --loss rloo --reward exact",
    **dict.fromkeys(("reward", "rm"), f"{_TRAIN} --objective grpo --reward MODULE:FUNCTION"),
    "resume": "backhand train --resume --output runs/mine",
    **dict.fromkeys(("push", "upload", "push-to-hub"), _UPLOAD),
    **dict.fromkeys(
        ("serve", "vllm-serve", "server", "api"),
        "backhand export --adapter runs/mine/adapter --to gguf --output runs/mine/adapter.gguf, for llama-server, or "
        "vllm serve --enable-lora, which takes runs/mine/adapter as it is",
    ),
    **dict.fromkeys(("fuse", "merge-lora", "merge_lora"), "backhand merge --adapter runs/mine/adapter --output merged"),
    "quantize": f"{_TRAIN} --quantize q4_0, which quantizes the base as it is read, to {_TYPES}",
    "convert": "backhand export --adapter runs/mine/adapter --to gguf --output runs/mine/adapter.gguf",
    **dict.fromkeys(("eval", "test", "benchmark", "lm-eval"), "backhand evaluate --data rows.jsonl"),
    **dict.fromkeys(("infer", "inference", "predict", "complete"), "backhand generate --prompt TEXT"),
    **dict.fromkeys(("preprocess", "prepare", "check", "validate"), "backhand lint --data rows.jsonl"),
    **dict.fromkeys(("env", "info", "doctor"), "backhand --version --verbose"),
    **dict.fromkeys(("sweep", "tune-lr", "hpo"), "backhand search --data rows.jsonl --output runs/search"),
    **dict.fromkeys(
        ("list", "ls", "download", "pull", "fetch"), "backhand models; a hub id is fetched when it is first used"
    ),
}
"""Commands of other tools and their equivalents."""


def translate_option(
    name: str, shown: Callable[[str], str], known: Iterable[str] | None = None, *, value: object = ""
) -> str | None:
    """Return the equivalent of another tool's option as a clause, or None if no tool has that option.

    Args:
        name: the name as written, with dashes or underscores.
        shown: formats a field as an option or a key.
        known: the fields of the command; None for all.
        value: the value given, if known: the meaning of some names depends on it.
    """
    name = name.strip("-").replace("-", "_").lower()
    text = _OF.get(f"{name}={value}".lower(), _OF.get(name))
    if text is None:
        return None
    begins = text.startswith("`")
    if known is not None and begins and text.split("`")[1] not in known:
        return None
    said = re.sub(r"`(\w+)`", lambda match: shown(match[1]), text)
    return f"{HERE}{said}" if begins else said
