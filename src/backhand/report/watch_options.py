"""What `backhand watch` can be told. This file imports no torch: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backhand.errors import UsageError

_HIGHEST_PORT = 65535


@dataclass(frozen=True)
class WatchOptions:
    """A run's page while it trains, on this machine only."""

    run: Path = Path("run")
    """Run directory, of a run that is going on or over."""

    port: int = 0
    """Port on 127.0.0.1; 0 takes any free one."""

    threads: int = 1
    """Threads to answer prompts with; training keeps the others."""

    max_new_tokens: int = 128
    """Longest answer to a prompt, in tokens. At least 1."""

    def validate(self) -> WatchOptions:
        """Check every field; return self. Raises UsageError naming field, value and range."""
        for name, lowest in (("port", 0), ("threads", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise UsageError(f"{name} {value!r} is not an integer of at least {lowest}", where=name)
        if self.port > _HIGHEST_PORT:
            raise UsageError(f"port {self.port} is above {_HIGHEST_PORT}", where="port")
        return self
