"""Adapters in every format: written, read again by what is not our writer, refused where it cannot be expressed."""

from __future__ import annotations

import json
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from backhand.adapters.module_factors import ModuleFactors
from backhand.cli.main import main
from backhand.errors import ArtifactError, BackhandError, CheckError, UsageError
from backhand.interop import command as exporting
from backhand.interop.command import export_command
from backhand.interop.opened_adapter import open_adapter
from backhand.interop.options import ExportOptions, Format
from backhand.interop.other_formats import kohya_name, ollama_base
from backhand.interop.proving import factor_error
from tests.support.tiny_adapters import SCALINGS, save_tiny_adapter
from tests.support.tiny_models import full_logits, save_tiny, tiny_documents, tiny_model


def export(tiny: Any, scaling: str, to: Format, output: Path, **options: Any) -> Path:
    return export_command(
        ExportOptions(
            adapter=tiny.adapters[scaling], to=to, output=output, model=str(tiny.directory), quiet=True, **options
        )
    )


def updates(tiny: Any, scaling: str) -> dict[str, torch.Tensor]:
    """scaling · lora_B @ lora_A of every module, float64."""
    factors = open_adapter(str(tiny.directory), tiny.adapters[scaling], force_base=False).factors
    return {name: one.scaling * one.lora_B.double() @ one.lora_A.double() for name, one in factors.items()}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_mlx_computes_the_same_updates(scaling: str, tiny: Any, tmp_path: Path) -> None:
    output = export(tiny, scaling, "mlx", tmp_path / "mlx")
    assert sorted(path.name for path in output.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    config = json.loads((output / "adapter_config.json").read_text())
    tensors = load_file(output / "adapters.safetensors")
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == tiny.model.config.num_hidden_layers
    expected = updates(tiny, scaling)
    assert len(tensors) == 2 * len(expected)
    for name, update in expected.items():
        lora_a, lora_b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
        assert lora_a.shape == (update.shape[1], parameters["rank"])  # mlx_lm makes layers of this one rank
        assert torch.allclose(parameters["scale"] * (lora_a @ lora_b).T, update, rtol=1e-5, atol=1e-7)
        assert name.split(".", 3)[3] in parameters["keys"]


def test_what_mlx_adapts_beyond_the_adapter_is_zero_there(tiny: Any, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tiny.model, tmp_path / "a", target_modules=["v_proj"], layers_to_transform=[1])
    output = tmp_path / "mlx"
    export_command(ExportOptions(adapter=adapter, to="mlx", output=output, model=str(tiny.directory), quiet=True))
    tensors = load_file(output / "adapters.safetensors")
    sizes = {name: float(tensor.norm()) for name, tensor in tensors.items()}
    assert len(sizes) == 2 * tiny.model.config.num_hidden_layers
    assert {name for name, size in sizes.items() if size > 0} == {
        "model.layers.1.self_attn.v_proj.lora_a",
        "model.layers.1.self_attn.v_proj.lora_b",
    }


def test_ollama_gets_the_gguf_and_a_modelfile_with_a_whole_alpha(tiny: Any, tmp_path: Path) -> None:
    output = export(tiny, "odd-alpha", "ollama", tmp_path / "ollama")
    lines = (output / "Modelfile").read_text().splitlines()
    assert lines == [f"FROM {tiny.directory.resolve()}", "ADAPTER ./adapter.gguf"]
    from backhand.nn.loading.gguf_file import GGUFFile

    alpha = GGUFFile(output / "adapter.gguf").value("adapter.lora.alpha")
    assert alpha == 5 and tiny.adapters["odd-alpha"].joinpath("adapter_config.json").read_text().count("8.5") == 1


def test_plain_lora_keeps_the_bits_of_lora_b(tiny: Any, tmp_path: Path) -> None:
    for scaling in ("plain", "rank-pattern"):
        output = export(tiny, scaling, "gguf", tmp_path / f"{scaling}.gguf")
        ours = open_adapter(str(tiny.directory), tiny.adapters[scaling], force_base=False).factors
        theirs = open_adapter(str(tiny.directory), output, force_base=False).factors
        for name, one in ours.items():
            assert torch.equal(one.lora_B, theirs[name].lora_B) and torch.equal(one.lora_A, theirs[name].lora_A)
            assert one.scaling == pytest.approx(theirs[name].scaling, rel=1e-12)


def peft_logits(model: Any, adapter: Path) -> torch.Tensor:
    import copy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    return full_logits(adapted, tiny_documents([17])[0])


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_peft_computes_the_same_from_what_we_export(scaling: str, uniform: bool, tiny: Any, tmp_path: Path) -> None:
    output = export(tiny, scaling, "peft", tmp_path / "peft", uniform=uniform)
    expected = peft_logits(tiny.model, tiny.adapters[scaling])
    assert float((peft_logits(tiny.model, output) - expected).norm() / expected.norm()) < 1e-5
    config = json.loads((output / "adapter_config.json").read_text())
    if uniform:
        assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_gguf_adapter_becomes_pefts_again(scaling: str, tiny: Any, tmp_path: Path) -> None:
    """The way back, through PEFT: what our reader makes of the file is judged by somebody else."""
    gguf = export(tiny, scaling, "gguf", tmp_path / "adapter.gguf")
    output = tmp_path / "peft"
    export_command(ExportOptions(adapter=gguf, to="peft", output=output, model=str(tiny.gguf), quiet=True))
    expected = peft_logits(tiny.model, tiny.adapters[scaling])
    assert float((peft_logits(tiny.model, output) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("to", ["gguf", "mlx", "ollama"])
def test_an_adapted_tied_head_is_refused_by_name_and_merging_offered(to: Format, tiny: Any, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tiny.model, tmp_path / "a", target_modules=["lm_head", "up_proj"])
    options = ExportOptions(adapter=adapter, to=to, output=tmp_path / "out", model=str(tiny.directory), quiet=True)
    with pytest.raises(ArtifactError, match="1 adapted module cannot") as caught:
        export_command(options)
    assert "lm_head" in str(caught.value) and "--merge" in str(caught.value)
    assert not options.output or not options.output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    export_command(replace(options, merge=True))


OTHER_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True, "target_modules": ["up_proj", "q_proj"]}, "model.layers.2.mlp.up_proj"),
    "lora-bias": ({"lora_bias": True, "target_modules": ["up_proj"]}, "model.layers.2.mlp.up_proj"),
    "embedding": ({"target_modules": ["embed_tokens", "up_proj"]}, "model.embed_tokens"),
    "saved": ({"target_modules": ["up_proj"], "modules_to_save": ["norm", "lm_head"]}, "model.norm"),
    "tokens": ({"target_modules": ["up_proj"], "trainable_token_indices": [3, 5]}, "model.embed_tokens"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_else_may_be_trained_is_refused_by_name(kind: str, tiny: Any, tmp_path: Path) -> None:
    lora, module = OTHER_KINDS[kind]
    adapter = save_tiny_adapter(tiny.model, tmp_path / "a", **lora)
    for to in ("gguf", "mlx", "ollama"):
        options = ExportOptions(adapter=adapter, to=to, output=tmp_path / "out", model=str(tiny.directory), quiet=True)  # type: ignore[arg-type]
        with pytest.raises(ArtifactError) as caught:
            export_command(options)
        assert module in str(caught.value) and "--merge" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def save_unet_adapter(directory: Path, **changes: Any) -> Path:
    """PEFT's files of a U-Net's adapter: an attention, a convolution, a text encoder's projection."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": ((4, 24), (16, 4)),
        "mid_block.resnets.0.conv1": ((4, 8, 3, 3), (12, 4, 1, 1)),
        "text_model.encoder.layers.3.self_attn.k_proj": ((4, 20), (20, 4)),
    }
    tensors = {}
    for name, (lora_A, lora_B) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(lora_A, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(lora_B, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["to_q", "conv1", "k_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    return directory


def test_kohya_has_factors_and_alpha_of_every_module(tmp_path: Path) -> None:
    adapter = save_unet_adapter(tmp_path / "a", use_rslora=True, alpha_pattern={"conv1": 3})
    output = tmp_path / "adapter.safetensors"
    export_command(ExportOptions(adapter=adapter, to="kohya", output=output, quiet=True))
    written, theirs = load_file(output), load_file(adapter / "adapter_model.safetensors")
    for path, key, scaling in (
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q", "lora_unet_down_blocks_0_attentions_1_", 3.0),
        ("mid_block.resnets.0.conv1", "lora_unet_mid_block_resnets_0_conv1", 1.5),
        ("text_model.encoder.layers.3.self_attn.k_proj", "lora_te_text_model_encoder_layers_3_self_attn_k_proj", 3.0),
    ):
        (name,) = {name.split(".")[0] for name in written if name.startswith(key)}
        assert torch.equal(written[f"{name}.lora_down.weight"], theirs[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(written[f"{name}.lora_up.weight"], theirs[f"base_model.model.{path}.lora_B.weight"])
        assert float(written[f"{name}.alpha"]) / 4 == scaling
    assert len(written) == 9


def test_kohya_refuses_language_models_by_name(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.self_attn\.q_proj") as caught:
        export(tiny, "plain", "kohya", tmp_path / "out.safetensors")
    assert "--merge" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert kohya_name("unet.up_blocks.1.conv") == "lora_unet_up_blocks_1_conv"
    assert kohya_name("down_blocks_of_something_else") is None


@pytest.mark.parametrize("to", ["gguf", "mlx", "ollama", "peft"])
def test_a_file_that_means_something_else_fails_and_is_gone(
    to: Format, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that changes one number simulates a writer that wrote it wrongly."""
    for reader in ("_read", "read_mlx_files"):
        honest = getattr(exporting, reader)

        def wrong(*args: Any, honest: Any = honest) -> dict[str, ModuleFactors]:
            read = dict(honest(*args))
            name, one = next(iter(read.items()))
            read[name] = replace(one, lora_B=one.lora_B * (1 + 1e-4))
            return read

        monkeypatch.setattr(exporting, reader, wrong)
    with pytest.raises(CheckError, match="every factor"):
        export(tiny, "plain", to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_way_to_differ_is_seen() -> None:
    one = ModuleFactors(torch.randn(2, 5), torch.randn(4, 2), 1.5)
    zero = ModuleFactors(torch.zeros(2, 5), torch.zeros(4, 2), 1.0)
    assert factor_error({"a": one}, {"a": one.scaled_to(0.7).padded_to(3), "b": zero}) < 1e-7
    assert factor_error({"a": zero}, {"a": zero}) == 0
    for read in (
        {},
        {"a": one, "b": one},
        {"a": zero},
        {"a": replace(one, lora_A=one.lora_A * 2, lora_B=one.lora_B / 2)},
        {"a": replace(one, lora_B=one.lora_B[:3])},
        {"a": ModuleFactors(one.lora_A[:1], one.lora_B[:, :1], 1.5)},
        {"a": replace(one, scaling=1.5 * (1 + 2e-6))},
        {"a": replace(one, lora_B=one.lora_B * float("nan"))},
    ):
        assert not factor_error({"a": one}, read) <= 1e-6


def test_outputs_that_exist_and_options_that_contradict_are_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("there", "link"):
        with pytest.raises(UsageError, match="exists"):
            export(tiny, "plain", "gguf", tmp_path / name)
    common = ["export", "--model", str(tiny.directory), "--adapter", str(tiny.adapters["plain"])]
    for words in (
        ["--to", "gguf"],
        ["--output", "x"],
        ["--to", "gguf", "--output", "x", "--dtype", "q8_0"],
        ["--to", "gguf", "--output", "x", "--uniform"],
        ["--to", "kohya", "--output", "x", "--merge"],
        ["--to", "gguf", "--output", "x", "--merge", "--tolerance", "-1"],
    ):
        assert main([*common, *words]) == 2, words


def test_below_a_file_nothing_is_written(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BackhandError):
        export(tiny, "plain", "gguf", tmp_path / "file" / "adapter.gguf")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_adapter_of_another_family_is_refused(tiny: Any, tmp_path: Path) -> None:
    gguf = export(tiny, "plain", "gguf", tmp_path / "adapter.gguf")
    other = save_tiny(tiny_model("qwen3"), tmp_path / "qwen3")
    with pytest.raises(ArtifactError, match="architecture 'llama'"):
        open_adapter(str(other), gguf, force_base=False)


@pytest.mark.parametrize("command", [["merge"], ["export", "--to", "gguf"]])
def test_of_a_model_for_transformers_alone_it_says_how_peft_goes_on(
    command: list[str], tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tiny.model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (base / "config.json").write_text(json.dumps(config))
    words = ["--model", str(base), "--adapter", str(tiny.adapters["plain"]), "--output", str(tmp_path / "o.gguf")]
    assert main([*command, *words]) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "dynamic" in said and "merge_and_unload()" in said and "--engine" not in said


def test_where_it_lies_and_what_to_type_next_is_printed(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ExportOptions(adapter=tiny.adapters["plain"], to="peft", model=str(tiny.directory))
    export_command(replace(options, output=tmp_path / "my adapter"))
    written, _, code = capsys.readouterr().out.partition("next: ")
    assert f"written: '{tmp_path / 'my adapter'}'" in written
    names: dict[str, Any] = {}
    exec(textwrap.dedent(f"      {code}"), names)
    assert isinstance(names["model"], peft.PeftModel)
    export_command(replace(options, to="gguf", output=tmp_path / "a.gguf"))
    assert f"next: llama-cli -m BASE.gguf --lora {tmp_path / 'a.gguf'}" in capsys.readouterr().out
    export_command(replace(options, to="mlx", output=tmp_path / "mlx"))
    command = f"next: mlx_lm.generate --model {tiny.directory} --adapter-path {tmp_path / 'mlx'} --prompt '…'"
    assert command in capsys.readouterr().out


def test_a_modelfile_names_no_file_of_a_python_environment(tmp_path: Path) -> None:
    packaged = tmp_path / "env" / "site-packages" / "llm" / "base.Q4_1.gguf"
    packaged.parent.mkdir(parents=True)
    packaged.write_bytes(b"weights")
    (tmp_path / "out").mkdir()
    source: Any = SimpleNamespace(origin="base", path=packaged)
    assert ollama_base(source, tmp_path / "out") == "./base.gguf"
    assert (tmp_path / "out" / "base.gguf").read_bytes() == b"weights"
    own = tmp_path / "own.gguf"
    own.write_bytes(b"weights")
    assert ollama_base(SimpleNamespace(origin="own", path=own), tmp_path) == str(own)  # type: ignore[arg-type]
    assert ollama_base(SimpleNamespace(origin="ollama:tiny:1b", path=own), tmp_path) == "tiny:1b"  # type: ignore[arg-type]
