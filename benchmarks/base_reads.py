"""How many bytes of the base's file a training run reads from the disk, by the kernel's own count.

    python benchmarks/base_reads.py [MODEL ...]

Each run is a process of its own. Everything but the weights is in the page cache: the same run was made just before.
The weights are evicted (POSIX_FADV_DONTNEED), and the bytes that the process reads from the disk (`ru_inblock` of
wait4) are divided by the size of the file. A second reading of a page that is still cached is not among them.
`evicted once more` therefore evicts the file a second time when the first step is recorded: what is read again at the
end of a run of a dense base comes on top. A quantized base is mapped, and mapped pages are not evicted.

Without arguments: SmolLM2 as its GGUF file, quantized and dense, and a directory of random bfloat16 weights of the same
shape (269 MB).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 6


def evict(file: Path) -> None:
    """Drop the file's pages from the page cache, except those that a process has mapped."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def resident(file: Path) -> int:
    """Return the number of the file's bytes in the page cache (mincore)."""
    size = file.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        view = (ctypes.c_char * size).from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), flags)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(flag & 1 for flag in flags) * mmap.PAGESIZE


def run(model: Path, base: str, rows: Path, output: Path, file: Path, *, evict_again: bool = False) -> int:
    """Train, and return the bytes that the process read from the disk."""
    words = f"--base {base} --max-steps {STEPS} --batch-rows 4 --micro-batch-rows 4 --threads 2 --eval-fraction 0"
    command = [sys.executable, "-m", "backhand", "train", "--model", str(model), "--data", str(rows)]
    command += ["--output", str(output), "--quiet", "--learning-rate", "1e-4", *words.split()]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    metrics, again = output / "metrics.jsonl", evict_again
    while again and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.02)
        if metrics.exists() and metrics.stat().st_size:
            evict(file)
            again = False
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"train ended with {process.returncode}")
    return usage.ru_inblock * 512


def measured(model: Path, base: str, directory: Path) -> None:
    """Print what one base's runs read."""
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"{n} it is"}) + "\n" for n in range(40)))
    file = model / "model.safetensors" if model.is_dir() else model
    size = file.stat().st_size
    shutil.rmtree(directory / "run", ignore_errors=True)
    run(model, base, rows, directory / "run", file)  # everything else is cached from here on
    for name in ("evicted", "evicted once more"):
        os.sync()  # pages under write-back are not evicted
        evict(file)
        cached = resident(file)
        began = time.perf_counter()
        shutil.rmtree(directory / "run")
        read = run(model, base, rows, directory / "run", file, evict_again=name != "evicted")
        took = time.perf_counter() - began
        print(
            f"{file.name}, {base}, {name}: {read / 1e6:,.1f} MB read of {size / 1e6:,.1f} MB, "
            f"{read / size:.3f} times ({cached / 1e6:.1f} MB were cached; {took:.0f} s)",
            flush=True,
        )


def dense_directory(path: Path) -> Path:
    """Write SmolLM2's shape with random bfloat16 weights, and its tokenizer."""
    import torch
    import transformers

    from backhand.nn.loading import open_model

    source = open_model("smollm2-135m")
    config = {key: value for key, value in source.config.items() if isinstance(value, bool | int | float | str)}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16)
    model.save_pretrained(path)
    source.tokenizer().save_pretrained(path)
    return path


def main() -> None:
    """Measure the models that are named, or the three of the module's description."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        cases = [(Path(model), base) for model in sys.argv[1:] for base in ("dense", "quantized")]
        if not cases:
            from backhand.nn.loading import open_model

            # A copy, since another process may have the file itself mapped, and mapped pages are not evicted.
            smollm2 = Path(shutil.copy(open_model("smollm2-135m").path, directory))
            cases = [(smollm2, "quantized"), (smollm2, "dense"), (dense_directory(directory / "dense"), "dense")]
        for model, base in cases:
            measured(model, base, directory)


if __name__ == "__main__":
    main()
