"""The first sentence of a report: what was trained on what, whether it helped, and where the adapter is."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from backhand.report.run_record import RunRecord, is_number
from backhand.report.words import count_in_words

_MAX_VLLM_RANK = 16


def verdict(run: RunRecord) -> str:
    """`helped`, `hurt` or `unknown`."""
    base, best = base_and_best(run)
    if base is None or best is None:
        return "unknown"
    return "helped" if best < base else "hurt"


def base_and_best(run: RunRecord) -> tuple[float | None, float | None]:
    """Held-out loss of the base model and the lowest after a step; None where it was not measured."""
    losses = run.held_out_losses()
    base = run.summary.get("base_eval_loss")
    if not is_number(base):
        base = next((loss for step, loss in losses if step == 0), None)
    return base, min((loss for step, loss in losses if step > 0), default=None)


def headline(run: RunRecord) -> str:
    """One sentence."""
    state = run.status.state if run.status else "finished" if run.summary else "killed"
    return f"{model_name(run)} {_verb(run, state)} {_rows(run)}{_outcome(run)}{_where(run)}."


def model_name(run: RunRecord) -> str:
    """The base model as people call it."""
    model = run.facts.get("model", {})
    name = str(model.get("hub_id") or run.config.get("model", {}).get("model") or "the base model")
    return name.rstrip("/").rpartition("/")[2] or name


def _verb(run: RunRecord, state: str) -> str:
    written = run.status.step if run.status else 0
    done = max([written, *(line["step"] for line in run.metrics)])
    total = run.facts.get("total_steps")
    of_all = f"{done:,} of {total:,} steps" if is_number(total) and done < total else count_in_words(done, "step")
    verbs = {
        "running": f"is being trained, {of_all} so far,",
        "interrupted": f"was trained for {of_all} until it was interrupted,",
        "failed": f"was trained for {of_all} until a check or an error stopped it,",
        "killed": f"was trained for {of_all} until its process was killed,",
    }
    return verbs.get(state, f"was trained for {of_all}")


def _rows(run: RunRecord) -> str:
    sources = run.config.get("data", {}).get("data") or ()
    names = ", ".join(Path(str(source)).name for source in sources)
    rows = run.facts.get("data", {}).get("train", {}).get("documents")
    counted = count_in_words(rows, "row") if is_number(rows) else "rows"
    return f"on {counted} of {names}" if names else f"on {counted}"


def _outcome(run: RunRecord) -> str:
    base, best = base_and_best(run)
    if base is None or best is None:
        return "; nothing was held out, so whether it helped is not known" if not run.held_out_losses() else ""
    change = f"the loss on held-out rows went from {base:.3f} to {best:.3f} nats per token"
    perplexities = f"(perplexity {_exp(base)} to {_exp(best)})"
    return f": {change} {perplexities}, so it {'helped' if best < base else 'did not help'}"


def _where(run: RunRecord) -> str:
    if not run.adapter.is_dir():
        return "; there is no adapter yet" if run.status and run.status.state == "running" else "; it left no adapter"
    return f"; the adapter is in {run.adapter}"


def _exp(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def use_commands(run: RunRecord) -> list[tuple[str, str]]:
    """(program, what to type) for everything that can use the adapter."""
    model = run.facts.get("model", {})
    named = str(run.config.get("model", {}).get("model") or "smollm2-135m")
    base = str(model.get("hub_id") or named)
    adapter = str(run.adapter)
    typed, hub = shlex.quote(adapter), shlex.quote(base)
    ranks = [module.get("rank", 0) for module in run.facts.get("modules") or []]
    rank = max(ranks, default=0)
    room = f" --max-lora-rank {_vllm_rank(rank)}" if rank > _MAX_VLLM_RANK else ""
    export = f"backhand export --model {shlex.quote(named)} --adapter {typed}"
    return [
        ("Backhand", f"backhand chat --model {shlex.quote(named)} --adapter {typed}"),
        ("PEFT", _peft(base, adapter)),
        ("llama.cpp", f"{export} --to gguf --output adapter.gguf\nllama-cli -m BASE.gguf --lora adapter.gguf"),
        ("vLLM", f"vllm serve {hub} --enable-lora --lora-modules mine={typed}{room}"),
        ("Ollama", f"{export} --to ollama --output ollama\nollama create mine -f ollama/Modelfile"),
    ]


def _peft(base: str, adapter: str) -> str:
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        f"model = PeftModel.from_pretrained(base, {adapter!r})",
    ]
    return "\n".join(lines)


def _vllm_rank(rank: int) -> int:
    """The smallest rank that vLLM can be told which is large enough."""
    return next((allowed for allowed in (32, 64, 128, 256, 320, 512) if allowed >= rank), rank)
