// Ask for the state of the folder each second and show it. All content is inserted as text.
"use strict";

{
  const made = lmeval.element;
  const byId = (id) => document.getElementById(id);
  const shown = {}; // part of the page -> what it shows, as JSON: a part that stays the same is left alone

  const changed = (part, content) => {
    const text = JSON.stringify(content);
    if (shown[part] === text) return false;
    shown[part] = text;
    return true;
  };
  const say = (id, text) => { if (byId(id).textContent !== text) byId(id).textContent = text; };
  const fallback = (text) => made("p", { class: "dim" }, text);

  const seconds = (count) => {
    const whole = Math.max(0, Math.round(count));
    const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
    return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
  };

  const drawn = (tag, attributes, ...children) => {
    const one = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    one.append(...children);
    return one;
  };

  const curve = (points) => {
    const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => Math.log(Math.max(y, 1e-12)))];
    const scaled = (values, size) => {
      const [low, high] = [Math.min(...values), Math.max(...values)];
      return values.map((value) => (high > low ? (value - low) / (high - low) : 0.5) * size);
    };
    const [x, y] = [scaled(xs, 600), scaled(ys, 56)];
    const path = x.map((at, index) => `${index ? "L" : "M"}${at.toFixed(1)},${(60 - y[index]).toFixed(1)}`).join("");
    const said = `Running perplexity, from ${points[0][1].toPrecision(4)} at ${points[0][0].toLocaleString("en")} tokens ` +
      `to ${points.at(-1)[1].toPrecision(4)} at ${points.at(-1)[0].toLocaleString("en")}`;
    return drawn("svg", { class: "curve", viewBox: "0 0 600 64", preserveAspectRatio: "none", role: "img", "aria-label": said },
      drawn("path", { d: path }));
  };

  const showWorks = (works) => {
    if (!changed("works", works)) return;
    byId("works").replaceChildren(...(works.length ? works.map((work) => {
      const title = work.title || "between two measurements";
      const numbers = [work.done, work.so_far, work.rate, work.left === null ? "" : `${seconds(work.left)} left`,
        work.age >= 3 ? `as of ${seconds(work.age)} ago` : ""];
      return made("div", { class: work.age >= 60 ? "work quiet" : "work" },
        made("h3", {}, work.process ? `${work.process}: ${title}` : title),
        work.test ? made("p", { class: "dim small" }, work.test) : null,
        work.title ? made("progress", { "aria-label": `Progress of: ${title}`, max: 1, value: work.share === null ? null : work.share }) : null,
        work.title ? made("p", { class: "numbers" }, ...numbers.filter(Boolean).map((text) => made("span", {}, text))) : null,
        work.curve.length > 1 ? curve(work.curve) : null);
    }) : [fallback("No process of a run reports progress here.")]));
  };

  const showReport = (report, open) => {
    byId("finished").hidden = !report;
    if (!report || !changed("report", [report, open])) return;
    byId("report").replaceChildren(
      made("p", {}, made("span", { class: report.outcome ? `tag ${report.outcome}` : "tag" }, report.outcome || "no outcome"), ` ${report.headline}`),
      report.judged ? made("p", {}, `Against the baseline: ${report.judged}`) : "",
      made("p", { class: "dim" }, `It began at ${report.started.replace("T", " ").replace("+00:00", " UTC")}. ` +
        "All its numbers are in report.html in the folder."),
      made("ul", { class: "failures", "aria-label": "Failed tests" }, ...report.failed.map(([test, message]) =>
        made("li", {}, test, message ? made("pre", {}, message) : null))));
  };

  const showResults = (results, count, share) => {
    say("count", count ? `${count > results.length ? `the last ${results.length} of ` : ""}${count.toLocaleString("en")}${share ? `, of shard ${share}` : ""}` : "");
    if (!changed("results", results)) return;
    const rows = results.toReversed().flatMap((result) => result.numbers.map(([metric, value, interval, n], index) => made("tr", {},
      made("td", { class: "test" }, ...(index ? [] : [result.kind, made("span", { class: "interval" }, result.test)])),
      made("td", { class: "name" }, ...(index ? [] : [result.model, made("span", { class: "interval" }, result.subject)])),
      made("td", {}, metric),
      made("td", { class: "number" }, value, interval ? made("span", { class: "interval" }, interval) : null),
      made("td", { class: "number" }, n))));
    byId("results").replaceChildren(...(rows.length ? rows : [made("tr", {}, made("td", { colspan: 5, class: "dim" }, "Nothing is finished yet."))]));
  };

  const judgement = { true: ["passed", "judged right"], false: ["failed", "judged wrong"] };

  const showAnswers = (answers, rate) => {
    say("answer-rate", [answers.length ? `the last ${answers.length}` : "", rate ? `${rate} of answers` : ""].filter(Boolean).join(", "));
    if (!changed("answers", answers)) return;
    const opened = new Set([...document.querySelectorAll("#answers details[open]")].map((one) => one.dataset.id));
    byId("answers").replaceChildren(...(answers.length ? answers.map((answer) => {
      const [kind, word] = judgement[answer.judged] || [];
      const scores = Object.entries(answer.scores || {}).map(([name, score]) => `${name} ${Number(score.toPrecision(4))}`).join(", ");
      return made("div", { class: "answer" },
        made("p", {}, made("strong", {}, `Question ${answer.question + 1}`), " ",
          made("span", { class: "dim small" }, answer.prompt === undefined ? `key ${answer.key.slice(0, 12)}, ` : "", answer.why ? `ended by ${answer.why}` : ""), " ",
          word ? made("span", { class: `tag ${kind}` }, word) : null, scores ? made("span", { class: "tag" }, scores) : null),
        made("pre", { "aria-label": "Output" }, answer.text || "(empty)"),
        answer.target === undefined || answer.target === null ? null : made("p", { class: "small" }, made("span", { class: "dim" }, "target "), answer.target),
        answer.prompt === undefined ? null : made("details", { "data-id": answer.id, open: opened.has(String(answer.id)) },
          made("summary", {}, "Prompt"), made("pre", {}, answer.prompt)));
    }) : [fallback("No answers yet.")]));
  };

  const show = (state) => {
    say("status", state.status);
    document.title = `${state.status} - lmeval watch`;
    say("folder", state.folder);
    byId("problems").hidden = !state.problems.length;
    if (changed("problems", state.problems)) byId("problems").replaceChildren(...state.problems.map((text) => made("li", {}, text)));
    showWorks(state.works);
    showReport(state.report, state.status);
    showResults(state.results, state.count, state.share);
    showAnswers(state.answers, state.answer_rate);
    say("heard", new Date().toLocaleTimeString());
  };

  const ask = async () => {
    try {
      const response = await fetch("/state", { cache: "no-store" });
      if (!response.ok) throw new Error(await response.text());
      show(await response.json());
    } catch (error) {
      say("status", "lmeval watch does not answer: it ended, or it cannot read the folder");
    }
    setTimeout(ask, 1000);
  };
  ask();
}
