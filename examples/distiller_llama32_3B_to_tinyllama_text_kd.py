"""Text distillation, between any two models: Llama-3.2-3B-Instruct writes, TinyLlama-1.1B learns to write so.

    python examples/distiller_llama32_3B_to_tinyllama_text_kd.py         # the models of its name: one 24 GB GPU
    python examples/distiller_llama32_3B_to_tinyllama_text_kd.py --demo  # SmolLM2-135M → half its layers: 2 CPU cores, 3 minutes
    python examples/distiller_llama32_3B_to_tinyllama_text_kd.py --demo --precision fp16  # or fp32, or bf16

The two models need share nothing, not even a tokenizer: what passes between them is text. The student learns by cross-entropy on
the teacher's answers, which is right on average and noisy, since it sees one sampled token where the teacher knew a distribution.
Expect its nats a token on held-out answers to fall, and what it says, in English and in French, to move towards the teacher's.
"""

import sys

from potstill import DistillationConfig, DistillationTrainer, answer_prompts, keep_layers, load_model

DEMO = "--demo" in sys.argv
PRECISION = sys.argv[sys.argv.index("--precision") + 1] if "--precision" in sys.argv else "bf16"
TOPICS = {"rain": "la pluie", "bread": "le pain", "the moon": "la lune", "music": "la musique", "a school": "une école",
          "winter": "l'hiver", "a friend": "un ami", "the sea": "la mer", "a garden": "un jardin"}  # fmt: skip
ENGLISH = [f"{ask} {topic}." for topic in TOPICS for ask in ("Explain what to know about", "Write a note about")]
FRENCH = [f"Écris en français une phrase sur {topic}." for topic in TOPICS.values()]
HELD_OUT = ["Explain what to know about snow.", "Écris en français une phrase sur la neige."]

# 1. Open both. The demo's student is cut from the teacher: first and last layers, and every second between.
teacher, teacher_tokenizer = load_model("demo" if DEMO else "meta-llama/Llama-3.2-3B-Instruct", dtype="bfloat16")
if DEMO:
    student, tokenizer = keep_layers(teacher, 15).float(), teacher_tokenizer
else:
    student, tokenizer = load_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", dtype="float32")

# 2. The teacher answers. Its text is all that the student will see of it.
sampling = {"max_new_tokens": 48 if DEMO else 256}
train, held_out = (answer_prompts(teacher, teacher_tokenizer, asked, **sampling) for asked in (ENGLISH + FRENCH, HELD_OUT))


def measure():
    """Nats a token on the held-out answers, and what the student itself says."""
    answers = answer_prompts(student.eval(), tokenizer, HELD_OUT, temperature=0, max_new_tokens=40)
    return trainer.evaluate()["eval_loss"], [row["messages"][-1]["content"] for row in answers]


# 3. Distil: cross-entropy on the answers' tokens, summed, divided once. A loss that is not finite would end the training.
settings = DistillationConfig(
    "runs/tinyllama_text", method="text", report_to=[], max_steps=30 if DEMO else 500, learning_rate=1e-3 if DEMO else 2e-5,
    bf16=PRECISION == "bf16", fp16=PRECISION == "fp16", warmup_steps=2, lr_scheduler_type="cosine", save_strategy="no",
)  # fmt: skip
trainer = DistillationTrainer(student, None, settings, train, held_out, tokenizer)
before = measure()
trainer.train()
after = measure()

# 4. Compare.
for name, (nats, _) in {"before": before, "after": after}.items():
    print(f"{name}: cross-entropy {nats:.2f} nats a token")
for i, prompt in enumerate(HELD_OUT):
    print(f"\n{prompt}\n  before:  {before[1][i]}\n  after:   {after[1][i]}\n  teacher: {held_out[i]['messages'][-1]['content']}")
