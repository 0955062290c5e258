"""Which weights of each model family are cut along which dimension.

Each table maps a module (or an expert weight) to one letter per dimension of its weight:

    .  not cut        H  hidden channels         Q  query heads    K  key/value heads
    F  FFN neurons    G  gate and up, stacked    P  q, k and v, stacked
    E  experts        M  neurons of each expert  N  their gate and up, stacked
    S  neurons of a shared expert

A bias has the letter of the output: the first dimension, or the last in GPT-2, whose weights are
stored transposed. ``heads * head_dim`` indices belong to one letter Q.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from potstill.errors import ModelError

STACKED = {"G": "FF", "N": "MM", "P": "QKK"}
"""Letters whose dimension holds several others, one behind the other."""

_EMBEDDINGS = {"embed_tokens": ".H", "norm": "H", "lm_head": ".H"}
_ATTENTION = {
    "self_attn.q_proj": "QH",
    "self_attn.k_proj": "KH",
    "self_attn.v_proj": "KH",
    "self_attn.o_proj": "HQ",
}
_GATED = {"mlp.gate_proj": "FH", "mlp.up_proj": "FH", "mlp.down_proj": "HF"}
_NORMS = {"input_layernorm": "H", "post_attention_layernorm": "H"}
_HEAD_NORMS = {"self_attn.q_norm": ".", "self_attn.k_norm": "."}
_MORE_NORMS = {"pre_feedforward_layernorm": "H", "post_feedforward_layernorm": "H"}
_EXPERTS = {
    "mlp.gate": "EH",
    "mlp.experts.gate_up_proj": "ENH",
    "mlp.experts.down_proj": "EHM",
}
_SHARED_EXPERT = {
    "mlp.shared_expert.gate_proj": "SH",
    "mlp.shared_expert.up_proj": "SH",
    "mlp.shared_expert.down_proj": "HS",
    "mlp.shared_expert_gate": ".H",
}


@dataclass(frozen=True)
class Family:
    """The layout of one family: tables as above, and the names of its parts."""

    layer: dict[str, str]
    """Modules of a layer."""
    outside: dict[str, str] = field(default_factory=lambda: _EMBEDDINGS)
    """Modules outside the layers, by the last part of their name."""
    final_norm: str = "norm"
    attention_inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    ffn_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_output: str = "mlp.down_proj"
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    """The norm before the FFN; `is_parallel` families have it before attention as well."""
    output_norms: tuple[str, str] | None = None
    """Norms between attention or FFN and the residual stream."""
    is_transposed: bool = False
    """Weights are stored as ``[in, out]``."""
    norm_offset: float = 0.0
    """A norm multiplies by its weight plus this."""
    scales_embeddings: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    is_parallel: bool = False
    """Attention and FFN read the same norm of the same hidden states."""
    heads_make_hidden: bool = False
    """The hidden size is heads times head size, so both are cut together."""


_GEMMA = Family(
    {**_ATTENTION, **_GATED, **_NORMS, **_MORE_NORMS, **_HEAD_NORMS},
    ffn_norm="pre_feedforward_layernorm",
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scales_embeddings=True,
)
_LLAMA = Family({**_ATTENTION, **_GATED, **_NORMS, **_HEAD_NORMS})
_MIXTURE = Family({**_LLAMA.layer, **_EXPERTS, **_SHARED_EXPERT})
_PHI = Family(
    {
        **_ATTENTION,
        "self_attn.dense": "HQ",
        "self_attn.q_layernorm": ".",
        "self_attn.k_layernorm": ".",
        "mlp.fc1": "FH",
        "mlp.fc2": "HF",
        "input_layernorm": "H",
    },
    outside={"embed_tokens": ".H", "final_layernorm": "H", "lm_head": ".H"},
    final_norm="final_layernorm",
    attention_output="self_attn.dense",
    ffn_inputs=("mlp.fc1",),
    ffn_output="mlp.fc2",
    ffn_norm="input_layernorm",
    is_parallel=True,
)
_PHI3 = Family(
    {
        "self_attn.qkv_proj": "PH",
        "self_attn.o_proj": "HQ",
        "mlp.gate_up_proj": "GH",
        "mlp.down_proj": "HF",
        **_NORMS,
    },
    attention_inputs=("self_attn.qkv_proj",),
    ffn_inputs=("mlp.gate_up_proj",),
)
_GPT2 = Family(
    {
        "attn.c_attn": "HP",
        "attn.c_proj": "QH",
        "mlp.c_fc": "HF",
        "mlp.c_proj": "FH",
        "ln_1": "H",
        "ln_2": "H",
    },
    outside={"wte": ".H", "wpe": ".H", "ln_f": "H", "lm_head": ".H"},
    final_norm="ln_f",
    attention_inputs=("attn.c_attn",),
    attention_output="attn.c_proj",
    ffn_inputs=("mlp.c_fc",),
    ffn_output="mlp.c_proj",
    ffn_norm="ln_2",
    is_transposed=True,
    heads_make_hidden=True,
)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _MIXTURE),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    "phi": _PHI,
    "phi3": _PHI3,
    "gpt2": _GPT2,
}
"""The families that can be narrowed, by ``model_type``."""
EXPERT_STEP = 8
"""The sizes of experts are multiples of this: 16 bytes in bfloat16."""


def family_of(config: Any) -> Family:
    """Return the layout of a model's family. Raises: ModelError for a family without a table."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"a {kind} model cannot be narrowed, only {', '.join(FAMILIES)}; "
            "it can lose layers (--keep-layers) or change its vocabulary (--tokenizer)"
        )
    return FAMILIES[kind]


@dataclass(frozen=True)
class Sizes:
    """What determines the number of parameters of a family's model."""

    layers: int
    hidden: int
    neurons: int
    """FFN neurons of a layer, or of each expert of a mixture."""
    groups: int
    """Key/value heads; each has the same number of query heads."""
    experts: int = 0
    """Experts of a mixture; 0 for other models."""

    def __str__(self) -> str:
        experts = f" × {self.experts} experts" if self.experts else ""
        return (
            f"{self.layers} layers × {self.neurons} neurons{experts}, "
            f"{self.groups} key/value groups, hidden size {self.hidden}"
        )


def sizes_of(config: Any) -> Sizes:
    """Return the sizes in a configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    experts = getattr(text, "num_experts", 0) or 0
    return Sizes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        neurons=text.moe_intermediate_size if experts else _dense_neurons(text),
        groups=getattr(text, "num_key_value_heads", None) or heads,
        experts=experts,
    )


def _dense_neurons(config: Any) -> int:
    found = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(found or 4 * config.hidden_size)


def head_size(config: Any) -> int:
    """Return the channels of one attention head."""
    heads: int = config.num_attention_heads
    return int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def resized(config: Any, sizes: Sizes) -> Any:
    """Return a copy of ``config`` with other sizes, but the layers of the original.

    The neurons of dense layers and of a shared expert shrink in proportion.
    Raises: ConfigError for sizes that the family cannot have.
    """
    import copy

    from potstill.errors import ConfigError

    family, old = family_of(config), sizes_of(config)
    _refuse_sizes(config, family, old, sizes)
    new = copy.deepcopy(config)
    queries = config.num_attention_heads // old.groups
    if not family.heads_make_hidden:
        new.head_dim = head_size(config)
    values = {
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.groups * queries,
        "num_key_value_heads": sizes.groups,
    }
    share = sizes.neurons / old.neurons
    if old.experts:
        values |= {"num_experts": sizes.experts, "moe_intermediate_size": sizes.neurons}
        values["num_experts_per_tok"] = min(config.num_experts_per_tok, sizes.experts)
        for name in ("intermediate_size", "shared_expert_intermediate_size"):
            if getattr(config, name, None):
                values[name] = max(1, round(share * getattr(config, name)))
    else:
        values["n_inner" if hasattr(config, "n_inner") else "intermediate_size"] = sizes.neurons
    for name, value in values.items():
        if hasattr(config, name) or name == "n_inner":
            setattr(new, name, value)
    try:
        for check in ("validate_architecture", "validate_rope"):
            getattr(new, check, lambda: None)()
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[-160:]
        raise ConfigError(f"{sizes}: a {config.model_type} model cannot be so: {reason}") from error
    return new


def _refuse_sizes(config: Any, family: Family, old: Sizes, new: Sizes) -> None:
    from potstill.errors import ConfigError

    flags = {
        "hidden": "hidden-size",
        "neurons": "intermediate-size",
        "groups": "kv-groups",
        "experts": "experts",
    }
    for name, flag in flags.items():
        found, most = getattr(new, name), getattr(old, name)
        if found == most:
            continue
        if not most:
            raise ConfigError(f"{flag} {found}: the teacher is no mixture; leave out --{flag}")
        if not 1 <= found <= most:
            raise ConfigError(f"{flag} {found}: the teacher has {most}; give 1 to {most}")
    heads = config.num_attention_heads // old.groups * new.groups
    if family.heads_make_hidden and new.hidden != heads * head_size(config):
        raise ConfigError(
            f"hidden-size {new.hidden} with {heads} heads: in a {config.model_type} model the "
            f"hidden size is heads times {head_size(config)}; give kv-groups "
            f"{new.hidden / head_size(config):g} or hidden-size {heads * head_size(config)}"
        )
    if new.experts:
        for name in ("hidden", "neurons"):
            found = getattr(new, name)
            if found != getattr(old, name) and found % EXPERT_STEP:
                need = f"torch's grouped product of experts needs a multiple of {EXPERT_STEP}"
                raise ConfigError(f"{flags[name]} {found}: {need}")
    needs_multiple = config.model_type in ("llama", "gemma2", "gemma3_text")
    if needs_multiple and new.hidden % heads:
        raise ConfigError(
            f"hidden-size {new.hidden}: not a multiple of the {heads} attention heads, which a "
            f"{config.model_type} model needs; give {new.hidden // heads * heads or heads}"
        )
