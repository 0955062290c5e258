"""Text distillation between any two models: Llama-3.2-3B-Instruct writes, TinyLlama-1.1B learns.

    python examples/distiller_llama32_3B_to_tinyllama_text_kd.py         # one 48 GB GPU
    python examples/distiller_llama32_3B_to_tinyllama_text_kd.py --demo  # small models, on a CPU

The models share only text, not even a tokenizer. The student learns by cross-entropy on the
teacher's answers. This is right on average but noisy: the student sees one sampled token where the
teacher had a distribution. --precision is bf16, fp16 or fp32 (a CPU computes fp16 as fp32).
Expect cross-entropy on held-out answers to fall, and the student's words to come nearer.
"""

import sys

import potstill
from potstill import DistillationConfig, DistillationTrainer, answer_prompts
from potstill.data import PLAIN_CHAT_TEMPLATE

DEMO = "--demo" in sys.argv
PRECISION = sys.argv[sys.argv.index("--precision") + 1] if "--precision" in sys.argv else "bf16"
TOPICS = {"rain": "la pluie", "bread": "le pain", "the moon": "la lune", "music": "la musique",
          "a school": "une école", "winter": "l'hiver", "a friend": "un ami"}  # fmt: skip
ASK = "Explain what to know about", "Write a note about", "Why like"
TRAIN = [f"{ask} {topic}." for topic in TOPICS for ask in ASK]
TRAIN += [f"Écris en français une phrase sur {topic}." for topic in TOPICS.values()]
HELD_OUT = [f"{ask} {topic}." for topic in ("snow", "a dog", "tea", "a garden") for ask in ASK]
HELD_OUT += ["Écris en français une phrase sur la neige."]

# 1. The teacher answers. The student sees nothing else of it.
name = "demo" if DEMO else "meta-llama/Llama-3.2-3B-Instruct"
teacher, teacher_tokenizer = potstill.load_model(name, dtype="bfloat16")
train, held_out = (
    answer_prompts(teacher, teacher_tokenizer, prompts, max_new_tokens=48 if DEMO else 256)
    for prompts in (TRAIN, HELD_OUT)
)

# 2. The demo's student has half the teacher's layers and a new tokenizer of 16 000 tokens.
if DEMO:
    words = [teacher_tokenizer.decode([token]) for token in range(len(teacher_tokenizer))]
    tokenizer = teacher_tokenizer.train_new_from_iterator(words, vocab_size=16000)
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    student = potstill.keep_layers(teacher, 15)
    student = potstill.change_tokenizer(student, teacher_tokenizer, tokenizer).float()
else:
    student, tokenizer = potstill.load_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", dtype="float32")


def measure(when):
    """Print the cross-entropy on held-out answers and two of the student's own answers."""
    pair = {"tokenizer": tokenizer, "teacher_tokenizer": teacher_tokenizer}
    found = potstill.evaluate(student, teacher, held_out, **pair)
    rows = answer_prompts(student, tokenizer, HELD_OUT, temperature=0, max_new_tokens=40)
    print(f"{when}: cross-entropy {found['nll_nats_per_token']:.2f} nats per token")
    for i in (0, -1):
        print(f"  {HELD_OUT[i]} {rows[i]['messages'][-1]['content']}", flush=True)
    return found


# 3. Distill: cross-entropy on the answers' tokens. A loss that is not finite stops the training.
before = measure("before")
settings = DistillationConfig(
    "runs/tinyllama_text", method="text", max_steps=30 if DEMO else 500, report_to=[],
    learning_rate=1e-3 if DEMO else 2e-5, bf16=PRECISION == "bf16", fp16=PRECISION == "fp16",
    warmup_steps=2, lr_scheduler_type="cosine", save_strategy="no",
)  # fmt: skip
data = {"train_dataset": train, "processing_class": tokenizer}
DistillationTrainer(model=student, args=settings, **data).train()
print(measure("after").compare(before).verdict("after", "before"))
