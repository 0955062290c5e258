"""Logit distillation in a family whose vocabularies differ a little: Qwen2.5-7B (152 064 rows) → Qwen2.5-1.5B (151 936 rows).

    python examples/distiller_qwen_7b_to_1_5b.py            # the models of its name: one 80 GB GPU
    python examples/distiller_qwen_7b_to_1_5b.py --demo     # SmolLM2 with 128 padded rows → half its layers: CPU, about 3 minutes

Both tokenizers are the same 151 665 tokens. The rows beyond are padding: no text produces them, and the two sizes pad differently.
Libraries that compare sizes refuse this pair, or fill up with logit 0, which is weight e⁰ and not probability 0. potstill compares
tokens, cuts both heads to the rows they share, and lets the softmax renormalise. Expect the KL from teacher to student to fall.
"""

import sys

from potstill import DistillationConfig, DistillationTrainer, alignment, answer_prompts, keep_layers, load_model

DEMO = "--demo" in sys.argv
TOPICS = ("rain", "bread", "a river", "the moon", "music", "a school", "winter", "a friend", "the sea", "a garden")
PROMPTS = [f"{ask} {topic}." for topic in TOPICS for ask in ("Tell me about", "Write a line about", "Why do people like")]
HELD_OUT = ["Tell me about snow.", "Why do people like dogs?"]

# 1. Open both. The demo makes the same relation: a teacher with more rows than its tokenizer has tokens.
teacher, teacher_tokenizer = load_model("demo" if DEMO else "Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16")
if DEMO:
    student, tokenizer = keep_layers(teacher, 15).float(), teacher_tokenizer
    teacher.resize_token_embeddings(len(teacher_tokenizer) + 128)
else:
    student, tokenizer = load_model("Qwen/Qwen2.5-1.5B-Instruct", dtype="float32")

# 2. What they share is found from tokens. An id that meant two things would be an error that names it.
sizes = [len(model.get_output_embeddings().weight) for model in (teacher, student)]
print(f"head rows {sizes[0]} and {sizes[1]}, shared {alignment.shared_rows(teacher_tokenizer, tokenizer)}")

# 3. The teacher answers.
sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48 if DEMO else 256}
train, held_out = (answer_prompts(teacher, teacher_tokenizer, asked, **sampling) for asked in (PROMPTS, HELD_OUT))


def measure():
    """KL in nats a token on the held-out answers, and what the student itself says."""
    answer = answer_prompts(student.eval(), tokenizer, HELD_OUT[:1], temperature=0, max_new_tokens=48)[0]
    return trainer.evaluate()["eval_loss"], answer["messages"][-1]["content"]


# 4. Distil, and compare.
settings = DistillationConfig(
    "runs/qwen_7b_to_1_5b", method="logits", max_steps=25 if DEMO else 500, learning_rate=1e-3 if DEMO else 1e-5,
    warmup_steps=2, lr_scheduler_type="cosine", bf16=True, report_to=[], save_strategy="no",
)  # fmt: skip
trainer = DistillationTrainer(student, teacher, settings, train, held_out, tokenizer, teacher_tokenizer=teacher_tokenizer)
before = measure()
trainer.train()
after = measure()
for name, (kl, answer) in {"before": before, "after": after}.items():
    print(f"\n{name}: KL {kl:.2f} nats a token\n{answer}")
