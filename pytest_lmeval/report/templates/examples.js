// The example browser: the questions of a task in pages of 50, with the answer of each model.
"use strict";

{
  const PAGE = 50;
  const SIGNS = {
    1: ["\u2713", "passed", "right"], 0: ["\u2717", "failed", "wrong"], "~": ["~", "unclear", "partly right"],
    "-": ["\u2013", "dim", "not judged"], ".": [" ", "dim", "not asked"],
  };
  const OUTCOMES = { c: "cut off", e: "empty", r: "refused" };
  const { element, select } = lmeval;
  const FIELDS = ["number", "id", "group", "choices", "right", "target", "prompts", "answers", "loglikelihoods", "scores", "marked", "thoughts"];
  const tables = lmeval.data.examples.map((table) => ({
    ...table,
    rows: table.rows.map((row) => row && Object.fromEntries(FIELDS.map((name, index) => [name, row[index]]))),
  }));
  const browser = document.getElementById("browser");
  const state = { table: 0, a: 0, b: 1, which: 0, text: "", page: 0 };
  const controls = element("div", { class: "controls" });
  const status = element("p", { class: "dim small", role: "status" });
  const list = element("div", { id: "questions" });
  const pages = element("div", { class: "controls" });

  const table = () => tables[state.table];
  const columns = () => table().columns;
  const markOf = (column, index) => columns()[column]?.marks[index] ?? "";
  const outcomeOf = (column, index) => OUTCOMES[columns()[column]?.outcomes[index]] ?? "";
  const isFlip = (index) => ["10", "01"].includes(markOf(state.a, index) + markOf(state.b, index));
  const filters = () => {
    const name = (column) => columns()[column]?.label;
    const became = Object.values(OUTCOMES).filter((word) => table().rows.some((_, index) => outcomeOf(state.a, index) === word));
    const partly = columns().some((column) => column.marks.includes("~"));
    const single = [
      ["all", () => true],
      [`${name(state.a)} is wrong`, (index) => markOf(state.a, index) === "0"],
      [`${name(state.a)} is right`, (index) => markOf(state.a, index) === "1"],
      ...(partly ? [[`${name(state.a)} is partly right`, (index) => markOf(state.a, index) === "~"]] : []),
      ...became.map((word) => [`${name(state.a)} is ${word}`, (index) => outcomeOf(state.a, index) === word]),
    ];
    return columns().length < 2 ? single : [
      ...single,
      ["flips: one is right, the other wrong", isFlip],
      [`lost: only ${name(state.a)} is right`, (index) => isFlip(index) && markOf(state.a, index) === "1"],
      [`won: only ${name(state.b)} is right`, (index) => isFlip(index) && markOf(state.b, index) === "1"],
      ["both are wrong", (index) => markOf(state.a, index) === "0" && markOf(state.b, index) === "0"],
    ];
  };

  const outputOf = (row, column) => {
    const answer = row.answers[column];
    return (typeof answer === "number" ? row.choices[answer] : answer) ?? "";
  };
  const targetOf = (row) => (row.choices.length ? row.right.map((index) => row.choices[index]).join(" | ") : row.target);
  const searchable = (row) => [row.id, row.group, ...row.choices, row.target, ...row.prompts, ...row.answers, ...row.thoughts]
    .filter((text) => typeof text === "string").join("\n").toLowerCase();

  const matching = () => {
    const [, matches] = filters()[state.which] ?? filters()[0];
    const words = state.text.toLowerCase();
    const indices = [];
    table().rows.forEach((row, index) => {
      if (matches(index) && (!words || (row && searchable(row).includes(words)))) indices.push(index);
    });
    return indices;
  };

  const signs = (index) => element("span", { class: "marks" }, ...columns().map((column, number) => {
    const [sign, look, word] = SIGNS[column.marks[index]];
    const score = column.marks[index] === "~" ? table().rows[index]?.marked[number] ?? null : null;
    const label = [`${column.label}: ${word}`, score ?? "", outcomeOf(number, index)].filter((part) => part !== "").join(", ");
    return element("span", { class: look, title: label }, score === null ? sign : score.toFixed(2), element("span", { class: "visually-hidden" }, `${label}. `));
  }));

  const text = (value) => element("td", { class: "text" }, value);
  const cell = (value) => element("td", { class: "number" }, `${value ?? ""}`);
  const labelled = (name, ...cells) => element("tr", {}, element("td", { class: "dim" }, name), ...cells);
  const tableOf = (caption, heads, body) => element("div", { class: "wide" }, element("table", {},
    caption && element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...heads.map(([head, look]) => element("th", { class: look }, head)))),
    element("tbody", {}, ...body)));
  const asNumbers = (names) => names.map((name) => [name, "number"]);

  // Choices: a row for each choice, then one for each metric.
  const chosen = (row) => tableOf("Log-likelihood of each choice in nats; the chosen one is bold, right ones are ticked.",
    [["choice", null], ...asNumbers(columns().map((column) => column.label))], [
      ...row.choices.map((choice, index) => element("tr", {},
        element("td", { class: "text" + (row.right.includes(index) ? " passed" : "") }, (row.right.includes(index) ? "\u2713 " : "") + choice),
        ...columns().map((_, column) => {
          const value = `${row.loglikelihoods[column]?.[index] ?? ""}`;
          return element("td", { class: "number" }, row.answers[column] === index ? element("strong", {}, value) : value);
        }))),
      ...table().metrics.map((name, index) => labelled(name, ...columns().map((_, column) => cell(row.scores[column]?.[index])))),
    ]);

  // Generated answers: the target, then a row for each model.
  const judged = (column, index) => {
    const [, look, word] = SIGNS[markOf(column, index)];
    return element("td", { class: look }, [word, outcomeOf(column, index)].filter(Boolean).join(", "));
  };
  const generated = (row, number) => tableOf(null, [["", null], ["output", null], ["outcome", null], ...asNumbers(table().metrics)], [
    labelled("target", text(row.target), cell(""), ...table().metrics.map(() => cell(""))),
    ...columns().map((column, index) => labelled(column.label, text(outputOf(row, index)), judged(index, number),
      ...table().metrics.map((_, number) => cell(row.scores[index]?.[number])))),
  ]);

  const prompts = (row) => {
    const own = row.prompts.map((prompt, index) => [prompt, columns()[index].label]).filter(([prompt]) => prompt !== null);
    return own.map(([prompt, label]) => element("details", {},
      element("summary", { class: "small dim" }, own.length > 1 ? `Prompt of ${label}` : "Prompt"), element("pre", {}, prompt)));
  };

  const thoughts = (row) => row.thoughts.map((thought, index) => thought && element("details", {},
    element("summary", { class: "small dim" }, columns().length > 1 ? `Thought of ${columns()[index].label}` : "Thought"), element("pre", {}, thought)))
    .filter(Boolean);

  const question = (index) => {
    const row = table().rows[index];
    const files = columns().map((column) => column.file).join(", ");
    const oneLine = row ? `${targetOf(row)} \u2190 ${columns().map((_, column) => [outputOf(row, column) || "\u2205", outcomeOf(column, index) && `(${outcomeOf(column, index)})`].filter(Boolean).join(" ")).join(" \u00b7 ")}` : `not in this page; see ${files}`;
    const details = element("details", { class: "question", ontoggle: () => {
      if (!details.open || details.children.length > 1) return;
      details.append(element("div", { class: "inside" }, ...(row
        ? [row.choices.length ? chosen(row) : generated(row, index), ...thoughts(row), ...prompts(row), element("p", { class: "dim small" }, `id ${row.id}${row.group ? `, ${row.group}` : ""}`)]
        : [element("p", { class: "dim" }, `Its texts are not in this page, but in ${files}.`)])));
    } }, element("summary", {}, element("span", { class: "dim" }, `${row?.number ?? index}`), signs(index), element("span", { class: "texts" }, oneLine.replace(/\s+/g, " ").slice(0, 400))));
    return details;
  };

  const show = () => {
    const indices = matching();
    const last = Math.max(0, Math.ceil(indices.length / PAGE) - 1);
    state.page = Math.min(state.page, last);
    const from = state.page * PAGE;
    list.replaceChildren(...indices.slice(from, from + PAGE).map(question));
    const flips = columns().length > 1 ? table().rows.reduce((count, _, index) => count + isFlip(index), 0) : null;
    status.textContent = `${indices.length.toLocaleString("en")} of ${table().rows.length.toLocaleString("en")} ${table().example}s` +
      (flips === null ? "" : `; ${flips.toLocaleString("en")} flips between ${columns()[state.a].label} and ${columns()[state.b].label}`);
    const turn = (name, by, off) => element("button", { type: "button", disabled: off, onclick: () => { state.page += by; show(); browser.scrollIntoView(); } }, name);
    pages.replaceChildren(...(last ? [turn("Previous", -1, state.page === 0), element("span", { class: "dim" }, `page ${state.page + 1} of ${last + 1}`), turn("Next", 1, state.page === last)] : []));
  };

  const change = (field) => (value) => { state[field] = value; state.page = 0; rebuild(); };
  const rebuild = () => {
    const names = columns().map((column) => column.label);
    const search = element("input", { type: "search", placeholder: "in prompts, answers, choices", value: state.text, oninput: () => { state.text = search.value; state.page = 0; show(); } });
    controls.replaceChildren(
      ...(tables.length > 1 ? [select("Task", tables.map((own) => own.subject), state.table, (value) => { Object.assign(state, { table: value, a: 0, b: 1, which: 0, page: 0 }); rebuild(); })] : [element("strong", {}, table().subject)]),
      ...(names.length > 1 ? [select("A", names, state.a, change("a")), select("B", names, state.b, change("b"))] : []),
      select("Show", filters().map(([name]) => name), state.which, change("which")),
      element("label", { class: "grow" }, "Search", search),
    );
    show();
  };

  browser.append(controls, status, list, pages);
  rebuild();
}
