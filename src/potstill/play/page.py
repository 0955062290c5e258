"""The page, drawn by Gradio: a prompt, an answer of each player side by side, and what came next at a place that is clicked."""

from __future__ import annotations

import html
import random
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from potstill.errors import PotstillError
from potstill.play.answers import Candidate, next_tokens, stream_answers
from potstill.play.players import Player
from potstill.sampling.sampler import Sampling

HINT = "<p>Choose a token of an answer to see what each model held likeliest there.</p>"
MARKS = {ord(" "): "·", ord("\n"): "⏎", ord("\t"): "⇥"}  # blanks of a token, shown
SELECT_TOKEN = """
const select = event => {
    const token = event.target.closest('[data-place]');
    if (!token || (event.key && event.key !== 'Enter')) return;
    trigger('select', {place: Number(token.dataset.place)});
};
element.addEventListener('click', select);
element.addEventListener('keydown', select);
"""


def make_page(players: Sequence[Player], title: str) -> gr.Blocks:
    """The page for these players, not yet served."""
    with gr.Blocks(title=f"{title} · potstill", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        prompt = gr.Textbox(label="Prompt", placeholder="Why does it rain?", lines=1, max_lines=8)
        with gr.Row():
            button, stop = (
                gr.Button("Ask", variant="primary", scale=0, min_width=140),
                gr.Button("Stop", scale=0, min_width=140),
            )
        temperature, most = _sampling_sliders()
        with gr.Row():
            answers = [
                _panel(answer_html(player, []), js_on_load=SELECT_TOKEN) for player in players
            ]
        place = gr.HTML(HINT)
        with gr.Row():
            bars = [_panel(bars_html(player, [])) for player in players]
        said = gr.State()

        def ask(question: str, heat: float, tokens_at_most: float) -> Iterator[list[Any]]:
            sampling = Sampling(
                max_new_tokens=int(tokens_at_most), temperature=heat, seed=random.getrandbits(32)
            )
            nothing: list[Any] = [[] for _ in players]
            yield [
                *map(answer_html, players, nothing),
                HINT,
                *map(bars_html, players, nothing),
                None,
            ]
            kept = [gr.skip() for _ in (place, *bars)]  # a token may be chosen before all is said
            try:
                for tokens in stream_answers(players, question, sampling):
                    yield [*map(answer_html, players, tokens), *kept, (question, tokens)]
            except PotstillError as error:
                raise gr.Error(str(error)) from error

        asked = [button.click, prompt.submit]
        asking = gr.on(
            asked,
            ask,
            [prompt, temperature, most],
            [*answers, place, *bars, said],
            show_progress="hidden",
        )
        stop.click(None, cancels=[asking])
        for player, answer in zip(players, answers, strict=True):
            answer.select(
                _at_place(players, player), [said], [*answers, place, *bars], show_progress="hidden"
            )
    return page


def _sampling_sliders() -> tuple[gr.Slider, gr.Slider]:
    with gr.Accordion("How answers are sampled", open=False), gr.Row():
        temperature = gr.Slider(
            0, 2, 0.7, step=0.05, label="Temperature", info="0 takes the likeliest token."
        )
        most = gr.Slider(
            8, 512, 64, step=8, label="Tokens at most", info="Where an answer is cut off."
        )
    return temperature, most


def _panel(content: str, **more: Any) -> gr.HTML:
    """A column that goes below its neighbours where the window is narrow."""
    with gr.Column(min_width=300):
        return gr.HTML(content, container=True, padding=True, **more)


def _at_place(players: Sequence[Player], chosen: Player) -> Any:
    """What happens when a token of one player's answer is clicked."""

    def show(said: tuple[str, list[list[int]]], event: gr.EventData) -> list[str]:
        question, tokens = said
        answer, place = tokens[players.index(chosen)], int(event.place)
        texts = [
            answer_html(player, one, place if player is chosen else None)
            for player, one in zip(players, tokens, strict=True)
        ]
        found = [
            next_tokens(player, question, answered_by=chosen, answer=answer, place=place)
            for player in players
        ]
        token = html.escape(marked(chosen.spell(answer[place])))
        written = f"<p>Where the {chosen.name} wrote <code>{token}</code>, token {place + 1} of its answer:</p>"
        return [*texts, written, *map(bars_html, players, found)]

    return show


def answer_html(player: Player, tokens: Sequence[int], chosen: int | None = None) -> str:
    """An answer whose tokens can be clicked, or reached by the keyboard."""
    spans = (
        f'<span role="button" tabindex="0" data-place="{place}" aria-pressed="{str(place == chosen).lower()}"'
        f"{' class=special' if player.is_special(token) else ''}>{html.escape(text)}</span>"
        for place, (token, text) in enumerate(zip(tokens, player.read(tokens), strict=True))
    )
    name, source = html.escape(player.name), html.escape(player.source)
    return f'<h2>{name} <small title="{source}">{source}</small></h2><div class="answer" aria-label="{name}">{"".join(spans)}</div>'


def bars_html(player: Player, candidates: Sequence[Candidate]) -> str:
    """One bar a candidate; the token that was written stands out."""
    rows = (
        f"<li{' class=written' if one.written else ''}><code>{html.escape(marked(one.text))}</code>"
        f'<i style="width: {one.probability:.1%}"></i><span>{percent(one.probability)}</span></li>'
        for one in candidates
    )
    return f'<h2>{html.escape(player.name)}, next token</h2><ol class="bars">{"".join(rows)}</ol>'


def percent(probability: float) -> str:
    """``34.6 %``; what would round to nothing says that it is little, not that it is nothing."""
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "< 0.1 %"


def marked(text: str) -> str:
    """The token with its blanks to be seen."""
    return text.translate(MARKS)
