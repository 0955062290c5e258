"""Models that users bring: their weights fit, or one line says what does not."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import conversations, tiny_model, toy_tokenizer, write_rows
from potstill import cli
from potstill.data import read_conversations
from potstill.errors import ConfigError, DataError, ModelError, ModelNotFound
from potstill.models import load_config, load_generation_config, load_model, load_tokenizer
from potstill.students import keep_layers

Weights = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def write(folder: Path, **shape: Any) -> Path:
    tiny_model(**shape).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def edit_weights(folder: Path, edit: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        name: weight for name, weight in weights.items() if not any(part in name for part in parts)
    }


def renamed(rename: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {rename(name): weight for name, weight in weights.items()}


def set_first(name: str, value: float) -> Callable[[Weights], Weights]:
    def edit(weights: Weights) -> Weights:
        weights[name].view(-1)[0] = value
        return weights

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without(HEAD), "no weights for lm_head.weight, which LlamaForCausalLM needs"),
        (without(HEAD), "if the embedding is the head, set tie_word_embeddings"),
        (without("layers.1.mlp.up_proj"), "no weights for model.layers.1.mlp.up_proj.weight"),
        (without("layers.1."), "no weights for model.layers.1.input_layernorm.weight, "),
        (without("layers.1."), "and 6 more"),
        (renamed(lambda name: f"_orig_mod.{name}"), "prefix '_orig_mod.' of a wrapper"),
        (renamed(lambda name: f"module.{name}"), "prefix 'module.' of a wrapper"),
        (renamed(lambda name: f"base_model.model.{name}"), "prefix 'base_model.model.'"),
        (renamed(lambda name: name.replace("model.", "net.")), "no weights for model.embed"),
        (
            lambda weights: {**weights, HEAD: weights[HEAD][:200].clone()},
            r"lm_head.weight has the shape \[200, 32\], and config.json needs \[272, 32\]",
        ),
        (
            lambda weights: {**weights, "lm_head.bias": torch.ones(272)},
            "LlamaForCausalLM does not use its weights lm_head.bias",
        ),
        (set_first("model.norm.weight", torch.nan), "model.norm.weight is NaN or infinite"),
        (set_first(EMBEDDING, torch.inf), "embed_tokens.weight is NaN or infinite in float32"),
        (set_first(HEAD, -torch.inf), "lm_head.weight is NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_named(
    tmp_path: Path, edit: Callable[[Weights], Weights], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(write(tmp_path, layers=2), edit)
    with pytest.raises(ModelError, match=says) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert "LOAD REPORT" not in caplog.text


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    write(tmp_path, family="qwen2")
    config = tmp_path / "config.json"
    edit_json(config, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(ModelError, match=r"does not use its weights .*k_proj.bias.* and 9 more"):
        load_model(tmp_path)
    write(tmp_path)
    edit_json(config, model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=8)
    with pytest.raises(ModelError, match=r"no weights for .*k_norm.weight"):
        load_model(tmp_path)
    edit_json(config, model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=32, n_head=4)
    with pytest.raises(ModelError, match=r"no weights for"):
        load_model(tmp_path)


def test_a_configuration_with_fewer_layers_or_other_sizes_than_the_weights_is_refused(
    tmp_path: Path,
) -> None:
    write(tmp_path, layers=3)
    config = tmp_path / "config.json"
    edit_json(config, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"does not use its weights model.layers.2"):
        load_model(tmp_path)
    edit_json(config, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"no weights for model.layers.3"):
        load_model(tmp_path)
    edit_json(config, num_hidden_layers=3, vocab_size=300)
    with pytest.raises(ModelError, match=r"the shape \[272, 32\], and config.json needs \[300, 32"):
        load_model(tmp_path)


def test_a_mixture_without_one_expert_is_refused(tmp_path: Path) -> None:
    mixture(tmp_path)
    edit_weights(tmp_path, without("experts.1.w1"))
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert "experts.gate_up_proj" in str(caught.value)


def mixture(folder: Path) -> Any:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        bos_token_id=264,
        eos_token_id=265,
        pad_token_id=265,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return model


def test_a_quantized_checkpoint_is_checked_too(tmp_path: Path) -> None:
    def quantized(weights: Weights) -> Weights:
        made = {}
        for name, weight in weights.items():
            made[name] = weight
            if "proj" in name:
                blocks = weight.view(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
                scale = blocks.abs().amax((1, 3)) / 448
                scaled = blocks / scale[:, None, :, None]
                made[name] = scaled.view_as(weight).to(torch.float8_e4m3fn)
                made[f"{name}_scale_inv"] = scale
        return made

    edit_weights(write(tmp_path), quantized)
    with pytest.raises(ModelError, match=r"does not use its weights .*weight_scale_inv"):
        load_model(tmp_path)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "dequantize": True}
    settings["modules_to_not_convert"] = ["lm_head"]
    edit_json(tmp_path / "config.json", quantization_config=settings)
    opened, expected = load_model(tmp_path)[0], tiny_model()
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (opened, expected)]
    torch.testing.assert_close(*weights, rtol=0.1, atol=1e-3)
    edit_weights(tmp_path, without("layers.1.mlp.up_proj"))
    with pytest.raises(ModelError, match=r"no weights for model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path)


def test_what_other_tools_add_or_leave_out_is_no_error(tmp_path: Path) -> None:
    def same(folder: Path, model: Any) -> None:
        opened = load_model(folder)[0]
        ids = torch.arange(20)[None]
        assert torch.equal(opened(input_ids=ids).logits, model(input_ids=ids).logits)

    write(tmp_path)
    edit_weights(tmp_path, renamed(lambda name: name.removeprefix("model.")))  # a base model's
    same(tmp_path, tiny_model())
    write(tmp_path)
    more = {"v_head.summary.weight": torch.ones(1, 32), "vision.proj.weight": torch.ones(2, 2)}
    edit_weights(tmp_path, lambda weights: {**weights, **more})
    same(tmp_path, tiny_model())
    write(tmp_path, tied=True)
    edit_weights(tmp_path, lambda weights: {**weights, HEAD: weights[EMBEDDING].clone()})
    same(tmp_path, tiny_model(tied=True))
    write(tmp_path, family="gpt2")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 512, 512)}
    edit_weights(tmp_path, lambda weights: {**weights, **mask})
    same(tmp_path, tiny_model("gpt2"))


def test_a_saved_head_that_differs_from_the_embedding_it_is_tied_to_stays_in_a_cut_student(
    tmp_path: Path,
) -> None:
    write(tmp_path, tied=True)
    edit_weights(tmp_path, lambda weights: {**weights, HEAD: weights[EMBEDDING] + 1})
    teacher, _ = load_model(tmp_path)
    student = keep_layers(teacher, 2)
    for model in (teacher, student):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert torch.equal(head.weight, embedding.weight + 1)
    student.save_pretrained(tmp_path / "student")
    toy_tokenizer().save_pretrained(tmp_path / "student")
    reopened, _ = load_model(tmp_path / "student")
    assert torch.equal(reopened.lm_head.weight, student.lm_head.weight)
    assert torch.equal(reopened.model.embed_tokens.weight, student.model.embed_tokens.weight)


def test_weights_that_overflow_in_float16_are_refused_there_and_opened_in_bfloat16(
    tmp_path: Path,
) -> None:
    edit_weights(write(tmp_path), set_first(HEAD, 1e5))
    with pytest.raises(ModelError, match=r"lm_head.weight is NaN or infinite in float16; open it"):
        load_model(tmp_path, dtype="float16")
    load_model(tmp_path, dtype="bfloat16")


def test_a_bias_of_minus_infinity_is_kept(tmp_path: Path) -> None:
    import transformers

    config = transformers.PhiConfig(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.lm_head.bias.data[7] = -torch.inf
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].lm_head.bias[7] == -torch.inf


@pytest.mark.parametrize("size", [4, 5000, -1000])
def test_a_truncated_weights_file_is_named(tmp_path: Path, size: int) -> None:
    write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model.safetensors: damaged or cut off \(") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_absent_or_damaged_shard_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    toy_tokenizer().save_pretrained(tmp_path)
    load_model(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(ModelError, match=f"{shards[1].name}: damaged or cut off"):
        load_model(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"1 of the {len(shards)} files .* \({shards[1].name}\)"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index.json: damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ModelError, match=f"{name}: a Git LFS pointer.*git lfs pull"):
        load_model(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


def test_a_tokenizer_that_is_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    toy_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ModelError, match=r"tokenizer.json: a Git LFS pointer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.txt", "data.parquet"])
def test_data_that_is_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(DataError, match=f"{name}: a Git LFS pointer"):
        list(read_conversations(tmp_path / name))


def gguf_file(path: Path, *, left_out: str = "none") -> Path:
    """A GGUF file of a Llama with one layer and a byte-level tokenizer."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(0)
    tokenizer = json.loads(toy_tokenizer().backend_tokenizer.to_str())
    words = [*tokenizer["model"]["vocab"], "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * (len(words) - 2) + [3, 3])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(len(words) - 1)
    sizes = {
        "token_embd": (len(words), 32), "output": (len(words), 32), "output_norm": (32,),
        "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in sizes.items():
        if name != left_out:
            writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_opens_and_a_truncated_pointer_or_incomplete_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    file = gguf_file(tmp_path / "whole.gguf")
    assert load_model(file)[0].config.num_hidden_layers == 1
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 100, -100):
        cut.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ModelError, match=r"cut.gguf: not a whole GGUF file"):
            load_model(cut)
    cut.write_text(POINTER)
    with pytest.raises(ModelError, match=r"cut.gguf: a Git LFS pointer"):
        load_model(cut)
    with pytest.raises(ModelError, match=r"no weights for model.layers.0.mlp.up_proj.weight"):
        load_model(gguf_file(tmp_path / "part.gguf", left_out="blk.0.ffn_up"))
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 1


SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}


@pytest.mark.parametrize(
    "settings",
    [
        SAMPLING,
        {"do_sample": False, **SAMPLING},
        {"length_penalty": 2.0, "early_stopping": True},
        {"pad_token_id": -1},
        {"output_scores": True},
        {"use_cache": False, "cache_implementation": "static"},
    ],
)
def test_a_generation_config_that_transformers_refuses_to_save_is_mended(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    file = write(tmp_path) / "generation_config.json"
    edit_json(file, **settings, eos_token_id=[265, 3])
    model, _ = load_model(tmp_path)
    model.generation_config.bos_token_id = 1  # transformers refuses what was changed
    model.save_pretrained(tmp_path / "again")
    assert load_generation_config(tmp_path / "again").eos_token_id == [265, 3]


def test_a_student_with_such_a_generation_config_is_trained_and_saved(pair_folder: Path) -> None:
    student = write(pair_folder / "sampler", layers=2)
    edit_json(student / "generation_config.json", **SAMPLING, eos_token_id=[265, 3])
    write_rows(pair_folder / "data.jsonl", conversations(20))
    command = "distill teacher sampler --data data.jsonl --output-dir run --max-steps 2"
    assert cli.main(shlex.split(f"{command} --device cpu --precision fp32")) == 0
    saved = load_generation_config(pair_folder / "run" / "student")
    assert 3 in saved.eos_token_id
    assert saved.temperature in (None, 1.0)


def test_a_sampling_generation_config_keeps_its_settings(tmp_path: Path) -> None:
    edit_json(write(tmp_path) / "generation_config.json", do_sample=True, **SAMPLING)
    model, _ = load_model(tmp_path)
    kept = {name: getattr(model.generation_config, name) for name in SAMPLING}
    assert kept == SAMPLING


def test_a_generation_config_that_cannot_be_mended_is_one_line(tmp_path: Path) -> None:
    edit_json(write(tmp_path) / "generation_config.json", num_return_sequences=4)
    with pytest.raises(ModelError, match="`num_return_sequences`") as one:
        load_model(tmp_path)
    assert "\n" not in str(one.value)


class TestAdapters:
    """LoRA folders."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return write(tmp_path / "base")

    def save(self, folder: Path, base: Path, *, rows: int = 272, **settings: Any) -> Any:
        """Save an adapter with random weights; return the model that it makes."""
        from peft import LoraConfig, get_peft_model

        model, _ = load_model(base)
        model.config.name_or_path = str(base)
        model.name_or_path = str(base)
        if rows != 272:
            model.resize_token_embeddings(rows, mean_resizing=False)
        settings = {"target_modules": ["q_proj", "v_proj"], **settings}
        torch.manual_seed(5)
        chosen = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(model, chosen)
            for name, parameter in wrapped.named_parameters():
                if "modules_to_save" in name:
                    parameter.data += torch.randn_like(parameter)
            wrapped.save_pretrained(folder)
        return wrapped.eval()

    def same(self, folder: Path, expected: Any) -> Any:
        opened, _ = load_model(folder)
        ids = torch.arange(20)[None]
        expected_logits = expected(input_ids=ids).logits
        torch.testing.assert_close(opened(input_ids=ids).logits, expected_logits)
        assert not any("lora" in name for name in opened.state_dict())
        assert all(parameter.requires_grad for parameter in opened.parameters())
        return opened

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_dora": True},
            {"use_rslora": True, "r": 4, "lora_alpha": 32},
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            {"target_modules": ["q_proj", "lm_head"]},
        ],
    )
    def test_an_adapter_is_merged_with_its_base(
        self, tmp_path: Path, base: Path, settings: dict[str, Any]
    ) -> None:
        self.same(tmp_path / "adapter", self.save(tmp_path / "adapter", base, **settings))

    def test_tokenizer_and_configuration_come_from_the_base_if_the_adapter_has_none(
        self, tmp_path: Path, base: Path
    ) -> None:
        adapter = tmp_path / "adapter"
        self.save(adapter, base)
        assert len(load_tokenizer(adapter)) == 266
        toy_tokenizer(added=("<|tool|>",)).save_pretrained(adapter)
        assert len(load_tokenizer(adapter)) == 267
        assert load_config(adapter).num_hidden_layers == 4
        assert load_generation_config(adapter).eos_token_id == 265

    def test_an_adapter_with_more_vocabulary_rows_resizes_its_base(
        self, tmp_path: Path, base: Path
    ) -> None:
        settings = {"modules_to_save": ["lm_head", "embed_tokens"], "rows": 280}
        expected = self.save(tmp_path / "adapter", base, **settings)
        opened = self.same(tmp_path / "adapter", expected)
        assert opened.config.vocab_size == 280

    def test_a_saved_head_of_a_tied_base_stays_apart_when_the_merged_model_is_saved(
        self, tmp_path: Path
    ) -> None:
        base, adapter = write(tmp_path / "base", tied=True), tmp_path / "adapter"
        expected = self.save(adapter, base, modules_to_save=["lm_head"])
        opened = self.same(adapter, expected)
        opened.save_pretrained(tmp_path / "saved")
        toy_tokenizer().save_pretrained(tmp_path / "saved")
        self.same(tmp_path / "saved", expected)

    def test_weights_whose_names_do_not_match_the_base_are_refused(
        self, tmp_path: Path, base: Path
    ) -> None:
        adapter = tmp_path / "adapter"
        self.save(adapter, base)
        file = adapter / "adapter_model.safetensors"
        save_file({key.replace("layers", "h"): one for key, one in load_file(file).items()}, file)
        with pytest.raises(ModelError, match=r"its weights do not fit .*\(32, first .*model.h.0"):
            load_model(adapter)

    def test_a_head_that_was_not_saved_with_the_adapter_is_missed(
        self, tmp_path: Path, base: Path
    ) -> None:
        adapter = tmp_path / "adapter"
        self.save(adapter, base, modules_to_save=["lm_head"])
        file = adapter / "adapter_model.safetensors"
        save_file(without("lm_head")(load_file(file)), file)
        with pytest.raises(
            ModelError, match="names lm_head, and adapter_model.safetensors does not"
        ):
            load_model(adapter)

    def test_a_base_of_other_sizes_layers_or_kind_is_one_line(
        self, tmp_path: Path, base: Path
    ) -> None:
        adapter = tmp_path / "adapter"
        self.save(adapter, base)
        for shape in ({"hidden": 64}, {"layers": 2}, {"layers": 6}, {"family": "gpt2"}):
            shutil.rmtree(base)
            write(base, **shape)
            with pytest.raises(ModelError, match="adapter") as caught:
                load_model(adapter)
            assert "\n" not in str(caught.value)

    def test_a_base_that_is_missing_is_named(self, tmp_path: Path, base: Path) -> None:
        adapter = tmp_path / "adapter"
        self.save(adapter, base)
        config = adapter / "adapter_config.json"
        shutil.rmtree(base)
        with pytest.raises(ModelNotFound, match=rf"adapter: the base model .*{base}"):
            load_model(adapter)
        edit_json(config, base_model_name_or_path="nobody/nothing", revision="abc")
        for open_ in (load_model, load_tokenizer, load_config):
            with pytest.raises(ModelNotFound, match=r"the base model .*nobody/nothing"):
                open_(adapter)
        for value, says in ((None, "is empty"), (str(adapter), "names itself")):
            edit_json(config, base_model_name_or_path=value)
            with pytest.raises(ModelError, match=says):
                load_model(adapter)
        config.write_text("{")
        with pytest.raises(ModelError, match=r"adapter_config.json: damaged"):
            load_model(adapter)

    def test_the_revision_of_the_base_is_respected(
        self, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        asked = []

        def snapshot(hub_id: str, revision: str | None = None, **_: Any) -> str:
            asked.append((hub_id, revision))
            return str(base)

        adapter = tmp_path / "adapter"
        self.save(adapter, base)
        config = adapter / "adapter_config.json"
        edit_json(config, base_model_name_or_path="some/base", revision="abc")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        load_model(adapter)
        assert set(asked) == {("some/base", "abc")}

    def test_an_adapter_is_a_teacher_a_student_and_can_be_saved_as_a_whole_model(
        self, pair_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected = self.save(pair_folder / "adapter", pair_folder / "teacher")
        write_rows(pair_folder / "data.jsonl", conversations(20))
        write_rows(pair_folder / "prompts.jsonl", [{"prompt": "the rain"}])
        steps = "--data data.jsonl --device cpu --precision fp32 --max-steps 2"
        keep = "--keep repetition_loop,cut_off --device cpu"
        for command in (
            f"distill adapter student --output-dir one {steps}",
            f"distill teacher adapter --output-dir two {steps}",
            "evaluate adapter --teacher teacher --data data.jsonl --device cpu",
            f"generate adapter --prompts prompts.jsonl --output-dir three {keep}",
            "doctor adapter student --data data.jsonl",
            "student adapter --output-dir four --keep-layers all",
        ):
            assert cli.main(shlex.split(command)) == 0, command
        self.same(pair_folder / "four", expected)
        assert not (pair_folder / "four" / "adapter_config.json").exists()
        assert not (pair_folder / "two" / "student" / "adapter_config.json").exists()
        capsys.readouterr()
        vllm = "generate adapter --prompts prompts.jsonl --output-dir five --engine vllm"
        assert cli.main(shlex.split(vllm)) == 2
        assert "potstill student adapter --keep-layers all" in capsys.readouterr().err

    def test_without_peft_the_package_is_named(
        self, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import importlib.util

        self.save(tmp_path / "adapter", base)
        found = importlib.util.find_spec
        absent = lambda name, *more: None if name == "peft" else found(name, *more)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", absent)
        with pytest.raises(ConfigError, match=r"potstill\[peft\]"):
            load_model(tmp_path / "adapter")

    def test_other_adapters_and_folders_with_two_models_are_refused(
        self, tmp_path: Path, base: Path
    ) -> None:
        adapter = tmp_path / "adapter"
        self.save(adapter, base)
        edit_json(adapter / "adapter_config.json", task_type="SEQ_CLS")
        with pytest.raises(ModelError, match=r"an adapter of type .* for SEQ_CLS"):
            load_model(adapter)
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        with pytest.raises(ModelError, match=r"only pickled weights \(adapter_model.bin\)"):
            load_model(adapter)
        shutil.copytree(base, adapter, dirs_exist_ok=True)
        with pytest.raises(ModelError, match="both an adapter .* and a whole model"):
            load_model(adapter)

    def test_an_adapter_on_an_adapter_is_merged_twice(self, tmp_path: Path, base: Path) -> None:
        self.save(tmp_path / "one", base)
        expected = self.save(tmp_path / "two", tmp_path / "one", target_modules=["up_proj"])
        self.same(tmp_path / "two", expected)
        assert len(load_tokenizer(tmp_path / "two")) == 266
