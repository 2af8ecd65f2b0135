"""Two processes against one, this project and transformers' Trainer; and two machines over links of some speed.

    python benchmarks/scaling.py peers [--rows 64] [--repeats 1]
    python benchmarks/scaling.py exchange [--elements 4884480]       # root, Linux: network namespaces
    python benchmarks/scaling.py turns                               # the same
    python benchmarks/scaling.py runs [--rows 96] [--repeats 1]      # the same

`peers`: the same rows, one thread a process, gloo; each run is a launch of its own and the peers take turns.
`exchange`: a step's exchange alone. `runs`: SmolLM2 by torchrun, on one machine and on two. Both over each link of
LINKS, see `linked_machines`. `turns`: how many round trips an exchange waits for.
Results go to benchmarks/results/scaling.json, together with the predictions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from linked_machines import HOSTS, Link, linked_machines, probed
from machine import describe_machine
from short_rows import write_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scaling.json"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
OVER_LINK = {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
BATCH_ROWS = 16
ELEMENTS = 4_884_480
"""Of SmolLM2-135M with rank 16 on all linear layers."""
LINKS = ((None, 0.0), (100, 2e-4), (100, 2e-3), (1000, 2e-4), (1000, 2e-3))
"""Mbit/s of each direction, or no limit; seconds of a round trip. The first tells what an exchange takes by itself."""
_ETHERNET = 1448 / 1538
"""Of the bytes on a wire those that TCP carries, in frames of 1,500 bytes."""
_FAR_S = 0.05
_CARRIED_TO = (2, 4, 8, 16, 64)


def sent_bytes(elements: int, processes: int, micro_batches: int, *, ordered: bool = True) -> float:
    """What each process sends in one exchange (`training.distributed`)."""
    return 4 * elements * (processes - 1) / processes * (micro_batches + 1 if ordered else 2)


def link_s(sent: float, processes: int, payload_mbit: float, round_trip_s: float, *, ordered: bool = True) -> float:
    """Seconds that a link adds to an exchange, by the model of docs/scaling.md: the bytes, and the round trips."""
    round_trips = 2 if ordered else 2 * (processes - 1)
    return sent * 8 / (payload_mbit * 1e6) + round_trips * round_trip_s


def carried(unlimited_s: float) -> list[dict[str, Any]]:
    """The model for more machines with a micro-batch each, 0.2 ms apart.

    Args:
        unlimited_s: what two processes take for an exchange that no link limits; for more it grows as the bytes do.
    """
    found = []
    for machines in _CARRIED_TO:
        sent = sent_bytes(ELEMENTS, machines, 1)
        handled_s = unlimited_s * sent / sent_bytes(ELEMENTS, 2, 1)
        seconds = {
            str(rate): handled_s + link_s(sent, machines, rate * _ETHERNET, 2e-4) for rate in (100, 1_000, 10_000)
        }
        found.append({"machines": machines, "sent_bytes": round(sent), "exchange_s": seconds})
    return found


def measured_peer(peer: str, workers: int, rows: Path, directory: Path) -> dict[str, Any]:
    """Seconds of all steps of one epoch, and tokens per second of them."""
    directory.mkdir()
    if peer == "backhand":
        words = _train(rows, directory / "run", BATCH_ROWS // 2, workers=workers)
        _run([sys.executable, "-m", "backhand", *words])
        summary = json.loads((directory / "run" / "summary.json").read_text())
        return {"train_s": summary["train_s"], "tokens": summary["tokens"]}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    task = json.dumps({"rows": str(rows), "output": str(directory), "batch_rows": BATCH_ROWS // workers})
    _run([sys.executable, *launcher, str(HERE / "scaling_worker.py"), "trainer", task])
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return found


def peers(rows_count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Each peer with one process and with two, in turns."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as place:
        rows = Path(place) / "rows.jsonl"
        write_rows(rows, rows_count, seed=0)
        for turn in range(repeats):
            for peer in ("backhand", "trainer"):
                for workers in (1, 2):
                    one = measured_peer(peer, workers, rows, Path(place) / f"{peer}-{workers}-{turn}")
                    yield {"peer": peer, "processes": workers, "tokens_per_s": one["tokens"] / one["train_s"], **one}


def _train(rows: Path, output: Path, micro_batch_rows: int, **options: object) -> list[str]:
    """Words of `backhand` for an epoch on one thread."""
    given = {
        "data": rows,
        "output": output,
        "epochs": 1,
        "batch-rows": BATCH_ROWS,
        "threads": 1,
        "answers": 0,
        "eval-fraction": 0,
    }
    return ["train", "--quiet", *_as_words({**given, "micro-batch-rows": micro_batch_rows, **options})]


def _as_words(options: Mapping[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def exchanges(elements: int) -> Iterator[dict[str, Any]]:
    """An exchange alone over each link."""
    for rate_mbit, round_trip_s in LINKS:
        with linked_machines(rate_mbit, round_trip_s) as link:
            of_link = described(link, rate_mbit, round_trip_s)
            for reduce, micro_batches in (("ordered", 1), ("ordered", 2), ("sum", 2)):
                one = {"elements": elements, "reduce": reduce, "micro_batches": micro_batches}
                yield {**of_link, **one, "exchange_s": exchange_alone(link, 2, **one)}


def turns() -> Iterator[dict[str, Any]]:
    """How many round trips an exchange waits for, by the number of processes: next to no bytes, far apart."""
    with linked_machines(1000, _FAR_S) as link:
        for processes in (2, 4, 6):
            for reduce in ("ordered", "sum"):
                times = exchange_alone(link, processes, elements=1000, reduce=reduce, micro_batches=1)
                yield {"processes": processes, "reduce": reduce, "round_trips": [time_s / _FAR_S for time_s in times]}


def exchange_alone(link: Link, processes: int, **task: object) -> list[float]:
    """Seconds of some exchanges; every second process is on the other machine."""
    command = [sys.executable, str(HERE / "scaling_worker.py"), "exchange", json.dumps(task)]
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": link.hosts[0], "MASTER_PORT": "29500"}
    ranks = range(processes)
    started = [link.started(rank % 2, command, **OVER_LINK, **place, RANK=str(rank)) for rank in ranks]
    found: list[float] = json.loads(_ended(started)[0].splitlines()[-1])["exchange_s"]
    return found


def described(link: Link, rate_mbit: int | None, round_trip_s: float) -> dict[str, Any]:
    """What the link is set to, and what TCP finds it to be."""
    return {
        "rate_mbit": rate_mbit,
        "payload_mbit": None if rate_mbit is None else rate_mbit * link.payload_share,
        "round_trip_s": round_trip_s,
        "made_of": link.made_of,
        "found": probed(link),
    }


def with_predictions(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each exchange over a link the measured time without the link, and the predicted cost of the link."""
    unlimited = {}
    for one in found:
        same = (one.get("reduce"), one.get("micro_batches"))
        if one.get("payload_mbit") is not None and same in unlimited:
            sent = sent_bytes(one["elements"], 2, one["micro_batches"], ordered=one["reduce"] == "ordered")
            added_s = link_s(sent, 2, one["payload_mbit"], one["round_trip_s"], ordered=one["reduce"] == "ordered")
            one |= {"link_s": added_s, "predicted_s": unlimited[same] + added_s}
        elif "exchange_s" in one:
            unlimited[same] = min(one["exchange_s"])
    return found


def whole_runs(rows_count: int, repeats: int) -> Iterator[dict[str, Any]]:
    """SmolLM2 on one machine, on two whose link costs nothing, and on two over each link."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as place:
        rows = Path(place) / "rows.jsonl"
        write_rows(rows, rows_count, seed=0)
        for turn in range(repeats):
            output = Path(place) / f"alone-{turn}"
            _run([sys.executable, "-m", "backhand", *_train(rows, output, BATCH_ROWS // 4)])
            yield {"machines": 1, **step_times(output)}
            for rate_mbit, round_trip_s in LINKS:
                with linked_machines(rate_mbit, round_trip_s) as link:
                    of_link = described(link, rate_mbit, round_trip_s)
                    for reduce in ("ordered", "sum"):
                        output = Path(place) / f"{rate_mbit}-{round_trip_s * 1e6:.0f}-{reduce}-{turn}"
                        _ended([by_torchrun(link, machine, rows, output, reduce) for machine in (0, 1)])
                        of_reduce = {"reduce": reduce, "micro_batches": 2, "elements": ELEMENTS}
                        yield {"machines": 2, **of_link, **of_reduce, **step_times(output)}


def by_torchrun(link: Link, machine: int, rows: Path, output: Path, reduce: str) -> subprocess.Popen[str]:
    """One of two machines as docs/scaling.md has it; neither machine's own name leads to its address."""
    options = {"nnodes": "2", "nproc-per-node": "1", "rdzv-backend": "c10d", "rdzv-endpoint": f"{HOSTS[0]}:29500"}
    options |= {"local-addr": HOSTS[machine], "rdzv-conf": f"is_host={int(machine == 0)}"}
    launcher = ["-m", "torch.distributed.run", *_as_words(options)]
    task = json.dumps({"words": _train(rows, output, BATCH_ROWS // 4, reduce=reduce), "times": str(output)})
    worker = [str(HERE / "scaling_worker.py"), "timed_train", task]
    return link.started(machine, [sys.executable, *launcher, *worker], **OVER_LINK)


def step_times(output: Path) -> dict[str, Any]:
    """Seconds of each step but the first; of several processes also what the slower computed and the exchange took."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    ends = [step["time_s"] for step in steps]
    found: dict[str, Any] = {"step_s": [round(end - begin, 4) for begin, end in itertools.pairwise(ends)]}
    if "computed_s" in steps[0]:
        found["computed_s"] = [max(step["computed_s"]) for step in steps[1:]]
        found["exchange_s"] = json.loads(output.with_suffix(".json").read_text())[1:]
    return {**found, "tokens": sum(step["tokens"] for step in steps[1:])}


def _ended(started: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed, once all have ended well."""
    texts = [process.communicate(timeout=600) for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("\n".join(error[-3000:] for _, error in texts))
    return [text for text, _ in texts]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-3000:]}")


def main() -> None:
    """What to measure is the first argument."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("exchange").add_argument("--elements", type=int, default=ELEMENTS)
    kinds.add_parser("turns")
    for kind, rows in (("peers", 64), ("runs", 96)):
        of_kind = kinds.add_parser(kind)
        of_kind.add_argument("--rows", type=int, default=rows)
        of_kind.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    match given.kind:
        case "exchange":
            measured = exchanges(given.elements)
        case "turns":
            measured = turns()
        case "runs":
            measured = whole_runs(given.rows, given.repeats)
        case _:
            measured = peers(given.rows, given.repeats)
    found: list[dict[str, Any]] = []
    for one in measured:
        found.append({**one, "load": os.getloadavg()[0]})
        there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        there |= {"machine": describe_machine(), given.kind: found}
        for kind in {"exchange", "runs"} & set(there):
            with_predictions(there[kind])
        if "exchange" in there:
            there["carried"] = carried(min(there["exchange"][0]["exchange_s"]))
        RESULTS.write_text(json.dumps(there, indent=1) + "\n")
        print(json.dumps(found[-1]), flush=True)


if __name__ == "__main__":
    main()
