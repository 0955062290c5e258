"""Make folders of a run and a comparison with wide, long and hostile texts, without a model."""

import json
from pathlib import Path
from typing import Any

import yaml

from potstill.comparison import FinishedRun, as_html, compare_runs

EVIL = "</span></div><script>document.title = 'owned'</script>"
LONG = "unbroken" * 60
QUESTIONS = [
    f"question {n}: {text}"
    for n, text in enumerate(["Why?\nPlease.", EVIL, LONG, "مرحبا", "what is rain"] * 3)
]
NATS = (0.0, 0.05, 0.2, 0.7, 2.0, 9.0)


def measures(kl: float) -> dict[str, Any]:
    values = {
        "kl_nats_per_token": kl,
        "nll_nats_per_token": 1 + kl,
        "bits_per_byte": kl / 2 + 0.7,
        "top1_agreement": 1 / (1 + kl),
    }
    intervals = {key: [value * 0.96, value * 1.04] for key, value in values.items()}
    return {**values, "tokens": 8123, "bytes": 33012, "ci95": intervals}


def sums(kl: float) -> dict[str, Any]:
    tokens = [20.0] * len(QUESTIONS)
    nats = [20 * kl * (1 + n / 10) for n in range(len(QUESTIONS))]
    return {
        "tokens": tokens,
        "bytes": [4 * t for t in tokens],
        "nll_nats": nats,
        "kl_nats": nats,
        "agreeing_tokens": [9.0] * len(tokens),
    }


def token(text: str, kl: float, gain: float) -> dict[str, Any]:
    others = [[" other", 0.25], [EVIL, 0.12], [LONG, 0.1], ["\n", 0.03]]
    predicted = {name: [[text, 0.5], *others] for name in ("before", "after")}
    predicted["teacher"] = [[" teacher's", 0.9], *others]
    return {"text": text, "before_kl_nats": kl, "after_kl_nats": kl * gain, "next": predicted}


def evaluation(before: float, after: float) -> dict[str, Any]:
    gain = after / before
    tokens = [token(text, kl, gain) for kl in NATS for text in (" word", LONG, "\n\n", EVIL)]
    samples = [
        {"prompt": question, "teacher": EVIL, "before": LONG, "after": f"answer {n}"}
        for n, question in enumerate(QUESTIONS)
    ]
    kept = {
        "prompts": QUESTIONS,
        "teacher": sums(0.0),
        "before": sums(before),
        "after": sums(after),
    }
    worst = [
        {**token(text, 9.0, gain), "context": LONG[:80] + " and"} for text in (" word", LONG, EVIL)
    ]
    return {
        "teacher": measures(0.0),
        "before": measures(before),
        "after": measures(after),
        "gap_closed": 0.65,
        "samples": samples,
        "token_view": {"prompt": EVIL, "tokens": tokens},
        "more_token_views": [{"prompt": LONG, "tokens": tokens}] * 2,
        "worst_tokens": worst,
        "conversations": {"fingerprint": "f", "train_prompts": "t", **kept},
        "eval_conversations": len(QUESTIONS),
    }


def run_folder(folder: Path, *, after: float = 0.8, **settings: Any) -> Path:
    """Make the folder of a finished run, like `potstill distill` and `potstill compare`."""
    folder.mkdir(exist_ok=True)
    config = {
        "teacher": "demo",
        "student": f"runs/{LONG}",
        "method": "logits",
        "seed": 0,
        "max_steps": 70,
        "nested": {"a": [1, 2]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **settings}), encoding="utf-8")
    rows = [
        {
            "step": n,
            "loss": after + 4 / n,
            "eval_loss": 1 + after + 4 / n,
            "seconds": 12.5 * n,
            "tokens": 900 * n,
        }
        for n in range(1, 71)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(evaluation(2.3, after)), encoding="utf-8")
    (folder / "answers.jsonl").write_text(
        "\n".join(map(json.dumps, answers(f"answer of {after}"))), encoding="utf-8"
    )
    return folder


def answers(text: str) -> list[dict[str, Any]]:
    return [
        {"prompt": q, "teacher": EVIL, "messages": [{"role": "assistant", "content": text}]}
        for q in QUESTIONS
    ]


def comparison_page(folder: Path) -> Path:
    """Write a page with four methods, two seeds each, and the untouched student."""
    runs_by_method = {}
    for place, (name, method) in enumerate(
        {"text": "text", "logits": "logits", EVIL: "cross", LONG: "logits"}.items()
    ):
        runs = []
        for seed in (0, 1):
            made = run_folder(
                folder / f"{place}-seed{seed}",
                after=0.6 + place / 5 + seed / 50,
                method=method,
                seed=seed,
            )
            (made / "report.html").write_text("")
            config = yaml.safe_load((made / "config.yaml").read_text())
            runs.append(
                FinishedRun(made, config, json.loads((made / "evaluation.json").read_text()))
            )
        runs_by_method[name] = runs
    untouched = answers("before")
    comparison = compare_runs(runs_by_method, untouched_answers=untouched, text_measures=[])
    settings = {"teacher": "demo", "student": LONG, "seeds": "0,1"}
    page = as_html(
        comparison,
        runs_by_method,
        untouched,
        folder=folder,
        settings=settings,
        command=f"potstill compare --config {LONG}",
    )
    (folder / "comparison.html").write_text(page, encoding="utf-8")
    return folder / "comparison.html"
