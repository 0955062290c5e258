"""Compare students of one size before any training: KL from the teacher on held-out answers.

    pip install torch-pruning optipfair
    python benchmarks/students.py [--parameters 81.4M] [--output runs/students]

The teacher is SmolLM2-135M-Instruct. It answers prompts of the demo: some are calibration text for
the methods that use it, 32 others, of other prompts, are the held-out text of all methods.

    torch-pruning   FFN neurons by the magnitude of their group of weights; all layers
    optipfair       FFN neurons by its data-driven score (MAW), and its choice of layers, alone
    minitron-style  the best as cut of all shapes that are tried here, by activations, no refit
    depth           layers alone, by 1 − cosine; all neurons
    potstill        what `potstill student --parameters` returns

A method whose package is missing is left out. Each row is also a line of OUTPUT/students.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from potstill import load_model
from potstill.data import read_conversations, read_prompts, tokenize_conversations
from potstill.generation import answer_prompts
from potstill.students.families import Sizes
from potstill.students.importance import choose_parts, measure_importance
from potstill.students.layerwise import Calibration, layers_of
from potstill.students.search import HeldOut, cut_student
from potstill.students.sizes import Fixed, Shapes, wanted_parameters

CALIBRATION, HELD_OUT = 128, 32


def answers(output: Path, teacher: Any, tokenizer: Any) -> dict[str, list[Any]]:
    """Return the teacher's answers to prompts of both splits, made once."""
    output.mkdir(parents=True, exist_ok=True)
    with resources.as_file(resources.files("potstill.data") / "demo_prompts.jsonl") as path:
        prompts = list(read_prompts(path))
    found = {}
    for split, count in (("train", CALIBRATION), ("held_out", HELD_OUT)):
        file = output / f"{split}.jsonl"
        if not file.is_file():
            asked = [row["messages"] for row in prompts if row["split"] == split]
            asked = [asked[i * len(asked) // count] for i in range(count)]
            rows = answer_prompts(teacher, tokenizer, asked, max_new_tokens=64)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[split] = list(read_conversations(file))[:count]
    return found


def by_torch_pruning(teacher: Any, share: float, **_: Any) -> Any:
    import torch_pruning

    model = copy.deepcopy(teacher).float().requires_grad_(True)
    others = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("gate_proj")
        if not name.endswith("up_proj")
    ]
    gates = {layer.mlp.gate_proj: 1 - share for layer in layers_of(model)}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=torch.arange(8)[None],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=0.0,
        pruning_ratio_dict=gates,
        ignored_layers=others,
        output_transform=lambda output: output.logits,
        root_module_types=[torch.nn.Linear],
    )
    pruner.step()
    return model


def by_optipfair(teacher: Any, share: float, calibration: Calibration, **_: Any) -> Any:
    import optipfair

    rows = [
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for batch in calibration.batches
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    return optipfair.prune_model(
        copy.deepcopy(teacher).float(),
        pruning_percentage=100 * (1 - share),
        dataloader=loader,
        show_progress=False,
    )


def by_optipfair_depth(teacher: Any, layers: int, calibration: Calibration, **_: Any) -> Any:
    import optipfair

    model = copy.deepcopy(teacher).float()
    rows = [
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for batch in calibration.batches
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    scores = optipfair.analyze_layer_importance(model, loader, show_progress=False)
    least = sorted(scores, key=scores.get)[: len(layers_of(model)) - layers]
    return optipfair.prune_model(
        model, pruning_type="DEPTH", layer_indices=sorted(map(int, least)), show_progress=False
    )


RIVALS: dict[str, tuple[str, Callable[..., Any]]] = {
    "torch-pruning, width": ("torch_pruning", by_torch_pruning),
    "optipfair, width": ("optipfair", by_optipfair),
    "optipfair, depth": ("optipfair", by_optipfair_depth),
}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield name, parameters, KL in nats per token and seconds of each student."""
    teacher, tokenizer = load_model("demo", device="cpu")
    text = answers(options.output, teacher, tokenizer)
    encoded = {
        name: list(tokenize_conversations(rows, tokenizer)[0]) for name, rows in text.items()
    }
    pad = tokenizer.pad_token_id or 0
    calibration = Calibration.of(encoded["train"], pad)
    with torch.autocast("cpu", torch.bfloat16):
        held_out = HeldOut(teacher, Calibration.of(encoded["held_out"], pad))
    shapes = Shapes(teacher.config)
    wanted = wanted_parameters(options.parameters, shapes.parameters(shapes.teacher))

    def row(name: str, model: Any, seconds: float, shape: str = "") -> dict[str, Any]:
        with torch.autocast("cpu", torch.bfloat16):
            kl = held_out.kl(model.eval())
        found = {"name": name, "shape": shape, "parameters": model.num_parameters()}
        return {**found, "kl_nats": kl, "seconds": round(seconds, 1)}

    depth, *_, width = shapes.depths(wanted, Fixed())
    share = width.neurons / shapes.teacher.neurons
    for name, (package, make) in RIVALS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: pip install {package.replace('_', '-')} to measure it", flush=True)
            continue
        begun = time.perf_counter()
        model = make(teacher, share=share, layers=depth.layers, calibration=calibration)
        yield row(name, model, time.perf_counter() - begun)
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        importance = measure_importance(teacher, calibration)
    measured = time.perf_counter() - begun
    cut = choose_parts(teacher, importance, depth)
    yield row("depth", cut_student(teacher, cut), measured, str(depth))
    student, record = made_student(options)
    tried = [Sizes(**one["sizes"]) for one in record["candidates"]]
    as_cut = [one["kl_as_cut"] for one in record["candidates"]]
    best, chosen = tried[as_cut.index(min(as_cut))], Sizes(**record["sizes"])
    cut = choose_parts(teacher, importance, best)
    yield row("minitron-style", cut_student(teacher, cut), measured, str(best))
    cut = choose_parts(teacher, importance, chosen)
    yield row("potstill, as cut", cut_student(teacher, cut), measured, str(chosen))
    yield row("potstill", student, record["seconds"], str(chosen))
    for one in record["candidates"]:
        print(one, flush=True)


def made_student(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the student of `potstill student` and its record; it is made once."""
    folder = options.output / f"student-{options.parameters}"
    if not folder.is_dir():
        command = [sys.executable, "-m", "potstill", "student", "demo"]
        command += ["--parameters", options.parameters, "--output-dir", str(folder)]
        command += ["--data", str(options.output / "train.jsonl")]
        subprocess.run(command, check=True)
    record = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    return load_model(folder, device="cpu")[0], record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", default="81.4M")
    parser.add_argument("--output", type=Path, default=Path("runs/students"))
    options = parser.parse_args()
    measured = []
    for row in rows(options):
        measured.append(row)
        print(row, flush=True)
        with (options.output / "students.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print("\n| method | shape | parameters | KL, nats per token | seconds |\n|---|---|---|---|---|")
    for one in measured:
        size = f"{one['parameters']:,} | {one['kl_nats']:.3f} | {one['seconds']:.0f}"
        print(f"| {one['name']} | {one['shape']} | {size} |")


if __name__ == "__main__":
    main()
