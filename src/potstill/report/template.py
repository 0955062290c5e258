"""Render a template to one self-contained page.

Style and script are inside the page. Its content security policy forbids other scripts and all
requests.
"""

import base64
import hashlib
from importlib.resources import files
from typing import Any

import jinja2
import markupsafe

from potstill.report.formatting import figure, printable
from potstill.report.token_view import KL_STEPS_NATS, as_json


def render(template: str, *, package: str = "potstill.report", **context: Any) -> str:
    """Render ``template`` of ``package``; it can use base.html.j2 and parts.html.j2 from here."""
    packages = [jinja2.PackageLoader(package), jinja2.PackageLoader("potstill.report")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(packages),
        autoescape=True,
        finalize=printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(kl_steps=KL_STEPS_NATS, figure=figure, as_json=as_json)
    script = files("potstill.report").joinpath("templates", "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        script=markupsafe.Markup(script), script_hash=f"sha256-{digest}", **context
    )
