from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backhand.errors import DataError
from backhand.lab.sine.command import write_files
from backhand.lab.sine.experiment import run_sine
from backhand.lab.sine.network import draw_spread_start, draw_start, read_start
from backhand.lab.sine.options import ShiftedTargetOptions, SineOptions


def arrays(width: int = 20, rank: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "w0": rng.standard_normal((width, 1)),
        "b0": rng.standard_normal(width),
        "w2": rng.standard_normal((1, width)),
        "B": rng.standard_normal((1, rank)),
        "A": rng.standard_normal((rank, width)),
    }


def test_start_file_goes_to_the_right_factors(tmp_path: Path) -> None:
    named = arrays()
    np.savez(tmp_path / "start.npz", **named)
    start = read_start(tmp_path / "start.npz", (20,), 8, "float64")
    assert np.array_equal(start.lora_A, named["B"].T) and start.lora_A.shape == (8, 1)
    assert np.array_equal(start.lora_B, named["A"].T) and start.lora_B.shape == (20, 8)
    assert np.array_equal(start.network.weights[0], named["w0"])
    assert np.array_equal(start.network.weights[1], named["w2"])
    assert np.array_equal(start.network.bias, named["b0"])


def test_written_start_is_read_again(tmp_path: Path) -> None:
    options = SineOptions(
        widths=(5, 4), rank=3, base_epochs=2, lora_epochs=2, second=ShiftedTargetOptions(shifted=False)
    )
    result = run_sine(options)
    write_files(tmp_path, options, result)
    start = read_start(tmp_path / "start.npz", (5, 4), 3, "float64")
    assert start.network.digest() == result.start.network.digest()
    assert np.array_equal(start.lora_B, result.start.lora_B)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w2": None}, "w2: this array is missing"),
        ({"A": np.zeros((20, 8))}, r"A: the shape is \(20, 8\), the options say \(8, 20\)"),
        ({"b0": np.full(20, np.nan)}, "b0: a value is not finite"),
        ({"w0": np.full((20, 1), 1e300)}, "w0: a value is not finite in float32"),
        ({"B": np.zeros((1, 8), complex)}, "B: complex128"),
        ({"B": np.full((1, 8), "one")}, "B: <U3"),
        ({"B": np.full((1, 8), None)}, "cannot be read"),
    ],
)
def test_unusable_start_file(tmp_path: Path, change: dict[str, np.ndarray | None], text: str) -> None:
    named = {name: array for name, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / "start.npz", **named)
    with pytest.raises(DataError, match=text):
        read_start(tmp_path / "start.npz", (20,), 8, "float32")


def test_start_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("w0 = 1")
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04half")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "folder.npz").mkdir()
    for name in ("text.npz", "half.npz", "empty.npz", "one.npy", "folder.npz", "missing.npz"):
        with pytest.raises(DataError) as caught:
            read_start(tmp_path / name, (20,), 8, "float64")
        assert str(tmp_path / name) in str(caught.value)


def test_prediction_is_the_formula() -> None:
    network = draw_start((6, 5), 1, 2, "float64").network
    x = np.linspace(-1, 1, 9)[:, None]
    w0, w2, w4 = network.weights
    expected = np.maximum(np.maximum(x @ w0.T + network.bias, 0) @ w2.T, 0) @ w4.T
    np.testing.assert_allclose(network.predict(x), expected, rtol=1e-14)
    delta = np.random.default_rng(0).standard_normal(w2.shape)
    expected = np.maximum(np.maximum(x @ w0.T + network.bias, 0) @ (w2 + delta).T, 0) @ w4.T
    np.testing.assert_allclose(network.predict(x, delta, layer=1), expected, rtol=1e-14)


def test_spread_start_bends_inside_the_range() -> None:
    x = np.linspace(2, 5, 10)[:, None]
    network = draw_spread_start((200, 4), 3, x)
    kinks = -network.bias / network.weights[0][:, 0]
    assert 2 <= kinks.min() < 2.2 and 4.8 < kinks.max() <= 5


def test_digest_sees_every_array() -> None:
    digests = set()
    for place in range(4):
        network = draw_start((6, 5), 1, 2, "float32").network
        array = (*network.weights, network.bias)[place]
        array.flat[0] = np.nextafter(array.flat[0], np.float32(9))
        digests.add(network.digest())
    digests.add(draw_start((6, 5), 1, 2, "float32").network.digest())
    assert len(digests) == 5
