"""A served teacher: the same targets as the one in this process, through restarts and kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from safetensors.torch import load_file, save
from starlette.testclient import TestClient

from conftest import (
    conversations,
    random_model,
    sentencepiece_tokenizer,
    tiny_model,
    toy_tokenizer,
    with_flash_attention,
    write_rows,
)
from potstill import cli
from potstill.data import BatchLayout, encode_conversation
from potstill.data.batch_rows import batch_rows
from potstill.errors import ModelError, SelfCheckFailed, ServerError
from potstill.generation.keys import identify_tokenizer
from potstill.models import ModelOpener
from potstill.models.heads import hidden_states
from potstill.teachers import LocalTeacher, capture_conversations, open_teacher
from potstill.teachers.ahead import RequestsAhead
from potstill.teachers.capture import template_hashes
from potstill.teachers.cards import device_map
from potstill.teachers.served import ServedTeacher
from potstill.teachers.server import _compute, _computed, _joinable, _Waiting, make_app
from potstill.teachers.stored_head import store_head

ON_CPU = ["--device", "cpu", "--precision", "fp32"]
KILLS = 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POTSTILL_TOKEN", raising=False)


def app_of(model: Any, folder: Path, token: str | None = None, tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or toy_tokenizer()
    facts = store_head(folder, model, tokenizer, "tiny")
    return make_app(
        model, folder, {**facts, "teacher": "tiny", **template_hashes(tokenizer)}, token
    )


@contextlib.contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """Serve in a thread; yield the address."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def model() -> Any:
    return tiny_model(seed=1)


@pytest.fixture
def url(model: Any, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "stored").mkdir()
    with serving(app_of(model, tmp_path / "stored")) as address:
        yield address


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [encode_conversation(one, toy_tokenizer()) for one in conversations(count)]


LAYOUTS = [
    BatchLayout(265),
    BatchLayout(265, packed=False),
    BatchLayout(265, one_line=True),
    BatchLayout(265, packed=False, masked=False),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "padded", "one line", "unmasked"])
def test_states_and_head_are_those_of_the_local_teacher_bit_by_bit(
    url: str, model: Any, layout: BatchLayout
) -> None:
    batch = layout(rows())
    served, local = ServedTeacher(url).targets(batch), LocalTeacher(model).targets(batch)
    assert torch.equal(served.hidden, local.hidden)
    assert torch.equal(served.head.weight, local.head.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "padded", "one line", "unmasked"])
def test_requests_that_are_computed_together_have_the_same_states(
    model: Any, layout: BatchLayout
) -> None:
    def request(some: list[dict[str, Any]]) -> dict[str, Any]:
        batch = layout(some)
        chosen = torch.zeros_like(batch["labels"])
        chosen[:, :-1] = batch["labels"][:, 1:] != -100
        names = ("input_ids", "position_ids", "attention_mask")
        return {name: batch[name] for name in names if name in batch} | {"chosen": chosen}  # type: ignore[literal-required]

    encoded = rows(12)
    batches = [request(encoded[:4]), request(encoded[4:6]), request(encoded[6:])]
    for columns in {tuple(batch) for batch in batches}:
        alike = [batch for batch in batches if tuple(batch) == columns]
        for one, joined in zip(alike, _compute(model, alike), strict=True):
            [alone] = _compute(model, [one])
            assert torch.allclose(alone, joined, atol=1e-5)


def test_only_requests_of_similar_length_are_joined() -> None:
    def waiting(length: int, name: str = "position_ids") -> _Waiting:
        column = torch.zeros(2, length, dtype=torch.long)
        return _Waiting({"input_ids": column, name: column}, None)  # type: ignore[arg-type]

    groups = _joinable([waiting(100), waiting(10), waiting(11), waiting(10, "attention_mask")])
    lengths = [[one.batch["input_ids"].shape[1] for one in group] for group in groups]
    assert sorted(map(sorted, lengths)) == [[10], [10, 11], [100]] or sorted(lengths) == [
        [10],
        [10],
        [11],
        [100],
    ]


@pytest.fixture
def place(pair_folder: Path) -> Path:
    write_rows(pair_folder / "data.jsonl", conversations(20))
    return pair_folder


def distill(teacher: str, output: str, *flags: str, student: str = "student") -> int:
    arguments = ["distill", teacher, student, "--data", "data.jsonl", "--output-dir", output]
    return cli.main([*arguments, "--max-steps", "3", *ON_CPU, *flags])


def weights(output: str) -> dict[str, Any]:
    return load_file(Path(output) / "student" / "model.safetensors")


def opened(folder: Path) -> Any:
    from potstill.models import load_model

    return load_model(folder, dtype="float32", device="cpu")[0]


@pytest.mark.parametrize("method", ["logits", "cross"])
def test_a_run_with_a_served_teacher_ends_where_one_with_a_local_teacher_ends(
    place: Path, method: str
) -> None:
    if method == "cross":
        tiny_model(seed=2, layers=2, rows=400).save_pretrained(place / "other")
        sentencepiece_tokenizer(chat_template=None).save_pretrained(place / "other")
    student = "other" if method == "cross" else "student"
    flags = ("--method", method, "--chat-template", "plain")
    assert distill("teacher", "local", *flags, student=student) == 0
    (place / "stored").mkdir()
    with serving(app_of(opened(place / "teacher"), place / "stored")) as url:
        assert distill(url, "served", *flags, student=student) == 0
    local, served = weights("local"), weights("served")
    assert all(torch.equal(local[name], served[name]) for name in local)
    files = [place / one / "evaluation.json" for one in ("local", "served")]
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["after"] == second["after"]


def test_a_restart_of_the_server_is_survived_and_another_teacher_refused(
    model: Any, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    batch = LAYOUTS[0](rows())
    with serving(app_of(model, tmp_path / "a")) as url:
        teacher = ServedTeacher(url, patience_seconds=20)
        before = teacher.targets(batch).hidden
    port = int(url.rsplit(":", 1)[1])
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(teacher.targets(batch).hidden)
        except ServerError as error:
            found.append(str(error))

    for folder, other in (("b", model), ("c", tiny_model(seed=5))):
        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)  # the server is away
        with serving(app_of(other, tmp_path / folder), port):
            asking.join()
    assert torch.equal(found[0], before)
    assert "now serves another teacher" in found[1]


def test_another_teacher_is_refused_even_if_no_request_failed(model: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    batch = LAYOUTS[0](rows())
    with serving(app_of(model, tmp_path / "a")) as url:
        teacher = ServedTeacher(url)
        teacher.targets(batch)
    port = int(url.rsplit(":", 1)[1])
    with (
        serving(app_of(tiny_model(seed=5), tmp_path / "b"), port),
        pytest.raises(ServerError, match="now serves another teacher; serve the former one"),
    ):
        teacher.targets(batch)


@pytest.mark.parametrize("kind", ["leaking", "variable length"])
def test_a_teacher_that_ignores_the_bounds_of_packed_rows_reads_conversations_alone(
    kind: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "leaking":
        model = random_model("opt", ffn_dim=64, word_embed_proj_dim=32)
    else:
        with_flash_attention(model)
    facts = store_head(tmp_path, model, toy_tokenizer(), "tiny")
    facts |= {"teacher": "tiny", **template_hashes(toy_tokenizer())}
    app = make_app(model, tmp_path, facts, None)
    shapes = []
    monkeypatch.setattr(
        "potstill.teachers.server.hidden_states",
        lambda _, batch: shapes.append(batch["attention_mask"].shape) or hidden_states(_, batch),
    )
    packed = LAYOUTS[0](rows())
    with serving(app) as url:
        served = ServedTeacher(url).targets(packed).hidden
    assert shapes == [(12, packed["input_ids"].shape[1])]
    alone = LocalTeacher(model).targets(LAYOUTS[1](list(batch_rows(packed)))).hidden
    torch.testing.assert_close(served, alone)


def test_an_id_of_padding_that_the_teacher_does_not_have_is_not_sent(url: str, model: Any) -> None:
    teacher = ServedTeacher(url)
    for layout in (BatchLayout(272), BatchLayout(272, packed=False)):
        batch = layout(rows())
        assert int(batch["input_ids"].max()) == 272
        found = teacher.targets(batch).hidden
        batch["input_ids"].clamp_(max=271)
        assert torch.equal(found, LocalTeacher(model).targets(batch).hidden)
    teacher.require(rows())
    with pytest.raises(ModelError, match="token id 272, and tiny at .* has only 272 rows"):
        teacher.require([{"input_ids": [1, 272, 2], "labels": [-100, 272, 2]}])


def test_a_request_that_fails_does_not_fail_those_computed_with_it(model: Any) -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    good, bad = ({"input_ids": ids * i, "chosen": ids} for i in (1, 999))
    found = _computed(model, [good, bad, good])
    assert [isinstance(one, Exception) for one in found] == [False, True, False]


def test_the_next_batches_are_requested_before_they_are_needed_one_at_a_time() -> None:
    posted, running, most = [], [0], [0]

    def post(body: bytes) -> bytes:
        running[0] += 1
        most[0] = max(most[0], running[0])
        posted.append(body)
        time.sleep(0.01)
        running[0] -= 1
        if body == b"bad":
            raise ServerError("gone")
        return body * 2

    ahead = RequestsAhead(post)
    for body in (b"a", b"b", b"c", b"d"):
        ahead.announce(body)
    time.sleep(0.1)
    assert posted == [b"a", b"b"]  # two replies wait, no more are requested
    assert ahead.take(b"a") == b"aa"
    assert ahead.take(b"c") == b"cc"  # b is dropped
    assert ahead.take(b"x") == b"xx"  # never announced
    assert ahead.take(b"d") == b"dd"
    ahead.announce(b"bad")
    with pytest.raises(ServerError, match="gone"):
        ahead.take(b"bad")
    assert ahead.take(b"e") == b"ee"
    assert most == [1]
    assert sorted(posted) == sorted([b"a", b"b", b"c", b"x", b"d", b"bad", b"e"])


def test_a_server_that_goes_away_for_good_is_one_line(url: str, model: Any) -> None:
    teacher = ServedTeacher(url, patience_seconds=0.5)
    teacher.connection.url = "http://127.0.0.1:9"  # nothing listens there
    with pytest.raises(ServerError, match=r"no answer .* for 0.5 seconds; start the server") as one:
        teacher.targets(LAYOUTS[0](rows()))
    assert "\n" not in str(one.value)


class TestBadInput:
    def refused(self, url: str, place: Path, capsys: pytest.CaptureFixture[str]) -> str:
        assert distill(url, "run") == 2
        line = capsys.readouterr().err
        assert not (place / "run").exists()
        assert line.count("potstill: ") == 1
        return line

    def test_nothing_listens(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = self.refused("http://127.0.0.1:9", place, capsys)
        assert "start it with potstill serve, or check the address" in line

    def test_another_kind_of_server(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        listing = Route("/teacher", lambda _: JSONResponse({"object": "list"}))
        newer = Route("/teacher", lambda _: JSONResponse({"kind": "teacher", "format": 9}))
        for routes, named in (
            ([listing], "not a server of potstill serve"),
            ([], "not a server of potstill serve; check the address (status 404)"),
            ([newer], "format 9, and this version reads format 1"),
        ):
            with serving(Starlette(routes=routes)) as url:
                assert named in self.refused(url, place, capsys)

    def test_a_wrong_token(
        self, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (place / "stored").mkdir()
        app = app_of(opened(place / "teacher"), place / "stored", token="secret")
        with serving(app) as url:
            assert "refuses the token (status 401)" in self.refused(url, place, capsys)
            monkeypatch.setenv("POTSTILL_TOKEN", "wrong")
            assert "set POTSTILL_TOKEN" in self.refused(url, place, capsys)
            monkeypatch.setenv("POTSTILL_TOKEN", "secret")
            assert distill(url, "run") == 0

    def test_another_tokenizer(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (place / "stored").mkdir()
        app = app_of(tiny_model(rows=400), place / "stored", tokenizer=sentencepiece_tokenizer())
        with serving(app) as url:
            assert "different tokenizers" in self.refused(url, place, capsys)

    def test_another_teacher_at_the_same_address_when_a_run_continues(
        self,
        place: Path,
        capsys: pytest.CaptureFixture[str],
        interrupt_at: Callable[..., contextlib.AbstractContextManager[None]],
    ) -> None:
        for name in ("a", "b", "c"):
            (place / name).mkdir()
        model = opened(place / "teacher")
        with serving(app_of(model, place / "a")) as url, interrupt_at(2):
            assert distill(url, "run") == 130
        port = int(url.rsplit(":", 1)[1])
        capsys.readouterr()
        with serving(app_of(tiny_model(seed=7), place / "b"), port):
            assert distill(url, "run") == 2
        line = capsys.readouterr().err
        assert "the teacher of this run (teacher) has changed since it began, so it cannot" in line
        with serving(app_of(model, place / "c"), port):
            assert distill(url, "run") == 0

    @pytest.mark.parametrize("differs", ["tokenizer", "chat_template", None])
    def test_data_that_were_made_with_another_tokenizer_or_template(
        self, place: Path, capsys: pytest.CaptureFixture[str], differs: str | None
    ) -> None:
        made_with = {"teacher": "big", **identify_tokenizer(toy_tokenizer())}
        made_with |= {} if differs is None else {differs: "0" * 32}
        (place / "manifest.json").write_text(json.dumps({"made_with": made_with}))
        (place / "stored").mkdir()
        with serving(app_of(opened(place / "teacher"), place / "stored")) as url:
            if differs is None:
                assert distill(url, "run") == 0
                return
            line = self.refused(url, place, capsys)
        assert f"made by big, with another {differs.replace('_', ' ')} than that of http" in line

    def test_a_model_that_captures_makes_no_sense_with_a_server(
        self, place: Path, url: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert distill(url, "run", "--teacher-model", "teacher") == 2
        assert "leave out --teacher-model" in capsys.readouterr().err
        assert not (place / "http:").exists()

    def test_what_a_server_refuses(self, model: Any, tmp_path: Path) -> None:
        ids = torch.zeros(1, 4, dtype=torch.long)
        bodies = [
            b"not safetensors",
            save({"input_ids": ids}),
            save({"input_ids": ids, "chosen": torch.zeros(1, 5, dtype=torch.bool)}),
            save({"input_ids": ids + 10_000, "chosen": ids}),
            save({"input_ids": ids - 1, "chosen": ids}),
            save({"input_ids": ids.float(), "chosen": ids}),
            save({"input_ids": ids, "chosen": ids + 0, "labels": ids + 1}),
            save({"input_ids": ids[0], "chosen": ids[0] + 0}),
        ]
        with TestClient(app_of(model, tmp_path)) as client:
            for body in bodies:
                assert client.post("/states", content=body).status_code == 400
            big = b"0" * (33 << 18)
            assert client.post("/states", content=big).status_code == 413
            assert client.get("/files/../secret").status_code == 404
            assert client.get("/files/head.safetensors").status_code == 200

    @pytest.mark.parametrize("keep", ["states", "sparse"])
    def test_a_model_that_changes_the_logits_of_its_head(
        self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
    ) -> None:
        def doubled(_: Any, __: Any, output: Any) -> Any:
            output.logits = output.logits * 2
            return output

        model.register_forward_hook(doubled)
        with pytest.raises(SelfCheckFailed, match="logits of the teacher, LlamaForCausalLM, are"):
            app_of(model, tmp_path)
        monkeypatch.setattr(ModelOpener, "model", lambda *_: model)
        monkeypatch.setattr(ModelOpener, "tokenizer", lambda *_: toy_tokenizer())
        with pytest.raises(SelfCheckFailed, match="off those of its head"):
            capture_conversations(
                "toy", conversations(4), tmp_path / keep, keep=keep, max_length=99
            )
        assert not list((tmp_path / keep).rglob("*.safetensors"))

    def test_a_model_that_does_not_fit_the_cards(self, model: Any) -> None:
        assert set(device_map(model, {0: 10**6, 1: 10**6}).values()) == {0}
        assert set(device_map(model, {0: 120_000, 1: 10**6}).values()) == {0, 1}
        with pytest.raises(ModelError, match="GiB of weights do not fit the cards'"):
            device_map(model, {0: 1000, 1: 1000})

    def test_a_port_in_use_and_an_open_address_without_a_token(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            assert cli.main(["serve", "teacher", "--port", port, *ON_CPU]) == 2
        assert f"port {port} of 127.0.0.1" in capsys.readouterr().err
        assert cli.main(["serve", "teacher", "--host", "0.0.0.0", *ON_CPU]) == 2
        assert "set a token in POTSTILL_TOKEN" in capsys.readouterr().err
        assert cli.main(["serve", "none", *ON_CPU]) == 2
        assert "none" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_kills_of_the_server_and_the_run_lose_nothing(place: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    frequent = ["--max-steps", "500", "--trainer", '{"save_steps": 5}']
    assert distill("teacher", "whole", *frequent) == 0
    command, metrics = [sys.executable, "-m", "potstill"], place / "killed" / "metrics.jsonl"
    run = ["distill", f"http://127.0.0.1:{port}", "student", "--data", "data.jsonl"]
    commands = {
        "server": [*command, "serve", "teacher", "--port", str(port), *ON_CPU],
        "run": [*command, *run, "--output-dir", "killed", *frequent, *ON_CPU],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    dice = random.Random(0)

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(commands[name], env=environment, stdout=subprocess.DEVNULL)

    def start_run_when_served() -> subprocess.Popen[bytes]:
        while True:
            with contextlib.suppress(ServerError):
                ServedTeacher(f"http://127.0.0.1:{port}")
                return start("run")
            time.sleep(0.2)

    def wait_for_steps(count: int) -> None:
        lowest = steps = 10**9
        while steps < lowest + count:
            assert processes["run"].poll() is None
            steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            lowest = min(lowest, steps)
            time.sleep(0.005)

    processes = {"server": start("server")}
    processes["run"] = start_run_when_served()
    try:
        for _ in range(KILLS):
            wait_for_steps(dice.randint(1, 15))
            killed = dice.choice(["server", "run"])
            processes[killed].kill()
            processes[killed].wait()
            time.sleep(dice.random())
            processes[killed] = start(killed)
        assert processes["run"].wait() == 0
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    whole, found = weights("whole"), weights("killed")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_a_url_opens_as_a_teacher(url: str, model: Any) -> None:
    teacher = open_teacher(url)
    assert teacher.model is None
    assert teacher.vocabulary_rows == 272
    assert teacher.tokenizer is not None
    assert teacher.tokenizer.chat_template == toy_tokenizer().chat_template


@pytest.mark.parametrize("method", ["logits", "cross"])
def test_training_requests_each_batch_before_the_step_that_needs_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from potstill import DistillationConfig, DistillationTrainer

    happened: list[str] = []
    teacher = open_teacher(url)
    announce, take = teacher._ahead.announce, teacher._ahead.take  # type: ignore[attr-defined]
    numbers: dict[bytes, int] = {}

    def announcing(body: bytes) -> None:
        happened.append(f"announced {numbers.setdefault(body, len(numbers))}")
        announce(body)

    def taking(body: bytes) -> bytes:
        happened.append(f"taken {numbers.get(body, 'unannounced')}")
        return take(body)

    monkeypatch.setattr(teacher._ahead, "announce", announcing)  # type: ignore[attr-defined]
    monkeypatch.setattr(teacher._ahead, "take", taking)  # type: ignore[attr-defined]
    monkeypatch.setattr(DistillationTrainer, "_self_check", lambda *_: None)
    settings: dict[str, Any] = {"output_dir": str(tmp_path / "run"), "use_cpu": True}
    arguments = DistillationConfig(
        method=method, max_steps=3, per_device_train_batch_size=4, report_to=[], **settings
    )
    student, data = tiny_model(seed=3, layers=2), conversations(12)
    DistillationTrainer(student, teacher, arguments, data, processing_class=toy_tokenizer()).train()
    steps = [f"{what} {i}" for i in range(3) for what in ("announced", "taken")]
    assert sorted(happened) == sorted(steps)
    assert happened.index("announced 1") < happened.index("taken 0")
    assert happened.index("announced 2") < happened.index("taken 1")
