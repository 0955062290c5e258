"""A teacher on vLLM: the loss of its most likely tokens, and replies that cannot be right.

vLLM needs a GPU. The server here is a tiny model behind the part of vLLM's protocol that is used
(`/v1/models`, and `/v1/completions` with `prompt_logprobs`), as in vLLM 0.11 and later.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from conftest import conversations, tiny_model, toy_tokenizer, write_rows
from potstill import cli
from potstill.data import BatchLayout, encode_conversation
from potstill.errors import ConfigError, ServerError
from potstill.losses import Head, forward_kl, reverse_kl
from potstill.models.heads import supervised
from potstill.teachers import LocalTeacher, LossSettings, VLLMTeacher, open_teacher
from potstill.teachers.top_k import TopKTarget
from teachers.test_served import LAYOUTS, serving

ON_CPU = shlex.split("--device cpu --precision fp32 --learning-rate 0.01 --max-steps 4")
Spoil = Callable[[dict[str, Any]], None]


class VLLM:
    """Answer as vLLM does; ``spoil`` changes a reply before it is sent."""

    def __init__(self, model: Any, folder: str) -> None:
        self.model, self.tokenizer, self.folder = model, toy_tokenizer(), folder
        self.spoil: Spoil | None = None
        self.names = ["tiny"]
        self.requests: list[dict[str, Any]] = []

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )

    def models(self, _: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": one, "root": self.folder} for one in self.names]})

    async def completions(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.requests.append(body)
        if body["prompt_logprobs"] > 20:
            text = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater "
            error = {"message": f"{text}than max allowed: 20", "type": "BadRequestError"}
            return JSONResponse({"error": error}, 400)
        reply = {
            "model": body["model"],
            "choices": [
                {"index": i, "text": "!", **self.read(ids, body["prompt_logprobs"])}
                for i, ids in enumerate(body["prompt"])
            ],
        }
        if self.spoil is not None:
            self.spoil(reply)
        return JSONResponse(reply)

    @torch.no_grad()
    def read(self, ids: list[int], k: int) -> dict[str, Any]:
        log_q = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found: list[Any] = [None]
        for place, token in enumerate(ids[1:]):
            chosen = [token, *log_q[place].topk(k).indices.tolist()]
            found.append({str(i): self.entry(i, float(log_q[place, i])) for i in chosen})
        return {"prompt_logprobs": found, "prompt_token_ids": ids}

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"logprob": logprob, "rank": 1, "decoded_token": self.tokenizer.decode([token])}


@pytest.fixture
def server(model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> VLLM:
    for name in ("OPENAI_API_KEY", "POTSTILL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return VLLM(tiny_model(seed=1), str(model_folder(layers=4)))


@pytest.fixture
def source(server: VLLM) -> Iterator[str]:
    with serving(server.app()) as address:
        yield f"vllm+{address}"


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [encode_conversation(one, toy_tokenizer()) for one in conversations(count)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "padded", "one line", "unmasked"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_loss_is_that_of_the_k_tokens_and_a_cell_for_the_rest(
    source: str, server: VLLM, layout: BatchLayout, divergence: str
) -> None:
    batch = layout(rows())
    student = tiny_model(layers=2, seed=2)
    teacher = open_teacher(f"{source}?top_k=5", device="cpu")
    with torch.no_grad():
        exact = LocalTeacher(server.model).targets(batch)
        q = (exact.hidden @ server.model.lm_head.weight.T).softmax(-1)
    hidden, labels = supervised(student.model(batch["input_ids"])[0].detach(), batch["labels"])
    hidden.requires_grad_()
    loss = LossSettings(divergence=divergence, within_weight=0.0)
    found = teacher.targets(batch).summed_loss(hidden, Head(student.lm_head.weight), labels, loss)
    (gradient,) = torch.autograd.grad(found, hidden)
    # The same by brute force over cells.
    own = hidden.detach().double().requires_grad_()
    p = (own @ student.lm_head.weight.detach().double().T).softmax(-1)
    ids = q.topk(5).indices
    cells = [
        torch.cat([one.gather(-1, ids), 1 - one.gather(-1, ids).sum(-1, keepdim=True)], -1).log()
        for one in (q.double(), p)
    ]
    kl = forward_kl if divergence == "forward_kl" else reverse_kl
    expected = kl(*cells).sum()
    (expected_gradient,) = torch.autograd.grad(expected, own)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-5)
    whole = kl(q.double().log(), p.log()).sum()
    assert expected.item() < whole.item()  # a lower bound


def test_labels_are_mixed_in(source: str) -> None:
    """A label beyond the student's vocabulary has the divergence alone."""
    batch = BatchLayout(265)(rows())
    teacher = open_teacher(source, device="cpu")
    student = tiny_model(layers=2, seed=2)
    hidden, labels = supervised(student.model(batch["input_ids"])[0].detach(), batch["labels"])
    labels[::3] = 400
    target, head = teacher.targets(batch), Head(student.lm_head.weight.detach())
    losses = [
        target.summed_loss(hidden, head, labels, LossSettings(hard_label_weight=share))
        for share in (0.0, 0.25, 1.0)
    ]
    shared = labels < 272
    nll = torch.nn.functional.cross_entropy(
        hidden[shared] @ head.weight.T, labels[shared], reduction="sum"
    )
    beyond = dataclasses.replace(
        target,
        **{name: getattr(target, name)[~shared] for name in ("ids", "log_probabilities", "nll")},
    ).summed_loss(hidden[~shared], head, labels[~shared], LossSettings())
    torch.testing.assert_close(losses[2], nll + beyond, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses[1], 0.75 * losses[0] + 0.25 * losses[2], rtol=1e-5, atol=1e-4)


def test_scores_are_those_of_cells_and_the_texts_own_probability(source: str, server: VLLM) -> None:
    batch = BatchLayout(265)(rows())
    target = open_teacher(source, device="cpu").targets(batch)
    exact = LocalTeacher(server.model).targets(batch)
    _, labels = supervised(torch.zeros(*batch["input_ids"].shape, 1), batch["labels"])
    torch.testing.assert_close(
        target.label_nll(labels), exact.label_nll(labels), rtol=1e-4, atol=1e-4
    )
    logits = torch.randn(len(labels), 272, generator=torch.Generator().manual_seed(0))
    some = slice(0, len(labels))
    bound = target.block_scores(labels, likeliest=3)(some, logits.clone())
    whole = exact.block_scores(labels, likeliest=3)(some, logits.clone())
    assert (bound.kl <= whole.kl + 1e-4).all()
    assert torch.equal(bound.agrees, whole.agrees)
    assert torch.equal(bound.ids.long(), whole.ids.long())
    torch.testing.assert_close(bound.probabilities, whole.probabilities, rtol=1e-4, atol=1e-5)


def drop(reply: dict[str, Any]) -> None:
    reply["choices"].pop()


def without_field(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        del choice["prompt_logprobs"]


def shifted(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        found = choice["prompt_logprobs"]
        choice["prompt_logprobs"] = [None, *found[2:], found[1]]


def shorter(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        choice["prompt_logprobs"].pop()


def other_ids(reply: dict[str, Any]) -> None:
    reply["choices"][0]["prompt_token_ids"] = [1]


def too_few(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        for entries in choice["prompt_logprobs"][1:]:
            for name in list(entries)[2:]:
                del entries[name]


def above_one(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        for entries in choice["prompt_logprobs"][1:]:
            for entry in entries.values():
                entry["logprob"] = -0.1


def raw_logits(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        for entries in choice["prompt_logprobs"][1:]:
            for entry in entries.values():
                entry["logprob"] += 9


def other_texts(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        for entries in choice["prompt_logprobs"][1:]:
            for entry in entries.values():
                entry["decoded_token"] += "x"


def other_model(reply: dict[str, Any]) -> None:
    reply["model"] = "large"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "answered 7 of 8 conversations"),
        (without_field, "use vLLM or potstill serve"),
        (shifted, "the positions are shifted"),
        (shorter, "must neither add nor cut tokens"),
        (other_ids, "read other token ids"),
        (too_few, "and 20 were asked for"),
        (above_one, "raw_logprobs"),
        (raw_logits, "raw_logprobs"),
        (other_texts, "and that of the tokenizer is"),
        (other_model, "now serves large, not tiny"),
    ],
)
def test_a_reply_that_cannot_be_right_is_one_line(
    source: str, server: VLLM, spoil: Spoil, message: str
) -> None:
    teacher = open_teacher(source, device="cpu")
    server.spoil = spoil
    with pytest.raises(ServerError, match=re.escape(message)) as error:
        teacher.targets(BatchLayout(265)(rows()))
    assert "\n" not in str(error.value)
    assert "127.0.0.1" in str(error.value)


def test_more_tokens_than_the_server_gives_is_its_own_message(source: str) -> None:
    teacher = open_teacher(f"{source}?top_k=21", device="cpu")
    with pytest.raises(ServerError, match="greater than max allowed: 20"):
        teacher.targets(BatchLayout(265)(rows()))


def test_options_and_served_models(source: str, server: VLLM) -> None:
    for options, message in (
        ("top_k=0", "at least 1"),
        ("top=5", "no option 'top'; known are top_k, model, tokenizer"),
        ("tokenizer=nowhere/at/all", "give a hub id or a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_teacher(f"{source}?{options}", device="cpu")
    server.names = ["tiny", "adapter"]
    with pytest.raises(ServerError, match="serves tiny, adapter; choose one"):
        VLLMTeacher(source)
    assert VLLMTeacher(f"{source}?model=adapter").name == "adapter"


def test_another_kind_of_server_is_one_line() -> None:
    with serving(Starlette()) as address, pytest.raises(ServerError, match="not a vLLM server"):
        VLLMTeacher(f"vllm+{address}")
    with pytest.raises(ServerError, match="start it with vllm serve TEACHER"):
        VLLMTeacher("vllm+http://127.0.0.1:9", patience_seconds=0.1)


def test_a_loss_that_needs_all_logits_is_refused(source: str) -> None:
    teacher = open_teacher(source, device="cpu")
    with pytest.raises(ConfigError, match="temperature 2"):
        teacher.require([{}], LossSettings(temperature=2.0))
    with pytest.raises(ConfigError, match="hidden states"):
        teacher.require([{"teacher_input_ids": [1]}], LossSettings())


def test_tokens_beyond_the_students_vocabulary_are_cut() -> None:
    """Their mass goes to the others in proportion."""
    q = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    target = TopKTarget(torch.tensor([[0, 9, 1]]), q[:, [0, 1, 2]].log(), torch.zeros(1))
    cut = target.cut(5)
    assert cut.ids.tolist() == [[0, 1, -1]]
    torch.testing.assert_close(
        cut.masses(5), torch.tensor([[0.4, 0.2, 0.0, 0.1]]) / 0.7, rtol=1e-5, atol=1e-6
    )


def test_a_run_with_a_teacher_on_vllm(
    source: str, pair_folder: Path, capsys: pytest.CaptureFixture[str], server: VLLM
) -> None:
    write_rows(pair_folder / "data.jsonl", conversations(20))
    command = ["distill", source, "student", "--data", "data.jsonl", *ON_CPU]
    assert cli.main([*command, "--output-dir", "run"]) == 0
    assert "is a lower bound" in capsys.readouterr().out
    evaluation = json.loads(Path("run/evaluation.json").read_text())
    before, after = (evaluation[name]["kl_nats_per_token"] for name in ("before", "after"))
    assert after < before
    assert {request["prompt_logprobs"] for request in server.requests} == {20}
    for more, message in (
        ("--temperature 2", "gives its most likely tokens"),
        ("--on-policy 0.5", "a vLLM server, which gives only a few tokens"),
        ("--quantize-teacher 8bit", "let vLLM quantize it"),
        ("--method cross", "needs the teacher's hidden states"),
        ("--teacher-model teacher", "leave out --teacher-model"),
    ):
        assert cli.main([*command, "--output-dir", "other", *shlex.split(more)]) == 2
        assert message in capsys.readouterr().err
        assert not Path("other").exists()
