"""Logit distillation in one family: Llama-3.2-3B → Llama-3.2-1B, KL(teacher ‖ student).

    python examples/distiller_llama32_3B_to_1B.py           # one 48 GB GPU, access to Llama
    python examples/distiller_llama32_3B_to_1B.py --demo    # half of SmolLM2-135M's layers, CPU

This is the simplest case. Both models read the same tokens. At every position of an answer the
teacher gives a probability to each next token, and the student learns to give the same ones.
What to expect: KL from teacher to student falls (with --demo from about 10 nats per token to
about 4), and the student's answer changes from noise to words of the teacher's.
"""

import sys

import potstill
from potstill import DistillationConfig, DistillationTrainer, answer_prompts, keep_layers

DEMO = "--demo" in sys.argv
TOPICS = ["rain", "bread", "a river", "the moon", "music", "a school", "winter", "the sea"]
ASK = "Explain what to know about", "Write a note about", "Why like"
PROMPTS = [f"{ask} {topic}." for topic in TOPICS for ask in ASK]
HELD_OUT = [f"{ask} {topic}." for topic in ("snow", "a dog", "tea", "a garden") for ask in ASK]

# 1. Open both models. The demo's student has every second layer of its teacher.
name = "demo" if DEMO else "meta-llama/Llama-3.2-3B-Instruct"
teacher, tokenizer = potstill.load_model(name, dtype="bfloat16")
if DEMO:
    student = keep_layers(teacher, 15).float()
else:
    student, _ = potstill.load_model("meta-llama/Llama-3.2-1B-Instruct", dtype="float32")

# 2. The teacher answers. At temperature 1 its text follows the distribution of its logits.
sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48 if DEMO else 256}
train = answer_prompts(teacher, tokenizer, PROMPTS, **sampling)
held_out = answer_prompts(teacher, tokenizer, HELD_OUT, **sampling)


def measure(when):
    """Print the KL on the held-out answers and the student's own answer; return all measures."""
    found = potstill.evaluate(
        student, teacher, held_out, tokenizer=tokenizer, teacher_tokenizer=tokenizer
    )
    row = answer_prompts(student, tokenizer, HELD_OUT[:1], temperature=0, max_new_tokens=48)[0]
    print(f"{when}: KL {found['kl_nats_per_token']:.2f} nats per token")
    print(f"  {row['messages'][-1]['content']}", flush=True)
    return found


# 3. Distill. The loss is one sum over the answers' tokens, divided once by their number.
before = measure("before")
settings = DistillationConfig(
    "runs/llama32_3B_to_1B", method="logits", divergence="forward_kl", bf16=True, warmup_steps=2,
    max_steps=25 if DEMO else 500, learning_rate=1e-3 if DEMO else 2e-5,
    lr_scheduler_type="cosine", report_to=[], save_strategy="no",
)  # fmt: skip
DistillationTrainer(
    model=student, teacher=teacher, args=settings, train_dataset=train, processing_class=tokenizer
).train()

# 4. Did it help? The difference is paired by conversation, with a 95 % interval.
print(measure("after").compare(before).verdict("after", "before"))
