from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conftest import conversations, tiny_model
from potstill.data import tokenize_conversations
from potstill.evaluation.measures import TOKEN_MEASURES
from potstill.evaluation.scores import TokenScores, gap_closed, score_tokens, summarize
from potstill.teachers import LocalTeacher


def scores(**changes: Any) -> TokenScores:
    columns: dict[str, Any] = {
        "nll": torch.tensor([1.0, 2.0, 3.0, 6.0]),
        "kl": torch.tensor([0.0, 1.0, 0.0, 1.0]),
        "agrees": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "conversation": torch.tensor([0, 0, 0, 1]),
        "answer_bytes": torch.tensor([9, 3]),
    }
    return TokenScores(**{**columns, **changes})


def test_means_are_over_tokens_and_bits_over_bytes() -> None:
    summary = summarize(scores())
    assert summary["nll_nats_per_token"] == pytest.approx(3.0)
    assert summary["bits_per_byte"] == pytest.approx(12 / math.log(2) / 12)
    assert summary["kl_nats_per_token"] == pytest.approx(0.5)
    assert summary["top1_agreement"] == pytest.approx(0.75)
    assert (summary["tokens"], summary["bytes"]) == (4, 12)


def test_intervals_resample_conversations_and_not_tokens() -> None:
    """With two conversations the mean can only be that of the first, of the second, or of both."""
    assert summarize(scores())["ci95"]["nll_nats_per_token"] == pytest.approx([2.0, 6.0])


def test_intervals_cover_a_known_mean_in_about_95_percent_of_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(60):
        values = torch.randn(200, generator=generator) + 3
        sample = scores(
            nll=values,
            kl=None,
            agrees=None,
            conversation=torch.arange(200) // 4,
            answer_bytes=torch.full((50,), 4),
        )
        low, high = summarize(sample, seed=trial)["ci95"]["nll_nats_per_token"]
        hits += low < 3 < high
    assert 50 <= hits <= 60


def test_measures_that_need_a_teacher_are_none_without_one() -> None:
    summary = summarize(scores(kl=None, agrees=None))
    assert summary["kl_nats_per_token"] is summary["ci95"]["kl_nats_per_token"] is None
    assert set(TOKEN_MEASURES) <= summary.keys()


def test_scores_are_those_of_dense_logits_and_do_not_depend_on_the_batch_size(
    tokenizer: Any,
) -> None:
    student, teacher = tiny_model(layers=2, seed=1), tiny_model()
    dataset, counts = tokenize_conversations(conversations(5), tokenizer)
    one, five = (
        score_tokens(
            student, dataset, pad_token_id=265, teacher=LocalTeacher(teacher), batch_size=size
        )
        for size in (1, 5)
    )
    torch.testing.assert_close(one.nll, five.nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.kl, five.kl, rtol=1e-3, atol=1e-6)
    expected_nll, expected_kl = [], []
    for row in dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_p, log_q = (
                model(ids, use_cache=False).logits[0].double().log_softmax(-1)
                for model in (student, teacher)
            )
        for t, label in enumerate(row["labels"]):
            if label != -100:
                expected_nll.append(-log_p[t - 1, label].item())
                expected_kl.append(
                    (log_q[t - 1].exp() * (log_q[t - 1] - log_p[t - 1])).sum().item()
                )
    assert one.nll.tolist() == pytest.approx(expected_nll, rel=1e-4)
    assert one.kl is not None
    assert one.kl.tolist() == pytest.approx(expected_kl, rel=1e-2, abs=1e-6)
    assert len(one.nll) == counts.supervised_tokens


def test_the_most_likely_tokens_are_those_of_dense_logits(tokenizer: Any) -> None:
    student, teacher = tiny_model(layers=2, seed=1), tiny_model()
    dataset, _ = tokenize_conversations(conversations(3), tokenizer)
    found = score_tokens(
        student, dataset, pad_token_id=265, teacher=LocalTeacher(teacher), likeliest=4
    )
    for model, kept in ((student, found.likeliest), (teacher, found.teacher_likeliest)):
        assert kept is not None
        expected = []
        for row in dataset:
            with torch.no_grad():
                p = (
                    model(torch.tensor([row["input_ids"]]), use_cache=False)
                    .logits[0]
                    .double()
                    .softmax(-1)
                )
            expected += [
                p[t - 1].sort(descending=True)
                for t, label in enumerate(row["labels"])
                if label != -100
            ]
        assert kept.ids.tolist() == [order.indices[:4].tolist() for order in expected]
        torch.testing.assert_close(
            kept.probabilities.double(), torch.stack([order.values[:4] for order in expected])
        )


def test_most_likely_tokens_are_stored_only_on_request(tokenizer: Any) -> None:
    dataset, _ = tokenize_conversations(conversations(1), tokenizer)
    found = score_tokens(
        tiny_model(), dataset, pad_token_id=265, teacher=LocalTeacher(tiny_model())
    )
    assert found.likeliest is found.teacher_likeliest is None


def test_the_kl_of_a_model_from_itself_is_zero(tokenizer: Any) -> None:
    dataset, _ = tokenize_conversations(conversations(3), tokenizer)
    summary = summarize(
        score_tokens(tiny_model(), dataset, pad_token_id=265, teacher=LocalTeacher(tiny_model()))
    )
    assert summary["kl_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert summary["top1_agreement"] == 1


def test_gap_closed_is_a_share_and_none_without_a_gap() -> None:
    one, two, three = ({"bits_per_byte": value} for value in (1.0, 2.0, 3.0))
    assert gap_closed(one, three, two) == pytest.approx(0.5)
    assert gap_closed(one, three, one) == 1
    assert gap_closed(two, one, one) is None
