"""One peer in a process of its own: builds it, then makes one step for each line it reads, and answers in JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from peers import PEERS, Workload

from backhand.cli.openmp_spin import adaptive_spinning
from backhand.nn.compute import gc_frozen, release_freed_memory


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Make VmHWM start again from the present resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def import_ahead(peer_name: str) -> None:
    """What a peer imports to load its model is no part of the time of loading."""
    if peer_name.startswith("peft"):
        import peft  # noqa: F401
    if "nf4" in peer_name:
        import bitsandbytes  # noqa: F401
    import gguf.quants  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401


def main() -> None:
    """Arguments: peer name, workload as JSON, threads."""
    peer_name, workload, threads = sys.argv[1], Workload(**json.loads(sys.argv[2])), int(sys.argv[3])
    torch.set_num_threads(threads)
    import_ahead(peer_name)
    reset_peak()
    began = time.perf_counter()
    peer = PEERS[peer_name](workload)
    ready = {"load_s": time.perf_counter() - began, "load_peak_bytes": resident_bytes("VmHWM")}
    # What loading freed is no part of the model.
    release_freed_memory()
    loaded = resident_bytes("VmRSS")
    reset_peak()
    print(json.dumps({"ready": True, "loaded_bytes": loaded, **ready}), flush=True)
    with adaptive_spinning(), gc_frozen():
        for _ in sys.stdin:
            start, processor_start = time.perf_counter(), time.process_time()
            loss, norm = peer.step()
            seconds = {"step_s": time.perf_counter() - start, "processor_s": time.process_time() - processor_start}
            answer = {**seconds, "loss": loss, "grad_norm": norm, "peak_bytes": resident_bytes("VmHWM")}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
