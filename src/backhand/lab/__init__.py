"""Educational experiments: the sine experiment, the LoRA paper's analyses, and the demo."""
