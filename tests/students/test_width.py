from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from potstill.errors import ConfigError, ModelError
from potstill.students.families import FAMILIES as TABLES
from potstill.students.families import sizes_of
from potstill.students.width import Kept, keep_first, narrow
from students.narrow_models import FAMILIES, MIXTURES, narrow_model

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def cuts(model: Any) -> dict[str, Any]:
    """Every way to cut a model: each dimension alone, and all together."""
    whole = sizes_of(model.config)
    ways = {
        "neurons": {"neurons": 8 if whole.experts else whole.neurons // 2 - 1},
        "groups": {"groups": whole.groups // 2},
        "hidden": {"hidden": 24},
    }
    if whole.experts:
        ways["experts"] = {"experts": 1}
    if model.config.model_type == "gpt2":  # heads make the hidden size
        ways["groups"] = ways["hidden"] = {"hidden": 16, "groups": 2}
    ways["all"] = {name: size for way in list(ways.values()) for name, size in way.items()}
    return {name: dataclasses.replace(whole, **way) for name, way in ways.items()}


def test_every_family_of_the_tables_is_tested() -> None:
    assert {narrow_model(family).config.model_type for family in FAMILIES} == set(TABLES)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_logit(family: str) -> None:
    model = narrow_model(family)
    student = narrow(model, keep_first(model, sizes_of(model.config)))
    assert torch.equal(logits(student), logits(model))


@pytest.mark.parametrize("way", ["neurons", "groups", "hidden", "experts", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_student_opens_in_transformers_trains_and_generates(
    family: str, way: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = narrow_model(family)
    if way == "experts" and family not in MIXTURES:
        pytest.skip("no experts")
    sizes = cuts(model)[way]
    student = narrow(model, keep_first(model, sizes))
    student.save_pretrained(tmp_path)
    reopened, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert sizes_of(reopened.config) == sizes
    assert reopened.num_parameters() < model.num_parameters()
    assert torch.equal(logits(reopened.eval()), logits(student))
    optimizer = torch.optim.SGD(reopened.train().parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        losses.append(reopened(IDS, labels=IDS, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    generated = reopened.eval().generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_add_nothing_can_go(family: str) -> None:
    model = narrow_model(family)
    sizes = cuts(model)["neurons"]
    kept = keep_first(model, sizes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" not in name or weight.dim() < 2:
                continue
            if "experts.down_proj" in name:
                weight[:, :, sizes.neurons :] = 0
            elif name.endswith(("down_proj.weight", "fc2.weight")):
                layer = kept.shared if "shared" in name else kept.neurons
                weight[:, len(layer[1 if "shared" not in name else 0]) :] = 0
            elif name.endswith("mlp.c_proj.weight"):
                weight[sizes.neurons :] = 0
    student = narrow(model, kept)
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "gpt2"])
def test_heads_that_add_nothing_can_go(family: str) -> None:
    model = narrow_model(family)
    sizes = cuts(model)["groups"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "dense.weight")):
                weight[:, 16:] = 0  # the second half of four heads of eight channels
    student = narrow(model, keep_first(model, sizes))
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-4, atol=1e-5)


def test_the_kept_heads_neurons_and_channels_are_those_that_were_chosen() -> None:
    model = narrow_model("llama", layers=1)
    kept = Kept(
        hidden=torch.tensor([0, 3, 5, 31]),
        groups=[torch.tensor([1])],
        neurons=[torch.tensor([2, 40])],
    )
    student = narrow(model, kept)
    old, new = model.model.layers[0], student.model.layers[0]
    hidden = kept.hidden
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[[2, 40]][:, hidden])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[hidden][:, [2, 40]])
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight[16:][:, hidden])
    assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight[8:][:, hidden])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[hidden][:, 16:])


def test_fused_projections_keep_the_same_heads_as_separate_ones() -> None:
    model = narrow_model("phi3", layers=1)
    kept = keep_first(model, dataclasses.replace(sizes_of(model.config), groups=1))
    kept = dataclasses.replace(kept, groups=[torch.tensor([1])])
    fused = model.model.layers[0].self_attn.qkv_proj.weight
    expected = torch.cat([fused[16:32], fused[32 + 8 : 32 + 16], fused[48 + 8 :]])
    assert torch.equal(narrow(model, kept).model.layers[0].self_attn.qkv_proj.weight, expected)


def test_gemmas_embedding_keeps_its_scale_when_channels_are_cut() -> None:
    for tied in (True, False):
        model = narrow_model("gemma2", tied=tied)
        student = narrow(model, keep_first(model, cuts(model)["hidden"]))
        torch.testing.assert_close(
            student.get_input_embeddings()(IDS), model.get_input_embeddings()(IDS)[..., :24]
        )
        states = torch.randn(3, 24).abs()
        old_norm, new_norm = 1 + model.model.norm.weight[:24], 1 + student.model.norm.weight
        head = model.lm_head.weight[:, :24]
        torch.testing.assert_close(
            (states * new_norm) @ student.lm_head.weight.T, (states * old_norm) @ head.T
        )


def test_a_saved_head_that_differs_from_its_embedding_stays_apart() -> None:
    model = narrow_model("llama", tied=False)
    student = narrow(model, keep_first(model, cuts(model)["hidden"]))
    assert torch.equal(student.lm_head.weight, model.lm_head.weight[:, :24])
    assert not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", {"groups": 3}, "the teacher has 2; give 1 to 2"),
        ("llama", {"groups": 0}, "kv-groups 0"),
        ("llama", {"hidden": 26}, "not a multiple of the 4 attention heads.*give 24"),
        ("llama", {"neurons": 49}, "intermediate-size 49: the teacher has 48"),
        ("gpt2", {"hidden": 24}, "heads times 8"),
        ("gpt2", {"groups": 2}, "hidden-size 16"),
        ("qwen3_moe", {"neurons": 7}, "multiple of 8"),
        ("qwen3_moe", {"experts": 5}, "experts 5: the teacher has 4"),
    ],
)
def test_sizes_that_a_family_cannot_have_are_refused(
    family: str, change: dict[str, int], says: str
) -> None:
    model = narrow_model(family)
    with pytest.raises(ConfigError, match=says):
        keep_first(model, dataclasses.replace(sizes_of(model.config), **change))


def test_a_family_without_a_table_and_a_quantized_teacher_are_refused() -> None:
    model = tiny_model()
    kept = keep_first(model, sizes_of(model.config))
    model.config.model_type = "mamba"
    with pytest.raises(ModelError, match=r"a mamba model cannot be narrowed.*--keep-layers"):
        narrow(model, kept)
    model.config.model_type = "llama"
    weight = model.model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantized"):
        narrow(model, kept)


def test_a_weight_that_no_table_names_is_refused_by_name() -> None:
    model = tiny_model()
    model.model.layers[0].mlp.extra = torch.nn.Linear(32, 32)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.extra\.weight"):
        narrow(model, keep_first(model, sizes_of(model.config)))
