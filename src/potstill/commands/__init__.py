"""The commands: one file each, with its recipe (a field's docstring is its help) and ``run``.

These files import what they run with inside ``run``: --help is quick.
"""

COMMANDS = {
    "demo": (),
    "doctor": ("teacher", "student"),
    "data": ("data", "model"),
    "student": ("teacher",),
    "generate": ("teacher",),
    "capture": ("teacher",),
    "serve": ("teacher",),
    "distill": ("teacher", "student"),
    "compare": ("teacher", "student"),
    "evaluate": ("student",),
    "report": ("run_dir",),
    "play": ("run_dir",),
}
"""Each command and its positional arguments."""

SUMMARIES = {
    "demo": "Run everything on two CPU cores: teacher, student, distillation, evaluation, report.",
    "doctor": "Check whether and how a teacher can teach a student, and what it will cost.",
    "data": "Show rows of a data set as a model will learn them: what is masked, what is learned.",
    "student": "Make a student from a teacher: of any size, or with another tokenizer.",
    "generate": "Let a teacher answer prompts, and make a filtered data set of its answers.",
    "capture": "Store a teacher's hidden states on conversations, to train without the teacher.",
    "serve": "Serve a teacher's hidden states, for `potstill distill http://HOST:PORT STUDENT`.",
    "distill": "Train a student, evaluate it before and after, and write a report.",
    "compare": "Train several methods on the same data and budget; report which is best.",
    "evaluate": "Measure a student against its teacher on held-out conversations.",
    "report": "Write the report of a run again.",
    "play": "Chat with teacher, student before and after in a browser (needs potstill[play]).",
}
"""The first line of each recipe, so that `potstill --help` imports no command."""
