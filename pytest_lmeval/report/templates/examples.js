// The questions of a task, a page of them at a time: who answered what, and where two differ.
"use strict";

{
  const PAGE = 50;
  const SIGNS = { 1: ["\u2713", "passed", "right"], 0: ["\u2717", "failed", "wrong"], "-": ["\u2013", "dim", "not judged"], ".": [" ", "dim", "not asked"] };
  const { element, select } = lmeval;
  const boards = lmeval.data.boards;
  const browser = document.getElementById("browser");
  const state = { board: 0, a: 0, b: 1, which: 0, text: "", page: 0 };
  const controls = element("div", { class: "controls" });
  const found = element("p", { class: "dim small", role: "status" });
  const list = element("div", { id: "questions" });
  const pages = element("div", { class: "controls" });

  const board = () => boards[state.board];
  const marksOf = (column) => board().columns[column]?.marks ?? "";
  const isFlip = (place) => {
    const pair = marksOf(state.a)[place] + marksOf(state.b)[place];
    return pair === "10" || pair === "01";
  };
  const kinds = () => {
    const name = (column) => board().columns[column]?.label;
    const always = [
      ["all", () => true],
      [`${name(state.a)} is wrong`, (place) => marksOf(state.a)[place] === "0"],
      [`${name(state.a)} is right`, (place) => marksOf(state.a)[place] === "1"],
    ];
    return board().columns.length < 2 ? always : [
      ...always,
      ["flips: one is right, the other wrong", isFlip],
      [`lost: only ${name(state.a)} is right`, (place) => isFlip(place) && marksOf(state.a)[place] === "1"],
      [`won: only ${name(state.b)} is right`, (place) => isFlip(place) && marksOf(state.b)[place] === "1"],
      ["both are wrong", (place) => marksOf(state.a)[place] === "0" && marksOf(state.b)[place] === "0"],
    ];
  };

  const answerOf = (row, column) => {
    const answer = row[6][column];
    return (typeof answer === "number" ? row[3][answer] : answer) ?? "";
  };
  const targetOf = (row) => (row[3].length ? row[4].map((place) => row[3][place]).join(" | ") : row[5]);
  const wordsOf = (row) => [row[1], row[2] ?? "", ...row[3], row[5], ...row[6].filter((answer) => typeof answer === "string")].join("\n").toLowerCase();

  const matching = () => {
    const [, fits] = kinds()[state.which] ?? kinds()[0];
    const words = state.text.toLowerCase();
    const places = [];
    board().rows.forEach((row, place) => {
      if (fits(place) && (!words || (row && wordsOf(row).includes(words)))) places.push(place);
    });
    return places;
  };

  const signs = (place) => element("span", { class: "marks" }, ...board().columns.map((column) => {
    const [sign, look, word] = SIGNS[column.marks[place]];
    return element("span", { class: look, title: `${column.label}: ${word}` }, sign, element("span", { class: "said" }, `${column.label}: ${word}. `));
  }));

  const choices = (row) => {
    const heads = ["choice", ...board().columns.map((column) => column.label)];
    const body = row[3].map((choice, place) => element("tr", {},
      element("td", { class: "text" + (row[4].includes(place) ? " passed" : "") }, (row[4].includes(place) ? "\u2713 " : "") + choice),
      ...board().columns.map((_, column) => element("td", { class: "number" }, row[6][column] === place ? element("strong", {}, `${row[7][column]?.[place] ?? ""}`) : `${row[7][column]?.[place] ?? ""}`))));
    return element("div", { class: "wide" }, element("table", {},
      element("caption", {}, "Log-likelihood of each choice in nats; the likeliest is bold, what is right is ticked."),
      element("thead", {}, element("tr", {}, ...heads.map((head, column) => element("th", { class: column ? "number" : null }, head)))),
      element("tbody", {}, ...body)));
  };

  const generated = (row) => element("div", { class: "wide" }, element("table", {}, element("tbody", {},
    element("tr", {}, element("td", { class: "dim" }, "expected"), element("td", { class: "text" }, row[5])),
    ...board().columns.map((column, place) => element("tr", {}, element("td", { class: "dim" }, column.label), element("td", { class: "text" }, answerOf(row, place)))))));

  const question = (place) => {
    const row = board().rows[place];
    const files = board().columns.map((column) => column.file).join(", ");
    const oneLine = row ? `${targetOf(row)} \u2190 ${board().columns.map((_, column) => answerOf(row, column) || "\u2205").join(" \u00b7 ")}` : `not in this page; see ${files}`;
    const details = element("details", { class: "question", ontoggle: () => {
      if (!details.open || details.children.length > 1) return;
      details.append(element("div", { class: "inside" },
        row ? (row[3].length ? choices(row) : generated(row)) : element("p", { class: "dim" }, `This question is not in this page; it stands in ${files}.`),
        row ? element("p", { class: "dim small" }, `id ${row[1]}${row[2] ? `, ${row[2]}` : ""}`) : null));
    } }, element("summary", {}, element("span", { class: "dim" }, `${row?.[0] ?? place}`), signs(place), element("span", { class: "texts" }, oneLine.replace(/\s+/g, " ").slice(0, 400))));
    return details;
  };

  const show = () => {
    const places = matching();
    const last = Math.max(0, Math.ceil(places.length / PAGE) - 1);
    state.page = Math.min(state.page, last);
    const from = state.page * PAGE;
    list.replaceChildren(...places.slice(from, from + PAGE).map(question));
    const flips = board().columns.length > 1 ? board().rows.reduce((count, _, place) => count + isFlip(place), 0) : null;
    found.textContent = `${places.length.toLocaleString("en")} of ${board().rows.length.toLocaleString("en")} questions` +
      (flips === null ? "" : `; ${flips.toLocaleString("en")} flips between ${board().columns[state.a].label} and ${board().columns[state.b].label}`);
    const turn = (name, by, off) => element("button", { type: "button", disabled: off, onclick: () => { state.page += by; show(); browser.scrollIntoView(); } }, name);
    pages.replaceChildren(...(last ? [turn("Previous", -1, state.page === 0), element("span", { class: "dim" }, `page ${state.page + 1} of ${last + 1}`), turn("Next", 1, state.page === last)] : []));
  };

  const change = (field) => (value) => { state[field] = value; state.page = 0; rebuild(); };
  const rebuild = () => {
    const names = board().columns.map((column) => column.label);
    const search = element("input", { type: "search", placeholder: "in answers and choices", value: state.text, oninput: () => { state.text = search.value; state.page = 0; show(); } });
    controls.replaceChildren(
      ...(boards.length > 1 ? [select("Task", boards.map((own) => own.subject), state.board, (value) => { Object.assign(state, { board: value, a: 0, b: 1, which: 0, page: 0 }); rebuild(); })] : [element("strong", {}, board().subject)]),
      ...(names.length > 1 ? [select("A", names, state.a, change("a")), select("B", names, state.b, change("b"))] : []),
      select("Show", kinds().map(([name]) => name), state.which, change("which")),
      element("label", { class: "grow" }, "Search", search),
    );
    show();
  };

  browser.append(controls, found, list, pages);
  rebuild();
}
