"""Build the page with Gradio: a prompt, an answer per model, and predictions at a clicked token."""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from potstill.errors import PotstillError
from potstill.play.answers import Candidate, next_tokens, stream_answers
from potstill.play.players import Player
from potstill.sampling.sampler import Sampling

HINT = "<p>Choose a token of an answer to see the most likely tokens of each model there.</p>"
MARKS = str.maketrans(" \n\t", "·⏎⇥")  # visible symbols for white space
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
    """Return the page for these models; `serve` starts it."""
    with gr.Blocks(title=f"{title} · potstill", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        prompt = gr.Textbox(label="Prompt", placeholder="Why does it rain?", lines=1, max_lines=8)
        with gr.Row():
            button, stop = (
                gr.Button("Ask", variant="primary", scale=0, min_width=140),
                gr.Button("Stop", scale=0, min_width=140),
            )
        temperature, max_tokens = _sampling_sliders()
        with gr.Row():
            answers = [
                _panel(answer_html(player, []), js_on_load=SELECT_TOKEN) for player in players
            ]
        place = gr.HTML(HINT)
        with gr.Row():
            bars = [_panel(bars_html(player, [])) for player in players]
        state = gr.State()  # the question, and the tokens of each answer

        def ask(question: str, temperature: float, max_tokens: float) -> Iterator[list[Any]]:
            sampling = Sampling(
                max_new_tokens=int(max_tokens), temperature=temperature, seed=random.getrandbits(32)
            )
            empty: list[Any] = [[] for _ in players]
            blank = [*map(answer_html, players, empty), HINT, *map(bars_html, players, empty)]
            yield [*blank, None]
            skipped = [gr.skip() for _ in (place, *bars)]  # a token may be chosen during streaming
            try:
                for tokens in stream_answers(players, question, sampling):
                    yield [*map(answer_html, players, tokens), *skipped, (question, tokens)]
            except PotstillError as error:
                raise gr.Error(str(error)) from error

        inputs, shown = [prompt, temperature, max_tokens], [*answers, place, *bars]
        events = [button.click, prompt.submit]
        asking = gr.on(events, ask, inputs, [*shown, state], show_progress="hidden")
        stop.click(None, cancels=[asking])
        for player, answer in zip(players, answers, strict=True):
            answer.select(_on_select(players, player), [state], shown, show_progress="hidden")
    return page


def _sampling_sliders() -> tuple[gr.Slider, gr.Slider]:
    with gr.Accordion("How answers are sampled", open=False), gr.Row():
        temperature = gr.Slider(
            0, 2, 0.7, step=0.05, label="Temperature", info="0: the most likely token."
        )
        max_tokens = gr.Slider(
            8, 512, 64, step=8, label="Maximum tokens", info="Longer answers are cut off."
        )
    return temperature, max_tokens


def _panel(content: str, **more: Any) -> gr.HTML:
    """Return a column of the page; in a narrow window the columns are stacked."""
    with gr.Column(min_width=300):
        return gr.HTML(content, container=True, padding=True, **more)


def _on_select(players: Sequence[Player], chosen: Player) -> Callable[..., list[str]]:
    """Return the handler for a click on a token of one model's answer."""

    def show(state: tuple[str, list[list[int]]], event: gr.EventData) -> list[str]:
        question, tokens = state
        answer, place = tokens[players.index(chosen)], int(event.place)
        texts = [
            answer_html(player, one, place if player is chosen else None)
            for player, one in zip(players, tokens, strict=True)
        ]
        found = [
            next_tokens(player, question, answered_by=chosen, answer=answer, place=place)
            for player in players
        ]
        token = html.escape(show_spaces(chosen.spell(answer[place])))
        text = f"At token {place + 1} of its answer, the {chosen.name} wrote <code>{token}</code>:"
        return [*texts, f"<p>{text}</p>", *map(bars_html, players, found)]

    return show


def answer_html(player: Player, tokens: Sequence[int], chosen: int | None = None) -> str:
    """Return an answer whose tokens are buttons for mouse and keyboard."""
    spans = (
        f'<span role="button" tabindex="0" data-place="{place}"'
        f' aria-pressed="{str(place == chosen).lower()}"'
        f"{' class=special' if player.is_special(token) else ''}>{html.escape(text)}</span>"
        for place, (token, text) in enumerate(zip(tokens, player.read(tokens), strict=True))
    )
    name, source = html.escape(player.name), html.escape(player.source)
    heading = f'<h2>{name} <small title="{source}">{source}</small></h2>'
    return f'{heading}<div class="answer" aria-label="{name}">{"".join(spans)}</div>'


def bars_html(player: Player, candidates: Sequence[Candidate]) -> str:
    """Return one bar per candidate; the written token is bold."""
    rows = (
        f"<li{' class=written' if one.written else ''}>"
        f"<code>{html.escape(show_spaces(one.text))}</code>"
        f'<i style="width: {one.probability:.1%}"></i><span>{percent(one.probability)}</span></li>'
        for one in candidates
    )
    return f'<h2>{html.escape(player.name)}, next token</h2><ol class="bars">{"".join(rows)}</ol>'


def percent(probability: float) -> str:
    """Format a probability: ``34.6 %``, or ``< 0.1 %`` where 0.0 would be misleading."""
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "< 0.1 %"


def show_spaces(text: str) -> str:
    """Return ``text`` with visible symbols for white space."""
    return text.translate(MARKS)
