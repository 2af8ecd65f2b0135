"""The environment of a peer's process."""

from __future__ import annotations

import os

from backhand.cli.openmp_spin import set_spin_count


def peer_environment(peer: str) -> dict[str, str]:
    """This process's environment as the peer is meant to have it, whatever the shell of the benchmark had set.

    For peers as documented or tuned from within Python, neither OpenMP's spin count nor the allocator is set. The
    command line of this project sets the spin count (`backhand.cli.openmp_spin`). So do the ceiling and the peers named
    `-openmp`, whose processes also monitor their cores. Peers named `-torch` have no compiled kernels.
    """
    dropped = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    if peer.startswith("backhand") or peer.endswith("-openmp") or peer == "products-alone":
        set_spin_count(environment)
    if peer.endswith("-torch"):
        environment["BACKHAND_KERNELS"] = "none"
    return {**environment, "HF_HUB_OFFLINE": "1"}
