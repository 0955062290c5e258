"""Logit distillation within a family: Llama-3.2-3B → Llama-3.2-1B, one tokenizer, KL(teacher ‖ student).

    python examples/distiller_llama32_3B_to_1B.py           # the models of its name: one 48 GB GPU and access to Llama
    python examples/distiller_llama32_3B_to_1B.py --demo    # SmolLM2-135M → half its layers: two CPU cores, about 3 minutes

The cleanest case. Both models read the same tokens, so at every position the teacher says how likely each next token is, and the
student is moved until it says the same. What to expect: the KL from teacher to student falls (with --demo from about 10 nats
a token to about 4), and the student's answer moves from noise towards the teacher's words.
"""

import sys

from potstill import DistillationConfig, DistillationTrainer, answer_prompts, keep_layers, load_model

DEMO = "--demo" in sys.argv
TOPICS = ("rain", "bread", "a river", "the moon", "music", "a school", "winter", "a friend", "the sea", "a garden")
PROMPTS = [f"{ask} {topic}." for topic in TOPICS for ask in ("Explain what to know about", "Write a note about", "Why like")]
HELD_OUT = ["Explain what to know about snow.", "Write a note about a dog."]

# 1. Open both. The demo's student is the teacher's own first, last and every second layer between.
teacher, tokenizer = load_model("demo" if DEMO else "meta-llama/Llama-3.2-3B-Instruct", dtype="bfloat16")
if DEMO:
    student = keep_layers(teacher, 15).float()
else:
    student, _ = load_model("meta-llama/Llama-3.2-1B-Instruct", dtype="float32")

# 2. The teacher answers: at temperature 1 its text is distributed as its logits say.
sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48 if DEMO else 256}
train = answer_prompts(teacher, tokenizer, PROMPTS, **sampling)
held_out = answer_prompts(teacher, tokenizer, HELD_OUT, **sampling)


def measure():
    """KL in nats a token on the held-out answers, and what the student itself says."""
    answer = answer_prompts(student.eval(), tokenizer, HELD_OUT[:1], temperature=0, max_new_tokens=48)[0]
    return trainer.evaluate()["eval_loss"], answer["messages"][-1]["content"]


# 3. Distil. The loss is one sum over the answers' tokens, divided once.
settings = DistillationConfig(
    "runs/llama32_3B_to_1B", method="logits", divergence="forward_kl", max_steps=25 if DEMO else 500, bf16=True,
    learning_rate=1e-3 if DEMO else 2e-5, warmup_steps=2, lr_scheduler_type="cosine", report_to=[], save_strategy="no",
)  # fmt: skip
trainer = DistillationTrainer(student, teacher, settings, train, held_out, tokenizer)
before = measure()
trainer.train()
after = measure()

# 4. Compare.
for name, (kl, answer) in {"before": before, "after": after}.items():
    print(f"\n{name}: KL {kl:.2f} nats a token\n{answer}")
