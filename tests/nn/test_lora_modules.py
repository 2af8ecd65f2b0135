"""Adapted modules: gradients against PEFT's layers in float64, and their behaviour in a real training loop."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from backhand.errors import UsageError
from backhand.nn.modules import functions as lora_functions
from backhand.nn.modules.kinds import LORA_MODULES, lora_class
from backhand.nn.modules.lora_module import LoRAModule

# torch remarks that padding "same" with an even kernel copies its input; this is such a case.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
SCALING = 1.7
RANK = 6


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def ids(*shape: int) -> Tensor:
    return torch.randint(13, shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 11), lambda: normal(2, 3, 7)),
    "linear without bias": (lambda: nn.Linear(7, 11, bias=False), lambda: normal(5, 7)),
    "linear, one row": (lambda: nn.Linear(7, 11), lambda: normal(7)),
    "linear, strided input": (lambda: nn.Linear(7, 11), lambda: normal(7, 2, 3).movedim(0, -1)),
    "linear, no rows": (lambda: nn.Linear(7, 11), lambda: normal(0, 7)),
    "Conv1D of GPT-2": (lambda: Conv1D(11, 7), lambda: normal(2, 3, 7)),
    "embedding": (lambda: nn.Embedding(13, 7), lambda: ids(4, 5)),
    "embedding with padding": (lambda: nn.Embedding(13, 7, padding_idx=2), lambda: ids(4, 9)),
    "embedding, one id": (lambda: nn.Embedding(13, 7), lambda: ids()),
    "conv1d": (lambda: nn.Conv1d(4, 9, 3, stride=2, padding=1), lambda: normal(2, 4, 17)),
    "conv1d, places left over": (lambda: nn.Conv1d(4, 9, 3, stride=4), lambda: normal(2, 4, 18)),
    "conv1d same": (lambda: nn.Conv1d(4, 9, 3, padding="same"), lambda: normal(2, 4, 17)),
    "conv1d same, even kernel": (lambda: nn.Conv1d(4, 9, 4, padding="same"), lambda: normal(2, 4, 17)),
    "conv1d valid, unbatched": (lambda: nn.Conv1d(4, 9, 3, padding="valid", bias=False), lambda: normal(4, 17)),
    "conv2d": (lambda: nn.Conv2d(4, 9, (3, 2), stride=(1, 2), padding=(2, 1)), lambda: normal(2, 4, 7, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), lambda: normal(2, 6, 5, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), lambda: normal(2, 6, 5, 7)),
    "conv2d of one place": (lambda: nn.Conv2d(4, 9, 1), lambda: normal(2, 4, 5, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 5, (1, 2, 3), stride=(1, 2, 1)), lambda: normal(2, 2, 3, 4, 5)),
}


def base(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(sum(map(ord, name)))
    return CASES[name][0]().to(dtype)


def adapted(module: nn.Module, rank: int = RANK, **options: Any) -> LoRAModule:
    kind = lora_class(module)
    assert kind is not None
    module = kind.adapt(module, rank=rank, scaling=SCALING, **options)
    module.requires_grad_(False)
    for factor in (module.lora_A, module.lora_B):
        factor.requires_grad_(True)
        nn.init.normal_(factor)
    return module


def in_peft(module: nn.Module, ours: LoRAModule) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The same module under PEFT with the same factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on groups and on Conv1D
        model = peft.get_peft_model(
            nn.Sequential(module),  # type: ignore[arg-type]
            peft.LoraConfig(r=ours.rank, lora_alpha=SCALING * ours.rank, target_modules=["0"]),
            autocast_adapter_dtype=False,
        )
    layer = model.base_model.model[0]
    if isinstance(module, nn.Embedding):
        factors = (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
    else:
        factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    with torch.no_grad():
        for theirs, mine in zip(factors, (ours.lora_A, ours.lora_B), strict=True):
            assert theirs.shape == mine.shape
            theirs.data = mine.detach().clone()
    return model, factors


def distance(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None and got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    return float(torch.linalg.vector_norm(got - expected) / (torch.linalg.vector_norm(expected) + 1e-300))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_pefts(name: str) -> None:
    ours = adapted(base(name))
    theirs, factors = in_peft(base(name), ours)
    x = CASES[name][1]()
    mine, yours = leaf(x), leaf(x)
    y, expected = ours(mine), theirs(yours)
    assert distance(y, expected) <= 1e-13
    d_y = torch.randn_like(y)
    y.backward(d_y)
    expected.backward(d_y)
    assert distance(ours.lora_A.grad, factors[0].grad) <= 1e-13
    assert distance(ours.lora_B.grad, factors[1].grad) <= 1e-13
    if x.is_floating_point():
        assert distance(mine.grad, yours.grad) <= 1e-13
        if x.numel():
            assert mine.grad is not None and float(mine.grad.abs().max()) > 0
    if x.numel():
        assert float(factors[0].grad.abs().max()) > 0 and float(factors[1].grad.abs().max()) > 0


@pytest.mark.parametrize("name", CASES)
def test_the_base_gets_no_gradient_and_x_only_when_asked(name: str) -> None:
    ours = adapted(base(name))
    ours(CASES[name][1]()).sum().backward()
    with_gradient = {key for key, parameter in ours.named_parameters() if parameter.grad is not None}
    assert with_gradient == {"lora_A", "lora_B"}


@pytest.mark.parametrize("name", ["conv1d", "conv2d grouped"])
def test_dilated_convolutions_equal_the_merged_kernel(name: str) -> None:
    """PEFT 0.21 leaves the dilation out of lora_A, so the comparison is with W + s B A itself."""
    module = base(name)
    module.dilation = tuple(2 for _ in module.dilation)  # type: ignore[union-attr, assignment]
    ours = adapted(module)
    x = leaf(CASES[name][1]())
    y = ours(x)
    groups = ours.groups
    assert isinstance(groups, int)
    factors = [ours.lora_A.detach().requires_grad_(), ours.lora_B.detach().requires_grad_()]
    wide = nn.functional.conv1d if name == "conv1d" else nn.functional.conv2d
    yours = leaf(x)
    h = wide(yours, factors[0], None, ours.stride, ours.padding, ours.dilation)  # type: ignore[operator]
    update = wide(h, factors[1], None, groups=groups)  # type: ignore[operator]
    expected = wide(yours, ours.weight, ours.bias, ours.stride, ours.padding, ours.dilation, groups) + SCALING * update  # type: ignore[operator]
    d_y = torch.randn_like(y)
    y.backward(d_y)
    expected.backward(d_y)
    assert distance(y, expected) <= 1e-13
    for got, target in ((x, yours), (ours.lora_A, factors[0]), (ours.lora_B, factors[1])):
        assert distance(got.grad, target.grad) <= 1e-13


MERGEABLE = [name for name in CASES if "grouped" not in name and "depthwise" not in name]


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_equals_unmerged_and_unmerge_gives_the_bits_back(name: str) -> None:
    ours = adapted(base(name))
    x = CASES[name][1]()
    before, weight = ours(x), ours.weight
    bits = weight.clone()
    ours.merge()
    ours.merge()
    assert ours.merged and list(ours.state_dict()) == [
        *(n for n, _ in base(name).named_parameters()),
        "lora_A",
        "lora_B",
    ]
    assert distance(ours(x), before) <= 1e-13
    if x.numel():
        assert not torch.equal(ours.weight, bits)
    ours.unmerge()
    ours.unmerge()
    assert ours.weight is weight and torch.equal(ours.weight, bits)
    assert torch.equal(ours(x), before)


@pytest.mark.parametrize("name", ["conv2d grouped", "conv2d depthwise"])
def test_a_grouped_update_is_not_merged(name: str) -> None:
    ours = adapted(base(name))
    with pytest.raises(ValueError, match="grouped"):
        ours.merge()
    assert not ours.merged


@pytest.mark.parametrize("name", CASES)
def test_disabled_and_restored_modules_compute_what_the_base_does(name: str) -> None:
    module = base(name)
    x = CASES[name][1]()
    expected, kind, described = module(x), type(module), repr(module)
    attributes = set(module.__dict__)
    ours = adapted(module)
    assert f"rank={RANK}" in repr(ours) and "scaling=1.7" in repr(ours)
    ours.enabled = False
    assert torch.equal(ours(x), expected)
    ours.enabled = True
    if x.numel():
        assert not torch.equal(ours(x), expected)
    ours.merge() if name in MERGEABLE else None
    ours.restore()
    assert type(module) is kind and repr(module) == described and set(module.__dict__) == attributes
    assert torch.equal(module(x), expected)
    assert not any("lora" in key for key in module.state_dict())


@pytest.mark.parametrize("name", ["linear", "Conv1D of GPT-2", "embedding", "conv1d", "conv2d"])
def test_a_fresh_adapter_changes_nothing_and_is_drawn_as_in_peft(name: str) -> None:
    module = base(name).requires_grad_(False)
    x = CASES[name][1]()
    expected = module(x)
    ours = lora_class(module).adapt(module, rank=RANK, scaling=SCALING)  # type: ignore[union-attr]
    ours.initialise(torch.Generator().manual_seed(3))
    assert distance(ours(x), expected) <= 1e-14
    first = ours.lora_B if name == "embedding" else ours.lora_A
    other = ours.lora_A if name == "embedding" else ours.lora_B
    assert not other.any() and first.any()
    again = first.clone()
    ours.initialise(torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    if name != "embedding":
        bound = 1 / ours.lora_A[0].numel() ** 0.5
        assert 0.8 * bound < float(ours.lora_A.detach().abs().max()) <= bound


LOW = ("linear", "Conv1D of GPT-2", "embedding", "conv1d", "conv2d")


@pytest.mark.parametrize("name", LOW)
def test_half_precision_bases_keep_fp32_factors_and_gradients(name: str) -> None:
    """The error against float64 is at most twice that of PEFT, which computes the branch in fp32."""
    exact = adapted(base(name))
    x = CASES[name][1]()
    d_y = torch.randn_like(exact(x))
    ours = adapted(base(name, torch.bfloat16))
    assert ours.lora_A.dtype == ours.lora_B.dtype == torch.float32
    with torch.no_grad():
        for half, full in ((ours.weight, exact.weight), (ours.lora_A, exact.lora_A), (ours.lora_B, exact.lora_B)):
            full.copy_(half)
        if getattr(ours, "bias", None) is not None:
            exact.bias.copy_(ours.bias)  # type: ignore[union-attr, arg-type]
    theirs, factors = in_peft(base(name, torch.bfloat16), ours)
    x_low = x.bfloat16() if x.is_floating_point() else x
    exact(x_low.double() if x.is_floating_point() else x).backward(d_y.bfloat16().double())
    y, y_theirs = ours(x_low), theirs(x_low)
    assert y.dtype == torch.bfloat16
    y.backward(d_y.bfloat16())
    y_theirs.backward(d_y.bfloat16())
    for mine, yours, truth in (
        (ours.lora_A, factors[0], exact.lora_A),
        (ours.lora_B, factors[1], exact.lora_B),
    ):
        assert mine.grad is not None and mine.grad.dtype == torch.float32
        # PEFT's branch runs in fp32 from bf16 input and gradient; ours in bf16 throughout.
        assert distance(mine.grad.double(), truth.grad) <= max(2 * distance(yours.grad.double(), truth.grad), 6e-3)


@pytest.mark.parametrize("name", LOW)
def test_autocast_is_followed(name: str) -> None:
    ours = adapted(base(name, torch.float32))
    x = CASES[name][1]()
    x = leaf(x.float()) if x.is_floating_point() else x
    plain = base(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
        assert y.dtype == plain(x).dtype
    y.sum().backward()
    assert ours.lora_A.grad is not None and ours.lora_A.grad.dtype == torch.float32
    if x.is_floating_point():
        assert x.grad is not None and x.grad.dtype == torch.float32
    reference = adapted(base(name, torch.float32))
    reference.load_state_dict(ours.state_dict())
    reference(x.detach()).sum().backward()
    assert distance(ours.lora_A.grad, reference.lora_A.grad) <= 2e-2


@pytest.mark.parametrize("name", ["linear", "Conv1D of GPT-2", "conv1d", "conv2d"])
def test_dropout_masks_the_branchs_input_only(name: str) -> None:
    ours = adapted(base(name), dropout=0.4)
    x = leaf(CASES[name][1]())
    undropped = ours.eval()(x)
    ours.enabled = False
    plain = ours(x)
    ours.enabled = True
    torch.manual_seed(5)
    dropped = ours.train()(x)
    torch.manual_seed(5)
    assert torch.equal(ours(x), dropped)
    assert not torch.equal(ours(x), dropped)
    mean = torch.stack([ours(x).detach() for _ in range(400)]).mean(0)
    assert distance(mean - plain, undropped - plain) < 0.15
    # The same mask in the backward: with it the branch is linear in x, so that its derivative along x is its value.
    torch.manual_seed(6)
    branch = ours(x) - plain
    torch.manual_seed(6)
    y = ours(x)
    d_y = torch.randn_like(y)
    (d_x,) = torch.autograd.grad(y, x, d_y)
    ours.enabled = False
    (d_x_plain,) = torch.autograd.grad(ours(x), x, d_y)
    assert torch.allclose(((d_x - d_x_plain) * x).sum(), (d_y * branch).sum(), rtol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_gradient_checkpointing_drops_the_same_elements_twice(name: str, reentrant: bool) -> None:
    ours = adapted(base(name), dropout=0.5).train()
    x = leaf(CASES[name][1]())
    torch.manual_seed(7)
    y = ours(x)
    d_y = torch.randn_like(y)
    y.backward(d_y)
    expected = [x.grad, ours.lora_A.grad, ours.lora_B.grad]
    x.grad = ours.lora_A.grad = ours.lora_B.grad = None
    torch.manual_seed(7)
    again = checkpoint(ours, x, use_reentrant=reentrant)
    assert torch.equal(again, y)
    again.backward(d_y)
    for got, target in zip([x.grad, ours.lora_A.grad, ours.lora_B.grad], expected, strict=True):
        assert got is not None and target is not None and torch.equal(got, target)


def test_copies_and_pickles_are_whole() -> None:
    for name, (_, draw) in CASES.items():
        ours = adapted(base(name))
        x = draw()
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(copied(x), ours(x))
            assert copied.lora_A is not ours.lora_A


def test_forward_hooks_and_places_stay() -> None:
    linear = nn.Linear(3, 4)
    seen: list[str] = []
    linear.register_forward_hook(lambda *_: seen.append("hook"))
    model = nn.Sequential(linear)
    ours = adapted(linear, rank=2)
    assert model[0] is ours is linear
    model(torch.randn(1, 3))
    assert seen == ["hook"]


def test_a_moved_module_unmerges_to_where_it_is() -> None:
    ours = adapted(base("linear"))
    bits = ours.weight.clone()
    ours.merge()
    ours.float()
    ours.unmerge()
    assert ours.weight.dtype == torch.float32 and torch.equal(ours.weight, bits.float())


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in CASES
        for option in (None, "use_dora", "lora_bias")
        if not (option == "use_dora" and ("grouped" in name or "depthwise" in name))
        and not (option == "lora_bias" and "embedding" in name)
    ],
)
def test_the_next_module_may_write_into_the_output(name: str, option: str | None) -> None:
    """nn.ReLU(inplace=True) changes the output after convolutions in this way."""
    ours = adapted(base(name), **({} if option is None else {option: True}))
    x = CASES[name][1]()
    apart, inside = leaf(x), leaf(x)
    nn.functional.relu(ours(apart)).sum().backward()
    expected = [parameter.grad for parameter in ours.parameters() if parameter.requires_grad]
    ours.zero_grad()
    nn.functional.relu(ours(inside), inplace=True).sum().backward()
    for got, target in zip((p.grad for p in ours.parameters() if p.requires_grad), expected, strict=True):
        assert got is not None and target is not None and torch.equal(got, target)
    if x.is_floating_point():
        assert inside.grad is not None and apart.grad is not None and torch.equal(inside.grad, apart.grad)


@pytest.mark.parametrize("rows", [6, 18], ids=["few", "many"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
def test_torch_compile_takes_the_module_whole(options: dict[str, bool], rows: int) -> None:
    ours = adapted(base("linear"), **options)
    x = CASES["linear"][1]().repeat(rows // 6, 1, 1)
    ours(x).square().sum().backward()
    expected = [ours.lora_A.grad, ours.lora_B.grad]
    ours.zero_grad()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for got, target in zip([ours.lora_A.grad, ours.lora_B.grad], expected, strict=True):
        assert distance(got, target) <= 1e-13


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in ("linear", "embedding", "conv2d") for options in ({}, {"use_dora": True})),
        ("linear", {"lora_bias": True}),
        ("conv2d", {"lora_bias": True}),
    ],
)
def test_second_derivatives_are_refused_not_wrong(name: str, options: dict[str, bool]) -> None:
    """Also where the incoming gradient requires none, as in a gradient penalty on the outputs' sum."""
    ours = adapted(base(name), **options)
    y = ours(leaf(CASES[name][1]()))
    for loss in (y.sum(), y.square().sum()):
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            torch.autograd.grad(loss, ours.lora_B, create_graph=True)
    y.sum().backward()
    assert ours.lora_B.grad is not None


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear", "Conv1D of GPT-2", "conv2d"])
def test_an_unfrozen_base_parameter_is_refused_not_left_without_a_gradient(name: str, parameter: str) -> None:
    ours = adapted(base(name))
    x = CASES[name][1]()
    ours.get_parameter(parameter).requires_grad_(True)
    with pytest.raises(UsageError, match=f"the {parameter} of an adapted .* requires a gradient"):
        ours(x)
    with torch.no_grad():
        ours(x)
    ours.enabled = False
    ours(x).sum().backward()
    assert ours.get_parameter(parameter).grad is not None


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_doras_norm_and_the_merged_weight_are_the_same_inside_autocast(name: str) -> None:
    ours = adapted(base(name, torch.float32), use_dora=True)
    norm = ours.dora_norm()
    ours.merge()
    weight = ours.weight.clone()
    ours.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.dora_norm(), norm)
        ours.merge()
    assert torch.equal(ours.weight, weight)


def computed(module: nn.Module) -> nn.Module:
    del module._parameters["weight"]
    module.weight = torch.ones(4, 3)
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: computed(nn.Linear(3, 4)), "computed from something else"),
        (lambda: hooked(nn.Linear(3, 4)), "forward has been replaced"),
        (lambda: nn.Embedding(5, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode"),
        (lambda: nn.Conv2d(8, 8, 3, groups=4), "groups do not divide the rank"),
        (lambda: nn.Conv1d(4, 4, 3, padding="same", dilation=2), "dilated"),
    ],
)
def test_obstacles_are_named_and_nothing_is_touched(module: Callable[[], nn.Module], reason: str) -> None:
    built = module()
    kind = lora_class(built)
    assert kind is not None
    before, attributes = type(built), set(built.__dict__)
    with pytest.raises(ValueError, match=reason):
        kind.adapt(built, rank=RANK, scaling=SCALING)
    assert type(built) is before and set(built.__dict__) == attributes


def test_other_types_are_not_taken_for_these() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for module in (nn.ReLU(), nn.LayerNorm(3), Scaled(3, 4), nn.Bilinear(2, 3, 4), nn.ConvTranspose1d(2, 3, 1)):
        assert lora_class(module) is None
        for kind in LORA_MODULES:
            with pytest.raises(TypeError):
                kind.adapt(module, rank=1, scaling=1.0)


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_a_wrong_backward_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with PEFT must fail when the ops lose the scaling."""
    for op in (lora_functions.lora_linear, lora_functions.lora_embedding, lora_functions.lora_conv):
        right = op.backward

        def wrong(d_y: Tensor, saved: Any, right: Any = right, **options: Any) -> Any:
            return right(d_y, saved._replace(scaling=1.0), **options)

        monkeypatch.setattr(op, "backward", wrong)
    with pytest.raises(AssertionError):
        test_output_and_gradients_equal_pefts(name)
