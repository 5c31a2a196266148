// The plots. Each is drawn when it comes into view, anew when its width changes, and all of them before printing.
"use strict";

{
  // A model has the same colour and dashes in every plot.
  const order = new Map();
  for (const figure of lmeval.data.figures) for (const choice of figure.choices) for (const { name } of choice.curves) {
    if (!order.has(name)) order.set(name, order.size);
  }
  const colour = ({ name }) => `var(--c${order.get(name) % 6})`;
  const dash = ({ name }) => ["none", "6 3", "2 3", "8 3 2 3"][Math.floor(order.get(name) / 6) % 4];
  const digits = d3.format(",.4~g");
  const bytes = (value) => {
    let unit = 0;
    while (value >= 1024 && unit < 4) { value /= 1024; unit += 1; }
    return `${digits(value)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
  };
  const short = (value) => (Math.abs(value) >= 1e4 ? d3.format("~s")(value) : digits(value));
  const said = (value, unit) => (value instanceof Date ? value.toISOString().slice(0, 16).replace("T", " ")
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
      if (figure.kind === "dots") sample.append("circle").attr("cx", 11).attr("cy", 4.5).attr("r", 4.5).attr("fill", colour(curve));
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

  // A logarithmic axis is marked at the powers of ten, or of two where rows are doubled.
  const scale = (choice, axis, ticks) => {
    if (!choice.log.includes(axis)) return { type: "linear", ticks };
    const base = choice[axis] === "rows" ? 2 : 10;
    const [low, high] = d3.extent(choice.curves.flatMap((curve) => curve[axis]));
    const powers = d3.range(Math.floor(Math.log(low) / Math.log(base)), Math.ceil(Math.log(high) / Math.log(base)) + 1).map((power) => base ** power);
    const within = powers.filter((power) => axis === "y" || (power >= low && power <= high));
    return { type: "log", base, ticks: within.length > 1 ? within : ticks };
  };

  const xScale = (figure, choice) => ({
    ...(figure.time ? { type: "utc", ticks: 6 } : scale(choice, "x", 6)),
    label: figure.time ? null : choice.x,
    labelArrow: "none",
    ...(figure.time ? {} : { tickFormat: short }),
  });

  // Bytes are marked in one unit, that of the largest, from zero on.
  const binary = (choice) => {
    const high = d3.max(choice.curves.flatMap((curve) => curve.y)) || 1;
    const power = Math.min(4, Math.max(0, Math.floor(Math.log2(high) / 10)));
    return {
      ticks: d3.ticks(0, high / 1024 ** power, 5).map((value) => value * 1024 ** power),
      tickFormat: (value) => `${digits(value / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`,
    };
  };

  const yScale = (choice) => ({
    ...scale(choice, "y", 5),
    label: choice.y,
    labelArrow: "none",
    grid: true,
    nice: true,
    zero: choice.y === "bytes" && !choice.log.includes("y"),
    tickFormat: choice.y === "bytes" ? bytes : short,
    ...(choice.y === "bytes" && !choice.log.includes("y") ? binary(choice) : {}),
  });

  const tip = (all, choice) => Plot.tip(all, Plot.pointer({
    x: "x", y: "y", fill: "var(--plot-background)", stroke: "var(--line)",
    title: (d) => [d.name, `${said(d.x, choice.x)}: ${said(d.y, choice.y)}`,
      d.low === null ? null : `${said(d.low, "")} to ${said(d.high, "")}`, d.run].filter(Boolean).join("\n"),
  }));

  const line = (figure, choice, width) => {
    const marks = choice.curves.flatMap((curve) => {
      const own = points(curve, figure);
      return [
      own.some((d) => d.low !== null)
        ? Plot.areaY(own.filter((d) => d.low !== null), { x: "x", y1: "low", y2: "high", fill: colour(curve), fillOpacity: 0.13 }) : null,
      Plot.line(own, { x: "x", y: "y", stroke: colour(curve), strokeWidth: 1.8, strokeDasharray: dash(curve) }),
      own.length <= 32 ? Plot.dot(own, { x: "x", y: "y", fill: colour(curve), r: 2.2 }) : null,
      ];
    });
    return Plot.plot({
      ...options(figure, choice, width),
      height: 270,
      x: xScale(figure, choice),
      y: yScale(choice),
      marks: [...marks, tip(choice.curves.flatMap((curve) => points(curve, figure)), choice)],
    });
  };

  // Values with their names beside them: `rows` is a line of the plot for each curve.
  const named = (figure, choice, width, x, marks) => {
    const names = choice.curves.map((curve) => curve.name);
    const margin = Math.min(width * 0.4, 18 + 6.6 * Math.max(...names.map((name) => name.length)));
    const fits = Math.max(6, Math.floor((margin - 18) / 6.6));
    return Plot.plot({
      ...options(figure, choice, width),
      marginLeft: margin,
      height: 74 + 44 * names.length,
      x: { labelArrow: "none", grid: true, nice: true, ticks: 5, ...x },
      y: { domain: names, label: null, tickSize: 0, tickFormat: (name) => (name.length > fits ? `${name.slice(0, fits - 1)}\u2026` : name) },
      marks,
    });
  };

  const spread = (figure, choice, width) => {
    const all = choice.curves.flatMap((curve) => curve.y.map((value, run) => ({ name: curve.name, value, run })));
    const middles = choice.curves.map((curve) => ({ name: curve.name, value: d3.median(curve.y) }));
    return named(figure, choice, width, { label: choice.y, zero: true, tickFormat: short }, [
      Plot.tickX(all, { x: "value", y: "name", stroke: "currentColor", strokeOpacity: 0.28, inset: 9 }),
      Plot.tickX(middles, { x: "value", y: "name", stroke: "var(--c0)", strokeWidth: 3, inset: 5 }),
      Plot.tip(all, Plot.pointerX({
        x: "value", y: "name", fill: "var(--plot-background)", stroke: "var(--line)",
        title: (d) => `${d.name}\nrun ${d.run}: ${said(d.value, choice.y)}`,
      })),
    ]);
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
        ...choice.curves.map((curve) => Plot.dot(points(curve, figure), { x: "x", y: "y", fill: colour(curve), r: 4.5 })),
        tip(all, choice),
      ],
    });
  };

  const draw = { line, spread, dots };

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

  const shown = new Map(); // where a figure is drawn -> the function that draws it
  const inView = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { inView.unobserve(entry.target); shown.get(entry.target)(); }
  }, { rootMargin: "400px" });

  const add = (figure) => {
    let chosen = 0, width = 0;
    const place = lmeval.element("div", { class: "drawing" });
    const printed = lmeval.element("p", { class: "printed" }); // the choice, which paper has no control for
    const caption = lmeval.element("figcaption");
    const data = lmeval.element("details", { ontoggle: () => { if (data.open) fill(); } }, lmeval.element("summary", { class: "small dim" }, "Data"));
    const fill = () => {
      data.querySelector("div")?.remove();
      data.append(table(figure, figure.choices[chosen]));
    };
    const paint = () => {
      const choice = figure.choices[chosen];
      width = place.clientWidth || 480;
      place.replaceChildren(...(figure.kind === "spread" ? [] : [legend(figure, choice)]), draw[figure.kind](figure, choice, width));
      place.style.minHeight = 0; // until now it held the space
      place.querySelector("svg.plot").setAttribute("role", "img");
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
    document.getElementById("figures").append(lmeval.element("figure", {}, lmeval.element("h3", {}, figure.title), controls, printed, place, caption, data));
    choose(0);
    shown.set(place, paint);
    inView.observe(place);
    new ResizeObserver(() => { if (width && place.clientWidth !== width) paint(); }).observe(place);
  };

  lmeval.data.figures.forEach(add);
  addEventListener("beforeprint", () => shown.forEach((paint) => paint()));
}
