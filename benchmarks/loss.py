"""Measure the distillation loss, forward and backward: potstill, other libraries and a floor.

    python benchmarks/loss.py [--vocabulary smollm2|151936|262144] [--tokens 2048] [--rounds 3]

The others are dense PyTorch, TRL and Liger. The floor is the four matrix products that every exact
method needs (one projection per head, the student's two gradients), over all tokens at once. The
methods take turns in one process; a ratio is the median of the ratios of the rounds. Memory is
measured in a process per method, in addition to the inputs and the gradients. Errors are those of
the gradients against float64, ‖g − g₆₄‖ ÷ ‖g₆₄‖, for the cut student and for one that is close to
its teacher.
``smollm2`` takes real hidden states: the demo's answers read by SmolLM2-135M-Instruct and by 15 of
its 30 layers (run `potstill demo` first, or give --data). A number takes random rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.losses import fused_linear_divergence

DIVERGENCES = {
    "forward_kl": 0.0,
    "reverse_kl": 1.0,
    "jensen_shannon": 0.5,
}  # with TRL's and Liger's beta for it
IGNORED = -100


class Inputs(NamedTuple):
    """Hidden states ``[N, H]``, heads ``[V, H]`` of both models; labels ``[N]``, −100 ignored"""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", default="smollm2")
    parser.add_argument(
        "--data",
        default="runs/demo/data/train/conversations.jsonl",
        help="conversations whose hidden states are taken",
    )
    parser.add_argument("--hidden", type=int, default=576, help="of random rows")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--divergences", default=",".join(DIVERGENCES))
    parser.add_argument(
        "--supervised", default="1.0,0.3", help="shares of the tokens that have something to learn"
    )
    parser.add_argument(
        "--methods",
        default="",
        help="beginnings of their names, separated by commas; without it all",
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(peak_megabytes(options)))
        return
    for dtype in options.dtypes.split(","):
        inputs = load(options, getattr(torch, dtype))
        for share in map(float, options.supervised.split(",")):
            for divergence in options.divergences.split(","):
                print(
                    f"\n## {dtype}, {divergence}, {share:.0%} of {options.tokens} tokens, "
                    f"V = {len(inputs.student_weight)}\n"
                )
                time_methods(options, mask(inputs, share), divergence, dtype, share)
        if not options.no_errors:
            errors(options, inputs, dtype)


def time_methods(options: Any, inputs: Inputs, divergence: str, dtype: str, share: float) -> None:
    methods = {
        name: run for name, run in METHODS.items() if available(name) and wanted(name, options)
    }
    if share < 1:
        compacted = {
            f"{name}, rows compacted": on_compacted(run)
            for name, run in methods.items()
            if name not in ALWAYS_MEASURED
        }
        methods |= compacted
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, run in methods.items():
            begun = time.perf_counter()
            run(inputs, divergence)
            if round_:
                seconds[name].append(time.perf_counter() - begun)
    print("| | seconds | ÷ floor | ÷ potstill |" + ("" if options.no_memory else " peak MB |"))
    print("|---|---|---|---|" + ("" if options.no_memory else "---|"))
    for name in methods:
        row = [
            f"{statistics.median(seconds[name]):.2f}",
            ratio(seconds[name], seconds["floor"]),
            ratio(seconds[name], seconds["potstill"]),
        ]
        if not options.no_memory:
            row.append(measured_apart(options, name, divergence, dtype, share))
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def ratio(one: list[float], other: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(one, other, strict=True)):.2f}"


def errors(options: Any, inputs: Inputs, dtype: str) -> None:
    """Print the errors of gradients against float64, over the first 512 tokens."""
    n = min(512, len(inputs.labels))
    cut = Inputs(
        inputs.student_hidden[:n],
        inputs.student_weight,
        inputs.teacher_hidden[:n],
        inputs.teacher_weight,
        inputs.labels[:n],
    )
    noise = torch.randn(cut.teacher_hidden.shape, generator=torch.Generator().manual_seed(1)).to(
        cut.teacher_hidden.dtype
    )
    near = cut._replace(
        student_hidden=cut.teacher_hidden + 0.02 * cut.teacher_hidden.std() * noise,
        student_weight=inputs.teacher_weight,
    )
    print(
        f"\n## {dtype}: gradient error, forward KL, hidden / weight\n\n"
        "| | cut student | close to its teacher |\n|---|---|---|"
    )
    exact = [exact_gradients(case) for case in (cut, near)]
    for name, run in METHODS.items():
        if name == "floor" or not available(name) or not wanted(name, options):
            continue
        cells = []
        for case, (hidden, weight) in zip((cut, near), exact, strict=True):
            got = run(case, "forward_kl")
            cells.append(f"{relative(got[0], hidden):.2%} / {relative(got[1], weight):.2%}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def exact_gradients(case: Inputs) -> tuple[Tensor, Tensor]:
    hidden, weight = case.student_hidden.double(), case.student_weight.double()
    teacher = (case.teacher_hidden.double() @ case.teacher_weight.double().T).softmax(-1)
    gradient = (hidden @ weight.T).softmax(-1) - teacher
    return gradient @ weight, gradient.T @ hidden


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


# Methods: inputs and a divergence's name → ∂/∂hidden and ∂/∂weight of the sum over supervised
# tokens.

Method = Callable[[Inputs, str], tuple[Tensor, Tensor]]


def floor(inputs: Inputs, divergence: str) -> tuple[Tensor, Tensor]:
    rows = compact(inputs)
    room = torch.empty(len(rows.labels), len(rows.student_weight), dtype=rows.student_weight.dtype)
    torch.mm(rows.teacher_hidden, rows.teacher_weight.T, out=room)
    torch.mm(rows.student_hidden, rows.student_weight.T, out=room)
    return room @ rows.student_weight, room.T @ rows.student_hidden


def potstill(inputs: Inputs, divergence: str) -> tuple[Tensor, Tensor]:
    hidden, weight = leaves(inputs)
    chosen = inputs.labels != IGNORED
    nats = fused_linear_divergence(
        hidden[chosen],
        weight,
        inputs.teacher_hidden[chosen],
        inputs.teacher_weight,
        divergence=divergence,
        labels=inputs.labels[chosen],
    )
    return gradients(nats, hidden, weight)


def dense(inputs: Inputs, divergence: str) -> tuple[Tensor, Tensor]:
    hidden, weight = leaves(inputs)
    log_p = F.log_softmax((hidden @ weight.T).float(), -1)
    log_q = F.log_softmax((inputs.teacher_hidden @ inputs.teacher_weight.T).float(), -1)
    if divergence == "forward_kl":
        nats = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    elif divergence == "reverse_kl":
        nats = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.log(torch.tensor(2.0))
        nats = (
            F.kl_div(log_m, log_q, reduction="none", log_target=True)
            + F.kl_div(log_m, log_p, reduction="none", log_target=True)
        ) / 2
    return gradients((nats.sum(-1) * (inputs.labels != IGNORED)).sum(), hidden, weight)


def trl(inputs: Inputs, divergence: str) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight = leaves(inputs)
    beta = DIVERGENCES[divergence]
    per_token, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, inputs.teacher_hidden, inputs.teacher_weight, None, beta
    )
    return gradients((per_token * (inputs.labels != IGNORED)).sum(), hidden, weight)


def liger(inputs: Inputs, divergence: str) -> tuple[Tensor, Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, weight = leaves(inputs)
    loss = LigerFusedLinearJSDLoss(
        beta=DIVERGENCES[divergence], weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False
    )
    mean = loss(hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels)
    hidden_gradient, weight_gradient = gradients(mean, hidden, weight)
    count = int((inputs.labels != IGNORED).sum())
    return hidden_gradient * count, weight_gradient * count


METHODS: dict[str, Method] = {
    "floor": floor,
    "potstill": potstill,
    "dense PyTorch": dense,
    "Liger 0.8.5": liger,
    "TRL 1.16": trl,
}
ALWAYS_MEASURED = ("floor", "potstill")


def available(name: str) -> bool:
    module = {"Liger 0.8.5": "liger_kernel", "TRL 1.16": "trl"}.get(name, "torch")
    return importlib.util.find_spec(module) is not None


def wanted(name: str, options: Any) -> bool:
    return (
        name in ALWAYS_MEASURED
        or not options.methods
        or any(name.startswith(part) for part in options.methods.split(","))
    )


def on_compacted(run: Method) -> Method:
    return lambda inputs, divergence: run(compact(inputs), divergence)


def compact(inputs: Inputs) -> Inputs:
    chosen = inputs.labels != IGNORED
    return inputs._replace(
        student_hidden=inputs.student_hidden[chosen],
        teacher_hidden=inputs.teacher_hidden[chosen],
        labels=inputs.labels[chosen],
    )


def mask(inputs: Inputs, share: float) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(len(inputs.labels), generator=generator) < share
    return inputs._replace(labels=inputs.labels.masked_fill(~keep, IGNORED))


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return (
        inputs.student_hidden.detach().requires_grad_(),
        inputs.student_weight.detach().requires_grad_(),
    )


def gradients(nats: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    nats.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def load(options: Any, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    if options.vocabulary == "smollm2":
        return real(options, dtype)
    n, v, h = options.tokens, int(options.vocabulary), options.hidden
    head = torch.randn(v, h) * h**-0.5
    student, teacher = 3 * torch.randn(n, h), 3 * torch.randn(n, h)
    return Inputs(
        *(t.to(dtype) for t in (student, head, teacher, head.clone())), torch.randint(v, (n,))
    )


def real(options: Any, dtype: torch.dtype) -> Inputs:
    """Return the states at supervised tokens of the demo's answers, of teacher and cut student."""
    from potstill import keep_layers, load_model
    from potstill.data import BatchLayout, read_conversations, tokenize_conversations
    from potstill.models.heads import hidden_states, model_inputs, supervised

    teacher, tokenizer = load_model("demo", dtype="float32")
    student = keep_layers(teacher, 15)
    dataset, _ = tokenize_conversations(
        itertools.islice(read_conversations(options.data), options.tokens // 30 + 1), tokenizer
    )
    layout, parts = BatchLayout(tokenizer.pad_token_id, packed=False), []
    for start in range(0, len(dataset), 16):
        batch = layout([dataset[i] for i in range(start, min(start + 16, len(dataset)))])
        inputs = model_inputs(batch)
        with torch.no_grad():
            taught, labels = supervised(hidden_states(teacher, inputs), batch["labels"])
            parts.append(
                (supervised(hidden_states(student, inputs), batch["labels"])[0], taught, labels)
            )
    states = [torch.cat(column) for column in zip(*parts, strict=True)]
    states = [
        column.repeat(-(-options.tokens // len(column)), *[1] * (column.dim() - 1))[
            : options.tokens
        ]
        for column in states
    ]
    head = teacher.get_output_embeddings().weight.detach().to(dtype)
    return Inputs(states[0].to(dtype), head, states[1].to(dtype), head.clone(), states[2])


# Memory, in a process of its own.


def measured_apart(options: Any, name: str, divergence: str, dtype: str, share: float) -> str:
    if name == "floor":
        return "–"
    flags = [
        "--vocabulary",
        options.vocabulary,
        "--data",
        options.data,
        "--tokens",
        str(options.tokens),
        "--hidden",
        str(options.hidden),
    ]
    flags += [
        "--dtypes",
        dtype,
        "--divergences",
        divergence,
        "--supervised",
        str(share),
        "--memory-of",
        name,
    ]
    output = subprocess.run(
        [sys.executable, __file__, *flags], capture_output=True, text=True, check=True
    ).stdout
    return f"{json.loads(output.splitlines()[-1]):.0f}"


def peak_megabytes(options: Any) -> float:
    """Return peak resident bytes of one call, minus those before it and its gradients; Linux."""
    name, _, compacted = options.memory_of.partition(", rows")
    run = on_compacted(METHODS[name]) if compacted else METHODS[name]
    inputs = mask(load(options, getattr(torch, options.dtypes)), float(options.supervised))
    small = inputs._replace(
        student_hidden=inputs.student_hidden[:8],
        teacher_hidden=inputs.teacher_hidden[:8],
        labels=inputs.labels[:8],
    )
    run(small, options.divergences)  # what is loaded and made once is not counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    results = run(inputs, options.divergences)
    return resident("VmHWM") - before - sum(t.numel() * t.element_size() for t in results) / 2**20


def resident(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


if __name__ == "__main__":
    main()
