"""The prompt box of `backhand watch`: answers by the base model and with the newest checkpoint's adapter.

The model is loaded for the first prompt. One thread loads it and answers one prompt after the other.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backhand.errors import BackhandError, ResourceError, UsageError
from backhand.files import FileLayer
from backhand.generation.held_base import stays_quantized, weight_bytes
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.generation.options import SamplingOptions
from backhand.generation.session import GenerationSession
from backhand.loop.state import adapter_part
from backhand.nn.compute import DTYPES, resolve_device
from backhand.nn.loading import open_model
from backhand.options.config_file import load_config
from backhand.report.page import page_values
from backhand.report.rendering import PAGE_SCRIPTS, render
from backhand.report.run_record import read_run
from backhand.runs.checkpoint import CheckpointStore, latest_name
from backhand.runs.directory import ADAPTER, ANSWERS, CHECKPOINTS, CONFIG, FACTS, METRICS, PROOFS, STATUS, SUMMARY
from backhand.runs.status import read_status
from backhand.system import available_bytes
from backhand.words import in_words


@dataclass(frozen=True)
class BoxAnswer:
    """Both answers, and the step of the adapter."""

    base: str
    adapted: str
    step: int
    seconds: float


class PromptBox:
    """Answers prompts about one run."""

    def __init__(self, run: Path, *, threads: int, max_new_tokens: int) -> None:
        self._run = run
        self._config = load_config(run / CONFIG)
        self._options = replace(self._config.model, threads=threads, tune_allocator=False)
        self._sampling = SamplingOptions(greedy=True, max_new_tokens=max_new_tokens)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._held = ExitStack()
        self._loaded: LoadedModel | None = None
        self._step = -1
        self._closing = threading.Event()
        self._needed: Future[int] = self._worker.submit(self._needed_bytes)

    def close(self) -> None:
        """Stop current and waiting answers, wait for a load in progress, and release the model."""
        self._closing.set()
        self._worker.submit(self._held.close).result()
        self._worker.shutdown()

    def state(self) -> dict[str, Any]:
        """Return whether the box accepts prompts (`ready`), and a sentence (`text`)."""
        ready, text = True, "The model is loaded when you first ask."
        if not latest_name(self._run / CHECKPOINTS):
            every = self._config.run.save_every
            due = f": the first is due after step {every}" if every else ""
            ready, text = False, f"There is no checkpoint yet to compare with the base{due}."
        elif self._loaded is not None:
            text = f"The model is loaded, with the adapter of step {self._step}."
        elif self._needed.done():
            try:
                needed = in_words(self._needed.result())
                text = f"The model is loaded when you first ask: about {needed} of memory, in addition to the training."
            except BackhandError as error:
                ready, text = False, f"The base model cannot be opened: {error}"
        return {"ready": ready, "text": text}

    def answer(self, prompt: str) -> BoxAnswer:
        """Answer a prompt with the base model and with the newest adapter.

        Raises:
            UsageError: there is no checkpoint yet, the prompt is empty, or the box is closed meanwhile.
            ResourceError: the model does not fit into the free memory.
            BackhandError: loading or answering failed.
        """
        if not prompt.strip():
            raise UsageError("the prompt is empty")
        self._check_open()
        return self._worker.submit(self._answer, prompt).result()

    def _answer(self, prompt: str) -> BoxAnswer:
        self._check_open()  # it may have been closed while this prompt waited
        began = time.perf_counter()
        loaded = self._with_newest_adapter()
        self._check_open()
        data = self._config.data
        asked = data if loaded.system is None else replace(data, system=loaded.system)
        session = GenerationSession(loaded, asked)
        ids = session.prompt_ids(prompt)
        loaded.model.use_adapter(False)
        base = session.answer(ids, self._sampling, on_text=self._check_open).text
        loaded.model.use_adapter(True)
        adapted = session.answer(ids, self._sampling, on_text=self._check_open).text
        return BoxAnswer(base, adapted, self._step, round(time.perf_counter() - began, 2))

    def _check_open(self, _piece: str = "") -> None:
        if self._closing.is_set():
            raise UsageError("`backhand watch` has ended")

    def _with_newest_adapter(self) -> LoadedModel:
        """Return the model with the newest checkpoint's adapter; load it only if there is a newer checkpoint."""
        there = self._run / CHECKPOINTS
        store = CheckpointStore(there, FileLayer(), lambda _: None)
        checkpoint = store.newest_valid() if there.is_dir() else None
        if checkpoint is None:
            raise UsageError("there is no checkpoint yet", next_step="wait for the first one")
        if self._loaded is not None and checkpoint.step == self._step:
            return self._loaded
        self._held.close()
        self._loaded = None
        free, needed = available_bytes(), self._needed_bytes()
        if free is not None and needed > free:
            raise ResourceError(
                f"the model needs {in_words(needed)}, and {in_words(free)} are free",
                next_step="wait until training is over, or ask `backhand generate` on another machine",
            )
        # A copy, since training may remove the checkpoint while it is read.
        with tempfile.TemporaryDirectory(prefix="backhand-watch-", ignore_cleanup_errors=True) as directory:
            for name, content in adapter_part(checkpoint.contents).items():
                (Path(directory) / name).write_bytes(content)
            data = self._config.data
            loading = loaded_model(self._options, Path(directory), template=data, one_at_a_time=True)
            self._loaded = self._held.enter_context(loading)
        self._step = checkpoint.step
        return self._loaded

    def _needed_bytes(self) -> int:
        options = self._options
        dtype = DTYPES.get(options.dtype, DTYPES["float32"])
        source = open_model(options.model)
        quantized = stays_quantized(options, source, dtype, resolve_device(options), one_at_a_time=True)
        return weight_bytes(source, dtype, quantized=quantized)


_SHOWN = (CONFIG, METRICS, PROOFS, ANSWERS, FACTS, SUMMARY, STATUS, ADAPTER, f"{CHECKPOINTS}/latest")
LIVE_SCRIPTS = (*PAGE_SCRIPTS, "watch.js")


class LiveRun:
    """The page of one run, kept up to date. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._version = ""
        self._page = b""
        read_run(path)

    def version(self) -> str:
        """Return a text that changes with every file of the page, and when the run's process ends."""
        parts = []
        for name in _SHOWN:
            try:
                status = (self.path / name).stat()
                parts.append(f"{status.st_mtime_ns} {status.st_size} {status.st_ino}")
            except OSError:
                parts.append("-")
        state = read_status(self.path)
        parts.append(state.state if state else "-")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def page(self, box: dict[str, Any]) -> tuple[str, bytes]:
        """Return the version and the page; the previous ones while the run's files are being replaced.

        Raises:
            BackhandError, OSError: the run cannot be read, and there is no previous page.
        """
        with self._lock:
            version = self.version()
            if version != self._version:
                try:
                    values = page_values(read_run(self.path))
                except (BackhandError, OSError):
                    if not self._page:
                        raise
                    return self._version, self._page
                self._page = render(
                    "watch.html.j2",
                    values | {"box": box, "version_shown": version},
                    scripts=LIVE_SCRIPTS,
                    connect="'self'",
                )
                self._version = version
            return self._version, self._page
