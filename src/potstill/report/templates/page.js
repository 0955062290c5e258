"use strict";
// The filter of the answers, and the most likely next tokens. The rest of the page needs no script.

for (const element of document.querySelectorAll(".filter, .scripted")) element.hidden = false;

for (const form of document.querySelectorAll(".filter")) {
  const section = form.parentElement;
  const answers = [...section.querySelectorAll(".answer")];
  const texts = answers.map(answer => answer.textContent.toLowerCase());
  const more = section.querySelector(".more-answers");
  const count = form.querySelector("output");
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", () => {
    const wanted = form.querySelector("input").value.trim().toLowerCase();
    const found = texts.map(text => text.includes(wanted));
    answers.forEach((answer, i) => { answer.hidden = !found[i]; });
    if (more) more.open = wanted !== "";
    count.textContent = wanted ? `${found.filter(Boolean).length} of ${answers.length}` : "";
  });
}

function element(name, text, className) {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function percent(share) {
  return `${share >= 0.00995 ? Math.round(100 * share) : (100 * share).toFixed(1)}\u2009%`;
}

function table(name, note, topTokens, written) {
  const made = document.createElement("table");
  made.append(element("caption", name));
  made.caption.append(element("span", note, "quiet"));
  const rows = made.createTBody();
  for (const [text, share] of topTokens) {
    const row = rows.insertRow();
    row.style.backgroundSize = `${100 * share}% 100%`;
    row.className = text === written ? "written" : "";
    row.append(element("td", text), element("td", percent(share)));
  }
  return made;
}

for (const view of document.querySelectorAll(".view")) {
  const data = view.querySelector("script[type='application/json']");
  if (!data) continue;
  const { names, predictions } = JSON.parse(data.textContent);
  const panel = view.querySelector(".next");
  const lists = [...view.querySelectorAll(".tokens")];
  const copies = lists.map(list => [...list.querySelectorAll("span")]);
  const nats = copies.map(tokens => tokens.map(token => token.title));
  let shown = 0;

  const show = place => {
    for (const tokens of copies) {
      tokens[shown].setAttribute("aria-selected", "false");
      tokens[shown].tabIndex = -1;
      tokens[place].setAttribute("aria-selected", "true");
      tokens[place].tabIndex = 0;
    }
    shown = place;
    const written = copies[0][place].textContent;
    const heading = element("p", `Token ${place + 1} of ${predictions.length}: `);
    heading.append(element("b", written));
    const first = names.length - copies.length; // 1 if the teacher is among them
    const tables = document.createElement("div");
    names.forEach((name, i) => tables.append(table(name, i < first ? "" : nats[i - first][place], predictions[place][i], written)));
    panel.replaceChildren(heading, tables);
  };

  lists.forEach((list, copy) => {
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-orientation", "horizontal");
    copies[copy].forEach((token, place) => {
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", "false");
      token.removeAttribute("title"); // the panel shows it
      token.tabIndex = -1;
      token.addEventListener("pointerenter", () => show(place));
      token.addEventListener("focus", () => show(place));
    });
    list.addEventListener("keydown", event => {
      const last = predictions.length - 1;
      const step = { ArrowRight: shown + 1, ArrowDown: shown + 1, ArrowLeft: shown - 1, ArrowUp: shown - 1, Home: 0, End: last };
      if (!(event.key in step)) return;
      event.preventDefault();
      copies[copy][Math.min(last, Math.max(0, step[event.key]))].focus();
    });
  });
  panel.hidden = false;
  const level = token => Number(token.className.slice(1)) || 0;
  show(copies.at(-1).reduce((worst, token, i, all) => level(token) > level(all[worst]) ? i : worst, 0));
}
