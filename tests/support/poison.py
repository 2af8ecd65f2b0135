"""Texts that would run, load or break out if any of them were taken for more than text, and a run full of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ATTACKS = (
    "<script>alert(1)</script>",
    "</script><script>window.hurt = 1</script>",
    "<img src=x onerror=\"window.hurt = 1\">",
    "<svg onload='window.hurt = 1'><circle r=9 /></svg>",
    "\"' onmouseover=\"window.hurt = 1\" x='",
    "</style><style>body{display:none}</style>",
    "<!-- --!> <![CDATA[ ]]> <iframe srcdoc='<script>parent.hurt=1</script>'></iframe>",
    "{{ 7 * 7 }} {% raw %} ${7*7} `window.hurt`",
    "javascript:window.hurt=1 https://example.com/x.png data:text/html,<script>1</script>",
    "&lt;b&gt; &amp; &#x3c;script&#x3e;",
)  # fmt: skip


def poison_run(run: Path, attack: str) -> Path:
    """Put the text into everything that a run's files record as text; return the run."""
    for name in ("facts.json", "summary.json", "status.json"):
        path = run / name
        path.write_text(json.dumps(_poisoned(json.loads(path.read_text()), attack)))
    for name in ("proofs.jsonl", "answers.jsonl"):
        path = run / name
        records = [_poisoned(json.loads(line), attack) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = run / "config.toml"
    texts = re.sub(r'^(model|system) = ".*"$', "", config.read_text(), flags=re.MULTILINE)
    comment = attack.replace("\n", " ")
    config.write_text(f"# {comment}\n" + texts.replace("[model]", f"[model]\nmodel = {json.dumps(attack)}", 1))
    return run


def poison_adapter(run: Path, attack: str) -> Path:
    """Put the text into the names of the modules that the run's adapter adapts; return the run."""
    adapter = run / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    named = {
        re.sub(r"(_proj)\.(lora_[AB])", lambda m: f"{m[1]}{attack}.{m[2]}", name): t for name, t in tensors.items()
    }
    save_file(named, adapter / "adapter_model.safetensors")
    (adapter / "backhand.json").unlink()  # holds the digests of what was there
    config = json.loads((adapter / "adapter_config.json").read_text())
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in named}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(modules)}))
    facts = json.loads((run / "facts.json").read_text())
    for module in facts["modules"]:
        module["name"] += attack
    (run / "facts.json").write_text(json.dumps(facts))
    return run


def _poisoned(value: Any, attack: str) -> Any:
    """Every text below, followed by the attack; adapted modules, which the adapter decides, and states stay."""
    if isinstance(value, dict):
        keep = ("state", "kind", "host", "modules")
        return {key: inner if key in keep else _poisoned(inner, attack) for key, inner in value.items()}
    if isinstance(value, list):
        return [_poisoned(inner, attack) for inner in value]
    return f"{value} {attack}" if isinstance(value, str) else value
