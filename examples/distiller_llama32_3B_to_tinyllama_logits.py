"""Logit distillation across tokenizers: Llama-3.2-3B (128 000 tokens) → TinyLlama-1.1B (32 000).

    python examples/distiller_llama32_3B_to_tinyllama_logits.py          # one 48 GB GPU
    python examples/distiller_llama32_3B_to_tinyllama_logits.py --demo   # small models, on a CPU

The naive way, `last_token_padded`, takes the logits of the last token, compares equal ids, and pads
the smaller vector with zeros. But of the ids that both models have, 8 mean the same bytes. The
method `pieces` reads each teacher token as the student would spell it, wherever both models read
the same bytes (docs/across-tokenizers.md). Both train the same student on the same answers for the
same number of steps. Expect the first to help little or to harm, and the second to help.
"""

import copy
import sys

import potstill
from potstill import DistillationConfig, DistillationTrainer, answer_prompts
from potstill.data import PLAIN_CHAT_TEMPLATE

DEMO = "--demo" in sys.argv
TOPICS = ["rain", "bread", "a river", "the moon", "music", "a school", "winter", "the sea"]
ASK = "Explain what to know about", "Write a note about", "Why like"
PROMPTS = [f"{ask} {topic}." for topic in TOPICS for ask in ASK]
HELD_OUT = [f"{ask} {topic}." for topic in ("snow", "a dog", "tea", "a garden") for ask in ASK]

# 1. The teacher answers. At temperature 1 its text follows the distribution of its logits.
name = "demo" if DEMO else "meta-llama/Llama-3.2-3B-Instruct"
teacher, teacher_tokenizer = potstill.load_model(name, dtype="bfloat16")
sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48 if DEMO else 256}
train = answer_prompts(teacher, teacher_tokenizer, PROMPTS, **sampling)
held_out = answer_prompts(teacher, teacher_tokenizer, HELD_OUT, **sampling)

# 2. The demo's student is the teacher with a new tokenizer of 16 000 tokens.
if DEMO:
    words = [teacher_tokenizer.decode([token]) for token in range(len(teacher_tokenizer))]
    tokenizer = teacher_tokenizer.train_new_from_iterator(words, vocab_size=16000)
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    student = potstill.change_tokenizer(teacher, teacher_tokenizer, tokenizer).float()
else:
    student, tokenizer = potstill.load_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", dtype="float32")
pair = {"teacher_tokenizer": teacher_tokenizer}


def measure(name, model):
    """Print bits per byte of the held-out answers, which any two tokenizers can be compared by."""
    found = potstill.evaluate(model, teacher, held_out, tokenizer=tokenizer, **pair)
    print(f"{name}: {found['bits_per_byte']:.3f} bits per byte", flush=True)
    return found


# 3. Train a copy of the student each way.
found = {"before": measure("before", student)}
for alignment in ("last_token_padded", "pieces"):
    settings = DistillationConfig(
        "runs/tinyllama_logits", method="cross", alignment=alignment, bf16=True, report_to=[],
        max_steps=25 if DEMO else 500, learning_rate=1e-4 if DEMO else 2e-5, warmup_steps=2,
        lr_scheduler_type="cosine", save_strategy="no",
    )  # fmt: skip
    learner = copy.deepcopy(student)
    data = {"train_dataset": train, "processing_class": tokenizer, **pair}
    DistillationTrainer(model=learner, teacher=teacher, args=settings, **data).train()
    found[alignment] = measure(alignment, learner)
print(found["pieces"].compare(found["last_token_padded"]).verdict("pieces", "last_token_padded"))
