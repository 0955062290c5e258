"""Draw docs/noise-against-bytes.svg from the figures that benchmarks/captures.py prints."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

# Bytes per token on disk, and noise E‖t − q‖². The rivals' bytes are those of the same packing:
# 15 bits an id and a byte a mass.
THRESHOLD = [
    (38, 0.0027, "0.02"),
    (33.2, 0.0037, "0.025"),
    (30, 0.0047, "0.03"),
    (23, 0.0096, "0.05"),
]
RIVALS = [(39.7, 0.0120, "RSKD, 50 draws"), (36.5, 0.0087, "top-12 renormalized (bias)")]


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "potstill"
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    size, noise, names = zip(*THRESHOLD, strict=True)
    axes.plot(size, noise, color="#d94801", marker="o", label="threshold sampling (by τ)")
    for x, y, name in zip(size, noise, names, strict=True):
        axes.annotate(name, (x, y), (5, 4), textcoords="offset points", fontsize=8)
    for (x, y, name), marker in zip(RIVALS, "sD", strict=True):
        axes.plot([x], [y], marker, color="#2171b5", label=name)
    axes.set(xlabel="bytes per token", ylabel="noise E‖t − q‖²", ylim=(0, 0.0135), xlim=(20, 44))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center")
    figure.tight_layout()
    target = Path(__file__).parent.parent / "noise-against-bytes.svg"
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
