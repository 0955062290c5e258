"""Logit distillation across tokenizers: Llama-3.2-3B-Instruct (128 000 tokens) → TinyLlama-1.1B (32 000 others).

    python examples/distiller_llama32_3B_to_tinyllama_logits.py          # the models of its name: one 48 GB GPU
    python examples/distiller_llama32_3B_to_tinyllama_logits.py --demo   # SmolLM2-135M → itself with other tokens: 2 CPU cores

Asked for in every forum, and mostly done as `last_token_padded`: the logits of the last token, ids as they are, what does not fit
filled up with zeros. Of the ids that both have, 8 mean the same bytes. `pieces` reads each of the teacher's tokens as the student
would spell it, wherever both read the same bytes (docs/across-tokenizers.md). Same student, same answers, same steps: expect the
first to leave it no better, or worse, and the second to bring it towards its teacher.
"""

import copy
import sys

from potstill import DistillationConfig, DistillationTrainer, answer_prompts, change_tokenizer, load_model
from potstill.data import PLAIN_CHAT_TEMPLATE, tokenize_conversations
from potstill.evaluation import score_tokens, summarize

DEMO = "--demo" in sys.argv
TOPICS = ("rain", "bread", "a river", "the moon", "music", "a school", "winter", "a friend", "the sea", "a garden")
PROMPTS = [f"{ask} {topic}." for topic in TOPICS for ask in ("Explain what to know about", "Write a note about", "Why like")]
HELD_OUT = [f"{ask} {topic}." for ask in ("Explain what to know about", "Write a note about") for topic in ("snow", "a dog", "tea")]

# 1. Open both. The teacher answers at temperature 1: then its text is distributed as its logits say.
teacher, teacher_tokenizer = load_model("demo" if DEMO else "meta-llama/Llama-3.2-3B-Instruct", dtype="bfloat16")
sampling = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48 if DEMO else 256}
train, held_out = (answer_prompts(teacher, teacher_tokenizer, asked, **sampling) for asked in (PROMPTS, HELD_OUT))

# 2. The demo's student is the teacher with 16 000 tokens of its own, pieced together from the teacher's words.
if DEMO:
    words = [teacher_tokenizer.decode([token]) for token in range(len(teacher_tokenizer))]
    tokenizer = teacher_tokenizer.train_new_from_iterator(words, vocab_size=16000)
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    student = change_tokenizer(teacher, teacher_tokenizer, tokenizer).float()
else:
    student, tokenizer = load_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0", dtype="float32")


def measure(model):
    """Bits per byte of the held-out answers, which can be compared whatever the tokens, and what the model itself says."""
    scores = score_tokens(model.eval(), tokenize_conversations(held_out, tokenizer)[0], pad_token_id=tokenizer.pad_token_id)
    answer = answer_prompts(model, tokenizer, HELD_OUT[:1], temperature=0, max_new_tokens=40)[0]
    return f"{summarize(scores)['bits_per_byte']:.3f} bits per byte\n  {answer['messages'][-1]['content']}"


# 3. The same student, twice.
print(f"before: {measure(student)}", flush=True)
for alignment in ("last_token_padded", "pieces"):
    settings = DistillationConfig(
        "runs/tinyllama_logits", method="cross", alignment=alignment, max_steps=25 if DEMO else 500, warmup_steps=2, bf16=True,
        learning_rate=1e-4 if DEMO else 2e-5, lr_scheduler_type="cosine", report_to=[], save_strategy="no",
    )  # fmt: skip
    learner = copy.deepcopy(student)
    DistillationTrainer(learner, teacher, settings, train, None, tokenizer, teacher_tokenizer=teacher_tokenizer).train()
    print(f"{alignment}: {measure(learner)}", flush=True)
