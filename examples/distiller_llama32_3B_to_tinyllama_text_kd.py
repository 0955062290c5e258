"""Text distillation, between any two models: Llama-3.2-3B-Instruct writes, TinyLlama-1.1B learns to write so.

    python examples/distiller_llama32_3B_to_tinyllama_text_kd.py         # the models of its name: one 48 GB GPU
    python examples/distiller_llama32_3B_to_tinyllama_text_kd.py --demo  # half its layers, other tokens: 2 CPU cores

The two models need share nothing, not even a tokenizer: what passes between them is text. In bf16, or with --precision fp16 or
fp32 (a CPU takes fp16 for fp32). The student learns by cross-entropy on the answers, right on average and noisy: it sees one
sampled token where the teacher knew a distribution. Expect its nats a token on held-out answers to fall, its words to come nearer.
"""

import sys

from potstill import DistillationConfig, DistillationTrainer, answer_prompts, change_tokenizer, keep_layers, load_model
from potstill.data import PLAIN_CHAT_TEMPLATE

DEMO = "--demo" in sys.argv
PRECISION = sys.argv[sys.argv.index("--precision") + 1] if "--precision" in sys.argv else "bf16"
TOPICS = {"rain": "la pluie", "bread": "le pain", "the moon": "la lune", "music": "la musique", "a school": "une école",
          "winter": "l'hiver", "a friend": "un ami", "the sea": "la mer", "a garden": "un jardin"}  # fmt: skip
ENGLISH = [f"{ask} {topic}." for topic in TOPICS for ask in ("Explain what to know about", "Write a note about")]
FRENCH = [f"Écris en français une phrase sur {topic}." for topic in TOPICS.values()]
HELD_OUT = ["Explain what to know about snow.", "Écris en français une phrase sur la neige."]

# 1. The teacher answers. Its text is all that the student will see of it.
teacher, teacher_tokenizer = load_model("demo" if DEMO else "meta-llama/Llama-3.2-3B-Instruct", dtype="bfloat16")
sampling = {"max_new_tokens": 48 if DEMO else 256}
train, held_out = (answer_prompts(teacher, teacher_tokenizer, asked, **sampling) for asked in (ENGLISH + FRENCH, HELD_OUT))

# 2. The demo's student has half the teacher's layers, and 16 000 tokens of its own.
if DEMO:
    words = [teacher_tokenizer.decode([token]) for token in range(len(teacher_tokenizer))]
    tokenizer = teacher_tokenizer.train_new_from_iterator(words, vocab_size=16000)
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    student = change_tokenizer(keep_layers(teacher, 15), teacher_tokenizer, tokenizer).float()
else:
    student, tokenizer = load_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", dtype="float32")


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
