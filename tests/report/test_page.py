"""The page of a run: its text for each kind of run; text of a model cannot break it."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.errors import RunFolderError
from potstill.report import write_report

CONFIG = {
    "command": "distill",
    "teacher": "demo",
    "student": "small",
    "method": "logits",
    "train_conversations": 400,
}


def measured(kl: float | None, bits: float, half_width: float = 0.05) -> dict[str, Any]:
    values = {
        "kl_nats_per_token": kl,
        "nll_nats_per_token": 2.0,
        "bits_per_byte": bits,
        "top1_agreement": 0.5,
    }
    intervals = {
        key: None if value is None else [value - half_width, value + half_width]
        for key, value in values.items()
    }
    return {**values, "tokens": 900, "bytes": 3000, "ci95": intervals}


def evaluated(before: float | None = 2.0, after: float | None = 1.0, **more: Any) -> dict[str, Any]:
    bits = (1.5, 1.2) if before is None or after is None else (before, after)
    sample = {"prompt": "Why?", "teacher": "Because.", "before": "the the", "after": "Because"}
    models = {
        "teacher": measured(0.0, 0.5),
        "before": measured(before, bits[0]),
        "after": measured(after, bits[1]),
    }
    return {
        **models,
        "samples": [sample],
        "gap_closed": 0.5,
        "token_view": None,
        "eval_conversations": 40,
        **more,
    }


def run_folder(
    folder: Path,
    evaluation: object = None,
    config: object = CONFIG,
    steps: int = 3,
    metrics_tail: str = "",
) -> Path:
    """Make a run folder like `potstill distill`; `evaluation=None`, `steps=0` leave a file out."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    rows = [
        json.dumps({"step": n, "loss": 6 / n, "seconds": 2.0 * n}) + "\n"
        for n in range(1, steps + 1)
    ]
    if steps:
        (folder / "metrics.jsonl").write_text("".join(rows) + metrics_tail, encoding="utf-8")
    return folder


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def words(html: str) -> str:
    """Return roughly the visible text of the page: no style, no tags, single spaces."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def test_the_page_is_written_to_the_run_folder_without_temporary_files(tmp_path: Path) -> None:
    before = {path.name for path in run_folder(tmp_path, evaluated()).iterdir()}
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert {path.name for path in tmp_path.iterdir()} == before | {"report.html"}


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    assert page(run_folder(tmp_path, evaluated())) == page(tmp_path)


def test_text_of_a_model_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = "</div></p><script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    sample = dict.fromkeys(("prompt", "teacher", "before", "after"), evil)
    predicted = {name: [[evil, 0.5]] for name in ("teacher", "before", "after")}
    token = {"text": evil, "before_kl_nats": 1.0, "after_kl_nats": 0.1, "next": predicted}
    more = {
        "token_view": {"prompt": evil, "tokens": [token]},
        "worst_tokens": [{**token, "context": evil}],
    }
    html = page(
        run_folder(
            tmp_path,
            evaluated(samples=[sample], **more),
            config={**CONFIG, "teacher": evil, evil: evil},
        )
    )
    assert re.findall("<script[^>]*>", html) == [
        '<script type="application/json">',
        "<script>",
    ]  # ours
    assert "<img" not in html
    assert html.count("&lt;script&gt;") >= 10


def test_unprintable_characters_are_replaced(tmp_path: Path) -> None:
    sample = {
        "prompt": "bell \x07",
        "teacher": "null \x00",
        "before": "half a pair \ud83d",
        "after": "fine \U0001f600",
    }
    html = page(run_folder(tmp_path, evaluated(samples=[sample])))
    for shown in ("bell ␇", "null ␀", "half a pair \ufffd", "fine \U0001f600"):
        assert shown in html


def test_white_space_in_tokens_is_visible(tmp_path: Path) -> None:
    texts = (" the", "\n\n", "\t", "")
    view = {
        "prompt": "p",
        "tokens": [{"text": t, "before_kl_nats": 1.0, "after_kl_nats": 0.0} for t in texts],
    }
    html = page(run_folder(tmp_path, evaluated(token_view=view)))
    assert [f">{shown}</span>" in html for shown in ("·the", "⏎⏎", "⇥", "∅")] == [True] * 4


def test_a_token_that_was_not_measured_is_marked(tmp_path: Path) -> None:
    view = {"prompt": "p", "tokens": [{"text": "a", "before_kl_nats": None, "after_kl_nats": 0.5}]}
    html = page(run_folder(tmp_path, evaluated(token_view=view)))
    assert 'class="none" title="not measured"' in html
    assert 'class="k3" title="0.500 nats"' in html


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (2.0, 1.0, "It helped: the student is 50 % closer to its teacher than before."),
        (2.0, 1.95, "Perhaps it helped"),
        (2.0, 2.0, "It did not help"),
        (2.0, 3.0, "It did not help"),
    ],
)
def test_the_verdict_follows_from_the_figures_and_their_intervals(
    tmp_path: Path, before: float, after: float, verdict: str
) -> None:
    text = words(page(run_folder(tmp_path, evaluated(before, after))))
    assert verdict in text
    assert ("intervals of before and after overlap" in text) == (abs(after - before) <= 0.1)


def sums(per_conversation: list[float]) -> dict[str, Any]:
    """Return the sums of conversations with 10 tokens each, at these nats of KL per token."""
    count = len(per_conversation)
    kl = [10 * value for value in per_conversation]
    return {
        "tokens": [10.0] * count,
        "bytes": [40.0] * count,
        "nll_nats": kl,
        "kl_nats": kl,
        "agreeing_tokens": [5.0] * count,
    }


def kept(before: list[float], after: list[float]) -> dict[str, Any]:
    prompts = [f"prompt {number}" for number in range(len(before))]
    return {
        "prompts": prompts,
        "before": sums(before),
        "after": sums(after),
        "teacher": sums([0.0] * len(before)),
    }


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ([0.05, 0.04, 0.06, 0.05] * 5, "paired over 20 held-out conversations: more than chance"),
        ([0.5, -0.4, 0.3, -0.35] * 5, "includes no change at all, so it may be chance"),
        (
            [0.05, 0.04, 0.06],
            "over 3 held-out conversations: too few to rule out chance, 10 are needed",
        ),
    ],
)
def test_the_difference_is_paired_if_sums_per_conversation_are_there(
    tmp_path: Path, gains: list[float], message: str
) -> None:
    """Conversations range from 1 to 5 nats: unpaired, none of these differences is visible."""
    before = [1.0 + 4 * i / len(gains) for i in range(len(gains))]
    after = [was - gain for was, gain in zip(before, gains, strict=True)]
    means = [sum(values) / len(values) for values in (before, after)]
    evaluation = evaluated(*means, conversations=kept(before, after))
    for model in ("before", "after"):
        evaluation[model]["ci95"]["kl_nats_per_token"] = [1.5, 4.5]
    text = words(page(run_folder(tmp_path, evaluation)))
    assert message in text
    assert ("It helped" in text) == ("more than chance" in message)


def test_the_worst_prompts_come_first_and_are_those_after_training(tmp_path: Path) -> None:
    conversations = kept(before=[9.0, 1.0, 1.0, 1.0], after=[0.1, 0.7, 0.9, 0.8])
    text = words(page(run_folder(tmp_path, evaluated(conversations=conversations))))
    places = [text.index(f"prompt {number} ") for number in (2, 3, 1, 0)]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "damage", [None, [], {"before": 1}, {"prompts": ["a"], "before": {}, "after": {}}]
)
def test_sums_that_are_missing_or_damaged_are_left_out(tmp_path: Path, damage: object) -> None:
    assert "Where the student is worst" not in page(
        run_folder(tmp_path, evaluated(conversations=damage))
    )


def test_task_scores_are_rows_of_the_measures(tmp_path: Path) -> None:
    def answered(accuracy: float) -> dict[str, Any]:
        return {"arc_easy": {"questions": 40, "acc": accuracy, "stderr": {"acc": 0.1}}}

    tasks = {"teacher": answered(0.75), "before": answered(0.25), "after": answered(0.5)}
    text = words(page(run_folder(tmp_path, evaluated(tasks=tasks))))
    row = "arc_easy acc, 40 questions ↑ higher is better"
    assert f"{row} 0.250 0.054 to 0.446 0.500 0.304 to 0.696 0.750" in text
    assert "arc_easy" not in page(run_folder(tmp_path, evaluated(tasks={"after": {"arc_easy": 1}})))


def test_across_tokenizers_tokens_are_shaded_by_surprise_and_only_students_predict(
    tmp_path: Path,
) -> None:
    predicted = {"before": [["a", 0.5]], "after": [["b", 0.6]]}
    nats = {
        "before_kl_nats": None,
        "after_kl_nats": None,
        "before_nll_nats": 2.0,
        "after_nll_nats": 0.5,
    }
    view = {"prompt": "p", "tokens": [{"text": "a", **nats, "next": predicted}]}
    html = page(run_folder(tmp_path, evaluated(None, None, token_view=view)))
    assert 'title="2.000 nats"' in html
    assert "Surprise (−log p)" in html
    assert '"names": ["Before training", "After training"]' in html


def test_every_recorded_answer_has_its_own_token_view(tmp_path: Path) -> None:
    token = {"before_kl_nats": 1.0, "after_kl_nats": 0.1}
    views = [{"prompt": f"question {n}", "tokens": [{"text": f"t{n}", **token}]} for n in range(3)]
    html = page(run_folder(tmp_path, evaluated(token_view=views[0], more_token_views=views[1:])))
    assert html.count('class="view"') == 3
    assert 'type="application/json"' not in html  # no predictions were recorded


def test_a_folder_with_a_comparison_is_refused_and_its_page_is_named(tmp_path: Path) -> None:
    (run_folder(tmp_path) / "comparison.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"comparison\.html"):
        write_report(tmp_path)


def test_without_intervals_the_verdict_is_not_certain(tmp_path: Path) -> None:
    evaluation = evaluated()
    del evaluation["after"]["ci95"]
    text = words(page(run_folder(tmp_path, evaluation)))
    assert "Perhaps it helped" in text
    assert "chance cannot be ruled out" in text


def test_the_story_describes_the_run_and_its_result(tmp_path: Path) -> None:
    text = words(page(run_folder(tmp_path, evaluated())))
    assert "The student “small” was trained for 3 steps (6 s) on 400 conversations by " in text
    assert "conversations by matching the next-token distribution" in text
    assert "Its divergence went from 2.000 to 1.000 nats per token" in text
    assert "it has closed 50 % of the gap to the teacher." in text


def test_a_gap_that_grew_is_reported_as_grown(tmp_path: Path) -> None:
    text = words(page(run_folder(tmp_path, evaluated(2.0, 2.5, gap_closed=-0.25))))
    assert "the gap to the teacher grew by 25 %" in text
    assert "closes" not in text


def test_without_a_divergence_bits_per_byte_decide(tmp_path: Path) -> None:
    text = words(page(run_folder(tmp_path, evaluated(None, None, gap_closed=None))))
    assert "It helped: the student is better at predicting the held-out text than before." in text
    assert "Its loss on the text went from 1.500 to 1.200 bits per byte" in text
    assert "not measured" in text


def test_a_value_that_is_not_a_number_counts_as_not_measured(tmp_path: Path) -> None:
    assert "The measurement is incomplete." in page(
        run_folder(tmp_path, {"before": {"bits_per_byte": "1.2"}, "after": [], "samples": "none"})
    )


def test_an_evaluation_with_nan_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"before": {"bits_per_byte": float("nan")}})
    with pytest.raises(RunFolderError, match=r"a result is NaN: the measurement overflowed"):
        write_report(folder)


def test_the_page_of_a_run_without_evaluation_reports_it(tmp_path: Path) -> None:
    text = words(page(run_folder(tmp_path, config={**CONFIG, "max_steps": 70})))
    assert "Not measured yet." in text
    assert "no evaluation.json" in text
    assert "for 3 of at most 70 steps so far" in text


def test_the_page_of_a_run_without_metrics_reports_it(tmp_path: Path) -> None:
    assert "metrics.jsonl is missing" in page(run_folder(tmp_path, evaluated(), steps=0))


def test_half_a_line_of_metrics_is_left_out_and_counted(tmp_path: Path) -> None:
    html = page(run_folder(tmp_path, metrics_tail='{"step": 4, "lo'))
    assert "1 unreadable line of metrics.jsonl left out" in html
    assert "<svg" in html


def test_an_almost_empty_config_is_enough(tmp_path: Path) -> None:
    assert "The student was trained for 3 steps" in page(
        run_folder(tmp_path, evaluated(), config={"seed": 0})
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", None, "no readable config.yaml"),
        ("config.yaml", b"a: [", "not YAML"),
        ("config.yaml", b"- a", "no settings"),
        ("evaluation.json", b'{"teacher": ', "not JSON"),
        ("evaluation.json", b"[]", "no JSON object"),
        ("evaluation.json", b"\xff", "not JSON"),
    ],
)
def test_a_folder_that_is_no_run_or_is_damaged_is_refused_with_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = run_folder(tmp_path, evaluated()) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunFolderError, match=message) as refused:
        write_report(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (run_folder(tmp_path) / "report.html").mkdir()
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".report*"))


def test_the_page_needs_no_network_and_its_policy_allows_only_its_own_script(
    tmp_path: Path,
) -> None:
    html = page(run_folder(tmp_path, evaluated()))
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    assert (
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        in html
    )
    assert not re.search(r" on[a-z]+=", html)
    assert "@import" not in html
    assert "url(http" not in html
    assert all(
        target.startswith("#")
        for target in re.findall(r"""\b(?:src|href)=["']?([^"'\s>]*)""", html)
    )
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_two_hundred_long_samples_stay_below_three_megabytes(tmp_path: Path) -> None:
    sample = dict.fromkeys(("prompt", "teacher", "before", "after"), "seventeen letters " * 1000)
    html = page(run_folder(tmp_path, evaluated(samples=[sample] * 200), steps=20_000))
    assert len(html.encode()) < 3_000_000
    assert "characters more" in html
    assert "195 more" in html


def test_the_command_to_repeat_quotes_the_folder_and_writes_to_a_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    html = page(run_folder(folder))
    config, output = f"&#39;{folder}/config.yaml&#39;", f"&#39;{folder}-again&#39;"
    assert f"potstill distill --config {config} --output-dir {output}" in html
