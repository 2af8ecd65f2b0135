"""One peer in a process of its own: builds it, then makes one step for each line it reads, and answers in JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from peers import PEERS, Workload


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Make VmHWM start again from the present resident size."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Arguments: peer name, workload as JSON, threads."""
    peer_name, workload, threads = sys.argv[1], Workload(**json.loads(sys.argv[2])), int(sys.argv[3])
    torch.set_num_threads(threads)
    peer = PEERS[peer_name](workload)
    loaded = resident_bytes("VmRSS")
    reset_peak()
    print(json.dumps({"ready": True, "loaded_bytes": loaded}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss, norm = peer.step()
        seconds = time.perf_counter() - start
        answer = {"step_s": seconds, "loss": loss, "grad_norm": norm, "peak_bytes": resident_bytes("VmHWM")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
