// The plots. Each is drawn when it comes into view and redrawn when its width changes; all are drawn before printing.
"use strict";

{
  // Each model has one colour and dash pattern in all plots.
  const order = new Map();
  for (const figure of lmeval.data.figures) for (const choice of figure.choices) for (const { name } of choice.curves) {
    if (!order.has(name)) order.set(name, order.size);
  }
  const colour = ({ name }) => `var(--c${order.get(name) % 6})`;
  const dash = ({ name }) => ["none", "6 3", "2 3", "8 3 2 3"][Math.floor(order.get(name) / 6) % 4];
  const digits = d3.format(",.4~g");
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
  const bytes = (value) => {
    const power = Math.max(0, Math.min(4, Math.floor(Math.log2(value) / 10)));
    return `${digits(value / 1024 ** power)} ${UNITS[power]}`;
  };
  const short = (value) => (Math.abs(value) >= 1e4 ? d3.format("~s")(value) : digits(value));
  const format = (value, unit) => (value instanceof Date ? value.toISOString().slice(0, 16).replace("T", " ")
    : unit.startsWith("bytes") ? bytes(value) : `${digits(value)} ${unit}`.trim());

  const points = (curve, figure) => curve.x.map((x, index) => ({
    name: curve.name,
    x: figure.time ? new Date(x) : x,
    y: curve.y[index],
    low: curve.low?.[index] ?? null,
    high: curve.high?.[index] ?? null,
    run: curve.runs?.[index] ?? null,
  }));

  const legend = (figure, choice) => {
    const list = lmeval.element("ul", { class: "legend" });
    choice.curves.forEach((curve) => {
      const sample = d3.create("svg").attr("width", 22).attr("height", 9).attr("aria-hidden", "true");
      if (figure.kind === "dots" || figure.kind === "scatter") sample.append("circle").attr("cx", 11).attr("cy", 4.5).attr("r", 4.5).attr("fill", colour(curve));
      else sample.append("line").attr("x2", 22).attr("y1", 4.5).attr("y2", 4.5).attr("stroke", colour(curve)).attr("stroke-width", 2)
        .attr("stroke-dasharray", dash(curve));
      list.append(lmeval.element("li", {}, sample.node(), curve.name));
    });
    return list;
  };

  const options = (figure, choice, width) => ({
    width,
    className: "plot",
    ariaLabel: `${figure.title}, ${choice.label}`,
    ariaDescription: choice.caption,
    marginLeft: 62,
    marginRight: 24,
    marginBottom: 40,
    style: { background: "transparent", color: "currentColor", fontFamily: "inherit", fontSize: "11.5px" },
    insetLeft: 6,
    insetRight: 6,
  });

  // Ticks of a logarithmic axis are powers of ten, or of two for batch rows.
  const scale = (choice, axis, ticks) => {
    if (!choice.log.includes(axis)) return { type: "linear", ticks };
    const base = choice[axis] === "rows" ? 2 : 10;
    const [low, high] = d3.extent(choice.curves.flatMap((curve) => curve[axis]));
    const powers = d3.range(Math.floor(Math.log(low) / Math.log(base)), Math.ceil(Math.log(high) / Math.log(base)) + 1).map((power) => base ** power);
    const within = powers.filter((power) => axis === "y" || (power >= low && power <= high));
    return { type: "log", base, ticks: within.length > 1 ? within : ticks };
  };

  const xScale = (figure, choice) => (figure.time
    ? { type: "utc", ticks: 6, label: null, labelArrow: "none" }
    : { ...scale(choice, "x", 6), label: choice.x, labelArrow: "none", tickFormat: short });

  // Byte ticks have one unit, that of the largest value, and start at zero.
  const binary = (choice) => {
    const high = d3.max(choice.curves.flatMap((curve) => curve.y)) || 1;
    const power = Math.min(4, Math.max(0, Math.floor(Math.log2(high) / 10)));
    const ticks = d3.ticks(0, high / 1024 ** power, 5).map((value) => value * 1024 ** power);
    return { zero: true, ticks, tickFormat: (value) => `${digits(value / 1024 ** power)} ${UNITS[power]}` };
  };

  const yScale = (choice) => ({
    ...scale(choice, "y", 5),
    label: choice.y,
    labelArrow: "none",
    grid: true,
    nice: true,
    tickFormat: choice.y === "bytes" ? bytes : short,
    ...(choice.y === "bytes" && !choice.log.includes("y") ? binary(choice) : {}),
  });

  const tip = (all, choice) => Plot.tip(all, Plot.pointer({
    x: "x", y: "y", fill: "var(--plot-background)", stroke: "var(--line)",
    title: (d) => [d.name, `${format(d.x, choice.x)}: ${format(d.y, choice.y)}`,
      d.low === null ? null : `${format(d.low, "")} to ${format(d.high, "")}`, d.run].filter(Boolean).join("\n"),
  }));

  const line = (figure, choice, width) => {
    const curves = choice.curves.map((curve) => [curve, points(curve, figure)]);
    return Plot.plot({
      ...options(figure, choice, width),
      height: 270,
      x: xScale(figure, choice),
      y: yScale(choice),
      marks: [
        ...curves.flatMap(([curve, all]) => [
          Plot.areaY(all.filter((d) => d.low !== null), { x: "x", y1: "low", y2: "high", fill: colour(curve), fillOpacity: 0.13 }),
          Plot.line(all, { x: "x", y: "y", stroke: colour(curve), strokeWidth: 1.8, strokeDasharray: dash(curve) }),
          all.length <= 32 ? Plot.dot(all, { x: "x", y: "y", fill: colour(curve), r: 2.2 }) : null,
        ]),
        tip(curves.flatMap(([, all]) => all), choice),
      ],
    });
  };

  // A row of ticks for each curve, its name on the left.
  const spread = (figure, choice, width) => {
    const names = choice.curves.map((curve) => curve.name);
    const margin = Math.min(width * 0.4, 18 + 6.6 * Math.max(...names.map((name) => name.length)));
    const fits = Math.max(6, Math.floor((margin - 18) / 6.6));
    const all = choice.curves.flatMap((curve) => curve.y.map((value, run) => ({ name: curve.name, value, run })));
    const medians = choice.curves.map((curve) => ({ name: curve.name, value: d3.median(curve.y) }));
    return Plot.plot({
      ...options(figure, choice, width),
      marginLeft: margin,
      height: 74 + 44 * names.length,
      x: { label: choice.y, labelArrow: "none", grid: true, nice: true, zero: true, ticks: 5, tickFormat: short },
      y: { domain: names, label: null, tickSize: 0, tickFormat: (name) => (name.length > fits ? `${name.slice(0, fits - 1)}\u2026` : name) },
      marks: [
        Plot.tickX(all, { x: "value", y: "name", stroke: "currentColor", strokeOpacity: 0.28, inset: 9 }),
        Plot.tickX(medians, { x: "value", y: "name", stroke: "var(--c0)", strokeWidth: 3, inset: 5 }),
        Plot.tip(all, Plot.pointerX({
          x: "value", y: "name", fill: "var(--plot-background)", stroke: "var(--line)",
          title: (d) => `${d.name}\nrun ${d.run}: ${format(d.value, choice.y)}`,
        })),
      ],
    });
  };

  const dots = (figure, choice, width) => {
    const all = choice.curves.flatMap((curve) => points(curve, figure));
    return Plot.plot({
      ...options(figure, choice, width),
      height: 270,
      x: { ...xScale(figure, choice), grid: true },
      y: yScale(choice),
      marks: [
        Plot.ruleX(all.filter((d) => d.low !== null), { x: "x", y1: "low", y2: "high", stroke: "currentColor", strokeOpacity: 0.4 }),
        ...choice.curves.map((curve) => Plot.dot(points(curve, figure),
          { x: "x", y: "y", fill: colour(curve), ...(figure.kind === "dots" ? { r: 4.5 } : { r: 3.5, fillOpacity: 0.7 }) })),
        tip(all, choice),
      ],
    });
  };

  const draw = { line, spread, dots, scatter: dots };

  const table = (figure, choice) => {
    const bounds = choice.curves.some((curve) => curve.low);
    const heads = ["", choice.x, choice.y, ...(bounds ? ["low", "high"] : [])];
    const body = choice.curves.flatMap((curve) => curve.x.map((x, index) => lmeval.element("tr", {},
      ...[curve.name, x, curve.y[index], ...(bounds ? [curve.low?.[index] ?? "", curve.high?.[index] ?? ""] : [])]
        .map((value, column) => lmeval.element("td", { class: column ? "number" : null }, String(value))))));
    return lmeval.element("div", { class: "wide" }, lmeval.element("table", {},
      lmeval.element("thead", {}, lmeval.element("tr", {}, ...heads.map((name, column) => lmeval.element("th", { class: column ? "number" : null }, name)))),
      lmeval.element("tbody", {}, ...body)));
  };

  const shown = new Map(); // element of a figure -> function that draws it
  const inView = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { inView.unobserve(entry.target); shown.get(entry.target)(); }
  }, { rootMargin: "400px" });

  const add = (figure) => {
    let chosen = 0, width = 0;
    const drawing = lmeval.element("div", { class: "drawing" });
    const printed = lmeval.element("p", { class: "printed" }); // names the choice on paper
    const caption = lmeval.element("figcaption");
    const data = lmeval.element("details", { ontoggle: () => { if (data.open) fill(); } }, lmeval.element("summary", { class: "small dim" }, "Data"));
    const fill = () => {
      data.querySelector("div")?.remove();
      data.append(table(figure, figure.choices[chosen]));
    };
    const paint = () => {
      const choice = figure.choices[chosen];
      width = drawing.clientWidth || 480;
      drawing.replaceChildren(...(figure.kind === "spread" ? [] : [legend(figure, choice)]), draw[figure.kind](figure, choice, width));
      drawing.style.minHeight = 0; // it only reserved space
      drawing.querySelector("svg.plot").setAttribute("role", "img");
    };
    const choose = (which) => {
      chosen = which;
      printed.textContent = figure.choices[chosen].label;
      caption.textContent = figure.choices[chosen].caption;
      if (data.open) fill();
      if (width) paint();
    };
    const several = figure.choices.length > 1;
    const controls = lmeval.element("div", { class: "controls small" }, several
      ? lmeval.select("of", figure.choices.map((choice) => choice.label), 0, choose)
      : lmeval.element("span", { class: "dim" }, figure.choices[0].label));
    document.getElementById("figures").append(lmeval.element("figure", {}, lmeval.element("h3", {}, figure.title), controls, printed, drawing, caption, data));
    choose(0);
    shown.set(drawing, paint);
    inView.observe(drawing);
    new ResizeObserver(() => { if (width && drawing.clientWidth !== width) paint(); }).observe(drawing);
  };

  lmeval.data.figures.forEach(add);
  addEventListener("beforeprint", () => shown.forEach((paint) => paint()));
}
