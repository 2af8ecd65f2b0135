"""Merged models equal base and adapter side by side, in transformers too; what rounding costs; nothing half done."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as StorageType

from backhand import printing
from backhand.adapters.module_factors import ModuleFactors
from backhand.cli.main import main
from backhand.errors import ArtifactError, CheckError
from backhand.interop import gguf_model_writer, huggingface_writer, merged_weights, merging, proving
from backhand.interop.command import export_command
from backhand.interop.merged_weights import MergedWeights, merged_weight
from backhand.interop.merging import merge_command
from backhand.interop.opened_adapter import open_adapter
from backhand.interop.options import ExportOptions, MergedType, MergeOptions
from backhand.interop.proving import Prover
from backhand.nn.families.family import split_layer
from backhand.nn.loading import open_model
from backhand.nn.loading.gguf_file import GGUFFile
from backhand.runs.directory import run_of
from tests.support.tiny_adapters import SCALINGS, adapted, save_tiny_adapter
from tests.support.tiny_encoders import ENCODERS, states_of, tiny_encoder
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import FAMILIES, full_logits, save_tiny, tiny_documents, tiny_model


def merge(model: Path, adapter: Path, output: Path, **options: Any) -> Path:
    return merge_command(MergeOptions(adapter=adapter, output=output, model=str(model), quiet=True, **options))


def logits_in_transformers(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return full_logits(model.eval(), tiny_documents([19])[0])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("base", ["directory", "gguf"])
@pytest.mark.parametrize("scaling", ["plain", "every-pattern"])
def test_transformers_computes_from_the_merged_directory_what_peft_does(
    base: str, scaling: str, tiny: Any, tmp_path: Path
) -> None:
    output = merge(getattr(tiny, base), tiny.adapters[scaling], tmp_path / "merged")
    expected = full_logits(adapted(tiny_model("llama-tied"), **SCALINGS[scaling]), tiny_documents([19])[0])
    assert distance(logits_in_transformers(output), expected) < 1e-5
    assert distance(full_logits(tiny.model, tiny_documents([19])[0]), expected) > 0.1
    assert transformers.AutoTokenizer.from_pretrained(output)("the user")["input_ids"]


@pytest.mark.parametrize("variant", ["llama-biases", "exaone4-full", "qwen3-yarn", *FAMILIES])
def test_so_it_does_for_every_family(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant)
    base, adapter = save_tiny(model, tmp_path / "base"), save_tiny_adapter(model, tmp_path / "adapter")
    output = merge(base, adapter, tmp_path / "merged")
    expected = full_logits(adapted(model), tiny_documents([19])[0])
    assert distance(logits_in_transformers(output), expected) < 1e-5


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3-embedding"])
def test_the_final_states_of_a_merged_encoder_are_proved(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_encoder(name)
    trunk = getattr(model, "model", model)
    lora: dict[str, Any] = {"target_modules": ENCODERS[name][2], "task_type": None}
    base, adapter = save_tiny(trunk, tmp_path / "base"), save_tiny_adapter(trunk, tmp_path / "adapter", **lora)
    say, said = Prover.say, list[str]()
    monkeypatch.setattr(Prover, "say", lambda self, text: (said.append(text), say(self, text)))
    output = merge(base, adapter, tmp_path / "merged")
    assert any(re.match(r"proved: on \d+ probe tokens the final states of the merged model", line) for line in said)
    documents = tiny_documents([19])
    with torch.no_grad():
        expected = states_of(adapted(trunk, **lora).get_base_model(), documents)
        found = states_of(transformers.AutoModel.from_pretrained(output, attn_implementation="eager"), documents)
        assert distance(states_of(trunk, documents), expected) > 0.1
    assert distance(found, expected) < 1e-5

    make = MergedWeights.make

    def damaged(self: MergedWeights, tensor: str, rounded: Any) -> torch.Tensor:
        changes = self.is_merged(tensor) and split_layer(tensor) is not None
        return make(self, tensor, lambda values: rounded(values * 1.01 if changes else values))

    monkeypatch.setattr(MergedWeights, "make", damaged)
    with pytest.raises(CheckError, match="probe tokens the final states"):
        merge(base, adapter, tmp_path / "damaged", dtype="float32")
    assert not (tmp_path / "damaged").exists()


def test_a_changed_embedding_adds_no_head_to_a_model_without_one(tmp_path: Path) -> None:
    trunk: Any = tiny_encoder("qwen3-embedding").model
    base = save_tiny(trunk, tmp_path / "base")
    adapter = save_tiny_adapter(trunk, tmp_path / "adapter", target_modules=["embed_tokens"], task_type=None)
    output = merge(base, adapter, tmp_path / "merged")
    assert {*open_model(output).tensor_names()} == {*open_model(base).tensor_names()}


@pytest.mark.parametrize("name", ["merged", "merged.gguf"])
def test_its_progress_is_counted_to_the_end(
    name: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[str, list[int]] = {}
    counting = printing.counting

    @contextmanager
    def listening(what: str, total: int, many: str = "rows") -> Iterator[Callable[[], None]]:
        counted[f"{what}, {many}"] = [total, 0]

        def done() -> None:
            counted[f"{what}, {many}"][1] += 1
            inner()

        with counting(what, total, many) as inner:
            yield done

    for module in (huggingface_writer, gguf_model_writer, merged_weights, proving):
        monkeypatch.setattr(module, "counting", listening)
    merge(tiny.gguf, tiny.adapters["plain"], tmp_path / name)
    assert {what.partition(" ")[0] for what in counted} == {"writing", "reading", "computing"}
    assert all(done == total for total, done in counted.values())
    assert all(total > 0 for what, (total, _) in counted.items() if "tensors" in what)


def test_a_tied_head_becomes_a_matrix_of_its_own_and_the_embedding_stays(tiny: Any, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tiny.model, tmp_path / "adapter", target_modules=["lm_head"])
    output = merge(tiny.directory, adapter, tmp_path / "merged")
    written = open_model(output)
    assert written.config["tie_word_embeddings"] is False
    embedding = tiny.model.state_dict()["model.embed_tokens.weight"]
    assert torch.equal(written.load("model.embed_tokens.weight"), embedding)
    assert not torch.equal(written.load("lm_head.weight"), embedding)
    expected = full_logits(adapted(tiny_model("llama-tied"), target_modules=["lm_head"]), tiny_documents([19])[0])
    assert distance(logits_in_transformers(output), expected) < 1e-5


def test_shards_are_no_larger_than_asked_and_hold_every_tensor_once(tiny: Any, tmp_path: Path) -> None:
    most = 60_000
    output = merge(tiny.directory, tiny.adapters["plain"], tmp_path / "merged", max_shard_bytes=most)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(output.glob("model-*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
    embedding = "model.embed_tokens.weight"  # alone above the limit
    for file in files:
        assert file.stat().st_size < most + 4096 or index["weight_map"][embedding] == file.name
    assert sorted(index["weight_map"]) == sorted(open_model(tiny.directory).tensor_names())
    whole = merge(tiny.directory, tiny.adapters["plain"], tmp_path / "whole")
    assert torch.equal(logits_in_transformers(output), logits_in_transformers(whole))


def test_one_tensor_at_a_time_is_in_memory(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is written before the next one is made: none waits for its shard."""
    events: list[str] = []
    make, as_bytes = MergedWeights.make, huggingface_writer._bytes

    def noting_make(self: MergedWeights, name: str, rounded: Any) -> torch.Tensor:
        events.append("made")
        return make(self, name, rounded)

    def noting_bytes(tensor: torch.Tensor) -> memoryview:
        events.append("written")
        return as_bytes(tensor)

    monkeypatch.setattr(MergedWeights, "make", noting_make)
    monkeypatch.setattr(huggingface_writer, "_bytes", noting_bytes)
    merge(tiny.directory, tiny.adapters["plain"], tmp_path / "merged")
    assert events == ["made", "written"] * len(open_model(tiny.directory).tensor_names())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_type_of_a_gguf_file_is_what_the_file_says(dtype: MergedType, tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    base = write_tiny_gguf(model, tmp_path / "base.gguf")
    adapter = save_tiny_adapter(model, tmp_path / "adapter", alpha=10)
    output = merge(base, adapter, tmp_path / "merged.gguf", dtype=dtype, tolerance=1.0)
    kinds = {"float32": StorageType.F32, "float16": StorageType.F16, "bfloat16": StorageType.BF16}
    expected = kinds[dtype] if dtype in kinds else StorageType[dtype.upper()]
    for name, tensor in GGUFFile(output).tensors.items():
        assert tensor.type_id == (StorageType.F32 if len(tensor.shape) == 1 else expected), name
    merged = open_model(output).load("model.layers.0.mlp.up_proj.weight").float()
    factors = open_adapter(str(base), adapter, force_base=False).factors["model.layers.0.mlp.up_proj"]
    exact = merged_weight(model.state_dict()["model.layers.0.mlp.up_proj.weight"], factors)
    bound = {"float32": 1e-7, "float16": 5e-4, "bfloat16": 4e-3, "q8_0": 8e-3, "q5_1": 0.05, "q5_0": 0.06}.get(
        dtype, 0.12
    )
    assert distance(merged, exact) < bound


def test_a_type_that_is_given_wins_over_the_bases(tmp_path: Path) -> None:
    """Also float32, whose number in ggml is 0."""
    model = tiny_model("llama")
    base = save_tiny(tiny_model("llama").bfloat16(), tmp_path / "base")
    output = merge(base, save_tiny_adapter(model, tmp_path / "a", alpha=10), tmp_path / "m.gguf", dtype="float32")
    assert {tensor.type_id for tensor in GGUFFile(output).tensors.values()} == {StorageType.F32}


def test_of_a_quantized_base_what_the_adapter_leaves_alone_keeps_its_bytes(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    base = write_tiny_gguf(model, tmp_path / "base.gguf", storage=StorageType.Q4_1)
    adapter = save_tiny_adapter(model, tmp_path / "adapter", target_modules=["v_proj"])
    output = merge(base, adapter, tmp_path / "merged.gguf")
    before, after = GGUFFile(base), GGUFFile(output)
    assert list(before.tensors) == list(after.tensors)
    for name, tensor in after.tensors.items():
        if "attn_v" in name:
            assert tensor.type_id == StorageType.F32
        else:
            assert tensor.type_id == before.tensors[name].type_id
            assert after.bytes_of(tensor).tobytes() == before.bytes_of(before.tensors[name]).tobytes()
    assert after.value("general.description").startswith("LoRA adapter merged into base.gguf, quantized: Q4_1 (")
    assert after.value("tokenizer.ggml.tokens") == before.value("tokenizer.ggml.tokens")


def test_a_quantized_base_is_named_and_its_directory_is_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    base = write_tiny_gguf(model, tmp_path / "base.gguf", storage=StorageType.Q8_0)
    adapter = save_tiny_adapter(model, tmp_path / "adapter", alpha=10)
    words = ["merge", "--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "quantized: Q8_0" in printed and "dequantized" in printed
    assert f"Base: {base.name}, quantized: Q8_0" in (tmp_path / "merged" / "README.md").read_text()
    written = open_model(tmp_path / "merged")
    assert written.config["dtype"] == "float32"
    assert written.load("model.layers.0.mlp.up_proj.weight").dtype == torch.float32


def small_adapter(tiny: Any, directory: Path, size: float) -> Path:
    from safetensors.torch import load_file, save_file

    save_tiny_adapter(tiny.model, directory, alpha=10)
    file = directory / "adapter_model.safetensors"
    tensors = {name: tensor * (size if "lora_B" in name else 1) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    return directory


def test_an_update_that_bfloat16_rounds_away_fails_and_leaves_nothing(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tiny_model("llama-tied").bfloat16(), tmp_path / "base")
    adapter = small_adapter(tiny, tmp_path / "adapter", 3e-4)
    words = ["merge", "--model", str(base), "--adapter", str(adapter), "--output"]
    assert main([*words, str(tmp_path / "bf16")]) == 6
    captured = capsys.readouterr()
    assert "float32" in captured.err and "--tolerance" in captured.err
    shares = [float(share) for share in re.findall(r"mean (\S+) +most", captured.out)]
    assert len(shares) == 3 and all(0.5 < share <= 1 for share in shares)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert main([*words, str(tmp_path / "f32"), "--dtype", "float32"]) == 0
    shares = [float(share) for share in re.findall(r"mean (\S+) +most", capsys.readouterr().out)]
    assert max(shares) < 1e-3
    assert main([*words, str(tmp_path / "lossy"), "--tolerance", "2"]) == 0


def test_rounding_that_takes_more_than_the_update_is_no_share_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    base = write_tiny_gguf(model, tmp_path / "base.gguf")
    adapter = save_tiny_adapter(model, tmp_path / "adapter", alpha=0.01)
    words = ["merge", "--model", str(base), "--adapter", str(adapter), "--tolerance", "1000", "--dtype"]
    assert main([*words, "q8_0", "--output", str(tmp_path / "q8_0.gguf")]) == 0
    rounded = capsys.readouterr().out
    assert min(float(mean) for mean in re.findall(r"mean (\S+) +most", rounded)) > 1
    assert "above 1: the base's own numbers are rounded too" in rounded and "share of the update" not in rounded
    assert "differ by a small share of what the adapter changes (" in rounded
    assert main([*words, "float32", "--output", str(tmp_path / "float32.gguf")]) == 0
    assert "above 1" not in capsys.readouterr().out


def test_the_share_lost_is_one_where_all_is_lost_and_small_where_nothing_is() -> None:
    weight = torch.ones(8, 6)
    factors = ModuleFactors(torch.full((1, 6), 1e-2), torch.full((8, 1), 1e-2), 1.0)  # 1 + 1e-4 is 1 in bfloat16

    class Source:
        def tensor_names(self) -> tuple[str, ...]:
            return ("a.weight",)

        def load(self, name: str) -> torch.Tensor:
            return weight

    for dtype, low, high in ((torch.bfloat16, 1.0, 1.0), (torch.float32, 0.0, 1e-3)):
        weights = MergedWeights(Source(), {"a": factors})  # type: ignore[arg-type]
        weights.make("a.weight", lambda tensor, dtype=dtype: tensor.to(dtype))
        (loss,) = weights.losses
        assert low - 1e-9 <= loss.lost <= high + 1e-9
        assert loss.update == pytest.approx(1e-4, rel=1e-6)


def test_a_tensor_that_reads_back_differently_fails_and_leaves_nothing(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_bytes = huggingface_writer._bytes

    def flipped(tensor: torch.Tensor) -> memoryview:
        data = bytearray(as_bytes(tensor))
        data[3] ^= 1 if len(data) > 10_000 else 0
        return memoryview(data)

    monkeypatch.setattr(huggingface_writer, "_bytes", flipped)
    with pytest.raises(CheckError, match="bit by bit"):
        merge(tiny.directory, tiny.adapters["plain"], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_merging_the_wrong_update_fails_by_its_logits(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merging.MergedWeights

    def slightly_wrong(source: Any, factors: dict[str, ModuleFactors], *rest: Any, **more: Any) -> MergedWeights:
        wrong = {name: replace(one, scaling=one.scaling * 1.01) for name, one in factors.items()}
        return right(source, wrong, *rest, **more)

    monkeypatch.setattr(merging, "MergedWeights", slightly_wrong)
    with pytest.raises(CheckError, match="probe tokens"):
        merge(tiny.directory, tiny.adapters["plain"], tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_the_type_are_an_error(tiny: Any, tmp_path: Path) -> None:
    adapter = small_adapter(tiny, tmp_path / "adapter", 1e6)
    for output in ("merged", "merged.gguf"):
        with pytest.raises(CheckError, match="not finite"):
            merge(tiny.directory, adapter, tmp_path / output, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_tokenizer_without_a_name_is_refused_for_gguf(tiny: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny.directory, base)
    described = json.loads((base / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    (base / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="tokenizer") as caught:
        merge(base, tiny.adapters["plain"], tmp_path / "merged.gguf")
    assert "convert_hf_to_gguf.py" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_gguf_file_is_compared_in_its_own_precision(tiny: Any, tmp_path: Path) -> None:
    """transformers gives a base that it converts from a GGUF file the numbers of that file as they are in float32."""
    base = Path(shutil.copytree(tiny.directory, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    for eps in (9.999999747378752e-06, 0.1):
        (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": eps}))
        output = merge(base, tiny.adapters["plain"], tmp_path / f"{eps}.gguf")
    other = config | {"rms_norm_eps": 1e-6, "intermediate_size": 5, "rope_parameters": {"rope_theta": 7.0}}
    (base / "config.json").write_text(json.dumps(other))
    with pytest.raises(ArtifactError) as caught:
        merging.check_same_model(open_model(base), open_model(output), untied=False)
    sizes = f"intermediate_size: 5 -> {config['intermediate_size']}"
    assert f"differ: {sizes}, norm_eps: 1e-06 -> 0.1, rotary.0.theta: 7.0 -> 10" in str(caught.value)


def test_proofs_go_to_the_run_that_the_adapter_belongs_to(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny.adapters["plain"], run / "adapter")
    (run / "config.toml").write_text("")
    assert run_of(run / "adapter") == run and run_of(tiny.adapters["plain"]) is None
    merge(tiny.directory, run / "adapter", tmp_path / "merged")
    export_command(
        ExportOptions(
            adapter=run / "adapter", to="gguf", output=tmp_path / "a.gguf", model=str(tiny.directory), quiet=True
        )
    )
    with pytest.raises(CheckError):
        merge(tiny.directory, run / "adapter", tmp_path / "bf16", dtype="bfloat16", tolerance=1e-6)
    lines = [json.loads(line) for line in (run / "proofs.jsonl").read_text().splitlines()]
    assert [(line["command"], line["passed"]) for line in lines] == [
        ("merge", True),
        ("merge", True),
        ("export", True),
        ("export", True),
        ("merge", True),
        ("merge", False),
    ]
    assert all(line["time"] and line["bound"] is not None for line in lines)
    assert Prover("merge", run / "adapter", None).proofs == []


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf", "ollama"])
def test_export_with_merge_is_the_same_merge(to: Any, tiny: Any, tmp_path: Path) -> None:
    name = {"gguf": "merged.gguf"}.get(to, "merged")
    options = ExportOptions(
        adapter=tiny.adapters["plain"], to=to, output=tmp_path / name, model=str(tiny.gguf), merge=True, quiet=True
    )
    output = export_command(options)
    expected = full_logits(adapted(tiny_model("llama-tied"), **SCALINGS["plain"]), tiny_documents([19])[0])
    file = output / "model.gguf" if to == "ollama" else output
    if to == "ollama":
        assert (output / "Modelfile").read_text() == "FROM ./model.gguf\n"
    from backhand.nn.decoder.decoder import Decoder

    found = Decoder.from_source(open_model(file), dtype=torch.float32).logits(tiny_documents([19])[0])
    assert distance(found, expected) < 1e-5


def changed(model: Any, **lora: Any) -> Any:
    """`adapted`, with everything else that it trains moved away from where the base has it."""
    wrapped = adapted(model, **lora)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in ("magnitude", "modules_to_save", "trainable_tokens")):
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "up_proj"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["norm", "lm_head"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["up_proj"], "trainable_token_indices": [3, 5, 40]},
    ],
    ids=["dora", "embedding", "saved", "saved-embedding", "tokens"],
)
def test_whatever_else_was_trained_is_merged_as_peft_computes_it(
    lora: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    model = tiny_model("llama-tied" if tied else "llama")
    base = save_tiny(model, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = changed(model, **lora)
        theirs.save_pretrained(str(tmp_path / "adapter"))
    document = torch.tensor([3, 5, 17, 40, 3, *tiny_documents([15])[0].tolist()])
    expected = full_logits(theirs.eval(), document)
    output = merge(base, tmp_path / "adapter", tmp_path / "merged")
    load = transformers.AutoModelForCausalLM.from_pretrained
    found = full_logits(load(output, dtype=torch.float32, attn_implementation="eager").eval(), document)
    assert distance(found, expected) < 1e-5
    gguf = merge(base, tmp_path / "adapter", tmp_path / "merged.gguf")
    from backhand.nn.decoder.decoder import Decoder

    again = Decoder.from_source(open_model(gguf), dtype=torch.float32).logits(document)
    assert distance(again, expected) < 1e-5


def test_the_bias_of_lora_b_has_no_place_in_a_weight(tiny: Any, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(tiny.model, tmp_path / "adapter", lora_bias=True, target_modules=["up_proj"])
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.mlp\.up_proj"):
        merge(tiny.directory, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
