from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from backhand.errors import DataError, UsageError
from backhand.lab.sine.points import make_points


def test_functions_and_frequencies() -> None:
    for target, function in (
        ("sin", math.sin),
        ("cos", math.cos),
        ("sin5", lambda x: math.sin(5 * x)),
        ("cos0.5", lambda x: math.cos(0.5 * x)),
    ):
        points = make_points(target, 7, "float64")
        assert points.x[:, 0].tolist() == pytest.approx([2 * math.pi * place / 6 for place in range(7)])
        assert points.y[:, 0].tolist() == pytest.approx([function(x) for x in points.x[:, 0]])
    square = make_points("square2", 41, "float32")
    assert square.y.dtype == np.float32
    assert square.y[2, 0] == 1 and square.y[12, 0] == -1 and square.y[22, 0] == 1


def test_names() -> None:
    assert make_points("sin", 5, "float64").name == "sin x"
    assert make_points("cos3", 5, "float64").name == "cos 3x"
    assert make_points("square", 5, "float64").name == "sign of sin x"


def test_function_at_given_places() -> None:
    x = np.array([[0.5], [-2.0]])
    points = make_points("sin2", 100, "float64", x)
    assert points.y[:, 0].tolist() == [math.sin(1.0), math.sin(-4.0)]


def test_csv_with_and_without_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffx,y\n0.5,1\n\n-2,3e-1\n", encoding="utf-8")
    (tmp_path / "b.CSV").write_text("0.5,1\r\n-2,3e-1")
    for name in ("a.csv", "b.CSV"):
        points = make_points(str(tmp_path / name), 100, "float64")
        assert points.x.tolist() == [[0.5], [-2.0]] and points.y.tolist() == [[1.0], [0.3]]
        assert points.name == name and points.x_label == "x"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("x,y\n1,2\n3\n", ":3"),
        ("1,2\n3,nan\n", ":2"),
        ("1,2\n3,4,5\n", ":2"),
        ("1,2\nx,4\n", ":2"),
        ("x,y\n1,2\n", ".csv"),
        ("", ".csv"),
        ("1,2\n3,1e300\n", ".csv"),
    ],
)
def test_bad_csv_names_the_line(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        make_points(str(path), 100, "float32")
    assert caught.value.where == str(path) + (where if where.startswith(":") else "")


def test_binary_csv_and_missing_csv(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("points.csv", "missing.csv"):
        with pytest.raises(DataError):
            make_points(str(tmp_path / name), 100, "float64")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError):
        make_points(str(tmp_path / "folder.csv"), 100, "float64")


@pytest.mark.parametrize("target", ["tan", "sinx", "", "sin-1", "points.txt"])
def test_unknown_target(target: str) -> None:
    with pytest.raises(UsageError, match="target"):
        make_points(target, 100, "float64")
