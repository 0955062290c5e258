"""What each command can be told: the docstring of a field is its help on the command line, and its name its key in YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DemoRecipe:
    """See it work: a real teacher, a student cut from it, distillation, evaluation and a report, on two CPU cores."""

    output_dir: str = "runs/demo"
    """Folder of the run. The same command goes on with an interrupted one."""
    seconds: float = 180
    """Seconds of training."""


@dataclass(frozen=True)
class StudentRecipe:
    """Cut a student from a teacher: some of its layers and everything else of it, or with the tokenizer of another model."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo."""
    output_dir: str
    """Folder for the student, which must not hold anything yet."""
    keep_layers: str | None = None
    """How many layers to keep, evenly spaced with both ends (8), which ones (0,1,5,9), half, or all. Without it: half, or all with
    --tokenizer."""
    data: str | None = None
    """Conversations on which a number of layers is chosen: those that are missed least, instead of evenly spaced ones."""
    tokenizer: str | None = None
    """Whose tokenizer the student gets instead of its teacher's: hub id, folder, GGUF file or demo. Each new token starts from the
    teacher's tokens for the same bytes. If it has no chat template, the student gets the plain one."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


@dataclass(frozen=True)
class DoctorRecipe:
    """Can this teacher teach this student, how, and what will it cost? Told from configurations, tokenizers and your data."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo. A configuration and a tokenizer are enough."""
    student: str
    """The same, for the model to be trained."""
    data: str | None = None
    """Conversations with the teacher's answers, to measure on: a .jsonl file, or anything the datasets library opens."""
    max_steps: int | None = None
    """Optimizer steps of the planned run. Without it, three times through the data; without data, a million tokens."""
    batch_size: int = 8
    """Conversations in a micro-batch of the planned run."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step of the planned run."""
    max_length: int = 1024
    """Tokens at which a conversation is cut."""
    precision: str = "bf16"
    """bf16, fp16 or fp32: of the planned run."""
    card: str | None = None
    """An accelerator to tell the hours for: a10, a100, a100-40gb, b200, h100, h200, l4, l40s, mi300x, rtx3090 or rtx4090."""
    chat_template: str | None = None
    """For tokenizers without one: plain, or the path of a Jinja template."""
    with_weights: bool = False
    """Read the teacher's weights, too, and score the answers under its own chat template and under the student's."""
    device: str = "auto"
    """auto, cpu, cuda or mps: of the teacher, with weights."""
    trust_remote_code: bool = False
    """Run code that comes with the models. Read it first."""
    json: bool = False
    """Print JSON instead of a page."""


@dataclass(frozen=True)
class GenerateRecipe:
    """Let a teacher answer prompts, and keep, filter and describe its answers: a data set for text distillation."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo; with --server the name under which the server knows it."""
    prompts: str
    """A .jsonl file of {"prompt"} or {"messages"}, or anything the datasets library opens."""
    output_dir: str
    """Folder for the data set. The same command goes on with an interrupted one."""
    engine: str = "local"
    """local: transformers in this process. vllm: vLLM in this process. ray, ray-vllm: many of these, on many machines."""
    server: str | None = None
    """Address of an OpenAI-compatible server to ask instead. Its key is read from POTSTILL_API_KEY or OPENAI_API_KEY."""
    max_new_tokens: int = 256
    """Tokens at which an answer is cut off."""
    temperature: float = 0.7
    """Divides the teacher's logits before sampling; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that together have this probability."""
    samples: int = 1
    """Answers to each prompt."""
    system: str | None = None
    """System prompt, put before prompts that have none."""
    seed: int = 0
    """Another seed, other answers."""
    choose: str = "all"
    """Of several samples: all, shortest (of the complete ones), likeliest (by the teacher), or FILE.py:FUNCTION of rows."""
    keep: str = ""
    """Reasons not to drop an answer for, separated by commas: cut_off, repetition_loop, refusal, empty, …"""
    min_characters: int = 0
    """Drop shorter answers."""
    max_characters: int | None = None
    """Drop longer answers."""
    script: str | None = None
    """Drop answers in another script: latin, cyrillic, arabic, cjk, hangul, …"""
    language: str | None = None
    """Drop answers in another language: en, fr, zh, … (needs py3langid)."""
    similarity: float = 0.8
    """Drop answers at least so similar to an earlier one (Jaccard, runs of three words); 1 drops none."""
    held_out: str | None = None
    """Prompts of an evaluation: what shares eight words in a row with one of them is dropped."""
    filter: str | None = None
    """FILE.py:FUNCTION of a row, which says True for a row to keep."""
    batch_size: int = 32
    """Prompts answered side by side; with --server, requests in flight."""
    workers: int = 2
    """Actors of the ray engines, each with a GPU where there are any."""
    patience: float = 300
    """Seconds to go on asking a server that does not answer."""
    chat_template: str | None = None
    """For tokenizers without one: plain, or the path of a Jinja template."""
    precision: str = "bf16"
    """bf16, fp16 or fp32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Read it first."""


@dataclass(frozen=True)
class DistillRecipe:
    """Teach a student, evaluate it before and after, and write a report."""

    teacher: str
    """Hub id, model folder, GGUF file, or demo."""
    student: str
    """The same, for the model to be trained. It is not changed: the trained one goes to OUTPUT_DIR/student."""
    data: str
    """Conversations with the teacher's answers: a .jsonl file, or anything the datasets library opens."""
    output_dir: str
    """Folder of the run. The same command goes on with an interrupted one."""
    method: str = "logits"
    """logits: the teacher's whole distribution (same tokenizer). cross: what it lets two different tokenizers know of it. text:
    cross-entropy on the teacher's text (any tokenizers)."""
    alignment: str = "pieces"
    """What cross compares: pieces; cells (coarser); or one of the literature's: push_forward, bpm, alm, uld, strict_topk,
    last_token_padded."""
    eval_data: str | None = None
    """Held-out conversations. Without it, a part of the data is held out."""
    eval_fraction: float = 0.1
    """The part that is held out where there is no eval-data."""
    eval_steps: float | None = None
    """Measure the loss on the held-out conversations every so many steps while training, for the report's curve; below 1 a share of
    the run: 0.25 is four times."""
    tasks: str | None = None
    """Asked of the teacher and of the student before and after: lm-evaluation-harness's tasks and .jsonl files of questions,
    separated by commas (needs potstill[lm-eval])."""
    max_steps: int | None = None
    """Optimizer steps. Without it and without seconds, three times through the data."""
    seconds: float | None = None
    """A budget of training time instead: a few steps are timed at learning rate 0, then the number that fits is run."""
    learning_rate: float = 1e-4
    """Peak learning rate; it rises over the first twentieth of the steps and falls to 0 along a cosine."""
    batch_size: int = 8
    """Conversations in a micro-batch on each device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step."""
    max_length: int = 1024
    """Tokens at which a conversation is cut; cut ones are counted and reported."""
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jensen_shannon, skew_forward_kl, skew_reverse_kl or total_variation."""
    temperature: float = 1.0
    """logits: divides the logits of both models before they are compared."""
    teacher_temperature: float = 1.0
    """cross: the temperature at which the teacher's text was sampled."""
    within_weight: float = 1.0
    """cross: share of what the text says beyond the teacher's distribution, between 0 and 1 (unbiased)."""
    hard_label_weight: float = 0.0
    """Share of cross-entropy on the text itself, mixed into the divergence, between 0 and 1."""
    freeze_embeddings: bool = False
    """Leave the student's embedding and head as they are: in a student cut from its teacher they are the teacher's own."""
    chat_template: str | None = None
    """For tokenizers without one: plain, or the path of a Jinja template."""
    precision: str = "bf16"
    """bf16, fp16 or fp32: of the teacher and of matrix products. The student's weights stay in float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    seed: int = 0
    """Of the data's order, the held-out part and the samples."""
    trust_remote_code: bool = False
    """Run code that comes with the models. Read it first."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Anything else that DistillationConfig or transformers.TrainingArguments takes, by name (best in YAML)."""


@dataclass(frozen=True)
class EvaluateRecipe:
    """Measure a student against its teacher on held-out conversations."""

    student: str
    """Hub id, model folder, GGUF file, or demo."""
    teacher: str
    """The same, for the teacher."""
    data: str
    """Held-out conversations: a .jsonl file, or anything the datasets library opens."""
    tasks: str | None = None
    """Asked of both: lm-evaluation-harness's tasks and .jsonl files of questions, separated by commas (needs potstill[lm-eval])."""
    max_length: int = 1024
    """Tokens at which a conversation is cut."""
    chat_template: str | None = None
    """For tokenizers without one: plain, or the path of a Jinja template."""
    precision: str = "bf16"
    """bf16, fp16 or fp32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    json: bool = False
    """Print JSON instead of a table."""
    trust_remote_code: bool = False
    """Run code that comes with the models. Read it first."""


@dataclass(frozen=True)
class ReportRecipe:
    """Write the report of a run again."""

    run_dir: str
    """Folder of the run."""


@dataclass(frozen=True)
class PlayRecipe:
    """Talk to a run in the browser: teacher, student before and after side by side, and their next tokens (potstill[play])."""

    run_dir: str
    """Folder of a finished run of distill or demo."""
    host: str = "127.0.0.1"
    """Address to serve at: this machine alone. 0.0.0.0 lets others in, and asks them for no password."""
    port: int = 7860
    """Port to serve at."""
    device: str = "auto"
    """auto, cpu, cuda or mps: of all three models."""


@dataclass(frozen=True, kw_only=True)
class CompareRecipe(DistillRecipe):
    """Train several methods on the same data, order and budget, and say which is better, by how much, and whether by chance."""

    teacher: str = ""
    """Hub id, model folder, GGUF file, or demo."""
    student: str = ""
    """The same, for the model to be trained, by each method anew."""
    data: str = ""
    """Conversations with the teacher's answers; a row's "reference" is an answer of other origin, for the method reference."""
    method: str = "logits"
    """Not used here, but part of a recipe for distill, which can be given as it is: see --methods."""
    methods: str | None = None
    """Separated by commas: text, logits, cross, and reference (cross-entropy on the reference answers). Without it: reference if
    every row has one, text, and logits or, for different tokenizers, cross. The untouched student always takes part."""
    recipes: str | None = None
    """Instead of methods: YAML files for distill, separated by commas, with the same data and budget."""
    runs: str | None = None
    """Instead of training: folders of finished runs, separated by commas. Those that differ in -seedN alone are one method's."""
    seeds: str = "0"
    """Separated by commas: each method is trained once with each."""
    answers: int = 32
    """Held-out prompts that each student answers, to see whether it stops, loops, and how long it talks. 0: none."""
    answer_tokens: int = 128
    """Tokens at which such an answer is cut off."""
    text_measures: str = ""
    """chrf, rouge_l or both, separated by a comma: answers against the teacher's (needs potstill[measures])."""
