// Theme, sorting, filtering, and opening details for links and printing. All content is inserted as text.
"use strict";

const lmeval = { data: JSON.parse(document.getElementById("data").textContent) };

// An element with attributes and children; strings become text, never markup.
lmeval.element = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
};

lmeval.select = (label, names, chosen, changed) => {
  const select = lmeval.element("select", { onchange: () => changed(Number(select.value)) });
  names.forEach((name, index) => select.append(lmeval.element("option", { value: index, selected: index === chosen }, name)));
  return lmeval.element("label", {}, label, select);
};

{
  const button = document.getElementById("theme");
  const dark = () => document.documentElement.dataset.theme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const show = () => { button.textContent = dark() ? "Light" : "Dark"; };
  const stored = (value) => { // a browser may forbid a local file to store anything
    try { return value ? localStorage.setItem("lmeval-theme", value) : localStorage.getItem("lmeval-theme"); } catch { return null; }
  };
  if (button) {
    const last = stored();
    if (last === "dark" || last === "light") document.documentElement.dataset.theme = last;
    button.hidden = false;
    button.addEventListener("click", () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
      stored(document.documentElement.dataset.theme);
      show();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    show();
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const value = (row, index) => {
    const cell = row.cells[index];
    if (!cell) return null;
    if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
    return cell.textContent.trim() || null;
  };
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    const button = lmeval.element("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.better === "higher" ? "descending" : "ascending"; // best first
      const now = head.getAttribute("aria-sort");
      const direction = now === null ? first : now === "ascending" ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const order = rows.map((row) => [value(row, index), row]);
      order.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // empty cells last
        return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
      });
      body.append(...order.map(([, row]) => row));
    });
  });
}

{
  const field = document.getElementById("filter");
  const rows = [...document.querySelectorAll("#grids tbody tr")];
  field?.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !words.every((word) => row.dataset.words.toLowerCase().includes(word));
      shown += !row.hidden;
    }
    for (const section of document.querySelectorAll("#grids section")) {
      section.hidden = [...section.querySelectorAll("tbody tr")].every((row) => row.hidden);
    }
    document.getElementById("filtered").textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
}

{
  const open = () => {
    const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", open);
  open();
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details.record:not([open])")) { details.open = true; details.dataset.printed = ""; }
  });
  addEventListener("afterprint", () => {
    for (const details of document.querySelectorAll("details[data-printed]")) { details.open = false; delete details.dataset.printed; }
  });
}
