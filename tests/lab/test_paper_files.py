"""Lines of the tables are means over the layers of one kind of module."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backhand.lab.paper.amplification import Amplification, amplification_by_kind
from backhand.lab.paper.similarity import ModuleSimilarity, similarity_by_kind, similarity_maps


def test_amplification_of_a_kind_is_the_quotient_of_the_means_next_to_it() -> None:
    def row(name: str, **norms: float) -> Amplification:
        return Amplification(f"layers.{name}", 4, norms.pop("update"), norms.pop("weight"), **norms)

    rows = [
        row("0.q_proj", update=2, weight=9, along_update=1, along_weight=8, along_random=3),
        row("0.v_proj", update=0, weight=7, along_update=0, along_weight=0, along_random=0),
        row("1.q_proj", update=4, weight=5, along_update=0.5, along_weight=6, along_random=1),
    ]
    q, v = amplification_by_kind(rows)
    assert (q["kind"], q["modules"], q["update_norm"], q["weight_norm"]) == ("q_proj", 2, 3, 7)
    assert (q["along_update"], q["along_weight"], q["along_random"]) == (0.75, 7, 2)
    assert (q["factor"], q["random_factor"]) == (4, 1.5)
    assert (v["kind"], v["factor"], v["random_factor"]) == ("v_proj", None, None)


def test_similarity_of_a_kind_is_the_mean_over_its_layers_next_to_chance() -> None:
    one = ModuleSimilarity("0.q_proj", "lora_A", torch.tensor([[0.2, 0.3, 0.4]]), torch.zeros(1, 3), dimension=10)
    other = ModuleSimilarity("1.q_proj", "lora_A", torch.tensor([[0.4, 0.5, 0.8]]), torch.zeros(1, 3), dimension=30)
    (row,) = similarity_by_kind([one, other])
    assert row["modules"] == 2
    assert row["first_direction"] == pytest.approx(0.3) and row["all_directions"] == pytest.approx(0.6)
    assert row["random_first_direction"] == pytest.approx((1 / 10 + 1 / 30) / 2)
    assert row["random_all_directions"] == pytest.approx((3 / 10 + 3 / 30) / 2)


def test_a_map_is_the_mean_over_what_all_layers_have() -> None:
    one = ModuleSimilarity("0.q_proj", "lora_B", torch.tensor([[0.2, 0.3, 0.4]]), torch.full((1, 3), 0.1), dimension=10)
    other = ModuleSimilarity("1.q_proj", "lora_B", torch.tensor([[0.4, 0.5], [0.6, 0.9]]), torch.zeros(2, 2), 20)
    third = ModuleSimilarity("1.v_proj", "lora_B", torch.tensor([[0.7]]), torch.tensor([[0.2]]), 40)
    q, v = similarity_maps([one, other, third])
    assert (q.kind, q.factor, q.modules, v.kind, v.modules) == ("q_proj", "lora_B", 2, "v_proj", 1)
    assert q.similarity == pytest.approx(np.array([[0.3, 0.4]])) and q.random == pytest.approx(np.array([[0.05, 0.05]]))
    assert q.expected == pytest.approx(np.array([[(1 / 10 + 1 / 20) / 2, (2 / 10 + 2 / 20) / 2]]))
    assert v.similarity == pytest.approx(np.array([[0.7]])) and v.expected == pytest.approx(np.array([[1 / 40]]))
    assert one.at_smaller_rank == pytest.approx(0.2) and other.at_smaller_rank == pytest.approx(0.9)
