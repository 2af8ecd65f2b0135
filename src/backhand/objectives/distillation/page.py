"""A long prompt on the studio's page."""

from __future__ import annotations

from typing import Any

from backhand.objective.page import QUESTION, Fields, Page
from backhand.options.rewards import SAMPLING


class _Bake(Page):
    title = "A long prompt: the model answers without it as it answers with it"
    roles = (QUESTION,)
    fields = "fields_context.html.j2"
    reads = SAMPLING
    lint_rows = "prompts"  # the teacher answers them
    needs_held_out = False

    def words(self, fields: Fields, context: Any) -> list[str]:
        if not fields.get("context"):
            raise fields.refused("context_text", "there is no prompt", "write or paste it")
        return [f"--context={context(fields.get('context'))}"]


PAGE = _Bake()
