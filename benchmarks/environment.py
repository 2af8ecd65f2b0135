"""The environment of a peer's process."""

from __future__ import annotations

import os

from backhand.nn.waiting import set_waiting


def peer_environment(peer: str) -> dict[str, str]:
    """This process's environment as the peer is meant to have it, whatever the shell of the benchmark had set.

    Nothing of OpenMP's waiting or of the allocator is set for peers as documented or tuned from within Python. The
    command line of this project says how long OpenMP's threads wait (`backhand.nn.waiting`), and so do the ceiling and
    the peers named `-openmp`: the same tuned peer with that setting as well; their processes watch their cores as the
    command line does. Peers named `-torch` have no compiled kernels.
    """
    dropped = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    if peer.startswith("backhand") or peer.endswith("-openmp") or peer == "products-alone":
        set_waiting(environment)
    if peer.endswith("-torch"):
        environment["BACKHAND_KERNELS"] = "none"
    return {**environment, "HF_HUB_OFFLINE": "1"}
