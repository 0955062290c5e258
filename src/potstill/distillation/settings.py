"""Every setting of a distillation run. A field's docstring is its help on the command line."""

from __future__ import annotations

import difflib
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from potstill.defaults import EVAL_FRACTION, MAX_LENGTH, ROLLOUT_TOKENS
from potstill.errors import ConfigError
from potstill.models.lora import check_lora
from potstill.models.quantized import check_kind
from potstill.reading import Reading


@dataclass(frozen=True)
class DistillSettings(Reading):
    """Train a student, evaluate it before and after, and write a report."""

    teacher: str
    """Hub id, model folder, GGUF file, demo, the folder of a capture, or the address of a
    server: http://HOST:PORT of potstill serve, vllm+http://HOST:PORT of vLLM."""
    student: str
    """The same, for the model to train. It is not changed: the trained student is written to
    OUTPUT_DIR/student."""
    data: str
    """Conversations with the teacher's answers: .jsonl files (several with commas or *), or
    anything that datasets opens."""
    output_dir: str
    """Folder of the run. The same command continues an interrupted run."""
    method: str = "logits"
    """logits: a divergence between whole distributions (same tokenizer). cross: the same across
    different tokenizers. text: cross-entropy on the teacher's text (any tokenizers)."""
    alignment: str = "pieces"
    """What cross compares: pieces; cells (coarser); or a method of the literature: push_forward,
    bpm, alm, uld, strict_topk, last_token_padded."""
    eval_data: str | None = None
    """Held-out conversations. Without it, a part of the data is held out."""
    eval_split: str | None = None
    """Held-out conversations from another split: of eval-data, or else of the data."""
    eval_fraction: float = EVAL_FRACTION
    """The part that is held out if there is no eval-data."""
    eval_steps: float | None = None
    """Measure the loss on the held-out conversations every so many steps, for the report's curve;
    below 1 a share of the run: 0.25 measures four times."""
    teacher_model: str | None = None
    """With the folder of a capture as teacher: the model that captures what the folder lacks."""
    tasks: str | None = None
    """Tasks for the teacher and for the student before and after: names of lm-evaluation-harness
    tasks and .jsonl files of questions, separated by commas (needs potstill[lm-eval])."""
    max_steps: int | None = None
    """Optimizer steps. Without it and without seconds: three passes over the data."""
    seconds: float | None = None
    """Training time instead of steps. A few steps are timed at learning rate 0, then the number of
    steps that fits is run."""
    learning_rate: float = 1e-4
    """Peak learning rate: linear warm-up in the first 5 % of the steps, then cosine decay to 0."""
    batch_size: int = 8
    """Conversations in a micro-batch on each device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step."""
    max_length: int = MAX_LENGTH
    """Tokens at which a conversation is cut; cut ones are counted and reported."""
    divergence: str = "forward_kl"
    """The divergence to minimize: {DIVERGENCES}; or FILE.py:FUNCTION of teacher_logits [b, V] and
    student_logits [b, V] that returns [b]."""
    divergence_parameters: dict[str, float] = field(default_factory=dict)
    """Parameters of a divergence of your own, by name (best in YAML)."""
    temperature: float = 1.0
    """logits: divides the logits of both models before they are compared."""
    teacher_temperature: float = 1.0
    """cross: the temperature at which the teacher's text was sampled."""
    within_weight: float = 1.0
    """cross: weight of the cross-entropy inside a cell, between 0 and 1; 1 is unbiased."""
    hard_label_weight: float = 0.0
    """Share of cross-entropy on the text mixed into the divergence, between 0 and 1."""
    on_policy: float = 0.0
    """Share of the micro-batches in which the student answers the prompts itself and the teacher
    corrects it, between 0 (the data's answers alone) and 1."""
    on_policy_divergence: str = "reverse_kl"
    """The divergence to minimize on the student's own answers; names as for divergence."""
    on_policy_from: float = 0.0
    """Share of the run after which the student begins to write."""
    rollout_size: int | None = None
    """Answers in a round on each device, a multiple of the batch size; 8 batches by default."""
    rollout_reuse: int = 4
    """Passes over each round of the student's answers."""
    rollout_tokens: int = ROLLOUT_TOKENS
    """Maximum number of tokens in an answer of the student."""
    rollout_temperature: float = 1.0
    """Sampling temperature of the student's answers."""
    freeze_embeddings: bool = False
    """Do not train the student's embedding and LM head. In a student cut from its teacher they are
    the teacher's own."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the student's layers for the backward pass, and compute the rest
    again: less memory, a third more time."""
    lora: int | None = None
    """Train a LoRA adapter of this rank on every linear layer except the LM head, and nothing else
    (needs potstill[peft]). Learning rates are about ten times those of whole models."""
    lora_alpha: float | None = None
    """The adapter is multiplied by this number / rank; twice the rank by default."""
    chat_template: str | None = None
    """The path of a Jinja template, or plain for tokenizers that have none."""
    template_date: str | None = None
    """The date that templates write, as 2026-01-31; without it the day on which the run began."""
    precision: str = "bf16"
    """bf16, fp16 or fp32: of the teacher and of matrix products. The student's weights stay in
    float32."""
    quantize_teacher: str | None = None
    """8bit or 4bit: quantize the weights of the teacher, except its LM head (needs
    potstill[quantize])."""
    attention: str | None = None
    """The attention implementation of both models, as transformers names it: sdpa (the default),
    eager, flash_attention_2, flash_attention_3, or a kernel of the hub. Flash attention packs
    conversations without padding or mask."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    seed: int = 0
    """Seed of the data order, the held-out part and the samples."""
    log_to: str | None = None
    """Also log to these, separated by commas: wandb, tensorboard, mlflow, or another logger that
    transformers knows."""
    trust_remote_code: bool = False
    """Run code that comes with the models. Read it first."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Any other setting of DistillationConfig or transformers.TrainingArguments, by name (best in
    YAML)."""

    def check(self) -> None:
        """Raises: ConfigError for a number out of range, or an unknown quantization."""
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} {value}: must be above 0")
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(
                f"eval_fraction {self.eval_fraction}: must be between 0 and 1, ends excluded"
            )
        if self.attention and "flash" in self.attention and self.precision == "fp32":
            raise ConfigError(
                f"attention {self.attention} with precision fp32: it computes in 16 bits; "
                "use --precision bf16, or another attention"
            )
        check_kind(self.quantize_teacher)
        check_lora(self.lora, self.lora_alpha)


POSITIVE = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "seconds",
    "max_length",
    "eval_steps",
    "learning_rate",
)


def default_settings() -> dict[str, Any]:
    """Return the settings that have a simple default."""
    own = fields(DistillSettings)
    return {item.name: item.default for item in own if item.default is not MISSING}


def check_names(given: dict[str, Any]) -> None:
    """Raises: ConfigError for a name that is no setting; it names the nearest one."""
    known = [item.name for item in fields(DistillSettings)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ConfigError(f"no setting {name!r}{hint}")
