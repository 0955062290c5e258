"""On-policy distillation: the student answers the prompts, the teacher reads the answers.

A round: the student answers a few prompts under its current weights. The teacher's hidden states at
these answers are computed once and kept. Then the student trains on them for ``rollout_reuse``
passes, each time under its *current* weights: only the visited text is older than the student, the
loss is exact. The gradient is that of the divergence at the visited positions, with these held
fixed; how the choice of text depends on the student is left out, as in GKD.

Source: Agarwal et al. 2024, On-Policy Distillation of Language Models (GKD), arXiv 2306.13649.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from potstill.data.batches import Encoded
from potstill.data.prompt_rows import prompt_length
from potstill.errors import ConfigError, DataError, RunFolderError, SelfCheckFailed
from potstill.models.heads import on_device
from potstill.protocols import Batch
from potstill.sampling import RefilledSampler, SampledRow, Sampling
from potstill.teachers import KeptTeacher
from potstill.teachers.captured import row_key
from potstill.training.on_policy_checks import (
    answer_ends,
    answerable,
    note_other_ends,
    refuse_impossible,
)
from potstill.training.rollout_files import RolloutFiles
from potstill.training.rollout_health import NUMBERS, RolloutHealth
from potstill.training.rollout_rows import on_students_text
from potstill.training.sampling_copy import SamplingCopy
from potstill.training.schedule import OnPolicySchedule

if TYPE_CHECKING:
    from potstill.training.trainer import DistillationTrainer

OBJECTIVE = "objective"
"""Key of a batch's own objective; a batch without it has the trainer's."""
MOST_AT_ONCE = 64
STATES_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative, of kept states from new ones: other batches round differently. Others: 0.05."""


class OnPolicy:
    """Replace micro-batches of a trainer by the student's own answers with the teacher's targets.

    Make it before the trainer wraps the student. Raises: ConfigError for a teacher that cannot read
    new text, or a student that cannot end an answer; DataError for data without prompts.
    """

    def __init__(self, trainer: DistillationTrainer, student: Any, dataset: Any) -> None:
        self.trainer, args = trainer, trainer.args
        objective: Any = trainer.objective
        refuse_impossible(args, objective, dataset)
        self.base, self.rows = on_students_text(objective, dataset)
        self.base = dataclasses.replace(self.base, loss=args.on_policy_loss_settings)
        self.teacher, self.dataset = objective.teacher, dataset
        self.tokenizer, self.layout = objective.tokenizer, objective.layout
        self.prompts = answerable(dataset, args.max_length)
        self.ends = answer_ends(student, self.tokenizer, dataset)
        note_other_ends(objective, self.ends)
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.copy = SamplingCopy(student, half)
        folder = args.rollouts_dir or Path(args.output_dir) / "rollouts"
        self.files = RolloutFiles(Path(folder), args.process_index)
        self.batch_size = args.per_device_train_batch_size
        self.size: int = args.rollout_size or 8 * self.batch_size
        if self.size % self.batch_size:
            raise ConfigError(
                f"rollout_size {self.size}: must be a multiple of the batch size, {self.batch_size}"
            )
        self.per_round = args.rollout_reuse * self.size // self.batch_size
        self.schedule = OnPolicySchedule(1, 0, 1)  # type: ignore[arg-type]
        self.seconds, self.rounds = 0.0, 0
        """Time spent on rounds: sampling, and the teacher's states."""
        self.stops_at_collapse = True
        self._losses: dict[str, list[Tensor]] = {"on_policy_loss": [], "off_policy_loss": []}
        self._checked = False
        self._resumed: int | None = None
        self._number: int | None = None
        self._answers: list[Encoded] = []
        self._objective: Any = None

    def begin(self, global_step: int, max_steps: int) -> None:
        """Start a run of ``max_steps``, or go on after ``global_step``."""
        args = self.trainer.args
        self.schedule = OnPolicySchedule.of_run(
            args.on_policy,
            args.on_policy_from,
            max_steps,
            args.gradient_accumulation_steps,
            self.per_round,
        )
        self._number, self._answers = None, []
        done = self.schedule.before(global_step * args.gradient_accumulation_steps)
        # In the middle of a round the answers are those of an earlier student.
        self._resumed = done // self.per_round if done % self.per_round else None

    def replaced(self, batches: Sequence[Batch], global_step: int) -> list[Batch]:
        """Return the micro-batches of a step, those on-policy replaced. All processes call it."""
        accumulation = self.trainer.args.gradient_accumulation_steps
        found = list(batches)
        for i in range(accumulation):
            place = self.schedule.place(global_step * accumulation + i)
            if place is None:
                continue
            number, index = place
            if number != self._number:
                self._open_round(number, global_step)
            if i < len(found):  # the last step of an epoch may have fewer
                found[i] = self._batch(number, index)
        return found

    def note_loss(self, batch: Batch, nats: Tensor, tokens: Tensor) -> None:
        """Add the loss of a micro-batch, Σ in nats over ``tokens``, to what `noted_losses` says."""
        kind = "on_policy_loss" if OBJECTIVE in batch else "off_policy_loss"
        self._losses[kind].append(torch.stack([nats.detach().double(), tokens.double()]))

    def noted_losses(self) -> dict[str, float]:
        """Return nats per token since the last call, of this process, for each kind of text."""
        means = {}
        for kind, noted in self._losses.items():
            if noted:
                nats, tokens = torch.stack(noted).sum(0).tolist()
                means[kind] = nats / max(1, tokens)
                noted.clear()
        return means

    def _open_round(self, number: int, global_step: int) -> None:
        begun = time.perf_counter()
        if number == self._resumed:
            self._answers, states = self.files.read(number)
            self._keep(states)
        else:
            self._answer(number, global_step)
        self._number = number
        self.seconds += time.perf_counter() - begun
        self.rounds += 1

    @property
    def seconds_per_round(self) -> float:
        """Return the mean time of a round."""
        return self.seconds / max(1, self.rounds)

    def _answer(self, number: int, global_step: int) -> None:
        """Make a round: sample, measure, and keep the teacher's states."""
        trainer = self.trainer
        sources = [self.dataset[i] for i in self._chosen(number)]
        sampled, ended = self._sampled(number, sources)
        health = self._of_all(RolloutHealth.of(sampled, ended))
        trainer.log(health.as_logs())
        if self.stops_at_collapse:
            health.refuse_collapse(number=number, step=global_step)
        triples = zip(sources, sampled, ended, strict=True)
        answers = [self.rows.row(source, row.tokens, ended=end) for source, row, end in triples]
        self._answers = [answer for answer in answers if answer is not None]
        if not self._answers:
            raise DataError(
                f"step {global_step}, round {number} of rollouts: none of the {len(answers)} "
                "answers of the student has a target: the teacher reads other bytes in all of "
                "them; check the chat templates, or leave out --on-policy"
            )
        states = self._keep()
        self.files.write(number, self._answers, states)
        self.files.delete_before(min(number, self._oldest_needed()))

    def _sampled(self, number: int, sources: list[Encoded]) -> tuple[list[SampledRow], list[bool]]:
        args = self.trainer.args
        model = self.copy.refreshed(self.trainer.model, args.device)
        sampling = Sampling(
            max_new_tokens=args.rollout_tokens, temperature=args.rollout_temperature, top_p=1.0
        )
        sampler = RefilledSampler(
            model,
            self.tokenizer,
            sampling,
            batch_size=min(self.size, MOST_AT_ONCE),
            nats=True,
        )
        sampler.ends = self.ends
        prompts = [row["input_ids"][: prompt_length(row["labels"])] for row in sources]
        seeds = [_seed(f"{args.seed} answer {position}") for position in self._positions(number)]
        with torch.autocast(args.device.type, enabled=False):
            rows = sampler.sample(prompts, seeds, longest=args.max_length)
        return rows, [sampler.has_ended(row) for row in rows]

    def _keep(self, states: list[Tensor] | None = None) -> list[Tensor]:
        """Compute the teacher's states of the answers, or take ``states``; return them by row."""
        device = self.trainer.args.device
        keys = [row_key(answer)[0] for answer in self._answers]
        if states is None:
            rows = sorted(self._answers, key=lambda row: len(row["input_ids"]))
            chunks = (rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size))
            kept = KeptTeacher.of(self.teacher, map(self._teacher_batch, chunks), device)
        else:
            some = [self._teacher_batch(self._answers[:1])]
            head = KeptTeacher.of(self.teacher, some, device).head
            kept = KeptTeacher(dict(zip(keys, states, strict=True)), head)
        if not self._checked:
            self._check_states(kept, loaded=states is not None)
            self._checked = True
        self._objective = dataclasses.replace(self.base, teacher=kept)
        return [kept.states[key] for key in keys]

    def _check_states(self, kept: KeptTeacher, *, loaded: bool) -> None:
        """Compare kept states with those of another batch. Raises: RunFolderError, or
        SelfCheckFailed."""
        batch = self._teacher_batch(self._answers[: -self.batch_size : -2] or self._answers[:1])
        batch = on_device(batch, self.trainer.args.device)
        target: Any = self.teacher.targets(batch)
        ours, theirs = kept.targets(batch).hidden.double(), target.hidden.double()
        error = float((ours - theirs).norm() / theirs.norm())
        if error > STATES_TOLERANCE.get(target.hidden.dtype, 0.05):
            found = f"the teacher's kept states are {error:.2g} (relative) away from its new ones"
            if loaded:
                where = self.files.folder
                raise RunFolderError(
                    f"{where}: {found}; give the teacher with which the run began, or another "
                    "--output-dir"
                )
            raise SelfCheckFailed(
                f"self-check: {found}: the teacher's states depend on the batch; this is a "
                "mistake in the teacher or the layout"
            )

    def _batch(self, number: int, index: int) -> Batch:
        """Return micro-batch ``index`` of a round: each pass is in another order."""
        per_pass = self.size // self.batch_size
        turn, place = divmod(index, per_pass)
        order = _permutation(len(self._answers), f"{self.trainer.args.seed} {number} {turn}")
        first = place * self.batch_size
        chosen = [order[(first + i) % len(order)] for i in range(self.batch_size)]
        # Fewer answers than planned: each is at most once in a batch.
        batch: Any = self.layout([self._answers[i] for i in dict.fromkeys(chosen)])
        batch = on_device(batch, self.trainer.args.device)
        batch[OBJECTIVE] = self._objective
        return batch  # type: ignore[no-any-return]

    def _teacher_batch(self, rows: list[Encoded]) -> Batch:
        batch: Batch | None = self.base.teacher_batch(self.layout(rows))
        assert batch is not None
        return batch

    def _positions(self, number: int) -> range:
        """Return the numbers of this process's answers in a round, among all of the run."""
        args = self.trainer.args
        first = (number * args.world_size + args.process_index) * self.size
        return range(first, first + self.size)

    def _chosen(self, number: int) -> Iterator[int]:
        """Yield the rows whose prompts are answered in a round by this process."""
        for position in self._positions(number):
            turn, place = divmod(position, len(self.prompts))
            name = f"{self.trainer.args.seed} prompts {turn}"
            yield self.prompts[_permutation(len(self.prompts), name)[place]]

    def _of_all(self, health: RolloutHealth) -> RolloutHealth:
        """Return the sums over all processes, which then stop together."""
        if self.trainer.accelerator.num_processes == 1:
            return health
        sums = torch.tensor(
            [float(getattr(health, name)) for name in NUMBERS], device=self.trainer.args.device
        )
        total = self.trainer.accelerator.reduce(sums, "sum").tolist()
        return RolloutHealth(*total)

    def _oldest_needed(self) -> int:
        """Return the first round that a checkpoint in the run's folder may need."""
        folder = Path(self.trainer.args.output_dir)
        steps = [int(path.name.split("-")[-1]) for path in folder.glob("checkpoint-*")]
        accumulation = self.trainer.args.gradient_accumulation_steps
        done = [self.schedule.before(step * accumulation) for step in steps]
        return min((one // self.per_round for one in done), default=1 << 60)


@functools.lru_cache(4)
def _permutation(count: int, name: str) -> list[int]:
    random = torch.Generator().manual_seed(_seed(name))
    order: list[int] = torch.randperm(count, generator=random).tolist()
    return order


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
