"""The LoRA paper's own findings, looked for in adapters of one's own."""
