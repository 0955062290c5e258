"""Serve a teacher's hidden states over HTTP: `potstill serve`.

GET  /teacher          the teacher's name, dtype, tokenizer and head, as JSON
GET  /files/NAME       head.safetensors, and the files of the tokenizer
POST /states           safetensors in: input_ids, chosen, and position_ids or attention_mask
                       ``[B, T]``; safetensors out: hidden ``[N, H]`` at the chosen positions

Requests that wait at the same time are computed in one forward pass, padded to the longest. Nothing
is pickled. With a token (POTSTILL_TOKEN) every request must bear it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from potstill.models.heads import has_variable_length, hidden_states, on_device
from potstill.models.isolation import isolation
from potstill.models.vocabulary import embedding_rows
from potstill.protocols import Batch, CausalLM
from potstill.teachers.connection import IDENTITY
from potstill.teachers.served import FORMAT, identity
from potstill.teachers.stored_head import HEAD, TOKENIZER

MAX_TOKENS = 1 << 18
"""Tokens in one request, padding included; a larger one is refused."""
JOINED_TOKENS = 1 << 15
"""Tokens of requests that are computed together."""
BYTES_PER_TOKEN = 32
COLUMNS = {"input_ids", "chosen", "position_ids", "attention_mask"}


@dataclass
class _Waiting:
    batch: dict[str, Tensor]
    done: asyncio.Future[Tensor] = field(repr=False)

    @property
    def tokens(self) -> int:
        return self.batch["input_ids"].numel()


def make_app(model: CausalLM, folder: Path, facts: dict[str, Any], token: str | None) -> Starlette:
    """Return the application for a model whose head and tokenizer are stored in ``folder``."""
    rows = embedding_rows(model)
    queue: asyncio.Queue[_Waiting] = asyncio.Queue()
    files = {HEAD: folder / HEAD}
    files |= {f"{TOKENIZER}/{path.name}": path for path in (folder / TOKENIZER).iterdir()}
    facts = {**facts, **_facts_of(model), "files": sorted(files)}

    def check_token(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "wrong token")

    async def teacher(request: Request) -> Response:
        check_token(request)
        return JSONResponse(facts)

    async def file(request: Request) -> Response:
        check_token(request)
        path = files.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404, "no such file")
        return FileResponse(path)

    async def states(request: Request) -> Response:
        check_token(request)
        batch = _parsed(await _body(request), rows)
        waiting = _Waiting(batch, asyncio.get_running_loop().create_future())
        await queue.put(waiting)
        hidden = await waiting.done
        return Response(save({"hidden": hidden}), media_type="application/octet-stream")

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(_answer_all(model, queue))
        yield
        worker.cancel()

    routes = [
        Route("/teacher", teacher),
        Route("/files/{name:path}", file),
        Route("/states", states, methods=["POST"]),
    ]
    named = Middleware(_NamedTeacher, identity=identity(facts))
    return Starlette(routes=routes, middleware=[named], lifespan=lifespan)


def _facts_of(model: CausalLM) -> dict[str, Any]:
    seen = isolation(model)
    return {
        "kind": "teacher",
        "format": FORMAT,
        "embedding_rows": embedding_rows(model),
        # Variable-length kernels separate conversations only if all are in one row.
        "reads_packed": seen.packed and seen.padded and not has_variable_length(model),
    }


class _NamedTeacher:
    """Name the teacher in every reply, so that a client notices another one after a restart."""

    def __init__(self, app: ASGIApp, *, identity: str) -> None:
        self.app, self.header = app, (IDENTITY.encode(), identity.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], self.header]
            await send(message)

        await self.app(scope, receive, send_named)


async def _body(request: Request) -> bytes:
    """Return the body. Raises: HTTPException as soon as it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_TOKENS * BYTES_PER_TOKEN:
            raise HTTPException(413, f"more than {MAX_TOKENS} tokens in a request")
        parts.append(part)
    return b"".join(parts)


def _parsed(body: bytes, vocabulary: int) -> dict[str, Tensor]:
    """Return a batch. Raises: HTTPException if it is not one that the model can read."""
    try:
        batch = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise HTTPException(400, f"not safetensors ({error})") from error
    ids = batch.get("input_ids")
    shapes = {tuple(tensor.shape) for tensor in batch.values()}
    whole = all(not tensor.is_floating_point() for tensor in batch.values())
    if ids is None or "chosen" not in batch or batch.keys() - COLUMNS or not whole:
        raise HTTPException(400, f"needs whole numbers in columns among {sorted(COLUMNS)}")
    if len(shapes) != 1 or ids.ndim != 2 or not 0 < ids.numel() <= MAX_TOKENS:
        raise HTTPException(400, f"columns of one shape [B, T] with at most {MAX_TOKENS} tokens")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise HTTPException(400, f"input_ids must be below {vocabulary}")
    return batch


async def _answer_all(model: CausalLM, queue: asyncio.Queue[_Waiting]) -> None:
    """Compute what waits, until cancelled."""
    while True:
        together = [await queue.get()]
        while not queue.empty():
            together.append(queue.get_nowait())
        for some in _joinable(together):
            some = [one for one in some if not one.done.cancelled()]  # the client has gone
            if not some:
                continue
            found = await asyncio.to_thread(_computed, model, [one.batch for one in some])
            for one, result in zip(some, found, strict=True):
                if one.done.cancelled():
                    continue
                if isinstance(result, Tensor):
                    one.done.set_result(result)
                else:
                    one.done.set_exception(HTTPException(500, f"{result}"[:300]))


def _joinable(waiting: list[_Waiting]) -> list[list[_Waiting]]:
    """Group requests with the same columns and similar lengths, up to `JOINED_TOKENS`."""
    groups: list[list[_Waiting]] = []
    for one in sorted(waiting, key=lambda one: one.batch["input_ids"].shape[1]):
        last = groups[-1] if groups else []
        if (
            last
            and last[0].batch.keys() == one.batch.keys()
            and one.batch["input_ids"].shape[1] <= 1.25 * last[0].batch["input_ids"].shape[1]
            and sum(other.tokens for other in last) + one.tokens <= JOINED_TOKENS
        ):
            last.append(one)
        else:
            groups.append([one])
    return groups


def _computed(model: CausalLM, batches: list[dict[str, Tensor]]) -> list[Tensor | Exception]:
    """Return the states of each batch, or why there are none: the server goes on."""
    try:
        return [*_compute(model, batches)]
    except Exception as error:
        if len(batches) == 1:
            return [error]
    # Together they may need too much memory, and one must not fail the others.
    return [one for batch in batches for one in _computed(model, [batch])]


@torch.inference_mode()
def _compute(model: CausalLM, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the hidden states ``[N, H]`` at the chosen positions of each batch."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    joined = {
        name: torch.cat([_padded(name, batch[name], length) for batch in batches])
        for name in batches[0]
        if name != "chosen"
    }
    states = hidden_states(model, on_device(Batch(**joined), model.device))  # type: ignore[typeddict-item]
    found, row = [], 0
    for batch in batches:
        rows, width = batch["chosen"].shape
        chosen = batch["chosen"].bool().to(states.device)
        found.append(states[row : row + rows, :width][chosen].cpu())
        row += rows
    return found


def _padded(name: str, column: Tensor, length: int) -> Tensor:
    """Pad to ``length``. Positions start again at 0: without a mask no token attends to padding."""
    missing = length - column.shape[1]
    padding = torch.zeros(len(column), missing, dtype=column.dtype)
    if name == "position_ids":
        padding = torch.arange(missing, dtype=column.dtype).expand(len(column), -1)
    return torch.cat([column, padding], dim=1)
