"""Measure how many tokens per second potstill and other libraries generate.

    python benchmarks/generate.py [--prompts 400] [--max-new-tokens 256] [--continuous]
    python benchmarks/generate.py --server [--concurrency 8] [--prompts 96] [--max-new-tokens 64]

SmolLM2-135M-Instruct in bfloat16 answers the demo's prompts at temperature 0.7 and top-p 0.95, 256
prompts at a time. potstill answers first. Then the same prompts are answered by a loop of
`model.generate` over padded batches of 32 in the file's order, and with --continuous by
transformers' continuous batching. These stop each answer at the length of potstill's answer, so all
methods do the same work. The methods take turns, so that other load on the machine affects all of
them. Tokens are those of the answers, end tokens included.

--server starts `transformers serve --continuous-batching` on this machine. It sends greedy requests
alternately with potstill's client and with the asyncio client of the `openai` package, with the
same number of parallel requests. It needs `pip install 'transformers[serving]'`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from potstill import load_model
from potstill.data import read_prompts
from potstill.data.chat_templates import render
from potstill.generation import LocalEngine, Request, Sampling, ServerEngine, requests
from potstill.models import load_tokenizer

POTSTILL = "potstill"
BATCH = 32
TURN, SERVER_TURN = 256, 32  # prompts; 256 is the local engine's default unit


class Stopwatch:
    """Seconds, this process's CPU seconds, and tokens, by method."""

    def __init__(self) -> None:
        self.seconds, self.cpu, self.tokens = Counter[str](), Counter[str](), Counter[str]()

    def time(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        result = function(*arguments)
        self.seconds[name] += time.perf_counter() - begun
        self.cpu[name] += time.process_time() - begun_cpu
        return result

    def table(self) -> str:
        """Return a table with tokens per second, and the time per token relative to potstill's."""
        reference = self.tokens[POTSTILL] / self.seconds[POTSTILL]
        lines = [
            "| method | tokens | seconds | CPU seconds | tokens/s | time ÷ time of `potstill` |",
            "|---|---|---|---|---|---|",
        ]
        for name in sorted(self.seconds, key=lambda name: name != POTSTILL):
            tokens, seconds = self.tokens[name], self.seconds[name]
            numbers = f"{tokens} | {seconds:.0f} | {self.cpu[name]:.0f} | "
            numbers += f"{tokens / seconds:.1f} | {reference * seconds / tokens:.2f}"
            lines.append(f"| {name} | {numbers} |")
        return "\n".join(lines)


class Lengths(StoppingCriteria):
    """Stop each row at a length of its own, counted from the end of the prompts."""

    def __init__(self, prompt_columns: int, lengths: Sequence[int]) -> None:
        self.prompt_columns, self.lengths = prompt_columns, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] - self.prompt_columns >= self.lengths


@torch.inference_mode()
def plain_loop(
    model: Any, tokenizer: Any, texts: list[str], lengths: list[int], settings: GenerationConfig
) -> int:
    generated = 0
    for start in range(0, len(texts), BATCH):
        batch = slice(start, start + BATCH)
        encoded = tokenizer(
            texts[batch],
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        columns = encoded["input_ids"].shape[1]
        stop = StoppingCriteriaList([Lengths(columns, lengths[batch])])
        rows = model.generate(**encoded, generation_config=settings, stopping_criteria=stop)
        generated += sum(min(length, rows.shape[1] - columns) for length in lengths[batch])
    return generated


def continuous(
    model: Any, tokenizer: Any, texts: list[str], lengths: list[int], settings: GenerationConfig
) -> int:
    """Run transformers' continuous batching, with a paged cache."""
    config = ContinuousBatchingConfig(
        max_memory_percent=0.1, max_requests_per_batch=BATCH, page_size=16
    )  # its fastest here
    manager_of = model.continuous_batching_context_manager
    generated = 0
    with manager_of(
        generation_config=settings, continuous_batching_config=config, timeout=5
    ) as manager:
        for text, length in zip(texts, lengths, strict=True):
            manager.add_request(
                tokenizer(text, add_special_tokens=False)["input_ids"],
                max_new_tokens=length,
                eos_token_id=-1,
            )
        finished = 0
        while finished < len(texts) and manager.is_running():
            answer = manager.get_result(timeout=1)
            if answer is not None and answer.is_finished():
                finished += 1
                generated += len(answer.generated_tokens)
    return generated


def compare_local(asked: list[Request], sampling: Sampling, with_continuous: bool) -> None:
    model, tokenizer = load_model("demo", dtype="bfloat16", device="cpu")
    engine = LocalEngine(model, tokenizer, sampling, batch_size=BATCH, unit_size=TURN)
    chosen = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }
    settings = GenerationConfig(
        **chosen, max_new_tokens=sampling.max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    others = {f"model.generate, padded batches of {BATCH}": (plain_loop, model)}
    if with_continuous:  # it changes the model's attention, so it gets its own model
        others["transformers' continuous batching"] = (
            continuous,
            load_model("demo", dtype="bfloat16", device="cpu")[0],
        )

    def take_turns(watch: Stopwatch, unit: list[Request]) -> list[int]:
        answers = watch.time(POTSTILL, engine.answer_unit, unit)
        lengths = [len(answer.teacher_ids) for answer in answers]
        watch.tokens[POTSTILL] += sum(lengths)
        texts = [render(tokenizer, request.messages, for_answer=True) for request in unit]
        for name, (method, its_model) in others.items():
            watch.tokens[name] += watch.time(
                name, method, its_model, tokenizer, texts, lengths, settings
            )
        return lengths

    take_turns(Stopwatch(), asked[:2])
    watch, lengths = Stopwatch(), list[int]()
    for unit in turns(asked, TURN):
        lengths += take_turns(watch, unit)
        print(
            f"{len(lengths)} prompts, {sum(lengths)} tokens, "
            f"{min(lengths)} to {max(lengths)} an answer\n{watch.table()}",
            flush=True,
        )


def compare_served(asked: list[Request], sampling: Sampling, concurrency: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for part in load_model("demo", dtype="bfloat16", device="cpu"):
            part.save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        with server(folder) as url:
            engine = ServerEngine(url, folder, sampling, concurrency=concurrency)
            clients = {
                POTSTILL: lambda unit: [
                    answer.text for (answer,) in engine.answer([request] for request in unit)
                ],
                "openai's asyncio client": lambda unit: asyncio.run(
                    bare_client(url, folder, unit, sampling, concurrency)
                ),
            }
            for client in clients.values():
                client(asked[:2])
            watch = Stopwatch()
            for number, unit in enumerate(turns(asked, SERVER_TURN)):
                # The second client finds the prompts in the server's cache.
                for name in sorted(clients, reverse=number % 2 == 1):
                    answers = watch.time(name, clients[name], unit)
                    watch.tokens[name] += sum(
                        len(ids)
                        for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]
                    )
                print(
                    f"{SERVER_TURN * number + len(unit)} prompts, "
                    f"{concurrency} in flight\n{watch.table()}",
                    flush=True,
                )


async def bare_client(
    url: str, model: str, unit: list[Request], sampling: Sampling, concurrency: int
) -> list[str]:
    """Send requests without retries or checks: the server's own speed."""
    import openai

    gate = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:

        async def ask(request: Request) -> str:
            async with gate:
                reply = await client.chat.completions.create(
                    model=model,
                    messages=request.messages,  # type: ignore[arg-type]
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=request.seed % 2**31,
                )
                return reply.choices[0].message.content or ""

        return await asyncio.gather(*map(ask, unit))


@contextlib.contextmanager
def server(folder: str) -> Iterator[str]:
    """Run `transformers serve` on a free port; yield its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "transformers"),
        "serve",
        folder,
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
    ]
    more = ["--port", str(port), "--continuous-batching", "--cb-max-memory-percent", "0.1"]
    with open(Path(folder) / "server.log", "w") as log:
        process = subprocess.Popen(
            [*command, *more], stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def turns(asked: list[Request], size: int) -> Iterator[list[Request]]:
    return (asked[start : start + size] for start in range(0, len(asked), size))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--concurrency", type=int, default=8)
    options = parser.parse_args()
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens, temperature=0 if options.server else 0.7
    )
    with resources.as_file(resources.files("potstill.data") / "demo_prompts.jsonl") as path:
        prompts = [row["messages"] for row in read_prompts(path)][-options.prompts :]
    asked = list(requests(prompts, sampling, {}))
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    if options.server:
        compare_served(asked, sampling, options.concurrency)
    else:
        compare_local(asked, sampling, options.continuous)


if __name__ == "__main__":
    main()
