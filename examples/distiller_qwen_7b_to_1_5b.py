"""Logit distillation with slightly different vocabularies: Qwen2.5-7B → Qwen2.5-1.5B.

    python examples/distiller_qwen_7b_to_1_5b.py            # one 80 GB GPU
    python examples/distiller_qwen_7b_to_1_5b.py --demo     # SmolLM2 with 128 padded rows, on a CPU

Both tokenizers have the same 151 665 tokens. The heads have 152 064 and 151 936 rows: the rows
beyond the tokens are padding, and no text produces them. Libraries that compare sizes refuse this
pair, or pad with logit 0, which is weight e⁰ and not probability 0. potstill compares tokens, cuts
both heads to the shared rows, and the softmax renormalizes. Expect KL from teacher to student to
fall.
"""

import sys

import potstill
from potstill import DistillationConfig, DistillationTrainer, alignment, answer_prompts

DEMO = "--demo" in sys.argv
TOPICS = ["rain", "bread", "a river", "the moon", "music", "a school", "winter", "the sea"]
ASK = "Tell me about", "Write a line about", "Why do people like"
PROMPTS = [f"{ask} {topic}." for topic in TOPICS for ask in ASK]
HELD_OUT = [f"{ask} {topic}." for topic in ("snow", "dogs", "tea", "gardens") for ask in ASK]

# 1. Open both models. The demo's teacher has more head rows than its tokenizer has tokens.
name = "demo" if DEMO else "Qwen/Qwen2.5-7B-Instruct"
teacher, teacher_tokenizer = potstill.load_model(name, dtype="bfloat16")
if DEMO:
    student, tokenizer = potstill.keep_layers(teacher, 15).float(), teacher_tokenizer
    teacher.resize_token_embeddings(len(teacher_tokenizer) + 128)
else:
    student, tokenizer = potstill.load_model("Qwen/Qwen2.5-1.5B-Instruct", dtype="float32")

# 2. Find the shared rows. An id with two meanings is an error that names it.
sizes = [len(model.get_output_embeddings().weight) for model in (teacher, student)]
shared = alignment.shared_rows(teacher_tokenizer, tokenizer)
print(f"head rows {sizes[0]} and {sizes[1]}, shared {shared}")

# 3. The teacher answers. At temperature 1 its text follows the distribution of its logits.
sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48 if DEMO else 256}
train = answer_prompts(teacher, teacher_tokenizer, PROMPTS, **sampling)
held_out = answer_prompts(teacher, teacher_tokenizer, HELD_OUT, **sampling)
pair = {"teacher_tokenizer": teacher_tokenizer}


def measure(when):
    """Print the KL on the held-out answers; return all measures."""
    found = potstill.evaluate(student, teacher, held_out, tokenizer=tokenizer, **pair)
    print(f"{when}: KL {found['kl_nats_per_token']:.2f} nats per token", flush=True)
    return found


# 4. Distill, and compare.
before = measure("before")
settings = DistillationConfig(
    "runs/qwen_7b_to_1_5b", method="logits", max_steps=25 if DEMO else 500, bf16=True, report_to=[],
    learning_rate=1e-3 if DEMO else 1e-5, warmup_steps=2, lr_scheduler_type="cosine",
    save_strategy="no",
)  # fmt: skip
data = {"train_dataset": train, "processing_class": tokenizer, **pair}
DistillationTrainer(model=student, teacher=teacher, args=settings, **data).train()
print(measure("after").compare(before).verdict("after", "before"))
