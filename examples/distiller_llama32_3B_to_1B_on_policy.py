"""On-policy distillation: Llama-3.2-1B writes, Llama-3.2-3B corrects it at every token.

    python examples/distiller_llama32_3B_to_1B_on_policy.py           # one 48 GB GPU
    python examples/distiller_llama32_3B_to_1B_on_policy.py --demo    # SmolLM2-135M, CPU

Trained on the teacher's text alone, a student never sees what follows its own mistakes. Here it
learns from the teacher's text for 60 % of the run. Then half of its batches are answers that it
wrote itself, with the teacher's distribution at every token as the target.
What to expect: the divergence on its own answers, KL(student ‖ teacher), falls together with the
divergence on the teacher's answers.
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

# 2. The teacher answers the prompts: the text of the off-policy batches, and of the measurement.
sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48 if DEMO else 256}
train = answer_prompts(teacher, tokenizer, PROMPTS, **sampling)
held_out = answer_prompts(teacher, tokenizer, HELD_OUT, **sampling)


def measure(when):
    """Print both divergences: on the teacher's answers, and on the student's own."""
    found = potstill.evaluate(
        student, teacher, held_out, tokenizer=tokenizer, teacher_tokenizer=tokenizer
    )
    print(f"{when}: KL {found['kl_nats_per_token']:.2f} nats per token on the teacher's answers,")
    print(f"  {found['own_kl_nats_per_token']:.2f} from student to teacher on its own", flush=True)
    return found


# 3. Distill. A round: the student answers 16 prompts, the teacher reads the answers once, and the
# student trains on them twice, under its current weights.
before = measure("before")
settings = DistillationConfig(
    "runs/llama32_3B_to_1B_on_policy", method="logits", bf16=True, warmup_steps=2,
    on_policy=0.5, on_policy_from=0.6, on_policy_divergence="reverse_kl",
    rollout_size=16, rollout_reuse=2, rollout_tokens=32 if DEMO else 128,
    max_steps=30 if DEMO else 500, learning_rate=1e-3 if DEMO else 2e-5,
    lr_scheduler_type="cosine", report_to=[], save_strategy="no",
)  # fmt: skip
DistillationTrainer(
    model=student, teacher=teacher, args=settings, train_dataset=train, processing_class=tokenizer
).train()

# 4. Did it help? The differences are paired by conversation, with a 95 % interval.
compared = measure("after").compare(before)
print(compared.verdict("after", "before"))
print(f"on its own answers: {compared['own_kl_nats_per_token']}")
